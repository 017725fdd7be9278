"""The reader of torch's files, in both of their forms: damaged ones, and torch as the oracle."""

import io
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from bounds import CHANGES, ends, examples, folder, mutated, write
from hypothesis import given
from hypothesis import strategies as st

from neox_bridge.errors import BridgeError
from neox_bridge.formats.pickles import Record
from neox_bridge.formats.torch_file import read_torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from pt_files import tensor_of

_BASE = torch.arange(24, dtype=torch.float32)
_VALUES: tuple[Any, ...] = (
    {"a": _BASE[:5].clone(), "b": torch.ones(2, dtype=torch.bool)},
    {"views": [_BASE, _BASE[4:8], _BASE.view(4, 6).t()], "half": torch.ones(3).half()},
    {
        "module": OrderedDict(weight=_BASE[:6].view(3, 2).clone(), bias=_BASE[:3].clone()),
        "args": {"num_layers": 2, "x": None, "y": 1.5},
    },
    {"deep": [[({"t": torch.zeros(2, 2)},)]], "size": torch.Size([2, 3]), "text": "a" * 300},
)
_FOLDER = folder()
_PATH = Path(_FOLDER.name) / "x.pt"


def _saved(value: Any, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    if zipped:
        return buffer.getvalue()
    # the keys of its storages are addresses: others with every run
    keys: dict[bytes, bytes] = {}
    return re.sub(
        rb"X.\0\0\0\d{9,}",
        lambda match: keys.setdefault(match[0], b"X\x01\0\0\0%d" % len(keys)),
        buffer.getvalue(),
        flags=re.DOTALL,
    )


_ZIPS = tuple(_saved(value, True) for value in _VALUES)
_LEGACY = tuple(_saved(value, False) for value in _VALUES)
# What torch reads and this reader doesn't, on purpose: its words for it.
_STRICTER = (
    "different programs could read different contents",  # torch too, by the case of a name
    "compressed",  # can't be read in place
    "big-endian",
    "TorchScript",
    "a negative size or stride",  # torch counts a stride that no element needs
    "one stride for each dimension",  # of a tensor that torch makes later
    "reaches beyond",  # torch makes a storage larger where a tensor wants it
    "should have",  # a storage whose pickled size isn't that of its record
    "does not know",  # protocols, which torch doesn't look at
    "with two element types",
    "do not match its tensors",
    "doesn't know",  # element types
    "unlike any PyTorch file",  # the first pickle doesn't say its protocol
    "a persistent id does not",  # its last part may hold what torch doesn't look at
    "is missing",  # a storage that isn't there, whose memory torch leaves as it is
)


_LARGE = 10_000  # elements; a view of stride 0 may have any number of them


def _agree(ours: Any, theirs: Any) -> bool:
    """Whether a value is what torch reads, every tensor the same bits; what else torch makes is a
    record or a name here.
    """
    if isinstance(theirs, torch.Tensor):
        if isinstance(ours, Record):
            return True  # sizes or strides that are lists: inert, and never another tensor
        if ours.dtype != str(theirs.dtype).removeprefix("torch.") or ours.shape != theirs.shape:
            return False
        if theirs.numel() > _LARGE:
            return True
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8)
                for t in (tensor_of(ours), theirs)]  # fmt: skip
        return torch.equal(*bits)
    if isinstance(theirs, dict):
        same_keys = len(ours) == len(theirs) and all(map(_agree, ours, theirs))
        return same_keys and all(map(_agree, ours.values(), theirs.values()))
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(_agree, ours, theirs))
    if isinstance(theirs, set):
        return len(ours) == len(theirs)
    if theirs is None or isinstance(theirs, bool | int | float | str | bytes | bytearray):
        return type(ours) is type(theirs) and repr(ours) == repr(theirs)
    return not isinstance(ours, bool | int | float | str | bytes | list | tuple | dict | set)


def _check(path: str) -> None:
    with ends(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in Python 2's strings
        try:
            ours: Any = read_torch(path)
        except BridgeError as error:
            ours, why = None, str(error)
        else:
            why = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = torch.load(path, weights_only=True)
    except Exception:
        return  # torch has said nothing
    if why:
        assert any(words in why for words in _STRICTER), why
    else:
        assert _agree(ours, theirs)


@given(st.sampled_from(_ZIPS), CHANGES)
@examples(300)
def test_damaged_zips(raw: bytes, changes: list[tuple[int, int]]) -> None:
    _check(write(_PATH, mutated(raw, changes)))


@given(st.sampled_from(_ZIPS), CHANGES, st.integers(0, 20))
@examples(300)
def test_zips_with_a_damaged_record(raw: bytes, changes: list[tuple[int, int]], which: int) -> None:
    """Sound zips, so that the damage gets to the pickle or to what stands beside it."""
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(_PATH, "w") as new:
        names = old.namelist()
        damaged = names[which % len(names)] if which < 5 else "archive/data.pkl"
        for name in names:
            data = old.read(name)
            new.writestr(name, mutated(data, changes) if name == damaged else data)
    _check(str(_PATH))


@given(st.sampled_from(_LEGACY), CHANGES)
@examples(300)
def test_damaged_legacy_files(raw: bytes, changes: list[tuple[int, int]]) -> None:
    _check(write(_PATH, mutated(raw, changes)))
