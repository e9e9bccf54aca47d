"""Results of commands on the terminal: JSON for machines, aligned lines for people."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plain(result: Any) -> Any:
    """Dataclasses, paths and named tuples down to what JSON knows."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return {f.name: plain(getattr(result, f.name)) for f in dataclasses.fields(result)}
    if isinstance(result, Mapping):
        return {str(key): plain(value) for key, value in result.items()}
    if isinstance(result, (list, tuple, set, frozenset)):
        return [plain(value) for value in result]
    if isinstance(result, Path):
        return str(result)
    return result


def show(result: Any, as_json: bool = False) -> None:
    """Print `result` (dataclass or mapping)."""
    result = plain(result)
    if as_json or not isinstance(result, dict):
        print(json.dumps(result, indent=2))
        return
    print("\n".join(lines(result)))


def lines(result: Mapping[str, Any], indent: str = "") -> list[str]:
    width = max((len(key) for key, value in result.items() if not isinstance(value, dict)), default=0)
    out = []
    for key, value in result.items():
        if isinstance(value, dict):
            out += [f"{indent}{key}:", *lines(value, indent + "  ")]
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            out.append(f"{indent}{key}:")
            out += [f"{indent}  " + "  ".join(f"{k}={text(v)}" for k, v in item.items()) for item in value]
        else:
            out.append(f"{indent}{key:<{width}}  {text(value)}")
    return out


def text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(text(item) for item in value) or "-"
    return str(value)
