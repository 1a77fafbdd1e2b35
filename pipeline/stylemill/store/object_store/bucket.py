"""What a run on an object store asks of S3: put, get, list, delete. Each call is tried again while that can help.

A put is atomic: an object is there with all its bytes or not at all, and an upload in parts is invisible until it is
completed. Nothing here depends on a rename, which no object store has.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from stylemill import s3
from stylemill.errors import OutputError, StorageError, StylemillError
from stylemill.testing.failpoints import failpoint

_log = logging.getLogger(__name__)
TRIES = 8  # of a call that a busy, silent or absent store does not answer: about a minute of pauses
PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds before the second try, doubled before each further one up to the longest
TIMEOUT = 30.0  # seconds without a byte
PART = 32 << 20  # bytes of one request: larger files go up and come down in parts
AT_ONCE = 16  # requests, where many small objects are read

_BUSY = {408, 409, 429}  # and 5xx: asking again can help
_NOT_IMPLEMENTED = 501
_DENIED = {"AccessDenied", "AllAccessDisabled", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "403"}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError"}
# Our own errors, and errors in the code of a call. Any other is one of botocore, aiohttp or the event loop.
_NOT_TRANSLATED = (StylemillError, TypeError, AttributeError)


class Found(NamedTuple):
    """An object as a listing shows it; `modified` in seconds since 1970, by the store's clock."""

    size: int
    modified: float


@cache
def bucket(name: str) -> Bucket:
    """The bucket of this name, one object for all threads."""
    return Bucket(name)


class Bucket:
    """Raises OutputError for what the user must change (no such bucket, no rights), else StorageError."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.conditional = True  # whether the store creates only what is absent when asked to
        self.guards: dict[str, Callable[[], None]] = {}  # by prefix: raises where this process may no longer write
        self._ahead: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}

    # --- objects ------------------------------------------------------------------------------------------------------

    def get(self, key: str) -> bytes:
        """The bytes of an object. Raises FileNotFoundError."""
        ahead = self._ahead.pop(key, None)
        return self._range(key, 0, None) if ahead is None else ahead

    def put(self, key: str, data: bytes) -> None:
        self._guarded(key)
        self._call("put_object", key, Body=data)

    def create(self, key: str, data: bytes) -> bool:
        """Put an object where there is none; False where another stands. One with the same bytes is as good as ours.

        Without conditional puts, looking first must do: whoever is alone in writing such objects may ask for it.
        """
        self._guarded(key)
        try:
            if not self.conditional and self.size(key) is not None:
                raise FileExistsError(key)
            condition: dict[str, Any] = {"IfNoneMatch": "*"} if self.conditional else {}
            self._call("put_object", key, Body=data, **condition)
        except FileExistsError:
            return self.get(key) == data  # a first try may have succeeded and its answer been lost
        except StorageError as error:
            if not self.conditional or s3.error_status(error) != _NOT_IMPLEMENTED:
                raise
            self.conditional = False
            return self.create(key, data)
        return True

    def swap(self, key: str, data: bytes, tag: str, tries: int = 0) -> str:
        """Replace the object that has this `tag`; returns the new tag. Raises FileExistsError for another one.

        It may be the caller's own: where the answer to a first try was lost.
        """
        condition: dict[str, Any] = {"IfMatch": tag} if self.conditional else {}
        if not condition and self.head(key)["ETag"] != tag:
            raise FileExistsError(key)
        return str(self._call("put_object", key, tries, Body=data, **condition)["ETag"])

    def head(self, key: str, tries: int = 0) -> Any:
        """S3's answer about an object. Raises FileNotFoundError."""
        return self._call("head_object", key, tries=tries)

    def size(self, key: str) -> int | None:
        """Bytes of an object; None where there is none."""
        if key in self._sizes:
            return self._sizes[key]
        if key in self._ahead:
            return len(self._ahead[key])
        try:
            return int(self.head(key)["ContentLength"])
        except FileNotFoundError:
            return None

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; one that is not there is no error. (Not all stores delete many in one request.)"""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self._delete, keys))

    def _delete(self, key: str) -> None:
        self._guarded(key)
        self._sizes.pop(key, None)
        self._call("delete_object", key)

    def copy(self, key: str, to: str) -> None:
        """Copy an object within the bucket. Raises FileNotFoundError."""
        self._guarded(to)
        self._call("copy_object", to, CopySource={"Bucket": self.name, "Key": key})

    def list(self, prefix: str, below: bool = True) -> dict[str, Found | None]:
        """Objects whose key begins with `prefix`; without `below`, folders in place of what is in them, as None."""
        found: dict[str, Found | None] = {}
        more: dict[str, Any] = {} if below else {"Delimiter": "/"}
        while True:
            page = self._call("list_objects_v2", "", Prefix=prefix, **more)
            found |= {entry["Prefix"]: None for entry in page.get("CommonPrefixes", ())}
            for entry in page.get("Contents", ()):
                found[entry["Key"]] = Found(entry["Size"], entry["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return found
            more["ContinuationToken"] = page["NextContinuationToken"]

    def has_below(self, prefix: str) -> bool:
        """Whether there is any object whose key begins with `prefix`."""
        return bool(self._call("list_objects_v2", "", Prefix=prefix, MaxKeys=1).get("Contents"))

    def try_out(self, key: str) -> None:
        """Put, list and delete an object; a second put tells whether the store creates only what is absent."""
        self.conditional = True
        try:
            self._call("put_object", key, Body=b"stylemill", IfNoneMatch="*")
            self._call("put_object", key, Body=b"stylemill", IfNoneMatch="*")
            self.conditional = False
        except FileExistsError:
            pass
        except StorageError as error:
            if s3.error_status(error) != _NOT_IMPLEMENTED:
                raise
            self.conditional = False
        self.list(key)
        self.delete([key])

    # --- files --------------------------------------------------------------------------------------------------------

    def upload(self, file: Path, key: str) -> None:
        """Put a file. One that goes up in parts is invisible until it is complete; what a kill leaves never shows.

        The store keeps, and may bill, parts of an upload that was killed until its lifecycle rules remove them.
        """
        size = file.stat().st_size
        with open(file, "rb") as source:
            if size <= PART:
                self.put(key, source.read())
                return
            self._guarded(key)
            upload: dict[str, Any] = {"UploadId": self._call("create_multipart_upload", key)["UploadId"]}
            try:
                parts = []
                for number in range(1, -(-size // PART) + 1):
                    done = self._call("upload_part", key, **upload, PartNumber=number, Body=source.read(PART))
                    parts.append({"PartNumber": number, "ETag": done["ETag"]})
                    failpoint("mid-publish", folder=key.split("/")[-2])
                self._complete(key, size, MultipartUpload={"Parts": parts}, **upload)
            except BaseException:
                self._abort(key, upload)
                raise

    def _complete(self, key: str, size: int, **upload: Any) -> None:
        try:
            self._call("complete_multipart_upload", key, **upload)
        except (StylemillError, FileNotFoundError):
            if self.size(key) != size:  # else it was completed, and the answer lost
                raise

    def _abort(self, key: str, upload: dict[str, Any]) -> None:
        try:
            self._call("abort_multipart_upload", key, tries=1, **upload)
        except (StylemillError, OSError) as error:
            _log.debug("parts of %s stay until a lifecycle rule removes them: %s", key, error)

    def download(self, key: str, file: Path) -> bool:
        """Write an object to a new file; False where there is none. Raises StorageError where it changed meanwhile."""
        size = self.size(key)
        if size is None:
            return False
        with open(file, "xb") as target:
            for start in range(0, size, PART):
                target.write(self._range(key, start, min(start + PART, size)))
            if target.tell() != size:
                raise StorageError(f"{self._url(key)}: changed while it was read; try again")
        return True

    def _range(self, key: str, start: int, stop: int | None) -> bytes:
        path = f"{self.name}/{key}"
        try:
            data: bytes = self._retried(lambda fs: fs.cat_file(path, start=start, end=stop), key)
        except StorageError as error:
            if s3.error_code(error) == "InvalidRange":  # of nothing at all
                return b""
            raise
        return data

    # --- what is asked of many objects --------------------------------------------------------------------------------

    def read_ahead(self, keys: Iterable[str], sizes_below: Iterable[str]) -> None:
        """Until `forget`, `size` answers from listings of these prefixes, and `get`, once each, with bytes read now."""
        for prefix in sizes_below:
            self._sizes |= {key: found.size for key, found in self.list(prefix).items() if found}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for key, data in pool.map(self._got, keys):
                if data is not None:
                    self._ahead[key] = data

    def _got(self, key: str) -> tuple[str, bytes | None]:
        try:
            return key, self._range(key, 0, None)
        except FileNotFoundError:
            return key, None

    def forget(self) -> None:
        self._sizes.clear()
        self._ahead.clear()

    @property
    def sizes(self) -> dict[str, int]:
        """What `read_ahead` listed."""
        return self._sizes

    # --- calls --------------------------------------------------------------------------------------------------------

    def _guarded(self, key: str) -> None:
        for prefix, check in list(self.guards.items()):
            if key.startswith(prefix):
                check()

    def _call(self, method: str, key: str, tries: int = 0, **arguments: Any) -> Any:
        named = {"Bucket": self.name} | ({"Key": key} if key else {}) | arguments
        return self._retried(lambda fs: fs.call_s3(method, **named), key or arguments.get("Prefix", ""), tries)

    def _retried(self, call: Callable[[Any], Any], key: str, tries: int = 0) -> Any:
        def log(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            _log.debug("%s: %s; tried again in %.1f s", self._url(key), error, state.upcoming_sleep)

        retrying = Retrying(
            stop=stop_after_attempt(tries or TRIES),
            wait=lambda state: _pause(state.attempt_number),
            retry=retry_if_exception(lambda error: self._is_retryable(error, key)),
            sleep=time.sleep,
            before_sleep=log,
            reraise=True,
        )
        try:
            return retrying(lambda: call(self._filesystem(key)))
        except _NOT_TRANSLATED:
            raise
        except Exception as error:
            raise self._translated(error, key) from error

    def _filesystem(self, key: str) -> Any:
        try:
            return s3.filesystem(TIMEOUT, tries=1)
        except ImportError:
            raise OutputError(
                f"{self._url(key)}: s3:// needs s3fs on every machine; pip install 'stylemill[s3]'"
            ) from None

    def _url(self, key: str) -> str:
        return f"s3://{self.name}/{key}"

    def _is_retryable(self, error: BaseException, key: str) -> bool:
        """Whether another try of the same call can succeed."""
        if isinstance(error, _NOT_TRANSLATED) or not isinstance(error, Exception):
            return False
        if not isinstance(self._translated(error, key), StorageError):
            return False
        code, status = s3.error_code(error), s3.error_status(error)
        return (
            status is None
            or status in _BUSY
            or code == "RequestTimeout"
            or (status >= 500 and status != _NOT_IMPLEMENTED)
        )

    def _translated(self, error: Exception, key: str) -> Exception:
        """What is raised for an error of a call: OutputError, FileNotFoundError, FileExistsError or StorageError."""
        code, status, url = s3.error_code(error), s3.error_status(error), self._url(key)
        kinds = {type(one).__name__ for one in (error, error.__cause__)}
        if code == "NoSuchBucket":
            return OutputError(f"{url}: there is no bucket {self.name}; create it, or name another one")
        if code in ("PreconditionFailed", "412"):
            return FileExistsError(url)
        if code in _DENIED or status in (401, 403) or kinds & _NO_CREDENTIALS:
            said = code or "no credentials were found"
            return OutputError(
                f"{url}: the store refuses access ({said}); give this machine and every worker credentials (such as "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) that may read, write, list and delete there"
            )
        if isinstance(error, FileNotFoundError) or status == 404:
            return FileNotFoundError(url)
        words = " ".join(str(error).split())[:200] or type(error).__name__
        return StorageError(f"{url}: {words}; the same command resumes once the store answers again")


def _pause(failed_tries: int) -> float:
    """Seconds before the next try: they double, and are jittered so that the workers do not all come back at once."""
    return random.uniform(0.5, 1.0) * min(PAUSE * 2.0 ** (failed_tries - 1), LONGEST_PAUSE)
