"""Requests in words: rows as of a data set, which the service's own tokenizer and chat template make tokens of."""

import json
import threading

import numpy as np

from aligner.data.encoder import Encoder
from aligner.data.formats import SUPERVISED, format_of
from aligner.serving.service import Arrays, Code, Sequences, ServiceError, expect, text

ROWS = "rows"
ARRAYS = ("tokens_N", "cu_seqlens", "action_mask_N")  # what they become
_one_at_a_time = threading.Lock()  # tokenizers are not for several threads


def in_tokens(request: Arrays, encoder: Encoder, *, actions: bool) -> Arrays:
    """The request with tokens_N and cu_seqlens in place of its rows; as it is when it has none.

    actions: action_mask_N too, of the answers.
    Raises ServiceError INVALID, which names the row.
    """
    if ROWS not in request:
        return request
    expect(not {*ARRAYS} & set(request), f"rows come without {', '.join(ARRAYS)}")
    try:
        rows = json.loads(text(request, ROWS, longest=None))
    except (ValueError, RecursionError):
        rows = None
    expect(
        isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows),
        'rows must be a JSON list of objects such as {"prompt": ..., "completion": ...} or {"messages": [...]}',
    )
    examples = []
    with _one_at_a_time:
        for i, row in enumerate(rows):
            try:
                examples.append(format_of(SUPERVISED, row).example([row], encoder))
            except ValueError as error:
                raise ServiceError(Code.INVALID, f"row {i}: {error}") from None
    sequences = Sequences.pack([list(example.tokens) for example in examples])
    mask = {"action_mask_N": np.concatenate([example.mask for example in examples])} if actions else {}
    return {name: array for name, array in request.items() if name != ROWS} | sequences.arrays() | mask
