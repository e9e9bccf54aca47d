"""Arms beside each other: means, paired bootstrap over concepts, a table and a plot.

Two arms are scored on the same pictures, one a concept. A concept's difference is that of its hits, averaged over
seeds; concepts are drawn again with replacement, and the differences' mean has the interval of its 2.5th and 97.5th
percentile. Where it contains 0, these pictures do not tell the two apart, and the table says so.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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
    """Markdown: a row an arm, a column a score: its mean, and the difference from `whole` with its interval.

    diverged: arm -> how many of its seeds, which have no scores.
    """
    names = list(scores)
    lines = [f"| Arm | steps | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for arm in arms:
        cells = []
        for name in names:
            own, other = scores[name].get(arm), scores[name].get(whole)
            if own is None:
                cells.append("–")
            elif other is None or arm == whole:
                cells.append(f"**{own.mean():.3f}**" if arm == whole else f"{own.mean():.3f}")
            else:
                found = paired_bootstrap(own, other)
                mark = "" if found.told else " ≈"
                cells.append(f"{own.mean():.3f} ({found.of:+.3f}: {found.low:+.3f} to {found.high:+.3f}){mark}")
        count = " + ".join(str(one) for one in steps.get(arm, ()))
        shown = f"{arm} ({diverged[arm]} diverged)" if diverged and arm in diverged else arm
        lines.append(f"| {shown} | {count} | {' | '.join(cells)} |")
    lines += ["", f"In parentheses: the difference from `{whole}` and its 95 % interval, paired over concepts; ≈ where "
              "the interval contains 0, so that these pictures do not tell the two arms apart."]  # fmt: skip
    return "\n".join(lines) + "\n"


def plot(scores: Scores, arms: Sequence[str], whole: str, path: Path) -> None:
    """A panel a score: each arm's difference from `whole` with its interval, dark where told apart; nothing without
    scores of `whole`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [name for name in scores if whole in scores[name]]
    if not shown:
        return
    figure, axes = pyplot.subplots(
        1, len(shown), figsize=(2.6 * len(shown) + 2.4, 0.26 * len(arms) + 1.4), sharey=True, squeeze=False
    )
    for axis, name in zip(axes[0], shown, strict=True):
        for row, arm in enumerate(arms):
            if arm == whole or arm not in scores[name]:
                continue
            found = paired_bootstrap(scores[name][arm], scores[name][whole])
            colour = "#1f4e79" if found.told else "#a8a8a8"
            axis.plot([found.low, found.high], [row, row], color=colour, linewidth=2)
            axis.plot([found.of], [row], "o", color=colour, markersize=4)
        axis.axvline(0, color="black", linewidth=0.8)
        title = name.replace(": ", "\n")
        axis.set_title(f"{title}\n{whole}: {scores[name][whole].mean():.3f}", fontsize=7)
        axis.tick_params(labelsize=7)
    axes[0][0].set_yticks(range(len(arms)), arms, fontsize=8)
    axes[0][0].invert_yaxis()
    figure.supxlabel(f"difference from {whole}, 95 % interval over concepts", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
