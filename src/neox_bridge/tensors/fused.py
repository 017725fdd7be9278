"""The rows of q, k and v, or of up and gate, in a rank's fused tensor.

Both directions use the same description: a ``RowSpan`` has a position in the fused tensor of a rank
and one in the rank's share of a part. Only rows move, so a bias is the case of one dimension.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from neox_bridge.tensors.pieces import OutputTensor, Piece, Shape, Whole, cut
from neox_bridge.tensors.tensor_ref import TensorRef

GqaOrder = Literal["grouped", "interleaved"]


Part = Literal["", "q", "k", "v", "up", "gate"]


@dataclass(frozen=True, slots=True)
class RowSpan:
    """Adjacent rows of a part.

    Attributes:
        fused: The first row in the fused tensor of a rank.
        part: The first row in the rank's share of the part.
        rows: The number of rows.
    """

    fused: int
    part: int
    rows: int


@dataclass(frozen=True, slots=True)
class Fusion:
    """The facts that decide the order of the rows.

    Attributes:
        heads: The number of query heads of the model.
        kv_heads: The number of key-value heads of the model.
        order: The order of the rows. It matters only for grouped-query attention.
        te: The modules of Transformer Engine, "attention" or "mlp", which have another order.
    """

    heads: int
    kv_heads: int
    order: GqaOrder
    te: frozenset[str] = frozenset()

    def part_rows(self, part: Part, fused: int) -> int:
        """The number of rows of this part in a fused tensor. fused: all rows of it."""
        if part in ("up", "gate"):
            return fused // 2
        heads = self.heads if part == "q" else self.kv_heads
        return fused * heads // (self.heads + 2 * self.kv_heads)

    def runs(self, part: Part, rows: int, tp: int) -> tuple[RowSpan, ...]:
        """The adjacent rows of a part that has this many rows on one of ``tp`` ranks.

        Orders of GPT-NeoX (megatron/model/transformer.py):

        - gated MLP: [up | gate] (Gated_Activation)
        - full attention: [q k v] for each head
        - grouped-query attention since neox-gqa-order: [all q | all k | all v]
        - grouped-query attention before: [q | slice of k | slice of v] for each query head. All
          slices together are all of k and v (ParallelSelfAttention.forward, gqa_project).

        Orders of Transformer Engine 1.12:

        - gated MLP: [gate | up] (common/util/vectorized_pointwise.h, gated_act_kernel)
        - attention: [its query heads | k | v] for each key-value head (attention.py,
          qkv_weight_interleaved)
        """
        if part in ("up", "gate"):
            first = "gate" if "mlp" in self.te else "up"
            return (RowSpan(0 if part == first else rows, 0, rows),)
        heads, kv_heads = self.heads // tp, self.kv_heads // tp
        width = rows // (heads if part == "q" else kv_heads)
        if "attention" in self.te:
            shared = heads // kv_heads * width
            size = shared if part == "q" else width
            at = {"q": 0, "k": shared, "v": shared + width}[part]
            step = shared + 2 * width
            return tuple(RowSpan(at + n * step, n * size, size) for n in range(kv_heads))
        if self.order == "grouped" and heads != kv_heads:
            starts = {"q": 0, "k": heads * width, "v": (heads + kv_heads) * width}
            return (RowSpan(starts[part], 0, rows),)
        piece = width * kv_heads // heads
        size = width if part == "q" else piece
        begin = {"q": 0, "k": width, "v": width + piece}[part]
        step = width + 2 * piece
        return tuple(RowSpan(begin + head * step, head * size, size) for head in range(heads))


def gather_part(fusion: Fusion, part: Part, shards: Sequence[TensorRef]) -> Whole:
    """One part as a tensor of the model. shards: the fused tensor of each rank."""
    fused, *rest = shards[0].shape
    rows, tp = fusion.part_rows(part, fused), len(shards)
    zero = (0,) * len(rest)
    pieces = tuple(
        Piece(ref, (run.fused, *zero), (rank * rows + run.part, *zero), (run.rows, *rest))
        for rank, ref in enumerate(shards)
        for run in fusion.runs(part, rows, tp)
    )
    # without shards, because the tensors of the source contain more than this part
    return Whole(shards[0].dtype, (rows * tp, *rest), pieces)


def gather_again(fusion: Fusion, part: Part, whole: Whole) -> Whole:
    """A gathered part, read again in the order of another fusion."""
    shards = dict.fromkeys(piece.source for piece in whole.pieces if piece.source is not None)
    return gather_part(fusion, part, tuple(shards))


def scatter_parts(
    name: str, fusion: Fusion, parts: Mapping[Part, Whole], tp: int, rank: int
) -> OutputTensor:
    """The fused tensor of one rank. parts: as tensors of the model."""
    first = next(iter(parts.values()))
    rest = first.shape[1:]
    zero: Shape = (0,) * len(rest)
    pieces: list[Piece] = []
    total = 0
    for part, whole in parts.items():
        rows = whole.shape[0] // tp
        total += rows
        for run in fusion.runs(part, rows, tp):
            start = (rank * rows + run.part, *zero)
            pieces += cut(whole, start, (run.rows, *rest), (run.fused, *zero))
    return OutputTensor(name, first.dtype, (total, *rest), tuple(pieces))
