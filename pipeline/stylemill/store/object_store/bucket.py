"""A bucket on S3: put, get, list and delete objects, upload and download files.

A put is atomic: an object exists with all its bytes or not at all, and a multipart upload is invisible until it is
completed. Nothing here depends on renaming, which object stores do not have.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from stylemill import s3
from stylemill.errors import StorageError, StylemillError
from stylemill.store.object_store.requests import NOT_IMPLEMENTED, send
from stylemill.testing.failpoints import failpoint

_log = logging.getLogger(__name__)
PART_BYTES = 32 << 20  # of one request: larger files are uploaded and downloaded in parts
CONCURRENT_REQUESTS = 16  # when many small objects are read or deleted


class ObjectInfo(NamedTuple):
    """An object in a listing: its bytes, and when it was written, in seconds since 1970 by the clock of the store."""

    size: int
    modified: float


@cache
def open_bucket(name: str) -> Bucket:
    """The bucket `name`: one object for all threads of the process."""
    return Bucket(name)


class Bucket:
    """One bucket. Every method can raise what `requests.send` raises; FileNotFoundError only where it says so."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.conditional_puts = True  # whether the store supports them; `probe` finds out
        # By prefix: called before each try to write or delete an object with that prefix; raises if it is not allowed.
        self.write_checks: dict[str, Callable[[], None]] = {}
        self._prefetched: dict[str, bytes] = {}
        self._listed_sizes: dict[str, int] = {}

    # --- objects ------------------------------------------------------------------------------------------------------

    def get(self, key: str) -> bytes:
        """The bytes of an object. Raises FileNotFoundError."""
        prefetched = self._prefetched.pop(key, None)
        return self._get_range(key, 0, None) if prefetched is None else prefetched

    def put(self, key: str, data: bytes) -> None:
        self._write("put_object", key, Body=data)

    def create(self, key: str, data: bytes) -> bool:
        """Put an object that does not exist yet; False if it exists with other bytes.

        Without conditional puts, this checks first and then puts: two processes must not create the same key then.
        """
        try:
            if not self.conditional_puts and self.size(key) is not None:
                raise FileExistsError(key)
            condition: dict[str, Any] = {"IfNoneMatch": "*"} if self.conditional_puts else {}
            self._write("put_object", key, Body=data, **condition)
        except FileExistsError:
            return self.get(key) == data  # an earlier try may have succeeded, and its response been lost
        except StorageError as error:
            if not self.conditional_puts or s3.error_status(error) != NOT_IMPLEMENTED:
                raise
            self.conditional_puts = False
            return self.create(key, data)
        return True

    def replace(self, key: str, data: bytes, etag: str, tries: int = 0) -> str:
        """Replace the object if it still has this `etag`; returns the new etag. Raises FileExistsError if it has not.

        The other object can be the caller's own, if the response to an earlier try was lost.
        """
        condition: dict[str, Any] = {"IfMatch": etag} if self.conditional_puts else {}
        if not condition and self.head(key)["ETag"] != etag:
            raise FileExistsError(key)
        return str(self._call("put_object", key, tries, Body=data, **condition)["ETag"])

    def head(self, key: str, tries: int = 0) -> Any:
        """The response to a HEAD request. Raises FileNotFoundError."""
        return self._call("head_object", key, tries=tries)

    def size(self, key: str) -> int | None:
        """The bytes of an object; None if it does not exist."""
        if key in self._listed_sizes:
            return self._listed_sizes[key]
        if key in self._prefetched:
            return len(self._prefetched[key])
        try:
            return int(self.head(key)["ContentLength"])
        except FileNotFoundError:
            return None

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; one that does not exist is no error. One request each: not all stores can delete many."""
        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            list(pool.map(self._delete, keys))

    def _delete(self, key: str) -> None:
        self._listed_sizes.pop(key, None)
        self._write("delete_object", key)

    def copy(self, key: str, to: str) -> None:
        """Copy an object within the bucket. Raises FileNotFoundError."""
        self._write("copy_object", to, CopySource={"Bucket": self.name, "Key": key})

    def list(self, prefix: str, recursive: bool = True) -> dict[str, ObjectInfo | None]:
        """The objects with a key prefix. If not `recursive`, a subfolder is listed as None in place of its content."""
        found: dict[str, ObjectInfo | None] = {}
        more: dict[str, Any] = {} if recursive else {"Delimiter": "/"}
        while True:
            page = self._call("list_objects_v2", "", Prefix=prefix, **more)
            found |= {entry["Prefix"]: None for entry in page.get("CommonPrefixes", ())}
            for entry in page.get("Contents", ()):
                found[entry["Key"]] = ObjectInfo(entry["Size"], entry["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return found
            more["ContinuationToken"] = page["NextContinuationToken"]

    def has_objects(self, prefix: str) -> bool:
        """Whether there is an object whose key begins with `prefix`."""
        return bool(self._call("list_objects_v2", "", Prefix=prefix, MaxKeys=1).get("Contents"))

    def probe(self, key: str) -> None:
        """Put, list and delete an object. Puts it twice, to find out whether the store has conditional puts."""
        self.conditional_puts = True
        try:
            self._call("put_object", key, Body=b"stylemill", IfNoneMatch="*")
            self._call("put_object", key, Body=b"stylemill", IfNoneMatch="*")
            self.conditional_puts = False
        except FileExistsError:
            pass
        except StorageError as error:
            if s3.error_status(error) != NOT_IMPLEMENTED:
                raise
            self.conditional_puts = False
        self.list(key)
        self.delete([key])

    # --- files --------------------------------------------------------------------------------------------------------

    def upload(self, file: Path, key: str) -> None:
        """Put a file, in several requests if it is larger than PART_BYTES.

        A killed multipart upload leaves parts that are invisible. The store keeps them, and may bill them, until its
        lifecycle rules remove them.
        """
        size = file.stat().st_size
        with open(file, "rb") as source:
            if size <= PART_BYTES:
                self.put(key, source.read())
                return
            upload: dict[str, Any] = {"UploadId": self._write("create_multipart_upload", key)["UploadId"]}
            try:
                parts = []
                for number in range(1, -(-size // PART_BYTES) + 1):
                    part = self._write("upload_part", key, **upload, PartNumber=number, Body=source.read(PART_BYTES))
                    parts.append({"PartNumber": number, "ETag": part["ETag"]})
                    failpoint("mid-publish", folder=key.split("/")[-2])
                self._complete(key, size, MultipartUpload={"Parts": parts}, **upload)
            except BaseException:
                self._abort(key, upload)
                raise

    def _complete(self, key: str, size: int, **upload: Any) -> None:
        try:
            self._write("complete_multipart_upload", key, **upload)
        except (StylemillError, FileNotFoundError):
            if self.size(key) != size:  # otherwise an earlier try completed it, and its response was lost
                raise

    def _abort(self, key: str, upload: dict[str, Any]) -> None:
        try:
            self._call("abort_multipart_upload", key, tries=1, **upload)
        except (StylemillError, OSError) as error:
            _log.debug("the parts of %s stay until a lifecycle rule removes them: %s", key, error)

    def download(self, key: str, file: Path) -> bool:
        """Write an object to a new file; False if it does not exist. Raises StorageError if it changes meanwhile."""
        size = self.size(key)
        if size is None:
            return False
        with open(file, "xb") as target:
            for start in range(0, size, PART_BYTES):
                target.write(self._get_range(key, start, min(start + PART_BYTES, size)))
            if target.tell() != size:
                raise StorageError(f"s3://{self.name}/{key}: changed while it was read; try again")
        return True

    def _get_range(self, key: str, start: int, stop: int | None) -> bytes:
        path = f"{self.name}/{key}"
        try:
            data: bytes = send(lambda fs: fs.cat_file(path, start=start, end=stop), self.name, key)
        except StorageError as error:
            if s3.error_code(error) == "InvalidRange":  # the object is empty
                return b""
            raise
        return data

    # --- many objects at once -----------------------------------------------------------------------------------------

    def prefetch(self, keys: Iterable[str], list_prefixes: Iterable[str]) -> None:
        """Read objects concurrently, and the sizes of all objects with the given prefixes from listings.

        Until `clear_prefetched`, `size` answers from the listings, and the first `get` of each key from what was read.
        """
        for prefix in list_prefixes:
            self._listed_sizes |= {key: info.size for key, info in self.list(prefix).items() if info}
        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            for key, data in pool.map(self._get_if_exists, keys):
                if data is not None:
                    self._prefetched[key] = data

    def _get_if_exists(self, key: str) -> tuple[str, bytes | None]:
        try:
            return key, self._get_range(key, 0, None)
        except FileNotFoundError:
            return key, None

    def clear_prefetched(self) -> None:
        self._listed_sizes.clear()
        self._prefetched.clear()

    @property
    def listed_sizes(self) -> dict[str, int]:
        """By key, the sizes that `prefetch` listed."""
        return self._listed_sizes

    # --- calls --------------------------------------------------------------------------------------------------------

    def _check_write(self, key: str) -> None:
        for prefix, check in list(self.write_checks.items()):
            if key.startswith(prefix):
                check()

    def _write(self, method: str, key: str, **arguments: Any) -> Any:
        """`_call`, with `write_checks` before each try: during the pauses between them, a lock can be lost."""

        def call(fs: Any) -> Any:
            self._check_write(key)
            return fs.call_s3(method, Bucket=self.name, Key=key, **arguments)

        return send(call, self.name, key)

    def _call(self, method: str, key: str, tries: int = 0, **arguments: Any) -> Any:
        request = {"Bucket": self.name} | ({"Key": key} if key else {}) | arguments
        return send(lambda fs: fs.call_s3(method, **request), self.name, key or arguments.get("Prefix", ""), tries)
