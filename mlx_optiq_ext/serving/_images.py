"""Images that requests name by a URL: what is fetched, from where, and how much.

A server that fetches what it is told to can be turned against the network it is in. So
nothing is fetched unless the server was started for it, nothing comes from an address
that is not public, and a client never learns why an image could not be had.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import ipaddress
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from ._errors import APIError, bad_request

Message = dict[str, Any]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# The limits for all images of a request together.
MAX_BYTES = 20 << 20
MAX_SECONDS = 20.0
MAX_REDIRECTS = 3

PORTS = {"http": 80, "https": 443}
# An IPv6 address of this network stands for the IPv4 address in its last 32 bits.
NAT64 = ipaddress.ip_network("64:ff9b::/96")

NOT_ALLOWED = (
    "images are taken as data: URLs only: this server was started without "
    "--allow-remote-images"
)
FAILED = "an image could not be fetched"
UNREADABLE = "an image could not be read"


class FetchError(Exception):
    """An image cannot be had. The reason is for the log of the server alone."""


def has_images(messages: list[Message]) -> bool:
    return any(True for _ in _image_parts(messages))


def has_remote_images(messages: list[Message]) -> bool:
    """Whether any image is named by something else than its own bytes."""
    return any(not _url_of(p).startswith("data:") for p in _image_parts(messages))


def inline_images(messages: list[Message], allow_remote: bool) -> None:
    """Replace the URL of every remote image by a ``data:`` URL of its bytes.

    Args:
        messages (list[dict]): The messages of a chat; changed in place.
        allow_remote (bool): Whether images may be fetched.

    Raises:
        APIError: 400, with one message whatever the reason.
    """
    budget = _Budget()
    for part in _image_parts(messages):
        url = _url_of(part)
        if url.startswith("data:"):
            continue
        if not allow_remote:
            raise bad_request(NOT_ALLOWED, param="messages")
        try:
            data = fetch(url, budget)
        except Exception as exc:
            logging.warning("%s: %s", FAILED, ascii(str(exc)))
            raise bad_request(FAILED, param="messages") from None
        part["image_url"]["url"] = data


@contextlib.contextmanager
def reading_images() -> Iterator[None]:
    """Let an image that cannot be decoded be a mistake of the client.

    Raises:
        APIError: 400.
    """
    try:
        yield
    except APIError:
        raise
    except Exception as exc:
        # Pillow raises its own classes, and OSError or SyntaxError for broken files.
        is_of_pillow = type(exc).__module__.startswith("PIL")
        if is_of_pillow or isinstance(exc, OSError | SyntaxError | binascii.Error):
            raise bad_request(UNREADABLE, param="messages") from exc
        raise


class _Budget:
    """The bytes and seconds that a request has left for its images."""

    def __init__(self) -> None:
        self.num_bytes = MAX_BYTES
        self._deadline = time.monotonic() + MAX_SECONDS

    def seconds_left(self) -> float:
        """The seconds that are left, which are more than none.

        Raises:
            FetchError: If none are left.
        """
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise FetchError(f"it took more than {MAX_SECONDS} s")
        return seconds


def fetch(url: str, budget: _Budget) -> str:
    """A ``data:`` URL with what is at a URL.

    Raises:
        FetchError: If that is no image, or nothing that may be fetched.
        OSError, http.client.HTTPException: If the connection fails.
    """
    for _ in range(MAX_REDIRECTS + 1):
        found = _get(urlsplit(url), budget)
        if found.startswith("data:"):
            return found
        url = urljoin(url, found)
    raise FetchError("it redirects too often")


def _get(parts: SplitResult, budget: _Budget) -> str:
    """A ``data:`` URL, or the location of a redirect."""
    if parts.scheme not in PORTS or parts.hostname is None:
        raise FetchError(f"the scheme {parts.scheme!r} is not http or https")
    connection = _Connection(parts, budget)
    watch = threading.Timer(budget.seconds_left(), connection.abort)
    watch.daemon = True
    watch.start()
    try:
        path = f"{parts.path or '/'}?{parts.query}".removesuffix("?")
        connection.request("GET", path, headers={"Accept": "image/*"})
        response = connection.getresponse()
        location = response.headers.get("Location")
        if response.status in (301, 302, 303, 307, 308) and location is not None:
            return _checked_location(location)
        return _read_image(response, budget)
    finally:
        watch.cancel()
        connection.close()


def _checked_location(location: str) -> str:
    # A redirect names a place to look at, and must not be the image itself.
    if location.startswith("data:"):
        raise FetchError("it redirects to a data: URL")
    return location


def _read_image(response: http.client.HTTPResponse, budget: _Budget) -> str:
    kind = response.headers.get_content_type()
    if response.status != 200 or not kind.startswith("image/"):
        raise FetchError(f"the answer is {response.status} with {kind}")
    data = response.read(budget.num_bytes + 1)
    if len(data) > budget.num_bytes:
        raise FetchError(f"the images have more than {MAX_BYTES} bytes")
    # The end of a body without a length is the end of the connection, which is what
    # running out of time looks like too.
    budget.seconds_left()
    if response.length:
        raise FetchError("it was cut off")
    budget.num_bytes -= len(data)
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


class _Connection(http.client.HTTPConnection):
    """A connection to one of the public addresses of a host.

    The address that was checked is the one connected to: a name that is looked up twice
    may mean something else the second time.
    """

    def __init__(self, parts: SplitResult, budget: _Budget):
        self.default_port = PORTS[parts.scheme]
        assert parts.hostname is not None
        super().__init__(parts.hostname, parts.port or self.default_port)
        self._is_encrypted = parts.scheme == "https"
        self._budget = budget
        self._socket: socket.socket | None = None

    def connect(self) -> None:
        addresses = public_addresses(self.host, self.port)
        self._socket = self._connect_to_first(addresses)
        if self._is_encrypted:
            context = ssl.create_default_context()
            self._socket = context.wrap_socket(self._socket, server_hostname=self.host)
        self.sock = self._socket

    def abort(self) -> None:
        """End what is being read, from another thread."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _connect_to_first(self, addresses: list[Address]) -> socket.socket:
        failure: OSError | None = None
        for address in addresses:
            place = (str(address), self.port)
            try:
                return socket.create_connection(
                    place, timeout=self._budget.seconds_left()
                )
            except OSError as exc:
                failure = exc
        raise failure or FetchError(f"{self.host} has no address")


def public_addresses(host: str, port: int) -> list[Address]:
    """What a name stands for, if that is nothing but public addresses.

    Raises:
        FetchError: If any of them is not public.
        OSError: If there is none.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # An address may name the interface that it is reached by: "fe80::1%eth0".
    texts = [str(sockaddr[0]).partition("%")[0] for *_, sockaddr in found]
    addresses = [ipaddress.ip_address(text) for text in dict.fromkeys(texts)]
    for address in addresses:
        if not is_public(address):
            raise FetchError(f"{host} is at {address}, which is not public")
    return addresses


def is_public(address: Address) -> bool:
    """Whether an address, and each that it stands for, is public."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address.is_site_local or not all(map(is_public, _embedded(address))):
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


def _embedded(address: ipaddress.IPv6Address) -> list[Address]:
    """The IPv4 addresses at which a packet to an IPv6 address may end."""
    found = [address.sixtofour, *(address.teredo or ())]
    if address in NAT64:
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [each for each in found if each is not None]


def _image_parts(messages: list[Message]) -> Iterator[dict[str, Any]]:
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part["type"] == "image_url":
                yield part


def _url_of(part: dict[str, Any]) -> str:
    return part["image_url"]["url"]
