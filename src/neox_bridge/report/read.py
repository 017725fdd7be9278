"""The files of a report: what it is made of, and the page itself."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from hashlib import sha256
from typing import Any

from neox_bridge.errors import BridgeError

_MOST = 256 << 20  # bytes of a JSON file: that of a plan of a large model is some MB


@dataclass(frozen=True, slots=True)
class Input:
    """A checkpoint's folder, or a JSON document. said: for the foot of the page."""

    name: str
    said: str
    document: dict[str, Any] | None = None


def inputs(paths: Sequence[str]) -> list[Input]:
    """What the paths hold, in their order; a folder's files in order of their names.

    Raises BridgeError for what is neither a checkpoint nor such a file.
    """
    return [found for path in paths for found in _inputs(path)]


def today() -> str:
    """Now, in UTC; SOURCE_DATE_EPOCH, seconds, stands for it where pages are to be the same."""
    told = os.environ.get("SOURCE_DATE_EPOCH", "")
    now = datetime.now(timezone.utc)
    if told.isdecimal():
        now = datetime.fromtimestamp(int(told), timezone.utc)
    return now.strftime("%Y-%m-%d %H:%M UTC")


def write_page(path: str, text: str | None, overwrite: bool) -> None:
    """Write the page, whole or not at all; without text only look whether it may be written."""
    if os.path.isdir(path):
        raise BridgeError(
            f"{path} is a folder. Name a file: -o {os.path.join(path, 'report.html')}."
        )
    if os.path.lexists(path) and not overwrite:
        raise BridgeError(f"{path} exists. Name another file with -o, or add --overwrite.")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise BridgeError(f"{folder} isn't a folder. Make it, or write the page elsewhere with -o.")
    if text is None:
        return
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "wb") as file:
            # names of files may hold bytes that are no text
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        if os.path.lexists(partial):
            os.unlink(partial)
        raise


def _inputs(path: str) -> Iterator[Input]:
    if os.path.isfile(path):
        yield _document(path)
        return
    if os.path.isdir(path) and not _is_checkpoint(path):
        names = sorted(name for name in os.listdir(path) if name.endswith(".json"))
        if not names:
            raise BridgeError(
                f"{path} holds neither a checkpoint nor JSON files that convert, batch, verify, "
                "diff or audit printed. Is it the right folder?"
            )
        yield from (_document(os.path.join(path, name)) for name in names)
        return
    yield Input(path, f"{path}, a checkpoint")


def _is_checkpoint(path: str) -> bool:
    from neox_bridge.layouts.open import detect

    try:
        detect(path)
    except BridgeError:
        return False
    return True


def _document(path: str) -> Input:
    if os.path.getsize(path) > _MOST:
        raise BridgeError(f"{path} is too large for a result that neox-bridge printed.")
    with open(path, "rb") as file:
        data = file.read()
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise BridgeError(f"{path} isn't JSON. Give what a command printed with --json.") from None
    if not isinstance(document, dict):
        raise BridgeError(f"{path} isn't a result that neox-bridge printed with --json.")
    return Input(path, f"{path}, SHA-256 {sha256(data).hexdigest()}", document)
