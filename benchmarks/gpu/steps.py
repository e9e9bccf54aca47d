"""What a step of the GPU check is, and what the lists of steps are made from."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Options:
    """Of the whole check: where results go, the reduced form, and folders that were given (None: not given)."""

    out: Path
    small: bool
    wheelhouse: Path | None = None
    shards: Path | None = None
    peers: Path | None = None


@dataclass(frozen=True)
class Step:
    """A child process of at most `seconds`, run in the repository's root."""

    name: str
    group: str
    seconds: float
    command: tuple[str, ...]


def script(name: str, *arguments: str) -> tuple[str, ...]:
    """The command that runs benchmarks/gpu/NAME."""
    return (sys.executable, str(HERE / name), *arguments)
