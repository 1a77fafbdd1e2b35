"""Access to S3 through s3fs: one connection pool for a process, and the codes in its errors."""

from __future__ import annotations

import os
from functools import cache
from typing import Any


def filesystem(timeout: float, tries: int = 5) -> Any:
    """The S3 filesystem of this process, with the endpoint and the credentials of the environment.

    `timeout` is in seconds without a byte, `tries` the number of requests that s3fs makes for one call. Raises
    ImportError if s3fs is not installed.
    """
    return _filesystem(timeout, tries, os.getpid())  # a forked process needs its own event loop


@cache
def _filesystem(timeout: float, tries: int, pid: int) -> Any:
    import fsspec

    config = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"max_attempts": 0}}
    # fsspec would keep one instance per thread, and its cached listings would go stale: both caches are off.
    fs = fsspec.filesystem("s3", config_kwargs=config, skip_instance_cache=True, use_listings_cache=False)
    fs.retries = tries
    return fs


def error_code(error: BaseException | None) -> str | None:
    """The S3 error code, such as AccessDenied or ExpiredToken; None if the error has no response."""
    return _response_codes(error)[0]


def error_status(error: BaseException | None) -> int | None:
    """The HTTP status of an error; None if there was no response."""
    return _response_codes(error)[1]


def _response_codes(error: BaseException | None) -> tuple[str | None, int | None]:
    """Error code and HTTP status of the first error in the chain of causes that has a response."""
    while error is not None:
        response = getattr(error, "response", None) or {}
        if code := response.get("Error", {}).get("Code"):
            return str(code), response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        error = error.__cause__
    return None, None
