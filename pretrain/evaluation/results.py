"""What an evaluation hands on: a plain dictionary, written as JSON into the run it belongs to, read by the report.

    {"task", "title", "set", "samples", "weights",
     "scores": [{"name", "title", "value", "interval", "chance", "beside": {what: value}}],
     "per_class"?: {class: {"value", "samples"}}, "confusion"?: {"classes", "counts"}, "mistakes"?: [...],
     "calibration_error"?, "images_per_second"?, "examples"?: [...], "attribution"?, "settings"?}

No score stands alone: `chance` is exact, and `beside` holds what else asks no understanding (a constant answer, the
largest category, an oracle that knows the category alone, the same model untrained).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.durable import write_durably
from data_pipeline.errors import UserError
from pretrain.evaluation.metrics import wilson_interval

Result = dict[str, Any]


def score(name: str, title: str, value: float, *, chance: float, count: int, beside: Mapping[str, float]) -> Result:
    """One score with the 95 % interval of a proportion over `count` samples."""
    return {
        "name": name,
        "title": title,
        "value": value,
        "interval": list(wilson_interval(min(max(value, 0.0), 1.0), count)),
        "chance": chance,
        "beside": dict(beside),
    }


def value_of(result: Mapping[str, Any], name: str) -> float:
    """The score called `name`. Raises KeyError naming those there are."""
    for entry in result["scores"]:
        if entry["name"] == name:
            return float(entry["value"])
    raise KeyError(f"no score {name!r} among {[entry['name'] for entry in result['scores']]}")


def put_beside(result: Result, label: str, other: Mapping[str, Any]) -> Result:
    """Each score with the score of the same name of `other` beside it, as `label`."""
    values = {entry["name"]: entry["value"] for entry in other["scores"]}
    scores = [
        {**entry, "beside": {**entry["beside"], label: values[entry["name"]]}} if entry["name"] in values else entry
        for entry in result["scores"]
    ]
    return {**result, "scores": scores}


def write_result(run_dir: Path | str, name: str, result: Mapping[str, Any]) -> Path:
    """`run_dir/evaluation/NAME.json`, whole or not at all. An earlier result of this name is replaced."""
    if not name or Path(name).name != name:
        raise UserError(f"result name {name!r}: a plain file name was expected")
    folder = Path(run_dir) / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_durably(path, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def read_results(run_dir: Path | str) -> dict[str, Result]:
    """Every result of a run by name."""
    return {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(Path(run_dir).glob("evaluation/*.json"))}


def summary(results: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Rows for a short table: what, score, chance, what else stands beside it."""
    rows = []
    for result in results:
        for entry in result["scores"]:
            beside = ", ".join(f"{label} {value:.3f}" for label, value in entry["beside"].items())
            rows.append(
                (f"{result['title']}: {entry['title']}", f"{entry['value']:.3f}", f"{entry['chance']:.3f}", beside)
            )
    return rows
