"""Images named by a URL: http, https or S3, with retries and a cache, within the limits of a job's `inputs`."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable

from cachetools import LRUCache
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from stylemill.config.inputs import InputSettings
from stylemill.errors import DownloadError, ImageError
from stylemill.images.messages import display_name

_FIRST_PAUSE = 0.5  # seconds before the second attempt; doubled before each further one
_LONGEST_PAUSE = 60.0  # seconds

Download = Callable[[str, InputSettings], bytes]


def fetch(url: str, inputs: InputSettings) -> bytes:
    """The bytes at `url`, from the cache of this process where they are in it. May be called from several threads.

    Raises ImageError where another attempt gives the same result (404, a refused address, too large), DownloadError
    where `inputs.retries` further attempts did not help, JobError where s3fs is not installed.
    """
    key = (url, inputs.allow_private_addresses, inputs.max_bytes)  # a file that one job may read, another may not
    if (cached := _cache.get(key)) is not None:
        return cached
    data = _retrying(inputs)(_download_for(url, inputs), url, inputs)
    _cache.put(key, data, inputs.cache_mb << 20)
    return data


def _download_for(url: str, inputs: InputSettings) -> Download:
    """The function that downloads URLs of this scheme. Imported here: aiohttp and s3fs are slow to load."""
    scheme = url.partition(":")[0].lower()
    if scheme in ("http", "https"):
        from stylemill.images.http_download import download_http

        return download_http
    if scheme == "s3":
        from stylemill.images.s3_download import download_s3

        return download_s3
    local = "" if inputs.remote_only else ", or paths of this machine"
    raise ImageError(f"{display_name(url)}: {scheme}:// is not read; name http://, https:// or s3:// URLs{local}")


def _retrying(inputs: InputSettings) -> Retrying:
    return Retrying(
        retry=retry_if_exception_type(DownloadError),
        stop=stop_after_attempt(1 + inputs.retries),
        wait=_pause,
        reraise=True,
    )


def _pause(state: RetryCallState) -> float:
    """Seconds before the next attempt: doubled each time, with jitter, and at least what the server asked for."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, DownloadError) else 0.0
    pause = wait_exponential(multiplier=_FIRST_PAUSE)(state) * random.uniform(0.5, 1.0)
    return min(max(pause, asked), _LONGEST_PAUSE)


_Key = tuple[str, bool, int]


class _FileCache:
    """The downloaded files that were used last, as many as fit: a worker usually requests a file once."""

    def __init__(self) -> None:
        self._files: LRUCache[_Key, bytes] = LRUCache(math.inf, getsizeof=len)  # `put` names the limit
        self._lock = threading.Lock()

    def get(self, key: _Key) -> bytes | None:
        with self._lock:
            return self._files.get(key)

    def put(self, key: _Key, data: bytes, max_bytes: int) -> None:
        """Keep `data`, and drop files until `max_bytes` are left at most."""
        if len(data) > max_bytes:
            return
        with self._lock:
            self._files[key] = data
            while self._files.currsize > max_bytes:
                self._files.popitem()


_cache = _FileCache()
