"""The header of safetensors: accepted just where the library accepts it, but for what is listed."""

import json
import struct
from pathlib import Path
from typing import Any

import safetensors
from bounds import CHANGES, JSON, ends, examples, folder, mutated, write
from hypothesis import given
from hypothesis import strategies as st

from neox_bridge.errors import BridgeError
from neox_bridge.formats.safetensors import read_safetensors
from neox_bridge.tensors.dtypes import BY_SAFETENSORS

_FOLDER = folder()
_PATH = Path(_FOLDER.name) / "x.safetensors"
_SIZES = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4, "I64": 8, "BOOL": 1, "F8_E5M2": 1, "F4": 1}
# What the library reads and this reader doesn't, on purpose: its words for it.
_STRICTER = (
    "The model is quantized",  # dtypes that no conversion reads
    "does not know",  # element types of no model that is converted, F4 and others
    "more dimensions or bytes",  # sizes beside a zero that multiply to 2**63 and more
    "a name is used twice",  # the library takes the last
    "nested too deeply",  # in what isn't looked at
)


def _ours(path: str) -> tuple[dict[str, tuple[str, list[int], int]] | None, str]:
    with ends():
        try:
            found = read_safetensors(path)
        except BridgeError as error:
            return None, str(error)
    return {k: (r.dtype, list(r.shape), r.offset) for k, r in found.items()}, ""


def _theirs(raw: bytes) -> dict[str, tuple[str, list[int]]] | None:
    try:
        found = safetensors.deserialize(raw)
    except Exception:
        return None
    return {
        name: (BY_SAFETENSORS[info["dtype"]].name if info["dtype"] in BY_SAFETENSORS else "?",
               list(info["shape"]))
        for name, info in found
    }  # fmt: skip


def _compare(raw: bytes) -> None:
    ours, why = _ours(write(_PATH, raw))
    theirs = _theirs(raw)
    if ours is None:
        assert theirs is None or any(words in why for words in _STRICTER), why
    else:
        assert theirs is not None
        assert {name: (dtype, shape) for name, (dtype, shape, _) in ours.items()} == theirs


@st.composite
def _entries(draw: Any) -> tuple[dict[str, Any], int]:
    """A sound header of some tensors, and how many bytes they take."""
    end, header = 0, {}
    for name in draw(st.lists(st.text(max_size=5), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(_SIZES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = _SIZES[dtype]
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return header, end


_NUMBER = st.one_of(st.integers(-2, 20), st.sampled_from((2**31, 2**32, 2**62, 2**63, 2**64, 1.0)))


@given(_entries(), st.data())
@examples(800)
def test_headers(entries: tuple[dict[str, Any], int], data: st.DataObject) -> None:
    header, size = entries
    for name in list(header):
        what = data.draw(st.integers(0, 11))
        if what == 0:
            header[name]["shape"] = data.draw(st.lists(_NUMBER, max_size=4))
        elif what == 1:
            header[name]["data_offsets"] = data.draw(st.lists(_NUMBER, max_size=3))
        elif what == 2:
            key = data.draw(st.sampled_from(("dtype", "shape", "data_offsets", "more")))
            header[name][key] = data.draw(JSON)
        elif what == 3:
            header[name] = data.draw(JSON)
        elif what == 4:
            del header[name]["dtype"]
    if data.draw(st.integers(0, 3)) == 0:
        texts = st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2)
        header["__metadata__"] = data.draw(st.one_of(texts, JSON))
    size += data.draw(st.sampled_from((0, 0, 0, 0, 1, -1)))
    text = json.dumps(header).encode()
    text += b" " * data.draw(st.sampled_from((0, 3)))
    _compare(struct.pack("<Q", len(text)) + text + bytes(max(size, 0)))


def _sound() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "a.b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "é": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
    }
    text = json.dumps(header, ensure_ascii=False).encode()
    return struct.pack("<Q", len(text)) + text + bytes(40)


_SOUND = _sound()


@given(CHANGES, st.booleans())
@examples(800)
def test_damaged_files(changes: list[tuple[int, int]], header_only: bool) -> None:
    if header_only:  # with a length that stays right
        end = 8 + int.from_bytes(_SOUND[:8], "little")
        text = mutated(_SOUND[8:end], changes)
        _compare(struct.pack("<Q", len(text)) + text + _SOUND[end:])
    else:
        _compare(mutated(_SOUND, changes))
