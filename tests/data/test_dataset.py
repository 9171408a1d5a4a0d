"""Data sets: what is left out, cut or refused, several files, held-out data."""

from collections import Counter
from dataclasses import replace

import pytest

from aligner.data.dataset import DataConfig, Dataset, load
from aligner.data.encoder import Encoder
from aligner.data.examples import Example, Judged, Pair, Prompt, Rated, Taught, Weighted
from aligner.data.formats import COMPARISONS, PROMPTS, RATED, SUPERVISED, TAUGHT
from aligner.data.order import Order
from aligner.data.shorten import shorten
from tests.data.words import ids, word_tokenizer, write

ENCODER = Encoder(word_tokenizer())
SKIP = {"bad_lines": "skip", "too_long": "skip"}


def opened(files, use=PROMPTS, *, room=8, seed=3, **config):
    return Dataset.open(str(files), DataConfig(**config), use, ENCODER, room=room, seed=seed)


def numbered(path, num, **more):
    return write(path, *({"text": "the film", "id": i, **more} for i in range(num)))


def numbers(examples):
    return [example.metadata["id"] for example in examples]


def test_batches_follow_the_order(tmp_path):
    data = opened(numbered(tmp_path / "a.jsonl", 25))
    assert len(data) == 25 and numbers([data[4]]) == [4] and numbers(data.first(3)) == [0, 1, 2]
    order = Order(25, 3)
    for step in (5, 0, 3):
        assert numbers(data.batch(step, 10)) == order.batch(step, 10)
    with pytest.raises(ValueError, match="takes 26 examples, but there are only 25"):
        data.batch(0, 26)
    assert data.report() == "25 examples (raw text)" and data.counts == (25, 0, 0, 0)


def test_files_follow_one_another(tmp_path):
    files = [numbered(tmp_path / name, num, file=name) for name, num in (("b", 3), ("a", 4))]
    data = opened(f"{files[0]}, {files[1]}")
    assert [(p.metadata["file"], p.metadata["id"]) for p in data.first(9)] == [
        *(("b", i) for i in range(3)),
        *(("a", i) for i in range(4)),
    ]
    assert Counter(p.metadata["file"] for p in data.batch(0, 7)) == {"b": 3, "a": 4}


def test_weights_decide_how_often_a_file_is_taken(tmp_path):
    files = [numbered(tmp_path / name, num, file=name) for name, num in (("a", 10), ("b", 1000))]
    data = opened(f"{files[0]}:3,{files[1]}:1")
    taken = [p for step in range(2) for p in data.batch(step, 1000)]
    assert Counter(p.metadata["file"] for p in taken) == {"a": 1500, "b": 500}
    assert set(Counter(p.metadata["id"] for p in taken if p.metadata["file"] == "a").values()) == {150}
    assert set(Counter(p.metadata["id"] for p in taken if p.metadata["file"] == "b").values()) == {1}


def test_a_name_that_ends_in_a_number(tmp_path):
    odd = numbered(tmp_path / "a:1", 3)
    assert len(opened(odd)) == 3 and len(opened(f"{odd}:2")) == 3


BAD = ['{"text": "the"', {"text": ""}, {"txt": "the"}, {"prompt": "the"}]
LONG = {"text": "the film was good the film was good", "id": "long"}


def test_a_bad_line_is_an_error_when_all_are_read(tmp_path):
    path = write(tmp_path / "a", {"text": "the"}, "", {"text": ""})
    with pytest.raises(ValueError) as error:
        opened(path)
    assert str(error.value) == f"{path}:3: \"text\" is '', expected a string that is not empty."
    with pytest.raises(ValueError, match=r"/a:2: the example has 9 tokens, the limit is 8; shorten it, remove"):
        opened(write(tmp_path / "a", {"text": "the"}, LONG))


@pytest.mark.parametrize("check", [True, False])
def test_bad_and_long_lines_are_left_out_and_counted(tmp_path, check):
    path = write(tmp_path / "a", BAD[0], *({"text": "the", "id": i} for i in range(6)), LONG, *BAD[1:], {"text": ""})
    data = opened(path, check=check, **SKIP)
    assert len(data) == (6 if check else 11)  # the first one is always read
    assert numbers(data.first(20)) == list(range(6))
    assert sorted(numbers(data.batch(0, len(data)))) == list(range(6))
    assert data.counts == (12, 5, 1, 0)
    assert data.report() == "12 examples (raw text), 5 bad ones left out, 1 of more than 8 tokens left out"


def test_an_unchecked_line_is_met_in_its_batch(tmp_path):
    path = write(tmp_path / "a", {"text": "the", "id": 0}, LONG, {"text": ""})
    lazy = opened(path, check=False, **SKIP)
    assert lazy.counts == (1, 0, 0, 0) and lazy.report() == "3 examples (raw text), 1 read"
    batches = {step: Order(3, 3).batch(step, 1)[0] for step in range(3)}
    for step, line in batches.items():
        if line == 0:
            assert numbers(lazy.batch(step, 1)) == [0]
        else:
            with pytest.raises(ValueError, match=f"all 1 examples of a step were left out; the first was {path}:"):
                lazy.batch(step, 1)
    with pytest.raises(ValueError, match="example 1 was left out"):
        lazy[1]
    strict = opened(path, check=False)
    with pytest.raises(ValueError, match=r"a:2: the example has 9 tokens|a:3: \"text\" is ''"):
        strict.batch(0, 3)


def test_nothing_left(tmp_path):
    path = write(tmp_path / "a", LONG, {"text": ""})
    with pytest.raises(ValueError, match=r"no example is left of 2 .* the first left out was .*a:1: the example"):
        opened(path, **SKIP)
    with pytest.raises(ValueError, match=r"a:1: got the keys \['txt'\]"):
        opened(write(tmp_path / "a", {"txt": "a"}, {"tx": "a"}), **SKIP)
    good = numbered(tmp_path / "b", 3)
    with pytest.raises(ValueError, match="a file of the blend has no example left"):
        opened(f"{good}:1,{write(tmp_path / 'c', LONG)}:1", **SKIP)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("{a}:1,{a}", "some files have a weight; give all of them one, or none"),
        ("{a}:-1", "the weight -1, expected a positive number"),
        ("{a}:nan", "the weight nan, expected"),
        ("{a}:x", "a:x' does not exist; give a JSONL file"),
        (" ,", "name one or more JSONL files"),
        ("", "--data.files is not given"),
    ],
)
def test_names_of_files(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        opened(files.format(a=numbered(tmp_path / "a", 3)))


def test_limits(tmp_path):
    path = numbered(tmp_path / "a", 3)
    with pytest.raises(ValueError, match="data.max-tokens is 9, but there is room for 8"):
        opened(path, max_tokens=9)
    with pytest.raises(ValueError, match="has 3 tokens, the limit is 2"):
        opened(path, max_tokens=2)
    for wrong in (-1, 1):
        with pytest.raises(ValueError, match=f"data.max-tokens is {wrong}, expected 2 or more"):
            DataConfig(max_tokens=wrong)


def test_all_examples_have_as_many_logits(tmp_path):
    row = {"tokens": [0, 2], "labels": [2, 3], "loss_mask": [1, 1], "topk_logits": [[1], [2]]}
    row |= {"topk_token_ids": [[2], [3]], "log_sum_exp_logits": [3, 4]}
    bare = {key: value for key, value in row.items() if key != "log_sum_exp_logits"}
    wide = {**row, "topk_logits": [[1, 2], [2, 3]], "topk_token_ids": [[2, 3], [3, 4]]}
    for other, message in ((bare, "got 1 logit.* without log-sum, expected 1 logit.* with"), (wide, "got 2 logit")):
        with pytest.raises(ValueError, match=f"a:2: {message}"):
            opened(write(tmp_path / "a", row, other), TAUGHT)


def test_all_examples_have_as_many_marks(tmp_path):
    one, two = ({"text": "the", "label": [1.0] * num} for num in (1, 2))
    with pytest.raises(ValueError, match=r"a:2: got 2 mark\(s\), expected 1 mark\(s\) as in the examples before"):
        opened(write(tmp_path / "a", one, two), RATED)
    with pytest.raises(ValueError, match="b:1: got 2 mark"):
        opened(f"{write(tmp_path / 'a', one)},{write(tmp_path / 'b', two)}", RATED)
    assert len(opened(write(tmp_path / "a", one, two, one), RATED, bad_lines="skip")) == 2


def test_two_lines_an_example(tmp_path):
    texts = [{"text": word} for word in ("good", "bad", "the", "film", "was", "was")]
    data = opened(write(tmp_path / "a", *texts), COMPARISONS, bad_lines="skip")
    assert len(data) == 2 and data.counts.bad == 1 and data[1].chosen.tokens == ids("<s> the </s>")


def test_a_chat_template_file(tmp_path):
    (tmp_path / "t.jinja").write_text("the")
    assert DataConfig(chat_template=tmp_path / "t.jinja").template() == "the"
    assert DataConfig().template() is None
    with pytest.raises(ValueError, match="--data.chat-template .*none' cannot be read"):
        DataConfig(chat_template=tmp_path / "none").template()


def test_training_and_held_out_data(tmp_path):
    path, other = numbered(tmp_path / "a", 5), numbered(tmp_path / "b", 2)

    def loaded(files, eval_files, default=None):
        return load(DataConfig(files=files), eval_files, PROMPTS, ENCODER, room=8, seed=0, default=default)

    train, held_out = loaded(str(path), str(other))
    assert (len(train), len(held_out)) == (5, 2)
    assert loaded(str(path), "")[1] is None
    with pytest.raises(ValueError, match="--eval-data is 'b', but --data.files is not given"):
        loaded("", "b")
    with pytest.raises(ValueError, match="--data.files is not given; name one"):
        loaded("", "")
    train, held_out = loaded("", "", lambda: ([{"text": "the"}] * 3, [{"text": "film"}]))
    assert (len(train), held_out[0].tokens) == (3, ids("<s> film"))
    assert loaded("", "", lambda: ([{"text": "the"}], []))[1] is None


def example(prompt, response):
    return Example(tokens=(*prompt, *response), mask=(False,) * len(prompt) + (True,) * len(response))


@pytest.mark.parametrize(
    ("limit", "short"),
    [
        (6, example([2, 3], [4, 5, 6, 7])),
        (5, example([3], [4, 5, 6, 7])),
        (4, example([3], [4, 5, 6])),
        (2, example([3], [4])),
    ],
)
def test_prompts_give_way_before_responses(limit, short):
    long = example([1, 2, 3], [4, 5, 6, 7])
    assert shorten(long, limit, ENCODER) == short
    judged = Judged(prompt=(1, 2, 3), response=(4, 5, 6, 7), desirable=True)
    cut = shorten(judged, limit, ENCODER)
    assert (cut.prompt, cut.response) == short.split()
    # The pair's other response is shorter, and both keep the same prompt.
    pair = shorten(Pair(chosen=example([1, 2, 3], [8]), rejected=long), limit, ENCODER)
    assert pair.rejected == short and pair.chosen == example(short.split()[0], [8])


def test_other_examples_lose_their_beginning():
    prompt = shorten(Prompt(text="-", tokens=ids("<s> the film was"), metadata={"a": 1}), 2, ENCODER)
    assert prompt == Prompt(text="film was", tokens=ids("film was"), metadata={"a": 1})
    turns = Example(tokens=(1, 2, 3, 4, 5), mask=(False, True, True, False, True))
    assert shorten(turns, 4, ENCODER) == Example(tokens=(2, 3, 4, 5), mask=(False, True, False, True))
    assert shorten(Rated(tokens=(1, 2, 3), attributes=(1.0,)), 2, ENCODER).tokens == (2, 3)
    responses = (example([1, 2], [3]), example([1, 2], [3, 4, 5]))
    weighted = Weighted(responses=responses, log_p_attributes=(0.0, 0.0), log_p=(0.0, 0.0), log_q=(0.0, 0.0))
    short = shorten(weighted, 3, ENCODER).responses
    assert short == (responses[0], Example(tokens=(3, 4, 5), mask=(False, True, True)))
    taught = Taught(
        tokens=(1, 2, 3),
        mask=(False, True, True),
        topk_ids=((0,), (2,), (3,)),
        topk_logits=((0.0,), (2.0,), (3.0,)),
        log_sum=(0.0, 2.5, 3.5),
    )
    assert shorten(taught, 2, ENCODER) == Taught(
        tokens=(2, 3), mask=(False, True), topk_ids=((2,), (3,)), topk_logits=((2.0,), (3.0,)), log_sum=(2.5, 3.5)
    )
    early = replace(taught, mask=(False, True, False))
    assert shorten(early, 2, ENCODER) is None


def test_pairs_that_are_the_same_once_cut_are_left_out(tmp_path):
    rows = [{"prompt": "the", "completion": "the film was good"}, {"prompt": "the", "completion": "good"}]
    data = opened(write(tmp_path / "a", *rows), SUPERVISED, room=5, too_long="truncate")
    assert data.counts == (2, 0, 0, 1) and data.report().endswith("1 cut to 5 tokens")
    assert data[0].tokens == ids("the the film was good")
    pairs = [{"prompt": "the", "chosen": "the film was", "rejected": "the film was good"}]
    pairs += [{"prompt": "the", "chosen": "good", "rejected": "bad"}]
    data = Dataset.open(
        str(write(tmp_path / "b", *pairs)),
        DataConfig(too_long="truncate"),
        COMPARISONS,
        ENCODER,
        room=4,
        seed=0,
    )
    assert data.counts == (2, 0, 1, 0) and len(data) == 1


def test_lengths():
    pair = Pair(chosen=example([1], [2]), rejected=example([1], [2, 3]))
    assert pair.length == 3 and Judged(prompt=(1,), response=(2, 3), desirable=True).length == 3
    weighted = Weighted(responses=(pair.chosen, pair.rejected), log_p_attributes=(), log_p=(), log_q=())
    assert weighted.length == 3 and Prompt(text="", tokens=(1, 2), metadata={}).length == 2
