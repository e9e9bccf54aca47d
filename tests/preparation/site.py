"""A web server on 127.0.0.1 that behaves well, badly, and as it is told."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from aiohttp import web


class Site:
    """Serves `image` under many paths; `asked` counts requests by path, `most` is how many ran at one time."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        self.asked: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.robots: str | int = 404
        self.healed = False
        self.most = self._now = 0
        self.port = 0

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    async def answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        self.asked[path] += 1
        self.agents.add(request.headers.get("User-Agent", ""))
        if path == "/robots.txt":
            return web.Response(status=self.robots) if isinstance(self.robots, int) else web.Response(text=self.robots)
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            return await self._act(request, path.split("/")[1])
        finally:
            self._now -= 1

    async def _act(self, request: web.Request, what: str) -> web.StreamResponse:
        times = self.asked[request.path]
        image = web.Response(body=self.image, content_type="image/jpeg")
        if what in ("ok", "private", "public"):
            await asyncio.sleep(0.01)
            return image
        if what == "status":
            return image if self.healed else web.Response(status=int(request.path.split("/")[2]))
        if what == "flaky":
            return image if times > 2 else web.Response(status=500)
        if what == "busy":
            return image if times > 1 else web.Response(status=429, headers={"Retry-After": "1"})
        if what == "banned":
            return web.Response(status=429, headers={"Retry-After": "86400"})
        if what == "silent":
            await asyncio.sleep(20)
        if what == "tag":
            image.headers["X-Robots-Tag"] = request.query["value"]
        if what == "tdm":
            image.headers["TDM-Reservation"] = "1"
        if what == "html":
            return web.Response(text="<html>" + "x" * 5000, content_type="image/jpeg")
        if what == "empty":
            return web.Response(body=b"", content_type="image/jpeg")
        if what == "cut":
            return web.Response(body=self.image[: len(self.image) // 2])
        if what == "body":
            return web.Response(body=bytes.fromhex(request.query["hex"]))
        if what == "large":
            return web.Response(body=self.image + bytes(300_000))
        if what in ("endless", "drip"):
            return await self._stream(request, 65536 if what == "endless" else 20)
        if what == "redirect":
            return web.Response(status=302, headers={"Location": request.query["to"]})
        if what == "loop":
            return web.Response(status=302, headers={"Location": request.path})
        if what == "lost":
            return web.Response(status=302)
        if what == "reset":
            request.transport.abort()
        return image

    async def _stream(self, request: web.Request, step: int) -> web.StreamResponse:
        """The image, and then zeros without end (in small steps: slower than any deadline, faster than a time-out)."""
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(self.image[:step])
        with suppress(ConnectionError):  # the other side has had enough
            for _ in range(2000):
                await response.write(bytes(step))
                await asyncio.sleep(0 if step > 1000 else 0.05)
        return response


@contextmanager
def running(site: Site, address: str = "127.0.0.1") -> Iterator[Site]:
    """Serves from another thread until the block ends."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    stop: asyncio.Event | None = None

    async def serve() -> None:
        nonlocal stop
        stop = asyncio.Event()
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", site.answer)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        listener = web.TCPSite(runner, address, 0, backlog=1024)
        await listener.start()
        site.port = runner.addresses[0][1]
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield site
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
