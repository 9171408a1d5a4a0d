"""A tokenizer with one id a word, whose results can be written by hand."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["<s>", "</s>", "the", "film", "was", "user", ":", "good", "assistant", "bad", "system", "critic", "q:4", "q:1"]
# Each turn is `role : content </s> .` and the answer begins after `assistant :`.
TEMPLATE = (
    "<s> {% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
IDS = {word: i for i, word in enumerate(WORDS)}


def ids(text: str) -> tuple[int, ...]:
    """Ids of words between blanks."""
    return tuple(IDS[word] for word in text.split())


def word_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One id a word, id = position in WORDS; <s> is put before raw text."""
    core = Tokenizer(models.WordLevel(IDS, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def write(path: Path, *rows: dict | str) -> Path:
    """Write rows, or lines as they are, as JSONL."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
