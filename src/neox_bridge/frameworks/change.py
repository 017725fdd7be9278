"""One known change of a framework, as data, and the dates of transformers' releases."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from neox_bridge.errors import BridgeError
from neox_bridge.frameworks.described import Described
from neox_bridge.frameworks.facts import TreeFacts

Framework = Literal["gpt-neox", "transformers"]


@dataclass(frozen=True, slots=True)
class Change:
    """A change that alters what a checkpoint holds or means.

    commit: of the framework's repository; "" where only the release is known.
    date: of the commit for GPT-NeoX, of the release for transformers; ISO, UTC.
    version: the first release of transformers that has it; "" for GPT-NeoX, which has none.
    families: the architectures that it is about.
    symptom: what a user sees. loud: something fails or warns.
    remedy: the command or the step that mends it.
    in_checkpoint: whether it matters for this opened checkpoint. Pure.
    in_tree: whether a GPT-NeoX tree has it.
    in_error: regular expressions of the messages that it causes.
    """

    id: str
    framework: Framework
    commit: str
    pull: str
    date: str
    version: str
    families: tuple[str, ...]
    title: str
    symptom: str
    loud: bool
    remedy: str
    link: str
    in_checkpoint: Callable[[Described], bool] | None = None
    in_tree: Callable[[TreeFacts], bool] | None = None
    in_error: tuple[str, ...] = ()


# the day each minor version was uploaded to PyPI; GPT-NeoX has been in it since 4.20
_RELEASES = """4.20 2022-06-16 4.21 2022-07-27 4.22 2022-09-14 4.23 2022-10-10 4.24 2022-11-01
4.25 2022-12-01 4.26 2023-01-24 4.27 2023-03-15 4.28 2023-04-13 4.29 2023-05-10 4.30 2023-06-08
4.31 2023-07-18 4.32 2023-08-22 4.33 2023-09-05 4.34 2023-10-03 4.35 2023-11-02 4.36 2023-12-11
4.37 2024-01-22 4.38 2024-02-21 4.39 2024-03-21 4.40 2024-04-18 4.41 2024-05-17 4.42 2024-06-27
4.43 2024-07-23 4.44 2024-08-06 4.45 2024-09-25 4.46 2024-10-24 4.47 2024-12-05 4.48 2025-01-10
4.49 2025-02-17 4.50 2025-03-21 4.51 2025-04-05 4.52 2025-05-20 4.53 2025-06-26 4.54 2025-07-25
4.55 2025-08-05 4.56 2025-08-29 4.57 2025-10-03 5.0 2026-01-26 5.1 2026-02-05 5.2 2026-02-16
5.3 2026-03-04 5.4 2026-03-27 5.5 2026-04-02 5.6 2026-04-22 5.7 2026-04-28 5.8 2026-05-05
5.9 2026-05-20 5.10 2026-06-03 5.11 2026-06-10 5.12 2026-06-12 5.13 2026-07-03 5.14 2026-07-15
5.15 2026-08-10 5.16 2026-08-26 5.17 2026-09-09 5.18 2026-09-30 5.19 2026-10-06 5.20 2026-10-15
5.21 2026-10-26 5.22 2026-10-29 5.23 2026-11-13 5.24 2026-11-21"""
_words = _RELEASES.split()
RELEASED: dict[str, str] = dict(zip(_words[::2], _words[1::2], strict=True))


@dataclass(frozen=True, slots=True)
class Moment:
    """A point in time that a user names: a version of transformers, or a date (or its month)."""

    version: tuple[int, ...]
    date: str


def version_key(version: str) -> tuple[int, ...]:
    """(4, 35, 0) of "4.35.0": for comparing."""
    return tuple(int(part) for part in version.split("."))


def parse_moment(text: str) -> Moment:
    """A version (4.30, 5.0.1) or a date (2024-03, 2024-03-04).

    Raises BridgeError saying what is understood.
    """
    text = text.strip()
    if re.fullmatch(r"20\d\d(-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01]))?)?", text):
        return Moment((), text)
    if match := re.fullmatch(r"v?(\d+)(?:\.(\d+))?(?:\.\d+)?", text):
        minor = f"{match[1]}.{match[2] or 0}"
        if minor in RELEASED:
            return Moment(version_key(text.removeprefix("v")), RELEASED[minor])
        known = list(RELEASED)
        raise BridgeError(
            f"{text}: the date of this version of transformers isn't known. Known are {known[0]} "
            f"to {known[-1]}; or name a date, as 2024-03."
        )
    raise BridgeError(
        f"{text!r} is neither a version of transformers (4.30) nor a date (2024-03 or 2024-03-04)."
    )


def not_before(change: Change, since: Moment) -> bool:
    """Whether a change is of that moment or later."""
    if since.version and change.version:
        return version_key(change.version) >= since.version
    return change.date[: len(since.date)] >= since.date


def not_after(change: Change, until: Moment) -> bool:
    """Whether a change is of that moment or earlier; 5.23 includes 5.23.2, 2024-03 all March."""
    if until.version and change.version:
        return version_key(change.version)[: len(until.version)] <= until.version
    return change.date[: len(until.date)] <= until.date
