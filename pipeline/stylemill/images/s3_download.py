"""Download an image from S3, with the endpoint and credentials of the worker's environment, never of the URL."""

from __future__ import annotations

from stylemill import s3
from stylemill.config.inputs import InputSettings
from stylemill.errors import ImageError, JobError
from stylemill.images.messages import display_name, interrupted, too_large


def download_s3(url: str, inputs: InputSettings) -> bytes:
    """The bytes of the object at an s3:// URL.

    Raises ImageError where another attempt gives the same result (no such object, access denied, too large),
    DownloadError where another attempt may help, JobError where s3fs is not installed.
    """
    name = display_name(url)
    path = "s3://" + url.partition("://")[2]
    try:
        # One byte more than allowed shows that an object is too large, without a request for its size.
        data: bytes = s3.filesystem(inputs.timeout).cat_file(
            path, start=0, end=inputs.max_bytes + 1, timeout=inputs.timeout
        )
    except ImportError:
        raise JobError(f"{name}: s3:// needs s3fs on every worker; pip install 'stylemill[s3]'") from None
    except FileNotFoundError:
        raise ImageError(f"{name}: there is no such object; correct the URL or remove its rows") from None
    except Exception as error:  # botocore, aiohttp and the event loop have no common base class
        code = s3.error_code(error)
        if code == "InvalidRange":  # the object is empty
            return b""
        if code == "AccessDenied":
            raise ImageError(f"{name}: access is denied; correct the URL, or the rights of the workers") from None
        raise interrupted(name, error) from error
    if len(data) > inputs.max_bytes:
        raise too_large(name, inputs)
    return data
