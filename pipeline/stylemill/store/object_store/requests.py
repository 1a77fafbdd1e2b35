"""One request to S3: its retries, and the errors that it raises."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Any

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from stylemill import s3
from stylemill.errors import OutputError, StorageError, StylemillError

_log = logging.getLogger(__name__)
TRIES = 8  # the pauses between them add up to about 40 s
PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds before the second try, doubled before each further try up to the longest
TIMEOUT = 30.0  # seconds without a byte

NOT_IMPLEMENTED = 501
_BUSY = {408, 409, 429}  # retried, like 5xx
_DENIED = {"AccessDenied", "AllAccessDisabled", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "403"}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError"}
# Our own errors, and programming errors in a call. All others come from botocore, aiohttp or the event loop.
_NOT_TRANSLATED = (StylemillError, TypeError, AttributeError)


def send(call: Callable[[Any], Any], bucket: str, key: str, tries: int = 0) -> Any:
    """Make the request `call(filesystem)` about `key`, with at most `tries` (0: TRIES) tries; returns its result.

    Raises FileNotFoundError, FileExistsError for a condition that is not met, OutputError for what the user has to
    change (no such bucket, no rights), and StorageError if the store fails.
    """
    url = f"s3://{bucket}/{key}"

    def log(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        _log.debug("%s: %s; retrying in %.1f s", url, error, state.upcoming_sleep)

    retrying = Retrying(
        stop=stop_after_attempt(tries or TRIES),
        wait=lambda state: _pause(state.attempt_number),
        retry=retry_if_exception(lambda error: _is_retryable(error, url)),
        sleep=time.sleep,
        before_sleep=log,
        reraise=True,
    )
    try:
        return retrying(lambda: call(_filesystem(url)))
    except _NOT_TRANSLATED:
        raise
    except Exception as error:
        raise _translated(error, url) from error


def _pause(failed_tries: int) -> float:
    """Seconds before the next try: doubled each time, and jittered so that workers do not retry all at once."""
    return random.uniform(0.5, 1.0) * min(PAUSE * 2.0 ** (failed_tries - 1), LONGEST_PAUSE)


def _filesystem(url: str) -> Any:
    try:
        return s3.filesystem(TIMEOUT, tries=1)
    except ImportError:
        raise OutputError(f"{url}: s3:// needs s3fs on every machine; pip install 'stylemill[s3]'") from None


def _is_retryable(error: BaseException, url: str) -> bool:
    """Whether another try of the same request can succeed."""
    if isinstance(error, _NOT_TRANSLATED) or not isinstance(error, Exception):
        return False
    if not isinstance(_translated(error, url), StorageError):
        return False
    code, status = s3.error_code(error), s3.error_status(error)
    if status is None or status in _BUSY or code == "RequestTimeout":
        return True
    return status >= 500 and status != NOT_IMPLEMENTED


def _translated(error: Exception, url: str) -> Exception:
    """What `send` raises for an error of the libraries below."""
    code, status = s3.error_code(error), s3.error_status(error)
    kinds = {type(one).__name__ for one in (error, error.__cause__)}
    if code == "NoSuchBucket":
        bucket = url.split("/")[2]
        return OutputError(f"{url}: there is no bucket {bucket}; create it, or name another one")
    if code in ("PreconditionFailed", "412"):
        return FileExistsError(url)
    if code in _DENIED or status in (401, 403) or kinds & _NO_CREDENTIALS:
        reason = code or "no credentials were found"
        return OutputError(
            f"{url}: the store refuses access ({reason}); give this machine and every worker credentials (such as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) that may read, write, list and delete there"
        )
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileNotFoundError(url)
    message = " ".join(str(error).split())[:200] or type(error).__name__
    return StorageError(f"{url}: {message}; the same command resumes once the store answers again")
