"""Command lines: nested frozen keyword-only dataclasses, `--dotted.name value`, and a YAML file of the same names."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import re
import sys
import time
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro
import yaml

from aligner.run import distributed

Config = TypeVar("Config")
WAIT_S = 30.0  # for a process that should find the same mistake


def parse(cls: type[Config], argv: list[str] | None = None) -> Config:
    """Build `cls` from its defaults, then `--config FILE`, then the command line; the later one wins.

    cls: a frozen dataclass; nested ones give dotted names, underscores are written as dashes, tuples take commas. The
        name of a group that has `files`, --data, stands for them.
    argv: arguments without the program's name; None for sys.argv[1:].
    Raises ValueError, one sentence: an unknown option (with the nearest one), a bad value, a bad YAML file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    hints = dict(_leaves(cls))
    file, argv = _take_config(argv)
    from_file = [] if file is None else _yaml_arguments(file, hints)
    arguments = from_file + _checked_arguments(argv, hints)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(cls, args=arguments, prog=_program(), description=_description(cls))
    except SystemExit as exit:
        if exit.code in (None, 0):
            raise  # --help
        raise ValueError(_complaint(exit, printed.getvalue())) from None


def to_yaml(config: Any) -> str:
    """The config as YAML that `--config` reads back to an equal config."""
    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)


def flat(config: Any) -> dict[str, Any]:
    """{option name without the dashes in front: value} of every leaf, in order of declaration."""
    values = {}
    for name, _ in _leaves(type(config)):
        value = config
        for part in name.split("."):
            value = getattr(value, part.replace("-", "_"))
        values[name] = value
    return values


def user_errors(main: Callable[[], int]) -> NoReturn:
    """Run a program and exit with its status; a user's mistake is one line `error: ...` and status 2, no traceback.

    A user's mistake is an OSError, a ValueError raised by this package's own code, or training that diverged
    (FloatingPointError). Any other exception, a ValueError from inside a dependency among them, is a defect and keeps
    its traceback.
    Of several processes the first one alone writes to standard output. Before they have joined, all on one machine find
    the same to be wrong, and the others wait for the first one to tell: torchrun ends them once it has left.
    """
    if not distributed.is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    try:
        with distributed.processes():
            status = main()
        sys.exit(status)
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, ValueError) and not _raised_here(error):
            raise
        if not distributed.tells_errors():
            time.sleep(WAIT_S)
        # One write: print's two would mix with those of other processes.
        sys.stderr.write("error: " + " ".join(str(error).split()) + "\n")
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _raised_here(error: ValueError) -> bool:
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals["__name__"].split(".")[0] in ("__main__", __name__.split(".")[0])


def _leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, hint = prefix + field.name.replace("_", "-"), hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _leaves(hint, name + ".")
        else:
            yield name, hint


def _short(names: Iterable[str]) -> dict[str, str]:
    """Groups that are given by their files alone: --data FILE is --data.files FILE."""
    return {name.removesuffix(".files"): name for name in names if name.endswith(".files")}


def _is_tuple(hint: Any) -> bool:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return any(typing.get_origin(option) is tuple for option in options)


def _take_config(argv: list[str]) -> tuple[Path | None, list[str]]:
    file, rest, arguments = None, [], iter(argv)
    for argument in arguments:
        if argument == "--config" or argument.startswith("--config="):
            value = argument.partition("=")[2] or next(arguments, None)
            if value is None or file is not None:
                raise ValueError(
                    f"--config got {'no value' if value is None else 'two files'}, expected one YAML file."
                )
            file = Path(value)
        else:
            rest.append(argument)
    return file, rest


def _checked_arguments(argv: list[str], hints: dict[str, Any]) -> list[str]:
    """`argv` with the commas of tuples split, once every option in it is known to exist."""
    switches = {f"no-{name}" if "." not in name else "{}.no-{}".format(*name.rsplit(".", 1)): name for name in hints}
    checked, in_tuple = [], False
    for argument in argv:
        if argument.startswith("--"):
            option, equals, value = argument[2:].partition("=")
            name = option.replace("_", "-")
            if name in _short(hints):
                name = _short(hints)[name]
                argument = f"--{name}{equals}{value}"
            known = name in hints or name == "help" or hints.get(switches.get(name, "")) is bool
            if not known:
                raise ValueError(f"unknown option --{option}; {_nearest(name, hints, '--')}")
            in_tuple = _is_tuple(hints.get(name))
            checked += [f"--{name}", *value.split(",")] if in_tuple and equals else [argument]
        elif in_tuple:
            checked += argument.split(",")
        else:
            checked.append(argument)
    return checked


def _nearest(name: str, names: Iterable[str], dashes: str = "") -> str:
    if near := difflib.get_close_matches(name, list(names), n=1, cutoff=0.5):
        return f"did you mean {dashes}{near[0]}?"
    # A name without its group, as in --lr, is close to nothing by spelling.
    same_leaf = [known for known in names if known.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    return f"did you mean {dashes}{same_leaf[0]}?" if same_leaf else "run with --help for the list of options."


def _yaml_arguments(file: Path, hints: dict[str, Any]) -> list[str]:
    """The file as command-line arguments: conversions and their errors are then the command line's own."""
    if not file.is_file():
        raise ValueError(f"--config file {str(file)!r} does not exist; give a YAML file.")
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not valid YAML; {' '.join(str(error).split())}") from None
    if tree is not None and not isinstance(tree, dict):
        raise ValueError(f"{file}: got a {type(tree).__name__} at the top, expected a mapping of options to values.")
    groups = {name.rsplit(".", depth)[0] for name in hints for depth in range(1, name.count(".") + 1)}
    arguments = []
    for name, value in _yaml_leaves(tree or {}, groups):
        name = _short(hints).get(name, name)
        if name in groups:
            raise ValueError(f"{file}: {name} is {value!r}, expected a mapping of its options to values.")
        if name not in hints:
            raise ValueError(f"{file}: unknown key {name!r}; {_nearest(name, [*hints, *groups])}")
        arguments += _as_arguments(f"{file}: {name}", name, value, hints[name])
    return arguments


def _yaml_leaves(tree: dict, groups: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = prefix + str(key).replace("_", "-")
        if name in groups and isinstance(value, dict):
            yield from _yaml_leaves(value, groups, name + ".")
        else:
            yield name, value


def _as_arguments(where: str, name: str, value: Any, hint: Any) -> list[str]:
    if hint is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{where} is {value!r}, expected true or false.")
        group, dot, leaf = name.rpartition(".")
        return [f"--{name}" if value else f"--{group}{dot}no-{leaf}"]
    is_tuple = _is_tuple(hint)
    if isinstance(value, dict) or (isinstance(value, list) and not is_tuple):
        raise ValueError(f"{where} is a {type(value).__name__}, expected a single value.")
    if value is None and type(None) not in typing.get_args(hint):
        raise ValueError(f"{where} has no value; write one or remove the key.")
    if is_tuple:
        return [f"--{name}", *(map(str, value) if isinstance(value, list) else str(value).split(","))]
    return [f"--{name}={value}"]


def _complaint(exit: SystemExit, box: str) -> str:
    """One sentence from tyro's error box, or the dataclass's own words when its __post_init__ refused."""
    error = exit.__context__
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            if isinstance(error, ValueError) and trace.tb_frame.f_code.co_name == "__post_init__":
                return str(error)
            trace = trace.tb_next
        error = error.__context__
    # tyro frames its words: a title, the sentence, a rule, advice; in ASCII, a rule below the title too.
    lines = [line.strip("│| ") for line in box.splitlines()[1:]]
    blocks = [list(block) for is_rule, block in itertools.groupby(lines, _is_rule) if not is_rule]
    sentence = " ".join(blocks[0]).strip().rstrip(".:")
    sentence = re.sub(r"^Error parsing ", "", sentence)
    return f"{sentence[:1].lower()}{sentence[1:]}; run with --help for what each option takes."


def _is_rule(line: str) -> bool:
    return bool(line) and not line.strip("─-╭╮╰╯")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _description(cls: type) -> str:
    own = "" if (cls.__doc__ or "").startswith(f"{cls.__name__}(") else (cls.__doc__ or "").strip()
    return f"{own}\n\n--config FILE reads the same options from a YAML file; the command line wins.".strip()


def _program() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else Path(sys.argv[0]).name
