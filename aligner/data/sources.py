"""Where a run's prompts come from: the user's JSONL files, or movie reviews."""

from pathlib import Path

from aligner.data.movie_reviews import review_prompts
from aligner.data.prompts import Prompt, read_prompts


def load_prompts(data: str, eval_data: str, tokenizer, max_tokens: int) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts, held-out prompts).

    data, eval_data: comma-separated JSONL files. Without data, openings of IMDb reviews for both.
    max_tokens: tokens; a longer prompt is an error.
    """
    if not data and not eval_data:
        return review_prompts(tokenizer)
    if not data:
        raise ValueError(f"--eval-data is {eval_data!r}, but --data is not given; name the training prompts too.")
    return _read(data, tokenizer, max_tokens), _read(eval_data, tokenizer, max_tokens) if eval_data else []


def _read(files: str, tokenizer, max_tokens: int) -> list[Prompt]:
    return read_prompts(tuple(Path(file) for file in files.split(",")), tokenizer, max_tokens)
