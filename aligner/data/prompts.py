"""Prompts: what the policy answers to, read from JSONL files, and the order in which a run takes them."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aligner.data.tokenizer import render_chat


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt.

    text: what the model reads, chat template applied.
    tokens: ids of `text`.
    metadata: the other keys of the line, handed to the reward function untouched.
    """

    text: str
    tokens: tuple[int, ...]
    metadata: dict


def read_prompts(files: tuple[Path, ...], tokenizer, max_tokens: int) -> list[Prompt]:
    """Read JSON lines: {"text": "raw text"} or {"messages": [{"role": ..., "content": ...}, ...]} and any other keys.

    files: paths, read in order.
    tokenizer: a transformers tokenizer; its chat template renders `messages`.
    max_tokens: tokens. A longer prompt is an error and is never cut silently.
    Raises ValueError that names file and line: bad JSON, neither key or both, an empty or a too long prompt.
    """
    prompts = []
    for file in files:
        file = Path(file)
        if not file.is_file():
            raise ValueError(f"prompt file {str(file)!r} does not exist; give a JSONL file of prompts.")
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    prompts.append(_read_line(f"{file}:{number}", line, tokenizer, max_tokens))
    if not prompts:
        raise ValueError(
            f"no prompt in {', '.join(map(str, files)) or 'an empty list of files'}; expected at least one."
        )
    return prompts


def _read_line(where: str, line: str, tokenizer, max_tokens: int) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}); write one object a line."
        ) from None
    if not isinstance(row, dict):
        raise ValueError(f'{where}: got a JSON {type(row).__name__}, expected an object such as {{"text": "..."}}.')
    if ("text" in row) == ("messages" in row):
        raise ValueError(f"{where}: {_which_key(row)}")
    metadata = {key: value for key, value in row.items() if key not in ("text", "messages")}
    if "text" in row:
        text = row["text"]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'{where}: "text" is {text!r}, expected a string that is not empty.')
        tokens = tokenizer(text)["input_ids"]
    else:
        _check_messages(where, row["messages"])
        text = render_chat(tokenizer, row["messages"])
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(tokens) > max_tokens:
        raise ValueError(
            f"{where}: the prompt has {len(tokens)} tokens, the limit is {max_tokens}; "
            "shorten it, remove the line or raise the limit."
        )
    return Prompt(text=text, tokens=tuple(tokens), metadata=metadata)


def _which_key(row: dict) -> str:
    if "text" in row:
        return 'got both "text" and "messages", expected one of them; remove the other.'
    near = [(key, match) for key in row for match in difflib.get_close_matches(key, ("text", "messages"), n=1)]
    hint = f"; rename {near[0][0]!r} to {near[0][1]!r}" if near else ""
    return f'got the keys {sorted(row)}, expected "text" (raw text) or "messages" (a chat){hint}.'


def _check_messages(where: str, messages) -> None:
    shape = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    strings = shape and all(isinstance(m.get(key), str) for m in messages for key in ("role", "content"))
    if not strings:
        raise ValueError(f'{where}: "messages" must be a list of {{"role": string, "content": string}} objects.')
    if not any(message["content"].strip() for message in messages):
        raise ValueError(f'{where}: "messages" has no content; expected at least one message that is not empty.')


class PromptOrder:
    """Which prompts a step takes: every epoch a fresh shuffle, a pure function of (seed, epoch).

    Any step's batch is computed from its number alone, so a resumed run needs no saved position.
    """

    def __init__(self, num: int, seed: int):
        self.num, self.seed = num, seed

    def batch(self, step: int, size: int) -> list[int]:
        """Prompt indices of one step; batches run across the border of two epochs.

        step: 0-based number of the step.
        size: prompts a step. Raises ValueError when there are fewer prompts than that.
        """
        if size > self.num:
            raise ValueError(
                f"a step takes {size} prompts, but there are only {self.num}; lower the batch size or add prompts."
            )
        first = step * size
        epochs = range(first // self.num, (first + size - 1) // self.num + 1)
        order = np.concatenate([np.random.default_rng([self.seed, epoch]).permutation(self.num) for epoch in epochs])
        offset = first - epochs[0] * self.num
        return order[offset : offset + size].tolist()
