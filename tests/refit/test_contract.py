"""What our code uses of TensorRT-LLM is in the facts of every version that is supported; tools/trtllm_contract.py."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from aligner.refit.extension import RefitExtension
from tests.refit import standin

ROOT = Path(__file__).parent.parent.parent
VERSIONS = ("1.2.1", "main")
EXTENSION = ROOT / "aligner" / "refit" / "extension.py"
SAMPLER = ROOT / "aligner" / "rollout" / "trtllm.py"


def tool():
    spec = importlib.util.spec_from_file_location("trtllm_contract", ROOT / "tools" / "trtllm_contract.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def facts(version: str) -> dict:
    return json.loads((ROOT / "tests" / "contracts" / f"trtllm-{version}.json").read_text())


def found(version: str, name: str) -> dict:
    """The facts of a name, wherever that version has it."""
    (one,) = (m["names"][name] for m in facts(version)["modules"].values() if name in m["names"])
    return one


SOURCE = """
import enum
from dataclasses import dataclass

@dataclass(slots=True, kw_only=True)
class SamplingParams:
    end_id: int | None = None
    max_tokens: int = 32
    stop: list

    def check(self, a, b=1, *rest, c, d="x", **others): ...

class NotPinned: ...
"""
ARGS = """
class LoadFormat(Enum):
    AUTO = 0
    DUMMY = 1

class KvCacheConfig(StrictBaseModel, PybindMirror):
    enable_block_reuse: bool = Field(default=True, description="x")
    free_gpu_memory_fraction: float | None = Field(0.9, ge=0)
    windows: list = Field(default_factory=list)
    dtype: str = Field(description="no default")
"""
ENGINE = """
class PyTorchModelEngine(ModelEngine):
    def __init__(self, path, *, mapping=None):
        self.mapping = mapping
        self.model: object = None
        local = self.other.deep = 1

    @property
    def later(self):
        self.not_in_init = 2
"""


def test_facts_of_a_source_tree(tmp_path):
    for path, text in (
        ("sampling_params.py", SOURCE),
        ("llmapi/llm_args.py", ARGS),
        ("_torch/pyexecutor/model_engine.py", ENGINE),
    ):
        (file := tmp_path / "tensorrt_llm" / path).parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    modules = tool().extract(tmp_path, "9.9")["modules"]
    assert list(modules) == [
        "tensorrt_llm.sampling_params",
        "tensorrt_llm._torch.pyexecutor.model_engine",
        "tensorrt_llm.llmapi.llm_args",
    ]
    (sampling,) = modules["tensorrt_llm.sampling_params"]["names"].values()
    assert sampling["decorators"] == ["dataclass(slots=True, kw_only=True)"]
    assert sampling["fields"] == {"end_id": "None", "max_tokens": "32", "stop": None}
    check = sampling["methods"]["check"]["parameters"]
    assert check == ["self", "a", "b=1", "*rest", "c", "d='x'", "**others"]
    arguments = modules["tensorrt_llm.llmapi.llm_args"]["names"]
    assert arguments["LoadFormat"]["fields"] == {"AUTO": "0", "DUMMY": "1"}
    wanted = {"enable_block_reuse": "True", "free_gpu_memory_fraction": "0.9", "windows": "list()", "dtype": None}
    assert arguments["KvCacheConfig"]["fields"] == wanted
    assert arguments["KvCacheConfig"]["bases"] == ["StrictBaseModel", "PybindMirror"]
    engine = modules["tensorrt_llm._torch.pyexecutor.model_engine"]["names"]["PyTorchModelEngine"]
    assert engine["attributes"] == ["mapping", "model"]
    assert engine["methods"]["__init__"]["parameters"] == ["self", "path", "*", "mapping=None"]


def test_what_is_extracted_is_what_the_facts_are_of():
    """Or what is installed would never agree with them."""
    pins, known = tool().PINS, {}
    for version in VERSIONS:
        for module, found in facts(version)["modules"].items():
            assert len(found["commit"].split()[0]) == 40
            known.setdefault(module, set()).update(found["names"])
    assert known == {module: set(names) for module, names in pins.items()}


def test_differences_are_told_one_by_one(tmp_path, capsys):
    old, new = (facts(version) for version in VERSIONS)
    for name, side in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(side))
    main = tool().main
    assert main(["diff", str(tmp_path / "old.json"), str(tmp_path / "old.json")]) == 0
    assert capsys.readouterr().out.strip() == ""
    assert main(["diff", str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == 1
    said = capsys.readouterr().out
    assert (
        "PyExecutor.methods.control_action.parameters: ['self'] -> ['self', '*', 'drain=True', 'control_id=None']"
        in said
    )
    assert main([]) == 2


def accepts(parameters: list[str], arguments: int, keywords: list[str]) -> bool:
    """Whether a method takes a call of so many arguments and these keywords."""
    names = [p for p in parameters[1:]]
    star = next((i for i, p in enumerate(names) if p.startswith("*") and not p.startswith("**")), len(names))
    plain = [p for p in names[:star] if not p.startswith("**")]
    by_name = {p.partition("=")[0]: "=" in p for p in names if not p.startswith("*")}
    given = {p.partition("=")[0] for p in plain[:arguments]} | set(keywords)
    fits = arguments <= len(plain) or any(
        p.startswith("*") and p not in ("*",) and not p.startswith("**") for p in names
    )
    return fits and set(keywords) <= by_name.keys() and all(name in given or has for name, has in by_name.items())


def test_accepts():
    assert accepts(["self"], 0, []) and not accepts(["self"], 1, []) and not accepts(["self", "a"], 0, [])
    assert accepts(["self", "a", "b=1", "*", "c=2"], 1, ["c"]) and not accepts(["self", "a", "*", "c"], 1, [])
    assert not accepts(["self", "a"], 1, ["d"])


# What of a worker the extension may touch: the chain after self, and the pinned class that has the last name.
PLACES = {
    "engine": ("PyExecutor", ("control_action", "reset_prefix_cache")),
    "engine.model_engine": ("PyTorchModelEngine", ("mapping", "model", "model_loader")),
    "engine.model_engine.model_loader": ("ModelLoader", ("reload",)),
}


def chains(tree: ast.AST) -> list[tuple[str, ast.Call | None]]:
    """Every self.a.b.c of a source, the longest ones, with the call that it is called by."""
    calls = {id(n.func): n for n in ast.walk(tree) if isinstance(n, ast.Call)}
    inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and id(n) not in inner]
    return [
        (ast.unparse(n).removeprefix("self."), calls.get(id(n))) for n in nodes if ast.unparse(n).startswith("self.")
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_extension_uses_what_every_version_has(version: str):
    seen = []
    for chain, call in chains(ast.parse(EXTENSION.read_text())):
        if not chain.startswith("engine"):
            assert chain.startswith(("_refit", "refit")), chain
            continue
        place, _, name = chain.rpartition(".")
        owner, known = PLACES[place]
        assert name in known, chain
        seen.append(name)
        if call:
            method = found(version, owner)["methods"][name]
            assert accepts(method["parameters"], len(call.args), [k.arg for k in call.keywords]), chain
        else:
            assert name in found(version, owner)["attributes"], chain
    assert {"control_action", "reset_prefix_cache", "mapping", "model", "reload"} <= set(seen)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_sampler_uses_what_every_version_has(version: str):
    """Calls of AsyncLLM; what is read of a request, its result and outputs."""
    known = found(version, "BaseLLM")["methods"] | found(version, "AsyncLLM")["methods"]
    tree, seen = ast.parse(SAMPLER.read_text()), set()
    for chain, call in chains(tree):
        if chain.startswith("_llm."):
            name = chain.removeprefix("_llm.")
            assert accepts(known[name]["parameters"], len(call.args), [k.arg for k in call.keywords]), name
            seen.add(name)
    assert seen == {"collective_rpc", "generate_async", "release", "resume"}
    result = (
        found(version, "GenerationResult")["methods"].keys() | found(version, "GenerationResultBase")["methods"].keys()
    )
    places = {"request": result, "result": result, "output": found(version, "CompletionOutput")["fields"].keys()}
    read = {
        (n.value.id, n.attr) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    }
    used = {(name, attribute) for name, attribute in read if name in places}
    assert len(used) == 7 and all(attribute in places[name] for name, attribute in used), used


@pytest.mark.parametrize("version", VERSIONS)
def test_the_extension_s_names_do_not_clash_with_the_worker_s(version: str):
    ours = {name for name in vars(RefitExtension) if not name.startswith("__")}
    assert ours and all(name.startswith(("refit", "_refit")) for name in ours)
    assert not ours & found(version, "RayGPUWorker")["methods"].keys()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_stand_in_is_called_as_upstream_is(version: str):
    """Its methods take what upstream's do, as far as we call them."""
    assert found(version, "ModelLoader")["methods"]["reload"]["parameters"][1:] == [
        "model",
        "weights",
        "allow_partial_loading=False",
    ]
    assert standin.ModelLoader.reload.__defaults__ == (False,)
    assert (
        standin.UnquantizedLinearMethod.__name__
        in facts(version)["modules"]["tensorrt_llm._torch.modules.linear"]["names"]
    )
    assert {"map_weights", "_duplicate_kv", "should_skip_module"} <= found(version, "HfWeightMapper")["methods"].keys()


def test_the_engine_s_side_needs_no_megatron():
    """It runs in TensorRT-LLM's own environment."""
    blocked = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('megatron', 'transformers', 'tensorrt_llm'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import aligner.refit.extension, aligner.trtllm\n"
    )
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("version", VERSIONS)
def test_every_upstream_import_is_pinned(version: str):
    """And nothing but rollout.trtllm_api imports upstream at all."""
    modules, seen = facts(version)["modules"], []
    for path in [*ROOT.glob("aligner/**/*.py")]:
        tree = ast.parse(path.read_text())
        probed = {id(inner) for n in ast.walk(tree) if isinstance(n, ast.If) for inner in ast.walk(n)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("tensorrt_llm") for alias in node.names), path
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tensorrt_llm"):
                assert path.name == "trtllm_api.py"
                for alias in node.names:
                    seen.append(alias.name)
                    whole = f"{node.module}.{alias.name}"
                    places = [facts(v)["modules"] for v in VERSIONS] if id(node) in probed else [modules]
                    assert any(whole in m or alias.name in m[node.module]["names"] for m in places), whole
    assert {"AsyncLLM", "ExecutorMemoryType", "SamplingParams", "__version__", "llm_args"} == set(seen)
    arguments = modules["tensorrt_llm.llmapi.llm_args"]["names"]
    always = {"CapacitySchedulerPolicy", "CudaGraphConfig", "KvCacheConfig", "SchedulerConfig", "TorchLlmArgs"}
    assert always <= arguments.keys()
    assert "SleepConfig" in arguments or "enable_sleep" in arguments["TorchLlmArgs"]["fields"]
