"""Where the rows of q, k, v or of up and gate lie in a rank's fused tensor.

One description, used in both directions: a ``RowSpan`` lies in the rank's fused tensor and in the
rank's share of one part. Only rows are moved, so that biases are the case of one dimension.
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
    """Rows of a part: where they start in a rank's fused tensor, in the rank's part; how many."""

    fused: int
    part: int
    rows: int


@dataclass(frozen=True, slots=True)
class Fusion:
    """What the row maps depend on: the model's numbers of heads, and the order of the rows.

    order: matters for grouped-query attention only.
    te: which modules are Transformer Engine's, "attention" or "mlp", with an order of their own.
    """

    heads: int
    kv_heads: int
    order: GqaOrder
    te: frozenset[str] = frozenset()

    def part_rows(self, part: Part, fused: int) -> int:
        """How many of a fused tensor's rows are of this part."""
        if part in ("up", "gate"):
            return fused // 2
        heads = self.heads if part == "q" else self.kv_heads
        return fused * heads // (self.heads + 2 * self.kv_heads)

    def runs(self, part: Part, rows: int, tp: int) -> tuple[RowSpan, ...]:
        """The runs of a part that has this many rows on one of ``tp`` ranks.

        gated: [up | gate], GPT-NeoX megatron/model/transformer.py, Gated_Activation.
        full attention: head by head [q k v]. grouped-query: [all q | all k | all v] since
        neox-gqa-order; before, for each query head [q | slice of k | slice of v], all slices
        together being all of k and v (ParallelSelfAttention.forward, gqa_project). Transformer
        Engine 1.12: [gate | up] (common/util/vectorized_pointwise.h, gated_act_kernel), and for
        each head of k and v [its q heads | k | v] (attention.py, qkv_weight_interleaved).
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
    """One part as a tensor of the model, from the ranks' fused tensors."""
    fused, *rest = shards[0].shape
    rows, tp = fusion.part_rows(part, fused), len(shards)
    zero = (0,) * len(rest)
    pieces = tuple(
        Piece(ref, (run.fused, *zero), (rank * rows + run.part, *zero), (run.rows, *rest))
        for rank, ref in enumerate(shards)
        for run in fusion.runs(part, rows, tp)
    )
    # no shards: the source's tensors hold more than this part
    return Whole(shards[0].dtype, (rows * tp, *rest), pieces)


def gather_again(fusion: Fusion, part: Part, whole: Whole) -> Whole:
    """A gathered part, read in the order of another fusion."""
    shards = dict.fromkeys(piece.source for piece in whole.pieces if piece.source is not None)
    return gather_part(fusion, part, tuple(shards))


def scatter_parts(
    name: str, fusion: Fusion, parts: Mapping[Part, Whole], tp: int, rank: int
) -> OutputTensor:
    """One rank's fused tensor, from the parts as tensors of the model."""
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
