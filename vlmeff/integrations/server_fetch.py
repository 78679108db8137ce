"""Fetch a picture from an allowed host over https: no redirects, public addresses only, bounded size and time."""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Sequence

# One narrow spelling: no user, no port but 443, no white space, backslash or control character, no address literals.
_ADDRESS = re.compile(r"https://([a-z0-9](?:[a-z0-9.-]*[a-z0-9])?)(?::443)?(/[!-\[\]-~]*)?")
_NUMERIC = re.compile(r"(0x[0-9a-f]*|[0-9]+)")  # a last label like this makes an IPv4 address of the host
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
TIMEOUT_SECONDS = 10.0
_CHUNK = 65_536

Resolve = Callable[[str], Sequence[str]]
Connect = Callable[[str, Sequence[str], float], http.client.HTTPConnection]


def check_address(url: str, domains: Sequence[str]) -> tuple[str, str]:
    """(host, path with query) of an address that may be fetched.

    Raises:
        ValueError: it is spelt otherwise than https://host/path, or the host is not one of ``domains``.
    """
    matched = _ADDRESS.fullmatch(url)
    if matched is None:
        raise ValueError("it must be spelt https://host/path, in lower case, without user and port")
    host, path = matched[1], matched[2] or "/"
    if _NUMERIC.fullmatch(host.rpartition(".")[2]):
        raise ValueError("an address in numbers is no host name")
    if host not in domains:
        raise ValueError(f"the host {host!r} is not one of {', '.join(domains)} (--allow-media-domain)")
    return host, path.partition("#")[0]


def is_public(address: str) -> bool:
    """Whether anyone can reach an IP address: not private, loopback, link-local, multicast, nor one in disguise."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        # Tunnels carry an IPv4 address of anybody's choice.
        if ip.sixtofour is not None or ip.teredo is not None or ip in _NAT64:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def fetch(
    url: str,
    domains: Sequence[str],
    *,
    max_bytes: int,
    timeout: float = TIMEOUT_SECONDS,
    resolve: Resolve | None = None,
    connect: Connect | None = None,
) -> bytes:
    """The body at ``url``, at most ``max_bytes`` of it, within ``timeout`` seconds.

    The host is resolved once; all its addresses must be public, and the connection goes to one that was checked,
    so that a second answer of the name server cannot lead elsewhere. Proxies of the environment are not used.

    Raises:
        ValueError: the address is not allowed, or the answer is no 200, no picture, or too large.
        OSError: the host cannot be resolved or reached in time.
    """
    host, path = check_address(url, domains)
    addresses = (resolve or _resolve)(host)
    if not addresses or not all(is_public(address) for address in addresses):
        raise ValueError(f"the host {host!r} has no address, or one that is not public")
    until = time.monotonic() + timeout
    connection = (connect or _Pinned)(host, addresses, timeout)
    try:
        connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "vlmeff"})
        answer = connection.getresponse()
        if answer.status != 200:  # a redirect too
            raise ValueError(f"the answer is {answer.status}, not 200 (redirects are not followed)")
        if not (answer.headers.get("Content-Type") or "").lower().startswith("image/"):
            raise ValueError("the answer is no picture")
        body = bytearray()
        while chunk := answer.read1(_CHUNK):
            body += chunk
            if len(body) > max_bytes:
                raise ValueError(f"the picture has more than {max_bytes} bytes (--max-image-mb)")
            if time.monotonic() > until:
                raise TimeoutError(f"it took longer than {timeout:g} s")
        return bytes(body)
    except http.client.HTTPException as error:
        raise ValueError(f"the answer is broken ({type(error).__name__})") from error
    finally:
        connection.close()


def _resolve(host: str) -> list[str]:
    return [str(info[4][0]) for info in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)]


class _Pinned(http.client.HTTPSConnection):
    """Connects to the first given address that answers; the certificate is checked against the host's name."""

    def __init__(self, host: str, addresses: Sequence[str], timeout: float) -> None:
        self._pinned_context = ssl.create_default_context()
        super().__init__(host, 443, timeout=timeout, context=self._pinned_context)
        self._addresses = addresses

    def connect(self) -> None:
        plain = self._reach()
        try:
            self.sock = self._pinned_context.wrap_socket(plain, server_hostname=self.host)
        except OSError:
            plain.close()
            raise

    def _reach(self) -> socket.socket:
        failed: OSError | None = None
        for address in self._addresses:
            try:
                return socket.create_connection((address, 443), self.timeout)
            except OSError as error:
                failed = error
        raise failed or OSError("no address")
