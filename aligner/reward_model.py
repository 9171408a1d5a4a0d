r"""Reward models: `python -m aligner.reward_model --data pairs.jsonl`.

    r = w . h_T, T the last token of a response;    d = r_chosen - r_rejected,    m how much better the data says it is
    bt: -log s(d)    margin: -log s(d - m)    scaled: -m log s(d)    in the mean over pairs,  + centre (r_c + r_r)^2
    regression: (r_k - a_k)^2 in the mean over the ratings a_k of several attributes that are there

Source: bt: Ouyang et al. 2022, arXiv:2203.02155, eq. 1; margin: Touvron et al. 2023, arXiv:2307.09288, eq. 2; scaled:
Wang et al. 2024, arXiv:2410.01257; centre: Eisenstein et al. 2023, arXiv:2312.09244; regression: Wang et al. 2024,
arXiv:2406.08673.
The tuned model is a directory that transformers' AutoModelForSequenceClassification reads, with a pad token that does
not end a response. Rewards of other programs take it as --reward.model RUN.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from aligner.data.batch import MarginBatch, RatedBatch, pack_last, pack_pairs_last
from aligner.data.dataset import Dataset
from aligner.data.examples import Pair, Rated
from aligner.data.formats import COMPARISONS, RATED
from aligner.job.config import OfflineConfig
from aligner.job.job import Job, Logged
from aligner.job.offline import load_examples, steps_of
from aligner.losses.preference import bradley_terry_loss
from aligner.losses.ranking import calibration, spearman
from aligner.losses.regression import UNRATED, num_rated, regression_loss
from aligner.losses.statistics import update_statistics
from aligner.models.network import OptimizerConfig
from aligner.models.parallel import NetworkPlan
from aligner.models.reward_model import RewardModel, reward_model_config
from aligner.run import config as options


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig):
    loss: Literal["bt", "margin", "scaled", "regression"] = "bt"
    """Of pairs, or of single responses with ratings."""
    centre: float = 0.0
    """Weight of the squared sum of a pair's rewards, which draws them around 0."""
    layers: int = 0
    """Layers of the language model that it starts from; 0 keeps all."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-4))

    def __post_init__(self):
        super().__post_init__()
        if self.centre < 0 or (self.centre and self.loss == "regression"):
            raise ValueError(f"centre is {self.centre}, expected 0 or more, and 0 with --loss regression.")


@dataclass(frozen=True)
class Run:
    """What a step uses. held_out: (name, examples) of each validation file."""

    config: Config
    job: Job
    model: RewardModel
    train: Dataset
    held_out: list[tuple[str, list]]


def prepared(c: Config, examples: list[Pair] | list[Rated]) -> MarginBatch | RatedBatch:
    if c.loss == "regression":
        batch, ratings_BK = pack_last([e.tokens for e in examples]), torch.tensor([e.attributes for e in examples])
        return RatedBatch(**vars(batch), attributes_BK=ratings_BK.float())
    margins = [pair.margin for pair in examples for _ in range(2)]
    return MarginBatch(**vars(pack_pairs_last(examples)), margins_B=torch.tensor(margins))


def loss_of(c: Config, batch):
    """The loss, which divides by what the whole batch holds."""
    if c.loss == "regression":
        num = num_rated(batch.attributes_BK)
        return lambda scores_NK, micro: regression_loss(scores_NK, micro, num)
    num_pairs = len(batch.margins_B) / 2
    return lambda scores_NK, micro: bradley_terry_loss(scores_NK[:, 0], micro, num_pairs, kind=c.loss, centre=c.centre)


def named(stats: dict[str, float], prefix: str = "") -> dict[str, float]:
    names = {"reward_chosen": "rewards/chosen", "reward_rejected": "rewards/rejected", "margin": "rewards/margin"}
    kept = ("loss", "accuracy", "absolute_error", *names)
    return {prefix + names.get(name, name): float(stats[name]) for name in kept if name in stats}


def step(run: Run, number: int) -> Logged:
    """One optimizer step on the next examples."""
    with run.job.timers("train"):
        batch = prepared(run.config, run.train.batch(number - 1, run.config.batch.examples))
        stats = run.model.update(batch, loss_of(run.config, batch))
    return named(stats) | update_statistics([stats]) | {"tokens": len(batch.tokens_N)}, []


def evaluate(run: Run, number: int) -> Logged:
    """Each validation file on its own: loss, then accuracy and calibration, or rank correlation of each attribute."""
    metrics = {}
    for name, examples in run.held_out:
        prefix = f"eval/{name}/" if name else "eval/"
        batch = prepared(run.config, examples)
        scores_NK = run.model.infer(batch)
        loss, stats = loss_of(run.config, batch)(scores_NK, batch)
        metrics |= named(stats | {"loss": loss}, prefix)
        scores_BK = scores_NK[batch.cu_seqlens[1:].long() - 1]
        if run.config.loss == "regression":
            metrics |= correlations(scores_BK, batch.attributes_BK, prefix)
        else:
            metrics[prefix + "calibration_error"] = calibration(scores_BK[0::2, 0], scores_BK[1::2, 0])
    return metrics, []


def correlations(scores_BK: Tensor, ratings_BK: Tensor, prefix: str) -> dict[str, float]:
    """Spearman's rank correlation of each attribute that varies."""
    metrics = {}
    for k, (scores_B, ratings_B) in enumerate(zip(scores_BK.unbind(1), ratings_BK.unbind(1), strict=True)):
        rated = ratings_B != UNRATED
        if len(set(ratings_B[rated].tolist())) > 1 and len(set(scores_B[rated].tolist())) > 1:
            metrics[f"{prefix}spearman/{k}"] = spearman(scores_B[rated], ratings_B[rated])
    return metrics


def export_changes(job: Job, model: RewardModel) -> dict[str, dict]:
    """A classifier's files; where the end of a response pads too, transformers would look for the wrong last token."""
    tokenizer = job.tokenizer
    special = [
        token for token in tokenizer.all_special_tokens if token not in (tokenizer.eos_token, tokenizer.bos_token)
    ]
    config = reward_model_config(job.folder, model.shape, model.attributes)
    if tokenizer.pad_token not in (None, tokenizer.eos_token):
        return {"config.json": config | {"pad_token_id": tokenizer.pad_token_id}}
    pad = special[0] if special else None
    config |= {"pad_token_id": tokenizer.convert_tokens_to_ids(pad) if pad else None}
    return {"config.json": config, "tokenizer_config.json": {"pad_token": pad}}


def validation_sets(job: Job, use) -> list[tuple[str, list]]:
    """(name, examples) of every file of --eval-data; the name of a single one is empty."""
    c = job.config
    files = [file for file in c.eval_data.split(",") if file] if c.eval_examples else []
    opened = [Dataset.open(f, c.data, use, job.encoder, room=job.shape.context, seed=c.seed) for f in files]
    names = [Path(file).stem for file in files] if len(files) > 1 else [""]
    if len(set(names)) < len(names):
        raise ValueError(
            f"--eval-data has two files of one name ({', '.join(names)}), by which they are logged; rename one."
        )
    return [(name, data.first(c.eval_examples)) for name, data in zip(names, opened, strict=False)]


def main(argv: list[str] | None = None) -> int:
    config = options.parse(Config, argv)
    job = Job("reward_model", config)
    use = RATED if config.loss == "regression" else COMPARISONS
    train, _ = load_examples(job, use)
    held_out = validation_sets(job, use)
    attributes = len(train[0].attributes) if config.loss == "regression" else 1
    shape = replace(job.shape, num_layers=config.layers or job.shape.num_layers)
    head = job.shape.hidden * attributes
    if job.dry_run(NetworkPlan(name="reward model", shape=shape, lora=config.lora, value_head=head)):
        return 0
    job.begin()
    own = {"lora": config.lora, "optimizer": config.optimizer, "attributes": attributes}
    model = RewardModel(shape, job.read, trained=job.attributes == attributes, **own, **job.shared())
    job.restore(reward_model=model)
    run = Run(config, job, model, train, held_out)
    return job.repeat(
        step=partial(step, run),
        evaluate=partial(evaluate, run),
        networks={"reward_model": model},
        export=model.hugging_face,
        export_changes=export_changes(job, model),
        steps=steps_of(config, train),
    )


if __name__ == "__main__":
    options.user_errors(main)
