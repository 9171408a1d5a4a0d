r"""What a model is worth: `python -m aligner.evaluate --model RUN --reference BASE`.

    reward: mean over responses to held-out prompts, with its standard error
    win rate: share of prompts whose reward is larger than that of --against, halves for equals
    KL: mean over responses of sum_t log pi(x_t) - log pi_ref(x_t), nats a response
    perplexity: exp of the mean negative log-likelihood of --text's learnt tokens
    distinct-n: different n-grams of words / all n-grams of the responses

Source: distinct-n: Li et al. 2016, arXiv:1510.03055, section 5.1; reward against KL as the measure of a method: Gao et
al. 2022, arXiv:2210.10760, and Rafailov et al. 2023, arXiv:2305.18290, section 6.1.
`--frontier a.json,b.json,... --output frontier.svg` draws what such evaluations wrote, one line for each --label.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aligner import ops
from aligner.checkpoint.model_folder import model_folder
from aligner.data.batch import pack_examples
from aligner.data.dataset import Dataset
from aligner.data.formats import SUPERVISED
from aligner.job.actor import Actor
from aligner.job.config import ToolConfig
from aligner.job.job import Job
from aligner.job.tool import FROZEN, check_output, open_prompts, sampling_actor
from aligner.models.policy import Policy
from aligner.run import config as options
from aligner.run.atomic import atomic_write
from aligner.run.chart import COLORS, Series, picture
from aligner.run.distributed import agree, is_main
from aligner.run.json_file import read_object


@dataclass(frozen=True, kw_only=True)
class Config(ToolConfig):
    output: Path | None = None
    """JSON file of the numbers, or with --frontier the SVG file of the plot; it must be new."""
    label: str = ""
    """Name of the line that the model is a point of in a frontier."""
    prompts: int = 256
    """Held-out prompts that are answered, the first of the data."""
    reference: str = ""
    """Model that the KL is to; none leaves it out."""
    against: str = ""
    """Model to win against; none leaves it out."""
    text: str = ""
    """JSONL files of examples (docs/data.md, supervised) whose perplexity is measured; none leaves it out."""
    frontier: tuple[Path, ...] = ()
    """JSON files of earlier evaluations to draw; nothing else is done then."""

    def __post_init__(self):
        super().__post_init__()
        if self.prompts < 1:
            raise ValueError(f"prompts is {self.prompts}, expected 1 or more.")
        if self.frontier and self.output is None:
            raise ValueError("--frontier draws a plot; name its file with --output FILE.svg.")


def distinct(responses: list[str], n: int) -> float:
    """Different n-grams of words over all of them; 0 where there are none."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, responses) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def answered(actor: Actor, batches: list, seed: int) -> tuple[list[str], Tensor, list]:
    """(responses, rewards_B, rollouts): every prompt draws with the seed that it has in any model's evaluation."""
    texts, rewards, rollouts = [], [], []
    for prompts in batches:
        scored = actor.answer(prompts, 1, seed)
        texts += scored.texts[1]
        rewards.append(actor.raw_rewards(scored))
        rollouts.append(scored.rollout)
    return texts, torch.cat(rewards), rollouts


def mean_of(name: str, values_B: Tensor) -> dict[str, float]:
    """With its standard error, which a single value has not: 0."""
    error = values_B.std() / len(values_B) ** 0.5 if len(values_B) > 1 else 0.0
    return {f"{name}/mean": float(values_B.mean()), f"{name}/standard_error": float(error)}


def measured(texts: list[str], rewards_B: Tensor, rollouts: list) -> dict[str, float]:
    lengths_B = torch.cat([ops.segment_sum(r.action_mask_N.float(), r.cu_seqlens) for r in rollouts])
    return mean_of("reward", rewards_B) | {
        "response_length/mean": float(lengths_B.mean()),
        "finished/mean": float(torch.cat([r.finished_B for r in rollouts]).float().mean()),
        "distinct-1": distinct(texts, 1),
        "distinct-2": distinct(texts, 2),
    }


def divergence(policy: Policy, reference: Policy, rollouts: list) -> dict[str, float]:
    """KL(policy || reference) of a response, by the policy's own samples, with its standard error."""
    gaps = [(policy.infer(r)[0] - reference.infer(r)[0], r.cu_seqlens) for r in rollouts]
    return mean_of("kl", torch.cat([ops.segment_sum(gap_N, cu_seqlens) for gap_N, cu_seqlens in gaps]))


def perplexity(policy: Policy, data: Dataset, size: int) -> float:
    nats = tokens = 0.0
    for start in range(0, len(data), size):
        batch = pack_examples([data[i] for i in range(start, min(start + size, len(data)))])
        nats -= float(policy.infer(batch, temperature=1.0)[0][batch.action_mask_N].sum())
        tokens += float(batch.action_mask_N.sum())
    return float(torch.tensor(nats / tokens).exp())


def draw(files: tuple[Path, ...], output: Path) -> None:
    """One line for each label, its points in order of KL."""
    rows = [read_object(file) for file in files]
    missing = [str(f) for f, row in zip(files, rows, strict=True) if "kl/mean" not in row or "reward/mean" not in row]
    if missing:
        raise ValueError(f"{missing[0]} has no KL and reward; evaluate it with --reference.")
    labels = list(dict.fromkeys(row.get("label") or row["model"] for row in rows))
    series = []
    for i, label in enumerate(labels):
        points = [(row["kl/mean"], row["reward/mean"]) for row in rows if (row.get("label") or row["model"]) == label]
        series.append(Series(label=label, points=sorted(points), color=COLORS[i % len(COLORS)], dots=True))
    title = "Reward of held-out responses, reward units"
    atomic_write(output, picture(title, "KL to the reference, nats per response", series))


def main(argv: list[str] | None = None) -> int:
    config = options.parse(Config, argv)
    if config.output:
        check_output(config.output)
    if config.frontier:
        draw(config.frontier, config.output)
        print(config.output)
        return 0
    job = Job("evaluate", config)
    batches = open_prompts(job, config.prompts, held_out=True)
    others = {name: model_folder(name) for name in (config.reference, config.against) if name}
    for folder in others.values():
        job.check_tokenizer(folder, "the other model")
    known = {"room": job.shape.context, "seed": config.seed}
    text = Dataset.open(config.text, config.data, SUPERVISED, job.encoder, **known) if config.text else None
    job.join()
    actor = sampling_actor(job)
    texts, rewards_B, rollouts = answered(actor, batches, config.seed)
    row = {"label": config.label, "model": config.model, "prompts": len(rewards_B)}
    row |= measured(texts, rewards_B, rollouts)
    if config.reference:
        reference = job.policy(temperature=config.sampling.temperature, folder=others[config.reference], **FROZEN)
        row |= divergence(actor.policy, reference, rollouts)
    if config.against:
        other = job.policy(temperature=config.sampling.temperature, folder=others[config.against], **FROZEN)
        theirs_B = answered(Actor(job, other, None, [], actor.rewards), batches, config.seed)[1]
        row["win_rate"] = float(((rewards_B > theirs_B).float() + 0.5 * (rewards_B == theirs_B).float()).mean())
    if text:
        row["perplexity"] = perplexity(actor.policy, text, config.batch.prompts)
    for name, value in row.items():
        print(f"{name:22} {value:.4f}" if isinstance(value, float) else f"{name:22} {value}")
    if config.output:
        agree(lambda: atomic_write(config.output, json.dumps(row, indent=2) + "\n") if is_main() else None)
    return 0


if __name__ == "__main__":
    options.user_errors(main)
