"""Token authentication: whether a Ray cluster asks for a token, and whether the token of this machine is the right one.

A Ray that is started without any setting asks for the token in ~/.ray/auth_token. A process that joins it by its
address sends the token only if RAY_AUTH_MODE is set, and otherwise fails after 20 seconds.
"""

from __future__ import annotations

import os
from typing import Any

import grpc
import ray

from stylemill.errors import ClusterError

_raylet: Any = ray._raylet  # its type stubs lack what is used here
_ADVICE = (
    "`ray get-auth-token` prints it on a machine of the cluster; set RAY_AUTH_TOKEN to it here, or write it to "
    "~/.ray/auth_token"
)


def probe_server(address: str, timeout: float, token: str = "") -> str:
    """The gRPC status of the server at host:port or ray://host:port after a call that changes nothing.

    UNAUTHENTICATED: it asks for a token, or for another one than `token`. UNAVAILABLE: it does not speak gRPC.
    DEADLINE_EXCEEDED: it sends nothing for `timeout` seconds. After any other status, Ray may try to connect.
    """
    method = "RayletDriver/ClusterInfo" if "://" in address else "NodeInfoGcsService/CheckAlive"
    headers = [("authorization", f"Bearer {token}")] if token else None
    # Ray's own channels use no proxy either.
    with grpc.insecure_channel(address.split("://")[-1], [("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary(f"/ray.rpc.{method}", request_serializer=bytes, response_deserializer=bytes)
        try:
            call(b"", timeout=timeout, metadata=headers)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def use_token(address: str, given: str, timeout: float) -> None:
    """Make this process send its token to the cluster at `address`, which asks for one.

    `given` is the job's `cluster.address`. Raises ClusterError if this machine has no token, or not that of the
    cluster, or if RAY_AUTH_MODE forbids to send it.
    """
    cluster = f"cluster.address {given}: this Ray cluster asks for a token"
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        raise ClusterError(f"{cluster}, and RAY_AUTH_MODE is {mode}; unset it, or set it to token")
    if not hasattr(_raylet, "AuthenticationTokenLoader"):
        raise ClusterError(f"{cluster}, and Ray {ray.__version__} has none; install the Ray version of the cluster")
    loader = _raylet.AuthenticationTokenLoader.instance()
    loader.reset_cache()
    try:
        token = loader.get_raw_token(ignore_auth_mode=True)
    except ray.exceptions.RayError as error:  # RAY_AUTH_TOKEN_PATH names no file
        raise ClusterError(f"{cluster}: {str(error).partition('. ')[0]}") from error
    if not token:
        raise ClusterError(f"{cluster}, and this machine has none; {_ADVICE}")
    if probe_server(address, timeout, token) == "UNAUTHENTICATED":
        places = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")  # where Ray looks first
        place = next((name for name in places if os.environ.get(name)), "~/.ray/auth_token")
        raise ClusterError(f"{cluster}, and {place} has another one; {_ADVICE}")
    os.environ["RAY_AUTH_MODE"] = "token"
    _raylet.Config.initialize("")  # Ray read its environment when it was imported
