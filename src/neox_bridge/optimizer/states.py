"""The optimizer states of a GPT-NeoX checkpoint, by parameter and rank.

DeepSpeed 0.16 has four optimizer wrappers with different formats: "zero", DeepSpeedZeroOptimizer of
ZeRO stages 1 and 2 (runtime/zero/stage_1_and_2.py); "bf16", BF16_Optimizer
(runtime/bf16_optimizer.py); "fp16", FP16_Optimizer of stage 0 (runtime/fp16/fused_optimizer.py);
"plain", no wrapper, for fp32 of stage 0. The first two have separate files, one for each
data-parallel rank; the others are stored in the mp_rank files. runtime/engine.py,
_do_optimizer_sanity_check, chooses.
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

STATE_OF = ": "  # between state name and tensor name in a combined name
DEEPSPEED = "0.16.5"  # whose format is written; it refuses files without a version
Wrapper = Literal["zero", "bf16", "fp16", "plain"]
States = Mapping[str, Mapping[str, Whole]]  # tensors by state and Hugging Face name
Place = tuple[int, Parameter]  # a tensor-parallel rank, and a parameter there


@dataclass(frozen=True)
class Scalar:
    """A small tensor, such as a step, by its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Group:
    """A parameter group of the optimizer.

    Attributes:
        settings: Its hyperparameters, as in torch's param_groups, without the parameters.
        scalars: The values of its state that do not have the size of a parameter: Python values or
            ``Scalar``.
    """

    settings: Mapping[str, Any]
    scalars: Mapping[str, Any]


@dataclass(frozen=True)
class SavedForm:
    """The format of the optimizer states in files of ZeRO stage 1 or 2.

    Attributes:
        kind: "elastic" or "rigid".
        generation: The versions of DeepSpeed that save this format.
        dp: The number of data-parallel ranks that saved it.
        intervals: Communication intervals of each group, on the first model-parallel rank.
    """

    kind: StatesKind
    generation: ZeroGeneration
    dp: int
    intervals: tuple[int, ...]


@dataclass(frozen=True)
class Derived:
    """A value of the optimizer that its files do not contain.

    Attributes:
        key: Its name in ``Group.settings``.
        value: What it must have been.
        source: What it was derived from, such as "lr_scheduler" or "1 + iteration - skipped_steps".
    """

    key: str
    value: Any
    source: str


@dataclass(frozen=True)
class Optimizer:
    """Every state of every parameter, as references.

    Attributes:
        stage: The ZeRO stage.
        dp: The number of data-parallel ranks.
        keys: The states of a parameter, in order.
        groups: The parameter groups of all ranks.
        members: The group of each parameter.
        shards: The part of a parameter on a tensor-parallel rank, by state.
        head: The dictionary of the optimizer without the entries per parameter.
        metas: The contents of the mp_rank files by number, stage x TP + rank.
        generators: The states on rank 0 of the generators that differ by tensor-parallel rank, by
            name.
        files: Absolute paths of the files that contain only optimizer states.
        form: The format of the states at ZeRO stages 1 and 2; None for all others.
        derived: The settings of ``groups`` that no file contains.
        derived_findings: The findings about them.
        findings: Doubts about the values of the states.
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
    """The model's tensors, assembled from ``stored_tensors``."""
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
    """DeepSpeed's loss scaler object (runtime/fp16/loss_scaler.py)."""
    name = "DynamicLossScaler" if dynamic else "LossScaler"
    return Record(Global("deepspeed.runtime.fp16.loss_scaler", name), state=dict(state), new=True)


def tensor_of(name: str) -> str:
    """The name of the tensor that an optimizer state belongs to. Other names are unchanged."""
    return name.rpartition(STATE_OF)[2]
