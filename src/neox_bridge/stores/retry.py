"""Retries requests to stores after transient errors: lost, late or short answers, "slow down"."""

import errno
import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from neox_bridge.errors import BridgeError, Unreachable

_T = TypeVar("_T")
TRIES = 6  # about 10 seconds of waiting in total
FIRST_SECONDS, LONGEST_SECONDS = 0.4, 10.0  # wait between two tries
# the longest wait that a server may request; the Hub counts requests per 300 seconds
_LONGEST_WAIT_SECONDS = 600.0
_SAID_SECONDS = 5.0  # longer waits are logged
# exceptions by name, because their libraries may not be installed
_PASSING = {
    *("ClientPayloadError", "ClientConnectionError", "FSTimeoutError", "TransportError"),
    *("SSHException", "HTTPException"),
}
_OBSTORE = "GenericError"  # all errors without a specific class: dropped, late, 5xx, not understood
_OBSTORE_STATUS = re.compile(r"status code: (\d{3})[^:]*: *(.*)", re.DOTALL)
_OBSTORE_XML = re.compile(r"<(?:Code|Message)>([^<]*)<")
_NOT_IMPLEMENTED = 501
_DENIED = {"PermissionError", "PermissionDeniedError", "UnauthenticatedError"}
_PASSING_ERRNO = {
    *(errno.EBUSY, errno.EIO, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.EPIPE),
    *(errno.ECONNABORTED, errno.EAGAIN, errno.ENETUNREACH, errno.EHOSTUNREACH),
    getattr(errno, "EREMOTEIO", errno.EIO),
}
_LOG = logging.getLogger(__name__)
_OFFLINE = "OfflineModeIsEnabled"  # of huggingface_hub, a ConnectionError
_GATED = "GatedRepoError"
_FINAL = (
    *(FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError),
    *(NotImplementedError, BridgeError),
)


class ShortRead(Exception):
    """Fewer bytes were received than requested."""


def steadily(url: str, doing: str, call: Callable[[], _T], tries: int = TRIES) -> _T:
    """Call ``call`` and retry after transient errors, with exponential backoff and jitter.

    Honors Retry-After. doing: "read", "written" and so on, for the message. Raises Unreachable for
    permanent errors, FileNotFoundError if there is no such object.
    """
    for number in range(1, tries + 1):
        try:
            return call()
        except Exception as error:  # noqa: PERF203, what takes time is the request
            if isinstance(error, BridgeError | FileNotFoundError):
                raise
            if _status(error) == 404 and _is_obstore(error):
                raise FileNotFoundError(describe(error)) from None
            if number == tries or not is_passing(error):
                raise failed(url, doing, error, number) from None
            time.sleep(_pause(url, doing, error, number))
    raise AssertionError


def _pause(url: str, doing: str, error: Exception, number: int) -> float:
    """Seconds before the next try. Raises Unreachable if the server requests too many."""
    longest = min(LONGEST_SECONDS, FIRST_SECONDS * 2 ** (number - 1))
    pause_seconds: float = random.uniform(0.5, 1.0) * longest
    wanted = retry_after(error)
    if wanted is None:
        return pause_seconds
    if wanted > _LONGEST_WAIT_SECONDS:
        raise Unreachable(
            f"{url} cannot be {doing} now: the server allows no more requests for {wanted:.0f} "
            "seconds. Run the same command again after that."
        ) from None
    if wanted >= _SAID_SECONDS:
        _LOG.warning("%s: the server asks to wait %.0f seconds (Retry-After)", url, wanted)
    return wanted + pause_seconds  # jitter, so that threads do not retry at the same moment


def retry_after(error: BaseException) -> float | None:
    """The seconds in the Retry-After header of an error; None without it.

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
    """Whether a retry of the same request may succeed."""
    if isinstance(error, _FINAL) or _OFFLINE in _names(error):
        return False
    if isinstance(error, TimeoutError | ConnectionError | ShortRead | EOFError):
        return True
    if _names(error) & _PASSING:
        return True
    code = _status(error)
    if code is not None:
        return code in (408, 425, 429) or (code >= 500 and code != _NOT_IMPLEMENTED)
    if _OBSTORE in _names(error):
        return True
    return isinstance(error, OSError) and error.errno in _PASSING_ERRNO


def is_unknown(error: BaseException) -> bool:
    """Whether the store does not support this request."""
    return "NotSupportedError" in _names(error) or _status(error) == _NOT_IMPLEMENTED


def describe(error: BaseException) -> str:
    """Describe an error in one line."""
    text, name = str(error), type(error).__name__
    if _is_obstore(error):  # obstore appends pages of its internal state
        text = text.partition("\n\nDebug source")[0].partition(" error: ")[2] or text
        answer = _OBSTORE_STATUS.search(text)
        if answer:
            reason = ": ".join(_OBSTORE_XML.findall(answer[2])) or answer[2]
            text, name = reason or "no reason was given", f"status {answer[1]}"
        elif os.environ.get("AWS_ENDPOINT_URL"):
            text, name = f"{text} (check that AWS_ENDPOINT_URL names an S3 server)", ""
        else:
            name = ""
    text = " ".join(text.split())[:300].rstrip(".")
    name = "" if isinstance(error, ShortRead) else name
    return ": ".join(filter(None, (name, text)))


def failed(url: str, doing: str, error: Exception, tries: int) -> Unreachable:
    """The exception for a permanent error."""
    what = f"{url} cannot be {doing}"
    if is_passing(error):
        times = f" (tried {tries} times)" if tries > 1 else ""
        return Unreachable(
            f"{what}: {describe(error)}{times}. Try again when the store answers; `workers=1` "
            "sends the fewest requests."
        )
    if _OFFLINE in _names(error):
        return Unreachable(
            f"{what}: HF_HUB_OFFLINE is set, so the Hub is not contacted. Unset it, or give the "
            "model without hf:// to use the local cache."
        )
    if _GATED in _names(error):
        return Unreachable(
            f"{what}: the repository is gated. Request access on its page, then log in with `hf "
            "auth login`, or set HF_TOKEN."
        )
    if _names(error) & _DENIED or _status(error) in (401, 403):
        return Unreachable(f"{what}: access is denied ({describe(error)}). Request access to it.")
    return Unreachable(f"{what}: {describe(error)}. Check the address and your access to it.")


def no_bucket(url: str, error: FileNotFoundError) -> BridgeError:
    """The error for an object whose bucket does not exist, or no longer exists."""
    return BridgeError(
        f"{url} cannot be written: {describe(error)}. Check the name of the bucket, and that no "
        "other process writes to or deletes the same target."
    )


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _is_obstore(error: BaseException) -> bool:
    return type(error).__module__.startswith("obstore")


def _header(error: BaseException, name: str) -> str:
    """A response header of an exception of any of the libraries; "" if missing."""
    for one in (error, error.__cause__):
        response: Any = getattr(one, "response", None)
        headers: Any = getattr(response, "headers", None)
        if isinstance(response, Mapping):  # botocore's
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
        if isinstance(headers, Mapping):
            for key, value in headers.items():
                if str(key).lower() == name:
                    return str(value)
    return ""


def _status(error: BaseException) -> int | None:
    """The HTTP status of an exception of any of the libraries, or of its cause.

    obstore includes it only in the text of the exception.
    """
    if _is_obstore(error):
        answer = _OBSTORE_STATUS.search(str(error))
        return int(answer[1]) if answer else None
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        code = response if isinstance(response, int) else getattr(response, "status_code", None)
        code = code if code is not None else getattr(one, "status", getattr(one, "code", None))
        if isinstance(code, int | str) and str(code).isdigit():
            return int(code)
    return None
