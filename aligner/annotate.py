"""Attribute labels for conversations: `python -m aligner.annotate --model ATTRIBUTE_MODEL --data chats.jsonl ...`.

Every turn of the assistant gets the label "name:value,name:value,..." with what the attribute model, a reward model of
`--loss regression`, says of the conversation up to it, rounded. The result is NeMo-Aligner's chat format with
"type": "VALUE_TO_TEXT", which aligner.steerlm and aligner.sft read.
Source: Dong et al. 2023, arXiv:2310.05344, section 3.2 (SteerLM's annotation step).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aligner.data import fields
from aligner.data.batch import pack_last
from aligner.data.jsonl import JsonLines
from aligner.job.actor import open_reward_model
from aligner.job.config import ModelToolConfig
from aligner.job.job import Job
from aligner.job.tool import check_output, write_rows
from aligner.models.reward_model import RewardModel
from aligner.run import config as options


@dataclass(frozen=True, kw_only=True)
class Config(ModelToolConfig):
    output: Path
    """The JSONL file to write; it must be new."""
    names: tuple[str, ...]
    """Names of the attributes, in the order of the model's numbers."""
    low: int = 0
    """Smallest value that is written."""
    high: int = 9
    """Largest one."""
    tenths: bool = False
    """Write which tenth of all values of its attribute a value lies in, 0 to 9, in its place: a model's values lie
    closer together than the ratings that it was trained on."""

    def __post_init__(self):
        super().__post_init__()
        if not self.data.files:
            raise ValueError("--data is not given; name a JSONL file of conversations.")


def label(names: tuple[str, ...], values: list[float], low: int, high: int) -> str:
    """The label as it stands in a conversation."""
    return ",".join(f"{name}:{min(max(round(v), low), high)}" for name, v in zip(names, values, strict=True))


def chat_of(row: dict, where: str) -> list[dict]:
    """The messages of a row in the chat formats of docs/data.md, the system's first."""
    try:
        if "messages" in row:
            return fields.messages(row, "messages")
        if "conversations" in row:
            system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
            return system + fields.turns(row, "conversations")[0]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    raise ValueError(f'{where}: got the keys {sorted(row)}, expected "messages" or "conversations".')


def labelled(c: Config, job: Job, model: RewardModel, chats: list[list[dict]]) -> Iterator[dict]:
    """The conversations with a label on every answer of the assistant."""
    turns = [(n, i) for n, chat in enumerate(chats) for i, m in enumerate(chat) if m["role"] == "assistant" and i]
    values: list[list[float]] = []
    for start in range(0, len(turns), c.batch.prompts):
        chunk = [(chats[n][: i + 1], i) for n, i in turns[start : start + c.batch.prompts]]
        values += score(model, [job.encoder.conversation(chat, [i]).tokens[-job.shape.context :] for chat, i in chunk])
    if c.tenths and values:
        values = tenths(values)
    labels = {turn: label(c.names, v, c.low, c.high) for turn, v in zip(turns, values, strict=True)}
    for n, chat in enumerate(chats):
        said = [
            {"from": m["role"].capitalize(), "value": m["content"], "label": labels.get((n, i))}
            for i, m in enumerate(chat)
            if m["role"] != "system"
        ]
        system = next((m["content"] for m in chat if m["role"] == "system"), "")
        yield {"system": system, "mask": "User", "type": "VALUE_TO_TEXT", "conversations": said}


def tenths(values: list[list[float]]) -> list[list[float]]:
    """Of each column, in which tenth of its values each one lies, from 0; equal ones lie in the same."""
    columns = []
    for column in torch.tensor(values).T.contiguous():
        smaller = torch.searchsorted(column.sort().values, column)
        columns.append(smaller * 10 // len(column))
    return torch.stack(columns, 1).tolist()


def score(model: RewardModel, sequences: list) -> list[list[float]]:
    """The model's numbers for each sequence of tokens."""
    batch = pack_last(sequences)
    scores_NK: Tensor = model.infer(batch)
    return scores_NK[batch.cu_seqlens[1:].long() - 1].tolist()


def main(argv: list[str] | None = None) -> int:
    config = options.parse(Config, argv)
    check_output(config.output)
    job = Job("annotate", config)
    if job.attributes != len(config.names):
        raise ValueError(
            f"--names has {len(config.names)} names, and {config.model!r} gives {job.attributes} attributes; give a "
            "reward model of --loss regression, and one name for each of its attributes."
        )
    files = [JsonLines(Path(file)) for file in config.data.files.split(",")]
    chats = [chat_of(lines.row(i), lines.where(i)) for lines in files for i in range(len(lines))]
    job.join()
    count = write_rows(config.output, labelled(config, job, open_reward_model(job, job.folder), chats))
    print(f"{config.output}: {count} conversations")
    return 0


if __name__ == "__main__":
    options.user_errors(main)
