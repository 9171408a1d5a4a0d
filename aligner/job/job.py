"""What every program does around its step: the model, the processes, the run folder, checkpoints, the loop."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligner.checkpoint import huggingface, training
from aligner.checkpoint.model_folder import model_folder
from aligner.data.encoder import Encoder
from aligner.data.tokenizer import load_tokenizer
from aligner.job.config import JobConfig, OnlineConfig
from aligner.models import parallel
from aligner.models.lora import LoRAConfig
from aligner.models.network import OptimizerConfig
from aligner.models.parallel import NetworkPlan
from aligner.models.policy import Policy
from aligner.models.reward_model import attributes_of, reward_model_tensors
from aligner.models.shape import ModelShape
from aligner.refit import predict
from aligner.refit.trtllm_layout import check_shape
from aligner.run import config as options
from aligner.run import distributed
from aligner.run.directory import RunDirectory
from aligner.run.loop import repeat
from aligner.run.report import write_report
from aligner.run.timers import Timers, peak_memory_bytes

Logged = tuple[dict[str, float], list[dict]]  # metrics, rows for samples.jsonl


class Job:
    """One run of a program, in the order of its methods: dry_run(), begin(), networks, restore(), repeat().

    Made first, before anything is loaded: what is wrong with model, tokenizer or layout is told then.

    folder, shape, read: of the model that the run starts from. attributes: of a reward model, 0 for a language model.
    start: steps that an earlier run has done.
    """

    def __init__(self, program: str, config: JobConfig):
        print(options.to_yaml(config), flush=True)
        config.parallel.data(distributed.world_size())
        self.program, self.config, self.timers = program, config, Timers()
        self.folder = model_folder(config.model)
        self.shape = ModelShape.from_folder(self.folder)
        self.attributes = attributes_of(self.folder)
        tensors = reward_model_tensors(self.shape, self.attributes) if self.attributes else self.shape.tensors()
        self.read = huggingface.Weights(self.folder, tensors)
        self.tokenizer = load_tokenizer(self.folder)
        self.encoder = Encoder(self.tokenizer, config.data.template())
        self.start, self.checkpoint = 0, None

    def dry_run(self, *plans: NetworkPlan) -> bool:
        """Check that the networks fit the layout; with --dry-run, say which rank would hold what and return True."""
        c = self.config
        for plan in plans:
            parallel.check(c.parallel, plan.shape, "the model" if plan.name == "policy" else f"the {plan.name}")
        engine = c.trtllm if isinstance(c, OnlineConfig) and c.sampler == "trtllm" else None
        if engine:
            check_shape(self.shape, engine.tensor)
        if c.dry_run:
            dtype = getattr(torch, c.dtype)
            print(parallel.describe(c.parallel, plans, distributed.world_size(), dtype))
            if engine:
                layout = {"tensor": c.parallel.tensor, "pipeline": c.parallel.pipeline, "ranks": engine.tensor}
                rates = {"node_gb_s": engine.node_gb_s, "network_gb_s": engine.network_gb_s}
                print(predict.describe(self.shape, source_dtype=dtype, dtype=torch.bfloat16, **layout, **rates))
        return c.dry_run

    def begin(self) -> None:
        """Find the checkpoint to resume from, join the processes, make the run folder."""
        c = self.config
        if c.resume and c.output:
            self.checkpoint = training.latest(c.output, c.resume_step)
            self.start = self.plain()["step"]
        self.join()
        needed_bytes = 2 * self.shape.num_bytes()
        self.directory = RunDirectory.create(c.output, self.program, options.to_yaml(c), c.resume, needed_bytes)

    def join(self) -> None:
        """Join the processes: all that a tool needs, which keeps no run folder."""
        distributed.initialize(self.config.threads, self.config.parallel)

    def plain(self) -> dict:
        """Plain values of the checkpoint that the run goes on from; empty at a first start."""
        return training.read_plain(self.checkpoint) if self.checkpoint else {}

    def check_tokenizer(self, folder: Path, what: str) -> None:
        """Raise ValueError when the token ids of another model mean something else than the run's."""
        theirs, ours = load_tokenizer(folder).get_vocab(), self.tokenizer.get_vocab()
        if theirs != ours:
            odd = {token for token, _ in theirs.items() ^ ours.items()}
            raise ValueError(
                f"{what} {str(folder)!r} has another tokenizer than the model (it has {len(theirs)} tokens, the "
                f"model's {len(ours)}, and {len(odd)} have another id or none), so neither reads the other's tokens; "
                "take one of the same family."
            )

    def policy(
        self,
        lora: LoRAConfig,
        optimizer: OptimizerConfig | None,
        *,
        temperature: float = 1.0,
        reference: bool = True,
        folder: Path | None = None,
    ) -> Policy:
        """A policy that starts from the run's model, or from another one; arguments as of models.policy.Policy."""
        if self.attributes and not folder:
            raise ValueError(f"{str(self.folder)!r} is a reward model; give --model a language model.")
        shape, read = self.shape, self.read
        if folder:
            shape = ModelShape.from_folder(folder)
            read = huggingface.Weights(folder, shape.tensors())
        shared = self.shared() | {"lora": lora, "optimizer": optimizer}
        return Policy(shape, read, temperature=temperature, reference=reference, **shared)

    def shared(self) -> dict[str, Any]:
        """Arguments that all networks of the run have in common."""
        return {
            "tokens_per_micro_batch": self.config.batch.tokens_per_micro_batch,
            "seed": self.config.seed,
            "parallel": self.config.parallel,
            "dtype": getattr(torch, self.config.dtype),
        }

    def restore(self, **networks: training.Trained) -> None:
        """Let the networks go on from the checkpoint, if there is one, and forget what was logged after it."""
        if self.checkpoint:
            training.restore(self.checkpoint, networks)
            self.directory.truncate(self.start or -1)  # a run that was stopped before its first step evaluates again
            if distributed.is_main():
                training.set_aside(self.checkpoint)

    def repeat(
        self,
        *,
        step: Callable[[int], Logged],
        evaluate: Callable[[int], Logged],
        networks: dict[str, training.Trained],
        export: Callable[[], Iterable[tuple[str, Tensor]]],
        export_changes: dict[str, dict] | None = None,
        plain: Callable[[], dict] = dict,
        steps: int = 0,
    ) -> int:
        """The steps that are left, then the report. Returns the exit status.

        step, evaluate: step number -> (metrics, rows for samples.jsonl). Where a step counts its "tokens" and its
            "sampled_tokens", their rates are added.
        networks: what a checkpoint holds, by name. plain: small values that it holds too.
        export: the tensors of the model that the run leaves in policy/, a Hugging Face directory; changes to its JSON
            files by export_changes, {file: {key: value}}.
        steps: of the whole run; 0 for --steps.
        """
        c, path = self.config, self.directory.path

        def save(number: int) -> None:
            state = {name: network.state_dict() for name, network in networks.items()}
            training.save(path, number, state | {"plain": plain()})
            huggingface.write(path / "policy", export(), like=self.folder, changes=export_changes or {})

        def timed(number: int) -> Logged:
            metrics, rows = step(number)
            times = self.timers.take()
            metrics |= times | {"peak_memory_bytes": peak_memory_bytes()}
            if "tokens" in metrics:
                metrics["tokens_per_second"] = metrics["tokens"] / sum(times.values())
            if "sampled_tokens" in metrics:
                metrics["sampled_tokens_per_second"] = metrics["sampled_tokens"] / times["time/sample"]
            return metrics, rows

        status = repeat(
            steps=steps or c.steps,
            save_every=c.save_every,
            eval_every=c.eval_every,
            directory=self.directory,
            start=self.start,
            evaluate=evaluate,
            step=timed,
            save=save,
        )
        self.directory.close()
        if distributed.is_main():
            print(f"tuned model: {path / 'policy'}\nreport: {write_report(path)}")
        return status
