"""Reads the inputs of a report, and writes the page."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from hashlib import sha256
from typing import Any

from neox_bridge.errors import BridgeError, Refused
from neox_bridge.execution.flushing import flush
from neox_bridge.execution.lock import locked
from neox_bridge.wording import human

_MOST_BYTES = 256 << 20  # largest JSON file; the plan of a large model takes a few MB


@dataclass(frozen=True, slots=True)
class ReportInput:
    """A checkpoint's folder, or a JSON document. provenance: its origin, for the page footer."""

    name: str
    provenance: str
    document: dict[str, Any] | None = None


def inputs(paths: Sequence[str]) -> list[ReportInput]:
    """Read the inputs in the order of the paths, and files of a folder by name.

    Raises BridgeError for a path that is neither a checkpoint nor a JSON document.
    """
    return [one for path in paths for one in _inputs(path)]


def today() -> str:
    """The current time in UTC, or SOURCE_DATE_EPOCH (seconds) for reproducible pages."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    now = datetime.now(timezone.utc)
    if epoch.isdecimal():
        now = datetime.fromtimestamp(int(epoch), timezone.utc)
    return now.strftime("%Y-%m-%d %H:%M UTC")


def write_page(path: str, text: str | None, overwrite: bool) -> None:
    """Write the page atomically; without text, only check whether it can be written.

    It is written to a temporary file first, which a killed run leaves and the next run reuses.
    ``overwrite`` replaces only pages of this tool. A link is kept, and its target is replaced.
    """
    if os.path.isdir(path):
        raise BridgeError(
            f"{path} is a folder. Give a file: -o {os.path.join(path, 'report.html')}."
        )
    real = os.path.realpath(path)
    if os.path.lexists(path) and not overwrite:
        raise BridgeError(
            f"{path} already exists. Choose another file with -o, or use --overwrite."
        )
    if os.path.lexists(real) and not _is_page(real):
        raise Refused(
            f"{path} was not written by neox-bridge report, so --overwrite does not replace it. "
            "Choose another file with -o."
        )
    folder, name = os.path.split(real)
    if not os.path.isdir(folder):
        raise BridgeError(f"{folder} is not a folder. Create it, or choose another place with -o.")
    if text is None:
        return
    partial = os.path.join(folder, f".{name}.neox-bridge")
    with locked(partial, path) as fd:
        try:
            os.ftruncate(fd, 0)
            # file names may contain bytes that are not text
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(text.encode("utf-8", "backslashreplace"))
            os.fsync(fd)
            os.replace(partial, real)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(partial)
            raise
    flush(folder)


def _is_page(path: str) -> bool:
    """Whether a file is a page of this tool, or empty."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        head = file.read(4096)
    return not head or b'<meta name="generator" content="neox-bridge ' in head


def _inputs(path: str) -> Iterator[ReportInput]:
    if os.path.isfile(path):
        yield _document(path)
        return
    if os.path.isdir(path) and not _is_checkpoint(path):
        names = sorted(name for name in os.listdir(path) if name.endswith(".json"))
        if not names:
            raise BridgeError(
                f"{path} contains neither a checkpoint nor JSON files that convert, batch, "
                "verify, diff or audit printed. Check the path."
            )
        yield from (_document(os.path.join(path, name)) for name in names)
        return
    yield ReportInput(path, f"{path}, a checkpoint")


def _is_checkpoint(path: str) -> bool:
    from neox_bridge.layouts.file_names import is_model_text
    from neox_bridge.layouts.open import detect
    from neox_bridge.layouts.weight_sets import is_weights_file

    try:
        detect(path)
    except BridgeError:
        return any(is_weights_file(name) or is_model_text(name) for name in os.listdir(path))
    return True


def _document(path: str) -> ReportInput:
    if os.path.getsize(path) > _MOST_BYTES:
        raise BridgeError(
            f"{path} is larger than {human(_MOST_BYTES)}, which no result of neox-bridge is. Give "
            "a file that a command printed with --json, or the folder of a checkpoint."
        )
    with open(path, "rb") as file:
        data = file.read()
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise BridgeError(
            f"{path} is not JSON. Give a file that a command printed with --json."
        ) from None
    if not isinstance(document, dict):
        raise BridgeError(
            f"{path} is not a result of neox-bridge, which is a JSON object. Give a file that a "
            "command printed with --json."
        )
    return ReportInput(path, f"{path}, SHA-256 {sha256(data).hexdigest()}", document)
