"""The sentiment reward: better than chance by a wide margin on texts it never saw, and it reads the response only."""

import pytest

from aligner.data.movie_reviews import Review
from aligner.serving import sentiment
from aligner.serving.reward import load_reward


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def reward(kept):
    return sentiment.PositiveReview()


@pytest.mark.slow
def test_what_the_cache_keeps_is_what_was_fitted(reward, capsys):
    texts = [r.text for r in sentiment.labelled_reviews()[::50]] + ["", "unheardofword"]
    again = sentiment.PositiveReview()
    assert capsys.readouterr().out.startswith("sentiment reward fitted before; held-out accuracy: overall 8")
    assert again([], texts, []) == reward([], texts, [])  # to the last bit
    assert again.held_out_accuracy == reward.held_out_accuracy
    assert (again._classifier.predict_proba(again._tfidf.transform(texts[:9]))
            == reward._classifier.predict_proba(reward._tfidf.transform(texts[:9]))).all()  # fmt: skip


@pytest.mark.slow
def test_held_out_accuracy(reward):
    accuracy = reward.held_out_accuracy
    assert accuracy["imdb"] > 0.89 and accuracy["rotten_tomatoes"] > 0.76
    assert min(accuracy["imdb"], accuracy["rotten_tomatoes"]) < accuracy["overall"] < accuracy["imdb"]


def test_sign_and_that_the_prompt_is_not_read(reward):
    good, bad = " a wonderful film, moving and beautifully acted.", " boring, a complete waste of time."
    scores = reward(["terrible", "great"], [good, bad], [{}, {}])
    assert scores[0] > 1.0 and scores[1] < -1.0
    assert reward(["great", "terrible"], [good, bad], [{}, {}]) == scores
    assert reward([""], [""], [{}])[0] == pytest.approx(0.0, abs=1.0)  # nothing read: only the bias


def test_log_odds_match_the_probability(reward):
    import numpy as np

    text = ["a fine film with a weak ending"]
    probability = reward._classifier.predict_proba(reward._tfidf.transform(text))[0, 1]
    assert reward([""], text, [{}])[0] == pytest.approx(float(np.log(probability / (1 - probability))), rel=1e-5)


def test_no_held_out_text_is_fitted_and_the_accuracy_is_of_held_out_texts(kept, monkeypatch, capsys):
    def review(word, positive, source, held_out, i):
        return Review(text=f"{word} {i % 7}", positive=positive, source=source, held_out=held_out)

    # In training "good" is positive; among the held-out IMDb texts the labels are turned round.
    reviews = [review("good" if i % 2 else "bad", bool(i % 2), "imdb", False, i) for i in range(60)]
    reviews += [review("good" if i % 2 else "bad", not i % 2, "imdb", True, i) for i in range(10)]
    reviews += [review("good" if i % 2 else "bad", bool(i % 2), "rotten_tomatoes", True, i) for i in range(30)]
    monkeypatch.setattr(sentiment, "labelled_reviews", lambda: reviews)
    fitted = sentiment.PositiveReview()
    assert fitted.held_out_accuracy == {"overall": 0.75, "imdb": 0.0, "rotten_tomatoes": 1.0}
    assert "held-out accuracy: overall 75.0%, imdb 0.0%, rotten_tomatoes 100.0%" in capsys.readouterr().out


def test_it_loads_by_its_name(kept, monkeypatch):
    words = [Review(text="good" if i % 2 else "bad", positive=bool(i % 2), source=source, held_out=i < 4)
             for i in range(20) for source in ("imdb", "rotten_tomatoes")]  # fmt: skip
    monkeypatch.setattr(sentiment, "labelled_reviews", lambda: words)
    score = load_reward("aligner.serving.sentiment:PositiveReview")
    score.check()
    good, bad = score(["", ""], ["good", "bad"], [{}, {}])
    assert good > 0 > bad
