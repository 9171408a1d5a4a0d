"""Requests in words, and answers in the dtype that the caller chose."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aligner.data.encoder import Encoder
from aligner.data.tokenizer import load_tokenizer
from aligner.serving.service import Code, Limits, RewardRequest, ServiceError, ValuesRequest, from_answer, to_answer
from aligner.serving.text import in_tokens
from tests.programs.chats import END, assistant, chatml, save_chat_model, user

WORDS = ("w0", "w1", "w2")
LIMITS = Limits(vocabulary=10, context=30, tokens=60)
CHAT = [user("w1"), assistant("w2 w0"), user("w2"), assistant("w1")]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_bfloat16_is_torch_s(numbers: list[float]):
    given = np.array(numbers, np.float32).reshape(-1, 1)
    sent = to_answer(given, "bfloat16")
    assert sent.dtype == np.uint16 and sent.shape == given.shape
    wanted = torch.from_numpy(given).bfloat16()
    assert np.array_equal(sent, wanted.view(torch.uint16).numpy())
    assert np.array_equal(from_answer(sent), wanted.float().numpy())
    assert from_answer(to_answer(given, "float32")) is given


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Encoder:
    return Encoder(load_tokenizer(save_chat_model(tmp_path_factory.mktemp("words"), WORDS)))


def asked(rows: object, **others) -> dict:
    return {"rows": np.array(json.dumps(rows)), **others}


def test_rows_become_the_tokens_of_a_data_set(encoder: Encoder):
    ids = {word: 7 + i for i, word in enumerate(WORDS)}
    rows = [{"prompt": "w0 w1", "completion": "w2"}, {"messages": CHAT}, {"text": "w2 w1"}]
    chat = encoder.tokenizer(chatml(CHAT))["input_ids"]
    chat = chat[: len(chat) - chat[::-1].index(END)]  # the last turn's end is the last that an answer has
    wanted = [[ids["w0"], ids["w1"], ids["w2"], END], chat, [ids["w2"], ids["w1"], END]]
    values = ValuesRequest.of(in_tokens(asked(rows, weights_version=np.array(4)), encoder, actions=True), LIMITS)
    starts = values.sequences.cu_seqlens
    assert [part.tolist() for part in np.split(values.sequences.tokens_N, starts[1:-1])] == wanted
    masks = [part.tolist() for part in np.split(values.action_mask_N, starts[1:-1])]
    assert masks[0] == [False, False, True, True] and masks[2] == [False, True, True]
    assert [token for token, mask in zip(chat, masks[1], strict=True) if mask] == [
        *(ids["w2"], ids["w0"], END),
        *(ids["w1"], END),
    ]
    assert values.weights_version == 4 and values.dtype == "float32"
    reward = RewardRequest.of(in_tokens(asked(rows, dtype=np.array("bfloat16")), encoder, actions=False), LIMITS)
    assert reward.sequences.tokens_N.tolist() == [token for tokens in wanted for token in tokens]
    assert reward.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (asked([]), "rows must be a JSON list of objects"),
        (asked({"prompt": "w0"}), "rows must be a JSON list"),
        (asked(["w0"]), "rows must be a JSON list"),
        ({"rows": np.array("[{")}, "rows must be a JSON list"),
        ({"rows": np.array("[" * 10**5)}, "rows must be a JSON list"),
        ({"rows": np.array([1])}, "rows must be a text"),
        ({"rows": np.array("")}, "rows must have 1 or more letters, got 0"),
        (asked([{"text": "w0 w1"}, {"prompt": "w0", "answer": "w1"}]), r"row 1: got the keys \['answer', 'prompt'\]"),
        (asked([{"messages": [user("w0")]}]), "row 0: "),
        (asked([{"text": "w0 " * 40}]), "the longest sequence has 41 tokens, the model's context is 30"),
        (asked([{"text": "w0"}], tokens_N=np.array([1])), "rows come without tokens_N, cu_seqlens"),
        (asked([{"text": "w0 w1"}], dtype=np.array("float16")), "dtype is 'float16', expected float32 or bfloat16"),
        (asked([{"text": "w0 w1"}], dtype=np.array(16)), "dtype must be a text"),
    ],
)
def test_bad_requests_in_words(encoder: Encoder, request_: dict, words: str):
    with pytest.raises(ServiceError, match=words) as error:
        RewardRequest.of(in_tokens(request_, encoder, actions=False), LIMITS)
    assert error.value.code is Code.INVALID


def test_a_request_in_tokens_is_left_alone(encoder: Encoder):
    given = {"tokens_N": np.array([1])}
    assert in_tokens(given, encoder, actions=True) is given
