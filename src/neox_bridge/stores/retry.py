"""Asks a store again where its answer was a passing one: dropped, late, too short, "slow down"."""

import errno
import logging
import random
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from neox_bridge.errors import BridgeError, Unreachable

_T = TypeVar("_T")
TRIES = 6  # some 10 seconds of waiting in all
_FIRST, _LONGEST = 0.4, 10.0  # seconds
_LONGEST_WAIT_SECONDS = 600.0  # that a server may ask for; the Hub counts requests in 300 seconds
_SAID_SECONDS = 5.0  # a longer wait is announced
# of the libraries below fsspec, by name, since none of them need be installed
_PASSING = {
    *("HTTPClientError", "ClientPayloadError", "ClientConnectionError", "FSTimeoutError"),
    *("IncompleteRead", "IncompleteReadError", "ResponseStreamingError", "ResponseParserError"),
    *("EndpointConnectionError", "ConnectTimeoutError", "TransportError", "SSHException"),
    *("HTTPException", "ChecksumError", "FlexibleChecksumError"),
}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}
_PASSING_ERRNO = {
    *(errno.EBUSY, errno.EIO, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.EPIPE),
    *(errno.ECONNABORTED, errno.EAGAIN, errno.ENETUNREACH, errno.EHOSTUNREACH),
    getattr(errno, "EREMOTEIO", errno.EIO),
}
_LOG = logging.getLogger(__name__)
_OFFLINE = "OfflineModeIsEnabled"  # huggingface_hub's, a ConnectionError
_GATED = "GatedRepoError"
_FINAL = (
    *(FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError),
    *(NotImplementedError, BridgeError),
)


class ShortRead(Exception):
    """Fewer bytes came than the object has there."""


def steadily(url: str, doing: str, call: Callable[[], _T], tries: int = TRIES) -> _T:
    """What ``call`` returns, tried again after passing errors, ever later and never in step.

    A server that says how long to wait (Retry-After) is asked again no sooner. doing: "read",
    "written" and so on, for the message. Raises Unreachable, naming the URL, for errors that stay,
    FileNotFoundError where there is no such object.
    """
    for number in range(1, tries + 1):
        try:
            return call()
        except Exception as error:  # noqa: PERF203, what takes time is the request
            if isinstance(error, BridgeError | FileNotFoundError):
                raise
            if not is_passing(error):
                raise _final(url, doing, error) from None
            if number == tries:
                times = f" (tried {tries} times)" if tries > 1 else ""
                raise Unreachable(
                    f"{url} can't be {doing}: {describe(error)}{times}. Try again when the store "
                    "answers; --max-workers 1 asks it for the least."
                ) from None
            time.sleep(_pause(url, doing, error, number))
    raise AssertionError


def _pause(url: str, doing: str, error: Exception, number: int) -> float:
    """Seconds before the next try. Raises Unreachable where the server wants too many."""
    own: float = random.uniform(0.5, 1.0) * min(_LONGEST, _FIRST * 2 ** (number - 1))
    wanted = retry_after(error)
    if wanted is None:
        return own
    if wanted > _LONGEST_WAIT_SECONDS:
        raise Unreachable(
            f"{url} can't be {doing} now: the server allows no more requests for {wanted:.0f} "
            "seconds. Run the same command again after that."
        ) from None
    if wanted >= _SAID_SECONDS:
        _LOG.warning("%s: the server asks to wait %.0f seconds (Retry-After)", url, wanted)
    return wanted + own  # not all threads in the same moment


def retry_after(error: BaseException) -> float | None:
    """The seconds that a server asks to wait by its header Retry-After; None without one.

    The header holds seconds or a date (RFC 9110, section 10.2.3).
    """
    value = _header(error, "retry-after").strip()
    if not value:
        return None
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        until = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    until = until if until.tzinfo else until.replace(tzinfo=timezone.utc)
    return max(0.0, (until - datetime.now(timezone.utc)).total_seconds())


def is_passing(error: BaseException) -> bool:
    """Whether the same request may well be answered in a moment."""
    if isinstance(error, _FINAL) or _OFFLINE in _names(error):
        return False
    if isinstance(error, TimeoutError | ConnectionError | ShortRead | EOFError):
        return True
    if _names(error) & _PASSING:
        return True
    code = _status(error)
    if code is not None:
        return code in (408, 425, 429) or code >= 500
    return isinstance(error, OSError) and error.errno in _PASSING_ERRNO


def describe(error: BaseException) -> str:
    """What happened, in one line."""
    text = " ".join(str(error).split())[:200].rstrip(".")
    name = type(error).__name__
    return text if isinstance(error, ShortRead) else f"{name}: {text}" if text else name


def _final(url: str, doing: str, error: Exception) -> Unreachable:
    what = f"{url} can't be {doing}"
    store = url.partition("://")[0]
    if _names(error) & _NO_CREDENTIALS:
        return Unreachable(
            f"{what}: no credentials for {store} were found. Log in as the store's own tools want "
            "it (for s3: AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)."
        )
    if _OFFLINE in _names(error):
        return Unreachable(
            f"{what}: HF_HUB_OFFLINE is set, so the Hub is not asked. Unset it, or name the model "
            "without hf:// to use what is in the cache."
        )
    if _GATED in _names(error):
        return Unreachable(
            f"{what}: the repository is gated. Ask for access on its page, then log in with "
            "`hf auth login`, or set HF_TOKEN."
        )
    if isinstance(error, PermissionError):
        return Unreachable(f"{what}: access is denied ({describe(error)}). Ask for access to it.")
    return Unreachable(f"{what}: {describe(error)}. Check the address and the access to it.")


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _header(error: BaseException, name: str) -> str:
    """A header of the answer that an exception of any of the libraries carries; "" for none."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        headers: Any = getattr(response, "headers", None)
        if isinstance(response, dict):  # botocore
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
        if isinstance(headers, Mapping):
            for key, value in headers.items():
                if str(key).lower() == name:
                    return str(value)
    return ""


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an exception of any of the libraries carries, or its cause does."""
    for one in (error, getattr(error, "__cause__", None)):
        response = getattr(one, "response", None)
        if isinstance(response, dict):  # botocore
            response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        found = response if isinstance(response, int) else getattr(response, "status_code", None)
        found = found if found is not None else getattr(one, "status", getattr(one, "code", None))
        if isinstance(found, int | str) and str(found).isdigit():
            return int(found)
    return None
