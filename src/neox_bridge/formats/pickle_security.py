"""Says what a file's pickles would import, call and change under ``torch.load`` or ``pickle.load``.

Read by the same machine as always, so nothing is imported or called here either. Where it stops
before a pickle's end, what would follow isn't known, and the report says so.
"""

import io
import os
import pickletools
import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from typing import BinaryIO, Literal, cast

from neox_bridge.formats.pickle_folds import Context, Watcher
from neox_bridge.formats.pickle_names import calls_of, is_known
from neox_bridge.formats.pickles import Global, PickleError, Record, load
from neox_bridge.formats.torch_legacy import MAGIC
from neox_bridge.formats.zip_directory import open_zip
from neox_bridge.stores.paths import is_url, open_file

Container = Literal["zip", "stream", "none"]
_LEGACY = 5  # pickles of a file of before torch 1.6, all of which torch.load runs
_MOST_PICKLES = 50  # in one zip
_MOST_NAMES = 5_000  # in one file
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # torch knows no others
_OPCODES = frozenset(opcode.code.encode("latin-1") for opcode in pickletools.opcodes)
_TAR_MAGIC_AT = 257
_ZIP_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError),
    *(OSError, ValueError, OverflowError, struct.error),
)


@dataclass(slots=True)
class Use:
    """What would happen to a class or function. called, changed: how often.

    changed: attributes or items set on the thing itself, which is how a pickle alters a library.
    """

    name: str
    known: bool
    imported: int = 0
    called: int = 0
    changed: int = 0

    @property
    def harmless(self) -> bool:
        return self.known and not self.changed


@dataclass(frozen=True, slots=True)
class Report:
    """One file. uses: in the order in which they would happen first.

    problem: why what it would do isn't known to the end; empty where it is.
    """

    path: str
    container: Container
    pickles: int
    uses: tuple[Use, ...] = ()
    problem: str = ""

    @property
    def harmless(self) -> bool:
        """Whether loading this builds values and does nothing else."""
        return not self.problem and all(use.harmless for use in self.uses)


@dataclass(slots=True)
class _Watch(Watcher):
    pickles: int = 0
    problem: str = ""
    uses: dict[Global | str, Use] = field(default_factory=dict)

    def named(self, found: Global) -> None:
        self._use(found).imported += 1

    def called(self, factory: object, args: object) -> None:
        self._use(factory).called += 1
        for argument in calls_of(factory, args):
            self._use(argument).called += 1

    def changed(self, target: Global) -> None:
        self._use(target).changed += 1

    def _use(self, found: object) -> Use:
        key: Global | str = found if isinstance(found, Global) else _described(found)
        if key not in self.uses:
            if len(self.uses) >= _MOST_NAMES:
                raise PickleError(f"the pickle names more than {_MOST_NAMES:,} things")
            if isinstance(key, Global):
                use = Use(f"{key.module}.{key.name}"[:200], is_known(key))
            else:
                use = Use(key, known=False)
            self.uses[key] = use
        return self.uses[key]


def _described(factory: object) -> str:
    """What is called where it isn't a name: mostly what another call returned."""
    maker = factory.factory if isinstance(factory, Record) else None
    if isinstance(maker, Global):
        return f"what {maker.module}.{maker.name}"[:200] + " returns"
    return "what another call returns" if isinstance(factory, Record) else "a value"


def is_candidate(path: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a file may hold pickles: by its suffix, or because it begins as they do."""
    if path.endswith(suffixes):
        return True
    with open_file(path) as file:
        head = file.read(4)
    if head.startswith(b"PK"):
        return _has_pickles(path)
    return len(head) > 1 and head[0] == 0x80 and head[1] <= 5


def scan(path: str) -> Report:
    """The report of one file. Bounded in time and memory; OSError where it can't be read."""
    if not is_url(path) and not stat.S_ISREG(os.stat(path).st_mode):
        return Report(path, "none", 0, problem="it isn't a regular file")
    with open_file(path) as file:
        head = file.read(_TAR_MAGIC_AT + 5)
        file.seek(0)
        if head[_TAR_MAGIC_AT:] == b"ustar":
            return Report(path, "none", 0, problem="it is a tar, whose pickles aren't read here")
        container: Container = "zip" if head.startswith(b"PK") else "stream"
        if head[:1] not in _OPCODES and container == "stream":
            return Report(path, "none", 0)
        context = Context(lambda tensor: tensor)
        context.watch = watch = _Watch()
        try:
            (_scan_zip if container == "zip" else _scan_stream)(file, context, watch)
        except PickleError as error:
            watch.problem = str(error)
        except _ZIP_ERRORS as error:
            watch.problem = f"its zip is damaged: {str(error)[:100]}"
    return Report(path, container, watch.pickles, tuple(watch.uses.values()), watch.problem)


def _anything(_pid: object) -> object:
    """What torch makes of a persistent id is a storage, whatever it says."""
    return None


def _scan_stream(file: BinaryIO, context: Context, watch: _Watch) -> None:
    """One pickle; the five of torch's old format, where the first is its magic number."""
    watch.pickles = 1
    magic = load(file, _anything, context=context)
    while isinstance(magic, int) and magic == MAGIC and watch.pickles < _LEGACY:
        watch.pickles += 1
        load(file, _anything, context=context)


def _scan_zip(file: BinaryIO, context: Context, watch: _Watch) -> None:
    """Every record that is named as a pickle, each one of those that share a name."""
    with open_zip(file) as archive:
        names = [info.orig_filename for info in archive.infolist()]
        for info in archive.infolist():
            if not _is_pickle(info.orig_filename):
                continue
            watch.pickles += 1
            if watch.pickles > _MOST_PICKLES:
                raise PickleError(f"it holds more than {_MOST_PICKLES} pickles")
            if info.compress_type not in _METHODS:
                raise PickleError("its pickle is compressed in a way that torch doesn't know")
            info.CRC = None  # type: ignore[assignment]  # torch may leave it out
            with archive.open(info) as record:
                stream = cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, record)))
                load(stream, _anything, size=info.file_size, context=context)
        if any("/code/" in f"/{name}" for name in names):
            raise PickleError("it is a TorchScript archive: it holds a program, to be run")


def _is_pickle(name: str) -> bool:
    return name.lower().endswith((".pkl", ".pickle"))


def _has_pickles(path: str) -> bool:
    with open_file(path) as file:
        try:
            with open_zip(file) as archive:
                return any(_is_pickle(info.orig_filename) for info in archive.infolist())
        except zipfile.BadZipFile:
            return False
