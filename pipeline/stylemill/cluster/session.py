"""The connection to Ray: a local Ray that starts and stops with the run, or a running cluster."""

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
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# Ray reads these when it is imported or started. Values that the user has set are kept.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning about its future default

import ray

from stylemill.cluster.authentication import probe_server, use_token
from stylemill.config.job import ClusterSettings
from stylemill.errors import ClusterError

OBJECT_STORE_BYTES = 80 * 2**20  # about the least that Ray accepts: only metadata passes through it


@contextmanager
def ray_session(cluster: ClusterSettings, timeout: float) -> Iterator[bool]:
    """Connect to Ray for the duration of the block; yields whether this is a local Ray started for it.

    If this process is already connected to Ray, that connection is used and kept. Raises ClusterError if
    `cluster.address` does not answer within `timeout` seconds, or is not a Ray cluster that can be joined.
    """
    if ray.is_initialized():
        yield False
    elif cluster.address is None:
        with _local_ray(cluster):
            yield True
    else:
        _join(cluster.address, timeout)
        try:
            yield False
        finally:
            ray.shutdown()


@contextmanager
def _local_ray(cluster: ClusterSettings) -> Iterator[None]:
    cores = len(os.sched_getaffinity(0))
    workers = 1 if cluster.workers == "auto" else cluster.workers
    # Ray creates sockets in this folder. Their paths may have 107 characters, so a long TMPDIR cannot be used.
    folder = tempfile.mkdtemp(prefix="stylemill-", dir="/tmp" if os.access("/tmp", os.W_OK) else None)
    if not os.access(os.path.expanduser("~"), os.W_OK):  # as in many containers: Ray would write its token there
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Ray's default is 15: beside other work on the machine, its workers would hardly get a CPU.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        with _keep_sigterm_handler():
            ray.init(
                address="local",  # takes precedence over RAY_ADDRESS
                num_cpus=max(cores, workers * cluster.threads),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level="error",
                _temp_dir=folder,
            )
        yield
    except (OSError, RuntimeError, ValueError) as error:
        if ray.is_initialized():  # the error was raised in the block
            raise
        raise ClusterError(
            f"Ray cannot be started on this machine: {_one_line(error)}; --inline runs without Ray"
        ) from error
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _join(address: str, timeout: float) -> None:
    known = _known_address(address)
    if known is not None:
        _check_address(known, address, timeout)
    try:
        with _keep_sigterm_handler():
            ray.init(address=address, logging_level="error")
    # Ray exits the process if the cluster ends the connection, and raises RuntimeError for another version of Ray or
    # Python.
    except (OSError, RuntimeError, ValueError, SystemExit, ray.exceptions.RayError) as error:
        if isinstance(error, ConnectionError) and known is None:
            raise ClusterError(
                f"cluster.address {address}: no Ray runs on this machine ({_one_line(error)}); start one with "
                "'ray start --head', set the address to host:port, or leave it out"
            ) from error
        reason = f"Ray exited with code {error.code}" if isinstance(error, SystemExit) else _one_line(error)
        raise ClusterError(f"cluster.address {address}: cannot join this Ray cluster: {reason}") from error


def _known_address(address: str) -> str | None:
    """The address that `ray.init` will connect to, or None if only Ray can find it.

    For "auto" it is RAY_ADDRESS, or else what the last `ray start` on this machine recorded (see `ray.init`).
    """
    if address != "auto":
        return address
    if named := os.environ.get("RAY_ADDRESS"):
        return named
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    try:
        return Path(folder, "ray", "ray_current_cluster").read_text().strip() or None
    except OSError:
        return None


def _check_address(address: str, given: str, timeout: float) -> None:
    """Raise ClusterError if no gRPC server answers at `address`. `ray.init` would try for minutes, then exit."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.scheme not in ("", "ray"):
        raise ClusterError(f"cluster.address {given}: not one of host:port, ray://host:port and auto")
    advice = "check that the cluster runs and that this machine may reach the port"
    try:
        socket.create_connection((host, port), timeout).close()
    except OSError as error:
        reason = error.strerror or error
        raise ClusterError(f"cluster.address {given}: no answer from {host}:{port} ({reason}); {advice}") from error
    if os.environ.get("RAY_USE_TLS", "0") == "1":
        return  # the check below would need Ray's certificates
    status = probe_server(address, timeout)
    if status == "DEADLINE_EXCEEDED":
        raise ClusterError(f"cluster.address {given}: no answer from {host}:{port} (timed out); {advice}")
    if status == "UNAVAILABLE":
        raise ClusterError(
            f"cluster.address {given}: the server at {host}:{port} is not Ray; a head node listens at 6379 "
            "(host:port) and at 10001 (ray://host:port); 8265 is its dashboard"
        )
    if status == "UNAUTHENTICATED":
        use_token(address, given, timeout)


@contextmanager
def _keep_sigterm_handler() -> Iterator[None]:
    """Restore the SIGTERM handler, which Ray replaces: the run writes checkpoints when it gets that signal."""
    main = threading.current_thread() is threading.main_thread()
    handler: Any = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if main and handler is not None:
            signal.signal(signal.SIGTERM, handler)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
