"""One dated change of a framework, as data: the form of the entries of the one list.

The list is ``changes_neox.py`` and ``changes_transformers.py``, joined in ``changes.py``. Eras, the
facts of a tree or of a version, the ``changes`` command with its page, and the doctor derive from
it. A commit of GPT-NeoX stands in no other module: others name a change by its id.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from neox_bridge.errors import BridgeError

Framework = Literal["gpt-neox", "transformers"]
# an opened ``layouts.checkpoint.Checkpoint``, which this room is below
Described = Any

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
class Commit:
    """Where GPT-NeoX changed.

    Attributes:
        sha: The whole hash; "" for a proposal.
        pull: The number of the pull request, 0 for none.
        date: In UTC.
        git_date: As ``git log`` prints it, if that is another day than in UTC.
        proposed: Whether it is not merged: ``date`` is then that of the proposal.
    """

    sha: str
    pull: int
    date: str
    git_date: str = ""
    proposed: bool = False

    @property
    def link(self) -> str:
        place = f"pull/{self.pull}" if self.pull else f"commit/{self.sha[:8]}"
        return f"https://github.com/EleutherAI/gpt-neox/{place}"


@dataclass(frozen=True, slots=True)
class Release:
    """The first version of transformers that has a change.

    Attributes:
        version: All three numbers.
        pull: The number of the pull request, 0 where it is not known.
        file: The source file, below src/transformers, where no pull request is known.
        date: Of the release; that of its minor version by default.
        sha: Of the commit, where it is known.
    """

    version: str
    pull: int = 0
    file: str = ""
    date: str = ""
    sha: str = ""

    def __post_init__(self) -> None:
        if not self.date:
            object.__setattr__(self, "date", RELEASED[self.version.rpartition(".")[0]])

    @property
    def link(self) -> str:
        source = f"blob/v{self.version}/src/transformers/{self.file}"
        place = f"pull/{self.pull}" if self.pull else source
        return f"https://github.com/huggingface/transformers/{place}"


@dataclass(frozen=True, slots=True)
class Change:
    """A change that alters what a framework expects or what a checkpoint holds or means.

    Attributes:
        id: Its name, in the command, the page and the findings.
        origin: The commit, or the release.
        families: The architectures that it is about.
        title: What changed. Empty for a change that only sets facts and is not shown to users.
        symptom: What a user sees.
        remedy: The command or the step that fixes it.
        loud: Whether something fails or warns.
        sets: The fields of ``Era`` that it gives another value. ``deepspeed`` is the version
            that GPT-NeoX requires since then.
        ends_era: The era whose last tree is the one before this commit.
        renames: Modules of a block by their old names, with the new ones.
        adds_keys: Keys of the yml that trees take since then.
        adds_tensors: A regular expression of the tensors of a block that only trees with a
            proposed change have; "" for none.
        is_as_before: Of a proposed change: whether settings with its keys describe a model that
            trees without it have as well.
        removes_keys: Keys of the yml that trees refuse since then.
        defaults: Settings whose default it changed, each with the old and the new one.
        in_checkpoint: Whether it matters for an opened checkpoint. By default: whether the yml has
            one of the removed keys, or of the added keys if none is removed.
        in_error: Regular expressions of the messages that it causes. Those about one of the keys or
            an old name are added automatically.
    """

    id: str
    origin: Commit | Release
    families: tuple[str, ...] = ()
    title: str = ""
    symptom: str = ""
    remedy: str = ""
    loud: bool = field(default=True, kw_only=True)
    sets: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    ends_era: str = field(default="", kw_only=True)
    renames: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    adds_keys: tuple[str, ...] = field(default=(), kw_only=True)
    adds_tensors: str = field(default="", kw_only=True)
    is_as_before: Callable[[Mapping[str, Any]], bool] = field(
        default=lambda _raw: False, kw_only=True
    )
    removes_keys: tuple[str, ...] = field(default=(), kw_only=True)
    defaults: Mapping[str, tuple[float, float]] = field(default_factory=dict, kw_only=True)
    in_checkpoint: Callable[[Described], bool] | None = field(default=None, kw_only=True)
    in_error: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        keys = set(self.removes_keys or self.adds_keys)
        if keys and self.in_checkpoint is None:
            object.__setattr__(
                self, "in_checkpoint", lambda c: c.neox is not None and not keys.isdisjoint(c.raw)
            )
        unknown = (rf"unexpected keyword argument '{key}'" for key in sorted(self.keys))
        names = (rf'"[\w.]*{re.escape(name)}\.\w+"' for name in self.renames)
        object.__setattr__(self, "in_error", (*self.in_error, *unknown, *names))

    @property
    def keys(self) -> frozenset[str]:
        """The yml keys that it adds or removes."""
        return frozenset((*self.adds_keys, *self.removes_keys))

    @property
    def framework(self) -> Framework:
        return "gpt-neox" if isinstance(self.origin, Commit) else "transformers"

    @property
    def proposed(self) -> bool:
        """Whether it is not merged."""
        return isinstance(self.origin, Commit) and self.origin.proposed

    @property
    def commit(self) -> str:
        """The first characters of the hash; "" where only the release is known."""
        return self.origin.sha[:8]

    @property
    def pull(self) -> str:
        """As "#1212"; "" where it is not known."""
        return f"#{self.origin.pull}" if self.origin.pull else ""

    @property
    def date(self) -> str:
        return self.origin.date

    @property
    def day(self) -> str:
        """The day on which a user looks for it: that of ``git log`` for GPT-NeoX."""
        return self.origin.git_date or self.date if isinstance(self.origin, Commit) else self.date

    @property
    def version(self) -> str:
        """Of transformers; "" for GPT-NeoX, which has none."""
        return self.origin.version if isinstance(self.origin, Release) else ""

    @property
    def link(self) -> str:
        return self.origin.link

    @property
    def named(self) -> str:
        """As ``cited``, with the name of the framework."""
        return f"{'GPT-NeoX' if self.framework == 'gpt-neox' else 'transformers'} {self.cited}"

    @property
    def cited(self) -> str:
        """Where and when, for people: "4.35 (#25830, 2023-11-02)", or a commit in place of 4.35.

        A proposed change is "#1436 (proposed, 2026-09-20)".
        """
        if self.proposed:
            return f"{self.pull} (proposed, {self.date})"
        name = self.version.rpartition(".")[0] or self.commit
        return f"{name} ({', '.join(filter(None, (self.pull, self.date)))})"

    @property
    def since(self) -> str:
        """For sentences: a hash with its date or "transformers 4.37"."""
        if isinstance(self.origin, Release):
            return f"transformers {'.'.join(self.version.split('.')[:2])}"
        return f"{self.commit} ({self.date})"


@dataclass(frozen=True, slots=True)
class Moment:
    """A point in time that a user names: a version of transformers, a date or a month."""

    version: tuple[int, ...]
    date: str


def version_key(version: str) -> tuple[int, ...]:
    """(4, 35, 0) of "4.35.0": for comparing."""
    return tuple(int(part) for part in version.split("."))


def parse_moment(text: str) -> Moment:
    """A version (4.30, 5.0.1) or a date (2024-03, 2024-03-04).

    Raises:
        BridgeError: It is neither. The message names the forms that are understood.
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
            f"{text}: the date of this version of transformers is not known. Use a version from "
            f"{known[0]} to {known[-1]}, or a date such as 2024-03."
        )
    raise BridgeError(
        f"{text!r} is neither a version of transformers (4.30) nor a date (2024-03 or 2024-03-04)."
    )


def not_before(change: Change, since: Moment) -> bool:
    """Whether a change happened at that moment or later."""
    if since.version and change.version:
        return version_key(change.version) >= since.version
    return change.date[: len(since.date)] >= since.date


def not_after(change: Change, until: Moment) -> bool:
    """Whether a change happened by that moment; 5.23 includes 5.23.2, and 2024-03 all of March."""
    if until.version and change.version:
        return version_key(change.version)[: len(until.version)] <= until.version
    return change.date[: len(until.date)] <= until.date
