"""URLs reach the server as they stand in the table."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.preparation import WebRules, fetch
from data_pipeline.preparation.fetching.urls import join_url, parse_url


@pytest.mark.parametrize(
    "url",
    [
        "http://h/a%2Fb/%7Euser/x.jpg?X-Amz-Signature=ab%2Bcd%2f%3D&list=1,2;3&q=a+b%20c",
        "http://h:8080/a/../b/./c//d?x=%zz".replace("%zz", "%7a"),
        "https://u:p@h/(x)!'*$&=@:[1]",
        "http://h/?",
        "http://h/%e7%8c%ab",
    ],
)
def test_a_valid_url_stays_as_it_is(url: str) -> None:
    assert str(parse_url(url)) == url.removesuffix("?")


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        (" http://h/a b\tc ", "http://h/a%20b%09c"),
        ("http://h/100%/50%2x", "http://h/100%25/50%252x"),
        ('http://h/猫?q="é|^`{}<>\\', "http://h/%E7%8C%AB?q=%22%C3%A9%7C%5E%60%7B%7D%3C%3E%5C"),
        ("HTTP://Münch.example/x#part", "http://xn--mnch-0ra.example/x"),
        ("http://h", "http://h/"),
        ("http://h?x=1", "http://h/?x=1"),
        ("http://[::1]:80/x", "http://[::1]:80/x"),
    ],
)
def test_only_what_no_url_may_hold_is_quoted(url: str, sent: str) -> None:
    assert str(parse_url(url)).replace("[::1]/", "[::1]:80/") == sent


@pytest.mark.parametrize(
    "url", ["", "x.jpg", "ftp://h/x", "http:///x", "http://", "http://h:x/", "file:///etc/passwd", "http://a b/"]
)
def test_what_is_no_web_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        parse_url(url)


def test_redirects_are_spelled_by_their_server() -> None:
    base = parse_url("http://h/a/b?c")
    found = ["/x?s=%2B%2f", "y%2B", "?q=%3D", "//o/z", "https://o/%2B/../w", "b c"]
    assert [str(join_url(base, one)) for one in found] == [
        "http://h/x?s=%2B%2f", "http://h/a/y%2B", "http://h/a/b?q=%3D", "http://o/z", "https://o/%2B/../w", "http://h/a/b%20c",
    ]  # fmt: skip


@pytest.fixture
def raw_server() -> Iterator[tuple[int, list[bytes]]]:
    """Keeps the request lines that arrive; redirects every path that begins with /r to /s%2Bt/../u%2f?v=%3D."""
    lines: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                request = connection.recv(65536)
                lines.append(request.split(b"\r\n")[0])
                location = b"Location: /s%2Bt/../u%2f?v=%3D\r\n" if request.startswith(b"GET /r") else b""
                status = b"302 Found" if location else b"404 Not Found"
                connection.sendall(
                    b"HTTP/1.1 %s\r\n%sContent-Length: 0\r\nConnection: close\r\n\r\n" % (status, location)
                )

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield server.getsockname()[1], lines
    server.close()


def test_a_signed_url_reaches_the_server_byte_for_byte(raw_server: tuple[int, list[bytes]], tmp_path: Path) -> None:
    port, lines = raw_server
    paths = ["/a%2Fb?X-Amz-Signature=ab%2Bcd%2f%3D&q=a+b", "/r%7E", "/b c"]
    (tmp_path / "t.txt").write_text("".join(f"http://127.0.0.1:{port}{path}\n" for path in paths))
    web = WebRules(private_networks=("127.0.0.1/32",), respect_robots=False, attempts=1)
    fetch(tmp_path / "t.txt", tmp_path / "set", web=web, workers=1)
    sent = {line.split()[1].decode() for line in lines}
    assert sent == {paths[0], "/r%7E", "/s%2Bt/../u%2f?v=%3D", "/b%20c"}
