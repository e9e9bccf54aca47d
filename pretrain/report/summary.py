"""What a reader asks first, answered at the head of the page: trained on what, how big, how good, still improving, what
went wrong.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean, variance
from typing import Any

from pretrain.report.charts import number, percent
from pretrain.report.record import RunRecord, is_finite, is_number
from pretrain.training.logging.kinds import BAD, EventKind

FEWEST = 10  # logged values below which a trend is not told
RESULTS = 4  # of an answer; the table below has all
ABOVE = "above"
IMAGE = "image."  # of the image model's parameters


def summary(run: RunRecord) -> str:
    """The answers that the run's files allow, as HTML; "" where they allow none."""
    answers = (
        ("Trained on", trained_on(run)),
        ("Model", model_size(run)),
        ("How good", how_good(run.results)),
        ("Still improving?", still_improving(run)),
        ("What went wrong", what_went_wrong(run)),
    )
    cells = "".join(
        f"<div><dt>{title}</dt><dd>{''.join(f'<p>{escape(line)}</p>' for line in lines)}</dd></div>"
        for title, lines in answers
        if lines
    )
    return f'<dl class="answers">{cells}</dl>' if cells else ""


def trained_on(run: RunRecord) -> list[str]:
    """The sets, how much of them was seen, and what the weights started from."""
    sources = run.trained_on.get("sources") or ()
    names = [
        f"{s['name']} ({number(s['samples'])} samples)"
        for s in sources
        if isinstance(s, Mapping) and "name" in s and is_number(s.get("samples"))
    ]
    if not names:
        listed = _at(run.config, "data", "sources")
        names = [str(s["path"]) for s in listed or () if isinstance(s, Mapping) and "path" in s]
    lines = [", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")] if names else []
    steps, batch = run.series("step")[0], _at(run.config, "training", "batch_size")
    if steps and is_number(batch):
        seen, epoch = steps[-1] * batch, run.trained_on.get("epoch_samples")
        rounds = f", {seen / epoch:.2g} times each" if is_number(epoch) and epoch else ""
        lines.append(f"{number(seen)} images seen{rounds}")
    start = _at(run.config, "initialize_from")
    return [*lines, f"from the weights of {start}"] if start else lines


def model_size(run: RunRecord) -> list[str]:
    name, size = _at(run.config, "model", "name"), _at(run.config, "data", "image_size")
    title = f"InternImage ({name})" if name == "custom" else name
    lines = [f"{title}{f', images of {size} px' if size else ''}"] if name else []
    total = sum(run.parameters.values())
    image = sum(count for key, count in run.parameters.items() if key.startswith(IMAGE))
    if image:
        beside = f", {millions(total - image)} beside it (text, decoder, heads)" if total > image else ""
        lines.append(f"{millions(image)} parameters in the image model{beside}")
    return lines


def how_good(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first score of each result beside the best of what asks no understanding; first those not above it."""
    lines = []
    several = len({result.get("set") for result in results}) > 1
    for result in results:
        for score in result["scores"][:1]:
            title = f"{result.get('title') or result['name']}, {score.get('title') or score.get('name')}"
            of = f" ({result['set']})" if several and result.get("set") else ""
            lines.append(f"{title}{of}: {percent(score['value'])}{_verdict(score)}")
    lines = sorted(lines, key=lambda line: ABOVE in line)[:RESULTS]
    if len(results) > RESULTS:
        lines.append(f"and {len(results) - RESULTS} more below")
    return lines or ["not scored yet: internimage evaluate RUN --data SET"]


def _verdict(score: Mapping[str, Any]) -> str:
    """In words, where the score stands beside the best baseline; "" where it has none."""
    levels = {"chance": score.get("chance")} | dict(score.get("beside") or {})
    known = {name: float(value) for name, value in levels.items() if is_finite(value)}
    if not known:
        return ""
    best = max(known, key=lambda name: known[name])
    low, high = score.get("interval") or (score["value"], score["value"])
    word = ABOVE if low > known[best] else "below" if high < known[best] else "not told apart from"
    return f", {word} {best} ({percent(known[best])})"


def still_improving(run: RunRecord) -> list[str]:
    lines = []
    for part in (run, *run.parts):
        if part.validation:
            best = max(part.validation, key=lambda entry: entry[1])
            last = part.validation[-1][0]
            name = "" if part is run else f"{part.folder.relative_to(run.folder)}: "
            lines.append(f"{name}best on validation {percent(best[1])} at step {number(best[0])} of {number(last)}")
    return [trend(*run.series("loss")), *lines] if run.series("loss")[0] else lines


def trend(steps: Sequence[float], losses: Sequence[float]) -> str:
    """Whether the loss of the last fifth of the logs differs from the fifth before by more than two standard errors."""
    values = [value for value in losses if math.isfinite(value)]
    if len(values) < FEWEST:
        return f"too early to say: {len(values)} logged losses"
    if len(values) < len(losses):
        return f"the loss was not finite in {len(losses) - len(values)} of {len(losses)} logs"
    size = max(2, len(values) // 5)
    before, after = values[-2 * size : -size], values[-size:]
    change = fmean(after) - fmean(before)
    error = math.sqrt((variance(before) + variance(after)) / size)
    word = "level" if abs(change) <= 2 * error else "falling" if change < 0 else "rising"
    told = f"{number(fmean(after))} over the last {number(steps[-1] - steps[-size - 1])} steps"
    return f"loss {word}: {told}, {number(fmean(before))} over as many before"


def what_went_wrong(run: RunRecord) -> list[str]:
    """Bad news by kind, the last message of the gravest; how often the run was stopped and resumed."""
    if not run.events:
        return []
    kinds = Counter(str(e.get("kind")) for e in run.events)
    bad = {kind: kinds[kind] for kind in sorted(BAD) if kinds[kind]}
    lines = [", ".join(f"{kind.replace('_', ' ')}: {count}" for kind, count in bad.items())] if bad else []
    messages = [str(e["message"]) for e in run.events if str(e.get("kind")) in bad and e.get("message")]
    lines += messages[-1:]
    if not bad:
        lines.append("nothing was recorded: no bad sample, alarm, rollback or failure")
    if resumed := kinds[EventKind.RESUME]:
        lines.append(f"stopped and resumed {'once' if resumed == 1 else f'{resumed} times'}")
    ended = kinds[EventKind.DONE] or run.events[-1].get("kind") == EventKind.STOPPED
    return lines if ended else [*lines, "no end is recorded: the run is going, or was killed"]


def millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e5 else number(count)


def _at(config: Mapping[str, Any], *path: str) -> Any:
    node: Any = config
    for part in path:
        node = node.get(part) if isinstance(node, Mapping) else None
    return node
