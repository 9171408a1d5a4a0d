"""A reward for a first run: how positive a movie review sounds, by a classifier fitted when the run starts.

A logistic regression (scikit-learn) on the TF-IDF of words and word pairs, over the labelled reviews not held out.
"""

import time

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from aligner.data.movie_reviews import Review, labelled_reviews

# Responses are short. A review's first and last words carry its verdict, halve the time of the fit against whole
# reviews, and score 1.2 points more on held-out snippets of 8 to 25 words.
END_WORDS = 60
INVERSE_REGULARISATION = 2.0


class PositiveReview:
    """Reward: log-odds that the response is positive, log(p / (1 - p)) = w . tfidf(response) + b.

    Source: Maas et al. 2011 (IMDb) and Pang and Lee 2005 (Rotten Tomatoes) for the labels.
    Fitting takes some ten seconds, prints its time and its accuracy on the held-out reviews.
    Raises ValueError when the package movie-reviews is not installed.
    """

    def __init__(self):
        start = time.perf_counter()
        reviews = labelled_reviews()
        pieces = [(piece, r.positive) for r in reviews if not r.held_out for piece in _pieces(r)]
        texts, labels = zip(*pieces, strict=True)
        self._tfidf = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=3, dtype=np.float32)
        self._classifier = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=200)
        self._classifier.fit(self._tfidf.fit_transform(texts), labels)
        self.fit_seconds = time.perf_counter() - start
        self.held_out_accuracy = self._accuracy([r for r in reviews if r.held_out])
        accuracy = ", ".join(f"{name} {value:.1%}" for name, value in self.held_out_accuracy.items())
        print(f"sentiment reward fitted in {self.fit_seconds:.1f} s; held-out accuracy: {accuracy}", flush=True)

    def __call__(self, prompts: list[str], responses: list[str], metadata: list[dict]) -> list[float]:
        """Log-odds, nats, of each response; the prompt is not read. Above 0 is more likely positive than not."""
        return self._classifier.decision_function(self._tfidf.transform(responses)).tolist()

    def _accuracy(self, reviews: list[Review]) -> dict[str, float]:
        positive = np.array([r.positive for r in reviews])
        right = (np.array(self([], [r.text for r in reviews], [])) > 0) == positive
        source = np.array([r.source for r in reviews])
        by_source = {name: float(right[source == name].mean()) for name in ("imdb", "rotten_tomatoes")}
        return {"overall": float(right.mean()), **by_source}


def _pieces(review: Review) -> list[str]:
    words = review.text.split(" ")
    if len(words) <= 2 * END_WORDS:
        return [review.text]
    return [" ".join(words[:END_WORDS]), " ".join(words[-END_WORDS:])]
