"""What the clients of object stores raise, as one sentence that tells missing, denied and unreachable apart."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import TracebackType

import pyarrow as pa

from manifests.errors import AsvrError, StorageError
from manifests.redact import redact_text

# Each pattern is looked for in the text of the error, which holds the store's own name of it; the first that fits wins.
_MEANINGS: tuple[tuple[str, str, str], ...] = (
    (
        "ACCESS_DENIED|SIGNATURE_DOES_NOT_MATCH|INVALID_ACCESS_KEY|InvalidAccessKey|INVALID_CLIENT_TOKEN|EXPIRED_TOKEN|"
        "ExpiredToken|MISSING_AUTHENTICATION|OAuth2|UNRECOGNIZED_CLIENT|HTTP status 40[13]|Permission|Unauthorized|Forbidden",
        "access is denied",
        "check the credentials in the environment and the rights they have there",
    ),
    (
        "HTTP status 301|PermanentRedirect|AuthorizationHeaderMalformed",
        "the bucket is in another region",
        "set AWS_REGION to it",
    ),
    (
        "NETWORK_CONNECTION|REQUEST_TIMEOUT|curlCode|[Tt]imed? ?out|resolve|[Cc]onnect",
        "the server cannot be reached",
        "check the endpoint, the network and the server, and run the command again",
    ),
    (
        "SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|THROTTLING|HTTP status 5|HTTP status 429",
        "the server does not keep up",
        "run the command again later, or with fewer workers",
    ),
)

_STORAGE_ERROR = re.compile("AWS Error|google::cloud|curlCode")
_QUERY = re.compile(r"\?[^\s?='\"<>()]+=[^\s'\"<>()]*")
"""Of a URL, or of the path that is left of one: a signed link holds in it all that is needed to read the object."""
_REQUEST_ID = re.compile(r"\s*\(Request ID: [^)]*\)?")


class client_errors:  # noqa: N801 - it is used as a `with` statement is
    """Raise `StorageError` for what a client raises in the block: `with client_errors("read", url, bucket_is_gone): ...`.

    `bucket_is_gone` is asked about a file that is not there: clients call both that, and the difference matters.
    Clients that come from elsewhere raise classes of their own: any class that Python or this package does not define
    counts, so that a bug of ours keeps its traceback.
    """

    def __init__(self, action: str, where: str, bucket_is_gone: Callable[[], bool]) -> None:
        self._action, self._where, self._bucket_is_gone = action, where, bucket_is_gone

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and _is_clients(error):
            if isinstance(error, FileNotFoundError) and self._bucket_is_gone():
                raise no_bucket(self._action, self._where, _short(str(error))) from error
            raise sentence(self._action, self._where, error) from error


def sentence(action: str, where: str, error: Exception) -> StorageError:
    """The error in one sentence."""
    text = f"{type(error).__name__}: {error}" if not isinstance(error, OSError | pa.ArrowException) else str(error)
    if isinstance(error, FileNotFoundError):
        return StorageError(f"cannot {action} {where}: there is no such file; check that the path is right")
    if re.search("NO_SUCH_BUCKET|NoSuchBucket", text):
        return no_bucket(action, where, _short(text))
    for pattern, meaning, advice in _MEANINGS:
        if re.search(pattern, text) or (isinstance(error, PermissionError) and meaning == "access is denied"):
            return StorageError(f"cannot {action} {where}: {meaning} ({_short(text)}); {advice}")
    return StorageError(f"cannot {action} {where}: {_short(text)}; check the store and run the command again")


def no_bucket(action: str, where: str, reason: str) -> StorageError:
    """The error of a bucket that is not there; `reason` is what the store said."""
    return StorageError(
        f"cannot {action} {where}: the bucket does not exist ({reason}); check its name and the endpoint"
    )


def is_storage_fault(error: Exception) -> bool:
    """Whether an error met while parsing a file comes from the store and says nothing about the file."""
    foreign = not isinstance(error, OSError | pa.ArrowException | ValueError)
    return foreign or bool(_STORAGE_ERROR.search(str(error))) or isinstance(error, ConnectionError | TimeoutError)


def _is_clients(error: Exception) -> bool:
    if isinstance(error, AsvrError):
        return False
    return isinstance(error, OSError | pa.ArrowException) or type(error).__module__ != "builtins"


def _short(text: str) -> str:
    """One line, of bounded length, without secrets: these are gone before the rest is cut, which could leave a part."""
    one_line = redact_text(_QUERY.sub("", " ".join(_REQUEST_ID.sub("", text).split())))
    start = one_line.find("AWS Error")
    return one_line[max(start, 0) :][:200]
