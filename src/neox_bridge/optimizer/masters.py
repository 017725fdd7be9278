"""Checkpoints with master weights instead of weights, or with all optimizer states."""

from collections.abc import Mapping
from dataclasses import replace

from neox_bridge.errors import UsageError
from neox_bridge.findings import Dropped, Finding
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.universal_folder import MASTER
from neox_bridge.optimizer.read_files import read_optimizer
from neox_bridge.optimizer.states import STATE_OF, Optimizer, states
from neox_bridge.tensors.pieces import Whole


def with_masters(
    checkpoint: Checkpoint, without_states: str = "Leave out `weights=`."
) -> Checkpoint:
    """The model with its fp32 master weights.

    A 16-bit run rounds its weights from fp32 master weights at each step. The weights of an fp32
    run are its master weights. Raises BridgeError for a checkpoint without an optimizer.

    without_states: of ``read_optimizer``.
    """
    if checkpoint.neox is None:
        raise UsageError(
            ["weights"],
            f"{checkpoint.path} is a Hugging Face model, but only the optimizer states of a "
            "GPT-NeoX run contain master weights",
            "Leave it out.",
        )
    optimizer = read_optimizer(checkpoint, without_states)
    dropped = tuple(
        replace(drop, reason="optimizer states except the master weights", kind="other")
        if drop.kind == "optimizer"
        else drop
        for drop in checkpoint.dropped
    )
    if MASTER not in optimizer.keys:  # an fp32 run of ZeRO stage 0
        return checkpoint
    return replace(
        checkpoint,
        config=replace(checkpoint.config, dtype="float32"),
        tensors=_in_fp32(checkpoint, states(checkpoint, optimizer)[MASTER]),
        from_masters=True,
        dropped=(*dropped, Dropped("the weights in 16 bits", "rounded master weights"))
        if checkpoint.config.dtype != "float32"
        else dropped,
        findings=(*checkpoint.findings, *optimizer.findings),
    )


def _in_fp32(checkpoint: Checkpoint, masters: Mapping[str, Whole]) -> dict[str, Whole]:
    """The model's tensors, with masters in place of weights. Buffers stay as they are stored."""
    shared = checkpoint.architecture.shared
    tensors, owner = {**checkpoint.tensors, **masters}, ""
    for row in checkpoint.rows if shared else ():
        if row.weight.neox == shared:
            owner = row.hf if row.weight.trained else owner
            tensors[row.hf] = tensors[owner]
    return tensors


def as_it_was_converted(
    source: Checkpoint, target: Checkpoint
) -> tuple[Checkpoint, tuple[Finding, ...]]:
    """The source with the weights from which the target was converted, according to its record.

    Also returns a finding if these are the master weights. Raises BridgeError if there are none.
    """
    recorded = target.record.get("source")
    of_masters = isinstance(recorded, dict) and recorded.get("weights") == "masters"
    if not of_masters or source.neox is None or source.from_masters:
        return source, ()
    way_out = (
        f"{target.path} was converted from master weights: verify it with the run that has them."
    )
    masters = with_masters(source, way_out)
    finding = Finding(
        "masters-compared",
        "info",
        f"{target.path} was converted with `weights=masters`, so it is compared with the fp32 "
        f"master weights of {source.path}",
    )
    return masters, (finding, *masters.findings[len(source.findings) :])


def with_states(checkpoint: Checkpoint, optimizer: Optimizer | None = None) -> Checkpoint:
    """The model's tensors and, as "exp_avg: name", the optimizer's states of each.

    optimizer: of the checkpoint, if already read. Raises BridgeError for a checkpoint without an
    optimizer.
    """
    optimizer = optimizer or read_optimizer(checkpoint)
    more = {
        f"{key}{STATE_OF}{name}": whole
        for key, wholes in states(checkpoint, optimizer).items()
        for name, whole in wholes.items()
    }
    return replace(
        checkpoint,
        tensors={**checkpoint.tensors, **more},
        dropped=tuple(d for d in checkpoint.dropped if d.kind != "optimizer"),
    )


def with_weights_as_masters(
    checkpoint: Checkpoint, with_states_of_it: Checkpoint, other: Checkpoint
) -> Checkpoint:
    """A checkpoint with its states, and with masters where only the other side stores them.

    An fp32 run of ZeRO stage 0 stores no masters: its weights are the masters. Other runs without
    masters stay without them.
    """
    prefix = f"{MASTER}{STATE_OF}"
    here, there = (
        any(name.startswith(prefix) for name in side.tensors) for side in (with_states_of_it, other)
    )
    if here or not there or checkpoint.config.dtype != "float32":
        return with_states_of_it
    masters = {f"{prefix}{name}": whole for name, whole in checkpoint.trained.items()}
    return replace(with_states_of_it, tensors={**with_states_of_it.tensors, **masters})
