"""A reward for a first run: how positive a movie review sounds, by a classifier that the first run fits.

A logistic regression (scikit-learn) on the TF-IDF of words and word pairs, over the labelled reviews not held out.
"""

import hashlib
import time
from pathlib import Path

import numpy as np
import sklearn
from filelock import FileLock
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from aligner.data.movie_reviews import Review, labelled_reviews
from aligner.run.atomic import atomic_file
from aligner.run.cache import user_cache

# Responses are short. A review's first and last words carry its verdict, halve the time of the fit against whole
# reviews, and score 1.2 points more on held-out snippets of 8 to 25 words.
END_WORDS = 60
FEATURES = {"sublinear_tf": True, "ngram_range": (1, 2), "dtype": np.float32}
REGRESSION = {"C": 2.0, "max_iter": 200}
ACCURACIES = ("overall", "imdb", "rotten_tomatoes")


class PositiveReview:
    """Reward: log-odds that the response is positive, log(p / (1 - p)) = w . tfidf(response) + b.

    Source: Maas et al. 2011 (IMDb) and Pang and Lee 2005 (Rotten Tomatoes) for the labels.
    The first time it is fitted, which takes some ten seconds, and kept in the cache for later runs. Prints its accuracy
    on the held-out reviews.
    Raises ValueError when the package movie-reviews is not installed.
    """

    def __init__(self):
        reviews, cache = labelled_reviews(), user_cache()
        cache.mkdir(parents=True, exist_ok=True)
        path = cache / f"sentiment-{_digest(reviews)}.npz"
        with FileLock(f"{path}.lock"):  # one of the processes fits for all
            how = "fitted before" if self._load(path) else self._fit(reviews, path)
        accuracy = ", ".join(f"{name} {value:.1%}" for name, value in self.held_out_accuracy.items())
        print(f"sentiment reward {how}; held-out accuracy: {accuracy}", flush=True)

    def _fit(self, reviews: list[Review], path: Path) -> str:
        start = time.perf_counter()
        pieces = [(piece, r.positive) for r in reviews if not r.held_out for piece in _pieces(r)]
        texts, labels = zip(*pieces, strict=True)
        self._tfidf, self._classifier = TfidfVectorizer(**FEATURES, min_df=3), LogisticRegression(**REGRESSION)
        self._classifier.fit(self._tfidf.fit_transform(texts), labels)
        self.held_out_accuracy = self._accuracy([r for r in reviews if r.held_out])
        words = "\n".join(self._tfidf.get_feature_names_out()).encode()
        kept = {"words": np.frombuffer(words, np.uint8), "idf": self._tfidf.idf_, "w": self._classifier.coef_}
        with atomic_file(path) as file:
            np.savez(file, **kept, b=self._classifier.intercept_, **self.held_out_accuracy)
        return f"fitted in {time.perf_counter() - start:.1f} s"

    def _load(self, path: Path) -> bool:
        """Whether it is there."""
        if not path.is_file():
            return False
        kept = np.load(path)
        words = kept["words"].tobytes().decode().split("\n")
        self._tfidf = TfidfVectorizer(**FEATURES, vocabulary={word: i for i, word in enumerate(words)})
        self._tfidf.idf_ = kept["idf"]
        self._classifier = LogisticRegression(**REGRESSION)
        self._classifier.coef_, self._classifier.intercept_ = kept["w"], kept["b"]
        self._classifier.classes_ = np.array([False, True])
        self.held_out_accuracy = {name: float(kept[name]) for name in ACCURACIES}
        return True

    def __call__(self, prompts: list[str], responses: list[str], metadata: list[dict]) -> list[float]:
        """Log-odds, nats, of each response; the prompt is not read. Above 0 is more likely positive than not."""
        return self._classifier.decision_function(self._tfidf.transform(responses)).tolist()

    def _accuracy(self, reviews: list[Review]) -> dict[str, float]:
        positive = np.array([r.positive for r in reviews])
        right = (np.array(self([], [r.text for r in reviews], [])) > 0) == positive
        source = np.array([r.source for r in reviews])
        of = {"overall": slice(None), "imdb": source == "imdb", "rotten_tomatoes": source == "rotten_tomatoes"}
        return {name: float(right[of[name]].mean()) for name in ACCURACIES}


def _digest(reviews: list[Review]) -> str:
    """Of all that decides what is fitted; another version of numpy rounds otherwise."""
    digest = hashlib.sha256(repr((END_WORDS, FEATURES, REGRESSION, sklearn.__version__, np.__version__)).encode())
    for r in reviews:
        digest.update(f"{r.positive} {r.held_out} {r.source} {r.text}\n".encode())
    return digest.hexdigest()[:16]


def _pieces(review: Review) -> list[str]:
    words = review.text.split(" ")
    if len(words) <= 2 * END_WORDS:
        return [review.text]
    return [" ".join(words[:END_WORDS]), " ".join(words[-END_WORDS:])]
