"""A rank of the fake task whose collectives are counted, or whose view of a folder is late; a script.

COUNT_TO: rank 0 appends a word a collective there: `talk_N` where the ranks' own talk sums N numbers.
STALE_LISTING: on rank 1, glob shows no such name.
"""

import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

FAKES = Path(__file__).with_name("training_fakes.py")


def count_to(path: Path) -> None:
    def counted(name: str) -> None:
        original = getattr(dist, name)

        def call(*arguments: Any, **named: Any) -> Any:
            tensor = arguments[0] if arguments else named.get("tensor")
            ours = name != "all_reduce" or tensor.dtype == torch.float64  # DeepSpeed's numbers are of single precision
            word = f"talk_{tensor.numel()}" if name == "all_reduce" and ours else f"talk_{name}" if ours else name
            with path.open("a") as file:
                file.write(word + "\n")
            return original(*arguments, **named)

        setattr(dist, name, call)

    for name in ("all_reduce", "all_gather_object", "barrier", "broadcast_object_list"):
        counted(name)


def hide(missing: str) -> None:
    glob = Path.glob

    def late(self: Path, pattern: str, **named: Any) -> Iterator[Path]:
        return (found for found in glob(self, pattern, **named) if found.name != missing)

    Path.glob = late  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    if (where := os.environ.get("COUNT_TO")) and os.environ["RANK"] == "0":
        count_to(Path(where))
    if (missing := os.environ.get("STALE_LISTING")) and os.environ["RANK"] == "1":
        hide(missing)
    runpy.run_path(str(FAKES), run_name="__main__")
