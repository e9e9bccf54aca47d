"""Standard output and error that cannot end a run: a closed terminal or pipe takes nothing with it.

writing fails (EPIPE, EIO)  ->  the descriptor is pointed at /dev/null, and the run goes on
"""

import os
import sys
from collections.abc import Iterable
from typing import TextIO


class Lenient:
    """A text stream whose `write` and `flush` raise no OSError; for the rest, the stream itself."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._lose()
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._lose()

    def _lose(self) -> None:
        # What the stream still holds goes the same way at its next flush.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def make_output_lenient() -> None:
    """For the rest of this process, which is a rank."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Lenient):
            setattr(sys, name, Lenient(stream))
