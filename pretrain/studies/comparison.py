"""Arms beside each other: means, paired bootstrap over concepts, a table and a plot.

Two arms are scored on the same pictures, one a concept. A concept's difference is that of its hits, averaged over
seeds; concepts are drawn again with replacement, and the differences' mean has the interval of its 2.5th and 97.5th
percentile. Where it contains 0, these pictures do not tell the two apart, and the table says so.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000


class Difference(NamedTuple):
    """of: the other arm's mean minus the whole's. low, high: 95 % interval."""

    of: float
    low: float
    high: float

    @property
    def told(self) -> bool:
        return self.low > 0 or self.high < 0


def paired_bootstrap(ours: NDArray[np.float64], whole: NDArray[np.float64], draws: int = DRAWS) -> Difference:
    """ours, whole: hits [seeds, concepts] of two arms on the same concepts, with any number of seeds each."""
    difference = ours.mean(0) - whole.mean(0)
    generator = np.random.Generator(np.random.PCG64(0))
    drawn = generator.integers(0, len(difference), (draws, len(difference)))
    means = difference[drawn].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(difference.mean()), float(low), float(high))


Scores = Mapping[str, Mapping[str, NDArray[np.float64]]]  # score -> arm -> hits [seeds, concepts]


def table(
    scores: Scores,
    arms: Sequence[str],
    whole: str,
    steps: Mapping[str, Sequence[int]],
    diverged: Mapping[str, str] | None = None,
) -> str:
    """Markdown: a table a set of drawings; a row an arm, a column a score: its mean, and the interval of its difference
    from `whole`.

    scores: named "SET: SCORE". diverged: arm -> how many of its seeds, which have no scores.
    """
    lines = []
    for title, names in _by_set(scores).items():
        columns = [name.partition(": ")[2] or name for name in names]
        lines += [f"| {title} | steps | {' | '.join(columns)} |", f"|---|---|{'---|' * len(names)}"]
        for arm in arms:
            cells = [_cell(scores[name].get(arm), scores[name].get(whole), arm == whole) for name in names]
            count = " + ".join(str(one) for one in steps.get(arm, ()))
            shown = f"{arm} ({diverged[arm]} diverged)" if diverged and arm in diverged else arm
            lines.append(f"| {shown} | {count} | {' | '.join(cells)} |")
        lines.append("")
    lines.append(
        f"In brackets: the 95 % interval of the difference from `{whole}`, paired over concepts; ≈ where it contains "
        "0, so that these drawings do not tell the two arms apart."
    )
    return "\n".join(lines) + "\n"


def summarised(scores: Scores) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Scores "SET: WHAT, HOW" -> "SET: WHAT", each picture's hits averaged over the ways to score it."""
    grouped: dict[str, list[str]] = {}
    for name in scores:
        grouped.setdefault(name.partition(",")[0], []).append(name)
    return {
        group: {arm: np.mean([scores[name][arm] for name in names], axis=0) for arm in scores[names[0]]}
        for group, names in grouped.items()
    }


def _cell(own: NDArray[np.float64] | None, other: NDArray[np.float64] | None, whole: bool) -> str:
    if own is None:
        return "–"
    if whole:
        return f"**{own.mean():.3f}**"
    if other is None:
        return f"{own.mean():.3f}"
    found = paired_bootstrap(own, other)
    return f"{own.mean():.3f} [{found.low:+.3f}, {found.high:+.3f}]" + ("" if found.told else " ≈")


def plot(scores: Scores, arms: Sequence[str], whole: str, path: Path) -> None:
    """A row a set of drawings, a panel a score: each arm's difference from `whole` with its interval, dark where told
    apart; nothing without scores of `whole`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sets = _by_set([name for name in scores if whole in scores[name]])
    if not sets:
        return
    wide = max(map(len, sets.values()))
    size = (2.4 * wide + 2.4, (0.22 * len(arms) + 1.0) * len(sets))
    figure, axes = pyplot.subplots(len(sets), wide, figsize=size, sharey=True, squeeze=False)
    for line, names in zip(axes, sets.values(), strict=True):
        for axis, name in zip(line, names, strict=False):
            _panel(axis, scores[name], arms, whole, name.replace(": ", "\n").replace(", within", "\nwithin"))
        for axis in line[len(names) :]:
            axis.axis("off")
    axes[0][0].set_yticks(range(len(arms)), arms)
    axes[0][0].invert_yaxis()
    figure.supxlabel(f"difference from {whole}, 95 % interval over concepts", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(axis: Any, scores: Mapping[str, NDArray[np.float64]], arms: Sequence[str], whole: str, title: str) -> None:
    for row, arm in enumerate(arms):
        if arm == whole or arm not in scores:
            continue
        found = paired_bootstrap(scores[arm], scores[whole])
        colour = "#1f4e79" if found.told else "#a8a8a8"
        axis.plot([found.low, found.high], [row, row], color=colour, linewidth=2)
        axis.plot([found.of], [row], "o", color=colour, markersize=4)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_title(f"{title}\n{whole}: {scores[whole].mean():.3f}", fontsize=8)
    axis.tick_params(labelsize=8)


def _by_set(names: Iterable[str]) -> dict[str, list[str]]:
    """Names "SET: SCORE", by set."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.partition(": ")[0], []).append(name)
    return found
