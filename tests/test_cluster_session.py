"""The connection to Ray: addresses and servers that are refused. These tests need a process without Ray."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
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
