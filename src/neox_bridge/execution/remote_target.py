"""A folder of a store that a plan is written into: whole as soon as its record is there.

Next to what is written, ``.neox-bridge/KEY/`` holds a small object for each that is finished, so
that a killed run can be gone on with by any machine. KEY stands for plan, sources and hash.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256

from neox_bridge.errors import BridgeError, Unreachable
from neox_bridge.execution.install import LATEST, RootFiles
from neox_bridge.execution.journal import Key, Written
from neox_bridge.execution.staging import check_objects
from neox_bridge.findings import Finding
from neox_bridge.layouts.checkpoint import RECORD
from neox_bridge.planning.plan import Plan
from neox_bridge.stores.objects import (
    Object,
    below,
    fetch,
    forget,
    kind,
    look,
    names,
    put_small,
    remove,
)
from neox_bridge.stores.paths import isfile
from neox_bridge.stores.uploads import WORK, abort_left_over
from neox_bridge.tensors.pieces import OutputFile

_BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Folder:
    """Where a plan goes. Every path is that of the plan, below ``url``.

    marks: the folder of what says which files are finished. beside: the step that is replaced and
    what comes beside it, where ``url`` is a GPT-NeoX run already. stale: objects that a finished
    target doesn't have any more.
    """

    url: str
    marks: str
    beside: RootFiles | None
    stale: tuple[str, ...]

    def place(self, path: str) -> str:
        """The URL of a file."""
        if self.beside is not None and "/" not in path:
            path = self.beside.names.get(path, path)
        return f"{self.url}/{path}".replace("\\", "/")

    def mark(self, path: str) -> str:
        """The URL of what says that a file is finished."""
        return f"{self.marks}/{sha256(path.encode()).hexdigest()[:32]}"

    def todo(self, plan: Plan) -> list[OutputFile]:
        """The files whose bytes are the plan's, without those that say that all is there."""
        later = {file.path for file in self.last(plan)}
        return [
            file
            for file in plan.files
            if not file.seals and file.path not in later and self._has(file.path)
        ]

    def last(self, plan: Plan) -> list[OutputFile]:
        """The files that follow the record: ``latest``, and then a run's start-up yml.

        So that yml never contradicts ``latest``: the old one is removed before anything changes.
        """
        latest = [file for file in plan.files if file.path in LATEST]
        if self.beside is None:
            return latest
        return latest + [
            file
            for file in plan.files
            if file.path.endswith(".yml") and "/" not in file.path and self._has(file.path)
        ]

    def _has(self, path: str) -> bool:
        """Whether a file of the plan is put there, and not kept as the run has it."""
        if self.beside is None or path in LATEST:
            return True
        top = path.split("/")[0]
        return top == self.beside.step or top in self.beside.names


def begin(
    plan: Plan, url: str, key: Key, sources: Iterable[str], overwrite: bool
) -> tuple[Folder, dict[str, Written]]:
    """The folder, ready to be written to, and what an earlier run of the plan finished in it.

    With ``overwrite`` the record of what is there is removed first: from then on it isn't whole.
    Raises BridgeError, before anything is changed, where the target is there already or holds a
    source.
    """
    _check_name(url)
    marks = f"{url}/{WORK}/{sha256(key.line().encode()).hexdigest()[:32]}"
    forget(url)
    own = _names(url)
    begun = _read_begun(f"{marks}/begun") if WORK in own else None
    is_run = any(name in LATEST or name.startswith("global_step") for name in own)
    step = plan.target.get("step")
    inside = begun.step if begun else str(step) if isinstance(step, str) and is_run else None
    replaced = f"{url}/{inside}" if inside else url
    if held := next((s for s in sources if s.startswith(f"{replaced}/")), None):
        raise BridgeError(
            f"{url} holds the source {held}, which would be replaced while it is read. Choose "
            "another target."
        )
    found = below(replaced) if own else {}
    there = {u: o for u, o in found.items() if not u.startswith(f"{url}/{WORK}/")}
    if there and not overwrite and not begun:
        raise _exists(replaced, there)
    planned = {f"{url}/{file.path}" for file in plan.files}
    if overwrite and there:
        new = {name[len(replaced) + 1 :] for name in planned if name.startswith(f"{replaced}/")}
        check_objects(replaced, [name[len(replaced) + 1 :] for name in there], new)
    beside = begun.beside if begun else _beside(plan, url, inside, overwrite)
    # without --overwrite what isn't of the plan came meanwhile, and is somebody's
    stale = tuple(sorted(set(there) - planned)) if overwrite else ()
    folder = Folder(url, marks, beside, stale)
    done = _done(folder, plan, there) if begun else {}
    remove(u for u in there if u.endswith(f"/{RECORD}") and (overwrite or u in planned))
    if not begun:
        told = {"step": inside, "beside": asdict(beside) if beside else None}
        put_surely(f"{marks}/begun", json.dumps(told).encode())
    _retire(folder, planned)
    if own:
        abort_left_over(replaced)
    return folder, done


def _beside(plan: Plan, url: str, step: str | None, overwrite: bool) -> RootFiles | None:
    if step is None:
        return None
    from neox_bridge.execution.run_root import root_files

    return root_files(plan, url, step, overwrite=overwrite)


def _retire(folder: Folder, planned: Collection[str]) -> None:
    """Remove what of a run's root makes room, but for what is written anew in its place."""
    for name in folder.beside.retired if folder.beside else ():
        url = f"{folder.url}/{name}"
        objects = [u for u in below(url) if u not in planned]
        remove([*objects, url] if name.endswith(".yml") else objects)


def mark_done(folder: Folder, path: str, written: Written, tag: str) -> None:
    """Say that a file is finished."""
    told = {"path": path, "size": written.size, "hash": written.hash, "tag": tag}
    put_small(folder.mark(path), json.dumps(told).encode())


def clear(folder: Folder) -> str:
    """Remove what was only for going on, that of other plans too; why that failed, or nothing."""
    try:
        remove(below(f"{folder.url}/{WORK}"))
    except BridgeError as error:
        return str(error)
    return ""


def put_surely(url: str, data: bytes) -> None:
    """Write a small object, and see that it is there: again where the store lost it."""
    for _ in range(2):
        put_small(url, data)
        if not lost({url: len(data)}):
            return
    raise lost_object(url)


def lost(sizes: Mapping[str, int]) -> list[str]:
    """Which of these objects, with their sizes in bytes, a store doesn't have after all."""

    def is_lost(url: str) -> bool:
        try:
            return look(url, again=True).size != sizes[url]
        except Unreachable:
            raise
        except BridgeError:
            return True

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = list(pool.map(is_lost, sizes))
    return [url for url, gone in zip(sizes, answers, strict=True) if gone]


def check_written(folder: Folder, done: Mapping[str, Written]) -> list[str]:
    """The finished files that the store said to have and doesn't have, by their paths.

    One listing; what that lacks is asked for once more, since a listing may be late.
    """
    there = below(folder.url)
    places = {folder.place(path): path for path in done}
    doubtful = {
        url: done[path].size
        for url, path in places.items()
        if url not in there or there[url].size != done[path].size
    }
    return [places[url] for url in lost(doubtful)]


def lost_object(url: str) -> Unreachable:
    return Unreachable(
        f"{url} can't be written: the store said twice that it has it, and doesn't have it. The "
        "source is in order; try again, or ask the store's keeper."
    )


def _check_name(url: str) -> None:
    store, _, path = url.partition("://")
    if store == "hf":
        raise BridgeError(f"{url}: the Hub can't be written to file by file. Name another target.")
    parts = path.strip("/").split("/")
    if not parts[0] or (store in _BUCKETS and len(parts) < 2):
        raise BridgeError(
            f"{url}: that is all of a store, which can't be a target. Name a folder in it: "
            f"{url.rstrip('/')}/NAME."
        )


def _names(url: str) -> list[str]:
    """What is there. Raises BridgeError where that is a file."""
    what = kind(url)
    if what == "file":
        raise BridgeError(f"{url} is a file. Name a folder that doesn't exist yet.")
    return names(url) if what == "directory" else []


@dataclass(frozen=True, slots=True)
class _Begun:
    step: str | None
    beside: RootFiles | None


def _read_begun(url: str) -> _Begun | None:
    if not isfile(url):
        return None
    with suppress(ValueError, KeyError, TypeError):
        told = json.loads(fetch(url, 0, look(url).size))
        if told["beside"] is None:
            return _Begun(None, None)
        kept = told["beside"]
        kept["findings"] = tuple(Finding(**finding) for finding in kept["findings"])
        kept["retired"] = tuple(kept["retired"])
        return _Begun(told["step"], RootFiles(**kept))
    return None


def _done(folder: Folder, plan: Plan, there: Mapping[str, Object]) -> dict[str, Written]:
    """The files whose marks say what the store says of them."""
    marks = below(folder.marks)
    files = [file for file in folder.todo(plan) if folder.mark(file.path) in marks]

    def read(file: OutputFile) -> tuple[str, Written] | None:
        mark, there_now = folder.mark(file.path), there.get(folder.place(file.path))
        # a mark that can't be read, as of a process that was killed over it, says nothing
        with suppress(BridgeError, ValueError, KeyError, TypeError):
            told = json.loads(fetch(mark, 0, marks[mark].size))
            same = there_now == Object(told["size"], told["tag"]) and told["path"] == file.path
            if same and told["size"] == file.size:
                return file.path, Written(told["size"], told["hash"])
        return None

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(filter(None, pool.map(read, files)))


def _exists(url: str, there: Mapping[str, Object]) -> BridgeError:
    objects = "1 object" if len(there) == 1 else f"{len(there):,} objects"
    whole = any(name.rpartition("/")[2] == RECORD for name in there)
    note = "" if whole else f", without a {RECORD}, as what didn't end or isn't neox-bridge's"
    return BridgeError(
        f"{url} exists and holds {objects}{note}. Name another target, or say --overwrite to "
        "replace it."
    )
