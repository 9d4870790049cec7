"""Fetching an image over http(s) on somebody's behalf: public addresses only, a cap on size and on time."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from typing import Any

from visualglm.errors import ImageError

_CHUNK = 2**16
_CONTENT_TYPES = ("image/", "application/octet-stream", "binary/octet-stream")


def fetch(url: str, max_bytes: int, max_seconds: float) -> bytes:
    """The body at an http(s) `url`; raises `ImageError` if it is too large, too slow, or not on the public Internet.

    Every redirect is held to the same rules. Proxies are not used: behind one the address could not be checked.
    """
    deadline = time.monotonic() + max_seconds
    connections = _Connections()
    hang_up = threading.Timer(max_seconds, connections.hang_up)
    hang_up.daemon = True
    hang_up.start()
    try:
        with _opener(connections).open(url, timeout=max_seconds) as response:
            body = _read(url, response, max_bytes)
        if time.monotonic() >= deadline:
            raise TimeoutError
        return body
    except urllib.error.HTTPError as error:
        error.close()
        raise ImageError(f"The image at {url[:200]} was not fetched (HTTP {error.code}); check the URL.") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        late = time.monotonic() >= deadline
        reason = f"no answer within {max_seconds:g} s" if late else _reason(error)
        raise ImageError(f"The image at {url[:200]} was not fetched ({reason}); check the URL.") from error
    finally:
        hang_up.cancel()


def _reason(error: Exception) -> object:
    """What went wrong, without the numbers and the codecs of the system."""
    cause = getattr(error, "reason", error)
    if isinstance(error, UnicodeError):
        return "its host or its path is not one of the Internet"
    if isinstance(cause, socket.gaierror):
        return "its host is not known"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return cause


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public Internet, also where IPv6 wraps an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    wrapped = (ip.ipv4_mapped, ip.sixtofour) if isinstance(ip, ipaddress.IPv6Address) else ()
    return all(each.is_global and not each.is_multicast for each in (ip, *wrapped) if each is not None)


def _read(url: str, response: Any, max_bytes: int) -> bytes:
    content_type = response.headers.get_content_type()
    if not content_type.startswith(_CONTENT_TYPES):
        raise ImageError(f"The answer from {url[:200]} is {content_type}, not an image; check the URL.")
    body = bytearray()
    while chunk := response.read1(_CHUNK):
        body += chunk
        if len(body) + (response.length or 0) > max_bytes:
            raise ImageError(f"The image at {url[:200]} has more than the {max_bytes} bytes allowed; make it smaller.")
    if response.length:
        raise http.client.IncompleteRead(bytes(body), response.length)
    return bytes(body)


class _Connections:
    """The sockets of one fetch, so that a timer can end them however slowly the other side writes."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        self._late = False

    def connect(self, host: str, port: int, timeout: float | None) -> socket.socket:
        """Connect to the very address that was checked, so that a second look-up cannot change it."""
        addresses = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        refused = [address for address in addresses if not is_public(address)]
        if refused:
            raise OSError(f"{host} is at {refused[0]}, which is not a public address")
        for address in addresses[:-1]:
            with contextlib.suppress(OSError):
                return self.keep(socket.create_connection((address, port), timeout))
        return self.keep(socket.create_connection((addresses[-1], port), timeout))

    def keep(self, opened: socket.socket) -> socket.socket:
        self._sockets.append(opened)
        if self._late:
            self.hang_up()
        return opened

    def hang_up(self) -> None:
        self._late = True
        for opened in self._sockets:
            with contextlib.suppress(OSError):
                # Not SSLSocket.shutdown: that would go on in plain text.
                socket.socket.shutdown(opened, socket.SHUT_RDWR)


class _HTTPConnection(http.client.HTTPConnection):
    def __init__(self, connections: _Connections, host: str, **arguments: Any) -> None:
        super().__init__(host, **arguments)
        self._connections = connections

    def connect(self) -> None:
        self.sock = self._connections.connect(self.host, self.port, self.timeout)


class _HTTPSConnection(_HTTPConnection):
    default_port = http.client.HTTPS_PORT

    def connect(self) -> None:
        super().connect()
        context = ssl.create_default_context()
        secure = context.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
        self.sock = self._connections.keep(secure)
        secure.do_handshake()


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def __init__(self, connections: _Connections) -> None:
        super().__init__()
        self._connections = connections

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_HTTPConnection, self._connections), request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_HTTPSConnection, self._connections), request)


def _opener(connections: _Connections) -> urllib.request.OpenerDirector:
    """Of urllib's handlers only those of http and https: no file:, ftp: or data:, also after a redirect."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        _Handler(connections),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener
