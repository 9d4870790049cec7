"""Fetching an image over http(s) on somebody's behalf: public addresses only, a cap on size and on time."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import time
import urllib.error
import urllib.request
from typing import Any

from visualglm.errors import ImageError

_CHUNK = 2**16
_CONTENT_TYPES = ("image/", "application/octet-stream", "binary/octet-stream")


def fetch(url: str, max_bytes: int, max_seconds: float) -> bytes:
    """The body at an http(s) `url`; raises `ImageError` if it is too large, too slow, or not on the public Internet.

    Every redirect is held to the same rules. Proxies are not used: behind one the address could not be checked.
    """
    deadline = time.monotonic() + max_seconds
    try:
        with _opener().open(url, timeout=max_seconds) as response:
            _check_header(url, response.headers, max_bytes)
            return _read(url, response, max_bytes, deadline)
    except urllib.error.HTTPError as error:
        error.close()
        raise ImageError(f"The image at {url[:200]} was not fetched (HTTP {error.code}); check the URL.") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ImageError(f"The image at {url[:200]} was not fetched ({reason}); check the URL.") from error


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public Internet, also where IPv6 wraps an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    wrapped = (ip.ipv4_mapped, ip.sixtofour) if isinstance(ip, ipaddress.IPv6Address) else ()
    return all(each.is_global and not each.is_multicast for each in (ip, *wrapped) if each is not None)


def _check_header(url: str, headers: Any, max_bytes: int) -> None:
    content_type = headers.get_content_type()
    if not content_type.startswith(_CONTENT_TYPES):
        raise ImageError(f"The answer from {url[:200]} is {content_type}, not an image; check the URL.")
    length = headers.get("Content-Length", "0")
    if length.isdecimal() and int(length) > max_bytes:
        raise _too_large(url, max_bytes)


def _read(url: str, response: Any, max_bytes: int, deadline: float) -> bytes:
    body = bytearray()
    while chunk := response.read1(_CHUNK):
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(url, max_bytes)
        if time.monotonic() > deadline:
            raise TimeoutError("it took too long")
    return bytes(body)


def _too_large(url: str, max_bytes: int) -> ImageError:
    return ImageError(f"The image at {url[:200]} has more than the {max_bytes} bytes allowed; make it smaller.")


def _connect(host: str, port: int, timeout: float | None) -> socket.socket:
    """Connect to the very address that was checked, so that a second look-up cannot change it."""
    addresses = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    refused = [address for address in addresses if not is_public(address)]
    if refused:
        raise OSError(f"{host} is at {refused[0]}, which is not a public address")
    for address in addresses[:-1]:
        with contextlib.suppress(OSError):
            return socket.create_connection((address, port), timeout)
    return socket.create_connection((addresses[-1], port), timeout)


class _HTTPConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = _connect(self.host, self.port, self.timeout)


class _HTTPSConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        plain = _connect(self.host, self.port, self.timeout)
        self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)


class _HTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HTTPConnection, request)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HTTPSConnection, request)


def _opener() -> urllib.request.OpenerDirector:
    """Of urllib's handlers only those of http and https: no file:, ftp: or data:, also after a redirect."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        _HTTPHandler,
        _HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener
