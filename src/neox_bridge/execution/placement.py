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

    lacks: the files in it that aren't there as they are elsewhere; None where the folder isn't.
    own: whether its disk is the machine's own, no network's.
    """

    lacks: frozenset[str] | None
    own: bool = False


Views = Mapping[str, View]  # by folder


def reaches(places: Callable[..., Places]) -> Callable[[_Call], _Call]:
    """Says of a function what a call of it reads and writes: ``places`` gets its arguments."""

    def register(call: _Call) -> _Call:
        _places[call] = places
        return call

    return register


def places_of(call: Callable[..., Any], args: tuple[Any, ...]) -> Places:
    """What a call reads and writes; nothing where nobody said."""
    found = _places.get(call)
    return found(*args) if found is not None else Places()


def unseen(places: Places, views: Views) -> list[str]:
    """The paths that a machine would need and doesn't see, sorted."""
    found = {folder for folder in places.writes if views[folder].lacks is None}
    for folder in places.folders:
        lacks = views[folder].lacks
        found |= {folder} if lacks is None else {f"{folder}/{name}" for name in lacks}
    for path in places.files:
        folder = _folder(path)
        lacks = views[folder].lacks
        if lacks is None or path[len(folder) + 1 :] in lacks:
            found.add(path)
    return sorted(found)


def own_bytes(places: Places, views: Views) -> int:
    """How many of the bytes that are read lie on disks of the machine itself."""
    return sum(size for path, size in places.files.items() if views[_folder(path)].own)


def choose(places: Places, views: Mapping[str, Views], free: Mapping[str, int]) -> str | None:
    """The machine for a call: of those that see all and are free, that with most of the bytes.

    views, free: by machine; free: calls that it could begin now. Of equals the one with most free;
    None where all who see it are busy, or nobody does.
    """
    able = [name for name, count in free.items() if count > 0 and not unseen(places, views[name])]
    return max(able, key=lambda name: (own_bytes(places, views[name]), free[name]), default=None)


def asked(wanted: Iterable[str], views: Views, already: Collection[str]) -> list[str]:
    """The folders that a machine has still to be asked about."""
    return [folder for folder in wanted if folder not in views and folder not in already]


def _folder(path: str) -> str:
    return path.rpartition("/")[0]
