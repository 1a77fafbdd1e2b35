"""Which errors of reading an input fail its rows, and which fail the attempt."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from stylemill.config.inputs import InputSettings
from stylemill.config.paths import split_url
from stylemill.errors import DownloadError, RowError
from stylemill.execution.rows import FailureReason
from stylemill.images.messages import display_name

Result = TypeVar("Result")


class InputReader:
    """Reads the inputs of one attempt. An input that can never be read fails its rows.

    A failed download fails the attempt, or its rows if it is the last attempt at the shard: a server that is gone does
    not keep the other rows open. There each further image costs such a server one request, and none after a timeout,
    until it answers: the stage has a time limit.
    """

    def __init__(self, settings: InputSettings, last_attempt: bool) -> None:
        self._settings = settings
        self._last_attempt = last_attempt
        self._failed: dict[str, DownloadError] = {}  # by server that has not answered since

    def read(
        self, path: str | None, load: Callable[[InputSettings], Result]
    ) -> tuple[Result | None, FailureReason | None]:
        """What `load` returns for the input at `path`, or why its rows fail. May be called from several threads.

        Raises DownloadError before the last attempt, and any other TransientError.
        """
        scheme, rest = split_url(path or "") or ("", "")
        server = f"{scheme}://{rest.partition('/')[0]}"
        failed = self._failed.get(server)
        try:
            if failed and isinstance(failed.__cause__, TimeoutError):
                raise DownloadError(
                    f"{display_name(path or '')}: not requested after a timeout of its server"
                ) from failed
            result = load(self._settings.model_copy(update={"retries": 0}) if failed else self._settings)
        except RowError as error:
            return None, FailureReason.of(error)
        except DownloadError as error:
            if not self._last_attempt:
                raise
            if failed is None or isinstance(error.__cause__, TimeoutError):
                self._failed[server] = error
            message = f"{error}; `stylemill retry-failed` tries it again"
            return None, FailureReason("read", DownloadError.__name__, message)
        self._failed.pop(server, None)
        return result, None
