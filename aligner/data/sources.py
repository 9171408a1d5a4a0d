"""Where a run's prompts come from: the user's JSONL files, or movie reviews."""

from aligner.data.dataset import DataConfig, load
from aligner.data.encoder import Encoder
from aligner.data.examples import Prompt
from aligner.data.formats import PROMPTS
from aligner.data.movie_reviews import review_rows


def load_prompts(data: str, eval_data: str, tokenizer, max_tokens: int) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts, held-out prompts).

    data, eval_data: comma-separated JSONL files. Without data, openings of IMDb reviews for both.
    max_tokens: tokens; a longer prompt is an error.
    """
    train, held_out = load(
        DataConfig(files=data),
        eval_data,
        PROMPTS,
        Encoder(tokenizer),
        room=max_tokens,
        seed=0,
        default=lambda: review_rows(tokenizer),
    )
    return train.first(len(train)), held_out.first(len(held_out)) if held_out else []
