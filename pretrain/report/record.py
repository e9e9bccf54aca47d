"""What a run directory says about itself, read leniently: a run may be young, killed in mid-line, or still going.

RUN/config.yaml  environment.json  metrics.jsonl  events.jsonl  evaluation/*.json  figures/*.png
RUN/checkpoints/           of the newest: what it was trained on, how many parameters
RUN/NAME/metrics.jsonl     runs that were started inside it, as fine-tuning, up to three folders down
RUN/NAME/validation.json   their scores on the validation set as they trained
"""

import base64
import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from data_pipeline.errors import UserError
from data_pipeline.reading.events import read_jsonl, without_repeats
from pretrain.training.checkpoint.disk import complete_checkpoints


@dataclass(frozen=True)
class RunRecord:
    """One run as its files tell it. Every part may be empty."""

    folder: Path
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]
    events: tuple[dict[str, Any], ...]
    results: tuple[dict[str, Any], ...]
    validation: tuple[tuple[float, float], ...] = ()
    validation_score: str = ""  # what `validation` is, as top1
    trained_on: dict[str, Any] = field(default_factory=dict)  # of the newest checkpoint: sources, epoch_samples
    parameters: dict[str, int] = field(default_factory=dict)  # of the same: values of each parameter, by its name
    figures: tuple[dict[str, Any], ...] = ()  # what `internimage inspect` drew: title, caption, rows, image (data URI)
    parts: tuple["RunRecord", ...] = field(default=())

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one metric, where it was logged as a number (non-finite ones included)."""
        rows = [(row["step"], row[key]) for row in self.metrics if is_number(row.get(key))]
        return [float(step) for step, _ in rows], [float(value) for _, value in rows]

    def keys(self, prefix: str) -> list[str]:
        """Names of the metrics that begin with `prefix`, in order of first appearance."""
        return list(dict.fromkeys(key for row in self.metrics for key in row if key.startswith(prefix)))


def read_run(folder: Path) -> RunRecord:
    """Read a run directory. Raises UserError where the folder is missing or holds nothing of a run."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run directory; give the folder that `internimage pretrain --output` wrote")
    inner = sorted({path.parent for depth in ("*", "*/*", "*/*/*") for path in folder.glob(f"{depth}/metrics.jsonl")})
    record = _read_one(folder, tuple(_read_one(path) for path in inner))
    if not (record.metrics or record.config or record.events or record.results or record.parts):
        raise UserError(
            f"{folder}: not a run directory (no config.yaml, metrics.jsonl, events.jsonl or evaluation/*.json); "
            "give the folder that `internimage pretrain --output` wrote"
        )
    return record


def _read_one(folder: Path, parts: tuple[RunRecord, ...] = ()) -> RunRecord:
    config_text = _text(folder / "config.yaml")
    validation = list(_validation(_json(_text(folder / "validation.json"))))
    trained_on, parameters = _checkpointed(folder)
    return RunRecord(
        folder=folder,
        config=_mapping(_yaml(config_text)),
        config_text=config_text,
        environment=_mapping(_json(_text(folder / "environment.json"))),
        metrics=_one_a_step(read_jsonl(folder / "metrics.jsonl")),
        events=tuple(without_repeats(read_jsonl(folder / "events.jsonl"))),
        results=tuple(_results(folder / "evaluation")),
        validation=tuple((step, value) for step, _, value in validation),
        validation_score=validation[-1][1] if validation else "",
        trained_on=trained_on,
        parameters=parameters,
        figures=tuple(_figures(folder / "figures")),
        parts=parts,
    )


def _checkpointed(folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """What the newest whole checkpoint says of its data and parameters; empty where there is none yet."""
    with suppress(UserError, KeyError, TypeError, ValueError):
        for checkpoint in complete_checkpoints(folder)[:1]:
            entries = checkpoint.index["parameters"].items()
            return checkpoint.trained_on.as_json(), {name: math.prod(entry["shape"]) for name, entry in entries}
    return {}, {}


def _one_a_step(rows: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """A run that was killed repeats the steps since its last checkpoint: the later telling counts."""
    latest = {row["step"]: row for row in rows if is_number(row.get("step"))}
    return tuple({k: _number(v) for k, v in latest[step].items()} for step in sorted(latest))


def _number(value: Any) -> Any:
    """Non-finite values are logged as words, since JSON has no number for them."""
    return float(value) if value in ("nan", "inf", "-inf") else value


def _results(folder: Path) -> Iterable[dict[str, Any]]:
    for path in sorted(folder.glob("*.json")):
        result = _mapping(_json(_text(path)))
        if isinstance(result.get("scores"), list):
            yield {"name": path.stem, **result, **_shown_parts(result)}


def _figures(folder: Path) -> Iterable[dict[str, Any]]:
    for path in sorted(folder.glob("*.png")):
        about = _mapping(_json(_text(path.with_suffix(".json"))))
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        rows = [row for row in _mappings(about.get("rows")) if row]
        title, caption = str(about.get("title") or path.stem), str(about.get("caption") or "")
        yield {"title": title, "caption": caption, "rows": rows, "image": f"data:image/png;base64,{data}"}


def _shown_parts(result: Mapping[str, Any]) -> dict[str, Any]:
    """Scores, categories and examples that can be shown; what is malformed in a file from elsewhere is left out."""
    scores = [
        {**score, "interval": score.get("interval") if _is_interval(score.get("interval")) else None}
        for score in _mappings(result["scores"])
        if is_finite(score.get("value"))
    ]
    categories = {
        name: row
        for name, row in _mapping(result.get("per_class")).items()
        if isinstance(row, Mapping) and is_finite(row.get("value")) and is_number(row.get("samples"))
    }
    examples = []
    for example in _mappings(result.get("examples")):
        retrieved = [found for found in _mappings(example.get("retrieved")) if "caption" in found]
        placed = is_number(example.get("place")) and is_number(example.get("candidates"))
        if retrieved:
            examples.append({**example, "retrieved": retrieved, "place": example["place"] if placed else None})
    return {
        "scores": scores,
        "per_class": categories,
        "examples": examples,
        "confusion": _confusion(_mapping(result.get("confusion"))),
    }


def _confusion(entry: dict[str, Any]) -> dict[str, Any] | None:
    """The table of a classifier's answers, where it is square and of numbers."""
    names, counts = entry.get("classes"), entry.get("counts")
    if not isinstance(names, list) or not isinstance(counts, list) or len(counts) != len(names):
        return None
    square = all(isinstance(row, list) and len(row) == len(names) and all(map(is_finite, row)) for row in counts)
    return {"classes": [str(name) for name in names], "counts": counts} if square else None


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(is_finite(end) for end in value)


def _mappings(value: Any) -> list[dict[str, Any]]:
    return [_mapping(entry) for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def _validation(entries: Any) -> Iterable[tuple[float, str, float]]:
    """Step, name and value of the score of each entry, which goes by the name of the task's main score."""
    for entry in _mappings(entries):
        for name, value in entry.items():
            if name != "step" and is_finite(value) and is_finite(entry.get("step")):
                yield float(entry["step"]), name, float(value)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finite(value: Any) -> TypeGuard[float]:
    return is_number(value) and math.isfinite(value)
