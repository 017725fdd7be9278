"""Whether a model's 16-bit weights are its optimizer's fp32 masters, rounded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from neox_bridge.execution.context import Context
from neox_bridge.findings import Finding
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.universal_folder import MASTER
from neox_bridge.optimizer.states import Optimizer
from neox_bridge.tensors.pieces import Whole, whole_of
from neox_bridge.verification.compare import compare, each
from neox_bridge.wording import some


@dataclass(frozen=True, slots=True)
class RoundedMasters:
    """Every stored tensor compared with its master.

    compared: how many tensors of all tensor-parallel ranks. differing: the names of those that are
    not their masters rounded to nearest, such as "layer 2: attention.dense.weight".
    """

    compared: int
    differing: tuple[str, ...]


def rounded_masters(
    checkpoint: Checkpoint,
    optimizer: Optimizer,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> RoundedMasters | None:
    """Compare every weight with its master, bit for bit after rounding; None without masters."""
    state = checkpoint.neox_state
    pairs: dict[str, tuple[Whole, Whole]] = {}
    for rank, layers in enumerate(state.ranks):
        for layer, tensors in layers.items():
            for name, ref in tensors.items():
                states = optimizer.shards.get((rank, (layer, name)), {})
                if MASTER in states:
                    suffix = f" (tensor-parallel rank {rank})" if state.tp > 1 else ""
                    pairs[f"layer {layer}: {name}{suffix}"] = (states[MASTER], whole_of(ref))
    if not pairs:
        return None
    context = Context(progress)

    def differs(name: str) -> bool:
        master, weight = pairs[name]
        difference = compare(name, master, weight, context)  # which rounds the master
        context.wrote(weight.nbytes, "copied")
        return difference.kind != "equal"

    flags = each(pairs, differs, context, workers)
    return RoundedMasters(
        len(pairs), tuple(name for name, flag in zip(pairs, flags, strict=True) if flag)
    )


def master_findings(result: RoundedMasters, path: str) -> Sequence[Finding]:
    """A warning where weights are not their masters."""
    if not result.differing:
        return ()
    return (
        Finding(
            "masters-not-weights",
            "warning",
            f"{path}: {len(result.differing):,} of {result.compared:,} weights are not the "
            f"optimizer's fp32 masters, rounded: {some(list(result.differing), 3)}",
            "copy all files of the step again, if they may be of several",
            subject="fp32 masters",
        ),
    )
