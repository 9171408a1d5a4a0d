"""What is asked of TensorRT-LLM, and what its versions have otherwise.

It is imported by load_api() alone. What differs between versions is asked of it in Features, and what is used of it
stands in tests/contracts.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from aligner.rollout.sampling import Sampling

EXTENSION = "aligner.refit.extension.RefitExtension"
OLDEST, NEWEST = (1, 2), (1, 4)  # of the versions whose names were looked at (tests/contracts)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    tensor: int = 1
    """Tensor ranks of an engine."""
    max_batch: int = 256
    """Sequences decoded at once."""
    max_tokens: int = 8192
    """Tokens of one forward pass."""
    kv_fraction: float = 0.85
    """Share of the free GPU memory that the key-value cache takes."""
    drain_s: float = 120.0
    """Seconds that a refit waits for requests to end."""


def load_api() -> SimpleNamespace:
    """The names of TensorRT-LLM that are used. Raises ValueError where it cannot be imported, or is too old or new."""
    try:
        from tensorrt_llm._torch.async_llm import AsyncLLM
        from tensorrt_llm.llmapi import llm_args
        from tensorrt_llm.sampling_params import SamplingParams
        from tensorrt_llm.version import __version__
    except (ImportError, RuntimeError) as error:  # without a GPU it may raise either
        raise ValueError(
            f"TensorRT-LLM cannot be imported here ({error}); run this in its own environment (docs/tensorrt-llm.md)."
        ) from None
    check_version(__version__)
    names = ("CapacitySchedulerPolicy", "CudaGraphConfig", "KvCacheConfig", "SchedulerConfig", "TorchLlmArgs")
    found = {name: getattr(llm_args, name) for name in names} | {"SleepConfig": getattr(llm_args, "SleepConfig", None)}
    memory = getattr(llm_args, "ExecutorMemoryType", None)
    if memory is None:  # 1.2.1 has it elsewhere
        from tensorrt_llm._torch.virtual_memory import ExecutorMemoryType as memory
    return SimpleNamespace(
        AsyncLLM=AsyncLLM, SamplingParams=SamplingParams, ExecutorMemoryType=memory, version=__version__, **found
    )


def check_version(version: str) -> None:
    """Raise ValueError for a version whose names were never looked at."""
    if not OLDEST <= _numbers(version) <= NEWEST:
        known = " to ".join(".".join(map(str, v)) for v in (OLDEST, NEWEST))
        raise ValueError(f"TensorRT-LLM is {version}, expected {known}; install 1.2.1 (docs/tensorrt-llm.md).")


def _numbers(version: str) -> tuple[int, ...]:
    """Its first two; of none, what is older than all."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else ()


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a version has. sleep: its switch. sampler_type: whether the engine's sampler is chosen by name.

    modes: whether log-probabilities may be asked for as they are after temperature and cuts.
    drawn: whether the sampler heeds min_p and penalties, which older ones take and ignore (pull requests 16485, 16590).
    weights, cache: the tags by which its weights and its key-value cache sleep.
    """

    sleep: str
    sampler_type: bool
    modes: bool
    drawn: bool
    weights: str
    cache: str

    @staticmethod
    def of(api: SimpleNamespace) -> "Features":
        """Raises ValueError, which names both switches, for a version that has neither."""
        arguments = _fields(api.TorchLlmArgs)
        sleep = next((name for name in ("sleep_config", "enable_sleep") if name in arguments), None)
        if sleep is None:
            raise ValueError(
                f"TensorRT-LLM {api.version} has neither sleep_config nor enable_sleep; install 1.2.1 or newer."
            )
        modes, memory = "logprobs_mode" in _fields(api.SamplingParams), api.ExecutorMemoryType
        weights = getattr(memory, "MODEL_WEIGHTS_MAIN", memory.MODEL_ENGINE_MAIN)
        tags = {"weights": weights.value, "cache": memory.KV_CACHE.value}
        drawn = _numbers(api.version) >= (1, 4)
        return Features(sleep=sleep, sampler_type="sampler_type" in arguments, modes=modes, drawn=drawn, **tags)


def _fields(kind: type) -> set[str]:
    """Of a pydantic model or a dataclass."""
    return set(getattr(kind, "model_fields", None) or (f.name for f in dataclasses.fields(kind)))


def engine_arguments(api: SimpleNamespace, folder: Path, context: int, c: EngineConfig) -> dict:
    """Of AsyncLLM: dummy weights, which the first refit overwrites. context: tokens of a sequence, at most."""
    features = Features.of(api)
    policy = api.CapacitySchedulerPolicy.MAX_UTILIZATION
    # Nothing that sleeps is kept in host memory: every wake is followed by a refit, and caches start empty.
    modes = {api.ExecutorMemoryType(tag): "NONE" for tag in (features.weights, features.cache)}
    arguments = {
        "model": str(folder),
        "orchestrator_type": "ray",
        "ray_worker_extension_cls": EXTENSION,
        "tensor_parallel_size": c.tensor,
        "load_format": "dummy",
        "max_batch_size": c.max_batch,
        "max_num_tokens": c.max_tokens,
        "max_seq_len": context,
        "max_input_len": context,  # its default refuses prompts of more than 1024
        "enable_chunked_prefill": True,  # or prompts longer than max_num_tokens are refused
        "kv_cache_config": api.KvCacheConfig(enable_block_reuse=True, free_gpu_memory_fraction=c.kv_fraction),
        "cuda_graph_config": api.CudaGraphConfig(enable_padding=True, max_batch_size=c.max_batch),
        "scheduler_config": api.SchedulerConfig(capacity_scheduler_policy=policy),
        features.sleep: api.SleepConfig(restore_modes=modes) if features.sleep == "sleep_config" else True,
    }
    return arguments | ({"sampler_type": "TorchSampler"} if features.sampler_type else {})


def sampling_params(api: SimpleNamespace, sampling: Sampling, seed: int):
    """SamplingParams of one response. Raises ValueError for what its log-probabilities would not be comparable with."""
    features = Features.of(api)
    cut = sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0 or sampling.repetition_penalty != 1
    heated = sampling.temperature not in (0.0, 1.0)
    if heated and (cut or not features.modes):
        known = ", or after it and the cuts" if features.modes else ""
        raise ValueError(
            f"sampling.temperature is {sampling.temperature}; TensorRT-LLM gives log-probabilities before the "
            f"temperature{known}, and the trainer's are after it and before cuts; sample at temperature 1."
        )
    greedy = sampling.temperature == 0
    optional = {"top_k": sampling.top_k, "min_p": sampling.min_p, "min_tokens": sampling.min_tokens}
    named = {name: value for name, value in optional.items() if value}
    if sampling.repetition_penalty != 1:
        named["repetition_penalty"] = sampling.repetition_penalty
    if ignored := [name for name in ("min_p", "repetition_penalty") if name in named and not features.drawn]:
        raise ValueError(f"TensorRT-LLM {api.version} ignores {' and '.join(ignored)}; leave them out, or install 1.4.")
    if sampling.stop_strings:
        named["stop"] = list(sampling.stop_strings)
    if greedy:
        named["top_k"] = 1
    if heated:
        named["logprobs_mode"] = "processed"
    return api.SamplingParams(
        end_id=-1,  # the end comes as a stop token, so that it and its log-probability belong to the response
        stop_token_ids=list(sampling.stop),
        include_stop_str_in_output=True,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=seed,
        logprobs=0,  # of the sampled token alone
        detokenize=bool(sampling.stop_strings),
        **named,
    )
