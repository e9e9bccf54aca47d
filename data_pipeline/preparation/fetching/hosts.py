"""What a run knows of the hosts it asks: running requests, pauses they asked for, servers that have gone silent, and
robots.txt. Every table is bounded: what is idle and was used least recently is forgotten first.

A run of several tasks shares turns at a host and robots.txt through `shared`.
"""

import asyncio
import itertools
import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

from data_pipeline.preparation.fetching.robots import Robots
from data_pipeline.preparation.fetching.shared import SharedHosts

_KEPT = 50_000  # hosts, and servers
_KEPT_RULES = 64_000_000  # characters of robots.txt rules
_LOOK_AGAIN = (0.02, 0.2)  # seconds until a host whose turns other tasks have is looked at again: by chance, between
_LOOKED_AT = 8  # idle ones are sought among so many of the oldest

_Value = TypeVar("_Value")


@dataclass
class Host:
    """A host by name: its running requests, and the time until which it wants none."""

    slots: asyncio.Semaphore
    users: int = 0
    not_before: float = 0.0

    def is_idle(self) -> bool:
        return self.users == 0 and self.not_before <= time.monotonic()


@dataclass
class Server:
    """A server (scheme, host, port): its robots.txt, and how often in a row it has failed to answer."""

    robots: asyncio.Task[Robots] | None = None
    failures: int = 0
    failure: str = ""  # the last one's reason
    silent_until: float = 0.0
    weight: int = 0  # characters of its rules

    def is_idle(self) -> bool:
        return (self.robots is None or self.robots.done()) and self.silent_until <= time.monotonic()


class Table(Generic[_Value]):
    """Values by name, made on first use; idle ones are forgotten beyond `kept` values."""

    def __init__(
        self,
        make: Callable[[], _Value],
        is_idle: Callable[[_Value], bool],
        *,
        forget: Callable[[_Value], None] = lambda _: None,
        kept: int = _KEPT,
    ) -> None:
        self._make, self._is_idle, self._forget, self._kept = make, is_idle, forget, kept
        self._values: OrderedDict[str, _Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, name: str) -> _Value:
        found = self._values.get(name)
        if found is None:
            while len(self._values) >= self._kept and self.forget_one():
                pass
            found = self._values[name] = self._make()
        else:
            self._values.move_to_end(name)
        return found

    def forget_one(self) -> bool:
        """Forgets the idle value that was used least recently; False where all of the oldest are in use."""
        for name in list(itertools.islice(self._values, _LOOKED_AT)):
            if self._is_idle(self._values[name]):
                self._forget(self._values.pop(name))
                return True
        return False


class Hosts:
    """per_host: requests to one host at a time; failures, rest: after so many failures in a row a server is not asked
    for so many seconds; max_wait: the longest pause that a host may ask for and is still waited for; shared: what other
    tasks of the run know."""

    def __init__(
        self, per_host: int, failures: int, rest: float, max_wait: float, shared: SharedHosts | None = None
    ) -> None:
        self._failures, self._rest, self._max_wait, self._shared = failures, rest, max_wait, shared
        self._hosts: Table[Host] = Table(lambda: Host(asyncio.Semaphore(per_host)), Host.is_idle)
        self._servers: Table[Server] = Table(Server, Server.is_idle, forget=self._forget_rules)
        self._rules = 0

    @property
    def rules_kept(self) -> int:
        """Characters of all the rules that are kept."""
        return self._rules

    def host(self, name: str) -> Host:
        return self._hosts.get(name)

    def server(self, origin: str) -> Server:
        return self._servers.get(origin)

    @asynccontextmanager
    async def slot(self, name: str) -> AsyncIterator[Host]:
        """Waits for a turn at the host, and for the pause that it asked for, if that is short enough to wait for."""
        host = self.host(name)
        host.users += 1
        try:
            async with host.slots, nullcontext() if self._shared is None else self._shared_turn(self._shared, name):
                pause = host.not_before - time.monotonic()
                if 0 < pause <= self._max_wait:
                    await asyncio.sleep(pause)
                yield host
        finally:
            host.users -= 1

    @asynccontextmanager
    async def _shared_turn(self, shared: SharedHosts, name: str) -> AsyncIterator[None]:
        """Waits until other tasks leave a turn at the host."""
        while (taken := await asyncio.to_thread(shared.take, name)) is None:
            await asyncio.sleep(random.uniform(*_LOOK_AGAIN))
        try:
            yield
        finally:
            shared.give(taken)

    async def robots_of(self, origin: str, read: Callable[[], Awaitable[Robots]]) -> Robots:
        """Returns what another task has read of a server's robots.txt, else what `read` does."""
        if self._shared is None:
            return await read()
        found = await asyncio.to_thread(self._shared.robots, origin)
        if found is None:
            found = await read()
            await asyncio.to_thread(self._shared.keep_robots, origin, found)
        return found

    def given_up(self, origin: str) -> str:
        """Returns the failure for which a server is not asked for now, "" where it is."""
        server = self.server(origin)
        return server.failure if server.silent_until > time.monotonic() else ""

    def answered(self, origin: str) -> None:
        self.server(origin).failures = 0

    def failed(self, origin: str, reason: str) -> None:
        """Notes that a server did not answer. After its rest it gets one more chance."""
        server = self.server(origin)
        server.failures, server.failure = server.failures + 1, reason
        if server.failures >= self._failures:
            server.silent_until = time.monotonic() + self._rest
            server.failures = self._failures - 1

    def keep_rules(self, server: Server, rules: Robots) -> None:
        """Counts what a server's rules weigh, and forgets those of others where all weigh too much."""
        server.weight = sum(len(pattern) for pattern, _ in rules.rules)
        self._rules += server.weight
        while self._rules > _KEPT_RULES and self._servers.forget_one():
            pass

    def _forget_rules(self, server: Server) -> None:
        self._rules -= server.weight
