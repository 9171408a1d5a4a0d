"""What a user wrote in Python and names on the command line: `package.module:callable`."""

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path


def load_callable(spec: str, what: str, example: str) -> Callable:
    """Import `package.module:callable`, from the installed packages or the current folder; a class is constructed once.

    spec: for example my_rewards:brevity. what, example: how errors call it, and what they suggest.
    Raises ValueError that says what could not be found and how to write it.
    """
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"{what} {spec!r} is not MODULE:CALLABLE; write for example {example}.")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's file, which may raise anything
        raise ValueError(
            f"{what} {spec!r}: importing {module_name} raised {type(error).__name__}: {error}; "
            "write MODULE:CALLABLE with a module in the current folder or an installed package."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{what} {spec!r}: {module_name} has no callable {name!r}; it has {sorted(found)}.")
    return function() if inspect.isclass(function) else function
