"""Functions that run on the nodes of a Ray cluster. Does not import Ray."""

import contextlib
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.execution.placement import View

Looks = dict[str, dict[str, tuple[int, int]]]  # folder: name: bytes, seconds of the last change
_MOUNTS = "/proc/self/mountinfo"
_NETWORK = {
    *("9p", "afs", "beegfs", "beegfs_nodev", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs"),
    *("nfs4", "orangefs", "panfs", "pvfs2", "smb3", "virtiofs", "wekafs"),
}


def packed(call: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """Pickle a call for ``perform``. Ray's own pickling is far slower for many parts."""
    return pickle.dumps((call, args), pickle.HIGHEST_PROTOCOL)


def perform(data: bytes, folder: str) -> bytes:
    """Run a call. Returns, pickled, (True, result) or (False, exception).

    The exception is returned, because Ray would put a traceback into its message. folder: the
    current folder of the caller, for relative paths.
    """
    try:
        with contextlib.suppress(OSError):
            os.chdir(folder)
        call, args = pickle.loads(data)
        with _uninterrupted():
            result = call(*args)
        return pickle.dumps((True, result), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        return _raised(error)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore the interrupt by which Ray cancels a task, so that a started call finishes.

    Later processes would inherit this, so the old handler is restored.
    """
    try:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _raised(error: Exception) -> bytes:
    with contextlib.suppress(Exception):
        data = pickle.dumps((False, error), pickle.HIGHEST_PROTOCOL)
        pickle.loads(data)
        return data
    return pickle.dumps((False, BridgeError(f"{type(error).__name__}: {error}")))


def listed(folder: str) -> dict[str, tuple[int, int]]:
    """The files of a folder: their sizes in bytes, and seconds of the last change.

    In whole seconds, because not every file system stores more.
    """
    files = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # a broken link, or a file that was just deleted
                if entry.is_file():
                    status = entry.stat()
                    files[entry.name] = status.st_size, int(status.st_mtime)
    return files


def look(wanted: Looks) -> dict[str, View]:
    """The views of this node on folders. wanted: the files that the caller sees."""
    mounts = _mounts()
    views = {}
    for folder, files in wanted.items():
        try:
            here = listed(folder)
        except OSError:
            views[folder] = View(None)
            continue
        missing = frozenset(name for name, facts in files.items() if here.get(name) != facts)
        views[folder] = View(missing, _is_local(os.path.realpath(folder), mounts))
    return views


def asker() -> Callable[[], tuple[str | None, str]]:
    """A function that returns the code of a node: (hash of all modules, version) or (None, why).

    It is sent by value, so that a node without the package can answer.
    """

    def ask() -> tuple[str | None, str]:
        import hashlib
        import os

        try:
            import neox_bridge.execution.units  # noqa: F401 (what a node will run)
            from neox_bridge import version
        except ImportError as error:
            return None, str(error)
        state = hashlib.sha256()
        home = os.path.dirname(os.path.abspath(version.__file__))
        for folder, folders, names in os.walk(home):
            folders.sort()
            for name in sorted(names):
                if name.endswith(".py"):
                    path = os.path.join(folder, name)
                    state.update(os.path.relpath(path, home).encode())
                    with open(path, "rb") as file:
                        state.update(file.read())
        return state.hexdigest(), version.__version__

    return ask


def _mounts() -> dict[str, str]:
    """The type of the file system at each mount point; empty if unknown."""
    kinds = {}
    with contextlib.suppress(OSError), open(_MOUNTS, encoding="utf-8", errors="replace") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            kinds[before.split()[4].replace("\\040", " ")] = after.split()[0]
    return kinds


def _is_local(path: str, mounts: Mapping[str, str]) -> bool:
    while path not in mounts and path != os.path.dirname(path):
        path = os.path.dirname(path)
    kind = mounts.get(path, "nfs")
    return kind not in _NETWORK and not kind.startswith("fuse")
