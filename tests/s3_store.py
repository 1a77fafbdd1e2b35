"""An S3 server on loopback, and a gate before it where requests are refused, delayed, or robbed of their conditions."""

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
# What a gate does with a request: a status to answer instead, None to let it pass; silent: no answer at all; lost: it
# is done, and the answer never arrives; slow: it is done late; plain: as by a store without conditional requests.
Treatment = int | str | None
Rule = Callable[[str, str], Treatment]


@dataclass
class Store:
    """A real S3 server with one bucket, `runs`."""

    url: str
    client: Any

    def environment(self, machine: Path, url: str | None = None) -> dict[str, str]:
        """What a process of `machine`, a folder of its own, has in its environment; `url` is that of a gate."""
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
        """What stands below s3://runs/folder, by the rest of the name."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{folder}/")
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return {key.removeprefix(f"{folder}/"): self.get(key) for key in keys}

    def get(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def remove(self, key: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=key)

    def uploads(self) -> list[str]:
        """Keys of uploads in parts that were begun and neither completed nor aborted."""
        return [entry["Key"] for entry in self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", ())]


@contextmanager
def serving_s3() -> Iterator[Store]:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=url, **keys)
    client.create_bucket(Bucket=BUCKET)
    yield Store(url, client)
    server.stop()


@dataclass
class Gate:
    """`rule` is asked what to do with each request, by its method and path with query; `asked` are those so far."""

    url: str
    rule: Rule = lambda method, path: None
    asked: list[tuple[str, str]] = field(default_factory=list)
    treated: int = 0


@contextmanager
def gate(store: Store, rule: Rule = lambda method, path: None) -> Iterator[Gate]:
    behind = urlsplit(store.url).netloc
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            made.asked.append((self.command, self.path))
            treatment = made.rule(self.command, self.path)
            made.treated += treatment is not None
            if treatment == "silent":
                ended.wait()
            if treatment == "slow":
                time.sleep(0.2)
            if isinstance(treatment, int):
                self.answer(treatment, {}, _error(treatment))
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
                self.answer(response.status, dict(response.headers), data)
            connection.close()

        def answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
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
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # of clients that were killed
    made = Gate(f"http://127.0.0.1:{server.server_port}", rule)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield made
    finally:
        ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _error(status: int) -> bytes:
    code = {503: "SlowDown", 500: "InternalError", 403: "AccessDenied", 501: "NotImplemented"}[status]
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()


def every(number: int, treatment: Treatment) -> Rule:
    """The `number`th of each so many requests is treated so."""
    counted = iter(range(1, 1 << 30))
    return lambda method, path: treatment if next(counted) % number == 0 else None


def times(count: int, treatment: Treatment, method: str = "") -> Rule:
    """The first `count` requests (of a method) are."""
    left = [count]

    def rule(asked: str, path: str) -> Treatment:
        if (method and asked != method) or not left[0]:
            return None
        left[0] -= 1
        return treatment

    return rule


def forget_connections() -> None:
    """What is asked next goes where the environment says now."""
    from stylemill import s3
    from stylemill.store.object_store.bucket import bucket

    s3._filesystem.cache_clear()
    bucket.cache_clear()


def here(environment: dict[str, str], patch: Any) -> None:
    """Let this process be one with that environment."""
    import tempfile

    for name, value in environment.items():
        patch.setenv(name, value)
    patch.setattr(tempfile, "tempdir", environment["TMPDIR"])
    forget_connections()
