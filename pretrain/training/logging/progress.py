"""Progress on rank 0: a bar where there is a terminal, a plain line every few seconds where there is none."""

import sys
import time
from typing import Any

LINE_SECONDS = 10.0


class Progress:
    def __init__(self, total: int, start: int, shown: bool) -> None:
        self._total, self._shown = total, shown
        self._bar: Any = None
        self._task: Any = None
        self._line_at = 0.0
        if shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("pretrain"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("starting", total=total, completed=start)
            self._bar.start()

    def show(self, step: int, loss: float, lr: float) -> None:
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=f"loss {loss:.4f}  lr {lr:.2e}")
        elif (now := time.monotonic()) - self._line_at >= LINE_SECONDS or step == self._total:
            self._line_at = now
            print(f"step {step}/{self._total}  loss {loss:.4f}  lr {lr:.2e}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
