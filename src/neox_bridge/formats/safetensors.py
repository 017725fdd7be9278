"""The safetensors container: its header read into references, and a header for tensors to come.

Format: 8 bytes little-endian length N, N bytes of JSON, then the data, indexed without holes
(https://github.com/huggingface/safetensors, README "Format").
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from math import prod

from neox_bridge.errors import BridgeError
from neox_bridge.formats.dtypes import BY_NAME, BY_SAFETENSORS
from neox_bridge.formats.tensor_ref import TensorRef
from neox_bridge.planning.pieces import OutputFile, OutputTensor
from neox_bridge.planning.sharing import BLOCK

_MAX_HEADER = 100_000_000


def read_safetensors(path: str) -> dict[str, TensorRef]:
    """The tensors of a file by name. Raises BridgeError, naming the file, for a damaged one."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _bad(path, f"it is {size} bytes long, shorter than its header says (truncated?)")
        if length > _MAX_HEADER:
            raise _bad(path, f"its header is {length} bytes long, and {_MAX_HEADER} are allowed")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise _bad(path, f"its header isn't JSON with unique names ({str(error)[:80]})") from None
    if not isinstance(header, dict):
        raise _bad(path, "its header isn't a JSON object")
    start = 8 + length
    tensors = {
        name: _entry(path, name, entry, start)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _check_spans(path, list(tensors.items()), start, size)
    return tensors


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _entry(path: str, name: str, entry: object, start: int) -> TensorRef:
    try:
        assert isinstance(entry, dict)
        dtype, shape, (low, high) = entry["dtype"], entry["shape"], entry["data_offsets"]
        assert all(type(n) is int and n >= 0 for n in (*shape, low, high))
    except (AssertionError, KeyError, TypeError, ValueError):
        raise _bad(path, f"its entry for {name} isn't {{dtype, shape, data_offsets}}") from None
    if dtype not in BY_SAFETENSORS:
        raise _bad(path, f"{name} has the dtype {dtype!r}, which isn't known here")
    kind = BY_SAFETENSORS[dtype]
    if high - low != prod(shape) * kind.itemsize:
        raise _bad(path, f"{name} has {high - low} bytes, and its shape {shape} takes other many")
    return TensorRef(path, start + low, kind.name, tuple(shape))


def _check_spans(path: str, tensors: list[tuple[str, TensorRef]], end: int, size: int) -> None:
    for name, ref in sorted(tensors, key=lambda item: (item[1].offset, item[1].nbytes)):
        if ref.offset != end:
            raise _bad(path, f"{name} overlaps another tensor or leaves a hole before it")
        end = ref.offset + ref.nbytes
    if end != size:
        raise _bad(path, f"it is {size} bytes long, and its header says {end} (truncated?)")


def _bad(path: str, what: str) -> BridgeError:
    return BridgeError(f"{path} isn't a whole safetensors file: {what}. Download or copy it again.")


def layout_safetensors(
    path: str, tensors: Sequence[OutputTensor], first: int | None = None
) -> OutputFile:
    """A file of these tensors, in their order, with every offset known.

    The header is padded with spaces so that the data starts at a multiple of 8 bytes, or where
    ``first`` says, in bytes modulo 4096 (see ``planning.sharing``).
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
    text += b" " * ((-len(text) % 8) if first is None else (first - 8 - len(text)) % BLOCK)
    offset = start = 8 + len(text)
    placed = []
    for tensor in tensors:
        placed.append(replace(tensor, offset=offset))
        offset += tensor.nbytes
    literal = len(text).to_bytes(8, "little") + text
    return OutputFile(path, start + end, ((0, literal),), tuple(placed))
