"""Images by URL, from real servers on loopback: which are read, which are refused, and which are retried, for how long.

A refused URL or a 404 fails the row (ImageError). A server that is slow, busy or drops connections fails the attempt
(DownloadError), and the row only if it is the last attempt.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from asyncio.selector_events import BaseSelectorEventLoop
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from demo_job import start, stylemill
from stylemill import s3
from stylemill.cli import main
from stylemill.config.inputs import InputSettings
from stylemill.config.job import Job
from stylemill.errors import DownloadError, ImageError, TransientError
from stylemill.execution import local
from stylemill.execution.attempt import Run
from stylemill.execution.input_reader import InputReader
from stylemill.execution.inputs import read_pairs
from stylemill.execution.rows import OutputRow
from stylemill.images import addresses, download
from stylemill.images.addresses import address_problem
from stylemill.images.download import fetch
from stylemill.images.masks import load_labels
from stylemill.images.messages import display_name
from stylemill.images.read import load_image
from stylemill.manifest import open_manifest
from stylemill.store.paths import RunPaths

LOOPBACK = InputSettings(allow_private_addresses=True, timeout=20, retries=2)  # loopback is a private address
BRIEF = LOOPBACK.model_copy(update={"timeout": 0.15, "retries": 0})


def png(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
Answer = Callable[[BaseHTTPRequestHandler, int], None]  # takes the request, and how often its path was requested


class Server(ThreadingHTTPServer):
    """Serves `answers` by path, and records the paths that are requested."""

    daemon_threads = True

    def __init__(self, answers: dict[str, Answer], port: int = 0) -> None:
        self.requested: list[str] = []
        self.stopping = threading.Event()
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with lock:
                    server.requested.append(self.path)
                    times = server.requested.count(self.path)
                with suppress(OSError):  # the client closed the connection, as it should
                    answers.get(self.path.partition("?")[0], status(404))(self, times)
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", port), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(port: int = 0, **answers: Answer) -> Iterator[Server]:
    server = Server({f"/{name}": answer for name, answer in answers.items()}, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()


def status(code: int, body: bytes = b"", **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler, times: int) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def announces(length: int | None, body: bytes) -> Answer:
    """A body whose Content-Length is `length`; None: without Content-Length. Sent with the headers in one piece."""

    def answer(handler: BaseHTTPRequestHandler, times: int) -> None:
        announced = b"" if length is None else b"Content-Length: %d\r\n" % length
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + announced + b"\r\n" + body)

    return answer


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> Answer:
    def answer(handler: BaseHTTPRequestHandler, times: int) -> None:
        body = b"".join(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n" for chunk in chunks)
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + end)

    return answer


def endless(begin: bytes) -> Answer:
    def answer(handler: BaseHTTPRequestHandler, times: int) -> None:
        handler.wfile.write(begin)
        while not handler.server.stopping.is_set():  # type: ignore[attr-defined]
            handler.wfile.write(bytes(1 << 16))

    return answer


def drips(begin: bytes) -> Answer:
    """One byte now and then without end, so that a limit on each read alone would never be reached."""

    def answer(handler: BaseHTTPRequestHandler, times: int) -> None:
        handler.wfile.write(begin)
        while not handler.server.stopping.wait(0.02):  # type: ignore[attr-defined]
            handler.wfile.write(b"x")

    return answer


def silent(handler: BaseHTTPRequestHandler, times: int) -> None:
    handler.server.stopping.wait()  # type: ignore[attr-defined]


def hangs_up(handler: BaseHTTPRequestHandler, times: int) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def after(failures: int, first: Answer, then: Answer) -> Answer:
    return lambda handler, times: (first if times <= failures else then)(handler, times)


@pytest.fixture(autouse=True)
def _empty_cache_and_short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_cache", download._FileCache())
    monkeypatch.setattr(download, "_FIRST_PAUSE", 0.001)


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(status(200, PNG), id="with a length"),
        pytest.param(announces(None, PNG), id="without a length"),
        pytest.param(chunked(PNG[:100], PNG[100:]), id="in chunks"),
    ],
)
def test_content_style_and_mask_by_url(answer: Answer, tmp_path: Path) -> None:
    mask = io.BytesIO()
    Image.new("L", (40, 30), 7).save(mask, "PNG")
    with serving(a=answer, mask=status(200, mask.getvalue())) as server:
        image = load_image(f"{server.url}/a", None, tmp_path, (32, 24), "crop", inputs=LOOPBACK)
        labels = load_labels(f"{server.url}/mask", None, tmp_path, (32, 24), "crop", inputs=LOOPBACK)
    assert image.file_sha256 == hashlib.sha256(PNG).hexdigest()
    assert (labels == 7).all()


def test_redirects_are_followed() -> None:
    with serving(a=status(302, Location="/b?x=1"), b=status(301, Location="c"), c=status(200, PNG)) as server:
        assert fetch(f"{server.url}/a#part", LOOPBACK) == PNG
        assert server.requested == ["/a", "/b?x=1", "/c"]


def test_a_redirect_is_followed_with_the_bytes_that_the_server_sent() -> None:
    """http.server writes headers as latin-1, so these are UTF-8 and latin-1 as a server may send them."""
    with serving(a=status(302, Location="/é".encode().decode("latin-1")), b=status(302, Location="/é")) as server:
        for path in ("a", "b"):
            with pytest.raises(ImageError, match="answers 404"):
                fetch(f"{server.url}/{path}", LOOPBACK)
        assert server.requested == ["/a", "/%C3%A9", "/b", "/%E9"]


def test_characters_of_a_url_are_quoted_once() -> None:
    with serving() as server:
        for path in ("/é e?k=[1]&l=a%20b", "/%C3%A9%20e?k=[1]&l=a%20b"):
            with pytest.raises(ImageError, match="answers 404"):
                fetch(server.url + path, LOOPBACK)
        assert server.requested == ["/%C3%A9%20e?k=[1]&l=a%20b"] * 2


def test_a_file_is_requested_once_and_the_cache_stays_within_its_size() -> None:
    with serving(a=status(200, PNG), b=status(200, bytes(1 << 20))) as server:
        for _ in range(3):
            assert fetch(f"{server.url}/a", LOOPBACK) == PNG
        assert server.requested == ["/a"]
        with pytest.raises(ImageError, match="allow_private_addresses"):
            fetch(f"{server.url}/a", InputSettings())  # the limits of another job apply to cached files too
        small = LOOPBACK.model_copy(update={"cache_mb": 1})
        for path in ("a", "b", "b", "a"):  # b fills the whole cache
            fetch(f"{server.url}/{path}", small)
        assert server.requested == ["/a", "/b", "/a"]
        none = LOOPBACK.model_copy(update={"cache_mb": 0})
        fetch(f"{server.url}/b", none)
        fetch(f"{server.url}/b", none)
        assert server.requested[3:] == ["/b", "/b"]


def test_several_threads_download_at_once() -> None:
    """Each download is answered only while four of them are open."""
    open_at_once = threading.Barrier(4, timeout=20)

    def answer(handler: BaseHTTPRequestHandler, times: int) -> None:
        open_at_once.wait()
        status(200, handler.path.encode())(handler, times)

    paths = [f"/{number}" for number in range(8)]
    with serving(**{path[1:]: answer for path in paths}) as server, ThreadPoolExecutor(4) as pool:
        bodies = list(pool.map(lambda path: fetch(server.url + path, LOOPBACK), paths))
    assert bodies == [path.encode() for path in paths]


def test_a_thread_with_an_event_loop_of_its_own_can_download() -> None:
    """As the cells of a notebook do."""

    async def cell() -> bytes:
        return fetch(f"{server.url}/a", LOOPBACK)

    with serving(a=status(200, PNG)) as server:
        assert asyncio.run(cell()) == PNG


def test_a_local_file_is_read_without_loading_aiohttp(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    code = f"""
import sys
from stylemill.images.read import load_image
load_image("a.png", None, {str(tmp_path)!r}, (32, 24), "crop")
print("aiohttp" in sys.modules, "s3fs" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


# --- what is retried, and what is not ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failing",
    [
        *(pytest.param(status(code), id=str(code)) for code in (408, 425, 429, 500, 502, 503, 504)),
        pytest.param(hangs_up, id="hangs up"),
        pytest.param(announces(len(PNG) + 9, PNG), id="announces a longer length"),
        pytest.param(announces(len(PNG), PNG[:50]), id="cut in the middle"),
        pytest.param(chunked(PNG[:50], end=b""), id="cut between chunks"),
        pytest.param(chunked(PNG[:50], end=b"zz\r\n"), id="not a chunk"),
        pytest.param(lambda handler, _: handler.wfile.write(b"SSH-2.0-x\r\n\r\n"), id="not HTTP"),
        pytest.param(
            lambda handler, _: handler.wfile.write(b"HTTP/1.1 200 \r\n" + b"A: b\r\n" * 999), id="too many headers"
        ),
    ],
)
def test_failures_that_may_pass_are_retried_and_never_fail_the_row(failing: Answer) -> None:
    with serving(a=after(2, failing, status(200, PNG)), b=failing) as server:
        assert fetch(f"{server.url}/a", LOOPBACK) == PNG
        assert len(server.requested) == 3
        with pytest.raises(DownloadError, match=r"^http://127\.0\.0\.1:[0-9]+/b: .") as caught:
            fetch(f"{server.url}/b", LOOPBACK)
        assert server.requested.count("/b") == 3
        assert isinstance(caught.value, TransientError)
        assert "\n" not in str(caught.value)


def test_retry_after_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    busy = status(429, Retry_After="7")
    with serving(a=after(1, busy, status(200, PNG)), b=status(503, Retry_After="9999")) as server:
        fetch(f"{server.url}/a", LOOPBACK)
        assert pauses == [7.0]
        with pytest.raises(DownloadError):
            fetch(f"{server.url}/b", LOOPBACK)
        assert pauses[1:] == [60.0, 60.0]  # at most a minute


def test_a_refused_connection_is_transient() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(DownloadError, match="ConnectionRefusedError"):
            fetch(f"http://127.0.0.1:{unused.getsockname()[1]}/a.png", LOOPBACK)


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 418, 204])
def test_a_permanent_answer_fails_the_row_at_once(code: int) -> None:
    with serving(a=status(code)) as server:
        with pytest.raises(ImageError, match=f"/a: the server answers {code}; correct the URL or remove its rows"):
            fetch(f"{server.url}/a", LOOPBACK)
        assert len(server.requested) == 1


def later(announced: bytes, surplus: bytes) -> Answer:
    def answer(handler: BaseHTTPRequestHandler, times: int) -> None:
        announces(len(announced), announced)(handler, times)
        handler.connection.recv(1)  # returns when the client has what was announced, and closes the connection
        handler.wfile.write(surplus)

    return answer


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        pytest.param(later(PNG[:500], PNG[500:]), ImageError, id="later"),
        # aiohttp's parser in C takes the surplus for a second answer, its parser in Python leaves it out.
        pytest.param(announces(500, PNG), (ImageError, DownloadError), id="at once"),
    ],
)
def test_bytes_beyond_the_announced_length_give_no_other_image(
    answer: Answer, error: type[Exception] | tuple[type[Exception], ...], tmp_path: Path
) -> None:
    with serving(a=answer) as server, pytest.raises(error, match=r"truncated or damaged|broke off"):
        load_image(f"{server.url}/a", None, tmp_path, (32, 24), "crop", inputs=LOOPBACK)


@pytest.mark.parametrize(
    "slow",
    [
        pytest.param(silent, id="silence"),
        pytest.param(drips(b"HTTP/1.1 200 OK\r\nA: "), id="slow header"),
        pytest.param(drips(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"), id="slow body"),
        pytest.param(drips(b"HTTP/1.1 200 OK\r\n\r\n"), id="slow body without a length"),
        pytest.param(drips(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"), id="slow chunk size"),
    ],
)
def test_a_slow_server_is_given_up_at_the_deadline(slow: Answer) -> None:
    with serving(a=slow) as server, pytest.raises(DownloadError, match=r"/a: the download took longer than inputs\.t"):
        fetch(f"{server.url}/a", BRIEF)


def test_a_server_without_a_tls_handshake_is_given_up_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(DownloadError, match="took longer than"):
        fetch(f"https://127.0.0.1:{silent.getsockname()[1]}/a.png", BRIEF)


def test_all_redirects_share_one_deadline() -> None:
    """Each answer alone is in time."""

    def answer(handler: BaseHTTPRequestHandler, times: int) -> None:
        handler.server.stopping.wait(0.4 * BRIEF.timeout)  # type: ignore[attr-defined]
        status(302, Location="/a")(handler, times)

    with serving(a=answer) as server, pytest.raises(DownloadError, match=r"redirected to .*: the download took longer"):
        fetch(f"{server.url}/a", BRIEF)


@pytest.mark.parametrize(
    "large",
    [
        pytest.param(announces(10**15, b""), id="announced"),
        pytest.param(endless(b"HTTP/1.1 200 OK\r\n\r\n"), id="without end"),
        pytest.param(endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n"), id="one chunk"),
    ],
)
def test_no_more_than_the_limit_is_read(large: Answer) -> None:
    limits = LOOPBACK.model_copy(update={"max_bytes": 1 << 20})
    with serving(a=large) as server, pytest.raises(ImageError, match=r"larger than the limit of 1,048,576 bytes"):
        fetch(f"{server.url}/a", limits)
    assert len(server.requested) == 1


# --- what is refused --------------------------------------------------------------------------------------------------

METADATA = "where clouds keep their metadata"
PRIVATE = "inputs.allow_private_addresses: true"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://169.254.169.254/latest/meta-data/", METADATA),
        ("http://[fe80::1]/", METADATA),
        ("http://[fd00:ec2::254]/latest", METADATA),
        ("http://[::ffff:169.254.169.254]/", METADATA),
        ("http://[64:ff9b::a9fe:a9fe]/", METADATA),
        ("http://[2002:a9fe:a9fe::]/", METADATA),
        ("http://2852039166/", METADATA),  # the same address as one number
        ("http://0xa9.0xfe.0xa9.0xfe/", METADATA),
        ("http://100.100.100.200/", METADATA),
        ("http://168.63.129.16/", METADATA),
        ("http://127.0.0.1:1/", PRIVATE),
        ("http://localhost:1/", PRIVATE),
        ("http://127.1:1/", PRIVATE),
        ("http://[::1]:1/", PRIVATE),
        ("http://[::ffff:10.0.0.1]/", PRIVATE),
        ("http://0.0.0.0:1/", PRIVATE),
        ("https://10.1.2.3/", PRIVATE),
        ("https://172.16.0.1/", PRIVATE),
        ("http://192.168.1.1/router", PRIVATE),
        ("http://100.64.0.1/", PRIVATE),
        ("http://[fc00::1]/", PRIVATE),
        ("http://224.0.0.1/", PRIVATE),
        ("file:///etc/passwd", "file:// is not read; name http"),
        ("FILE:///etc/passwd", "file:// is not read; name http"),
        ("ftp://example.org/a.png", "ftp:// is not read"),
        ("gopher://127.0.0.1/", "gopher:// is not read"),
        ("http:///a.png", "names no host"),
        ("http://a b/x.png", "names no host"),
        ("http://169.254.169.254\\.example.org/", "names no host"),
        ("http://１６９.254.169.254/", METADATA),
        ("http://[::1/x.png", "is no URL"),
        ("http://h:99999/x.png", "is no URL"),
        ("http://h:0/x.png", "names no host"),
        ("http://h/\ud800", "is no URL"),
        ("http://" + "a" * 64 + ".org/", "no such host|no valid name"),
        ("http://no-such-host.invalid/a.png", "no such host|cannot be looked up"),
        ("http://me:secret@example.org/a.png", "a user's name"),
    ],
)
def test_urls_that_are_refused_before_any_connection(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BaseSelectorEventLoop, "sock_connect", lambda *_: pytest.fail("connected"))
    with pytest.raises((ImageError, DownloadError), match=message) as caught:
        fetch(url, InputSettings(retries=0))
    assert "secret" not in str(caught.value)


def test_an_attempt_to_connect_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above fails where a URL is not refused: every connection goes through this method."""
    monkeypatch.setattr(BaseSelectorEventLoop, "sock_connect", lambda *_: pytest.fail("connected"))
    with pytest.raises(pytest.fail.Exception, match="connected"):
        fetch("http://127.0.0.1:1/", LOOPBACK)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1", "2130706433", "0x7f.0.0.1", "１２７.1", "localhost"],
)
def test_every_form_of_an_address_is_the_same_host(host: str) -> None:
    with serving(a=status(200, PNG)) as server:
        assert fetch(f"http://{host}:{server.server_port}/a", LOOPBACK) == PNG


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("file:///etc/passwd", "file:// is not followed"),
        ("ftp://example.org/", "ftp:// is not followed"),
        ("http://169.254.169.254/latest/meta-data/iam/", METADATA),
        ("http://metadata.example/", METADATA),
        ("//user:secret@example.org/", "a user's name"),
        ("http://[", "is no URL"),
        ("/a", "redirects more than 5 times"),
        ("", "redirects more than 5 times"),
    ],
)
def test_redirects_that_are_not_followed(target: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Private addresses are allowed here; some redirects lead to a refused address by a name."""
    look_up = socket.getaddrinfo
    entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", 80))
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: [entry] if "meta" in host else look_up(host, *rest, **more)
    )
    with serving(a=status(307, Location=target)) as server, pytest.raises(ImageError, match=message) as caught:
        fetch(f"{server.url}/a", LOOPBACK)
    assert "secret" not in str(caught.value)


def test_a_redirect_to_a_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check, checked = addresses.address_problem, []

    def first_address_is_public(address: str, allow_private: bool) -> str | None:
        checked.append(address)
        return check(address, allow_private) if len(checked) > 1 else None

    monkeypatch.setattr(addresses, "address_problem", first_address_is_public)
    with serving(a=status(302, Location="/b")) as server, pytest.raises(ImageError, match=PRIVATE):
        fetch(f"{server.url}/a", InputSettings(retries=0))
    assert server.requested == ["/a"]


def test_only_the_checked_address_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second lookup of a host may give another address (DNS rebinding), so there is only one."""
    looked_up: list[str] = []
    with serving(a=status(200, PNG)) as server:
        port = server.server_port
        entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))

        def look_up(host: str, *rest: object, **more: object) -> list[object]:
            looked_up.append(host)
            return [entry]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        assert fetch(f"http://images.example:{port}/a", LOOPBACK) == PNG
    assert [host for host in looked_up if host != "127.0.0.1"] == ["images.example"]


def test_a_host_with_one_forbidden_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("93.184.215.14", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: entries)
    with pytest.raises(ImageError, match=r"its host is 10\.0\.0\.1, not one of the public Internet"):
        fetch("http://both.example/a.png", InputSettings())


def test_public_addresses_are_allowed() -> None:
    for address in ("93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "::ffff:8.8.8.8"):
        assert address_problem(address, allow_private=False) is None


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as proxy, serving(a=status(200, PNG)) as server:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        assert fetch(f"{server.url}/a", LOOPBACK) == PNG
        assert proxy.requested == []


@pytest.mark.parametrize("path", ["a.png", "../a.png", "/etc/passwd", "link.png"])
def test_remote_only_reads_no_file_of_this_machine(path: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "link.png").symlink_to("a.png")
    remote_only = InputSettings(remote_only=True)
    with pytest.raises(ImageError, match=r"is a path of this machine, and .*remote_only allows none"):
        load_image(path, None, tmp_path, (32, 24), "crop", inputs=remote_only)
    with pytest.raises(ImageError, match="is a path of this machine"):
        load_labels(path, None, tmp_path, (32, 24), "crop", inputs=remote_only)
    assert load_image(path, PNG, tmp_path, (32, 24), "crop", inputs=remote_only).source_size == (40, 30)  # embedded


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("https://h/a.png?X-Amz-Signature=secret#secret", "https://h/a.png?…"),
        ("https://me:secret@h/a.png", "https://…@h/a.png"),
        ("a\x1b[2J\nb.png", "a�[2J�b.png"),
        ("a\u202egnp.exe", "a�gnp.exe"),
        ("x" * 300, "x" * 200 + "…"),
        ("photos/é 1?.png", "photos/é 1?.png"),
    ],
)
def test_messages_name_a_path_on_one_short_line_without_secrets(path: str, name: str) -> None:
    assert display_name(path) == name


# --- https ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of localhost and its key, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC)
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, form, plain) + built.public_bytes(serialization.Encoding.PEM)
    )
    return path


def test_https_requires_a_trusted_certificate_of_the_host(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(a=status(200, PNG)) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # of failed handshakes
        port = server.server_port
        with pytest.raises(ImageError, match="/a: its certificate is not valid: self-signed certificate"):
            fetch(f"https://localhost:{port}/a", LOOPBACK)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with pytest.raises(ImageError, match=r"/a: its certificate is not valid: .*IP address mismatch"):
            fetch(f"https://127.0.0.1:{port}/a", LOOPBACK)
        assert server.requested == []
        assert fetch(f"https://localhost:{port}/a", LOOPBACK) == PNG


# --- a whole run ------------------------------------------------------------------------------------------------------


def write_job(folder: Path, model: Path, **columns: list[str | None]) -> Path:
    """A job file for these columns of URLs, in one shard."""
    pq.write_table(pa.table(columns), folder / "p.parquet")
    job = folder / "job.yaml"
    job.write_text(
        f"manifest: p.parquet\noutput: run\nmodel: {model}\nsampling: {{steps: 1}}\nimage: {{size: 64}}\n"
        "shards: {pairs_per_shard: 4}\ncluster: {micro_batch: 2, workers: 1}\nretries: 1\nmax_failed_fraction: 1\n"
        "inputs: {remote_only: true, allow_private_addresses: true, retries: 0}\n"
    )
    return job


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def in_this_process(*arguments: object) -> int:
    return main([*map(str, arguments), "--inline"])


def on_ray(*arguments: object) -> int:
    code, output = stylemill(*arguments)
    print(output)
    return code


@pytest.mark.parametrize("command", [in_this_process, pytest.param(on_ray, marks=pytest.mark.slow)])
def test_rows_of_a_server_that_is_gone_fail_in_the_last_attempt_and_the_others_are_committed(
    command: Callable[..., int], tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "LONGEST_PAUSE", 0.0)
    gone, answers = closed_port(), {"image": status(200, PNG), "other": status(200, png(1))}
    with serving(image=answers["image"]) as server:
        here, there = f"{server.url}/image", f"http://127.0.0.1:{gone}"
        columns = {
            "content": [here, f"{there}/image", here, here],
            "style": [here, here, f"{there}/other", here],
            "content_mask": [None, None, None, f"{there}/image"],
            "style_mask": [None, None, None, here],
        }
        job, run = write_job(tmp_path, folder, **columns), tmp_path / "run"
        assert command("run", job) == 3
        failures = pq.read_table(run / "failures" / "00000.parquet").to_pylist()
        assert [(row["row"], row["stage"], row["error"]) for row in failures] == [
            (row, "read", "DownloadError") for row in (1, 2, 3)
        ]
        assert all("retry-failed" in row["message"] for row in failures)
        assert pq.read_table(run / "data")["row"].to_pylist() == [0]
        with serving(gone, **answers):
            assert command("retry-failed", run) == 0
            assert command("run", job, "--output", tmp_path / "undisturbed") == 0
    retried, undisturbed = (
        pq.read_table(tmp_path / name / "data").sort_by("row").select(["row", "image"])
        for name in ("run", "undisturbed")
    )
    assert retried.equals(undisturbed)


def test_an_outage_that_ends_before_the_last_attempt_fails_no_row(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """404 is a recorded failure at once."""
    monkeypatch.setattr(local, "LONGEST_PAUSE", 0.0)
    busy, good = status(503), status(200, PNG)
    with serving(style=after(1, busy, good), content=good) as server:
        content: list[str | None] = [f"{server.url}/content", f"{server.url}/gone"]
        job = write_job(tmp_path, folder, content=content, style=[f"{server.url}/style"] * 2)
        assert main(["run", str(job), "--inline"]) == 3
        (failure,) = pq.read_table(tmp_path / "run" / "failures" / "00000.parquet").to_pylist()
        assert "/gone: the server answers 404" in failure["message"]
        (row,) = pq.read_table(tmp_path / "run" / "data").to_pylist()
        assert (row["content"], row["content_sha256"]) == (content[0], hashlib.sha256(PNG).hexdigest())
        assert (
            server.requested.count("/content") == 1
        )  # the second attempt and the contact sheet read it from the cache


def read_all(reader: InputReader, urls: list[str]) -> list[str]:
    """The messages of the failures; empty for what was read."""
    reasons = [reader.read(url, lambda inputs, url=url: fetch(url, inputs))[1] for url in urls]  # type: ignore[misc]
    return [reason.message if reason else "" for reason in reasons]


def test_in_a_last_attempt_a_busy_server_is_asked_once_for_each_further_image_until_it_answers() -> None:
    with serving(busy=status(503), good=status(200, PNG)) as server:
        busy, good = f"{server.url}/busy", f"{server.url}/good"
        messages = read_all(InputReader(LOOPBACK, last_attempt=True), [busy, f"{busy}?2", good, f"{busy}?3"])
        assert [bool(message) for message in messages] == [True, True, False, True]
        tries = 1 + LOOPBACK.retries
        assert server.requested == ["/busy"] * tries + ["/busy?2", "/good"] + ["/busy?3"] * tries


def test_in_a_last_attempt_a_server_that_timed_out_is_not_asked_again() -> None:
    with serving(silent=silent, good=status(200, PNG)) as slow, serving(good=status(200, PNG)) as other:
        urls = [f"{slow.url}/silent", f"{slow.url}/good", f"{other.url}/good"]
        messages = read_all(InputReader(BRIEF, last_attempt=True), urls)
        assert "took longer than inputs.timeout; `stylemill retry-failed` tries it again" in messages[0]
        assert "not requested after a timeout of its server" in messages[1]
        assert messages[2] == ""
        assert slow.requested == ["/silent"]


def test_in_a_last_attempt_a_server_that_refused_and_then_timed_out_is_not_asked_again() -> None:
    with serving(busy=status(503), silent=silent, good=status(200, PNG)) as server:
        urls = [f"{server.url}/{name}" for name in ("busy", "silent", "good")]
        messages = read_all(InputReader(BRIEF, last_attempt=True), urls)
        assert "not requested after a timeout of its server" in messages[2]
        assert "/good" not in server.requested


def test_a_failed_download_in_a_checkpoint_is_tried_again_by_the_next_start(tmp_path: Path, folder: Path) -> None:
    """The last attempt of the first start is asked to stop after a step, which writes a checkpoint."""
    port = closed_port()
    with serving(image=status(200, PNG)) as server:
        content: list[str | None] = [f"{server.url}/image", f"http://127.0.0.1:{port}/image"]
        job = write_job(tmp_path, folder, content=content, style=[f"{server.url}/image"] * 2)
        command = ["run", str(job), "--inline", "--set", "sampling.steps=3", "--set", "retries=0"]
        rule = "after-checkpoint:kill:step=2"
        faults = {"STYLEMILL_FAILPOINTS": rule, "STYLEMILL_FAILPOINTS_STATE": str(tmp_path / "state")}
        (tmp_path / "state").mkdir()
        with_checkpoints = [*command, "--set", "checkpoint.every_steps=1"]
        killed = start(*with_checkpoints, env={**os.environ, **faults})
        killed.communicate()
        assert killed.returncode == -signal.SIGKILL
        with serving(port, image=status(200, PNG)):
            assert main(with_checkpoints) == 0
    assert pq.read_table(tmp_path / "run" / "data").num_rows == 2


@pytest.mark.parametrize("last", [False, True])
def test_a_control_image_of_a_server_that_is_gone_fails_its_row_in_the_last_attempt(last: bool, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(PNG)
    controls = [f"http://127.0.0.1:{closed_port()}/edges.png", "image.png"]
    pq.write_table(
        pa.table({"content": ["image.png"] * 2, "style": ["image.png"] * 2, "control": controls}),
        tmp_path / "p.parquet",
    )
    values = {
        "name": "controls",
        "manifest": str(tmp_path / "p.parquet"),
        "output": str(tmp_path / "run"),
        "model": {"name": "model", "controlnet": "controlnet"},
        "preset": "guided-transfer",
        "image": {"size": 64},
        "inputs": LOOPBACK.model_dump() | {"retries": 0},
    }
    run = Run(
        Job.parse(values),
        RunPaths(tmp_path / "run", 1),
        open_manifest(values["manifest"]),
        "f" * 64,
        2,
        "model",
        "base",
    )
    rows = [OutputRow(row) for row in run.manifest.output_rows(0, 2)]
    if not last:
        with pytest.raises(DownloadError):
            read_pairs(run, rows, 8, last)
        return
    pairs, read = read_pairs(run, rows, 8, last)
    assert [row.failure and row.failure.error for row in read] == ["DownloadError", None]
    assert [pair.controls[0].pixels is None for pair in pairs] == [True, False]


# --- S3 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An S3 server on loopback with objects in the bucket `images`; the environment names its endpoint."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    none = tmp_path_factory.mktemp("aws") / "none"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, str(none))
        s3._filesystem.cache_clear()
        client = boto3.client("s3")
        client.create_bucket(Bucket="images")
        client.put_object(Bucket="images", Key="deep/é a.png", Body=PNG)
        client.put_object(Bucket="images", Key="empty.png", Body=b"")
        client.put_object(Bucket="images", Key="large.png", Body=bytes(5000))
        yield
        s3._filesystem.cache_clear()
    server.stop()


@pytest.mark.usefixtures("bucket")
def test_an_image_from_s3(tmp_path: Path) -> None:
    image = load_image(
        "s3://images/deep/é a.png", None, tmp_path, (32, 24), "crop", inputs=InputSettings(remote_only=True)
    )
    assert image.file_sha256 == hashlib.sha256(PNG).hexdigest()


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://images/none.png", "there is no such object"),
        ("s3://nowhere/none.png", "there is no such object"),
        ("s3://images/empty.png", r"is empty \(0 bytes\)"),
        ("s3://images/large.png", "larger than the limit of 4,000 bytes"),
    ],
)
def test_objects_that_fail_their_row(url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(url, None, tmp_path, (32, 24), "crop", inputs=InputSettings(max_bytes=4000, retries=0))


def _s3_error(code: int, name: str) -> Answer:
    body = f"<?xml version='1.0'?><Error><Code>{name}</Code><Message>no</Message></Error>".encode()
    return status(code, body, Content_Type="application/xml")


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (_s3_error(403, "AccessDenied"), ImageError, "access is denied"),
        (_s3_error(400, "ExpiredToken"), DownloadError, "the download broke off"),
        (_s3_error(403, "SignatureDoesNotMatch"), DownloadError, "the download broke off"),
        (silent, DownloadError, "took longer than inputs.timeout|broke off"),
    ],
)
def test_denied_objects_fail_their_row_but_bad_credentials_do_not(
    answer: Answer, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(**{"images/a.png": answer}) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        s3._filesystem.cache_clear()
        with pytest.raises(error, match=message):
            fetch("s3://images/a.png", BRIEF if answer is silent else LOOPBACK.model_copy(update={"retries": 0}))
        s3._filesystem.cache_clear()
