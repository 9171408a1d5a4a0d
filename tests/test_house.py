"""The house rules of docs/architecture.md, executed."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Floors, lowest first. A module imports its own room and lower floors; rooms on one floor do not import each other.
FLOORS = [
    {"run", "aligner_kernels", "_engine"},
    {"ops"},
    {"losses", "models", "data", "checkpoint"},
    {"rollout", "refit", "serving"},
    {"job"},
    {"programs"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
SOURCES = sorted([*ROOT.glob("aligner/**/*.py"), *ROOT.glob("kernels/**/*.py")])
COMPILED = sorted(p for room in ("csrc", "bindings") for p in ROOT.glob(f"{room}/**/*") if p.is_file())


def room_of(module: str) -> str | None:
    """The room of a dotted module name; files directly in aligner/ are programs."""
    parts = module.split(".")
    if parts[0] == "aligner_kernels":
        return parts[0]
    if parts[0] != "aligner" or len(parts) == 1:
        return None
    return parts[1] if parts[1] in LEVEL else "programs"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("kernels.").removesuffix(".__init__")


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [f"aligner.{a.name}" for a in node.names] if node.module == "aligner" else [node.module]
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names]
    return found


def wrong_import(module: str, target: str) -> bool:
    """Whether the house forbids `module` to import `target`."""
    me, you = room_of(module), room_of(target)
    if target.split(".")[0] in ("tests", "benchmarks"):
        return True
    if you is None or me is None:
        return False
    if me == you:
        return me == "programs" and module != target
    return LEVEL[you] >= LEVEL[me]


def test_imports_point_down():
    assert len(SOURCES) > 30
    bad = [f"{module_of(p)} imports {t}" for p in SOURCES for t in imports(p) if wrong_import(module_of(p), t)]
    assert not bad, bad


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("aligner.losses.policy", "aligner.models.policy"),
        ("aligner.ops.gae", "aligner.losses.kl"),
        ("aligner.run.loop", "aligner.data.batch"),
        ("aligner.rollout.native", "aligner.refit.plan"),
        ("aligner.ppo", "aligner.generate"),
        ("aligner.serving.reward", "aligner.job.job"),
        ("aligner.models.policy", "tests.conftest"),
    ],
)
def test_planted_violations_are_caught(module: str, target: str):
    assert wrong_import(module, target)


def test_losses_know_no_model_config_or_process_group():
    for path in ROOT.glob("aligner/losses/*.py"):
        bad = [t for t in imports(path) if t.startswith(("megatron", "torch.distributed", "aligner.run"))]
        assert not bad, f"{path.name} imports {bad}"


def test_every_op_has_every_room():
    stems = {p.name.removesuffix("_cpu.cpp") for p in ROOT.glob("csrc/*_cpu.cpp")}
    assert {"logprobs", "linear_logprobs", "gae", "whiten", "policy_loss", "value_loss"} <= stems
    rooms = ["csrc/{}.h", "bindings/{}.cpp", "aligner/ops/{}.py", "tests/ops/test_{}.py", "benchmarks/bench_{}.py"]
    missing = [room.format(stem) for stem in sorted(stems) for room in rooms if not (ROOT / room.format(stem)).exists()]
    gpu = ["csrc/{}.cu", "kernels/aligner_kernels/{}.py"]
    missing += [gpu[0].format(s) for s in stems if not any((ROOT / room.format(s)).exists() for room in gpu)]
    checks = [ROOT / f"tests/csrc/cuda_{p.stem}.cpp" for p in ROOT.glob("csrc/*.cu")]
    missing += [str(path) for path in checks if not path.exists()]
    assert not missing, missing


def test_one_reference_per_op():
    for path in [*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        functions = [n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
        copied = [name for name in functions if name.endswith("_reference")]
        assert not copied, f"{path} defines {copied}: import the reference from aligner.ops"


def test_csrc_knows_no_torch_and_no_python():
    for path in ROOT.glob("csrc/**/*"):
        if path.is_file():
            found = [s for s in ("<torch/", "<ATen/", "<c10/", "pybind11", "Python.h") if s in path.read_text()]
            assert not found, f"{path} includes {found}"


def test_files_and_functions_stay_small():
    for path in [*SOURCES, *COMPILED]:
        assert len(path.read_text().splitlines()) <= 400, path
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                assert not body or node.end_lineno - body[0].lineno < 60, f"{path}:{node.lineno} {node.name}"


def test_programs_stay_readable():
    for path in ROOT.glob("aligner/*.py"):
        assert len(path.read_text().splitlines()) <= 200, path


def test_no_environment_variable_changes_a_meaning():
    reads = {p.name for p in SOURCES if "os.environ" in p.read_text() or "getenv" in p.read_text()}
    # torchrun's WORLD_SIZE; where the cache folder is; what Triton's own processes are told.
    assert reads <= {"distributed.py", "cache.py", "triton_transport.py"}


def test_no_bare_except_and_no_utils():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{path}:{node.lineno} bare except"
        assert path.name != "utils.py", path


def test_every_program_tells_its_equation_and_source():
    for path in ROOT.glob("aligner/*.py"):
        if "train_o" in path.read_text() or ".repeat(" in path.read_text():
            doc = ast.get_docstring(ast.parse(path.read_text()))
            assert f"python -m aligner.{path.stem}" in doc and "arXiv:" in doc and "Source:" in doc, path


def test_docs_page_for_every_algorithm_and_operator():
    pages = {path.stem.replace("-", "_"): path.read_text() for path in ROOT.glob("docs/*.md")}
    programs = [path.stem for path in ROOT.glob("aligner/*.py") if path.stem != "__init__"]
    untold = [name for name in programs if not any(f"aligner.{name}" in page for page in pages.values())]
    assert not untold, f"no page in docs/ says how to run {untold}"
    training = [p.stem for p in ROOT.glob("aligner/*.py") if re.search(r"train_o|\.repeat\(", p.read_text())]
    assert len(training) >= 11 and not [name for name in training if name not in pages]
    assert {"architecture", "add_an_operator", "add_an_algorithm", "data", "rewards"} <= pages.keys()
    operators = (ROOT / "docs" / "operators.md").read_text()
    missing = [p.stem for p in ROOT.glob("bindings/*.cpp") if f"`{p.stem}`" not in operators]
    assert set(missing) <= {"cuda", "dispatch", "engine"}, f"docs/operators.md says nothing of {missing}"
    assert (ROOT / "docs" / "LOG.md").exists()
