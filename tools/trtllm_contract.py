"""What this package relies on of TensorRT-LLM's Python source, without importing it.

python tools/trtllm_contract.py extract SOURCE VERSION     facts of a source tree or an installed wheel, as JSON
python tools/trtllm_contract.py diff OLD.json NEW.json     what a newer version has otherwise; status 1 if anything

Facts are names, parameters, defaults, fields, bases and decorators, never bodies. tests/contracts holds those of the
versions that are supported, and tests/refit/test_contract.py holds our own code against them.
"""

import ast
import json
import sys
from pathlib import Path

# Module -> names. Where upstream has moved one, both places are listed.
PINS = {
    "tensorrt_llm.version": ("__version__",),
    "tensorrt_llm.sampling_params": ("SamplingParams",),
    "tensorrt_llm.llmapi.rlhf_utils": ("WorkerExtension",),
    "tensorrt_llm._ray_utils": ("control_action_decorator",),
    "tensorrt_llm.executor.ray.utils": ("control_action_decorator",),
    "tensorrt_llm._torch.async_llm": ("AsyncLLM",),
    "tensorrt_llm._torch.pyexecutor.model_loader": ("ModelLoader", "initialize_dummy_weights"),
    "tensorrt_llm._torch.pyexecutor.model_engine": ("PyTorchModelEngine",),
    "tensorrt_llm._torch.pyexecutor.py_executor": ("PyExecutor",),
    "tensorrt_llm.executor.ray_gpu_worker": ("RayGPUWorker", "RayWorkerWrapper", "resolve_obj_by_qualname"),
    "tensorrt_llm.executor.ray.gpu_worker": ("RayGPUWorker", "RayWorkerWrapper", "resolve_obj_by_qualname"),
    "tensorrt_llm.llmapi.llm_args": (
        "BaseCudaGraphConfig",
        "BaseLlmArgs",
        "CapacitySchedulerPolicy",
        "CudaGraphConfig",
        "DecodeCudaGraphConfig",
        "ExecutorMemoryType",
        "KvCacheConfig",
        "LoadFormat",
        "RayPlacementConfig",
        "SchedulerConfig",
        "SleepConfig",
        "TorchLlmArgs",
    ),
    "tensorrt_llm._torch.virtual_memory": (
        "ExecutorMemoryType",
        "materialize_with_tag",
        "maybe_scope",
        "preserve_contents",
        "release_with_tag",
        "verify_sleep_wakeup_tags",
    ),
    "tensorrt_llm._torch.models.checkpoints.hf.weight_mapper": ("HfWeightMapper",),
    "tensorrt_llm._torch.modules.linear": (
        "Linear",
        "TensorParallelMode",
        "UnquantizedLinearMethod",
        "load_weight_shard",
    ),
    "tensorrt_llm._torch.modules.embedding": ("Embedding", "LMHead"),
    "tensorrt_llm._torch.utils": ("get_device_uuid",),
    "tensorrt_llm.llmapi.llm": ("BaseLLM", "LLM", "RequestOutput", "_TorchLLM"),
    "tensorrt_llm.executor.result": ("CompletionOutput", "GenerationResult", "GenerationResultBase", "Logprob"),
}


def extract(source: Path, version: str) -> dict:
    """The facts of a tree that holds the folder tensorrt_llm; what it does not have is left out."""
    modules = {}
    for module, names in PINS.items():
        path = Path(source, *module.split(".")).with_suffix(".py")
        if not path.is_file():
            continue
        body = ast.parse(path.read_text()).body
        found = {node.name: node for node in body if hasattr(node, "name")}
        found |= {
            node.targets[0].id: node for node in body if isinstance(node, ast.Assign) and hasattr(node.targets[0], "id")
        }
        facts = {name: facts_of(found[name]) for name in names if name in found}
        modules[module] = {"path": str(path.relative_to(source)), "names": facts}
    return {"version": version, "modules": modules}


def facts_of(node: ast.ClassDef | ast.FunctionDef | ast.Assign) -> dict:
    if isinstance(node, ast.Assign):
        return {"kind": "constant"}
    decorators = [ast.unparse(d) for d in node.decorator_list]
    if not isinstance(node, ast.ClassDef):
        return {"kind": "function", "parameters": parameters(node.args), "decorators": decorators}
    functions = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    facts = {"kind": "class", "bases": [ast.unparse(b) for b in node.bases], "decorators": decorators}
    facts["fields"] = dict(pair for n in node.body for pair in fields(n))
    facts["methods"] = {
        n.name: {"parameters": parameters(n.args), "decorators": [ast.unparse(d) for d in n.decorator_list]}
        for n in functions
    }
    facts["attributes"] = sorted({name for n in functions if n.name == "__init__" for name in attributes(n)})
    return facts


def parameters(args: ast.arguments) -> list[str]:
    """name, name=default, *, *args, **kwargs, as they stand in the signature, without annotations."""
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults
    words = [_with_default(a.arg, d) for a, d in zip(plain, defaults, strict=True)]
    if args.vararg or args.kwonlyargs:
        words.append(f"*{args.vararg.arg if args.vararg else ''}")
    words += [_with_default(a.arg, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return words + ([f"**{args.kwarg.arg}"] if args.kwarg else [])


def _with_default(name: str, default: ast.expr | None) -> str:
    return name if default is None else f"{name}={ast.unparse(default)}"


def fields(node: ast.stmt) -> list[tuple[str, str | None]]:
    """(name, source of the default) of a class-level assignment; of pydantic's Field, what it defaults to."""
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [(node.target.id, _default(node.value))]
    if isinstance(node, ast.Assign):
        return [(t.id, _default(node.value)) for t in node.targets if isinstance(t, ast.Name)]
    return []


def _default(value: ast.expr | None) -> str | None:
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field":
        named = {k.arg: k.value for k in value.keywords}
        if "default_factory" in named:
            return f"{ast.unparse(named['default_factory'])}()"
        value = value.args[0] if value.args else named.get("default")
    return None if value is None else ast.unparse(value)


def attributes(node: ast.FunctionDef) -> list[str]:
    """What a method assigns to self."""
    targets = [t for n in ast.walk(node) if isinstance(n, ast.Assign) for t in n.targets]
    targets += [n.target for n in ast.walk(node) if isinstance(n, ast.AnnAssign)]
    return [t.attr for t in targets if isinstance(t, ast.Attribute) and ast.unparse(t.value) == "self"]


def differences(old: dict, new: dict) -> list[str]:
    """Of the facts of two versions, one line each."""
    lines = []
    for module in sorted(old["modules"].keys() | new["modules"].keys()):
        names = [side["modules"].get(module, {}).get("names", {}) for side in (old, new)]
        for name in sorted(names[0].keys() | names[1].keys()):
            a, b = (_flat(side.get(name)) for side in names)
            lines += [
                f"{module}: {name}{key}: {a.get(key)} -> {b.get(key)}"
                for key in sorted(a.keys() | b.keys())
                if a.get(key) != b.get(key)
            ]
    return lines


def _flat(facts: dict | None, prefix: str = "") -> dict[str, object]:
    if not isinstance(facts, dict):
        return {} if facts is None else {prefix: facts}
    return {
        key: value
        for name, inner in facts.items()
        for key, value in (_flat(inner, f"{prefix}.{name}") or {f"{prefix}.{name}": inner}).items()
    }


def main(argv: list[str]) -> int:
    if len(argv) == 3 and argv[0] == "extract":
        print(json.dumps(extract(Path(argv[1]), argv[2]), indent=1))
        return 0
    if len(argv) == 3 and argv[0] == "diff":
        lines = differences(*(json.loads(Path(file).read_text()) for file in argv[1:]))
        print("\n".join(lines))
        return int(bool(lines))
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
