"""Reads and writes headers of safetensors files.

Format: 8 bytes little-endian length N, N bytes of JSON, then the data, indexed without holes
(https://github.com/huggingface/safetensors, README "Format").
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from neox_bridge.errors import BridgeError, Refused
from neox_bridge.formats.bounded_json import parse_json
from neox_bridge.formats.file_kinds import HEAD_BYTES, refuse_misplaced
from neox_bridge.stores.paths import open_file, size_of
from neox_bridge.tensors.dtypes import BY_NAME, BY_SAFETENSORS, PACKED_SAFETENSORS
from neox_bridge.tensors.pieces import OutputFile, OutputTensor
from neox_bridge.tensors.sharing import BLOCK_BYTES
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.wording import plural

_MAX_HEADER_BYTES = 32 << 20  # the library accepts 100 MB; headers of models have less than 1 MB
_MAX_DIMENSIONS = 64
_DTYPE_CHARACTERS = 20  # the longest name that the library knows has 11
_MAX_BYTES = 2**63


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file, as its header describes it.

    Attributes:
        dtype: The name in the file. This version may not know it.
        shape: The shape, in elements.
        offset: Bytes from the start of the file to the first element.
        nbytes: The bytes of all elements.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_safetensors(path: str) -> dict[str, TensorRef]:
    """The tensors of a file by name.

    Raises BridgeError, which names the file, if it is damaged, and Refused if a dtype is not
    known or is smaller than a byte.
    """
    return {name: _ref(path, name, entry) for name, entry in read_entries(path).items()}


def read_entries(path: str) -> dict[str, Entry]:
    """What the header of a file describes, by name. Dtypes are not interpreted.

    Raises BridgeError, which names the file, if it is damaged.
    """
    with open_file(path) as file:
        size = size_of(file)
        start_bytes = file.read(8)
        length = int.from_bytes(start_bytes, "little")
        if size < 8 or length > size - 8 or length > _MAX_HEADER_BYTES:
            refuse_misplaced(path, start_bytes + file.read(HEAD_BYTES - 8))
        if not size:
            raise _bad(path, "it is empty")
        if size < 8 or length > size - 8:
            raise _bad(
                path, f"it has {plural(size, 'byte')}, fewer than its header announces (truncated?)"
            )
        if length > _MAX_HEADER_BYTES:
            raise _bad(
                path, f"its header has {length} bytes, more than the allowed {_MAX_HEADER_BYTES}"
            )
        raw = file.read(length)
    header = _header(path, raw)
    start = 8 + length
    entries = {
        name: _entry(path, name, entry, start)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _check_spans(path, list(entries.items()), start, size)
    return entries


def _header(path: str, raw: bytes) -> dict[str, object]:
    if not raw:
        raise _bad(path, "it starts with zeros, like an unfinished download")
    if not raw.startswith(b"{"):
        raise _bad(path, "its header does not start with {")
    try:
        header = parse_json(raw, None, _unique, _no_number)
    except ValueError as error:
        raise _bad(
            path, f"its header is not valid JSON with unique names ({str(error)[:80]})"
        ) from None
    metadata = header.get("__metadata__")
    texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not texts and metadata is not None:
        raise _bad(path, "its __metadata__ does not map strings to strings")
    entries: dict[str, object] = header
    return entries


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name is used twice")
    return entries


def _no_number(text: str) -> object:
    raise ValueError(f"{text} is not a JSON number")


def _entry(path: str, name: str, entry: object, start: int) -> Entry:
    try:
        assert isinstance(entry, dict)
        dtype, shape, (low, high) = entry["dtype"], entry["shape"], entry["data_offsets"]
        assert isinstance(dtype, str)
        assert dtype.isprintable()
        assert len(dtype) <= _DTYPE_CHARACTERS
        assert isinstance(shape, list)
        assert all(type(n) is int and n >= 0 for n in (*shape, low, high))
    except (AssertionError, KeyError, TypeError, ValueError):
        raise _bad(
            path, f"its entry for {name} does not consist of dtype, shape and data_offsets"
        ) from None
    bits = PACKED_SAFETENSORS[dtype].bits if dtype in PACKED_SAFETENSORS else None
    if dtype in BY_SAFETENSORS:
        bits = 8 * BY_SAFETENSORS[dtype].itemsize
    # also if one size is 0, because other programs multiply the others
    if len(shape) > _MAX_DIMENSIONS or prod(n or 1 for n in shape) * (bits or 8) >= 8 * _MAX_BYTES:
        raise _bad(path, f"{name} claims more dimensions or bytes than any tensor has")
    if high < low or (bits is not None and 8 * (high - low) != prod(shape) * bits):
        raise _bad(
            path, f"{name} has {plural(high - low, 'byte')}, which does not match its shape {shape}"
        )
    return Entry(dtype, tuple(shape), start + low, high - low)


def _ref(path: str, name: str, entry: Entry) -> TensorRef:
    if packed := PACKED_SAFETENSORS.get(entry.dtype):
        raise Refused(
            f"{path}: {name} has the dtype {entry.dtype}, {packed.name}. The model is "
            "quantized, so it contains no weights that could be converted. Convert the "
            "original, unquantized model instead."
        )
    if entry.dtype not in BY_SAFETENSORS:
        raise Refused(
            f"{path}: {name} has the dtype {entry.dtype!r}, which this version does not know. "
            "It cannot be converted. `neox-bridge inspect` shows the tensors."
        )
    return TensorRef(path, entry.offset, BY_SAFETENSORS[entry.dtype].name, entry.shape)


def _check_spans(path: str, entries: list[tuple[str, Entry]], end: int, size: int) -> None:
    for name, entry in sorted(entries, key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise _bad(path, f"{name} overlaps another tensor or leaves a gap before it")
        end = entry.offset + entry.nbytes
    if end != size:
        raise _bad(path, f"it has {size} bytes, but its header describes {end} (truncated?)")


def _bad(path: str, what: str) -> BridgeError:
    return BridgeError(
        f"{path} is not a complete safetensors file: {what}. Download or copy it again."
    )


def layout_safetensors(
    path: str, tensors: Sequence[OutputTensor], first: int | None = None
) -> OutputFile:
    """Lay out a file of these tensors, in their order.

    Spaces pad the header so that the data starts at a multiple of 8 bytes, or at ``first`` modulo
    4096 bytes (see ``planning.sharing``).
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": BY_NAME[tensor.dtype].safetensors,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * ((-len(text) % 8) if first is None else (first - 8 - len(text)) % BLOCK_BYTES)
    offset = start = 8 + len(text)
    placed = []
    for tensor in tensors:
        placed.append(tensor.at(offset))
        offset += tensor.nbytes
    literal = len(text).to_bytes(8, "little") + text
    return OutputFile(path, start + end, ((0, literal),), tuple(placed))
