"""Hugging Face files whose tensors are not the weights of the table.

Some contain several weights (``Architecture.joined``), some have other rows of q and k
(``Architecture.paired``), some are transposed (``Weight.transposed``), and some start at another
row (``Weight.first_row``).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import mul

from neox_bridge.architectures.base import Architecture, ModelConfig
from neox_bridge.errors import BridgeError
from neox_bridge.tensors.dtypes import itemsize
from neox_bridge.tensors.fused import Fusion, Part, RowSpan
from neox_bridge.tensors.pieces import Piece, Whole, cut, transposed
from neox_bridge.tensors.tensor_ref import TensorRef, row_major

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
    flipped, first_rows = _transposed(architecture), _first_rows(architecture)
    if not flipped and not first_rows and not architecture.joined:
        return dict(stored)
    weights: dict[str, Whole] = {}
    for name, whole in stored.items():
        if _pattern(name)[0] in flipped:
            whole = transposed(whole)
        parts = _parts(architecture, name)
        if not parts:
            weights[name] = _starting_at(first_rows.get(name, 0), whole)
            continue
        rows, *rest = whole.shape or (0,)
        counts = [fusion.part_rows(part, rows) for part in parts.values()]
        if sum(counts) != rows or 0 in counts:
            raise BridgeError(
                f"{path}: {name} has the shape {list(stored[name].shape)}. Its rows cannot be "
                f"split into {', '.join(parts.values())} of {heads} heads and {kv_heads} "
                "key-value heads. config.json belongs to another model."
            )
        first = 0
        for part, count in zip(parts, counts, strict=True):
            zeros = (0,) * len(rest)
            pieces = tuple(
                piece
                for run in _runs(architecture, fusion, parts[part], first, count)
                for piece in cut(whole, (run.fused, *zeros), (run.rows, *rest), (run.part, *zeros))
            )
            weights[part] = Whole(whole.dtype, (count, *rest), pieces)
            first += count
    return weights


def halves_of_pairs(
    architecture: Architecture, config: ModelConfig, weights: Mapping[str, Whole]
) -> dict[str, Whole]:
    """The weights of a model, with the rows of q and k in the order of GPT-NeoX."""
    return _reordered(architecture, config, weights, to_pairs=False)


def from_stored(
    architecture: Architecture, config: ModelConfig, stored: Mapping[str, Whole], path: str
) -> dict[str, Whole]:
    """The weights of a model with this config, from the tensors of Hugging Face files.

    path: what messages name. Raises BridgeError as ``split_joined`` does.
    """
    heads, kv_heads = config.heads, config.key_value_heads
    weights = split_joined(architecture, stored, heads, kv_heads, path)
    return halves_of_pairs(architecture, config, weights)


def to_stored(
    architecture: Architecture, config: ModelConfig, weights: Mapping[str, Whole]
) -> dict[str, Whole]:
    """The tensors of Hugging Face files, from the weights of a model."""
    weights = _reordered(architecture, config, weights, to_pairs=True)
    fusion = Fusion(config.heads, config.key_value_heads, "grouped")
    stored: dict[str, Whole] = {}
    flipped, first_rows = _transposed(architecture), _first_rows(architecture)
    if not flipped and not first_rows and not architecture.joined:
        return dict(weights)
    for name, whole in weights.items():
        joined = stored_name(architecture, name)
        if joined == name:
            stored[name] = _starting_at(-first_rows.get(name, 0), whole)
        elif joined not in stored:
            parts = _parts(architecture, joined)
            stored[joined] = _joined(
                architecture, fusion, [(kind, weights[part]) for part, kind in parts.items()]
            )
    return {
        name: transposed(whole) if _pattern(name)[0] in flipped else whole
        for name, whole in stored.items()
    }


def stored_name(architecture: Architecture, name: str) -> str:
    """The name of the tensor of Hugging Face files that contains a weight."""
    pattern, block = _pattern(name)
    joined = architecture.joined_name(pattern)
    return name if joined == pattern else joined.format(i=block)


def _transposed(architecture: Architecture) -> set[str]:
    """The patterns of the names of tensors that are transposed in Hugging Face files."""
    return {architecture.joined_name(w.hf) for w in architecture.weights if w.transposed}


def _first_rows(architecture: Architecture) -> dict[str, int]:
    """The first rows of the weights outside the blocks that start at another one in files."""
    return {w.hf: w.first_row for w in architecture.weights if w.first_row}


def _starting_at(row: int, whole: Whole) -> Whole:
    """The tensor with its rows moved up, so that it starts at one of them. row: may be negative."""
    if not row or not whole.shape or whole.shape[0] < abs(row):
        return whole
    rows, *rest = whole.shape
    zeros = (0,) * len(rest)
    above = row % rows
    below = rows - above
    pieces = (
        *cut(whole, (above, *zeros), (below, *rest), (0, *zeros)),
        *cut(whole, (0, *zeros), (above, *rest), (below, *zeros)),
    )
    return replace(whole, pieces=pieces, shards=(), parts=())


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


def _reordered(
    architecture: Architecture,
    config: ModelConfig,
    weights: Mapping[str, Whole],
    to_pairs: bool,
) -> dict[str, Whole]:
    """The weights with the rotated rows of q and k in another order."""
    reordered = dict(weights)
    for name, whole in weights.items() if architecture.paired else ():
        if _pattern(name)[0] in architecture.paired:
            rows = config.dims["q"] // config.heads
            rotated = int(rows * config.rotary_pct)
            reordered[name] = _with_rotated_rows(whole, rows, rotated, to_pairs)
    return reordered


def _with_rotated_rows(whole: Whole, rows: int, rotated: int, to_pairs: bool) -> Whole:
    """The tensor with the first ``rotated`` of the ``rows`` rows of each head in another order."""
    rest = whole.shape[1:]
    zeros = (0,) * len(rest)
    pieces: list[Piece] = []
    for first in range(0, whole.shape[0], rows or 1):
        head = cut(whole, (first, *zeros), (rows, *rest), (0, *zeros))
        turned = Whole(whole.dtype, (rows, *rest), head)
        if len(head) == 1 and head[0].source is not None and not to_pairs:
            pieces += (_every_second_row(head[0], odd, first, rotated) for odd in (0, 1))
        else:
            order = [*range(0, rotated, 2), *range(1, rotated, 2)]  # the row in pairs of each
            for half, pair in enumerate(order):
                row, to = (half, pair) if to_pairs else (pair, half)
                pieces += cut(turned, (row, *zeros), (1, *rest), (first + to, *zeros))
        if rotated < rows:
            shape = (rows - rotated, *rest)
            pieces += cut(turned, (rotated, *zeros), shape, (first + rotated, *zeros))
    return Whole(whole.dtype, whole.shape, tuple(pieces))


def _every_second_row(head: Piece, odd: int, first: int, rotated: int) -> Piece:
    """The even or odd rotated rows of a head, as one strided piece.

    first: the row of the model at which the head starts.
    """
    ref = head.source
    assert ref is not None
    strides = ref.strides or row_major(ref.shape)
    elements = sum(map(mul, head.start, strides)) + odd * strides[0]
    view = TensorRef(
        ref.file,
        ref.offset + elements * itemsize(ref.dtype),
        ref.dtype,
        ((rotated + 1 - odd) // 2, *head.shape[1:]),
        (2 * strides[0], *strides[1:]),
    )
    zeros = (0,) * len(view.shape)
    to = (first + odd * ((rotated + 1) // 2), *zeros[1:])
    return Piece(view, zeros, to, view.shape, head.fill, head.scale)


def _runs(
    architecture: Architecture, fusion: Fusion, part: Part, first: int, rows: int
) -> tuple[RowSpan, ...]:
    """Where the rows of a part are in a joined tensor. first: the rows of the parts before it."""
    if architecture.joined_by_heads:
        return fusion.runs(part, rows, 1)
    return (RowSpan(first, 0, rows),)


def _joined(
    architecture: Architecture, fusion: Fusion, parts: Sequence[tuple[Part, Whole]]
) -> Whole:
    """The rows of several tensors as one tensor, of the widest of their dtypes."""
    first, rest = 0, parts[0][1].shape[1:]
    zeros = (0,) * len(rest)
    pieces: list[Piece] = []
    for kind, part in parts:
        rows = part.shape[0]
        for run in _runs(architecture, fusion, kind, first, rows):
            pieces += cut(part, (run.part, *zeros), (run.rows, *rest), (run.fused, *zeros))
        first += rows
    dtype = max((part.dtype for _, part in parts), key=itemsize)
    return Whole(dtype, (first, *rest), tuple(pieces))
