"""The figures of docs/handoff.md: effective receptive fields and sampling points of a run, before and after training.

    benchmarks/demo_figures.py runs/demo --data runs/demo/shards/held-out

Writes docs/figures/erf.png and sampling.png, and the tables between the marks `<!-- erf -->` and `<!-- sampling -->` of
docs/handoff.md.
"""

import argparse
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from pretrain.analysis.figures.receptive_field import erf_figure
from pretrain.analysis.figures.sampling import sampling_figure

DOCS = Path(__file__).parents[1] / "docs"
AREAS = ("area 20%", "area 50%", "area 99%")


def erf_table(rows: list[dict[str, Any]]) -> str:
    """A line a model; a cell a stage: the shares of the picture that hold 20, 50 and 99 % of the gradient."""
    by_model: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        by_model[row["model"]].append(" / ".join(f"{100 * row[area]:.1f}" for area in AREAS))
    lines = [f"| {model} | {' | '.join(cells)} |" for model, cells in by_model.items()]
    head = "| % of the picture that holds 20 / 50 / 99 % | stage 1 | stage 2 | stage 3 | stage 4 |\n|--|--|--|--|--|"
    return "\n".join([head, *lines])


def sampling_table(rows: list[dict[str, Any]]) -> str:
    """A line a stage, means over its groups; untrained kernels have offsets of 0 and nine equal weights."""
    by_stage: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_stage[row["stage"]].append(row)
    lines = []
    for stage, groups in by_stage.items():
        offsets = [group["offset, px of the picture"] for group in groups]
        reach, heaviest = (fmean(g[k] for g in groups) for k in ("reach 95 %, px of the picture", "heaviest point"))
        spread = f"{fmean(offsets):.1f} ({min(offsets):.1f} to {max(offsets):.1f})"
        lines.append(f"| {stage} | {len(groups)} | {spread} | {reach:.0f} | {heaviest:.2f} |")
    head = (
        "| stage | groups | offset, px (least to most of the groups) | 95 % of the points within, px | heaviest point |"
    )
    return "\n".join([head, "|--|--|--|--|--|", *lines])


def put(page: str, mark: str, content: str) -> str:
    """`page` with `content` between two marks. Raises ValueError where they are not there."""
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"no <!-- {mark} --> ... <!-- /{mark} -->")
    return pattern.sub(lambda found: f"{found[1]}{content}\n{found[2]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--docs", type=Path, default=DOCS)
    given = parser.parse_args()
    figures, page = given.docs / "figures", given.docs / "handoff.md"
    with TemporaryDirectory() as kept:
        drawn = {
            "erf": erf_figure(given.run, given.data, count=given.pictures, output=Path(kept)),
            "sampling": sampling_figure(given.run, given.data, count=2, output=Path(kept)),
        }
        figures.mkdir(exist_ok=True)
        for name, (path, _) in drawn.items():
            (figures / f"{name}.png").write_bytes(path.read_bytes())
    text = page.read_text(encoding="utf-8")
    for name, table, title in (
        ("erf", erf_table, "Effective receptive fields of the demo's model, before and after training:"),
        ("sampling", sampling_table, "Its sampling points after training, and (grey rings) before:"),
    ):
        content = f"{title}\n\n![{name}](figures/{name}.png)\n\n{table(drawn[name][1])}\n"
        print(content)
        text = put(text, name, content)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
