"""What a process does that decodes for `decoders`: reads items from its socket, answers each in turn.

    owner    pickled item, pickled item, ...            ->  process
             <-  size, pickled answer, size, pickled answer, ...

The first answer says that the process is ready. The socket ends with its owner, and the process with the socket.
"""

import pickle
import socket
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from data_pipeline.executors.parent import end_with_parent

SIZE = struct.Struct("<Q")


class Answer(NamedTuple):
    """What became of an item: a result, or the error that the work raised."""

    result: Any = None
    error: BaseException | None = None


def answer_items(items: socket.socket, work: Callable[[Any], Any]) -> None:
    """Does `work` for every item until the owner closes its end."""
    end_with_parent()
    _send(items, Answer())
    with items, items.makefile("rb", buffering=1 << 18) as file:
        while True:
            try:
                item = pickle.load(file)
            except EOFError:
                return
            try:
                answer = Answer(work(item))
            except Exception as error:
                answer = Answer(error=error)
            del item  # else it is held while the next one is awaited
            _send(items, answer)


def _send(items: socket.socket, answer: Answer) -> None:
    pickled = pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)
    items.sendall(SIZE.pack(len(pickled)) + pickled)
