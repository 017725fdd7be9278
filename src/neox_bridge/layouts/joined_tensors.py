"""Tensors of Hugging Face files that contain several weights; see ``Architecture.joined``."""

import re
from collections.abc import Mapping, Sequence

from neox_bridge.architectures.base import Architecture
from neox_bridge.errors import BridgeError
from neox_bridge.tensors.dtypes import itemsize
from neox_bridge.tensors.fused import Fusion, Part
from neox_bridge.tensors.pieces import Piece, Whole, cut

_BLOCK = re.compile(r"\.(\d+)\.")


def split_joined(
    architecture: Architecture, stored: Mapping[str, Whole], heads: int, kv_heads: int, path: str
) -> dict[str, Whole]:
    """The weights of a model, from the tensors of Hugging Face files.

    Args:
        architecture: The family.
        stored: The tensors by their names in the files.
        heads: The query heads.
        kv_heads: The key-value heads.
        path: What messages name.

    Raises:
        BridgeError: The rows of a tensor are not those of its weights.
    """
    fusion = Fusion(heads, kv_heads, "grouped")
    weights: dict[str, Whole] = {}
    for name, whole in stored.items():
        parts = _parts(architecture, name)
        if not parts:
            weights[name] = whole
            continue
        rows, *rest = whole.shape or (0,)
        counts = [fusion.part_rows(part, rows) for part in parts.values()]
        if sum(counts) != rows or 0 in counts:
            raise BridgeError(
                f"{path}: {name} has the shape {list(whole.shape)}. Its rows cannot be split into "
                f"{', '.join(parts.values())} of {heads} heads and {kv_heads} key-value heads. "
                "config.json belongs to another model."
            )
        first = 0
        for part, count in zip(parts, counts, strict=True):
            shape, zeros = (count, *rest), (0,) * len(rest)
            weights[part] = Whole(
                whole.dtype, shape, cut(whole, (first, *zeros), shape, (0, *zeros))
            )
            first += count
    return weights


def join(architecture: Architecture, weights: Mapping[str, Whole]) -> dict[str, Whole]:
    """The tensors of Hugging Face files, from the weights of a model."""
    stored: dict[str, Whole] = {}
    for name, whole in weights.items():
        joined = stored_name(architecture, name)
        if joined == name:
            stored[name] = whole
        elif joined not in stored:
            stored[joined] = _joined([weights[part] for part in _parts(architecture, joined)])
    return stored


def stored_name(architecture: Architecture, name: str) -> str:
    """The name of the tensor of Hugging Face files that contains a weight."""
    pattern, block = _pattern(name)
    joined = architecture.joined_name(pattern)
    return name if joined == pattern else joined.format(i=block)


def _parts(architecture: Architecture, name: str) -> dict[str, Part]:
    """The weights in a tensor, by name; {} if it is one weight."""
    pattern, block = _pattern(name)
    names = architecture.joined.get(pattern, ())
    kinds = {w.hf: w.part for w in architecture.weights if w.hf in names} if names else {}
    return {part.format(i=block): kinds[part] for part in names}


def _pattern(name: str) -> tuple[str, str]:
    """A name with ``{i}`` for the number of its block, and that number."""
    match = _BLOCK.search(name)
    return (name, "") if match is None else (_BLOCK.sub(".{i}.", name, count=1), match[1])


def _joined(parts: Sequence[Whole]) -> Whole:
    """The rows of several tensors as one tensor, of the widest of their dtypes."""
    first, rest = 0, parts[0].shape[1:]
    zeros = (0,) * len(rest)
    pieces: list[Piece] = []
    for part in parts:
        pieces += cut(part, (0, *zeros), part.shape, (first, *zeros))
        first += part.shape[0]
    dtype = max((part.dtype for part in parts), key=itemsize)
    return Whole(dtype, (first, *rest), tuple(pieces))
