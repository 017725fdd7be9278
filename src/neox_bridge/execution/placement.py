"""Chooses the machine for a call: one that can access its files, closest to the data.

What a machine can access is plain data, so the choice is a pure function; ``ray_node`` collects it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

_Call = TypeVar("_Call", bound=Callable[..., Any])
_places: "dict[Callable[..., Any], Callable[..., Places]]" = {}


@dataclass(frozen=True, slots=True)
class Places:
    """The files that a call reads and writes, by absolute paths.

    Attributes:
        files: Files to read, with the bytes that are read of each.
        folders: Folders of which it may read all files.
        writes: Folders in which it creates files.
    """

    files: Mapping[str, int] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    def all_folders(self) -> set[str]:
        """The folders that a machine must be asked about."""
        return {_folder(path) for path in self.files} | {*self.folders, *self.writes}


@dataclass(frozen=True, slots=True)
class View:
    """What a machine can access in a folder.

    Attributes:
        missing: Files that are missing or different from those of the caller; None if the folder is
            missing.
        local: Whether the folder is on a local disk of the machine.
    """

    missing: frozenset[str] | None
    local: bool = False


Views = Mapping[str, View]  # views by folder


def reaches(places: Callable[..., Places]) -> Callable[[_Call], _Call]:
    """Declares what calls of a function read and write. ``places`` gets the arguments."""

    def register(call: _Call) -> _Call:
        _places[call] = places
        return call

    return register


def places_of(call: Callable[..., Any], args: tuple[Any, ...]) -> Places:
    """What a call reads and writes, if declared."""
    return _places[call](*args) if call in _places else Places()


def unseen(places: Places, views: Views) -> list[str]:
    """The paths that a machine needs but cannot access, sorted."""
    paths = {folder for folder in places.writes if views[folder].missing is None}
    for folder in places.folders:
        missing = views[folder].missing
        paths |= {folder} if missing is None else {f"{folder}/{name}" for name in missing}
    for path in places.files:
        folder, _, name = path.rpartition("/")
        missing = views[folder].missing
        if missing is None or name in missing:
            paths.add(path)
    return sorted(paths)


def local_bytes(places: Places, views: Views) -> int:
    """How many of the bytes to read are on local disks of the machine."""
    return sum(size for path, size in places.files.items() if views[_folder(path)].local)


def choose(places: Places, views: Mapping[str, Views], free: Mapping[str, int]) -> str | None:
    """The machine for a call: among free ones that can access all files, the one with most bytes.

    Ties go to the machine with most free slots. Returns None if all suitable machines are busy or
    there is none.

    Args:
        places: The files that the call reads and writes.
        views: What each machine can access.
        free: The number of calls that each machine can start now.
    """
    able = [name for name, count in free.items() if count > 0 and not unseen(places, views[name])]
    return max(able, key=lambda name: (local_bytes(places, views[name]), free[name]), default=None)


def unrequested(wanted: Iterable[str], views: Views, pending: Collection[str]) -> list[str]:
    """The folders that a machine must still be asked about. pending: those already requested."""
    return [folder for folder in wanted if folder not in views and folder not in pending]


def _folder(path: str) -> str:
    return path.rpartition("/")[0]
