"""What ``os.path`` says of a local path, also said of a URL (``s3://bucket/folder``).

A local path takes the way that it always took: nothing is imported and no call is added for it.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import BinaryIO

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_FILE = "file://"


def is_url(path: str) -> bool:
    """Whether it is one; a ``file://`` is, until ``plain`` made a path of it."""
    return _URL.match(path) is not None


def plain(path: str) -> str:
    """What a user named: the path of a ``file://``, a URL without a slash at its end."""
    if path.startswith(_FILE):
        return path[len(_FILE) :]
    return path.rstrip("/") if is_url(path) and not path.endswith("://") else path


def afresh(path: str) -> str:
    """``plain``, and nothing that was seen of a URL before is believed any more."""
    path = plain(path)
    if is_url(path):
        from neox_bridge.stores.objects import forget

        forget(path)
    return path


def absolute(path: str) -> str:
    """``os.path.abspath``; a URL is absolute."""
    return plain(path) if is_url(path) else os.path.abspath(path)


def normal(path: str) -> str:
    """``os.path.normpath``; of a URL ``plain``."""
    return plain(path) if is_url(path) else os.path.normpath(path)


def exists(path: str) -> bool:
    """``os.path.exists``."""
    if is_url(path):
        return _kind(path) is not None
    return os.path.exists(path)


def lexists(path: str) -> bool:
    """``os.path.lexists``; stores have no links that lead nowhere."""
    if is_url(path):
        return _kind(path) is not None
    return os.path.lexists(path)


def isfile(path: str) -> bool:
    """``os.path.isfile``."""
    if is_url(path):
        return _kind(path) == "file"
    return os.path.isfile(path)


def isdir(path: str) -> bool:
    """``os.path.isdir``; in a store a folder is what has objects below it."""
    if is_url(path):
        return _kind(path) == "directory"
    return os.path.isdir(path)


def listdir(path: str) -> list[str]:
    """``os.listdir``; of a URL as it is now, in one request a thousand objects."""
    if is_url(path):
        from neox_bridge.stores.objects import names

        return names(path)
    return os.listdir(path)


def size(path: str) -> int:
    """``os.path.getsize``, in bytes."""
    if is_url(path):
        from neox_bridge.stores.objects import look

        return look(path).size
    return os.path.getsize(path)


def open_file(path: str) -> BinaryIO:
    """``open(path, "rb")``. Of an object only what is read is fetched, and some more."""
    if is_url(path):
        from neox_bridge.stores.object_file import open_object

        return open_object(path)
    return open(path, "rb")


def size_of(file: BinaryIO) -> int:
    """Bytes of an open file of ``open_file``."""
    from_store = getattr(getattr(file, "raw", None), "size", None)
    if isinstance(from_store, int):
        return from_store
    return os.fstat(file.fileno()).st_size


def is_remote(file: BinaryIO) -> bool:
    """Whether what isn't read of a file isn't here."""
    return hasattr(getattr(file, "raw", None), "url")


def is_here(file: BinaryIO, offset: int, count: int) -> bool:
    """Whether reading so many bytes at this place takes no request."""
    holds = getattr(getattr(file, "raw", None), "holds", None)
    return bool(holds(offset, count)) if holds else True


def fetch_places(file: BinaryIO, offsets: Sequence[int], count: int) -> None:
    """Of an object, have so many bytes at each of these places here, fetched at once."""
    if is_remote(file):
        from neox_bridge.stores.object_file import fetch_chunks

        fetch_chunks(file, offsets, count)


def read_at(path: str, offset: int, count: int) -> bytes:
    """Up to ``count`` bytes from a place in a file; fewer only at its end."""
    with open_file(path) as file:
        file.seek(offset)
        return file.read(count)


def read_pieces(places: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """The bytes at (path, offset, count), in their order; those of URLs are fetched at once."""
    urls = [place for place in places if is_url(place[0])]
    if not urls:
        return [read_at(*place) for place in places]
    from neox_bridge.stores.object_file import fetch_pieces

    fetched = iter(fetch_pieces(urls))
    return [next(fetched) if is_url(place[0]) else read_at(*place) for place in places]


def ahead(paths: Iterable[str]) -> Iterator[str]:
    """The paths as they are; of URLs, the starts of the next ones are fetched meanwhile."""
    rest = iter(paths)
    for first in rest:
        if is_url(first):
            from neox_bridge.stores.object_file import started

            yield from started(chain((first,), rest))
        else:
            yield first


def walk(path: str) -> Iterator[str]:
    """Every object below a URL, as URLs, sorted."""
    from neox_bridge.stores.objects import below

    yield from sorted(below(path))


def _kind(path: str) -> str | None:
    from neox_bridge.stores.objects import kind

    return kind(path)
