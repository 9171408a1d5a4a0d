"""The options that programs share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from aligner.data.batch import BatchConfig, ExampleBatchConfig, ToolBatchConfig
from aligner.data.dataset import DataConfig
from aligner.models.lora import LoRAConfig
from aligner.models.network import OptimizerConfig
from aligner.rollout.conversation import EnvironmentConfig
from aligner.rollout.sampling import SamplingConfig
from aligner.rollout.wire import TrtllmConfig
from aligner.run.distributed import ParallelConfig
from aligner.serving.reward import RewardConfig


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Options of everything that runs a model on data."""

    model: str = "SmolLM2-135M-Instruct"
    """Hugging Face model directory, a run's folder, or the default model's name."""
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 0
    """Of sampling, data order and new parameters."""
    threads: int = 0
    """CPU threads of each process; 0 takes torch's choice, one a core."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights; with bfloat16 the optimizer keeps float32 masters."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self):
        if self.threads < 0:
            raise ValueError(f"threads is {self.threads}, expected 0 or more.")


@dataclass(frozen=True, kw_only=True)
class ModelToolConfig(JobConfig):
    """Options of tools that run a model, and train nothing."""

    batch: ToolBatchConfig = field(default_factory=ToolBatchConfig)


@dataclass(frozen=True, kw_only=True)
class ToolConfig(ModelToolConfig):
    """Options of tools that sample and score."""

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_tokens=64))
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass(frozen=True, kw_only=True)
class ProgramConfig(JobConfig):
    """Options of programs that train."""

    eval_data: str = ""
    """JSONL files of held-out examples; empty holds out some of the default data, or evaluates nothing with --data."""
    steps: int = 10
    """Steps of the whole run."""
    output: Path | None = None
    """Run folder; default runs/<program>-<time>."""
    resume: bool = False
    """Go on from the newest checkpoint in --output."""
    resume_step: int | None = None
    """Go on from the checkpoint of this step instead; newer ones are renamed."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves at the end only."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates before the first and after the last step only."""
    dry_run: bool = False
    """Print which rank would hold what, and end."""

    def __post_init__(self):
        super().__post_init__()
        if min(self.steps, self.save_every, self.eval_every) < 0:
            raise ValueError("steps, save-every and eval-every must be 0 or more.")
        if self.resume_step is not None and not self.resume:
            raise ValueError(f"resume-step {self.resume_step} is of a run that goes on; add --resume.")


@dataclass(frozen=True, kw_only=True)
class OfflineConfig(ProgramConfig):
    """Options of programs that train on examples."""

    steps: int = 0
    """Steps of the whole run; 0 is one pass over the data."""
    eval_examples: int = 256
    """Held-out examples at most; 0 evaluates nothing."""
    batch: ExampleBatchConfig = field(default_factory=ExampleBatchConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-4))


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(ProgramConfig):
    """Options of programs that train on what they sample."""

    eval_prompts: int = 96
    """Held-out prompts answered at every evaluation; 0 evaluates nothing."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    sampler: Literal["native", "trtllm"] = "native"
    """Who samples: this process, or TensorRT-LLM in processes of its own."""
    trtllm: TrtllmConfig = field(default_factory=TrtllmConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.steps < 1 or self.eval_prompts < 0:
            raise ValueError("steps must be 1 or more, eval-prompts 0 or more.")
        if self.sampler == "native" and self.trtllm != TrtllmConfig():
            raise ValueError("trtllm options are of another sampler; add --sampler trtllm.")
        if self.sampler == "trtllm" and bool(self.trtllm.python) == bool(self.trtllm.url) and not self.dry_run:
            raise ValueError(
                "--sampler trtllm takes --trtllm.python, of the environment that has TensorRT-LLM, or --trtllm.url and "
                "--trtllm.key-file, of engines that run already; give one of the two."
            )
        if self.sampler == "trtllm" and self.sampling.dtype != "float32":
            raise ValueError("sampling.dtype is of the native sampler; TensorRT-LLM has the model's own.")
