"""The fields of upstream's classes, as tests/contracts has them."""

import ast
import json
from pathlib import Path

MODULES = json.loads((Path(__file__).parents[3] / "contracts" / "trtllm-main.json").read_text())["modules"]


def fields(name: str) -> dict[str, object]:
    """Field -> default, those of the bases first; None where the default is no literal."""
    known = next((m["names"][name] for m in MODULES.values() if name in m["names"]), {"bases": [], "fields": {}})
    found: dict[str, object] = {}
    for base in known["bases"]:
        found |= fields(base)
    own = {field: default for field, default in known["fields"].items() if not field.startswith("_")}
    return found | {field: _literal(default) for field, default in own.items() if field != "model_config"}


def _literal(text: str | None) -> object:
    try:
        return ast.literal_eval(text or "None")
    except (ValueError, SyntaxError):
        return None


class Strict:
    """Takes the fields that the contract lists for the class's name, and no others, as upstream's models do."""

    model_fields: dict[str, object] = {}

    def __init_subclass__(cls):
        cls.model_fields = fields(cls.__name__)

    def __init__(self, **given):
        unknown = sorted(given.keys() - self.model_fields.keys())
        if unknown:
            raise ValueError(f"{type(self).__name__} has no field {', '.join(unknown)}.")
        vars(self).update(self.model_fields | given)
