r"""Distillation from a larger model: `python -m aligner.distill --teacher FOLDER --data examples.jsonl`.

    forward_kl: KL(teacher || student),  backward_kl: KL(student || teacher), over the teacher's k likeliest tokens and
    one more event for all the others;  L = kd_coef * mean KL + sft_coef * mean -log pi(token)

Source: Hinton et al. 2015, arXiv:1503.02531, section 2; backward KL: Gu et al. 2023, arXiv:2306.08543, section 2.1; top
k logits kept on disk: Shen et al. 2024, arXiv:2405.01481 (NeMo-Aligner).
The teacher's logits of every learnt token are computed once, before the first step, and kept in --cache; or the data
has them already (docs/data.md). Both models must have the same tokenizer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from aligner.checkpoint.model_folder import model_folder
from aligner.data.batch import TaughtBatch, pack_examples, pack_taught
from aligner.data.dataset import Dataset
from aligner.data.formats import SUPERVISED, TAUGHT
from aligner.data.movie_reviews import review_rows
from aligner.job.config import OfflineConfig
from aligner.job.job import Job, Logged
from aligner.job.offline import load_examples, steps_of
from aligner.job.tool import FROZEN, write_rows
from aligner.losses.distillation import distillation_loss
from aligner.losses.statistics import update_statistics
from aligner.models.parallel import NetworkPlan
from aligner.models.policy import Policy
from aligner.models.shape import ModelShape
from aligner.run import config as options


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig):
    teacher: str = ""
    """Hugging Face model directory or a run's folder; empty where the data holds a teacher's logits."""
    top_k: int = 64
    """Logits kept of each of the teacher's distributions."""
    cache: Path | None = None
    """File that keeps them for other runs; by default one in the run's folder."""
    loss: Literal["forward_kl", "backward_kl"] = "forward_kl"
    """Direction of the divergence."""
    kd_coef: float = 1.0
    """Weight of the divergence."""
    sft_coef: float = 0.0
    """Weight of the negative log-likelihood of the data."""
    temperature: float = 1.0
    """Divides the logits of both models."""

    def __post_init__(self):
        super().__post_init__()
        if self.top_k < 1 or self.temperature <= 0:
            raise ValueError(f"top-k is {self.top_k} and temperature {self.temperature}; expected 1 or more, above 0.")
        if min(self.kd_coef, self.sft_coef) < 0 or self.kd_coef + self.sft_coef == 0:
            raise ValueError("kd-coef and sft-coef must be 0 or more, and one of them above 0.")


@dataclass(frozen=True)
class Run:
    config: Config
    job: Job
    policy: Policy
    train: Dataset
    held_out: list


def taught(c: Config, teacher: Policy, examples: Dataset | list) -> Iterator[dict]:
    """Lines of the cache, in NeMo-Aligner's format: its entry t is about the token after token t."""
    for start in range(0, len(examples), c.batch.examples):
        chunk = [examples[i] for i in range(start, min(start + c.batch.examples, len(examples)))]
        batch = pack_examples(chunk)
        ids_NK, logits_NK, log_sum_N = teacher.infer_top_k(batch, c.top_k, c.temperature)
        starts = batch.cu_seqlens.tolist()
        for example, a, b in zip(chunk, starts[:-1], starts[1:], strict=True):
            yield {
                "tokens": list(example.tokens[:-1]),
                "labels": list(example.tokens[1:]),
                "loss_mask": [int(learnt) for learnt in example.mask[1:]],
                "topk_token_ids": ids_NK[a + 1 : b].tolist(),
                "topk_logits": [[round(x, 4) for x in row] for row in logits_NK[a + 1 : b].tolist()],
                "log_sum_exp_logits": log_sum_N[a + 1 : b].tolist(),
                "teacher": origin(c),
            }


def origin(c: Config) -> list:
    """What a cache's logits are of."""
    return [c.teacher, c.temperature, c.top_k, c.data.files, c.eval_data]


def ask_teacher(c: Config, job: Job) -> tuple[Dataset, list]:
    """(training examples, held-out ones) with the teacher's logits, from the cache or through it."""
    path = c.cache or job.directory.path / "teacher.jsonl"
    caches = [path, path.with_suffix(".held-out.jsonl")]
    path.parent.mkdir(parents=True, exist_ok=True)
    if not caches[0].exists():
        sides = load_examples(job, SUPERVISED, review_rows)
        if sides[0].weighted:
            raise ValueError(
                "the teacher's logits of all --data are kept in one file and not blended by weights; write each file "
                "as often as it is to be read."
            )
        teacher = job.policy(folder=model_folder(c.teacher), **FROZEN)
        for cache, examples in zip(reversed(caches), reversed(sides), strict=True):
            if examples:
                write_rows(cache, taught(c, teacher, examples))
    opened = [
        Dataset.open(str(cache), replace(c.data, check=False), TAUGHT, job.encoder, room=job.shape.context, seed=c.seed)
        for cache in caches
        if cache.exists()
    ]
    made = opened[0][0].metadata.get("teacher")
    if made != origin(c):
        raise ValueError(
            f"{path} holds logits of {made}, not of {origin(c)} (teacher, temperature, top-k, data, held-out data); "
            "remove it or name another --cache."
        )
    return opened[0], opened[1].first(c.eval_examples) if len(opened) > 1 else []


def loss_of(c: Config, num_tokens: float):
    settings = {"kind": c.loss, "temperature": c.temperature, "kd_coef": c.kd_coef, "sft_coef": c.sft_coef}

    def loss(logits_AV: Tensor, index_A: Tensor, micro: TaughtBatch):
        log_sum_A = None if micro.log_sum_N is None else micro.log_sum_N[index_A]
        known = micro.topk_ids_NK[index_A], micro.topk_logits_NK[index_A], log_sum_A, micro.tokens_N[index_A]
        return distillation_loss(logits_AV, *known, num_tokens, **settings)

    return loss


def step(run: Run, number: int) -> Logged:
    """One optimizer step on the next examples."""
    with run.job.timers("train"):
        batch = pack_taught(run.train.batch(number - 1, run.config.batch.examples))
        stats = run.policy.update_logits(batch, loss_of(run.config, float(batch.action_mask_N.sum())))
    named = {"loss": stats["loss"], "loss/distillation": stats["distillation_loss"], "loss/sft": stats["sft_loss"]}
    return named | update_statistics([stats]) | {"tokens": len(batch.tokens_N)}, []


def evaluate(run: Run, number: int) -> Logged:
    """Divergence from the teacher and likelihood of the held-out examples, without an update."""
    if not run.held_out:
        return {}, []
    batch = pack_taught(run.held_out)
    stats = run.policy.infer_logits(batch, loss_of(run.config, float(batch.action_mask_N.sum())))
    return {"eval/loss/distillation": stats["distillation_loss"], "eval/loss/sft": stats["sft_loss"]}, []


def main(argv: list[str] | None = None) -> int:
    config = options.parse(Config, argv)
    job = Job("distill", config)
    plans = [NetworkPlan(name="policy", shape=job.shape, lora=config.lora)]
    if config.teacher:
        job.check_tokenizer(model_folder(config.teacher), "the teacher")
        shape = ModelShape.from_folder(model_folder(config.teacher))
        if config.top_k > shape.vocab:
            raise ValueError(f"top-k is {config.top_k}, and the teacher has {shape.vocab} tokens; lower it.")
        plans.append(NetworkPlan(name="teacher", shape=shape, lora=config.lora, trained=False))
    if job.dry_run(*plans):
        return 0
    if config.teacher:
        job.begin()
        train, held_out = ask_teacher(config, job)
    else:
        train, held_out = load_examples(job, TAUGHT)
        job.begin()
    policy = job.policy(config.lora, config.optimizer, reference=False)
    job.restore(policy=policy)
    run = Run(config, job, policy, train, held_out)
    return job.repeat(
        step=partial(step, run),
        evaluate=partial(evaluate, run),
        networks={"policy": policy},
        export=policy.hugging_face,
        steps=steps_of(config, train),
    )


if __name__ == "__main__":
    options.user_errors(main)
