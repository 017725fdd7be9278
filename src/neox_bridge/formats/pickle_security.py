"""Reports what the pickles in a file would import, call and change when they are loaded.

``torch.load`` and ``pickle.load`` would do so. Here the usual reader reads the pickles, so nothing
is imported or called. If it stops before the end of a pickle, the report says so.
"""

import io
import pickletools
import zlib
from dataclasses import dataclass, field
from typing import BinaryIO, Literal, cast

from neox_bridge.errors import BridgeError
from neox_bridge.formats.file_kinds import HEAD_BYTES, misplaced
from neox_bridge.formats.pickle_folds import Context, Watcher
from neox_bridge.formats.pickle_names import calls_of, is_known
from neox_bridge.formats.pickles import Global, PickleError, Record, load
from neox_bridge.formats.safetensors import read_safetensors
from neox_bridge.formats.tar import TAR_HEADER_BYTES, is_tar
from neox_bridge.formats.torch_legacy import MAGIC
from neox_bridge.formats.zip_directory import (
    DEFLATED,
    STORED,
    NoDirectory,
    ZipError,
    data_places,
    folded,
    read_directory,
)
from neox_bridge.stores.paths import open_file

Container = Literal["zip", "stream", "safetensors", "none"]
_LEGACY = 5  # pickles of a file from before PyTorch 1.6, all of which torch.load runs
_MOST_PICKLES = 50  # in one zip
_MOST_NAMES = 5_000  # in one file
_OPCODES = frozenset(opcode.code.encode("latin-1") for opcode in pickletools.opcodes)
_START_BYTES = 64 << 10
_NAMING = frozenset(
    """GLOBAL STACK_GLOBAL INST OBJ REDUCE NEWOBJ NEWOBJ_EX BUILD EXT1 EXT2 EXT4 PERSID BINPERSID
    STOP""".split()
)


@dataclass(slots=True)
class Use:
    """What would happen to a class or function.

    Attributes:
        called: How often it would be called.
        changed: How many of its own attributes or items would be set, which alters a library.
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
    """The report of one file.

    Attributes:
        uses: What would be used, in the order of the first use.
        problem: Why the report is incomplete; "" if it is complete.
        absent: What the file is if its weights are elsewhere, such as a Git LFS pointer, and how to
            fetch them. What they would run is unknown.
    """

    path: str
    container: Container
    pickles: int
    uses: tuple[Use, ...] = ()
    problem: str = ""
    absent: str = ""

    @property
    def harmless(self) -> bool:
        """Whether loading the file only builds values."""
        return not self.problem and not self.absent and all(use.harmless for use in self.uses)


@dataclass(slots=True)
class _Watch(Watcher):
    pickles: int = 0
    problem: str = ""
    uses: dict[Global | str, Use] = field(default_factory=dict)

    def named(self, value: Global) -> None:
        self._use(value).imported += 1

    def called(self, factory: object, args: object) -> None:
        self._use(factory).called += 1
        for argument in calls_of(factory, args):
            self._use(argument).called += 1

    def changed(self, target: Global) -> None:
        self._use(target).changed += 1

    def _use(self, value: object) -> Use:
        key: Global | str = value if isinstance(value, Global) else _described(value)
        if key not in self.uses:
            if len(self.uses) >= _MOST_NAMES:
                raise PickleError(
                    f"the pickle names more than {_MOST_NAMES:,} classes and functions"
                )
            if isinstance(key, Global):
                use = Use(f"{key.module}.{key.name}"[:200], is_known(key))
            else:
                use = Use(key, known=False)
            self.uses[key] = use
        return self.uses[key]


def _described(factory: object) -> str:
    """Words for what is called if it is not a name, such as the result of another call."""
    maker = factory.factory if isinstance(factory, Record) else None
    if isinstance(maker, Global):
        return f"what {maker.module}.{maker.name}"[:200] + " returns"
    return "what another call returns" if isinstance(factory, Record) else "a value"


def is_candidate(path: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a file may contain pickles, by its suffix or its first bytes."""
    if path.endswith(suffixes):
        return True
    with open_file(path) as file:
        head = file.read(TAR_HEADER_BYTES)
    if path.endswith(".safetensors"):
        kind = misplaced(path, head[:HEAD_BYTES])
        if kind is not None and kind.missing:
            return True
    if is_tar(head):
        return True
    if head.startswith(b"PK"):
        return _has_pickles(path)
    return len(head) > 1 and head[0] == 0x80 and head[1] <= 5


def scan(path: str) -> Report:
    """The report of one file, within bounds. Raises BridgeError if it cannot be read."""
    with open_file(path) as file:
        head = file.read(TAR_HEADER_BYTES)
        file.seek(0)
        if is_tar(head):
            return Report(
                path, "none", 0, problem="it is a tar archive, whose pickles are not checked"
            )
        container: Container = "zip" if head.startswith(b"PK") else "stream"
        if head[:1] not in _OPCODES and container == "stream":
            if (kind := misplaced(path, head)) is not None and kind.missing:
                return Report(path, "none", 0, absent=f"{kind.what}. {kind.way_out}")
            return Report(path, "safetensors" if _is_safetensors(path) else "none", 0)
        context = Context(lambda tensor: tensor)
        context.watch = watch = _Watch()
        try:
            (_scan_zip if container == "zip" else _scan_stream)(file, context, watch)
        except PickleError as error:
            watch.problem = str(error)
        except ZipError as error:
            watch.problem = f"{error}, so different programs could read different contents from it"
        except zlib.error as error:
            watch.problem = f"its zip is damaged: {str(error)[:100]}"
    stopped = watch.problem and not watch.uses
    if stopped and _is_safetensors(path) and (path.endswith(".safetensors") or _is_inert(path)):
        return Report(path, "safetensors", 0)
    return Report(path, container, watch.pickles, tuple(watch.uses.values()), watch.problem)


def _is_safetensors(path: str) -> bool:
    """Whether a file is a complete safetensors file. Other readers may also read it as a pickle."""
    try:
        read_safetensors(path)
    except BridgeError:
        return False
    return True


def _is_inert(path: str) -> bool:
    """Whether every unpickler stops at an unknown opcode before it can import anything."""
    with open_file(path) as file:
        start = file.read(_START_BYTES)
    try:
        for opcode, _, _ in pickletools.genops(start):
            if opcode.name in _NAMING:
                return False
    except ValueError as error:
        return "unknown" in str(error)
    return False


def _anything(_pid: object) -> object:
    """A storage in place of any persistent id."""
    return None


def _scan_stream(file: BinaryIO, context: Context, watch: _Watch) -> None:
    """Scan one pickle, or all of PyTorch's old format if the first is its magic number."""
    watch.pickles = 1
    magic = load(file, _anything, context=context)
    while isinstance(magic, int) and magic == MAGIC and watch.pickles < _LEGACY:
        watch.pickles += 1
        load(file, _anything, context=context)
    try:
        read_directory(file)
    except NoDirectory:
        return
    except ZipError:
        pass
    raise PickleError("a zip archive follows its pickle, and other programs read that instead")


def _scan_zip(file: BinaryIO, context: Context, watch: _Watch) -> None:
    """Scan every record with the name of a pickle."""
    entries, end = read_directory(file)
    for entry, start in zip(entries, data_places(file, entries, end), strict=True):
        if not _is_pickle(entry.name):
            continue
        watch.pickles += 1
        if watch.pickles > _MOST_PICKLES:
            raise PickleError(f"it holds more than {_MOST_PICKLES} pickles")
        if entry.method not in (STORED, DEFLATED):
            raise PickleError("its pickle uses a compression that PyTorch does not know")
        file.seek(start)
        packed = io.BufferedReader(_Inflated(file, entry.packed))
        stream = file if entry.method == STORED else cast(BinaryIO, packed)
        load(stream, _anything, size=entry.size, context=context)
    if any("/code/" in f"/{folded(entry.name)}" for entry in entries):
        raise PickleError("it is a TorchScript archive: it contains a program that loading runs")


class _Inflated(io.RawIOBase):
    """A compressed record as a stream of its unpacked bytes."""

    def __init__(self, file: BinaryIO, packed: int) -> None:
        self.file, self.left, self.waiting = file, packed, b""
        self.inflate = zlib.decompressobj(-zlib.MAX_WBITS)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        data = b""
        while not data and not self.inflate.eof and (self.waiting or self.left):
            if not self.waiting:
                self.waiting = self.file.read(min(self.left, io.DEFAULT_BUFFER_SIZE))
                self.left = self.left - len(self.waiting) if self.waiting else 0
            data = self.inflate.decompress(self.waiting, len(buffer))
            self.waiting = self.inflate.unconsumed_tail
        buffer[: len(data)] = data
        return len(data)


def _is_pickle(name: str) -> bool:
    return name.lower().endswith((".pkl", ".pickle"))


def _has_pickles(path: str) -> bool:
    """Whether a zip may contain a pickle. That is so if readers disagree about its contents."""
    with open_file(path) as file:
        try:
            entries, _ = read_directory(file)
        except NoDirectory:
            return False
        except ZipError:
            return True
        return any(_is_pickle(entry.name) for entry in entries)
