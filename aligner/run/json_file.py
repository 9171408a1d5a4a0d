"""JSON files that somebody else wrote."""

import json
from pathlib import Path


def read_object(path: Path) -> dict:
    """The JSON object in the file `path`. Raises ValueError for anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path}: not valid JSON ({error}); copy it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got a {type(content).__name__} at the top, expected an object; copy it again.")
    return content
