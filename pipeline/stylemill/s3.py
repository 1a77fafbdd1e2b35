"""S3 through s3fs: one connection for all threads of a process, and what its errors say."""

from __future__ import annotations

import os
from functools import cache
from typing import Any


def filesystem(timeout: float, tries: int = 5) -> Any:
    """s3fs with the endpoint and credentials of the environment. Raises ImportError where s3fs is not installed."""
    return _filesystem(timeout, tries, os.getpid())  # its event loop does not survive a fork


@cache
def _filesystem(timeout: float, tries: int, pid: int) -> Any:
    import fsspec

    wait = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"max_attempts": 0}}
    # Without a cache of instances, for fsspec would keep one for each thread; without one of listings, which grow old.
    made = fsspec.filesystem("s3", config_kwargs=wait, skip_instance_cache=True, use_listings_cache=False)
    made.retries = tries
    return made


def error_code(error: BaseException | None) -> str | None:
    """S3's own name of an error, which tells an object that is denied from credentials that have run out."""
    return _answered(error)[0]


def error_status(error: BaseException | None) -> int | None:
    """The HTTP status of an error; None where no answer came."""
    return _answered(error)[1]


def _answered(error: BaseException | None) -> tuple[str | None, int | None]:
    while error is not None:
        response = getattr(error, "response", None) or {}
        if code := response.get("Error", {}).get("Code"):
            return str(code), response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        error = error.__cause__
    return None, None
