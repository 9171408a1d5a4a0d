r"""Constitutional AI data: `python -m aligner.constitutional --stage revise --data prompts.jsonl --output new.jsonl`.

    revise: the model answers, criticises its answer by a principle drawn for it, rewrites it; the last revision of each
            prompt is written, for aligner.sft
    prefer: the model answers twice and is asked which answer agrees more with a principle; p = s(log P("A") -
            log P("B")), averaged over both orders, is written with the pair, for aligner.reward_model and aligner.dpo

Source: Bai et al. 2022, arXiv:2212.08073, sections 3.1 (critiques and revisions) and 4.1 (AI feedback).
The whole way: revise, aligner.sft, prefer with the result as --model, aligner.reward_model, aligner.ppo with
--reward.model. A constitution is a JSONL file of {"critique", "revision", "preference"} requests; one is built in.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from aligner import ops
from aligner.data import fields
from aligner.data.batch import pack_examples
from aligner.data.examples import Example, Prompt
from aligner.data.jsonl import JsonLines
from aligner.job.actor import Actor
from aligner.job.config import ModelToolConfig
from aligner.job.job import Job
from aligner.job.tool import check_output, open_prompts, silent_actor, write_rows
from aligner.rollout.sampling import SamplingConfig
from aligner.run import config as options

CONSTITUTION = [
    {
        "critique": "Name what in your last answer is harmful, unethical, dangerous or illegal.",
        "revision": "Rewrite your answer so that nothing in it is harmful, unethical, dangerous or illegal.",
        "preference": "Which answer is less harmful?",
    },
    {
        "critique": "Say where your last answer is rude, demeaning or unfair to anybody.",
        "revision": "Rewrite your answer so that it is respectful and fair to everybody.",
        "preference": "Which answer is kinder and more respectful?",
    },
    {
        "critique": "Say where your last answer is false, unclear or beside the question.",
        "revision": "Rewrite your answer so that it is true, clear and to the point.",
        "preference": "Which answer is more honest and more helpful?",
    },
]
Chat = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Config(ModelToolConfig):
    output: Path
    """The JSONL file to write; it must be new."""
    stage: Literal["revise", "prefer"] = "revise"
    """What is written: chats with revised answers, or pairs with the model's own preference."""
    constitution: Path | None = None
    """JSONL file of principles."""
    prompts: int = 0
    """Prompts that are used, the first of the data; 0 for all."""
    revisions: int = 1
    """Critiques and revisions of each answer, one after the other."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_tokens=128))

    def __post_init__(self):
        super().__post_init__()
        if not self.data.files or self.revisions < 1:
            raise ValueError("constitutional needs --data FILE of prompts, and 1 revision or more.")


def read_constitution(path: Path | None) -> list[dict[str, str]]:
    if path is None:
        return CONSTITUTION
    lines = JsonLines(path)
    principles = []
    for i in range(len(lines)):
        row = lines.row(i)
        missing = [key for key in ("critique", "revision", "preference") if key not in row]
        if missing:
            raise ValueError(f'{lines.where(i)}: got no "{missing[0]}", expected "critique", "revision", "preference".')
        try:
            principles.append({key: fields.text(row, key) for key in ("critique", "revision", "preference")})
        except ValueError as error:
            raise ValueError(f"{lines.where(i)}: {error}") from None
    return principles


def asked(message: str) -> dict[str, str]:
    return {"role": "user", "content": message}


def said(message: str) -> dict[str, str]:
    return {"role": "assistant", "content": message}


class Speaker:
    """The model as somebody who answers chats."""

    def __init__(self, job: Job, actor: Actor, seed: int):
        self.job, self.actor, self.seed, self.calls = job, actor, seed, 0

    def answers(self, chats: list[Chat], n: int = 1) -> tuple[list[str], list[bool]]:
        """(n answers to each chat, one after the other; whether each ended by itself). Every call draws anew."""
        self.calls += 1
        rendered = [self.job.encoder.prompt(chat) for chat in chats]
        prompts = [Prompt(text=text, tokens=tokens, metadata={}) for text, tokens in rendered]
        scored = self.actor.answer(prompts, n, self.seed * 2**32 + self.calls)
        return scored.texts[1], scored.rollout.finished_B.tolist()

    def log_odds(self, chats: list[Chat], first: str, second: str) -> torch.Tensor:
        """log P(first) - log P(second) as the answer to each chat, nats."""
        encoder = self.job.encoder
        replies = [[*chat, said(word)] for chat in chats for word in (first, second)]
        halves = [encoder.conversation(reply, [len(reply) - 1]).split() for reply in replies]
        words = [[token for token in word if token != encoder.eos] for _, word in halves]
        batch = pack_examples([Example.of(prompt, word) for (prompt, _), word in zip(halves, words, strict=True)])
        sums_B = ops.segment_sum(self.actor.policy.infer(batch, temperature=1.0)[0], batch.cu_seqlens)
        return sums_B[0::2] - sums_B[1::2]


def chat_of(prompt: Prompt) -> Chat:
    return [asked(prompt.given)] if isinstance(prompt.given, str) else list(prompt.given)


def revised(c: Config, speaker: Speaker, batches: list, principles: list[dict]) -> Iterator[dict]:
    """Chats whose answer was criticised and rewritten."""
    draw = random.Random(c.seed)
    for prompts in batches:
        chats = [chat_of(p) for p in prompts]
        first = speaker.answers(chats)[0]
        talks, critiques = [[*chat, said(a)] for chat, a in zip(chats, first, strict=True)], []
        for _ in range(c.revisions):
            chosen = [draw.choice(principles) for _ in prompts]
            talks = [[*talk, asked(p["critique"])] for talk, p in zip(talks, chosen, strict=True)]
            critiques = speaker.answers(talks)[0]
            talks = [
                [*talk, said(a), asked(p["revision"])] for talk, a, p in zip(talks, critiques, chosen, strict=True)
            ]
            current, finished = speaker.answers(talks)
            talks = [[*talk, said(a)] for talk, a in zip(talks, current, strict=True)]
        for chat, before, critique, after, ended in zip(chats, first, critiques, current, finished, strict=True):
            if after.strip():
                row = {"prompt": chat, "completion": after, "finished": ended}
                yield row | {"initial": before, "critique": critique}


def question(chat: Chat, principle: dict, a: str, b: str) -> Chat:
    """The request for a verdict."""
    talk = "\n".join(f"{m['role']}: {m['content']}" for m in chat)
    words = (
        f"Consider this conversation.\n{talk}\n\n{principle['preference']}\nA: {a}\nB: {b}\nAnswer with A or B only."
    )
    return [asked(words)]


def preferred(c: Config, speaker: Speaker, batches: list, principles: list[dict]) -> Iterator[dict]:
    """Pairs of answers; the better one is the model's own choice, asked in both orders."""
    draw = random.Random(c.seed)
    for prompts in batches:
        chats = [chat_of(p) for p in prompts]
        answers, finished = speaker.answers(chats, 2)
        pairs, chosen = list(zip(answers[0::2], answers[1::2], strict=True)), [draw.choice(principles) for _ in prompts]
        asking = list(zip(chats, chosen, pairs, strict=True))
        forward = speaker.log_odds([question(chat, p, a, b) for chat, p, (a, b) in asking], "A", "B").sigmoid()
        backward = speaker.log_odds([question(chat, p, b, a) for chat, p, (a, b) in asking], "B", "A").sigmoid()
        for i, (chat, said, p) in enumerate(zip(chats, pairs, ((forward + backward) / 2).tolist(), strict=True)):
            if all(text.strip() for text in said) and said[0] != said[1]:
                best = 0 if p >= 0.5 else 1
                row = {"prompt": chat}
                for name, k, reward in (("chosen", best, max(p, 1 - p)), ("rejected", 1 - best, min(p, 1 - p))):
                    row |= {name: said[k], f"{name}_reward": reward, f"{name}_finished": finished[2 * i + k]}
                yield row


def main(argv: list[str] | None = None) -> int:
    config = options.parse(Config, argv)
    check_output(config.output)
    principles = read_constitution(config.constitution)
    job = Job("constitutional", config)
    batches = open_prompts(job, config.prompts)
    job.join()
    speaker = Speaker(job, silent_actor(job), config.seed)
    made = {"revise": revised, "prefer": preferred}[config.stage](config, speaker, batches, principles)
    print(f"{config.output}: {write_rows(config.output, made)} lines")
    return 0


if __name__ == "__main__":
    options.user_errors(main)
