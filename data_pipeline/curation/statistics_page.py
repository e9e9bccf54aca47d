"""A set in plots, as one HTML page: sizes, aspects, captions, scripts, domains, reasons, from the sidecars alone."""

import html
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.curation.catalogue import open_catalogue
from data_pipeline.curation.decisions import SetPath, open_settled
from data_pipeline.curation.filters import DERIVED
from data_pipeline.curation.pictures import write_page

_BINS, _MOST_BARS = 30, 25
# Title, column, and whether bins grow in proportion, for values that span orders of magnitude.
_SPREADS = (
    ("Shorter side, pixels", "side", True),
    ("Aspect, longer side by shorter", "aspect", False),
    ("Image size, bytes", "image_size", True),
    ("Caption length, characters", "characters", True),
    ("Caption length, words", "words", False),
)
_COUNTS = (
    ("Status", "status", "true"),
    ("Reasons", "regexp_replace(reason, ' of .*', '')", "reason <> ''"),
    ("Formats", "image_format", "used"),
    ("Script of the caption's first letter", "script", "used and script is not null"),
    ("Domains", "domain", "used and domain <> ''"),
    ("Labels", "label::VARCHAR", "used and label is not null"),
)
_SCRIPTS = (
    "Latin", "Han", "Cyrillic", "Arabic", "Hiragana", "Katakana", "Hangul", "Greek", "Hebrew", "Devanagari", "Thai",
)  # fmt: skip


def statistics_page(path: SetPath, page: Path, *, memory_gb: float = 1.0) -> Path:
    """Writes the page; returns its path. Spreads are those of the rows that are used."""
    one = open_settled(path)
    with open_catalogue([one], memory_gb=memory_gb) as catalogue:
        run = catalogue.connection.execute
        derived = "".join(f", {sql} as {name}" for name, sql in DERIVED.items() if name not in catalogue.columns())
        cases = " ".join(f"when regexp_matches(letter, '\\p{{{name}}}') then '{name}'" for name in _SCRIPTS)
        letters = "regexp_extract(caption, '\\p{L}')"
        run(
            f"create view described as select *, (case {cases} when letter <> '' then 'other' end) as script from "
            f"(select *{derived}, status = 'packed' as used, {letters} as letter from rows)"
        )
        total = run("select count(*), count(*) filter (where used) from described").fetchone()
        assert total is not None
        body = [f"<p>{total[0]:,} rows, {total[1]:,} used, {len(one.shards):,} shards</p>"]
        for title, column, growing in _SPREADS:
            value = f"ln(greatest({column}, 1))" if growing else f"{column}::DOUBLE"
            # The last of a thousand is left out of sight, so that one giant does not flatten the rest.
            ends = run(
                f"select min({value}), approx_quantile({value}, 0.999) from described "
                f"where used and {column} is not null"
            ).fetchone()
            if ends is None or ends[0] is None:
                continue
            low, high = float(ends[0]), max(float(ends[1]), float(ends[0]) + 1e-9)
            place = f"least(floor(({value} - {low}) / {(high - low) / _BINS}), {_BINS - 1})::INTEGER"
            counts = dict(
                run(
                    f"select {place}, count(*) from described where used and {column} is not null group by 1"
                ).fetchall()
            )
            edges = [low + n * (high - low) / _BINS for n in range(_BINS)]
            names = [_number(2.718281828459045**edge if growing else edge) for edge in edges]
            joined: dict[str, int] = {}  # bins so narrow that their numbers read the same are one
            for n, name in enumerate(names):
                joined[name] = joined.get(name, 0) + counts.get(n, 0)
            body.append(_bars(title, list(joined), list(joined.values())))
        for title, value, condition in _COUNTS:
            rows = run(
                f"select {value} as name, count(*) as n from described where {condition} group by 1 "
                f"order by n desc, name limit {_MOST_BARS}"
            ).fetchall()
            if rows:
                names = [str(name) for name, _ in rows]
                if title == "Labels" and one.classes is not None:
                    names = [one.classes[int(name)] if int(name) < len(one.classes) else name for name in names]
                body.append(_bars(title, names, [count for _, count in rows]))
    write_page(page, f"{one.name}: what is in it", "".join(body))
    return page


def _bars(title: str, names: Sequence[str], counts: Sequence[int]) -> str:
    """Draws counts as horizontal bars with their numbers."""
    most = max(counts) or 1
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{count:,}<td style='text-align:left'>"
        f"<div style='background:#0969da;height:12px;width:{round(360 * count / most)}px'></div>"
        for name, count in zip(names, counts, strict=True)
    )
    return f"<h2>{html.escape(title)}</h2><table>{rows}</table>"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.2f}"
