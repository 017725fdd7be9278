"""Imports huggingface_hub when it is needed, and turns its errors into advice."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.extras import missing

# statuses that are worth a retry: huggingface_hub, utils/_http.py
_TRANSIENT = (408, 429, 500, 502, 503, 504)
# libraries whose errors mean that there was no answer
_NETWORK = ("httpx", "httpx2", "requests", "urllib3")
_LOGIN = "Log in with `hf auth login`, or set HF_TOKEN"
_ADVICE = {  # by HTTP status
    401: f"you are not logged in to the Hub, or this repository is not visible to you. {_LOGIN}, "
    "and check the name.",
    402: "the storage quota of the account is exceeded. Free some space, or see its billing page.",
    403: "you do not have write access. Use a token with write access, or open a pull request with "
    "`create_pr=True`.",
    404: f"the repository does not exist, or is not visible to you. Check the name. {_LOGIN}.",
    409: "another operation on it is in progress. Run the same command again.",
    412: (
        "another commit was pushed during the upload. Check the branch, then run the same command "
        "again."
    ),
    413: "it is too large for the Hub. See the Hub's limits for repositories and files.",
    429: "too many requests. Wait a few minutes, then run the same command again.",
}
_SERVER_FAILED = "the Hub failed. Run the same command again later; see status.huggingface.co."


def hub_api(why: str) -> Any:
    """huggingface_hub's ``HfApi``, which honors HF_ENDPOINT and HF_TOKEN.

    why: a sentence without its period that says why it is needed. It is part of the BridgeError if
    huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise missing(f"{why}, and huggingface_hub is missing", "hub") from None
    return HfApi(library_name="neox-bridge")


def check_writer(repo: str) -> None:
    """Raise BridgeError if the user's token is read-only; one request."""
    api = hub_api(f"hf://{repo} is on the Hub")
    with explained(repo):
        token = api.whoami().get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise BridgeError(
            f"{repo}: the token {token.get('displayName', '')!r} is read-only. Create a token "
            "with write access (huggingface.co/settings/tokens), and set HF_TOKEN to it."
        )


@contextmanager
def explained(repo: str) -> Iterator[None]:
    """Turn errors of huggingface_hub in the block into a BridgeError about this repository."""
    try:
        yield
    except BridgeError:
        raise
    except Exception as error:  # the library raises many kinds of exceptions
        raise BridgeError(explanation(error, repo)) from error


@contextmanager
def bars(shown: bool) -> Iterator[None]:
    """Show or hide huggingface_hub's progress bars during the block, in all threads.

    HF_HUB_DISABLE_PROGRESS_BARS hides them in any case.
    """
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status of an error of huggingface_hub or of one of its causes."""
    responses = (getattr(cause, "response", None) for cause in _causes(error))
    return next((int(response.status_code) for response in responses if response is not None), None)


def is_transient(error: BaseException) -> bool:
    """Whether a retry of the same request may succeed."""
    status = status_of(error)
    return status in _TRANSIENT if status is not None else is_network(error)


def is_missing_repo(error: BaseException) -> bool:
    """Whether the Hub told a logged-in user that the repository does not exist."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    return (
        isinstance(error, RepositoryNotFoundError)
        and not isinstance(error, GatedRepoError)
        and status_of(error) == 404
    )


def explanation(error: BaseException, repo: str) -> str:
    """Describe in one line what failed and what to do about it."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    status = status_of(error)
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo}: HF_HUB_OFFLINE is set, so the Hub is not contacted. Unset it."
    if isinstance(error, LocalTokenNotFoundError):
        return f"{repo}: no Hub token was found. {_LOGIN}."
    if status is None:
        if is_network(error):
            return (
                f"{repo}: the Hub cannot be reached ({_root(error)}). Check the network, "
                "HF_ENDPOINT and proxies, then run the same command again."
            )
        return f"{repo}: {_root(error)}"
    server_words = _server_message(error)
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated. Request access on its page. {_LOGIN}."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no such branch, tag or commit ({server_words}). Check its name."
    advice = _SERVER_FAILED if status >= 500 else "the request was refused."
    advice = _ADVICE.get(status, advice)
    return f"{repo}: {advice} The Hub answered: {status} {server_words}"


def first_line(error: BaseException) -> str:
    """The first line of an error, shortened, with the queries of URLs removed.

    A query may contain a signature that grants write access.
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", line)[:200]


def is_network(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, means that the server did not answer."""
    return any(
        type(cause).__module__.split(".")[0] in _NETWORK or isinstance(cause, ConnectionError)
        for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__


def _root(error: BaseException) -> str:
    *_, root = _causes(error)
    return f"{type(root).__name__}: {first_line(root)}"


def _server_message(error: BaseException) -> str:
    """The message from the Hub, as collected by huggingface_hub."""
    for cause in _causes(error):
        if message := getattr(cause, "server_message", None):
            return str(message).strip().splitlines()[0][:200].rstrip(".") + "."
        if (response := getattr(cause, "response", None)) is not None:
            return str(getattr(response, "reason_phrase", None) or getattr(response, "reason", ""))
    return ""
