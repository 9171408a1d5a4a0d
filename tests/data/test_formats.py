"""Each format of a line: the example it becomes, by hand, and the sentence about each mistake."""

import json
from dataclasses import replace

import pytest

from aligner.data.encoder import Encoder
from aligner.data.examples import Example, Judged, Pair, Prompt, Rated, Taught, Weighted
from aligner.data.formats import COMPARISONS, JUDGED, PAIRS, PROMPTS, RATED, SUPERVISED, TAUGHT, USES, WEIGHTED
from aligner.data.jsonl import Rows
from aligner.data.reader import Reader
from tests.data.words import ids, word_tokenizer


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def turn(role, value, **label):
    return {"from": role, "value": value, **label}


def read(use, *rows):
    return Reader(Rows("x", list(rows)), use, Encoder(word_tokenizer())).read(0)


def sequence(prompt, response, **metadata):
    """`<s>` and the words of a prompt, then the words that are learnt."""
    tokens, answer = ids(prompt), ids(response)
    mask = (False,) * len(tokens) + (True,) * len(answer)
    return Example(tokens=tokens + answer, mask=mask, metadata=metadata)


ASKED = "<s> user : the film </s> assistant :"


@pytest.mark.parametrize(
    "row", [{"text": "the film", "id": 7}, {"prompt": "the film", "id": 7}], ids=["text", "prompt"]
)
def test_prompts_of_raw_text(row):
    given = {"text": "the film", "given": "the film"}
    assert read(PROMPTS, row) == Prompt(**given, tokens=ids("<s> the film"), metadata={"id": 7})


@pytest.mark.parametrize("key", ["messages", "prompt"])
def test_prompts_of_chats(key):
    prompt = read(PROMPTS, {key: [user("the film")], "answer": "42"})
    assert (prompt.tokens, prompt.metadata) == (ids(ASKED), {"answer": "42"}) and prompt.given == [user("the film")]


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"input": "the film", "output": "was good"}, sequence("<s> the film", "was good </s>")),
        ({"prompt": "the film", "completion": "was good"}, sequence("<s> the film", "was good </s>")),
        ({"prompt": [user("the film")], "completion": [assistant("good")]}, sequence(ASKED, "good </s>")),
        ({"prompt": [user("the film")], "completion": "good"}, sequence(ASKED, "good </s>")),
        ({"messages": [user("the film"), assistant("good"), user("bad")]}, sequence(ASKED, "good </s>")),
        ({"text": "the film"}, sequence("<s>", "the film </s>")),
        (
            {"conversations": [turn("User", "the film"), turn("Assistant", "good", label=None)], "mask": "User"},
            sequence(ASKED, "good </s>"),
        ),
        (
            {"system": "bad", "conversations": [turn("User", "the film"), turn("Assistant", "good")], "type": None},
            sequence("<s> system : bad </s> user : the film </s> assistant :", "good </s>"),
        ),
        (
            {"system": "", "conversations": [turn("Critic", "the"), turn("User", "film")], "mask": ["User", "System"]},
            sequence("<s> critic :", "the </s>"),
        ),
        (
            {
                "conversations": [turn("User", "the film"), turn("Assistant", "good", label="q:4")],
                "mask": "User",
                "type": "VALUE_TO_TEXT",
            },
            sequence(ASKED + " q:4", "good </s>"),
        ),
        (
            {
                "conversations": [turn("User", "the film"), turn("Assistant", "good", label="q:4")],
                "mask": "User",
                "type": "TEXT_TO_VALUE",
            },
            sequence(ASKED + " good </s>", "q:4"),
        ),
    ],
)
def test_supervised(row, example):
    assert read(SUPERVISED, {**row, "id": 7}) == replace(example, metadata={"id": 7})


def test_text_with_a_space_between_input_and_output(smollm2):
    from transformers import AutoTokenizer

    encoder = Encoder(AutoTokenizer.from_pretrained(smollm2))
    row = {"input": "The film was", "output": "very good"}
    example = Reader(Rows("x", [row]), SUPERVISED, encoder).read(0)
    assert encoder.text(example.tokens) == "The film was very good<|im_end|>"
    assert encoder.text(example.split()[1]) == " very good<|im_end|>"


TEXT_PAIR = Pair(chosen=sequence("<s> the film", "good </s>"), rejected=sequence("<s> the film", "bad </s>"))
CHAT_PAIR = Pair(chosen=sequence(ASKED, "good </s>"), rejected=sequence(ASKED, "bad </s>"))
CONVERSATIONS = {"chosen": [user("the film"), assistant("good")], "rejected": [user("the film"), assistant("bad")]}


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"prompt": "the film", "chosen_response": "good", "rejected_response": "bad"}, TEXT_PAIR),
        ({"prompt": [user("the film")], "chosen_response": "good", "rejected_response": "bad"}, CHAT_PAIR),
        ({"prompt": "the film", "chosen": "good", "rejected": "bad"}, TEXT_PAIR),
        ({"prompt": [user("the film")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}, CHAT_PAIR),
        (CONVERSATIONS, CHAT_PAIR),
        ({"prompt": "the film", **CONVERSATIONS}, CHAT_PAIR),
        (
            {"prompt": "the film", "chosen": "good", "rejected": "bad", "chosen_reward": 3, "rejected_reward": 0.5},
            replace(TEXT_PAIR, chosen_reward=3.0, rejected_reward=0.5, margin=2.5),
        ),
        (
            {"prompt": "the film", "chosen": "good", "rejected": "bad", "chosen_reward": 3},
            replace(TEXT_PAIR, chosen_reward=3.0),
        ),
    ],
)
def test_pairs(row, pair):
    assert read(PAIRS, {**row, "id": 7}) == read(COMPARISONS, {**row, "id": 7}) == replace(pair, metadata={"id": 7})
    assert (TEXT_PAIR.chosen_reward, TEXT_PAIR.rejected_reward, TEXT_PAIR.margin) == (1, 0, 0)


def test_comparisons_on_two_lines():
    good, bad = sequence("<s> the good", "</s>"), sequence("<s> the bad", "</s>")
    first, second = {"text": "the good", "id": 7}, {"text": "the bad", "id": 8}
    assert read(COMPARISONS, first, second) == Pair(chosen=good, rejected=bad, metadata={"id": 7})
    for preference, pair in (
        (-2, Pair(chosen=good, rejected=bad, margin=2.0)),
        (3, Pair(chosen=bad, rejected=good, margin=3.0)),
        (0, Pair(chosen=bad, rejected=good, margin=0.0)),
    ):
        label = {"label": [preference, 1]}
        assert read(COMPARISONS, {"text": "the good", **label}, {"text": "the bad", **label}) == pair


@pytest.mark.parametrize(
    ("row", "desirable"),
    [
        ({"prompt": "the film", "response": "good", "preference": "chosen"}, True),
        ({"prompt": "the film", "response": "good", "preference": "rejected"}, False),
        ({"prompt": "the film", "completion": "good", "label": True}, True),
        ({"prompt": "the film", "completion": "good", "label": False}, False),
    ],
)
def test_judged(row, desirable):
    expected = {"prompt": ids("<s> the film"), "response": ids("good </s>"), "desirable": desirable}
    assert read(JUDGED, {**row, "id": 7}) == Judged(**expected, metadata={"id": 7})
    chat = read(JUDGED, {**row, "prompt": [user("the film")]})
    assert (chat.prompt, chat.response) == (ids(ASKED), ids("good </s>"))


@pytest.mark.parametrize(
    ("row", "tokens"),
    [
        ({"text": "the film"}, ids("<s> the film </s>")),
        ({"prompt": "the film", "response": "good"}, ids("<s> the film good </s>")),
        ({"prompt": [user("the film")], "response": "good"}, ids(ASKED + " good </s>")),
        ({"messages": [user("the film"), assistant("good")]}, ids(ASKED + " good </s>")),
    ],
)
def test_rated(row, tokens):
    expected = Rated(tokens=tokens, attributes=(4.0, -100.0, 0.5), metadata={"id": 7})
    assert read(RATED, {**row, "label": [4, -100, 0.5], "id": 7}) == expected


WEIGHTED_ROW = {
    "system": "bad",
    "prompt_turns": [turn("User", "the film")],
    "label": "q:4",
    "responses": [
        {**turn("Assistant", "good"), "log(P(a|x,y))": -1, "log(P(y|x))": -2.5, "log(Q(y|a,x))": -3},
        {**turn("Assistant", "was bad"), "log(P(a|x,y))": -4, "log(P(y|x))": -5, "log(Q(y|a,x))": -6},
    ],
}


def test_weighted():
    prompt = "<s> system : bad </s> user : the film </s> assistant : q:4"
    assert read(WEIGHTED, WEIGHTED_ROW) == Weighted(
        responses=(sequence(prompt, "good </s>"), sequence(prompt, "was bad </s>")),
        log_p_attributes=(-1.0, -4.0),
        log_p=(-2.5, -5.0),
        log_q=(-3.0, -6.0),
    )


TAUGHT_ROW = {
    "tokens": [0, 2, 3, 4],
    "labels": [2, 3, 4, 7],
    "loss_mask": [0, 1, 1, 1],
    "topk_logits": [[9.0, 8.0], [7.0, 6.0], [5.0, 4.0], [3.0, 2.0]],
    "topk_token_ids": [[2, 9], [3, 8], [4, 7], [7, 6]],
    "log_sum_exp_logits": [10.0, 8.0, 6.0, 4.0],
}


def test_a_teachers_entries_move_to_the_token_that_they_are_about():
    assert read(TAUGHT, TAUGHT_ROW) == Taught(
        tokens=(0, 2, 3, 4, 7),
        mask=(False, False, True, True, True),
        topk_ids=((0, 0), (2, 9), (3, 8), (4, 7), (7, 6)),
        topk_logits=((0.0, 0.0), (9.0, 8.0), (7.0, 6.0), (5.0, 4.0), (3.0, 2.0)),
        log_sum=(0.0, 10.0, 8.0, 6.0, 4.0),
    )
    padded = {**TAUGHT_ROW, "loss_mask": [0, 1, 0, 0], "labels": [-100, 3, -100, -100]}
    del padded["log_sum_exp_logits"]
    assert read(TAUGHT, padded) == Taught(
        tokens=(0, 2, 3),
        mask=(False, False, True),
        topk_ids=((0, 0), (2, 9), (3, 8)),
        topk_logits=((0.0, 0.0), (9.0, 8.0), (7.0, 6.0)),
    )


PAIR = {"prompt": "the film", "chosen": "good", "rejected": "bad"}
NEMO = {"conversations": [turn("User", "the film"), turn("Assistant", "good", label="q:4")]}
RESPONSE = WEIGHTED_ROW["responses"][0]


@pytest.mark.parametrize(
    ("use", "row", "message"),
    [
        ("prompts", {"txt": "the"}, 'got the keys [\'txt\'], expected "text" (raw text) or "messages" (a chat) or'),
        ("prompts", {"txt": "the"}, "rename 'txt' to 'text'."),
        ("prompts", {"text": "the", "messages": []}, 'got both "text" and "messages", expected one of them'),
        ("prompts", {"text": "  "}, "\"text\" is '  ', expected a string that is not empty."),
        ("prompts", {"text": 3}, '"text" is 3, expected a string'),
        ("prompts", {"prompt": 3}, '"prompt" is 3, expected a string that is not empty, or a list of messages'),
        ("prompts", {"text": "a\ud800"}, '"text" holds half of a surrogate pair'),
        ("prompts", {"messages": "the"}, '"messages" must be a list of {"role": string, "content": string}'),
        ("prompts", {"messages": [{"role": "user"}]}, '"messages" must be a list'),
        ("prompts", {"messages": [user(" ")]}, '"messages" has no content'),
        ("prompts", {"messages": []}, '"messages" has no content'),
        ("supervised", {"input": "the", "ouput": "a"}, "rename 'ouput' to 'output'"),
        ("supervised", {"input": "the", "output": ""}, "\"output\" is '', expected"),
        ("supervised", {"prompt": "the", "completion": [assistant("a")]}, '"prompt" is text and "completion" a list'),
        ("supervised", {"prompt": [user("a")], "completion": [user("a")]}, '"completion" begins with a message of the'),
        ("supervised", {"messages": [user("the"), assistant("")]}, 'message 2 of "messages" is an empty answer'),
        ("supervised", {"messages": [user("the")]}, "no turn of the conversation is learnt"),
        ("supervised", {**NEMO, "type": "VALUE"}, '"type" is \'VALUE\', expected "VALUE_TO_TEXT" or'),
        ("supervised", {**NEMO, "mask": 3}, '"mask" is 3, expected the name of a role'),
        ("supervised", {**NEMO, "system": 3}, '"system" is 3, expected a string'),
        ("supervised", {**NEMO, "mask": ["User", "Assistant"]}, "no turn of the conversation is learnt"),
        ("supervised", {**NEMO, "mask": "Assistant", "type": "TEXT_TO_VALUE"}, 'no turn that is learnt has a "label"'),
        ("supervised", {"conversations": [turn("User", "the", label=3)]}, 'the label of turn 1 of "conv'),
        ("supervised", {"conversations": [{"from": "User"}]}, '"conversations" must be a list of {"from": string'),
        ("pairs", {"prompt": "the", "chosen": "a"}, "got the keys ['chosen', 'prompt'], expected"),
        ("pairs", {**PAIR, "chosen": "  "}, "\"chosen\" is '  ', expected"),
        ("pairs", {**PAIR, "chosen": "bad"}, "the chosen and the rejected response are the same"),
        ("pairs", {**CONVERSATIONS, "chosen": CONVERSATIONS["rejected"]}, '"chosen" and "rejected" are the same'),
        ("pairs", {**CONVERSATIONS, "chosen": [user("was"), assistant("a")]}, "must begin with the same messages and"),
        ("pairs", {**CONVERSATIONS, "chosen": [user("the film")]}, "must begin with the same messages and part at"),
        ("pairs", {**CONVERSATIONS, "prompt": "good"}, '"prompt" is none of the messages'),
        ("pairs", {**PAIR, "chosen_reward": float("nan")}, '"chosen_reward" is nan, expected a finite number'),
        ("pairs", {**PAIR, "chosen_reward": True}, '"chosen_reward" is True, expected a finite number'),
        ("judged", {"prompt": "the", "response": "a", "preference": "good"}, "\"preference\" is 'good', expected"),
        ("judged", {"prompt": "the", "completion": "a", "label": 1}, '"label" is 1, expected true or false'),
        ("rated", {"text": "the", "label": []}, '"label" is [], expected a list of finite numbers'),
        ("rated", {"text": "the", "label": 3}, '"label" is 3, expected a list of finite numbers'),
        ("rated", {"text": "the", "label": [1, float("inf")]}, '"label" is [1, inf], expected a list of finite'),
        ("rated", {"text": "the", "label": [10**400]}, "expected a list of finite numbers"),
        ("rated", {"messages": [user("the")], "label": [1]}, 'the last of "messages" is not the assistant\'s'),
        ("weighted", {**WEIGHTED_ROW, "prompt_turns": [turn("Assistant", "a")]}, 'the last of "prompt_turns" is the'),
        ("weighted", {**WEIGHTED_ROW, "responses": [turn("Assistant", "a")]}, 'response 1 has no "log(P(a|x,y))"'),
        ("weighted", {**WEIGHTED_ROW, "responses": [{**RESPONSE, "from": "User"}]}, '"from" of every response must be'),
        ("weighted", {**WEIGHTED_ROW, "responses": [{**RESPONSE, "log(P(y|x))": None}]}, '"log(P(y|x))" is None'),
        ("taught", {**TAUGHT_ROW, "labels": [2, 3, 4]}, '"labels" must be a list as long as "tokens"'),
        ("taught", {**TAUGHT_ROW, "labels": [2, 3, 9, 7]}, '"labels" must be "tokens" moved by one, but'),
        ("taught", {**TAUGHT_ROW, "tokens": [0, 2, 3, 99]}, '"tokens" must be a list of token ids from 0 to 13'),
        ("taught", {**TAUGHT_ROW, "loss_mask": [0, 0, 0, 0]}, '"loss_mask" is 0 everywhere'),
        ("taught", {**TAUGHT_ROW, "loss_mask": [0, 0, 0, 2]}, '"loss_mask" must be a list of 0 and 1'),
        ("taught", {**TAUGHT_ROW, "topk_token_ids": [[1, 2], [1], [1, 2], [1, 2]]}, "must hold equally many at each"),
        ("taught", {**TAUGHT_ROW, "topk_token_ids": [[1, 2], [1, -2], [1, 2], [1, 2]]}, '"topk_token_ids" must be'),
    ],
)
def test_mistakes(use, row, message):
    with pytest.raises(ValueError) as error:
        Reader(Rows("x", [row]), USES[use], Encoder(word_tokenizer())).read(0)
    assert str(error.value).startswith("x:1: ") and message in str(error.value), str(error.value)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "the"}], "x:1: the last of an odd number of lines, but the format of the file is two texts on"),
        ([{"text": "the"}, {"text": "the"}], "x:1: the two texts of a pair are the same"),
        ([{"text": "the"}, {"text": 3}], 'x:1: "text" is 3, expected a string'),
        ([{"text": "the", "label": [1]}, {"text": "a", "label": [2]}], "x:1: the two lines of a pair have the labels"),
        ([{"text": "the", "label": [-100]}, {"text": "a", "label": [-100]}], "x:1: the preference label[0] is -100"),
        ([{"text": "the", "label": [1]}, {"text": "a"}], "x:2: got the format two texts on adjacent lines"),
    ],
)
def test_mistakes_on_two_lines(rows, message):
    with pytest.raises(ValueError) as error:
        Reader(Rows("x", rows), COMPARISONS, Encoder(word_tokenizer())).read(0)
    assert str(error.value).startswith(message), str(error.value)


def test_one_format_a_file():
    rows = Rows("x", [{"text": "the"}, {"prompt": "a", "completion": "b"}])
    reader = Reader(rows, SUPERVISED, Encoder(word_tokenizer()))
    assert reader.format.name == "raw text"
    with pytest.raises(ValueError) as error:
        reader.read(1)
    assert str(error.value) == (
        "x:2: got the format prompt and completion ('prompt', 'completion'), "
        "but the file began with raw text ('text'); "
        "put the formats into files of their own."
    )


def test_rows_that_json_can_hold_never_end_in_another_error():
    """Whatever stands in a field, a row is read or refused by a ValueError."""
    encoder = Encoder(word_tokenizer())
    odd = [None, True, 0, -1.5, "", "the", [], [None], [[]], {}, [{}], [user("a")], [{"role": 1, "content": []}]]
    rows = [PAIR, CONVERSATIONS, NEMO, WEIGHTED_ROW, TAUGHT_ROW, {"text": "a", "label": [1]}]
    rows += [{"input": "a", "output": "b"}, {"prompt": "a", "completion": "b", "label": True}]
    refused = 0
    for row in rows:
        for key in row:
            for value in odd:
                for use in USES.values():
                    changed = json.loads(json.dumps({**row, key: value}))
                    try:
                        Reader(Rows("x", [changed] * 2), use, encoder).read(0)
                    except ValueError as error:
                        assert str(error).startswith("x:"), error
                        refused += 1
    assert refused > 500
