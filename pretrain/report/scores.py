"""The scores of a run and what the model retrieves, as HTML text; "" where there is nothing to show."""

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from pretrain.report.charts import number, percent, score_bar
from pretrain.report.record import is_finite, is_number

ScoredResult = Mapping[str, Any]


def scores(results: Iterable[ScoredResult]) -> str:
    """One table: the score, and beside it what no learning would give."""
    results = list(results)
    beside = list(dict.fromkeys(name for r in results for s in r["scores"] for name in _levels(s)))
    groups = "".join(_score_rows(result, beside) for result in results)
    if not groups:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in beside)
    return (
        '<section id="scores"><h2>Scores</h2><div class="wide"><table class="scores"><thead><tr><th>Score</th>'
        f"<th>Value</th><th></th><th>95 % interval</th><th>Chance</th>{head}</tr></thead>{groups}</table></div>"
        '<p class="note">The bar is the score, its whisker the 95 % interval; the ticks are chance and what else '
        "stands beside it.</p>"
        f"{''.join(_per_class(r) + _confusion(r) for r in results)}</section>"
    )


def samples(results: Iterable[ScoredResult]) -> str:
    """Pictures with the captions that the model ranks first; the right ones are marked."""
    cards, credits = [], []
    for result in results:
        examples = [e for e in result.get("examples", []) if e.get("retrieved")]
        cards += [_card(example) for example in examples]
        if examples and result.get("attribution"):
            credits.append(str(result["attribution"]))
    if not cards:
        return ""
    credit = "".join(f'<p class="note">Pictures: {escape(text)}</p>' for text in dict.fromkeys(credits))
    return (
        '<section id="samples"><h2>Samples and their retrieved captions</h2>'
        '<p class="note">Each picture with the captions of its set that the model places nearest, and the place of '
        "its own among all. A tick marks a caption that belongs to the picture. Pictures are cut to the centre "
        "square, as the model is shown them, and drawn small.</p>"
        f'<div class="cards">{"".join(cards)}</div>{credit}</section>'
    )


def _levels(score: Mapping[str, Any]) -> dict[str, float]:
    return {str(k): float(v) for k, v in (score.get("beside") or {}).items() if is_finite(v)}


def _score_rows(result: ScoredResult, beside: list[str]) -> str:
    rows = []
    for score in result["scores"]:
        value, chance = score.get("value"), score.get("chance")
        if not is_finite(value):
            continue
        levels = _levels(score)
        known = {"chance": chance, **levels} if is_finite(chance) else dict(levels)
        ticks = [(level, "chance" if name == "chance" else "other", name) for name, level in known.items()]
        interval = score.get("interval")
        cells = "".join(_level(name, levels.get(name)) for name in beside)
        rows.append(
            f"<tr><th scope=row>{escape(str(score.get('title') or score.get('name')))}</th>"
            f'<td class="value"><b>{percent(value)}</b></td>'
            f'<td class="drawn">{score_bar(value, tuple(interval) if interval else None, ticks)}</td>'
            f'<td data-label="95 %">{f"{percent(interval[0])} – {percent(interval[1])}" if interval else "–"}</td>'
            f"{_level('chance', chance if is_finite(chance) else None)}{cells}</tr>"
        )
    if not rows:
        return ""
    facts = [str(result[k]) for k in ("set", "weights", "checkpoint") if result.get(k)]
    if is_number(result.get("samples")):
        facts.insert(1 if result.get("set") else 0, f"{number(result['samples'])} samples")
    if is_finite(error := result.get("calibration_error")):
        facts.append(f"calibration error {percent(error)}")
    if is_finite(speed := result.get("images_per_second")):
        facts.append(f"{number(speed)} images/s")
    title = escape(str(result.get("title") or result["name"]))
    small = f"<small>{escape(' · '.join(facts))}</small>"
    head = f'<tr class="group"><th colspan="{5 + len(beside)}">{title} {small}</th></tr>'
    return f"<tbody>{head}{''.join(rows)}</tbody>"


def _level(name: str, value: float | None) -> str:
    """A cell of what a score is compared with; on a phone, where the head of the table is gone, it names itself."""
    shown, kind = ("–", ' class="none"') if value is None else (percent(value), "")
    return f'<td{kind} data-label="{escape(name)}">{shown}</td>'


def _per_class(result: ScoredResult) -> str:
    classes = result.get("per_class") or {}
    if not classes:
        return ""
    rows = "".join(
        f'<tr><th scope=row>{escape(str(name))}</th><td class="value"><b>{percent(row["value"])}</b></td>'
        f'<td class="drawn">{score_bar(row["value"], None, [])}</td><td>{number(row["samples"])} samples</td></tr>'
        for name, row in classes.items()
        if is_finite(row.get("value"))
    )
    title = escape(str(result.get("title") or result["name"]))
    table = f'<div class="wide"><table class="scores"><tbody>{rows}</tbody></table></div>'
    return f"<details><summary>{title}, by category</summary>{table}</details>"


def _confusion(result: ScoredResult) -> str:
    """Rows are what a sample is, columns what the model says; of many classes the commonest mistakes instead.

    The darker a cell, the larger its share of the row.
    """
    title = escape(str(result.get("title") or result["name"]))
    parts = []
    if table := result.get("confusion"):
        names, counts = table["classes"], table["counts"]
        head = "".join(f"<th><span>{escape(name)}</span></th>" for name in names)
        rows = "".join(
            f"<tr><th scope=row>{escape(name)}</th>{''.join(_cell(count, sum(row)) for count in row)}</tr>"
            for name, row in zip(names, counts, strict=True)
        )
        parts.append(
            f'<div class="wide"><table class="confusion"><thead><tr><th>is &#8595; said &#8594;</th>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    mistakes = [m for m in result.get("mistakes", ()) if isinstance(m, Mapping) and is_number(m.get("count"))]
    lines = "".join(
        f"<li>{escape(str(m.get('class')))} taken for {escape(str(m.get('answer')))}: "
        f"{number(m['count'])} of {number(m.get('of', 0))}</li>"
        for m in mistakes
    )
    if lines and not parts:
        parts.append(f'<ol class="mistakes">{lines}</ol>')
    return f"<details><summary>{title}, what is taken for what</summary>{''.join(parts)}</details>" if parts else ""


def _cell(count: float, of: float) -> str:
    shade = f' style="--share:{100 * count / of:.0f}%"' if count and of else ""
    return f"<td{shade}>{number(count) if count else ''}</td>"


def _card(example: Mapping[str, Any]) -> str:
    image = str(example.get("image") or "")
    picture = f'<img src="{escape(image)}" alt="">' if image.startswith("data:image/") else ""
    items = []
    for found in example["retrieved"]:
        right = bool(found.get("correct"))
        score = f"<span>{found['score']:.2f}</span>" if is_finite(found.get("score")) else ""
        tick = '<b aria-label="correct">✓</b> ' if right else ""
        items.append(f"<li{' class=right' if right else ''}>{score}{tick}{escape(str(found['caption']))}</li>")
    caption = escape(str(example.get("caption", "")))
    place = example.get("place")
    own = f"<p>its own: place {number(place)} of {number(example['candidates'])}</p>" if place else ""
    return f'<figure class="card">{picture}<figcaption>{caption}</figcaption><ol>{"".join(items)}</ol>{own}</figure>'
