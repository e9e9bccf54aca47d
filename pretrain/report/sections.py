"""The parts of a report that tell of the run itself, as HTML text; "" where there is nothing to show."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from html import escape
from statistics import median
from typing import Any

from pretrain.report.charts import Mark, Series, duration, line_chart, number, percent, stacked_chart, timeline
from pretrain.report.record import RunRecord, is_finite, is_number
from pretrain.training.logging.kinds import BAD, GOOD, LOSS, WEIGHTED, EventKind

RESTARTS = {EventKind.STOPPED.value: "stopped", EventKind.RESUME.value: "resumed"}
MARKED_EVENTS = RESTARTS | dict.fromkeys(
    (EventKind.ROLLBACK.value, EventKind.HANG.value, EventKind.FAILED.value, EventKind.GAVE_UP.value), "bad"
)
EVENT_CLASSES = dict.fromkeys(GOOD, "good") | dict.fromkeys(BAD, "bad") | RESTARTS
LISTED_EVENTS = 40
SCORE_TITLES = {"top1": "Top-1 accuracy"}
GROUPED = (LOSS, WEIGHTED, "grad_norm/", "data/")  # others named part/measure have a chart a measure


def headline(run: RunRecord) -> str:
    """One row of figures: how far, how fast, how it ended."""
    steps, _ = run.series("step")
    _, losses = run.series("loss")
    _, speeds = run.series("images_per_second")
    _, waits = run.series("data_wait_ms")
    _, lengths = run.series("step_ms")
    batch = _at(run.config, "training", "batch_size")
    tiles: list[tuple[str, str, str]] = []
    if steps:
        planned = _at(run.config, "schedule", "steps")
        tiles.append(("Steps", number(steps[-1]), f"of {number(planned)}" if is_number(planned) else ""))
        if is_number(batch):
            tiles.append(("Images seen", number(steps[-1] * batch), f"{number(batch)} a step"))
    if losses:
        first = f"mean of the last log; the first {number(losses[0])}" if len(losses) > 1 else ""
        tiles.append(("Loss", number(losses[-1]), first))
    if speeds:
        tiles.append(("Images a second", number(median(speeds)), "median"))
    if waits and sum(lengths) > 0:
        tiles.append(("Waiting for data", percent(sum(waits) / sum(lengths)), "of the time"))
    if (span := _time_span(run)) and span[1] > span[0]:
        tiles.append(("Wall clock", duration(span[1] - span[0]), "first to last record"))
    cells = (
        f"<div><dt>{name}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in tiles
    )
    told = dict.fromkeys(str(e.get("message")) for e in run.events if e.get("kind") == EventKind.NOTICE)
    notices = "".join(f'<p class="note notice">Note: {escape(message)}</p>' for message in told)
    return (f'<dl class="tiles">{"".join(cells)}</dl>' if tiles else "") + notices


def curves(run: RunRecord) -> str:
    """Losses, rate, throughput and what else was logged, against the step."""
    marks = _marks(run)
    whole = [Series(key.removeprefix(WEIGHTED), *run.series(key)) for key in run.keys(WEIGHTED)]
    parts = [Series(key.removeprefix(LOSS), *run.series(key)) for key in run.keys(LOSS)]
    stacked = stacked_chart(whole, marks=marks, unit="loss")
    charts = [
        ("Loss, means between logs", line_chart([Series("total", *run.series("loss"))], marks=marks, unit="loss")),
        ("Parts of the loss, weighted: together the total", stacked),
        ("Parts of the loss, unweighted", line_chart(parts, marks=marks, unit="loss") if not stacked else ""),
        (
            "Accuracy in the batch",
            line_chart(_by_prefix(run, "accuracy"), marks=marks, unit="share of samples", zero=True),
        ),
        (
            "Learning rate",
            line_chart([Series("learning rate", *run.series("lr"))], marks=marks, unit="lr", noisy=False),
        ),
        (
            "Throughput",
            line_chart(
                [Series("images a second", *run.series("images_per_second"))], marks=marks, unit="images/s", zero=True
            ),
        ),
        (
            "Time of a step",
            line_chart(
                [Series("whole step", *run.series("step_ms")), Series("waiting for data", *run.series("data_wait_ms"))],
                marks=marks,
                unit="ms",
                zero=True,
            ),
        ),
        (
            "Gradient norm, before clipping",
            line_chart(
                [Series("gradient norm", *run.series("grad_norm"))], marks=marks, unit="norm, logarithmic", log_y=True
            ),
        ),
        (
            _memory_title(run),
            line_chart([Series("memory", *run.series("memory_mb"))], marks=marks, unit="MB", zero=True),
        ),
    ]
    drawn = _figures(charts)
    if not drawn:
        return ""
    kinds = dict.fromkeys(mark.text.partition(" at ")[0] for mark in marks)
    note = f'<p class="note">Dashed lines: {escape(", ".join(kinds))}.</p>' if marks else ""
    body = f'<div class="charts">{drawn}</div>{note}{_diagnostics(run, marks)}'
    return f'<section id="curves"><h2>Training</h2>{body}</section>'


def _memory_title(run: RunRecord) -> str:
    """What `memory_mb` is, which depends on the device (training/logging/meter.py)."""
    on_gpu = run.environment.get("device") not in (None, "cpu")
    return "Peak GPU memory allocated, rank 0" if on_gpu else "Peak resident memory of the process, rank 0"


def _marks(run: RunRecord) -> list[Mark]:
    """Where the run stopped, resumed and broke; an event without a step stands at that of the event before it."""
    found, last = [], 0.0
    for event in run.events:
        kind = MARKED_EVENTS.get(str(event.get("kind")))
        last = float(event["step"]) if is_number(event.get("step")) else last
        if kind:
            found.append(Mark(last, f"{_words(str(event['kind']))} at step {number(last)}", kind))
    return found


def _diagnostics(run: RunRecord, marks: list[Mark]) -> str:
    """What else was logged as part/measure (the objective's collapse watch), a chart a measure, folded away."""
    names = [key.partition("/")[2] for key in run.keys("") if "/" in key and not key.startswith(GROUPED)]
    gradients = [Series(key.removeprefix("grad_norm/"), *run.series(key)) for key in run.keys("grad_norm/")]
    parts = [Series(key.removeprefix(LOSS), *run.series(key)) for key in run.keys(LOSS)]
    charts = [
        ("Parts of the loss, unweighted", line_chart(parts, marks=marks, unit="loss") if len(parts) > 1 else ""),
        ("Gradient norm of each loss", line_chart(gradients, marks=marks, unit="norm, logarithmic", log_y=True)),
    ]
    charts += [
        (_words(name), line_chart(_by_prefix(run, name), marks=marks, unit=_words(name)))
        for name in dict.fromkeys(names)
        if name != "accuracy"
    ]
    drawn = _figures(charts)
    if not drawn:
        return ""
    return f'<details><summary>Diagnostics</summary><div class="charts inner">{drawn}</div></details>'


def _by_prefix(run: RunRecord, name: str) -> list[Series]:
    """One series for each metric called ANYTHING/name."""
    found = [key for key in run.keys("") if key.partition("/")[2] == name and not key.startswith(GROUPED)]
    return [Series(key.partition("/")[0], *run.series(key)) for key in found]


def _figures(charts: Iterable[tuple[str, str]]) -> str:
    """Drawings with their titles; those with nothing to show are left out."""
    return "".join(
        f"<figure><figcaption>{escape(name)}</figcaption>{chart}</figure>" for name, chart in charts if chart
    )


def figures(run: RunRecord) -> str:
    """What `internimage inspect` has drawn of the model, each with its numbers folded away."""
    parts = []
    for entry in run.figures:
        title, rows = escape(entry["title"]), entry["rows"]
        table = ""
        if rows:
            head = "".join(f"<th>{escape(str(key))}</th>" for key in rows[0])
            body = "".join(
                f"<tr>{''.join(f'<td>{escape(_figure_text(value))}</td>' for value in row.values())}</tr>"
                for row in rows
            )
            table = (
                f'<details><summary>{title}, numbers</summary><div class="wide"><table><thead><tr>{head}</tr></thead>'
                f"<tbody>{body}</tbody></table></div></details>"
            )
        parts.append(
            f'<figure><figcaption>{title}</figcaption><img class="drawn" src="{entry["image"]}" alt="{title}">'
            f'<p class="note">{escape(entry["caption"])}</p></figure>{table}'
        )
    return f'<section id="figures"><h2>What the model looks at</h2>{"".join(parts)}</section>' if parts else ""


def _figure_text(value: Any) -> str:
    return number(value) if is_number(value) else str(value)


def inner_runs(run: RunRecord) -> str:
    """The runs that live inside this one, as fine-tuning: validation of all in one chart, then each one's curves."""
    names = {id(part): str(part.folder.relative_to(run.folder)) for part in run.parts}
    series = [Series(names[id(p)], [s for s, _ in p.validation], [v for _, v in p.validation]) for p in run.parts]
    scores = dict.fromkeys(SCORE_TITLES.get(p.validation_score, p.validation_score) for p in run.parts if p.validation)
    together = _figures(
        [(f"{', '.join(scores)} on validation", line_chart(series, unit="share of samples", noisy=False))]
    )
    blocks = []
    for part in run.parts:
        charts = [
            ("Loss, means between logs", line_chart([Series("total", *part.series("loss"))], unit="loss")),
            ("Learning rate", line_chart([Series("learning rate", *part.series("lr"))], unit="lr", noisy=False)),
        ]
        if drawn := _figures(charts):
            inside = f'{headline(part)}<div class="charts">{drawn}</div>'
            opened = " open" if len(run.parts) == 1 else ""
            name = escape(names[id(part)])
            blocks.append(f'<details{opened}><summary>{name}</summary><div class="run">{inside}</div></details>')
    if not blocks:
        return ""
    first = f'<div class="charts">{together}</div>' if together else ""
    return f'<section id="inner-runs"><h2>Runs inside this one</h2>{first}{"".join(blocks)}</section>'


def events(run: RunRecord) -> str:
    """What happened, along the clock and as a list."""
    if not run.events:
        return ""
    start, end = _time_span(run) or (0.0, 0.0)
    placed = [(t, _kind_class(e), _event_line(e)) for e in run.events if (t := _seconds(e)) is not None]
    strip = timeline(placed, start, end) if placed and end > start else ""
    counts = Counter(str(e.get("kind", "event")) for e in run.events)
    chips = "".join(f"<li>{escape(_words(kind))} <b>{count}</b></li>" for kind, count in counts.most_common())
    half = LISTED_EVENTS // 2
    shown = run.events if len(run.events) <= 2 * half else (*run.events[:half], *run.events[-half:])
    rows = "".join(_event_row(e, start) for e in shown)
    left = len(run.events) - len(shown)
    more = f'<p class="note">{left} events in between are in events.jsonl.</p>' if left else ""
    opened = " open" if len(run.events) <= 12 else ""
    return (
        f'<section id="events"><h2>Events</h2>{strip}<ul class="chips">{chips}</ul>'
        f'<details{opened}><summary>All events</summary><div class="wide">'
        f'<table class="events"><tbody>{rows}</tbody></table></div>{more}</details></section>'
    )


def folded(run: RunRecord) -> str:
    """Configuration and environment, closed until asked for."""
    blocks = []
    if run.config_text.strip():
        blocks.append(
            f"<details><summary>Configuration</summary><pre>{escape(run.config_text.strip())}</pre></details>"
        )
    if run.environment:
        text = json.dumps(run.environment, indent=2, ensure_ascii=False)
        blocks.append(f"<details><summary>Environment</summary><pre>{escape(text)}</pre></details>")
    return f'<section id="settings"><h2>Settings</h2>{"".join(blocks)}</section>' if blocks else ""


def _event_row(event: Mapping[str, Any], start: float) -> str:
    seconds = _seconds(event)
    at = duration(max(seconds - start, 0)) if seconds is not None else ""
    rest = {k: v for k, v in event.items() if k not in ("time", "kind", "step")}
    details = ", ".join(f"{_words(k)} {v}" for k, v in rest.items() if v not in (None, ""))
    step = f"step {number(event['step'])}" if is_number(event.get("step")) else ""
    return (
        f'<tr><td>{at}</td><td><i class="dot {_kind_class(event)}"></i>'
        f"{escape(_words(str(event.get('kind', 'event'))))}</td>"
        f"<td>{step}</td><td>{escape(details)}</td></tr>"
    )


def _event_line(event: Mapping[str, Any]) -> str:
    step = f" at step {event['step']}" if is_number(event.get("step")) else ""
    return _words(str(event.get("kind", "event"))) + step


def _kind_class(event: Mapping[str, Any]) -> str:
    """The colour of an event: good, stopped, resumed, bad or plain."""
    return EVENT_CLASSES.get(str(event.get("kind")), "plain")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _seconds(row: Mapping[str, Any]) -> float | None:
    """`time` as seconds since the epoch: a number, or ISO 8601."""
    time = row.get("time")
    if is_finite(time):
        return float(time)
    try:
        return datetime.fromisoformat(str(time)).timestamp()
    except ValueError:
        return None


def _time_span(run: RunRecord) -> tuple[float, float] | None:
    times = [t for row in (*run.metrics, *run.events) if (t := _seconds(row)) is not None]
    return (min(times), max(times)) if times else None


def _at(config: Mapping[str, Any], *path: str) -> Any:
    node: Any = config
    for part in path:
        node = node.get(part) if isinstance(node, Mapping) else None
    return node
