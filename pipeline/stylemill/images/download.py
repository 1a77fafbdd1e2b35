"""Images named by a URL: read over http, https or from S3, within the limits of a job's `inputs`.

A URL comes from a manifest and is not trusted. An address is checked after its name was resolved, and the one that was
checked is the one that is connected to, at every redirect anew; the whole download has a deadline, so that no server
holds a worker by sending a byte now and then. Proxies of the environment are not used: one would hide the address.
S3's endpoint and credentials are those of the worker's environment, never of a URL.
"""

from __future__ import annotations

import http.client
import ipaddress
import random
import re
import socket
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from stylemill import s3
from stylemill.config.inputs import InputSettings
from stylemill.config.paths import is_url
from stylemill.errors import DownloadError, ImageError, JobError

_PAUSE = 0.5  # seconds before the second try, doubled before each further one
_LONGEST_PAUSE = 60.0
_REDIRECTS = 5
_PIECE = 1 << 20  # bytes read at a time
_HEADERS = {"User-Agent": "stylemill", "Accept": "image/*, */*;q=0.1", "Accept-Encoding": "identity"}
_BUSY = {408, 425, 429}  # and 5xx: asking again can help
# Where clouds hand credentials to whoever asks from inside; 169.254.0.0/16 and fe80::/10 are refused as a whole.
_METADATA = {ipaddress.ip_address(ip) for ip in ("fd00:ec2::254", "100.100.100.200", "192.0.0.192", "168.63.129.16")}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def shown(path: str) -> str:
    """A path or URL as messages name it: on one short line, without the secrets that a URL may carry."""
    if is_url(path):
        path = re.sub(r"//[^/?#]*@", "//…@", path.partition("#")[0])
        path, query, _ = path.partition("?")
        path += "?…" if query else ""
    path = "".join(character if character.isprintable() else "�" for character in path)
    return path if len(path) <= 200 else path[:200] + "…"


def fetch(url: str, inputs: InputSettings) -> bytes:
    """The bytes behind `url`, from this process's cache where they are there.

    Raises ImageError where asking again gives the same answer (404, a refused address, too large), DownloadError where
    `inputs.retries` further tries did not help, JobError where s3fs is not installed.
    """
    key = (url, inputs.allow_private_addresses, inputs.max_bytes)  # what one job may read, another may not
    if (cached := _cache.get(key)) is not None:
        return cached
    scheme = url.partition(":")[0].lower()
    read = {"http": _read_http, "https": _read_http, "s3": _read_s3}.get(scheme)
    if read is None:
        local = "" if inputs.remote_only else ", or paths of this machine"
        raise ImageError(f"{shown(url)}: {scheme}:// is not read; name http://, https:// or s3:// URLs{local}")
    data = _retried(read, url, inputs)
    _cache.put(key, data, inputs.cache_mb << 20)
    return data


def _retried(read: Callable[[str, InputSettings], bytes], url: str, inputs: InputSettings) -> bytes:
    for attempt in range(inputs.retries):
        try:
            return read(url, inputs)
        except DownloadError as error:
            pause = random.uniform(0.5, 1.0) * _PAUSE * 2**attempt
            time.sleep(min(max(pause, error.retry_after), _LONGEST_PAUSE))
    return read(url, inputs)


_Key = tuple[str, bool, int]


class _Cache:
    """The files read last, as many as fit. What is asked of a server is thereby asked once a worker, as a rule."""

    def __init__(self) -> None:
        self._files: OrderedDict[_Key, bytes] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def get(self, key: _Key) -> bytes | None:
        with self._lock:
            if key in self._files:
                self._files.move_to_end(key)
            return self._files.get(key)

    def put(self, key: _Key, data: bytes, most: int) -> None:
        if len(data) > most:
            return
        with self._lock:
            self._size += len(data) - len(self._files.pop(key, b""))
            self._files[key] = data
            while self._size > most:
                self._size -= len(self._files.popitem(last=False)[1])


_cache = _Cache()


# --- http and https ---------------------------------------------------------------------------------------------------


def _read_http(url: str, inputs: InputSettings) -> bytes:
    deadline = time.monotonic() + inputs.timeout
    base, at, name = "", url, shown(url)
    for _ in range(1 + _REDIRECTS):
        place = _split(base, at, name)
        if base:
            name = f"{shown(url)}: redirected to {shown(place.geturl())}"
        with _answer(place, _addresses(place, inputs, name), deadline, name) as answer:
            if answer.status not in (301, 302, 303, 307, 308):
                return _body(answer, inputs, name)
            base, at = place.geturl(), answer.headers.get("Location", "")
        name = f"{shown(url)}: what it redirects to"
    raise ImageError(f"{shown(url)}: redirects more than {_REDIRECTS} times; name the image's own URL")


def _split(base: str, url: str, name: str) -> SplitResult:
    try:
        url.encode()  # a lone surrogate is no character of a URL
        place = urlsplit(urljoin(base, url))
        port = place.port  # looked at here, for it may be no number
    except ValueError as error:
        raise ImageError(f"{name}: is no URL ({_line(error)}); correct it") from None
    if place.scheme not in ("http", "https"):
        raise ImageError(f"{name}: {place.scheme}:// is not followed, only http:// and https://")
    if not place.hostname or port == 0 or re.search(r"[\x00-\x20\x7f]", place.hostname):
        raise ImageError(f"{name}: names no host; correct the URL")
    if place.username is not None:
        raise ImageError(f"{name}: has a user's name in it, which the output would repeat; use a signed URL")
    return place


def _port(place: SplitResult) -> int:
    return place.port or (443 if place.scheme == "https" else 80)


def _addresses(place: SplitResult, inputs: InputSettings, name: str) -> list[str]:
    """The addresses of a URL's host, every one of them allowed."""
    try:
        found = socket.getaddrinfo(place.hostname, _port(place), type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno == socket.EAI_NONAME:
            raise ImageError(f"{name}: there is no such host; correct the URL or remove its rows") from None
        raise DownloadError(f"{name}: its host cannot be looked up just now: {_line(error)}") from None
    except UnicodeError:
        raise ImageError(f"{name}: its host is no valid name; correct the URL") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for address in addresses:
        if problem := address_problem(address, inputs.allow_private_addresses):
            raise ImageError(f"{name}: its host is {address}, {problem}")
    return addresses


def address_problem(address: str, allow_private: bool) -> str | None:
    """Why a manifest's URL may not lead to `address`; None where it may."""
    ip = _embedded(ipaddress.ip_address(address.partition("%")[0]))
    if ip.is_link_local or ip in _METADATA:
        return "where clouds keep their metadata, which is never read"
    if (ip.is_multicast or not ip.is_global) and not allow_private:
        return "not one of the public Internet; if these servers are yours, set inputs.allow_private_addresses: true"
    return None


def _embedded(ip: _Address) -> _Address:
    """The IPv4 address that an IPv6 one stands for, where it does."""
    if isinstance(ip, ipaddress.IPv4Address):
        return ip
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or ip


class _Connection(http.client.HTTPConnection):
    """A connection to one of the checked `addresses`, whatever the host's name leads to by now; cut at the deadline."""

    def __init__(self, place: SplitResult, addresses: list[str], deadline: float) -> None:
        self.default_port = 443 if place.scheme == "https" else 80
        super().__init__(str(place.hostname), _port(place))
        self._secure = place.scheme == "https"
        self._addresses = addresses
        self._deadline = deadline
        self._open: socket.socket | None = None
        self._watch = threading.Timer(max(0.0, deadline - time.monotonic()), self._cut)
        self._watch.daemon = True
        self.expired = False

    def connect(self) -> None:
        self._watch.start()
        self.sock = self._open = self._first_that_answers()
        if self._secure:
            context = ssl.create_default_context()
            # The handshake waits until the watch knows the socket that it may have to cut.
            self.sock = self._open = context.wrap_socket(
                self.sock, server_hostname=self.host, do_handshake_on_connect=False
            )
            self._open.do_handshake()

    def _first_that_answers(self) -> socket.socket:
        for address in self._addresses[:-1]:
            with suppress(OSError):
                return socket.create_connection((address, self.port), self._left() / 2)
        return socket.create_connection((self._addresses[-1], self.port), self._left())

    def _left(self) -> float:
        return max(0.001, self._deadline - time.monotonic())

    def _cut(self) -> None:
        self.expired = True
        if self._open is not None:
            with suppress(OSError):  # not SSLSocket's own: that would pull the rug from under the reading thread
                socket.socket.shutdown(self._open, socket.SHUT_RDWR)

    def finish(self) -> None:  # not `close`, which http.client calls as soon as it has read the headers
        self._watch.cancel()
        self.close()


@contextmanager
def _answer(place: SplitResult, addresses: list[str], deadline: float, name: str) -> Iterator[http.client.HTTPResponse]:
    """Ask for the URL; whatever goes wrong until the answer was read is a DownloadError, or ImageError if for good."""
    connection = _Connection(place, addresses, deadline)
    target = quote(place.path or "/", safe="/%:@!$&'()*+,;=~") + (
        "?" + quote(place.query, safe="/%:@!$&'()*+,;=~?[]") if place.query else ""
    )
    response = None
    try:
        connection.request("GET", target, headers=_HEADERS)
        response = connection.getresponse()
        yield response
        if connection.expired:  # where no length was promised, a cut looks like an end
            raise TimeoutError
    except ssl.SSLCertVerificationError as error:
        raise ImageError(f"{name}: its certificate is not valid: {error.verify_message}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        late = connection.expired or isinstance(error, TimeoutError)
        raise DownloadError(f"{name}: the download {_how(error, late)}") from error
    finally:
        if response is not None:
            response.close()
        connection.finish()


def _body(answer: http.client.HTTPResponse, inputs: InputSettings, name: str) -> bytes:
    if answer.status in _BUSY or answer.status >= 500:
        asked = answer.headers.get("Retry-After", "")
        raise DownloadError(
            f"{name}: the server answers {answer.status}", float(asked) if re.fullmatch("[0-9]{1,4}", asked) else 0.0
        )
    if answer.status != 200:
        raise ImageError(f"{name}: the server answers {answer.status}; correct the URL or remove its rows")
    large = f"{name}: is larger than the limit of {inputs.max_bytes:,} bytes (inputs.max_bytes)"
    if (answer.length or 0) > inputs.max_bytes:
        raise ImageError(large)
    data = bytearray()
    while piece := answer.read(_PIECE):
        data += piece
        if len(data) > inputs.max_bytes:
            raise ImageError(large)
    if answer.length:
        raise http.client.IncompleteRead(b"", answer.length)
    return bytes(data)


def _how(error: BaseException, late: bool) -> str:
    return "took longer than inputs.timeout" if late else f"broke off ({type(error).__name__}: {_line(error)})"


def _line(error: BaseException) -> str:
    return shown(" ".join(str(error).split()))  # part of it may be the server's words


# --- S3 ---------------------------------------------------------------------------------------------------------------


def _read_s3(url: str, inputs: InputSettings) -> bytes:
    path = "s3://" + url.partition("://")[2]
    try:
        # One byte more than allowed tells what is too large, and nothing needs to be asked first.
        data: bytes = s3.filesystem(inputs.timeout).cat_file(
            path, start=0, end=inputs.max_bytes + 1, timeout=inputs.timeout
        )
    except ImportError:
        raise JobError(f"{shown(url)}: s3:// needs s3fs on every worker; pip install 'stylemill[s3]'") from None
    except FileNotFoundError:
        raise ImageError(f"{shown(url)}: there is no such object; correct the URL or remove its rows") from None
    except Exception as error:  # botocore, aiohttp and the event loop each have trees of their own
        code = s3.error_code(error)
        if code == "InvalidRange":
            return b""
        if code == "AccessDenied":
            raise ImageError(f"{shown(url)}: access is denied; correct the URL, or the rights of the workers") from None
        raise DownloadError(f"{shown(url)}: the download {_how(error, isinstance(error, TimeoutError))}") from error
    if len(data) > inputs.max_bytes:
        raise ImageError(f"{shown(url)}: is larger than the limit of {inputs.max_bytes:,} bytes (inputs.max_bytes)")
    return data
