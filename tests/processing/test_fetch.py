"""Fetching, against a server on this machine: which is refused as long as its address is not declared public."""

import contextlib
import io
import socket
import threading
import time
import urllib.error
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from PIL import Image

from visualglm.errors import ImageError
from visualglm.processing import fetch as fetch_module
from visualglm.processing.image import ImageLimits, load_image


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4), (255, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    requests: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        Handler.requests.append(self.path)
        if self.path.startswith("/redirect?"):
            self.send_response(302)
            self.send_header("Location", self.path.partition("?")[2])
            self.end_headers()
        elif self.path == "/missing.png":
            self.send_error(404)
        elif self.path == "/page":
            self.answer(b"<html></html>", "text/html")
        elif self.path == "/slow.png":
            self.answer(b"", "image/png", length=100)
            for _ in range(20):
                time.sleep(0.1)
                self.wfile.write(b"x")
        elif self.path == "/slow-header.png":
            with contextlib.suppress(OSError):
                for byte in b"HTTP/1.0 200 OK\r\nContent-Type: image/png\r\n" + b"X-Long: " + b"x" * 30:
                    time.sleep(0.1)
                    self.wfile.write(bytes([byte]))
        elif self.path == "/endless.png":
            self.answer(b"", "image/png", length=None)
            self.wfile.write(bytes(10**6))
        elif self.path == "/cut.png":
            self.answer(png()[:-20], "image/png", length=len(png()))
        else:
            self.answer(png(), "image/png", length=len(png()))

    def answer(self, body: bytes, content_type: str, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing is written to the terminal."""


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what some tests are about."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with Server(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fetch_module.is_public
    monkeypatch.setattr(fetch_module, "is_public", lambda address: address == "127.0.0.1" or real(address))


def refusal(url: str, **limits: float) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(url, ImageLimits(**limits), allow_urls=True)
    return str(caught.value)


@pytest.mark.usefixtures("public")
def test_an_image_is_fetched_also_through_a_redirect(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert load_image(f"{server}/a.png", allow_urls=True).size == (8, 4)
    assert load_image(f"{server}/redirect?/a.png", allow_urls=True).size == (8, 4)


def test_private_addresses_are_refused_unasked(server):
    Handler.requests.clear()
    for url in (server, server.replace("127.0.0.1", "localhost"), server.replace("127.0.0.1", "[::ffff:127.0.0.1]")):
        assert "not a public address" in refusal(f"{url}/a.png")
    assert Handler.requests == []


@pytest.mark.usefixtures("public")
@pytest.mark.parametrize(
    "target",
    ["file:///etc/passwd", "ftp://127.0.0.1/a", "data:image/png;base64,AA", "http://127.0.0.2/", "http://10.0.0.1/"],
)
def test_redirects_elsewhere_are_refused(server, target):
    assert "was not fetched" in refusal(f"{server}/redirect?{target}")


@pytest.mark.usefixtures("public")
def test_what_goes_wrong_is_named(server):
    assert "HTTP 404" in refusal(f"{server}/missing.png")
    assert "text/html, not an image" in refusal(f"{server}/page")
    assert "50 bytes allowed" in refusal(f"{server}/a.png", max_bytes=50)
    assert "5000 bytes allowed" in refusal(f"{server}/endless.png", max_bytes=5000)
    assert "20 more expected" in refusal(f"{server}/cut.png")
    assert "was not fetched" in refusal("http://127.0.0.1:1/a.png")
    assert "was not fetched" in refusal("http:///a.png")
    assert "was not fetched" in refusal("http://a b/a.png")


@pytest.mark.usefixtures("public")
def test_a_slow_server_is_left(server):
    for path in ("slow.png", "slow-header.png"):
        start = time.monotonic()
        assert "no answer within 0.5 s" in refusal(f"{server}/{path}", fetch_seconds=0.5)
        assert time.monotonic() - start < 1.5


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_public_addresses(address, public):
    assert fetch_module.is_public(address) is public


@pytest.mark.parametrize(
    "url", [f"http://{'a' * 70}.example/a.png", "http://a..b/a.png", "http://a:b/", "http://[::1/a"]
)
def test_addresses_that_cannot_be(url: str):
    with pytest.raises(ImageError, match=r"was not fetched \(.*\); check the URL\.$") as caught:
        load_image(url, allow_urls=True)
    assert "codec" not in str(caught.value)


def test_the_reasons_of_the_system_are_told_without_its_numbers():
    reason = fetch_module._reason
    assert reason(urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))) == "its host is not known"
    assert reason(urllib.error.URLError(ConnectionRefusedError(111, "Connection refused"))) == "Connection refused"
