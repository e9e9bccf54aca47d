"""Resolves host names: asynchronously, with a limit, a time limit and a cache of its own, to allowed addresses only.

A name is resolved before its request takes a turn or starts its clock: a name that does not resolve is `dns_failed` and
never `timeout`, and names whose servers are silent hold up no others.
"""

import asyncio
import math
import socket
import time
from collections import OrderedDict
from collections.abc import Sequence

import aiodns
from aiohttp.abc import AbstractResolver, ResolveResult

from data_pipeline.preparation.fetching.addresses import AddressRule, PrivateAddressError

_AT_ONCE = 512  # names asked for at a time; a dead one takes its place for `_LONGEST` seconds
_LONGEST = 12.0
_TIMEOUT, _TRIES = 2.0, 2  # of each name server
_KEPT = 100_000  # names
_KEPT_SECONDS = 300.0  # what was found, and that nothing was

_NUMERIC = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV


class NoAddressError(OSError):
    """A host's name has no address, or its name servers do not say."""


class Names(AbstractResolver):
    """Names and the addresses that `rule` allows, for aiohttp. The connection is made to these, so that a name cannot
    resolve to one address for the check and to another for the connection.

    nameservers: addresses, with a port where it is not 53; none takes the system's
    """

    def __init__(self, rule: AddressRule, nameservers: Sequence[str] = ()) -> None:
        self._rule = rule
        self._resolver = aiodns.DNSResolver(list(nameservers) or None, timeout=_TIMEOUT, tries=_TRIES)
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._known: OrderedDict[str, tuple[float, list[ResolveResult] | str]] = OrderedDict()
        self._asking: dict[str, asyncio.Task[list[ResolveResult] | str]] = {}

    async def look_up(self, host: str) -> list[ResolveResult]:
        """Returns the addresses of `host`. Raises NoAddressError where it has none, PrivateAddressError where every
        one is refused."""
        found = _written_out(host) or self._recall(host)
        if found is None:
            asking = self._asking.get(host)
            if asking is None:  # one question, however many rows wait for its answer
                asking = self._asking[host] = asyncio.create_task(self._ask(host))
                asking.add_done_callback(lambda _: self._asking.pop(host, None))
            found = await asyncio.shield(asking)
        if isinstance(found, str):
            raise NoAddressError(f"{host}: {found}")
        allowed = [result for result in found if self._rule.allows(result["host"])]
        if not allowed:
            raise PrivateAddressError(f"{host} has only private addresses")
        return allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Does what `look_up` does, as aiohttp asks for it."""
        found = await self.look_up(host)
        return [{**result, "port": port} for result in found]

    async def close(self) -> None:
        for asking in list(self._asking.values()):
            asking.cancel()
        await self._resolver.close()

    def _recall(self, host: str) -> list[ResolveResult] | str | None:
        expires, found = self._known.get(host, (-math.inf, ""))
        return found if expires > time.monotonic() else None

    async def _ask(self, host: str) -> list[ResolveResult] | str:
        async with self._turns:
            try:
                async with asyncio.timeout(_LONGEST):
                    answer = await self._resolver.getaddrinfo(host, family=socket.AF_UNSPEC, type=socket.SOCK_STREAM)
            except aiodns.error.DNSError as error:
                found: list[ResolveResult] | str = str(error.args[-1])
            except TimeoutError:
                found = "no name server answers in time"
            except (UnicodeError, ValueError) as error:  # a name that cannot be asked for
                found = str(error)
            else:
                found = [_result(host, node.family, node.addr[0]) for node in answer.nodes] or "no address"
        self._known[host] = (time.monotonic() + _KEPT_SECONDS, found)
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return found


def _written_out(host: str) -> list[ResolveResult] | None:
    """Returns the address that `host` itself is, in any notation that the system takes (0x7f000001, 127.1)."""
    try:
        return [_result(host, socket.AF_INET, socket.inet_ntoa(socket.inet_aton(host)))]
    except (OSError, UnicodeError):
        return None


def _result(host: str, family: int, address: bytes | str) -> ResolveResult:
    text = address.decode("ascii") if isinstance(address, bytes) else address
    return {"hostname": host, "host": text, "port": 0, "family": family, "proto": 0, "flags": _NUMERIC}
