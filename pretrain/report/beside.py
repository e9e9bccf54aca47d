"""Two runs side by side: where their configurations differ, their scores, and their curves as one figure."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.durable import atomic_path, write_durably
from pretrain.report.record import RunRecord, read_run
from pretrain.report.summary import millions, trend

CURVES = (
    ("loss", "loss"),
    ("lr", "lr"),
    ("grad_norm", "gradient norm"),
    ("images_per_second", "images/s"),
)
SMOOTHED = 30  # a running mean over this share of a curve


def beside(one: Path, other: Path, output: Path | None = None) -> tuple[Path, list[dict[str, Any]]]:
    """Write a PNG of both runs' curves (by default ONE/figures/beside-OTHER.png); (the PNG, rows of what differs).

    Rows: {"what", one's name, the other's name}; configuration, sizes, trend of the loss, and every score of both.
    Raises UserError where one is no run.
    """
    runs = [read_run(one), read_run(other)]
    names = _names(one, other)
    rows = [{"what": what} | dict(zip(names, told, strict=True)) for what, told in _told(*runs)]
    path = (output or one / "figures") / f"beside-{names[1].replace('/', '-')}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = _figure(runs, names)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    about = {
        "title": f"{names[0]} beside {names[1]}",
        "caption": "Thin: as logged; thick: running means.",
        "rows": rows,
    }
    write_durably(path.with_suffix(".json"), json.dumps(about, indent=1) + "\n")
    return path, rows


def _names(one: Path, other: Path) -> list[str]:
    names = [one.resolve().name, other.resolve().name]
    if names[0] != names[1]:
        return names
    return [f"{path.resolve().parent.name}/{path.resolve().name}" for path in (one, other)]


def _told(one: RunRecord, other: RunRecord) -> list[tuple[str, tuple[str, str]]]:
    told: list[tuple[str, tuple[str, str]]] = []
    first, second = _flat(one.config), _flat(other.config)
    for key in sorted(first | second):
        if first.get(key) != second.get(key):
            told.append((key, (_text(first.get(key, "-")), _text(second.get(key, "-")))))
    sizes = [sum(run.parameters.values()) for run in (one, other)]
    told.append(("parameters", (millions(sizes[0]), millions(sizes[1]))))
    steps = [run.series("step")[0] for run in (one, other)]
    told.append(("steps", tuple(_text(s[-1] if s else 0) for s in steps)))  # type: ignore[arg-type]  # two of them
    told.append(("loss", (trend(*one.series("loss")), trend(*other.series("loss")))))
    scores = [_scores(run) for run in (one, other)]
    for name in scores[0] | scores[1]:
        told.append((name, (scores[0].get(name, "-"), scores[1].get(name, "-"))))
    return told


def _scores(run: RunRecord) -> dict[str, str]:
    found = {}
    for result in run.results:
        for score in result["scores"]:
            low, high = score.get("interval") or (math.nan, math.nan)
            title = f"{result['name']}: {score.get('title') or score.get('name')} ({result.get('set', '?')})"
            found[title] = f"{score['value']:.3f} [{low:.3f}, {high:.3f}]"
    return found


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, inner in value.items():
            found |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
        return found
    return {prefix: value}


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _figure(runs: list[RunRecord], names: list[str]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (key, unit) in enumerate(CURVES):
        axis = figure.add_subplot(2, 2, place + 1)
        for run, name, colour in zip(runs, names, ("tab:blue", "tab:orange"), strict=True):
            steps, values = run.series(key)
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axis.plot(steps, _smooth(values), color=colour, label=name, linewidth=1.6)
        axis.set_xlabel("step")
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3)
        if key == "grad_norm":
            axis.set_yscale("log")
    figure.axes[0].legend(fontsize=8)
    return figure


def _smooth(values: list[float]) -> list[float]:
    half = len(values) // SMOOTHED // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]
