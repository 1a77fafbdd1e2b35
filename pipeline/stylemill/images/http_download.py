"""Download an image over http or https.

A URL comes from a manifest and is not trusted. For the URL and for each redirect, the host is looked up once, all its
addresses are checked, and only those are connected to. One deadline covers the whole download, so a server cannot hold
a worker by sending a byte now and then. Proxies of the environment are not used: a proxy would hide the address.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import string
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import quote, urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from stylemill.config.inputs import InputSettings
from stylemill.errors import DownloadError, ImageError
from stylemill.images.addresses import look_up
from stylemill.images.messages import display_name, interrupted, one_line, too_large

_MAX_REDIRECTS = 5
_REDIRECT_STATUSES = {301, 302, 303, 307, 308}
_BUSY_STATUSES = {408, 425, 429}  # and 5xx: another attempt may help
_PIECE_BYTES = 1 << 20  # read at a time
_HEADER_BYTES = 1 << 16  # of one header line
_HEADERS = {"User-Agent": "stylemill", "Accept": "image/*, */*;q=0.1", "Accept-Encoding": "identity"}
# Characters that are not quoted. With "%", so that a URL that is quoted already is not quoted twice.
_PATH_CHARACTERS = "/%:@!$&'()*+,;=~"
_QUERY_CHARACTERS = _PATH_CHARACTERS + "?[]"


def download_http(url: str, inputs: InputSettings) -> bytes:
    """The bytes at an http:// or https:// URL. May be called from several threads at once.

    Raises ImageError where another attempt gives the same result (404, a refused address, too large), DownloadError
    where another attempt may help.
    """
    return _run(_follow_redirects(url, inputs))


def _run(download: Coroutine[Any, Any, bytes]) -> bytes:
    """Run `download` in an event loop of its own, also where the calling thread has one, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(download)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, download).result()


async def _follow_redirects(url: str, inputs: InputSettings) -> bytes:
    deadline = asyncio.get_running_loop().time() + inputs.timeout
    name = display_name(url)
    target = _parse(url, name)
    for _ in range(1 + _MAX_REDIRECTS):
        answer = await _get(target, inputs, deadline, name)
        if not isinstance(answer, _Redirect):
            return answer
        target = _parse(answer.location, f"{display_name(url)}: redirect target", base=target.text)
        name = f"{display_name(url)}: redirected to {display_name(target.text)}"
    raise ImageError(f"{display_name(url)}: redirects more than {_MAX_REDIRECTS} times; name the image's own URL")


class _Target(NamedTuple):
    """A checked URL."""

    text: str  # as it was given
    url: URL  # as it is requested
    host: str  # a name in ASCII, or an address
    port: int


def _parse(reference: str, name: str, base: str = "") -> _Target:
    """Check a URL, or a reference relative to the URL `base`. Raises ImageError if it cannot be downloaded."""
    try:
        reference.encode()  # raises for a lone surrogate, which no URL can contain
        text = urljoin(base, reference)
        parts = urlsplit(text)
        port = parts.port  # raises if it is not a number
    except ValueError as error:
        raise ImageError(f"{name}: is no URL ({one_line(error)}); correct it") from None
    if parts.scheme not in ("http", "https"):
        raise ImageError(f"{name}: {parts.scheme}:// is not followed, only http:// and https://")
    if not parts.hostname or port == 0 or re.search(r"[\x00-\x20\x7f\\]", parts.hostname):
        raise ImageError(f"{name}: names no host; correct the URL")
    if parts.username is not None:
        raise ImageError(f"{name}: has a user's name in it, which the output would repeat; use a signed URL")
    host, port = _ascii_host(parts.hostname, name), port or (443 if parts.scheme == "https" else 80)
    query = f"?{quote(parts.query, safe=_QUERY_CHARACTERS)}" if parts.query else ""
    request = f"{_authority(parts.scheme, host, port)}{quote(parts.path or '/', safe=_PATH_CHARACTERS)}{query}"
    try:
        url = URL(request, encoded=True)
    except ValueError as error:
        raise ImageError(f"{name}: is no URL ({one_line(error)}); correct it") from None
    if (url.raw_host, url.port) != (host, port):  # the checked host and the requested one must be the same
        raise ImageError(f"{name}: names no host; correct the URL")
    return _Target(text, url, host, port)


def _authority(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _ascii_host(host: str, name: str) -> str:
    """A host as requests and certificates name it; an IPv4 address in its dotted form, which aiohttp requires."""
    try:
        host = host if ":" in host else host.encode("idna").decode("ascii")
    except UnicodeError:
        raise ImageError(f"{name}: its host is no valid name; correct the URL") from None
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return host


class _CheckedResolver(AbstractResolver):
    """Gives aiohttp the checked addresses of a host, so that it does not look the host up again."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self._addresses
        ]

    async def close(self) -> None:
        pass


class _Redirect(NamedTuple):
    location: str  # relative to the URL that was requested


async def _get(target: _Target, inputs: InputSettings, deadline: float, name: str) -> bytes | _Redirect:
    """Send one request and read its answer, until `deadline` in the time of the event loop."""
    with _translated_errors(name):
        async with asyncio.timeout_at(deadline):
            addresses = await look_up(target.host, target.port, inputs.allow_private_addresses, name)
            async with (
                _open_session(target, addresses, name) as session,
                session.get(target.url, allow_redirects=False) as response,
            ):
                if response.status in _REDIRECT_STATUSES:
                    location = response.headers.get("Location", "")
                    # Bytes that are not UTF-8 are sent back to the server unchanged.
                    return _Redirect(quote(location, safe=string.punctuation, errors="surrogateescape"))
                return await _read_body(response, inputs, name)


@contextmanager
def _translated_errors(name: str) -> Iterator[None]:
    """Turn the errors of aiohttp and the system into ImageError and DownloadError."""
    try:
        yield
    except aiohttp.ClientConnectorCertificateError as error:
        cause = error.certificate_error
        reason = cause.verify_message if isinstance(cause, ssl.SSLCertVerificationError) else one_line(cause)
        raise ImageError(f"{name}: its certificate is not valid: {reason}") from None
    except aiohttp.ClientConnectorError as error:
        raise interrupted(name, error.os_error) from error
    except (aiohttp.ClientError, HttpProcessingError, OSError, ValueError) as error:
        raise interrupted(name, error) from error


def _open_session(target: _Target, addresses: Sequence[str], name: str) -> aiohttp.ClientSession:
    async def send_once(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        # aiohttp would catch its own error of a lost connection, and send the request again.
        with _translated_errors(name):
            return await send(request)

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            resolver=_CheckedResolver(addresses),
            use_dns_cache=False,
            ssl=ssl.create_default_context() if target.url.scheme == "https" else True,
            force_close=True,
        ),
        middlewares=[send_once],
        headers=_HEADERS,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(),  # no limits: that of aiohttp would begin again with each redirect
        max_line_size=_HEADER_BYTES,
        max_field_size=_HEADER_BYTES,
    )


async def _read_body(response: aiohttp.ClientResponse, inputs: InputSettings, name: str) -> bytes:
    if response.status in _BUSY_STATUSES or response.status >= 500:
        raise DownloadError(f"{name}: the server answers {response.status}", _retry_after(response))
    if response.status != 200:
        raise ImageError(f"{name}: the server answers {response.status}; correct the URL or remove its rows")
    if (response.content_length or 0) > inputs.max_bytes:
        raise too_large(name, inputs)
    data = bytearray()
    async for piece in response.content.iter_chunked(_PIECE_BYTES):
        data += piece
        if len(data) > inputs.max_bytes:
            raise too_large(name, inputs)
    return bytes(data)


def _retry_after(response: aiohttp.ClientResponse) -> float:
    """The seconds that the server asks to wait; 0 where it names a date or nothing."""
    value = response.headers.get("Retry-After", "")
    return float(value) if re.fullmatch("[0-9]{1,4}", value) else 0.0
