"""Two thousand URLs of a web that misbehaves in every way we know: rows in = packed + rejected, each for its reason."""

import asyncio
import gzip
import hashlib
import importlib.util
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest
from aiohttp import web

from data_pipeline.format import read_manifest, read_sidecar
from data_pipeline.preparation import WebRules, fetch, verify
from data_pipeline.preparation.fetching.addresses import AddressRule, PrivateAddressError
from data_pipeline.preparation.fetching.hosts import Hosts, Table
from data_pipeline.preparation.fetching.names import Names, NoAddressError
from data_pipeline.preparation.fetching.robots import parse_robots
from data_pipeline.preparation.fetching.spill import Spill
from data_pipeline.preparation.fetching.turns import ByteBudget, Turns
from data_pipeline.preparation.packing.samples import Sample


class NameServer:
    """Answers A questions over UDP: `n7.*` is 127.0.0.7, `inner.*` 10.0.0.1, `gone.*` does not exist, `dead.*` gets no
    answer. `asked` counts questions by name."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                question, sender = self._socket.recvfrom(4096)
            except OSError:
                return
            labels, position = [], 12
            while question[position]:
                labels.append(question[position + 1 : position + 1 + question[position]].decode())
                position += 1 + question[position]
            (kind,) = struct.unpack(">H", question[position + 1 : position + 3])
            asked, name = question[12 : position + 5], labels[0].lower()
            self.asked[".".join(labels).lower()] += 1
            if name.startswith("dead"):
                continue
            missing = name.startswith("gone")
            address = "10.0.0.1" if name.startswith("inner") else f"127.0.0.{name[1:]}" if name[1:].isdigit() else ""
            answer = b""
            if kind == 1 and address and not missing:
                answer = b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 60, 4) + socket.inet_aton(address)
            flags = 0x8183 if missing else 0x8180
            head = question[:2] + struct.pack(">HHHHH", flags, 1, 1 if answer else 0, 0, 0)
            self._socket.sendto(head + asked + answer, sender)


@pytest.fixture
def names() -> Iterator[NameServer]:
    with closing(NameServer()) as server:
        yield server


@pytest.fixture
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bad_site", Path(__file__).with_name("site.py"))
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def bad_site(module: ModuleType, picture: Callable, encode: Callable) -> Iterator[object]:
    class BadSite(module.Site):
        """Host n240 and above is silent; n230 forbids by robots.txt, n231 cannot tell its rules."""

        async def answer(self, request: web.Request) -> web.StreamResponse:
            number = int(request.host.partition(".")[0].removeprefix("n") or 0) if request.host.startswith("n") else 0
            if number >= 240:
                await asyncio.sleep(3600)
            if request.path == "/robots.txt":
                self.asked[request.path] += 1
                return (
                    web.Response(status=500)
                    if number == 231
                    else web.Response(text="User-agent: *\nDisallow: /\n" if number == 230 else "")
                )
            return await super().answer(request)

        async def _act(self, request: web.Request, what: str) -> web.StreamResponse:
            if what == "gzipped":
                return web.Response(body=gzip.compress(self.image), headers={"Content-Encoding": "gzip"})
            if what == "short":  # promises more than it sends
                response = web.StreamResponse(headers={"Content-Length": str(len(self.image) + 1000)})
                await response.prepare(request)
                await response.write(self.image)
                request.transport.abort()
                return response
            if what == "garbage":
                request.transport.write(b"\x00\xffthis is no HTTP\r\n\r\n")
                request.transport.close()
                return web.Response()
            if what == "headers":
                return web.Response(headers={"X-Long": "x" * 100_000})
            if what == "claims":
                response = web.StreamResponse(headers={"Content-Length": "9000000000"})
                await response.prepare(request)
                return response
            if what == "heic":
                return web.Response(body=b"\0\0\0\x1cftypheic" + bytes(64))
            if what == "nomark":
                return web.Response(body=self.image[:-2])
            return await super()._act(request, what)

    with module.running(BadSite(encode(picture(0))), "0.0.0.0") as running:
        yield running


BOMB = "89504e470d0a1a0a0000000d49484452" + "0000ea60" * 2 + "0802000000"
# What is asked for (the number is put for `#`), and what becomes of it; hosts are h0 to h199 unless given.
WAYS = [
    ("/status/404/#", "http_404"), ("/status/410/#", "http_410"), ("/status/403/#", "http_403"),
    ("/status/503/#", "http_503"), ("/status/418/#", "http_418"), ("/html/#", "not_an_image"),
    ("/empty/#", "image_empty"), ("/cut/#", "image_truncated"), ("/large/#", "too_large"),
    ("/claims/#", "too_large"), ("/endless/#", "too_large"), (f"/body/#?hex={BOMB}", "too_many_pixels"),
    ("/body/#?hex=ffd8ffe000104a46", "image_truncated"), ("/gzipped/#", "not_an_image"),
    ("/heic/#", "format_unsupported"), ("/reset/#", "connection_failed"), ("/short/#", "connection_failed"),
    ("/garbage/#", "connection_failed"), ("/headers/#", "connection_failed"), ("/loop/#", "too_many_redirects"),
    ("/lost/#", "url_invalid"), ("/redirect/#?to=http://169.254.169.254/", "address_private"),
    ("/redirect/#?to=file:///etc/passwd", "url_invalid"), ("/tag/#?value=noai", "opted_out"),
    ("/tdm/#", "opted_out"), ("/flaky/#", ""), ("/redirect/#?to=/ok/#", ""), ("/nomark/#", "end_marker_added"),
    ("http://inner.test/#", "address_private"), ("http://gone#.test/x", "dns_failed"),
    ("http://[::1]/#", "address_private"), ("http://n230.test/#", "robots_denied"),
    ("http://n231.test/#", "robots_unavailable"), ("ftp://n1.test/#", "url_invalid"),
    ("https://n1.test/#", "tls_failed"), ("", "url_missing"), ("http://n1.test:1/#", "connection_failed"),
]  # fmt: skip


def test_two_thousand_rows_of_a_bad_web_are_packed_or_rejected_for_their_reason(
    bad_site, names: NameServer, tmp_path: Path
) -> None:
    rows: list[tuple[str, str]] = []
    for number in range(2000):
        if number % 100 == 50:  # one in a hundred: a host that takes connections and never says a word
            url, reason = f"http://n{240 + number // 100 % 5}.test/{number}", "timeout"
        elif number % 200 == 75:
            url, reason = f"http://dead{number}.test/x", "dns_failed"
        elif number % 5 == 3:
            url, reason = WAYS[number // 5 % len(WAYS)]
            url = url.replace("#", str(number))
        else:
            url, reason = f"/ok/{number}", ""
        url = f"http://n{1 + 7 * number % 200}.test{url}" if url.startswith("/") else url
        host = url.removeprefix("https://").removeprefix("http://").partition("/")[0]
        if ".test" in host and ":" not in host and not url.startswith("ftp"):
            url = url.replace(host, f"{host}:{bad_site.port}", 1)
        rows.append((url, reason))
    table = tmp_path / "urls.csv"
    digest = hashlib.sha256(bad_site.image).hexdigest()
    lines = [f'"{url}",{digest if number % 5 == 0 else ""}\n' for number, (url, _) in enumerate(rows)]
    lines[0] = f'"{rows[0][0]}",{"0" * 64}\n'
    rows[0] = (rows[0][0], "hash_mismatch")
    table.write_text("url,sha256\n" + "".join(lines))
    rules = WebRules(
        private_networks=("127.0.0.0/8",),
        nameservers=(names.address,),
        deadline=60.0,
        read_timeout=8.0,
        attempts=3,
        backoff=0.05,
        max_bytes=200_000,
    )
    done = fetch(table, tmp_path / "set", web=rules, rows_per_shard=250, workers=1)
    manifest = read_manifest(tmp_path / "set")
    found = [row for entry in manifest.shards for row in read_sidecar(manifest.sidecar_path(entry)).to_pylist()]
    wrong = [(url, row["reason"]) for (url, reason), row in zip(rows, found, strict=True) if row["reason"] != reason]
    assert wrong == []
    assert done.rows == 2000 == done.packed + sum(done.rejected.values())
    assert [row["row"] for row in found] == list(range(2000))
    assert len({reason for _, reason in rows}) >= 20 and len(WAYS) >= 20
    assert max(count for name, count in names.asked.items() if name.startswith("dead")) <= 4  # two tries, A and AAAA
    assert verify(tmp_path / "set").sound
    assert not list((tmp_path / "set").glob(".*.spill"))


def test_dead_names_do_not_keep_live_ones_waiting(names: NameServer) -> None:
    async def run() -> list[object]:
        resolver = Names(AddressRule(("127.0.0.0/8",)), (names.address,))
        dead = [asyncio.create_task(resolver.look_up(f"dead{n}.test")) for n in range(200)]
        await asyncio.sleep(0.1)
        live = await asyncio.gather(*(resolver.look_up(f"n{n}.test") for n in range(1, 30)))
        waiting = sum(not task.done() for task in dead)
        with pytest.raises(NoAddressError):
            await resolver.look_up("gone.test")
        with pytest.raises(PrivateAddressError):
            await resolver.look_up("inner.test")
        failed = await asyncio.gather(*dead, return_exceptions=True)
        before = names.asked.total()
        await resolver.look_up("n7.test")
        with pytest.raises(NoAddressError):
            await resolver.look_up("dead7.test")  # kept, too: nobody is asked again
        assert names.asked.total() == before
        await resolver.close()
        assert all(isinstance(error, NoAddressError) for error in failed)
        return [waiting, [answer[0]["host"] for answer in live]]

    waiting, live = asyncio.run(run())
    assert waiting == 200 and live == [f"127.0.0.{n}" for n in range(1, 30)]


def test_tables_of_hosts_and_rules_are_bounded() -> None:
    table: Table[list[int]] = Table(list, lambda value: not value, kept=10)
    table.get("busy").append(1)
    for number in range(100):
        table.get(str(number))
    assert len(table) == 10 and table.get("busy") == [1]

    async def run() -> int:
        hosts = Hosts(per_host=4, failures=3, rest=60, max_wait=1)
        large = parse_robots("User-agent: *\n" + "Disallow: /xxxxxxxxxxxxxxxxxxxx\n" * 20_000, "bot")
        for number in range(300):
            hosts.keep_rules(hosts.server(f"http://h{number}"), large)
        return hosts.rules_kept

    assert asyncio.run(run()) <= 64_000_000


def test_a_server_that_does_not_answer_is_given_up_and_tried_again_after_its_rest() -> None:
    async def run() -> list[str]:
        hosts = Hosts(per_host=4, failures=3, rest=0.2, max_wait=1)
        seen = []
        for _ in range(3):
            seen.append(hosts.given_up("http://h"))
            hosts.failed("http://h", "timeout")
        seen.append(hosts.given_up("http://h"))
        await asyncio.sleep(0.25)
        seen.append(hosts.given_up("http://h"))
        hosts.failed("http://h", "connection_failed")
        seen.append(hosts.given_up("http://h"))
        await asyncio.sleep(0.25)
        hosts.answered("http://h")
        hosts.failed("http://h", "timeout")
        return [*seen, hosts.given_up("http://h")]

    assert asyncio.run(run()) == ["", "", "", "timeout", "", "connection_failed", ""]


def test_requests_that_wait_step_aside_and_their_number_is_bounded() -> None:
    async def run() -> tuple[int, int]:
        turns, running, most = Turns(2, patience=0.05), 0, 0

        async def one(seconds: float) -> None:
            nonlocal running, most
            async with turns.turn():
                running += 1
                most = max(most, running)
                await asyncio.sleep(seconds)
                running -= 1

        await asyncio.gather(*(one(0.001) for _ in range(50)))
        quick, most = most, 0
        await asyncio.gather(*(one(1.5) for _ in range(40)))
        return quick, most

    assert asyncio.run(run()) == (2, 2 + 8 * 2)


def test_held_bytes_are_bounded_and_nobody_starves() -> None:
    async def run() -> int:
        budget, held, most = ByteBudget(100), 0, 0

        async def one(count: int) -> None:
            nonlocal held, most
            got = await budget.acquire(count)
            held += got
            most = max(most, held)
            await asyncio.sleep(0)
            held -= got
            budget.release(got)

        await asyncio.gather(*(one(count) for count in [30, 70, 1000, 1, 99, 100] * 20))
        return most

    assert asyncio.run(run()) == 100


def test_a_spill_keeps_what_was_whole_and_drops_what_was_cut(tmp_path: Path) -> None:
    path = tmp_path / ".00000.spill"
    images = [bytes([n]) * (n + 1) for n in range(9)]
    samples = [
        Sample(row=n, image=image, sha256=hashlib.sha256(image).hexdigest()) if n % 3 else Sample(n, reason="timeout")
        for n, image in enumerate(images)
    ]
    spill = Spill(path, fresh=True)
    for sample in samples:
        spill.add(sample)
    spill.close(done=False)
    whole = path.read_bytes()
    for cut in [*range(0, len(whole), 13), len(whole) - 1, len(whole)]:
        path.write_bytes(whole[:cut] + (bytes(40) if cut % 2 else b""))
        spill = Spill(path, fresh=False)
        there = [n for n in range(9) if n in spill]
        assert there == list(range(len(there))) and (len(there) == 9) == (cut == len(whole))
        assert list(spill.results(Sample(row=n) for n in there)) == samples[: len(there)]
        spill.close(done=False)
    for spoiled, row in ((50, 0), (len(whole) - 1, 8)):  # in the fields of the first row, in the image of the last one
        path.write_bytes(whole[:spoiled] + b"\xff" + whole[spoiled + 1 :])
        spill = Spill(path, fresh=False)
        assert [n for n in range(9) if n in spill] == list(range(row))
        spill.close(done=False)
    spill = Spill(path, fresh=False)
    spill.close(done=True)
    assert not path.exists()
    with pytest.raises(ValueError, match="closed"):
        spill.add(samples[0])


def test_a_full_disk_ends_every_row_before_it_ends_the_run(
    bad_site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "urls.txt").write_text("".join(bad_site.url(f"/ok/{n}\n") for n in range(60)))
    written: list[int] = []

    def full(spill: Spill, sample: Sample) -> None:
        written.append(sample.row)
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        add(spill, sample)

    add = Spill.add
    monkeypatch.setattr(Spill, "add", full)
    web_rules = WebRules(private_networks=("127.0.0.1/32",))
    with pytest.raises(OSError, match="No space left"):
        fetch(tmp_path / "urls.txt", tmp_path / "set", web=web_rules, rows_per_shard=30, workers=1)
    assert len(written) < 60
    monkeypatch.undo()
    bad_site.asked.clear()
    done = fetch(tmp_path / "urls.txt", tmp_path / "set", web=web_rules, rows_per_shard=30, workers=1)
    assert (done.packed, verify(tmp_path / "set").sound) == (60, True) and done.requests <= 60 - 4
