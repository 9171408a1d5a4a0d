"""Prompts as programs load them: the user's files, or movie reviews."""

import pytest

from aligner.data.dataset import DataConfig, load
from aligner.data.encoder import Encoder
from aligner.data.formats import PROMPTS
from aligner.data.movie_reviews import MAX_PROMPT_TOKENS, review_prompt_rows
from aligner.data.order import Order
from aligner.data.tokenizer import load_tokenizer, render_chat
from tests.data.words import ids, word_tokenizer, write


def load_prompts(data: str, eval_data: str, tokenizer, room: int) -> tuple[list, list]:
    """All training and all held-out prompts, as programs load them."""
    default = lambda: review_prompt_rows(tokenizer)  # noqa: E731
    train, held_out = load(
        DataConfig(files=data), eval_data, PROMPTS, Encoder(tokenizer), room=room, seed=0, default=default
    )
    return train.first(len(train)), held_out.first(len(held_out)) if held_out else []


def test_files_are_read_in_order(tmp_path):
    files = [write(tmp_path / name, {"text": word}) for name, word in (("b", "film"), ("a", "the"))]
    train, held_out = load_prompts(f"{files[0]},{files[1]}", str(files[1]), word_tokenizer(), 8)
    assert [p.text for p in train] == ["film", "the"] and [p.text for p in held_out] == ["the"]
    assert load_prompts(str(files[0]), "", word_tokenizer(), 8)[1] == []


def test_a_prompt_that_is_too_long_is_an_error(tmp_path):
    file = write(tmp_path / "p.jsonl", {"text": "the film was good"}, {"text": "the film was good the"})
    with pytest.raises(ValueError, match=r"p.jsonl:2: the example has 6 tokens, the limit is 5; shorten it"):
        load_prompts(str(file), "", word_tokenizer(), 5)


def test_reviews_are_the_default(smollm2):
    tokenizer = load_tokenizer(smollm2)
    for prompts, rows in zip(load_prompts("", "", tokenizer, 64), review_prompt_rows(tokenizer), strict=True):
        assert len(prompts) == len(rows) > 2000
        for prompt, row in zip(prompts[::50], rows[::50], strict=True):
            assert prompt.text == row["text"] and prompt.metadata == {"review_positive": row["review_positive"]}
            assert list(prompt.tokens) == tokenizer(prompt.text)["input_ids"]
        assert max(len(prompt.tokens) for prompt in prompts) == MAX_PROMPT_TOKENS


def test_order_says_prompts():
    with pytest.raises(ValueError, match="takes 3 prompts, but there are only 2; lower the batch size or add prompts"):
        Order(2, 0, noun="prompts").batch(0, 3)


def test_a_tokenizer_without_chat_template():
    with pytest.raises(ValueError, match="no chat template"):
        render_chat(word_tokenizer(template=None), [{"role": "user", "content": "the"}])


def test_load_tokenizer_reads_a_folder_and_refuses_others(tmp_path):
    word_tokenizer().save_pretrained(tmp_path / "good")
    tokenizer = load_tokenizer(tmp_path / "good")
    assert tuple(tokenizer("the film")["input_ids"]) == ids("<s> the film") and tokenizer.eos_token_id == 1
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    endless = word_tokenizer()
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="has no eos_token"):
        load_tokenizer(tmp_path / "endless")
