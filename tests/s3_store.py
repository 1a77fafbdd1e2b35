"""An S3 server on the loopback interface, and a proxy that can refuse, delay, lose or change requests to it."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

BUCKET = "runs"
# What the proxy does with a request. None: forward it; a status: respond with it instead; "silent": never respond;
# "lost": forward it and lose the response; "slow": forward it late; "plain": forward it without its conditions, as if
# the store had no conditional requests.
Treatment = int | str | None
Rule = Callable[[str, str], Treatment]


@dataclass
class ObjectStore:
    """A real S3 server with one bucket, `runs`."""

    url: str
    client: Any

    def environment(self, machine: Path, url: str | None = None) -> dict[str, str]:
        """The environment of a process whose machine has the local disk `machine`; `url` is that of a proxy."""
        machine.mkdir(parents=True, exist_ok=True)
        none = str(machine / "none")
        return {
            "AWS_ENDPOINT_URL": url or self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": none,
            "AWS_SHARED_CREDENTIALS_FILE": none,
            "TMPDIR": str(machine),
        }

    def objects(self, folder: str) -> dict[str, bytes]:
        """The objects in s3://runs/folder, by their key relative to the folder."""
        return {name: self.get(f"{folder}/{name}") for name in self.names(folder)}

    def names(self, folder: str) -> list[str]:
        """The keys in s3://runs/folder, relative to the folder."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{folder}/")
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return [key.removeprefix(f"{folder}/") for key in keys]

    def get(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def remove(self, key: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=key)

    def uploads(self) -> list[str]:
        """The keys of multipart uploads that were neither completed nor aborted."""
        return [entry["Key"] for entry in self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", ())]


@contextmanager
def serving_s3() -> Iterator[ObjectStore]:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=url, **keys)
    client.create_bucket(Bucket=BUCKET)
    yield ObjectStore(url, client)
    server.stop()


@dataclass
class Proxy:
    """A running proxy. `rule` returns what to do with a request, given its method, and its path with the query.

    `requests` holds the requests so far, `treated` counts those that were not just forwarded.
    """

    url: str
    rule: Rule = lambda method, path: None
    requests: list[tuple[str, str]] = field(default_factory=list)
    treated: int = 0


@contextmanager
def running_proxy(store: ObjectStore, rule: Rule = lambda method, path: None) -> Iterator[Proxy]:
    behind = urlsplit(store.url).netloc
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            proxy.requests.append((self.command, self.path))
            treatment = proxy.rule(self.command, self.path)
            proxy.treated += treatment is not None
            if treatment == "silent":
                ended.wait()
            if treatment == "slow":
                time.sleep(0.2)
            if isinstance(treatment, int):
                self.respond(treatment, {}, _error(treatment))
                return
            headers = dict(self.headers)
            if treatment == "plain":
                headers = {name: value for name, value in headers.items() if not name.lower().startswith("if-")}
            connection = http.client.HTTPConnection(behind)
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            data = response.read()
            if treatment == "lost":
                self.close_connection = True
            else:
                self.respond(response.status, dict(response.headers), data)
            connection.close()

        def respond(self, status: int, headers: dict[str, str], data: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            length = headers.get("Content-Length") if self.command == "HEAD" else len(data)
            self.send_header("Content-Length", str(length or 0))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients are killed
    proxy = Proxy(f"http://127.0.0.1:{server.server_port}", rule)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield proxy
    finally:
        ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _error(status: int) -> bytes:
    code = {503: "SlowDown", 500: "InternalError", 403: "AccessDenied", 501: "NotImplemented"}[status]
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()


def every_nth(number: int, treatment: Treatment) -> Rule:
    """Apply the treatment to every `number`th request."""
    counted = iter(range(1, 1 << 30))
    return lambda method, path: treatment if next(counted) % number == 0 else None


def first_requests(count: int, treatment: Treatment, method: str = "") -> Rule:
    """Apply the treatment to the first `count` requests, or to those of one method."""
    left = [count]

    def rule(request_method: str, path: str) -> Treatment:
        if (method and request_method != method) or not left[0]:
            return None
        left[0] -= 1
        return treatment

    return rule


def close_connections() -> None:
    """Make the next request read the environment again."""
    from stylemill import s3
    from stylemill.store.object_store.bucket import open_bucket

    s3._filesystem.cache_clear()
    open_bucket.cache_clear()


def use_environment(environment: dict[str, str], patch: Any) -> None:
    """Give this process the environment of a machine."""
    import tempfile

    for name, value in environment.items():
        patch.setenv(name, value)
    patch.setattr(tempfile, "tempdir", environment["TMPDIR"])
    close_connections()
