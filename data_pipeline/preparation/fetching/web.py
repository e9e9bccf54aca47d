"""Fetches one URL politely and within bounds; returns its bytes, or the reason why there are none."""

import asyncio
import math
import random
import resource
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import aiohttp
from yarl import URL

from data_pipeline.errors import UserError
from data_pipeline.format.image_header import is_image, read_image_header
from data_pipeline.format.reasons import EMPTY_IMAGE
from data_pipeline.preparation.fetching import robots
from data_pipeline.preparation.fetching.addresses import AddressRule, PrivateAddressError
from data_pipeline.preparation.fetching.hosts import Host, Hosts, Server
from data_pipeline.preparation.fetching.names import Names, NoAddressError
from data_pipeline.preparation.fetching.robots import Robots, opted_out, retry_after
from data_pipeline.preparation.fetching.shared import SharedHosts
from data_pipeline.preparation.fetching.turns import ByteBudget, Turns
from data_pipeline.preparation.fetching.urls import join_url, parse_url
from data_pipeline.preparation.packing.rules import ImageRules, no_image_reason, size_refused

URL_MISSING = "url_missing"
URL_INVALID = "url_invalid"
ADDRESS_PRIVATE = "address_private"
ROBOTS_DENIED = "robots_denied"
ROBOTS_UNAVAILABLE = "robots_unavailable"  # the server failed to say what it allows, so it allows nothing
OPTED_OUT = "opted_out"
TIMEOUT = "timeout"
CONNECTION_FAILED = "connection_failed"
NO_ADDRESS = "dns_failed"
TLS_FAILED = "tls_failed"
TOO_LARGE = "too_large"
TOO_MANY_REDIRECTS = "too_many_redirects"

_REDIRECT = (301, 302, 303, 307, 308)
_REDIRECTS = 5  # at most, of one URL; RFC 9309 asks for as many for robots.txt
_HEAD_BYTES = 1 << 20  # within which the size of a picture is looked for before it is there in full
_BUFFER_BYTES = 1 << 17  # of a connection; twice as many stop it until they are read, which most pictures need not
_IDLE_SECONDS = 2.0  # that an unused connection is kept: a list of many hosts leaves many behind
_AGAIN = {TIMEOUT, CONNECTION_FAILED, *(f"http_{status}" for status in (408, 425, 429, 500, 502, 503, 504))}


@dataclass(frozen=True)
class WebRules:
    """Limits on the use of the network.

    user_agent: names the program and how to reach who runs it; its first word (product token) is what robots.txt knows
    deadline: seconds that one attempt may take in all, redirects included; connect_timeout, read_timeout: of its parts
    attempts: tries of one URL; after a failure that may pass, waits backoff * 2**n seconds, +-50 % by chance
    max_wait: longest Retry-After that is waited for; a host that asks for more is given up for this run
    private_networks: networks in CIDR notation that may be connected to although they are not public
    nameservers: addresses of name servers, with a port where it is not 53; none takes the system's
    patience: seconds after which a request that waits for its server leaves its place to another; up to eight times
        `connections` wait so
    host_failures, host_rest: a server that has failed to answer so often in a row is not asked for so many seconds;
        its rows get the reason of its last failure
    memory: bytes of images that are held at a time
    """

    user_agent: str = "internimage-pretrain/0.1 (image-text data set fetcher)"
    connections: int = 64
    per_host: int = 4
    deadline: float = 30.0
    connect_timeout: float = 10.0
    read_timeout: float = 10.0
    max_bytes: int = 20_000_000
    attempts: int = 3
    backoff: float = 1.0
    max_wait: float = 60.0
    respect_robots: bool = True
    respect_opt_out: bool = True  # X-Robots-Tag noai, noimageai; TDM-Reservation
    private_networks: tuple[str, ...] = ()
    nameservers: tuple[str, ...] = ()
    patience: float = 1.0
    host_failures: int = 10
    host_rest: float = 300.0
    memory: int = 512_000_000

    def __post_init__(self) -> None:
        positive = ("connections", "per_host", "deadline", "connect_timeout", "read_timeout", "max_bytes", "attempts")
        for name in (*positive, "patience", "host_failures", "memory"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} {getattr(self, name)}: must be above zero")
        AddressRule(self.private_networks)  # raises for a wrong network before the first request
        if not self.user_agent.strip():
            raise UserError("user_agent is empty: name the program and how to reach who runs it")

    @property
    def token(self) -> str:
        return self.user_agent.split("/")[0].split()[0]


class Fetched(NamedTuple):
    """Bytes of a URL, or the reason why there are none. `asked` counts requests, `wait` is the server's Retry-After."""

    data: bytes | None
    reason: str = ""
    asked: int = 1
    wait: float = 0.0
    held: int = 0  # bytes of memory that count as held for `data`
    width: int | None = None
    height: int | None = None


class Web:
    """A session: connections, hosts, robots.txt files. `async with Web(rules, images) as web: await web.fetch(url)`.

    shared: what the tasks of a run know together."""

    def __init__(self, rules: WebRules, images: ImageRules, shared: SharedHosts | None = None) -> None:
        self.rules = rules
        self._images = images
        self._addresses = AddressRule(rules.private_networks)
        self._hosts = Hosts(rules.per_host, rules.host_failures, rules.host_rest, rules.max_wait, shared)
        self._turns = Turns(rules.connections, rules.patience)
        self._held = ByteBudget(rules.memory)
        self._chance = random.Random()  # only moves retries in time; no result depends on it

    async def __aenter__(self) -> "Web":
        _allow_sockets()
        self._names = Names(self._addresses, self.rules.nameservers)
        connector = aiohttp.TCPConnector(
            limit=0, resolver=self._names, use_dns_cache=False, keepalive_timeout=_IDLE_SECONDS
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers={"User-Agent": self.rules.user_agent, "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=self.rules.connect_timeout, sock_read=self.rules.read_timeout
            ),
            read_bufsize=_BUFFER_BYTES,
            auto_decompress=False,  # a compressed answer could be a bomb, and images do not compress
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        await self._names.close()

    async def fetch(self, url: str | None) -> Fetched:
        """Fetches an image, with as many tries as the rules allow. Its bytes count as held until `release`."""
        if not url:
            return Fetched(None, URL_MISSING, asked=0)
        asked = 0
        for attempt in range(self.rules.attempts):
            result = await self._attempt(url)
            asked += result.asked
            last = attempt + 1 == self.rules.attempts
            if result.reason not in _AGAIN or last or result.wait > self.rules.max_wait:
                break
            pause = self.rules.backoff * 2**attempt * self._chance.uniform(0.5, 1.5)
            await asyncio.sleep(max(pause, result.wait))
        return result._replace(asked=asked)

    def release(self, found: Fetched) -> None:
        """Says that the bytes of an image are held no longer."""
        self._held.release(found.held)

    async def _attempt(self, url: str) -> Fetched:
        try:
            target = parse_url(url)
        except ValueError:
            return Fetched(None, URL_INVALID, asked=0)
        asked, left = 0, self.rules.deadline
        try:
            for _ in range(_REDIRECTS + 1):
                if (reason := self._refused(target)) is not None:
                    return Fetched(None, reason, asked)
                origin = str(target.origin())
                if self.rules.respect_robots and (reason := await self._robots(target, origin)) is not None:
                    return Fetched(None, reason, asked, wait=math.inf if reason in _AGAIN else 0.0)
                async with self._hosts.slot(target.host or "") as host:
                    if host.not_before - time.monotonic() > self.rules.max_wait:
                        return Fetched(None, "http_429", asked, wait=math.inf)
                    asked += 1
                    loop = asyncio.get_running_loop()
                    async with self._request(target, origin, left) as (answer, clock):
                        if answer.status not in _REDIRECT:
                            return (await self._read(answer, host, clock))._replace(asked=asked)
                        location = answer.headers.get("Location", "")
                        left = max(0.0, (clock.when() or 0.0) - loop.time())
                if not location:
                    return Fetched(None, URL_INVALID, asked)
                target = join_url(target, location)
            return Fetched(None, TOO_MANY_REDIRECTS, asked)
        except _SilentError as error:
            return Fetched(None, error.reason, max(0, asked - 1), wait=math.inf)
        except ValueError:  # a Location that is no URL
            return Fetched(None, URL_INVALID, asked)
        except (aiohttp.ClientError, TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            return Fetched(None, _why(error), asked)

    @asynccontextmanager
    async def _request(
        self, url: URL, origin: str, seconds: float
    ) -> AsyncIterator[tuple[aiohttp.ClientResponse, asyncio.Timeout]]:
        """Asks for `url` when it is its turn. The name is resolved first; from then on the clock runs.

        Raises _SilentError for a server that has not answered too often, and what aiohttp and `Names` raise.
        """
        host = url.host or ""
        if not _looks_like_address(host):
            await self._names.look_up(host)
        if reason := self._hosts.given_up(origin):
            raise _SilentError(reason)
        async with self._turns.turn():
            try:
                async with asyncio.timeout(seconds) as clock, self._session.get(url, allow_redirects=False) as answer:
                    self._hosts.answered(origin)
                    yield answer, clock
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                if (reason := _why(error)) in (TIMEOUT, CONNECTION_FAILED):
                    self._hosts.failed(origin, reason)
                raise

    def _refused(self, url: URL) -> str | None:
        """Returns the reason not to request a URL. Names are checked when they are resolved, addresses here."""
        if url.scheme not in ("http", "https") or not url.host:
            return URL_INVALID
        return ADDRESS_PRIVATE if _looks_like_address(url.host) and not self._addresses.allows(url.host) else None

    async def _read(self, answer: aiohttp.ClientResponse, host: Host, clock: asyncio.Timeout) -> Fetched:
        """Reads the body, as long as headers and first bytes promise an image within bounds."""
        if answer.status != 200:
            wait = retry_after(answer.headers)
            if wait and answer.status in (429, 503):
                host.not_before = max(host.not_before, time.monotonic() + wait)
            return Fetched(None, f"http_{answer.status}", wait=wait)
        if self.rules.respect_opt_out and opted_out(answer.headers, self.rules.token):
            return Fetched(None, OPTED_OUT)
        if answer.content_length is not None and answer.content_length > self.rules.max_bytes:
            return Fetched(None, TOO_LARGE)
        held = await self._hold(answer.content_length or self.rules.max_bytes, clock)
        found: Fetched | None = None
        try:
            found = await self._body(answer)
        finally:
            kept = 0 if found is None or found.data is None else min(held, len(found.data))
            self._held.release(held - kept)
        return found._replace(held=kept)

    async def _hold(self, count: int, clock: asyncio.Timeout) -> int:
        """Waits until `count` bytes may be held. That is no fault of the server: its clock stands meanwhile."""
        loop = asyncio.get_running_loop()
        left = (clock.when() or loop.time()) - loop.time()
        clock.reschedule(None)
        held = await self._held.acquire(count)
        clock.reschedule(loop.time() + max(0.0, left))
        return held

    async def _body(self, answer: aiohttp.ClientResponse) -> Fetched:
        chunks: list[bytes] = []
        size, sized, head = 0, False, b""
        async for chunk in answer.content.iter_any():
            chunks.append(chunk)
            size += len(chunk)
            if size > self.rules.max_bytes:
                return Fetched(None, TOO_LARGE)
            if sized:
                continue
            head += chunk
            if size >= 16:
                if not is_image(head):
                    return Fetched(None, no_image_reason(head))
                header = read_image_header(head)
                sized = header is not None or size > _HEAD_BYTES
                refused = None if header is None else size_refused(header, self._images)
                if refused is not None:
                    return Fetched(None, refused.reason, width=refused.width, height=refused.height)
        return Fetched(b"".join(chunks)) if size else Fetched(None, EMPTY_IMAGE)

    async def _robots(self, url: URL, origin: str) -> str | None:
        """Returns the reason why robots.txt forbids `url`, None where it does not. Reads each server's file once.

        A file that cannot be read for want of a connection forbids too (RFC 9309, section 2.3.1.4): that error is
        raised, and the next attempt asks again.
        """
        server = self._hosts.server(origin)
        reading = server.robots
        if reading is None:
            if reason := self._hosts.given_up(origin):
                return reason
            read = partial(self._read_robots, url.origin() / "robots.txt")
            reading = server.robots = asyncio.create_task(self._hosts.robots_of(origin, read))
            reading.add_done_callback(lambda task: self._weigh(server, task))
        try:
            found = await asyncio.shield(reading)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            if server.robots is reading:
                server.robots = None
            raise
        if found is robots.NOTHING:
            return ROBOTS_UNAVAILABLE
        return None if found.allows(url.raw_path_qs) else ROBOTS_DENIED

    def _weigh(self, server: Server, reading: asyncio.Task[Robots]) -> None:
        if not reading.cancelled() and reading.exception() is None:
            self._hosts.keep_rules(server, reading.result())

    async def _read_robots(self, url: URL) -> Robots:
        """Reads robots.txt (RFC 9309, section 2.3.1): a missing file allows all, a failing server forbids all."""
        for _ in range(_REDIRECTS + 1):
            if self._refused(url) is not None:
                raise PrivateAddressError(f"{url} is not a public address")
            request = self._request(url, str(url.origin()), self.rules.deadline)
            async with self._hosts.slot(url.host or ""), request as (answer, _clock):
                if answer.status in _REDIRECT and "Location" in answer.headers:
                    url = join_url(url, answer.headers["Location"])
                    continue
                if answer.status >= 500 or answer.status == 429:
                    return robots.NOTHING
                if answer.status != 200:
                    return robots.EVERYTHING
                body = bytearray()
                async for chunk in answer.content.iter_any():
                    body += chunk
                    if len(body) > robots.MAX_BYTES:
                        break
                return robots.parse_robots(body[: robots.MAX_BYTES].decode("utf-8", "replace"), self.rules.token)
        return robots.EVERYTHING


class _SilentError(OSError):
    """A server is not asked, because it has failed to answer too often."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _looks_like_address(host: str) -> bool:
    """Tells whether a host is an address, in any notation that a resolver takes (0x7f000001, 127.1)."""
    return ":" in host or host.replace(".", "").isdigit()


def _allow_sockets() -> None:
    """Lets this process have as many sockets as its administrator allows; the usual soft limit of 1,024 is for old
    programs that use select()."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if most == resource.RLIM_INFINITY else min(most, 65_536)
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _why(error: BaseException) -> str:
    """Returns the reason that a network error stands for."""
    inner = getattr(error, "os_error", None) or error.__cause__
    if isinstance(error, PrivateAddressError) or isinstance(inner, PrivateAddressError):
        return ADDRESS_PRIVATE
    if isinstance(error, NoAddressError) or isinstance(inner, NoAddressError):
        return NO_ADDRESS
    if isinstance(error, _SilentError):
        return error.reason
    if isinstance(error, TimeoutError):
        return TIMEOUT
    if isinstance(error, aiohttp.ClientSSLError):
        return TLS_FAILED
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return NO_ADDRESS
    if isinstance(error, aiohttp.InvalidURL):
        return URL_INVALID
    return CONNECTION_FAILED
