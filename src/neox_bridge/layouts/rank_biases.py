"""Biases that every tensor-parallel rank should hold alike, and that drifted apart.

With gpt_j_residual: false each rank adds the whole bias of attention.dense and of the MLP's second
matrix after the ranks' sum (megatron/model/transformer.py, ParallelTransformerLayer.forward). With
sequence_parallel: true each does so for its own part of the sequence, and only the norms' gradients
are synchronized (megatron/model/utils.py, mark_norms_for_sequence_parallel_grad_sync): the biases
drift apart, and no single model equals the checkpoint.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neox_bridge.architectures.base import Architecture
from neox_bridge.findings import Finding
from neox_bridge.formats.tensor_values import read_box
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.stores.paths import open_file
from neox_bridge.tensors.pieces import Whole, whole_of
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.wording import plural

if TYPE_CHECKING:
    import numpy as np

REMEDY = (
    "compare both on your data before you rely on the result. Continue training with "
    "sequence_parallel: false or on one tensor-parallel rank"
)


@dataclass(frozen=True, slots=True)
class DriftedBiases:
    """Row-parallel biases that differ between ranks.

    count: how many tensors do. largest: the largest deviation of a rank from the ranks' mean.
    name: the Hugging Face name of the tensor that has it. sequence_parallel: the yml's setting.
    """

    count: int
    largest: float
    name: str
    sequence_parallel: bool

    def finding(
        self, written: str = "The mean over the ranks is written, which is close to it"
    ) -> Finding:
        """What there is to know. written: what becomes of the biases."""
        differ = (
            f"the tensor-parallel ranks differ in {plural(self.count, 'bias')}, by up to "
            f"{self.largest:.6g} from the mean ({self.name})"
        )
        cause = "their gradients were not the same on all ranks"
        used = "each rank adds its own bias"
        if self.sequence_parallel:
            cause = (
                "with sequence_parallel: true and gpt_j_residual: false GPT-NeoX synchronizes "
                "only the gradients of the norms (megatron/model/utils.py, "
                "mark_norms_for_sequence_parallel_grad_sync)"
            )
            used = "each rank adds its own bias to its part of the sequence"
        return Finding(
            "rank-biases-differ",
            "warning",
            f"{differ}: {cause}, and {used}, so no single model equals this checkpoint. {written}",
            REMEDY,
        )


def row_bias_names(architecture: Architecture) -> tuple[str, ...]:
    """How the names of a family's row-parallel biases end, on either side."""
    names = [
        name
        for weight in architecture.weights
        if weight.split == "row_bias"
        for name in (weight.hf.rpartition("{i}.")[2], weight.neox, weight.old)
    ]
    return tuple(filter(None, names))


def drifted_biases(checkpoint: Checkpoint) -> DriftedBiases | None:
    """The row-parallel biases that differ between ranks; None if none do.

    Reads these biases, which are small. With gpt_j_residual: true their sum is the model's bias,
    whatever each rank holds.
    """
    deviations = dict(_deviations(checkpoint))
    if not deviations:
        return None
    name = max(deviations, key=lambda key: (deviations[key], key))
    setting = bool(checkpoint.raw.get("sequence_parallel"))
    return DriftedBiases(len(deviations), deviations[name], name, setting)


def _deviations(checkpoint: Checkpoint) -> Iterator[tuple[str, float]]:
    state = checkpoint.neox
    if state is None or state.tp == 1 or checkpoint.config.parallel_residual:
        return
    for row in checkpoint.rows:
        whole = checkpoint.tensors.get(row.hf) if row.weight.split == "row_bias" else None
        replicas = whole if whole is not None and whole.reduce == "replica" else None
        shards = (replicas.shards or replicas.parts) if replicas is not None else ()
        if shards and (largest := _largest_deviation(shards)):
            yield row.hf, largest


def _largest_deviation(shards: Sequence[TensorRef | Whole]) -> float:
    """The largest distance of an element from the mean of the ranks; infinite for a lone NaN."""
    import numpy as np

    stored = [_values(shard if isinstance(shard, Whole) else whole_of(shard)) for shard in shards]
    if all(values.tobytes() == stored[0].tobytes() for values in stored[1:]):
        return 0.0
    ranks = np.stack([values.astype(np.float64) for values in stored])
    with np.errstate(all="ignore"):
        apart = np.abs(ranks - ranks.mean(axis=0))
    return float(np.where(np.isnan(apart), np.inf, apart).max(initial=0.0))


def _values(shard: Whole) -> "np.ndarray[Any, np.dtype[Any]]":
    """What a rank holds of a bias, in the dtype of its bytes."""
    import numpy as np

    runs = []
    for piece in sorted(shard.pieces, key=lambda piece: piece.to):
        assert piece.source is not None
        with open_file(piece.source.file) as file:
            runs.append(read_box(file, piece.source, piece.start, piece.shape))
    return np.concatenate(runs)
