"""The connection to Ray: addresses and servers that are refused, tokens. These tests need a process without Ray."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray

from stylemill.cluster.session import ray_session
from stylemill.config.job import ClusterSettings
from stylemill.errors import ClusterError


def listening() -> socket.socket:
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return server


def closed_port() -> int:
    with listening() as server:
        return int(server.getsockname()[1])


def raises(error: Exception) -> Callable[..., Any]:
    def init(**options: Any) -> None:
        raise error

    return init


@pytest.mark.parametrize("form", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
def test_an_address_without_a_server_is_refused(form: str) -> None:
    settings = ClusterSettings(address=form.format(port=closed_port()))
    with pytest.raises(ClusterError, match="no answer"), ray_session(settings, 2):
        pass


def test_a_server_that_sends_nothing_is_refused_after_the_timeout() -> None:
    with (
        listening() as server,
        pytest.raises(ClusterError, match="no answer"),
        ray_session(ClusterSettings(address=f"127.0.0.1:{server.getsockname()[1]}"), 0.2),
    ):
        pass


def test_a_web_server_is_refused() -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            address = f"127.0.0.1:{server.server_port}"
            with pytest.raises(ClusterError, match="is not Ray"), ray_session(ClusterSettings(address=address), 5):
                pass
        finally:
            server.shutdown()


@pytest.mark.parametrize("form", ["127.0.0.1:{port}", "localhost:{port}", "ray://127.0.0.1:{port}"])
def test_a_grpc_server_that_ray_cannot_join_is_refused(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", raises(RuntimeError("Version mismatch")))
    server = grpc.server(ThreadPoolExecutor(1))
    address = form.format(port=server.add_insecure_port("127.0.0.1:0"))
    server.start()
    try:
        with (
            pytest.raises(ClusterError, match=f"{address}: cannot join this Ray cluster: Version mismatch"),
            ray_session(ClusterSettings(address=address), 5),
        ):
            pass
    finally:
        server.stop(None)


def test_auto_uses_the_address_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    port = closed_port()
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with (
        pytest.raises(ClusterError, match=rf"^cluster\.address auto: no answer from 127\.0\.0\.1:{port} "),
        ray_session(ClusterSettings(address="auto"), 2),
    ):
        pass


def test_auto_is_refused_if_the_last_ray_of_this_machine_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{closed_port()}")  # as `ray start` does
    monkeypatch.setattr(ray, "init", raises(AssertionError()))
    with (
        pytest.raises(ClusterError, match=r"^cluster\.address auto: no answer from 127\.0\.0\.1:"),
        ray_session(ClusterSettings(address="auto"), 2),
    ):
        pass


def test_auto_is_refused_if_no_ray_runs_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    # Ray would also find an instance that another program on this machine started.
    monkeypatch.setattr(ray, "init", raises(ConnectionError("Could not find any running Ray instance")))
    with (
        pytest.raises(ClusterError, match=r"^cluster\.address auto: no Ray runs on this machine"),
        ray_session(ClusterSettings(address="auto"), 2),
    ):
        pass


@pytest.mark.parametrize("address", ["localhost", "head:port", "http://127.0.0.1:8265", ""])
def test_other_forms_of_an_address_are_refused(address: str) -> None:
    with pytest.raises(ClusterError, match="not one of host:port"), ray_session(ClusterSettings(address=address), 2):
        pass


# --- tokens -----------------------------------------------------------------------------------------------------------


class AsksForToken(grpc.GenericRpcHandler):
    """A server that refuses each call without its token, as Ray does."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        authorized = ("authorization", "Bearer the cluster's") in details.invocation_metadata

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            if not authorized:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "Authentication token is missing or incorrect")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The address of such a server. The home folder has no token."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    server = grpc.server(ThreadPoolExecutor(1), [AsksForToken()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({}, "this machine has none; `ray get-auth-token` prints it"),
        ({"RAY_AUTH_TOKEN": "another"}, "RAY_AUTH_TOKEN has another one; `ray get-auth-token` prints it"),
        ({"RAY_AUTH_TOKEN_PATH": "/absent"}, "RAY_AUTH_TOKEN_PATH is set but file cannot be opened"),
        ({"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE is disabled; unset it"),
    ],
)
def test_a_cluster_that_asks_for_another_token_is_refused_with_advice(
    form: str, environment: dict[str, str], problem: str, asking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = ClusterSettings(address=form.format(asking))
    with pytest.raises(ClusterError, match="asks for a token") as refused, ray_session(settings, 5):
        pass
    assert problem in str(refused.value)


JOIN = """
import sys, ray
from stylemill.cluster.session import ray_session
from stylemill.config.job import ClusterSettings
for address in sys.argv[1:]:
    with ray_session(ClusterSettings(address=address), 10):
        print(ray.get(ray.remote(lambda: "joined").remote()))
"""


@pytest.mark.slow
def test_a_cluster_is_joined_with_the_token_in_the_home_folder(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["HOME"] = str(tmp_path)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("a" * 64)
    port = closed_port()
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:  # short: it has sockets
        options = f"--head --block --port={port} --temp-dir={folder} --num-cpus=1 --include-dashboard=false"
        head = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), "start", *options.split()],
            env=environment | {"RAY_AUTH_MODE": "token"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            assert head.stdout
            assert any("Ray runtime started" in line for line in head.stdout)
            joined = subprocess.run(
                [sys.executable, "-c", JOIN, f"127.0.0.1:{port}"], env=environment, capture_output=True, text=True
            )
            assert joined.stdout == "joined\n", joined.stderr
        finally:
            os.killpg(head.pid, signal.SIGKILL)
            head.communicate()


# --- a local Ray ------------------------------------------------------------------------------------------------------


NICENESS = "RAY_worker_niceness"


@pytest.mark.parametrize(("given", "niceness"), [(None, "0"), ("7", "7")])
def test_workers_of_a_local_ray_have_the_niceness_of_the_driver_unless_the_user_sets_another(
    given: str | None, niceness: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NICENESS, given or "")  # also without a given value, so that it is restored
    if given is None:
        monkeypatch.delenv(NICENESS)
    seen = []

    def init(**options: Any) -> None:
        seen.append(os.environ.get(NICENESS))
        raise OSError("no Ray here")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ClusterError, match="Ray cannot be started"), ray_session(ClusterSettings(), 5):
        pass
    assert seen == [niceness]
