"""The connection to Ray: one of our own on this machine, or a cluster that is already there."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

# Read by Ray when it is imported or started; what the user has set is left alone.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning about its future default

import ray
from ray._private.services import canonicalize_bootstrap_address

from stylemill.config.job import ClusterSettings
from stylemill.errors import ClusterError

OBJECT_STORE_BYTES = 80 * 2**20  # about the least Ray accepts: only metadata passes through it
# An HTTP/2 client's first words. Ray's servers speak gRPC, so they answer with a settings frame.
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
SETTINGS_FRAME = 4


@contextmanager
def ray_session(cluster: ClusterSettings, timeout: float) -> Iterator[bool]:
    """Ray for as long as the block lasts; yields whether it is our own (embedded).

    A Ray that this process has already started is used and left running. Raises ClusterError when `cluster.address`
    does not answer within `timeout` seconds or is no Ray cluster that this Ray can join.
    """
    if ray.is_initialized():
        yield False
    elif cluster.address is None:
        with _embedded(cluster):
            yield True
    else:
        _connect(cluster.address, timeout)
        try:
            yield False
        finally:
            ray.shutdown()


@contextmanager
def _embedded(cluster: ClusterSettings) -> Iterator[None]:
    cores = len(os.sched_getaffinity(0))
    workers = 1 if cluster.workers == "auto" else cluster.workers
    # Sockets lie in this folder, and their paths may have 107 characters: not below a long TMPDIR.
    folder = tempfile.mkdtemp(prefix="stylemill-", dir="/tmp" if os.access("/tmp", os.W_OK) else None)
    if not os.access(os.path.expanduser("~"), os.W_OK):  # as in many a container: Ray would write its token there
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        with _our_signal_handlers():
            ray.init(
                address="local",  # whatever RAY_ADDRESS says
                num_cpus=max(cores, workers * cluster.threads),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level="error",
                _temp_dir=folder,
            )
        yield
    except (OSError, RuntimeError, ValueError) as error:
        if ray.is_initialized():  # it came from the block
            raise
        raise ClusterError(
            f"Ray cannot be started on this machine: {_one_line(error)}; --inline works without"
        ) from error
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _connect(address: str, timeout: float) -> None:
    _probe(_resolve(address), address, timeout)
    try:
        with _our_signal_handlers():
            ray.init(address=address, logging_level="error")
    # Ray exits the process when a cluster breaks off the greeting; other Ray or Python versions are a RuntimeError.
    except (OSError, RuntimeError, ValueError, SystemExit, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"cluster.address {address}: this Ray cannot be joined: {_one_line(error)}; if it asks for a token, set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from error


def _resolve(address: str) -> str:
    if address != "auto":
        return address
    try:
        found: str | None = os.environ.get("RAY_ADDRESS") or canonicalize_bootstrap_address("auto")
    except ConnectionError:
        found = None
    if not found:
        raise ClusterError(
            "cluster.address auto: no Ray runs on this machine; start one with 'ray start --head', name one as "
            "host:port, or leave the address out"
        )
    return found


def _probe(address: str, given: str, timeout: float) -> None:
    """Look whether a gRPC server answers, since Ray itself tries for minutes and then ends the process."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.scheme not in ("", "ray"):
        raise ClusterError(f"cluster.address {given}: not one of host:port, ray://host:port and auto")
    try:
        with socket.create_connection((host, port), timeout) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return  # the greeting would have to be encrypted; an open port must do
            connection.settimeout(timeout)
            connection.sendall(GREETING)
            answer = connection.recv(9)  # the head of a frame: length (3 bytes), type, ...
    except OSError as error:
        raise ClusterError(
            f"cluster.address {given}: no answer from {host}:{port} ({error.strerror or error}); check that the "
            "cluster runs and that this machine may reach the port"
        ) from error
    if len(answer) < 4 or answer[3] != SETTINGS_FRAME:
        raise ClusterError(
            f"cluster.address {given}: what answers at {host}:{port} is not Ray; a head node listens at 6379 "
            "(host:port) and at 10001 (ray://host:port); 8265 is its dashboard"
        )


@contextmanager
def _our_signal_handlers() -> Iterator[None]:
    """Ray installs a SIGTERM handler of its own; the run's must stay, since it writes checkpoints."""
    main = threading.current_thread() is threading.main_thread()
    ours: Any = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if main and ours is not None:
            signal.signal(signal.SIGTERM, ours)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
