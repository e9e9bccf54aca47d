"""Results of commands on the terminal: JSON for machines, aligned lines for people."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
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


def show_table(rows: list[dict[str, Any]], table: Any, as_json: bool) -> None:
    """Print the rows as JSON, or the rich table that they make."""
    if as_json:
        show(rows, as_json=True)
        return
    from rich.console import Console

    # A table of numbers cut to fit is no table; a wider line can be scrolled.
    Console(width=max(Console().width, 160)).print(table)


def lines(result: Mapping[str, Any], indent: str = "") -> list[str]:
    width = max((len(key) for key, value in result.items() if not isinstance(value, dict)), default=0)
    out = []
    for key, value in result.items():
        if isinstance(value, dict) and value:
            out += [f"{indent}{key}:", *lines(value, indent + "  ")]
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            out.append(f"{indent}{key}:")
            out += [f"{indent}  " + "  ".join(f"{k}={text(v)}" for k, v in item.items()) for item in value]
        else:
            out.append(f"{indent}{key:<{width}}  {text(value)}")
    return out


def text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == {}:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(text(item) for item in value) or "-"
    return str(value)


def columns(rows: Iterable[Sequence[str]], heading: Sequence[str] = ()) -> str:
    """Rows of text, each column as wide as its widest entry."""
    table = [list(heading), *map(list, rows)] if heading else [list(row) for row in rows]
    widths = [max(len(row[place]) for row in table) for place in range(len(table[0]))] if table else []
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in table)
