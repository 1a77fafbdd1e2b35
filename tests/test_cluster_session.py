"""The connection to Ray: addresses and servers that are refused. These tests need a process without Ray."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

import pytest

from stylemill.cluster.session import ray_session
from stylemill.config.job import ClusterSettings
from stylemill.errors import ClusterError


def listening() -> socket.socket:
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return server


@pytest.mark.parametrize("form", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
def test_an_address_without_a_server_is_refused(form: str) -> None:
    with listening() as server:
        address = form.format(port=server.getsockname()[1])
    with pytest.raises(ClusterError, match="no answer"), ray_session(ClusterSettings(address=address), 2):
        pass


def test_a_server_that_sends_nothing_is_refused_after_the_timeout() -> None:
    with (
        listening() as server,
        pytest.raises(ClusterError, match="no answer"),
        ray_session(ClusterSettings(address=f"127.0.0.1:{server.getsockname()[1]}"), 0.2),
    ):
        pass


def test_a_web_server_is_refused() -> None:
    def serve(server: socket.socket) -> None:
        with suppress(OSError):  # until the test closes the server
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with listening() as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ClusterError, match="is not Ray"), ray_session(ClusterSettings(address=address), 2):
            pass


@pytest.mark.parametrize("address", ["localhost", "head:port", "http://127.0.0.1:8265", ""])
def test_other_forms_of_an_address_are_refused(address: str) -> None:
    with pytest.raises(ClusterError, match="not one of host:port"), ray_session(ClusterSettings(address=address), 2):
        pass
