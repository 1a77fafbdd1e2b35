"""Images by URL, against real servers on loopback: what is read, refused, tried again, and for how long.

A refusal or a 404 costs the row (ImageError); a server that is slow, busy or cuts connections costs the attempt
(DownloadError), never the row.
"""

from __future__ import annotations

import hashlib
import io
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stylemill import s3
from stylemill.cli import main
from stylemill.config.inputs import InputSettings
from stylemill.errors import DownloadError, ImageError, TransientError
from stylemill.images import download as remote
from stylemill.images.download import address_problem, fetch, shown
from stylemill.images.masks import load_labels
from stylemill.images.read import load_image

OWN = InputSettings(allow_private_addresses=True, timeout=20, retries=2)  # loopback is a private address
BRIEF = OWN.model_copy(update={"timeout": 0.3, "retries": 0})


def png(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
Answer = Callable[[BaseHTTPRequestHandler, int], None]  # what is asked, and for which time


class Server(ThreadingHTTPServer):
    """Serves `answers` by path; counts what it is asked."""

    daemon_threads = True

    def __init__(self, answers: dict[str, Answer]) -> None:
        self.asked: list[str] = []
        self.leave = threading.Event()
        counting = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with counting:
                    server.asked.append(self.path)
                    times = server.asked.count(self.path)
                with suppress(OSError):  # the other side went away, as it should
                    answers.get(self.path.partition("?")[0], status(404))(self, times)
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(**answers: Answer) -> Iterator[Server]:
    server = Server({f"/{name}": answer for name, answer in answers.items()})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.leave.set()
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


def claims(length: int | None, body: bytes) -> Answer:
    """A body of another length than is said; None: no length is said."""

    def answer(handler: BaseHTTPRequestHandler, times: int) -> None:
        handler.send_response(200)
        if length is not None:
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> Answer:
    def answer(handler: BaseHTTPRequestHandler, times: int) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for chunk in chunks:
            handler.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        handler.wfile.write(end)

    return answer


def endless(begin: bytes) -> Answer:
    def answer(handler: BaseHTTPRequestHandler, times: int) -> None:
        handler.wfile.write(begin)
        while not handler.server.leave.is_set():  # type: ignore[attr-defined]
            handler.wfile.write(bytes(1 << 16))

    return answer


def drips(begin: bytes) -> Answer:
    """A byte now and then, for ever: a limit on each read alone would never be reached."""

    def answer(handler: BaseHTTPRequestHandler, times: int) -> None:
        handler.wfile.write(begin)
        while not handler.server.leave.wait(0.05):  # type: ignore[attr-defined]
            handler.wfile.write(b"x")

    return answer


def silent(handler: BaseHTTPRequestHandler, times: int) -> None:
    handler.server.leave.wait()  # type: ignore[attr-defined]


def hangs_up(handler: BaseHTTPRequestHandler, times: int) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def after(failures: int, first: Answer, then: Answer) -> Answer:
    return lambda handler, times: (first if times <= failures else then)(handler, times)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_cache", remote._Cache())
    monkeypatch.setattr(remote, "_PAUSE", 0.001)


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(status(200, PNG), id="with a length"),
        pytest.param(claims(None, PNG), id="without a length"),
        pytest.param(chunked(PNG[:100], PNG[100:]), id="in chunks"),
    ],
)
def test_content_style_and_mask_by_url(answer: Answer, tmp_path: Path) -> None:
    mask = io.BytesIO()
    Image.new("L", (40, 30), 7).save(mask, "PNG")
    with serving(a=answer, mask=status(200, mask.getvalue())) as server:
        image = load_image(f"{server.url}/a", None, tmp_path, (32, 24), "crop", limits=OWN)
        labels = load_labels(f"{server.url}/mask", None, tmp_path, (32, 24), "crop", limits=OWN)
    assert image.file_sha256 == hashlib.sha256(PNG).hexdigest()
    assert (labels == 7).all()


def test_redirects_are_followed(tmp_path: Path) -> None:
    with serving(a=status(302, Location="/b?x=1"), b=status(301, Location="c"), c=status(200, PNG)) as server:
        assert fetch(f"{server.url}/a#part", OWN) == PNG
        assert server.asked == ["/a", "/b?x=1", "/c"]


def test_characters_of_a_url_arrive_quoted_once(tmp_path: Path) -> None:
    with serving() as server:
        for path in ("/é e?k=[1]&l=a%20b", "/%C3%A9%20e?k=[1]&l=a%20b"):
            with pytest.raises(ImageError, match="answers 404"):
                fetch(server.url + path, OWN)
        assert server.asked == ["/%C3%A9%20e?k=[1]&l=a%20b"] * 2


def test_what_was_read_is_asked_for_once_and_the_cache_keeps_within_its_size() -> None:
    with serving(a=status(200, PNG), b=status(200, bytes(1 << 20))) as server:
        for _ in range(3):
            assert fetch(f"{server.url}/a", OWN) == PNG
        assert server.asked == ["/a"]
        with pytest.raises(ImageError, match="allow_private_addresses"):
            fetch(f"{server.url}/a", InputSettings())  # another job's limits hold for what is there, too
        small = OWN.model_copy(update={"cache_mb": 1})
        for path in ("a", "b", "b", "a"):  # b takes the whole cache
            fetch(f"{server.url}/{path}", small)
        assert server.asked == ["/a", "/b", "/a"]
        none = OWN.model_copy(update={"cache_mb": 0})
        fetch(f"{server.url}/b", none)
        fetch(f"{server.url}/b", none)
        assert server.asked[3:] == ["/b", "/b"]


# --- what is tried again, and what never is ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failing",
    [
        *(pytest.param(status(code), id=str(code)) for code in (408, 425, 429, 500, 502, 503, 504)),
        pytest.param(hangs_up, id="hangs up"),
        pytest.param(claims(len(PNG) + 9, PNG), id="says a longer length"),
        pytest.param(claims(len(PNG), PNG[:50]), id="cut in the middle"),
        pytest.param(chunked(PNG[:50], end=b""), id="cut between chunks"),
        pytest.param(chunked(PNG[:50], end=b"zz\r\n"), id="no chunk"),
        pytest.param(lambda handler, _: handler.wfile.write(b"SSH-2.0-x\r\n\r\n"), id="no HTTP"),
        pytest.param(lambda handler, _: handler.wfile.write(b"HTTP/1.1 200 \r\n" + b"A: b\r\n" * 999), id="headers"),
    ],
)
def test_trouble_that_may_pass_is_tried_again_and_never_costs_the_row(failing: Answer) -> None:
    with serving(a=after(2, failing, status(200, PNG)), b=failing) as server:
        assert fetch(f"{server.url}/a", OWN) == PNG
        assert len(server.asked) == 3
        with pytest.raises(DownloadError, match=r"^http://127\.0\.0\.1:[0-9]+/b: .") as caught:
            fetch(f"{server.url}/b", OWN)
        assert server.asked.count("/b") == 3
        assert isinstance(caught.value, TransientError)
        assert "\n" not in str(caught.value)


def test_a_server_that_names_a_pause_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    busy = status(429, Retry_After="7")
    with serving(a=after(1, busy, status(200, PNG)), b=status(503, Retry_After="9999")) as server:
        fetch(f"{server.url}/a", OWN)
        assert pauses == [7.0]
        with pytest.raises(DownloadError):
            fetch(f"{server.url}/b", OWN)
        assert pauses[1:] == [60.0, 60.0]  # not for hours, whatever it says


def test_nobody_at_the_address_is_transient() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(DownloadError, match="ConnectionRefusedError"):
            fetch(f"http://127.0.0.1:{unused.getsockname()[1]}/a.png", OWN)


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 418, 204])
def test_an_answer_for_good_costs_the_row_at_once(code: int) -> None:
    with serving(a=status(code)) as server:
        with pytest.raises(ImageError, match=f"/a: the server answers {code}; correct the URL or remove its rows"):
            fetch(f"{server.url}/a", OWN)
        assert len(server.asked) == 1


def test_a_shorter_length_than_the_body_gives_a_damaged_image_and_never_another_one(tmp_path: Path) -> None:
    with serving(a=claims(500, PNG)) as server, pytest.raises(ImageError, match="truncated or damaged"):
        load_image(f"{server.url}/a", None, tmp_path, (32, 24), "crop", limits=OWN)


@pytest.mark.parametrize(
    "slow",
    [
        pytest.param(silent, id="silence"),
        pytest.param(drips(b"HTTP/1.1 200 OK\r\nA: "), id="a header that drips"),
        pytest.param(drips(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"), id="a body that drips"),
        pytest.param(drips(b"HTTP/1.1 200 OK\r\n\r\n"), id="a body without length that drips"),
        pytest.param(drips(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"), id="a chunk size that drips"),
    ],
)
def test_a_slow_server_is_left_at_the_deadline_however_it_is_slow(slow: Answer) -> None:
    with serving(a=slow) as server, pytest.raises(DownloadError, match=r"/a: the download took longer than inputs\.t"):
        fetch(f"{server.url}/a", BRIEF)


def test_a_server_that_never_shakes_hands_is_left_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf, pytest.raises(DownloadError, match="took longer than"):
        fetch(f"https://127.0.0.1:{deaf.getsockname()[1]}/a.png", BRIEF)


@pytest.mark.parametrize(
    ("large", "asked"),
    [
        pytest.param(claims(10**15, b""), 1, id="as it says"),
        pytest.param(endless(b"HTTP/1.1 200 OK\r\n\r\n"), 1, id="without end"),
        pytest.param(endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n"), 1, id="one chunk"),
    ],
)
def test_no_more_is_read_than_the_limit(large: Answer, asked: int) -> None:
    limits = OWN.model_copy(update={"max_bytes": 1 << 20})
    with serving(a=large) as server, pytest.raises(ImageError, match=r"larger than the limit of 1,048,576 bytes"):
        fetch(f"{server.url}/a", limits)
    assert len(server.asked) == asked


# --- what is refused --------------------------------------------------------------------------------------------------

METADATA = "where clouds keep their metadata"
PRIVATE = "inputs.allow_private_addresses: true"


@pytest.mark.parametrize(
    ("url", "said"),
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
        ("http://[::1/x.png", "is no URL"),
        ("http://h:99999/x.png", "is no URL"),
        ("http://h:0/x.png", "names no host"),
        ("http://h/\ud800", "is no URL"),
        ("http://" + "a" * 64 + ".org/", "no such host|no valid name"),
        ("http://no-such-host.invalid/a.png", "no such host|cannot be looked up"),
        ("http://me:secret@example.org/a.png", "a user's name"),
    ],
)
def test_urls_that_are_refused_unasked(url: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *_: pytest.fail("connected"))
    with pytest.raises((ImageError, DownloadError), match=said) as caught:
        fetch(url, InputSettings(retries=0))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "said"),
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
def test_redirects_that_are_not_followed(target: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the own network is allowed, and where it is a name that leads there."""
    look_up = socket.getaddrinfo
    entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", 80))
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: [entry] if "meta" in host else look_up(host, *rest, **more)
    )
    with serving(a=status(307, Location=target)) as server, pytest.raises(ImageError, match=said) as caught:
        fetch(f"{server.url}/a", OWN)
    assert "secret" not in str(caught.value)


def test_a_redirect_into_the_own_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check, checked = remote.address_problem, []

    def public_at_first(address: str, allow_private: bool) -> str | None:
        checked.append(address)
        return check(address, allow_private) if len(checked) > 1 else None

    monkeypatch.setattr(remote, "address_problem", public_at_first)
    with serving(a=status(302, Location="/b")) as server, pytest.raises(ImageError, match=PRIVATE):
        fetch(f"{server.url}/a", InputSettings(retries=0))
    assert server.asked == ["/a"]


def test_the_address_that_was_checked_is_the_one_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that is looked up a second time may give another address (DNS rebinding): there is no second look."""
    looked_up: list[str] = []
    with serving(a=status(200, PNG)) as server:
        port = server.server_port
        entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))

        def look_up(host: str, *rest: object, **more: object) -> list[object]:
            looked_up.append(host)
            return [entry]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        assert fetch(f"http://images.example:{port}/a", OWN) == PNG
    assert [host for host in looked_up if host != "127.0.0.1"] == ["images.example"]


def test_a_host_with_one_forbidden_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("93.184.215.14", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: entries)
    with pytest.raises(ImageError, match=r"its host is 10\.0\.0\.1, not one of the public Internet"):
        fetch("http://both.example/a.png", InputSettings())


def test_public_addresses_are_allowed() -> None:
    for address in ("93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "::ffff:8.8.8.8"):
        assert address_problem(address, allow_private=False) is None


def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as proxy, serving(a=status(200, PNG)) as server:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        assert fetch(f"{server.url}/a", OWN) == PNG
        assert proxy.asked == []


@pytest.mark.parametrize("path", ["a.png", "../a.png", "/etc/passwd", "link.png"])
def test_download_only_reads_no_file_of_this_machine(path: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "link.png").symlink_to("a.png")
    strangers = InputSettings(remote_only=True)
    with pytest.raises(ImageError, match=r"is a path of this machine, and .*remote_only allows none"):
        load_image(path, None, tmp_path, (32, 24), "crop", limits=strangers)
    with pytest.raises(ImageError, match="is a path of this machine"):
        load_labels(path, None, tmp_path, (32, 24), "crop", limits=strangers)
    assert load_image(path, PNG, tmp_path, (32, 24), "crop", limits=strangers).source_size == (40, 30)  # embedded


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("https://h/a.png?X-Amz-Signature=secret#secret", "https://h/a.png?…"),
        ("https://me:secret@h/a.png", "https://…@h/a.png"),
        ("a\x1b[2J\nb.png", "a�[2J�b.png"),
        ("a\u202egnp.exe", "a�gnp.exe"),
        ("x" * 300, "x" * 200 + "…"),
        ("photos/é 1?.png", "photos/é 1?.png"),
    ],
)
def test_messages_name_a_path_on_one_short_line_without_secrets(path: str, words: str) -> None:
    assert shown(path) == words


# --- https ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of localhost that has signed itself, with its key, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC)
    made = (
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
        key.private_bytes(serialization.Encoding.PEM, form, plain) + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


def test_https_reads_from_whom_the_certificate_names_and_from_nobody_else(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(a=status(200, PNG)) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # of handshakes that break off
        port = server.server_port
        with pytest.raises(ImageError, match="/a: its certificate is not valid: self-signed certificate"):
            fetch(f"https://localhost:{port}/a", OWN)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with pytest.raises(ImageError, match=r"/a: its certificate is not valid: .*IP address mismatch"):
            fetch(f"https://127.0.0.1:{port}/a", OWN)
        assert server.asked == []
        assert fetch(f"https://localhost:{port}/a", OWN) == PNG


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_an_outage_leaves_the_run_open_and_the_next_start_finishes_it(tmp_path: Path, folder: Path) -> None:
    """404 is a recorded failure; 503 is never one, however often it comes."""
    up = threading.Event()
    busy, good = status(503), status(200, PNG)
    with serving(style=lambda *asked: (good if up.is_set() else busy)(*asked), content=good) as server:
        content = [f"{server.url}/content", f"{server.url}/gone"]
        pq.write_table(pa.table({"content": content, "style": [f"{server.url}/style"] * 2}), tmp_path / "p.parquet")
        job = tmp_path / "job.yaml"
        job.write_text(
            f"manifest: p.parquet\noutput: run\nmodel: {folder}\nsampling: {{steps: 1}}\nimage: {{size: 64}}\n"
            "shards: {pairs_per_shard: 2}\ncluster: {micro_batch: 2}\nretries: 0\n"
            "inputs: {remote_only: true, allow_private_addresses: true, retries: 1}\n"
        )
        assert main(["run", str(job), "--inline"]) == 1
        assert not list((tmp_path / "run" / "records").iterdir())
        assert not list((tmp_path / "run" / "failures").iterdir())
        up.set()
        assert main(["run", str(job), "--inline"]) == 3
        (failure,) = pq.read_table(tmp_path / "run" / "failures" / "00000.parquet").to_pylist()
        assert "/gone: the server answers 404" in failure["message"]
        (row,) = pq.read_table(tmp_path / "run" / "data").to_pylist()
        assert (row["content"], row["content_sha256"]) == (content[0], hashlib.sha256(PNG).hexdigest())
        assert server.asked.count("/content") == 1  # the second start, and the contact sheet, had it in the cache


# --- S3 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An S3 server on loopback with objects in the bucket `images`; the environment leads to it."""
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
        "s3://images/deep/é a.png", None, tmp_path, (32, 24), "crop", limits=InputSettings(remote_only=True)
    )
    assert image.file_sha256 == hashlib.sha256(PNG).hexdigest()


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://images/none.png", "there is no such object"),
        ("s3://nowhere/none.png", "there is no such object"),
        ("s3://images/empty.png", r"is empty \(0 bytes\)"),
        ("s3://images/large.png", "larger than the limit of 4,000 bytes"),
    ],
)
def test_objects_that_cost_their_row(url: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=said):
        load_image(url, None, tmp_path, (32, 24), "crop", limits=InputSettings(max_bytes=4000, retries=0))


def _s3_says(code: int, name: str) -> Answer:
    body = f"<?xml version='1.0'?><Error><Code>{name}</Code><Message>no</Message></Error>".encode()
    return status(code, body, Content_Type="application/xml")


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (_s3_says(403, "AccessDenied"), ImageError, "access is denied"),
        (_s3_says(400, "ExpiredToken"), DownloadError, "the download broke off"),
        (_s3_says(403, "SignatureDoesNotMatch"), DownloadError, "the download broke off"),
        (silent, DownloadError, "took longer than inputs.timeout|broke off"),
    ],
)
def test_denied_objects_cost_their_row_but_bad_credentials_do_not(
    answer: Answer, error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(**{"images/a.png": answer}) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        s3._filesystem.cache_clear()
        with pytest.raises(error, match=said):
            fetch("s3://images/a.png", BRIEF if answer is silent else OWN)
        s3._filesystem.cache_clear()
