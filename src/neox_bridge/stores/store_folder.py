"""Folders of object stores and of the Hub, by URL."""

from collections.abc import Iterator
from typing import ClassVar

from neox_bridge.stores import object_file, objects


class StoreFolder:
    """A folder of an object store, which exists if it contains objects."""

    is_local: ClassVar[bool] = False
    is_writable: ClassVar[bool] = True

    def plain(self, path: str) -> str:
        return path if path.endswith("://") else path.rstrip("/")

    absolute = normal = real = plain  # stores have neither relative paths nor links
    kind = staticmethod(objects.kind)
    names = staticmethod(objects.names)
    states = staticmethod(objects.look_all)
    forget = staticmethod(objects.forget)
    open = staticmethod(object_file.open_object)
    read = staticmethod(object_file.fetch_pieces)
    ahead = staticmethod(object_file.started)

    def is_there(self, path: str) -> bool:
        return objects.kind(path) is not None

    def size(self, path: str) -> int:
        return objects.look(path).size

    def walk(self, path: str) -> Iterator[tuple[str, int | None]]:
        return ((url, state.size) for url, state in sorted(objects.below(path).items()))


class HubFolder(StoreFolder):
    """A revision on the Hub, read by ranges. It is only written in commits, not file by file."""

    is_writable: ClassVar[bool] = False
