"""Where a call can be made: on machines that see what it reads and writes, nearest to the bytes.

What a machine sees is plain data here, so that the choice is a pure function; ``ray_node`` looks.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

_Call = TypeVar("_Call", bound=Callable[..., Any])
_places: "dict[Callable[..., Any], Callable[..., Places]]" = {}


@dataclass(frozen=True, slots=True)
class Places:
    """What a call reads and writes, by absolute paths.

    files: those that are read, with the bytes that are taken of each. folders: those of which it
    may read all files. writes: those in which it makes files.
    """

    files: Mapping[str, int] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    def all_folders(self) -> set[str]:
        """Those that a machine is to be asked about."""
        return {_folder(path) for path in self.files} | {*self.folders, *self.writes}


@dataclass(frozen=True, slots=True)
class View:
    """What a machine sees of a folder.

    missing: the files that are not there as the caller has them; None where the folder is not.
    local: whether its disk is the machine's own, not a network's.
    """

    missing: frozenset[str] | None
    local: bool = False


Views = Mapping[str, View]  # by folder


def reaches(places: Callable[..., Places]) -> Callable[[_Call], _Call]:
    """Says of a function what a call of it reads and writes: ``places`` gets its arguments."""

    def register(call: _Call) -> _Call:
        _places[call] = places
        return call

    return register


def places_of(call: Callable[..., Any], args: tuple[Any, ...]) -> Places:
    """What a call reads and writes; nothing where nobody said."""
    return _places[call](*args) if call in _places else Places()


def unseen(places: Places, views: Views) -> list[str]:
    """The paths that a machine would need and doesn't see, sorted."""
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
    """How many of the bytes that are read lie on disks of the machine itself."""
    return sum(size for path, size in places.files.items() if views[_folder(path)].local)


def choose(places: Places, views: Mapping[str, Views], free: Mapping[str, int]) -> str | None:
    """The machine for a call: of those that see all and are free, that with most of the bytes.

    views, free: by machine; free: calls that it could begin now. Of equals the one with most free;
    None where all who see it are busy, or nobody does.
    """
    able = [name for name, count in free.items() if count > 0 and not unseen(places, views[name])]
    return max(able, key=lambda name: (local_bytes(places, views[name]), free[name]), default=None)


def unasked(wanted: Iterable[str], views: Views, pending: Collection[str]) -> list[str]:
    """The folders that a machine has still to be asked about; it is being asked about pending."""
    return [folder for folder in wanted if folder not in views and folder not in pending]


def _folder(path: str) -> str:
    return path.rpartition("/")[0]
