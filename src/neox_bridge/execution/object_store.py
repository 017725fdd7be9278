"""A target folder in an object store. It is complete once its record exists.

Objects are written atomically: ``neox_bridge.json`` after all others were written and checked, then
``latest``. For each finished object, ``.neox-bridge/KEY/`` in the same folder contains a small
object, the mark, so that any machine can resume a stopped run. KEY identifies plan, sources and
hash.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256

from neox_bridge.errors import BridgeError, Unreachable, Unverified
from neox_bridge.execution.context import Context
from neox_bridge.execution.digests import hash_bytes
from neox_bridge.execution.install import LATEST, RootFiles
from neox_bridge.execution.journal import Written
from neox_bridge.execution.movers import move
from neox_bridge.execution.sink import Check, Job
from neox_bridge.execution.staging import contains_source, holds_others, kept_files, target_is_file
from neox_bridge.execution.streams import Stream
from neox_bridge.execution.threads import Task, run_all
from neox_bridge.execution.write_tensor import fill_tensor
from neox_bridge.findings import Finding
from neox_bridge.layouts.checkpoint import RECORD
from neox_bridge.layouts.known_files import foreign_objects
from neox_bridge.layouts.record_file import HashName, recorded_files
from neox_bridge.stores.lock import Lock, locked
from neox_bridge.stores.objects import (
    abort_uploads,
    below,
    fetch,
    forget,
    kind,
    look,
    names,
    pending,
    put_small,
    remove,
    start_upload,
)
from neox_bridge.stores.paths import is_writable
from neox_bridge.stores.store import WORK, FileState
from neox_bridge.tensors.pieces import OutputFile, OutputTensor
from neox_bridge.wording import plural

_BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
_REQUESTS = 16  # requests at a time
_REQUEST_BYTES = 1 << 20  # bytes that are transferred in the time that a request takes


@dataclass(frozen=True, slots=True)
class ObjectWriter:
    """Writes files of a plan as objects, and marks each as finished.

    Attributes:
        url: The folder that the paths of the plan are relative to.
        marks: The folder of the marks.
        root_files: The step that is replaced and the files in the root, if ``url`` is an existing
            GPT-NeoX run.
    """

    url: str
    marks: str
    hash_name: HashName | None
    root_files: RootFiles | None = None

    every_crc = False  # bytes that pass through the process always get a CRC-32
    folders = ()

    def place(self, path: str) -> str:
        """The URL of a file of the plan."""
        if self.root_files is not None and "/" not in path:
            path = self.root_files.names.get(path, path)
        return f"{self.url}/{path}".replace("\\", "/")

    def mark(self, path: str) -> str:
        """The URL of the mark of a finished file."""
        return f"{self.marks}/{sha256(path.encode()).hexdigest()[:32]}"

    def write(self, files: Sequence[OutputFile], context: Context) -> list[tuple[str, Written]]:
        """Write files one after another."""
        return [(file.path, self.write_one(file, context)) for file in files]

    def write_one(self, file: OutputFile, context: Context) -> Written:
        """Write a file, and mark it as finished."""
        written, tag = write_object(file, self.place(file.path), self.hash_name, context)
        entry = {"path": file.path, "size": written.size, "hash": written.hash, "tag": tag}
        put_small(self.mark(file.path), json.dumps(entry).encode())
        return written


def write_object(
    file: OutputFile,
    url: str,
    hash_name: HashName | None,
    context: Context,
) -> tuple[Written, str]:
    """Write a file as an object, sequentially and atomically.

    Returns what was written and the tag of the object. On BridgeError, no object is left.
    """
    places = frozenset(place for tensor in file.tensors for place in tensor.crc_at)
    stream = Stream(start_upload(url, file.size), file.size, hash_name, places)
    parts: list[tuple[int, int, bytes | OutputTensor]] = [
        *((offset, len(data), data) for offset, data in file.literals),
        *((tensor.offset, tensor.nbytes, tensor) for tensor in file.tensors),
    ]
    try:
        for offset, size, part in sorted(parts, key=lambda part: part[:2]):
            context.check()
            if isinstance(part, OutputTensor):
                fill_tensor(part, stream, context)
            else:
                stream.literal(part, offset)
                context.wrote(size, "copied")
        if file.copy_of is not None:
            move(file.copy_of, 0, stream, 0, file.size, context, None)
        digest, tag = stream.finish()
    except BaseException:
        stream.abandon()
        raise
    return Written(file.size, digest), tag


class ObjectSink:
    """A ``Sink``."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.findings: tuple[Finding, ...] = ()
        self._url = job.target
        self._writer: ObjectWriter
        self._lock: Lock
        self._stale: tuple[str, ...] = ()  # objects that are deleted when the target is complete
        self._last: dict[str, bytes] = {}  # records, and the files that are written after them
        self._lost: set[str] = set()  # paths of files that the store lost once
        self._is_published = False

    @contextmanager
    def opened(self) -> Iterator[bool]:
        _check_name(self._url)
        with locked(self._url) as self._lock:
            self._begin()
            with self._explained():
                yield False

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """A block whose errors report what remains in the target."""
        try:
            yield
        except Unverified as error:
            self._clear_work()  # a failure here must not hide the verdict
            raise Unverified(
                f"{error} {self._url} is kept for inspection, without its neox_bridge.json. "
                "Delete it, or convert again with `overwrite=True`."
            ) from None
        except (BridgeError, KeyboardInterrupt) as error:
            if self._is_published:
                raise
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(self._kept()) from None
            raise type(error)(f"{error} {self._kept()}") from None

    def files(self) -> list[OutputFile]:
        following = {file.path for file in self._following()}
        files = self.job.plan.files
        return [f for f in files if not f.seals and f.path not in following and self._has(f.path)]

    def write(self, files: Sequence[OutputFile], workers: int) -> None:
        """Write one object after another, largest first."""

        def write(file: OutputFile) -> None:
            self.job.done[file.path] = self._writer.write_one(file, self.job.context)

        tasks: list[Task] = [(max(f.size, _REQUEST_BYTES), partial(write, f)) for f in files]
        run_all(tasks, workers, self.job.context)

    def writer(self) -> ObjectWriter:
        return self._writer

    def enter(self, files: Sequence[tuple[str, Written]]) -> None:
        self.job.done.update(files)

    def lost(self) -> list[OutputFile]:
        """Find objects that the store confirmed but lost. Raises Unreachable if this happens twice.

        Lists the folder once. Missing objects are requested again, because a listing may be
        outdated.
        """
        there, done = below(self._url), self.job.done
        places = {self._writer.place(path): path for path in done}
        doubtful = {
            url: done[path].size
            for url, path in places.items()
            if url not in there or there[url].size != done[path].size
        }
        lost = {places[url]: url for url in _lost(doubtful)}
        for path, url in lost.items():
            if path in self._lost:
                raise _lost_object(url)
            del done[path]
        self._lost.update(lost)
        return [file for file in self.job.plan.files if file.path in lost]

    def seal(self) -> None:
        job, place = self.job, self._writer.place
        done, following = dict(job.done), self._following()
        for file in following:
            digest = hash_bytes(file.literals[0][1], job.key.hash or "xxh3_128")
            done[file.path] = Written(file.size, digest)
        self._last = {place(file.path): data for file, data in job.records(done, place)}
        self._last |= {place(file.path): file.literals[0][1] for file in following}

    def verify(self, check: Check | None) -> None:
        """Check the target as if the records and ``latest`` were already written.

        ``objects.pending_now`` shares this view with other processes.
        """
        remove(self._stale)
        if check is not None:
            with pending(self._last):
                check(self._url)

    def publish(self) -> None:
        self._lock.check()
        for url, data in self._last.items():
            _put_surely(url, data)
            self.job.context.wrote(len(data), "copied")
        self._is_published = True
        if self._writer.root_files is not None:
            self.findings += self._writer.root_files.findings

    def clear(self) -> None:
        if reason := self._clear_work():
            left_over = Finding(
                "left-over",
                "warning",
                f"{self._url} is complete, but temporary files could not be deleted from "
                f"{self._url}/{WORK}: {reason}",
                f"delete {self._url}/{WORK}, or run into the same target again, which tries to "
                "delete it",
            )
            self.findings += (left_over,)

    def _begin(self) -> None:
        """Prepare the folder for writing, and find files that an earlier run finished.

        With ``overwrite``, the existing record is deleted first, so that the target counts as
        incomplete. Raises BridgeError before any change if the target exists or contains a source.
        """
        job, url = self.job, self._url
        marks = f"{url}/{WORK}/{sha256(job.key.line().encode()).hexdigest()[:32]}"
        forget(url)
        names_there = [name for name in _names(url) if name != WORK]
        begun = _read_begun(f"{marks}/begun")
        is_run = any(name in LATEST or name.startswith("global_step") for name in names_there)
        if begun:
            (root_files,) = begun
            step = root_files.step if root_files else None
        else:
            root_files, step = None, job.step if is_run else None
        replaced = f"{url}/{step}" if step else url
        if held := next((s for s in job.key.sources if s.startswith(f"{replaced}/")), None):
            raise contains_source(url, held)
        objects = below(replaced) if names_there else {}
        there = {u: o for u, o in objects.items() if not u.startswith(f"{url}/{WORK}/")}
        if there and not job.overwrite and not begun:
            raise _exists(replaced, there)
        planned = {f"{url}/{file.path}" for file in job.plan.files}
        if job.overwrite and there:
            _check_replaceable(replaced, there, planned)
        if step and not begun:
            from neox_bridge.execution.run_root import root_files as root_files_of

            root_files = root_files_of(job.plan, url, step, overwrite=job.overwrite)
        self._writer = ObjectWriter(url, marks, job.key.hash, root_files)
        # without --overwrite, any other objects were added by another program in the meantime
        self._stale = tuple(sorted(set(there) - planned)) if job.overwrite else ()
        if begun:
            job.done.update(self._finished(there))
        remove(u for u in there if u.endswith(f"/{RECORD}") and (job.overwrite or u in planned))
        if not begun:
            entry = {"beside": asdict(root_files) if root_files else None}
            _put_surely(f"{marks}/begun", json.dumps(entry).encode())
        for name in root_files.retired if root_files else ():  # except files that are written again
            retired = [u for u in below(f"{url}/{name}") if u not in planned]
            remove([*retired, f"{url}/{name}"] if name.endswith(".yml") else retired)
        if names_there or begun:
            abort_uploads(replaced)

    def _finished(self, there: Mapping[str, FileState]) -> dict[str, Written]:
        """The files whose marks match the objects in the store."""
        writer = self._writer
        marks = below(writer.marks)

        def read(file: OutputFile) -> tuple[str, Written] | None:
            mark, now = writer.mark(file.path), there.get(writer.place(file.path))
            # an unreadable mark, as a killed process may leave it, is ignored
            with suppress(BridgeError, ValueError, KeyError, TypeError):
                entry = json.loads(fetch(mark, 0, marks[mark].size))
                same = now == FileState(entry["size"], entry["tag"]) and entry["path"] == file.path
                if same and entry["size"] == file.size:
                    return file.path, Written(entry["size"], entry["hash"])
            return None

        files = [file for file in self.files() if writer.mark(file.path) in marks]
        with ThreadPoolExecutor(_REQUESTS) as pool:
            return dict(filter(None, pool.map(read, files)))

    def _following(self) -> list[OutputFile]:
        """The files that are written after the record: ``latest``, then the start-up yml of a run.

        The old yml is deleted before anything changes, so that it never contradicts ``latest``.
        """
        files = self.job.plan.files
        latest = [file for file in files if file.path in LATEST]
        if self._writer.root_files is None:
            return latest
        return latest + [
            file
            for file in files
            if file.path.endswith(".yml") and "/" not in file.path and self._has(file.path)
        ]

    def _has(self, path: str) -> bool:
        """Whether a file of the plan is written, rather than kept as it is in the run."""
        root_files = self._writer.root_files
        if root_files is None or path in LATEST:
            return True
        top = path.split("/")[0]
        return top == root_files.step or top in root_files.names

    def _kept(self) -> str:
        if not self.job.done:
            return (
                f"No file is complete in {self._url}. Running the same command again starts over."
            )
        return kept_files(f"{self._url}, without its neox_bridge.json", len(self.job.done))

    def _clear_work(self) -> str:
        """Delete the files for resuming, of any plan. Returns why that failed, or ""."""
        try:
            remove(u for u in below(f"{self._url}/{WORK}") if u != self._lock.url)
        except BridgeError as error:
            return str(error)
        return ""


def _check_replaceable(url: str, there: Mapping[str, FileState], planned: set[str]) -> None:
    """Raise Refused if objects would be deleted that are not part of a checkpoint."""
    start = len(url) + 1
    new = {name[start:] for name in planned if name.startswith(f"{url}/")}
    if others := foreign_objects([u[start:] for u in there], {*new, *recorded_files(url)}):
        raise holds_others(url, others)


def _put_surely(url: str, data: bytes) -> None:
    """Write a small object, check that it exists, and write it again if the store lost it."""
    for _ in range(2):
        put_small(url, data)
        if not _lost({url: len(data)}):
            return
    raise _lost_object(url)


def _lost(sizes: Mapping[str, int]) -> list[str]:
    """The objects that the store does not have. sizes: in bytes, by URL."""

    def is_lost(url: str) -> bool:
        try:
            return look(url, again=True).size != sizes[url]
        except Unreachable:
            raise
        except BridgeError:
            return True

    with ThreadPoolExecutor(_REQUESTS) as pool:
        answers = list(pool.map(is_lost, sizes))
    return [url for url, is_gone in zip(sizes, answers, strict=True) if is_gone]


def _lost_object(url: str) -> Unreachable:
    return Unreachable(
        f"{url} cannot be written: the store confirmed the object twice but does not have it. The "
        "source is intact. Try again, or contact the administrator of the store."
    )


def _check_name(url: str) -> None:
    store, _, path = url.partition("://")
    if not is_writable(url):
        raise BridgeError(
            f"{url}: files on the Hub cannot be written one by one. Choose another target."
        )
    parts = path.strip("/").split("/")
    if not parts[0] or (store in _BUCKETS and len(parts) < 2):
        raise BridgeError(
            f"{url}: a whole store cannot be a target. Choose a folder in it: "
            f"{url.rstrip('/')}/NAME."
        )


def _names(url: str) -> list[str]:
    """The names in the folder. Raises BridgeError if it is a file."""
    what = kind(url)
    if what == "file":
        raise target_is_file(url)
    return names(url) if what == "directory" else []


def _read_begun(url: str) -> tuple[RootFiles | None] | None:
    """The decisions of an earlier run of the same plan about files in the root, if any."""
    try:
        size = look(url, again=True).size
    except Unreachable:
        raise
    except BridgeError:
        return None
    with suppress(ValueError, KeyError, TypeError):
        entry = json.loads(fetch(url, 0, size))
        if (kept := entry["beside"]) is None:
            return (None,)
        kept["findings"] = tuple(Finding(**finding) for finding in kept["findings"])
        kept["retired"] = tuple(kept["retired"])
        return (RootFiles(**kept),)
    return None


def _exists(url: str, there: Mapping[str, FileState]) -> BridgeError:
    is_whole = any(name.rpartition("/")[2] == RECORD for name in there)
    note = f", without a {RECORD}: it is incomplete, or neox-bridge did not write it"
    note = "" if is_whole else note
    return BridgeError(
        f"{url} exists and contains {plural(len(there), 'object')}{note}. Choose another target, "
        "or use `overwrite=True` to replace it."
    )
