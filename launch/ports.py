"""A port for the ranks' rendezvous that nobody else takes between choosing and using it.

The kernel hands out ports of its ephemeral range by itself, so a port from there can be gone a moment after it was seen
free. Ours lie below that range, and two launchers on one machine keep apart by an abstract Unix socket that
carries the port's number: it vanishes with its owner, whatever kills it.
"""

import os
import random
import socket
from types import TracebackType
from typing import Self

from data_pipeline.errors import UserError

LOWEST, HIGHEST = 15000, 32000


class ReservedPort:
    """Holds a port for the lifetime of a `with` block. `MASTER_PORT` in the environment is taken as it is."""

    def __init__(self) -> None:
        self._claim: socket.socket | None = None
        given = os.environ.get("MASTER_PORT")
        self.number = int(given) if given and given.isdigit() else self._reserve()

    def _reserve(self) -> int:
        candidates = random.SystemRandom().sample(range(LOWEST, min(HIGHEST, _ephemeral_start())), k=200)
        for port in candidates:
            claim = _claim(port)
            if claim is None:
                continue
            if _is_free(port):
                self._claim = claim
                return port
            claim.close()
        raise UserError(f"no free port among 200 tried between {LOWEST} and {HIGHEST}; set MASTER_PORT to one")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if self._claim is not None:
            self._claim.close()


def _claim(port: int) -> socket.socket | None:
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(f"\0internimage-port-{port}")
    except OSError:
        claim.close()
        return None
    return claim


def _is_free(port: int) -> bool:
    """No listener on any address of either family."""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            probe = socket.socket(family, socket.SOCK_STREAM)
        except OSError:
            continue  # no IPv6 here
        with probe:
            try:
                probe.bind((address, port))
            except OSError as error:
                if error.errno in (97, 99):  # address family or address not available
                    continue
                return False
    return True


def _ephemeral_start() -> int:
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
            start = int(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        return HIGHEST
    return start if start > LOWEST + 1000 else HIGHEST
