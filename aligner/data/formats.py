"""What a JSONL line may look like: the formats of each use, and what each line becomes.

A format is known by its keys; all other keys of a line are metadata. Read functions raise ValueErrors that do not name
the line: whoever reads the file puts it in front.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from aligner.data import answers, fields
from aligner.data.encoder import Encoder
from aligner.data.examples import Example, Judged, Pair, Prompt, Rated
from aligner.data.nemo import read_labelled_pair, read_taught, read_text_pair, read_turns, read_weighted


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to write an example.

    name: what messages call it.
    keys: the keys that mark it; a line has all of them.
    optional: further keys that it reads.
    lines: adjacent lines that make one example.
    read: (rows, encoder) -> example, its metadata still empty.
    """

    name: str
    keys: tuple[str, ...]
    optional: tuple[str, ...] = ()
    lines: int = 1
    read: Callable[[list[dict], Encoder], Any]

    def example(self, rows: list[dict], encoder: Encoder):
        """The example that these rows make; metadata are the first row's other keys."""
        known = {*self.keys, *self.optional}
        metadata = {key: value for key, value in rows[0].items() if key not in known}
        return replace(self.read(rows, encoder), metadata=metadata)


Use = tuple[Format, ...]


def format_of(use: Use, row: dict) -> Format:
    """The format of a row: of those whose keys it has, the one with most. Raises ValueError when it is none or two."""
    fitting = [f for f in use if set(f.keys) <= row.keys()]
    fitting = [f for f in fitting if not any(set(f.keys) < set(other.keys) for other in fitting)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        keys = [key for key in fitting[0].keys if key not in fitting[1].keys]
        others = [key for key in fitting[1].keys if key not in fitting[0].keys]
        raise ValueError(f"got both {_quoted(keys)} and {_quoted(others)}, expected one of them; remove the other.")
    known = {key for f in use for key in f.keys}
    others = [key for key in row if key not in known]
    near = [(key, match) for key in others for match in difflib.get_close_matches(key, sorted(known - row.keys()), n=1)]
    hint = f"; rename {near[0][0]!r} to {near[0][1]!r}" if near else ""
    expected = " or ".join(dict.fromkeys(f"{_quoted(f.keys)} ({f.name})" for f in use))
    raise ValueError(f"got the keys {sorted(row)}, expected {expected}{hint}.")


def _quoted(keys) -> str:
    return ", ".join(f'"{key}"' for key in keys)


def _read_prompt(key: str) -> Callable[[list[dict], Encoder], Prompt]:
    def read(rows: list[dict], encoder: Encoder) -> Prompt:
        check = {"text": fields.text, "messages": fields.messages, "prompt": fields.text_or_messages}[key]
        given = check(rows[0], key)
        text, tokens = encoder.prompt(given)
        return Prompt(text=text, tokens=tokens, given=given, metadata={})

    return read


def _read_document(rows: list[dict], encoder: Encoder) -> Example:
    tokens = encoder.document(fields.text(rows[0], "text"))
    return Example(tokens=tokens, mask=(False,) + (True,) * (len(tokens) - 1))


def _read_input_output(rows: list[dict], encoder: Encoder) -> Example:
    prompt, response = fields.text(rows[0], "input"), fields.text(rows[0], "output")
    return Example.of(encoder.prompt(prompt)[1], encoder.response(f" {response}"))


def _read_completion(rows: list[dict], encoder: Encoder) -> Example:
    return answers.answered(rows[0], "prompt", "completion", encoder, finished="finished")


def _read_chat(rows: list[dict], encoder: Encoder) -> Example:
    messages = fields.messages(rows[0], "messages")
    return encoder.conversation(messages, answers.by_assistant(messages))


def _read_pair(chosen_key: str, rejected_key: str) -> Callable[[list[dict], Encoder], Pair]:
    def read(rows: list[dict], encoder: Encoder) -> Pair:
        (row,) = rows
        if isinstance(row[chosen_key], list) and isinstance(row["prompt"], str):
            # Whole conversations beside their first message as text, as in UltraFeedback.
            return answers.implicit_pair(row, chosen_key, rejected_key, encoder, prompt=fields.text(row, "prompt"))
        chosen = answers.answered(row, "prompt", chosen_key, encoder, finished="chosen_finished")
        rejected = answers.answered(row, "prompt", rejected_key, encoder, finished="rejected_finished")
        return answers.pair(row, chosen, rejected)

    return read


def _read_implicit_pair(rows: list[dict], encoder: Encoder) -> Pair:
    return answers.implicit_pair(rows[0], "chosen", "rejected", encoder)


def _read_judged(response_key: str, verdict_key: str, verdicts: dict) -> Callable[[list[dict], Encoder], Judged]:
    def read(rows: list[dict], encoder: Encoder) -> Judged:
        desirable = verdicts[fields.one_of(rows[0], verdict_key, tuple(verdicts))]
        prompt, response = answers.answered(rows[0], "prompt", response_key, encoder, finished="finished").split()
        return Judged(prompt=prompt, response=response, desirable=desirable)

    return read


def _read_rated_text(rows: list[dict], encoder: Encoder) -> Rated:
    tokens = encoder.document(fields.text(rows[0], "text"))
    return Rated(tokens=tokens, attributes=fields.numbers(rows[0], "label"))


def _read_rated_response(rows: list[dict], encoder: Encoder) -> Rated:
    example = answers.answered(rows[0], "prompt", "response", encoder)
    return Rated(tokens=example.tokens, attributes=fields.numbers(rows[0], "label"))


def _read_rated_chat(rows: list[dict], encoder: Encoder) -> Rated:
    messages = fields.messages(rows[0], "messages")
    if messages[-1]["role"] != "assistant":
        raise ValueError('the last of "messages" is not the assistant\'s; expected the answer that "label" rates.')
    example = encoder.conversation(messages, [len(messages) - 1])
    return Rated(tokens=example.tokens, attributes=fields.numbers(rows[0], "label"))


PROMPTS: Use = (
    Format(name="raw text", keys=("text",), read=_read_prompt("text")),
    Format(name="a chat", keys=("messages",), read=_read_prompt("messages")),
    Format(name="text or a chat", keys=("prompt",), read=_read_prompt("prompt")),
)
SUPERVISED: Use = (
    Format(name="NeMo prompt and response", keys=("input", "output"), read=_read_input_output),
    Format(name="prompt and completion", keys=("prompt", "completion"), optional=("finished",), read=_read_completion),
    Format(name="a chat", keys=("messages",), read=_read_chat),
    Format(name="raw text", keys=("text",), read=_read_document),
    Format(name="NeMo chat", keys=("conversations",), optional=("system", "mask", "type"), read=read_turns),
)
_REWARDS = ("chosen_reward", "rejected_reward")
_MORE = (*_REWARDS, "chosen_finished", "rejected_finished")
PAIRS: Use = (
    Format(
        name="NeMo preference",
        keys=("prompt", "chosen_response", "rejected_response"),
        optional=_MORE,
        read=_read_pair("chosen_response", "rejected_response"),
    ),
    Format(
        name="preference",
        keys=("prompt", "chosen", "rejected"),
        optional=_MORE,
        read=_read_pair("chosen", "rejected"),
    ),
    Format(name="two conversations", keys=("chosen", "rejected"), optional=_REWARDS, read=_read_implicit_pair),
)
COMPARISONS: Use = (
    *PAIRS,
    Format(name="two texts on adjacent lines, the better one first", keys=("text",), lines=2, read=read_text_pair),
    Format(
        name="two texts on adjacent lines with a signed preference",
        keys=("text", "label"),
        lines=2,
        read=read_labelled_pair,
    ),
)
JUDGED: Use = (
    Format(
        name="NeMo verdict",
        keys=("prompt", "response", "preference"),
        optional=("finished",),
        read=_read_judged("response", "preference", {"chosen": True, "rejected": False}),
    ),
    Format(
        name="verdict",
        keys=("prompt", "completion", "label"),
        optional=("finished",),
        read=_read_judged("completion", "label", {True: True, False: False}),
    ),
)
RATED: Use = (
    Format(name="rated text", keys=("text", "label"), read=_read_rated_text),
    Format(name="rated response", keys=("prompt", "response", "label"), read=_read_rated_response),
    Format(name="rated chat", keys=("messages", "label"), read=_read_rated_chat),
)
WEIGHTED: Use = (
    Format(
        name="SteerLM 2 responses", keys=("prompt_turns", "responses"), optional=("system", "label"), read=read_weighted
    ),
)
TAUGHT: Use = (
    Format(
        name="a teacher's logits",
        keys=("tokens", "labels", "loss_mask", "topk_logits", "topk_token_ids"),
        optional=("log_sum_exp_logits",),
        read=read_taught,
    ),
)
USES: dict[str, Use] = {
    "prompts": PROMPTS,
    "supervised": SUPERVISED,
    "pairs": PAIRS,
    "comparisons": COMPARISONS,
    "judged": JUDGED,
    "rated": RATED,
    "weighted": WEIGHTED,
    "taught": TAUGHT,
}
