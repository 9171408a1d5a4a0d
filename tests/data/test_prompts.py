"""Prompts: what a line becomes, errors that name file and line, and an order that seed and step alone decide."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from aligner.data.prompts import PromptOrder, read_prompts
from aligner.data.tokenizer import load_tokenizer, render_chat

WORDS = ["<s>", "</s>", "the", "film", "was", "user", ":", "good", "assistant"]
TEMPLATE = "<s> {% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}assistant :"


def word_tokenizer(template=TEMPLATE):
    """One id a word, id = position in WORDS; <s> is put before raw text."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_raw_text_and_chat(tmp_path):
    file = write(
        tmp_path / "a.jsonl",
        '{"text": "the film", "id": 7, "tags": ["x"]}',
        "",
        '{"messages": [{"role": "user", "content": "was good"}], "answer": "42"}',
    )
    raw, chat = read_prompts((file,), word_tokenizer(), max_tokens=16)
    assert (raw.text, raw.tokens, raw.metadata) == ("the film", (0, 2, 3), {"id": 7, "tags": ["x"]})
    assert chat.text == "<s> user : was good assistant :"
    assert chat.tokens == (0, 5, 6, 4, 7, 8, 6)  # the template's own <s>, once
    assert chat.metadata == {"answer": "42"}


def test_files_are_read_in_order(tmp_path):
    files = tuple(write(tmp_path / name, json.dumps({"text": word})) for name, word in (("b", "film"), ("a", "the")))
    assert [p.text for p in read_prompts(files, word_tokenizer(), 8)] == ["film", "the"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "the"', "not valid JSON"),
        ('["the"]', "got a JSON list, expected an object"),
        ('{"txt": "the"}', "got the keys ['txt'], expected \"text\" (raw text) or \"messages\" (a chat); rename 'txt'"),
        ('{"text": "the", "messages": []}', 'got both "text" and "messages"'),
        ('{"text": "  "}', "\"text\" is '  ', expected a string that is not empty"),
        ('{"text": 3}', '"text" is 3, expected a string'),
        ('{"messages": "the"}', '"messages" must be a list'),
        ('{"messages": [{"role": "user"}]}', '"messages" must be a list'),
        ('{"messages": [{"role": "user", "content": " "}]}', '"messages" has no content'),
        ('{"messages": []}', '"messages" has no content'),
        ('{"text": "the film was good the"}', "the prompt has 6 tokens, the limit is 5; shorten it"),
    ],
)
def test_errors_name_file_and_line(tmp_path, line, message):
    file = write(tmp_path / "p.jsonl", '{"text": "the film was good"}', line)
    with pytest.raises(ValueError) as error:
        read_prompts((file,), word_tokenizer(), max_tokens=5)
    assert str(error.value).startswith(f"{file}:2: {message}"), str(error.value)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(ValueError, match="does not exist; give a JSONL file"):
        read_prompts((tmp_path / "no.jsonl",), word_tokenizer(), 8)
    with pytest.raises(ValueError, match="expected at least one"):
        read_prompts((write(tmp_path / "empty.jsonl", ""),), word_tokenizer(), 8)


def test_a_tokenizer_without_chat_template():
    with pytest.raises(ValueError, match="no chat template"):
        render_chat(word_tokenizer(template=None), [{"role": "user", "content": "the"}])


def test_load_tokenizer_reads_a_folder_and_refuses_others(tmp_path):
    word_tokenizer().save_pretrained(tmp_path / "good")
    tokenizer = load_tokenizer(tmp_path / "good")
    assert tokenizer("the film")["input_ids"] == [0, 2, 3] and tokenizer.eos_token_id == 1
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    endless = word_tokenizer()
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="has no eos_token"):
        load_tokenizer(tmp_path / "endless")


@given(num=st.integers(1, 40), size=st.integers(1, 40), seed=st.integers(0, 2**32), epochs=st.integers(1, 4))
def test_every_epoch_takes_every_prompt_once(num, size, seed, epochs):
    if size > num:
        with pytest.raises(ValueError, match=f"takes {size} prompts, but there are only {num}"):
            PromptOrder(num, seed).batch(0, size)
        return
    steps = -(-epochs * num // size)
    batches = [PromptOrder(num, seed).batch(step, size) for step in range(steps)]
    stream = [index for batch in batches for index in batch]
    assert all(len(batch) == size for batch in batches)
    for epoch in range(epochs):
        assert sorted(stream[epoch * num : (epoch + 1) * num]) == list(range(num))


def test_order_depends_on_seed_and_epoch_alone():
    first = [PromptOrder(50, 3).batch(step, 20) for step in range(6)]
    again = PromptOrder(50, 3)
    assert [again.batch(step, 20) for step in (5, 0, 2)] == [first[5], first[0], first[2]]
    assert PromptOrder(50, 4).batch(0, 20) != first[0]
    epochs = [PromptOrder(50, 3).batch(epoch, 50) for epoch in range(2)]
    assert epochs[0] != epochs[1]
    stream = [index for batch in first for index in batch]
    assert stream[:100] == epochs[0] + epochs[1]  # the batch size cuts the stream and does not change it


def test_the_shuffle_is_uniform():
    counts = Counter(PromptOrder(4, seed).batch(0, 1)[0] for seed in range(4000))
    assert all(abs(counts[index] - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for index in range(4))
