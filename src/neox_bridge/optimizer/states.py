"""The optimizer states of a GPT-NeoX checkpoint, by parameter and rank.

DeepSpeed 0.16 has four wrappers with different formats: "zero", DeepSpeedZeroOptimizer of ZeRO
stages 1 and 2 (runtime/zero/stage_1_and_2.py); "bf16", BF16_Optimizer (runtime/bf16_optimizer.py);
"fp16", FP16_Optimizer of stage 0 (runtime/fp16/fused_optimizer.py); "plain", none, for fp32 of
stage 0. The first two have files of their own, one for each data-parallel rank; the others lie in
the mp_rank files. runtime/engine.py, _do_optimizer_sanity_check, chooses.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from neox_bridge.findings import Finding
from neox_bridge.formats.pickles import Global, Record
from neox_bridge.frameworks.deepspeed import StatesKind, ZeroGeneration
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.universal_folder import MASTER, Parameter
from neox_bridge.tensors.flat import in_place_of
from neox_bridge.tensors.pieces import Whole
from neox_bridge.tensors.tensor_ref import TensorRef

STATE_OF = ": "  # between the name of a state and the tensor's, where both make one name
DEEPSPEED = "0.16.5"  # whose files are written; it refuses what has no version
Wrapper = Literal["zero", "bf16", "fp16", "plain"]
States = Mapping[str, Mapping[str, Whole]]  # by state and Hugging Face name
Place = tuple[int, Parameter]  # a tensor-parallel rank, and a parameter there


@dataclass(frozen=True)
class Scalar:
    """A small tensor, such as a step, by its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Group:
    """One of the optimizer's parameter groups.

    settings: its hyperparameters, as torch's param_groups has them, without the parameters.
    scalars: what its state has beside the tensors of a parameter's size: Python's or ``Scalar``.
    """

    settings: Mapping[str, Any]
    scalars: Mapping[str, Any]


@dataclass(frozen=True)
class SavedForm:
    """In which form files of ZeRO stage 1 or 2 hold an optimizer's states.

    kind: "elastic" or "rigid". generation: the versions of DeepSpeed that save this form.
    dp: the data-parallel ranks that saved it. intervals: communication intervals of each group, on
    the first model-parallel rank.
    """

    kind: StatesKind
    generation: ZeroGeneration
    dp: int
    intervals: tuple[int, ...]


@dataclass(frozen=True)
class Derived:
    """A value of the optimizer that its files do not contain.

    key: its name in ``Group.settings``. value: what it must have been. source: what it was derived
    from, such as "lr_scheduler" or "1 + iteration - skipped_steps".
    """

    key: str
    value: Any
    source: str


@dataclass(frozen=True)
class Optimizer:
    """Every state of every parameter, in its place.

    stage: ZeRO's. dp: data-parallel ranks. keys: the states of a parameter, in their order.
    groups: those that any rank has. members: which group a parameter is of.
    shards: what a tensor-parallel rank holds of a parameter, by state.
    head: the optimizer's own dictionary without what is here by parameter.
    metas: the mp_rank files' values by their number, stage x TP + rank.
    generators: the states of the generators that differ by tensor-parallel rank, rank 0's, by name.
    files: absolute paths of those that hold nothing but optimizer states.
    form: how files of ZeRO stages 1 and 2 hold the states; None for all others.
    derived: the settings of ``groups`` that no file holds, and derived_findings: that they were
    derived. findings: what is in doubt of the states' values.
    """

    wrapper: Wrapper
    stage: int
    dp: int
    keys: tuple[str, ...]
    groups: tuple[Group, ...]
    members: Mapping[Parameter, int]
    shards: Mapping[Place, Mapping[str, Whole]]
    head: Mapping[str, Any]
    metas: tuple[Mapping[str, Any], ...]
    files: tuple[str, ...]
    generators: Mapping[str, bytes]
    form: SavedForm | None = None
    derived: tuple[Derived, ...] = ()
    derived_findings: tuple[Finding, ...] = ()
    findings: tuple[Finding, ...] = ()


def stored_tensors(checkpoint: Checkpoint) -> dict[Place, TensorRef]:
    """The stored tensors of a GPT-NeoX checkpoint."""
    return {
        (rank, (layer, name)): ref
        for rank, layers in enumerate(checkpoint.neox_state.ranks)
        for layer, tensors in layers.items()
        for name, ref in tensors.items()
    }


def stored_wholes(checkpoint: Checkpoint) -> Mapping[str, Whole]:
    """The model's tensors as wholes of ``stored_tensors``."""
    state = checkpoint.neox_state
    return {n: state.stored_wholes.get(n, whole) for n, whole in checkpoint.trained.items()}


def states(checkpoint: Checkpoint, optimizer: Optimizer) -> dict[str, dict[str, Whole]]:
    """The model's tensors, under their Hugging Face names, for each of the optimizer's states."""
    stored = stored_tensors(checkpoint).items()
    by_state: dict[str, dict[str, Whole]] = {}
    for key in optimizer.keys:
        shards = {
            ref: optimizer.shards[place][key] for place, ref in stored if place in optimizer.shards
        }
        by_state[key] = {
            name: in_place_of(whole, shards, sums=key == MASTER)
            for name, whole in stored_wholes(checkpoint).items()
        }
    return by_state


def loss_scaler(state: Mapping[str, Any], *, dynamic: bool) -> Record:
    """DeepSpeed's object for a loss scale (runtime/fp16/loss_scaler.py)."""
    name = "DynamicLossScaler" if dynamic else "LossScaler"
    return Record(Global("deepspeed.runtime.fp16.loss_scaler", name), state=dict(state), new=True)


def tensor_of(name: str) -> str:
    """The tensor that an optimizer's state is of; any other name is its own."""
    return name.rpartition(STATE_OF)[2]
