"""The sampling side of an online run: prompts, the sampler and its refit, rewards, evaluation on held-out prompts."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from aligner import ops
from aligner.checkpoint import huggingface
from aligner.checkpoint.model_folder import model_folder
from aligner.data.batch import Rollout
from aligner.data.dataset import Dataset, load
from aligner.data.examples import Prompt
from aligner.data.formats import PROMPTS
from aligner.data.movie_reviews import review_prompt_rows
from aligner.data.tokenizer import digest
from aligner.job.config import OnlineConfig
from aligner.job.job import Job, Logged
from aligner.losses.shaping import shape_rewards
from aligner.losses.statistics import rollout_statistics
from aligner.models.lora import LoRAConfig
from aligner.models.policy import Policy
from aligner.models.reward_model import RewardModel, attributes_of, reward_model_tensors
from aligner.models.shape import ModelShape
from aligner.refit.pulled import PulledReplica
from aligner.refit.replica import Replica
from aligner.rollout.conversation import Dialogue, load_environment
from aligner.rollout.native import NativeSampler
from aligner.rollout.scoring import Scored, Values, sample_and_score
from aligner.rollout.transcript import Transcript
from aligner.rollout.wire import EngineSampler, check_model, start_engine
from aligner.run import distributed
from aligner.run.distributed import agree
from aligner.run.secret import read_secret
from aligner.serving.remote import RemoteReward
from aligner.serving.reward import RewardConfig, load_reward
from aligner.serving.rewards import Rewards


def load_prompts(job: Job) -> tuple[Dataset, list[Prompt]]:
    """Training prompts and held-out ones; by default the opening words of IMDb reviews."""
    c: OnlineConfig = job.config
    room, default = job.shape.context - c.sampling.max_tokens, partial(review_prompt_rows, job.tokenizer)
    train, held_out = load(c.data, c.eval_data, PROMPTS, job.encoder, room=room, seed=c.seed, default=default)
    train.batch(0, c.batch.sequences // c.batch.samples_per_prompt)
    return train, held_out.first(c.eval_prompts) if held_out and c.eval_prompts else []


def load_rewards(job: Job, config: RewardConfig) -> Rewards:
    """The functions, tried on a tiny pair, and served models on ranks that sample; the models on all, which call it."""
    folders = [Path(model_folder(name)) for name in config.model]
    functions = agree(lambda: [load_reward(f) for f in config.functions()] if distributed.place().leads else [])
    agree(lambda: [function.check() for function in functions])
    served = agree(lambda: _served_rewards(job, config) if distributed.place().leads else [])
    count = len(config.functions()) + len(config.url) + len(folders)
    models = [(open_reward_model(job, folder), config.attribute_weights or (1.0,)) for folder in folders]
    for model, weights in models:
        if len(weights) != model.attributes:
            raise ValueError(
                f"reward.attribute-weights has {len(weights)} numbers, the reward model gives {model.attributes} "
                "attributes; give one number each."
            )
    return Rewards(functions, models, config.weights or (1.0,) * count, served)


def _served_rewards(job: Job, config: RewardConfig) -> list[RemoteReward]:
    """Connected, ready and of the run's tokenizer."""
    shared = {"access": config, "dtype": config.answer_dtype}
    served = [RemoteReward(url, config.attribute_weights or (1.0,), **shared) for url in config.url]
    for reward in served:
        reward.check(digest(job.tokenizer))
    return served


def open_reward_model(job: Job, folder: Path) -> RewardModel:
    """A reward model that is never trained, on the run's layout. Raises ValueError when the folder holds none."""
    attributes = attributes_of(folder)
    if not attributes:
        raise ValueError(f"{str(folder)!r} is no reward model; train one with `python -m aligner.reward_model`.")
    job.check_tokenizer(folder, "the reward model")
    shape = ModelShape.from_folder(folder)
    read = huggingface.Weights(folder, reward_model_tensors(shape, attributes))
    untrained = {"lora": LoRAConfig(rank=0), "optimizer": None}
    return RewardModel(shape, read, attributes=attributes, trained=True, **untrained, **job.shared())


def open_engine(job: Job, devices: list[str]) -> EngineSampler:
    """The engine of this replica, ready. devices: GPUs of one that is started here.

    Raises ValueError for one of other sizes than the run needs.
    """
    c, here = job.config.trtllm, distributed.place()
    if c.url and len(c.url) != here.replicas:
        raise ValueError(f"trtllm.url names {len(c.url)} engines, expected {here.replicas}, one a data-parallel rank.")
    if c.url:
        key = read_secret(c.key_file, "trtllm.key-file").encode()
        engine = EngineSampler(c.url[here.data], key, job.shape.context)
    else:
        log = job.directory.path / f"engine-{here.data}.log"
        engine = start_engine(c, job.folder, job.shape.context, log, devices)
    check_model(engine.wait_until_ready(c.start_s), job.shape)
    return engine


class Actor:
    """Samples the policy's responses and has them scored, in training and on held-out prompts.

    All ranks make it and call its methods together.

    train, held_out: prompts. rewards: None to have nothing scored.
    offloaded: networks whose optimizer leaves the device while responses are sampled, with --parallel.offload.
    """

    def __init__(
        self, job: Job, policy: Policy, train: Dataset, held_out: list[Prompt], rewards: Rewards | None, *offloaded
    ):
        self.job, self.config, self.policy, self.rewards = job, job.config, policy, rewards
        self.train, self.held_out = train, held_out
        self.transcript = Transcript(job.tokenizer)
        self._offloaded = [policy.network, *offloaded] if self.config.parallel.offload else []
        self.replica = self._replica()
        self.replica.refit(job.start)
        self._dialogue = agree(self._load_dialogue)

    def _replica(self) -> Replica | PulledReplica:
        c, policy = self.config, self.policy
        if isinstance(c, OnlineConfig) and c.sampler == "trtllm":
            return PulledReplica(policy, policy.shape, partial(open_engine, self.job), shares=bool(c.trtllm.python))
        made = {"dtype": c.sampling.dtype, "tokenizer": self.job.folder}
        return Replica(policy, lambda: NativeSampler(policy.shape, **made))

    def _load_dialogue(self) -> Dialogue | None:
        if not isinstance(self.config, OnlineConfig) or self.replica.sampler is None:
            return None
        c = self.config.environment
        if not c.function:
            return None
        environment = load_environment(c.function)
        return Dialogue(environment=environment, encoder=self.job.encoder, max_turns=c.max_turns)

    def prompts(self, batch: int) -> list[Prompt]:
        """Of the batch with this number, 0-based."""
        return self.train.batch(batch, self.config.batch.sequences // self.config.batch.samples_per_prompt)

    def sample(self, prompts: list[Prompt], seed: int, critic: Values | None = None) -> Scored:
        """config.batch.samples_per_prompt responses to each prompt; rewards and a critic's values are on their way."""
        for network in self._offloaded:
            network.offload.leave()
        return self.answer(prompts, self.config.batch.samples_per_prompt, seed, critic)

    def answer(self, prompts: list[Prompt], n: int, seed: int, critic: Values | None = None) -> Scored:
        """n responses to each prompt; rewards, and values of a critic, are on their way."""
        sampling = self.config.sampling.sampling(seed, self.transcript.stop)
        shared = (self.transcript, self.rewards, self._dialogue, critic, self.config.batch.tokens_per_micro_batch)
        return sample_and_score(self.replica.sampler, prompts, sampling, n, *shared)

    def raw_rewards(self, scored: Scored) -> Tensor:
        """(B,) float32, reward units: waits for the functions, asks the models."""
        return self.rewards.total(scored.rewards(), scored.rollout, scored.shares())

    def shaped(self, raw_B: Tensor, rollout: Rollout, overlong: tuple[float, float, float] | None = None) -> Tensor:
        """What is trained on: standardised, clipped, less penalties (losses.shaping)."""
        c = self.config.reward
        return shape_rewards(
            raw_B,
            rollout.finished_B,
            ops.segment_sum(rollout.action_mask_N.float(), rollout.cu_seqlens),
            mean=c.mean,
            std=c.std,
            clip=c.clip,
            missing_eos_penalty=c.missing_eos_penalty,
            overlong=overlong,
        )

    def record(self, number: int, scored: Scored, raw_B: Tensor, log_ratio_N: Tensor) -> Logged:
        """What a step tells of its rollout."""
        rollout = scored.rollout
        counts = {"tokens": len(rollout.tokens_N), "sampled_tokens": int(rollout.action_mask_N.sum())}
        metrics = rollout_statistics(rollout, raw_B, log_ratio_N) | counts
        return metrics, self.transcript.rows(number, "train", scored.texts, raw_B)

    def evaluate(self, number: int) -> Logged:
        """Reward and KL on held-out prompts; every call draws with the same seeds."""
        if not self.held_out:
            return {}, []
        scored = self.answer(self.held_out, 1, self.config.seed)
        rollout, rewards_B = scored.rollout, self.raw_rewards(scored)
        log_ratio_N = torch.zeros_like(rollout.sampler_logprobs_N)
        if rollout.weights_version:  # before the first update the policy is the reference
            log_ratio_N = self.policy.infer(rollout)[0] - self.policy.infer_reference(rollout)
        metrics = rollout_statistics(rollout, rewards_B, log_ratio_N, prefix="eval/")
        return metrics, self.transcript.rows(number, "eval", scored.texts, rewards_B)
