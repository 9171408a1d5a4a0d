"""Arguments of an engine: refused where upstream's would refuse them."""

import enum

from tensorrt_llm.contract import Strict, fields

ExecutorMemoryType = enum.Enum("ExecutorMemoryType", fields("ExecutorMemoryType"), type=str)
CapacitySchedulerPolicy = enum.Enum("CapacitySchedulerPolicy", fields("CapacitySchedulerPolicy"), type=str)
LoadFormat = enum.Enum("LoadFormat", fields("LoadFormat"))


class KvCacheConfig(Strict):
    pass


class CudaGraphConfig(Strict):
    pass


class SchedulerConfig(Strict):
    pass


class SleepConfig(Strict):
    pass


KINDS = {
    "kv_cache_config": KvCacheConfig,
    "cuda_graph_config": CudaGraphConfig,
    "scheduler_config": SchedulerConfig,
    "sleep_config": SleepConfig,
}


class TorchLlmArgs(Strict):
    def __init__(self, **given):
        super().__init__(**given)
        odd = [name for name, kind in KINDS.items() if not isinstance(given.get(name), kind | None)]
        if self.model is None or odd:
            raise ValueError(f"TorchLlmArgs: wrong kind of {', '.join(odd) or 'model'}.")
        if self.orchestrator_type != "ray":
            raise ValueError(f"TorchLlmArgs: AsyncLLM needs the orchestrator ray, got {self.orchestrator_type!r}.")
        if str(self.load_format).upper() != LoadFormat.DUMMY.name:
            raise ValueError(f"TorchLlmArgs: this stand-in loads dummy weights alone, got {self.load_format!r}.")
