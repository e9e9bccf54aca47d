"""Which checkpoints a run keeps. Pure.

newest `keep`, the best one                  always
every `keep_every` steps (milestones)        for good, or as many as fit into `keep_gigabytes`
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.configuration.schema import CheckpointConfig


@dataclass(frozen=True)
class Kept:
    step: int
    bytes: int


def to_delete(there: Sequence[Kept], settings: CheckpointConfig, best: int | None) -> list[int]:
    """Steps of the checkpoints that go, of those that are `there`. best: step of the one that an evaluation chose."""
    newest = sorted((one.step for one in there), reverse=True)[: settings.keep]
    safe = {*newest, *([best] if best is not None else [])}
    every = settings.keep_every
    milestones = [one for one in there if every is not None and one.step % every == 0 and one.step not in safe]
    kept = safe | {one.step for one in thinned(milestones, settings.keep_gigabytes)}
    return sorted(one.step for one in there if one.step not in kept)


def thinned(milestones: Sequence[Kept], gigabytes: float | None) -> list[Kept]:
    """As many as fit, spread over the run: first goes the one whose neighbours are closest, never the first or last."""
    left = sorted(milestones, key=lambda one: one.step)
    while gigabytes is not None and left and sum(one.bytes for one in left) > 1e9 * gigabytes:
        inner = range(1, len(left) - 1)
        gaps = {place: left[place + 1].step - left[place - 1].step for place in inner}
        del left[min(gaps, key=gaps.__getitem__) if gaps else 0]
    return left
