"""The recipes of examples/: shell that parses, options that exist, layouts that fit the nodes they ask for."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.distributed import run as torchrun_program

from aligner.run import config

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("examples/slurm/*.sbatch"))
README = ROOT / "examples" / "README.md"
WORDS = {
    "$MODEL": "model",
    "$DATA": "data.jsonl",
    "$REWARD_MODEL": "runs/rm",
    "$SECRET": "secret",
    "$RUN": "run",
    "${RESUME[@]}": "--resume",
}


def commands(text: str) -> list[list[str]]:
    """The words of every command line, comments and continued lines taken in, that runs torchrun."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    lines = [line.rstrip(" &") for line in lines if "torchrun" in line and " -m aligner." in line]
    found = []
    for line in lines:
        words = shlex.split(line)
        inner = [i for i, word in enumerate(words) if word.startswith("exec torchrun")]
        for i in inner:  # bash -c 'exec torchrun ...' is one word
            words[i : i + 1] = shlex.split(words[i])
        found.append([WORDS.get(word, word) for word in words])
    return found


def split(command: list[str]) -> tuple[dict[str, str], str, list[str]]:
    """torchrun's options, the program, and the program's arguments."""
    start, at = command.index("torchrun"), command.index("-m")
    options = command[start + 1 : at]
    pairs = {a: b for a, b in zip(options, [*options[1:], ""], strict=True) if a.startswith("--")}
    return pairs, command[at + 1], command[at + 2 :]


def sbatch(text: str, name: str) -> int:
    return int(re.search(rf"^#SBATCH --{name}=(\d+)$", text, re.M).group(1))


def program(module: str):
    return importlib.import_module(module)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_script(path: Path):
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    found = [split(command) for command in commands(text)]
    assert "aligner.ppo" in [module for _, module, _ in found]
    assert sum(int(torchrun["--nnodes"]) for torchrun, _, _ in found) == sbatch(text, "nodes")
    for name, nodes in re.findall(r"^(\w+)_NODES=(\d+)$", text, re.M):
        role = {"POLICY": "aligner.ppo", "SERVICE": "aligner.serve"}[name]
        assert [torchrun["--nnodes"] for torchrun, module, _ in found if module == role] == [nodes]
    for torchrun, module, arguments in found:
        gpus = int(torchrun["--nproc-per-node"])
        assert gpus == sbatch(text, "gpus-per-node")
        if module == "aligner.serve":
            assert arguments[0] == "reward"
            arguments = arguments[1:]
        parsed = config.parse(program(module).Config, arguments)
        layout = parsed.parallel
        assert layout.data(int(torchrun["--nnodes"]) * gpus) >= 2
        if module == "aligner.ppo":
            assert parsed.critic.layers % (layout.pipeline * layout.virtual_pipeline) == 0
            assert bool(parsed.reward.url) == ("aligner.serve" in [name for _, name, _ in found])
        assert gpus % layout.tensor == 0  # tensor parallelism stays within a node


def test_readme_names_every_script_its_layout_and_only_options_that_exist():
    text = README.read_text()
    assert "Nothing here was run on a GPU" in text
    for path in SCRIPTS:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| [slurm/{path.name}]")]
        _, _, arguments = next(split(c) for c in commands(path.read_text()) if "aligner.ppo" in c)
        layout = config.parse(program("aligner.ppo").Config, arguments).parallel
        nodes, gpus = map(int, re.search(r"\| (\d+) nodes?, (\d+) GPUs", row).groups())
        assert nodes * 8 == gpus and row.rstrip(" |").endswith(f"| {layout.data(gpus)}")
        for word, size in (("tensor", layout.tensor), ("context", layout.context), ("pipeline", layout.pipeline)):
            assert (f"{word} {size}" in row) == (size > 1)
    blocks = commands("\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)))
    assert len(blocks) == 3
    for command in blocks:
        torchrun, module, arguments = split(command)
        layout = config.parse(program(module).Config, arguments).parallel
        layout.data(int(torchrun.get("--nnodes", "1")) * int(torchrun["--nproc-per-node"]))


def test_every_option_named_anywhere_exists():
    """In comments and prose too."""
    known = {f"--{name}" for name in config.flat(program("aligner.ppo").Config())}
    known |= {f"--{name}" for name in config.flat(program("aligner.serve").Config())}
    known |= {f"--{name}" for name in config.flat(program("aligner.serve").AccessConfig())}
    known |= {"--data"}  # short for --data.files
    known |= set(re.findall(r"--[a-z][a-z-]+", torchrun_program.get_args_parser().format_help()))
    slurm = {"--nodes", "--relative", "--kill-on-bad-exit", "--job-name", "--gpus-per-node", "--ntasks-per-node"}
    slurm |= {"--exclusive", "--time", "--signal", "--requeue", "--output"}
    for path in [*SCRIPTS, README]:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z.-]*[a-z]", path.read_text()))
        assert named <= known | slurm, (path.name, named - known - slurm)


def test_ranks_stand_where_the_readme_says():
    """The formula, against Megatron's own numbering, and the tables' examples."""
    from megatron.core.parallel_state import RankGenerator

    tensor, context, pipeline, replicas = 8, 2, 4, 8
    groups = RankGenerator(tp=tensor, ep=1, dp=replicas, pp=pipeline, cp=context, order="tp-cp-ep-dp-pp")

    def rank(t: int, c: int, d: int, p: int) -> int:
        return t + tensor * (c + context * (d + replicas * p))

    assert [rank(t, 0, 0, 0) for t in range(tensor)] in groups.get_ranks("tp")
    assert [rank(3, c, 2, 1) for c in range(context)] in groups.get_ranks("cp")
    assert [rank(3, 1, d, 1) for d in range(replicas)] in groups.get_ranks("dp")
    assert [rank(3, 1, 2, p) for p in range(pipeline)] in groups.get_ranks("pp")
    assert [rank(0, 0, d, 0) for d in range(replicas)] == [16 * d for d in range(replicas)]
    assert [rank(0, 0, 0, p) // 8 for p in range(pipeline)] == [0, 16, 32, 48]
