"""The optimizer format of GPT-NeoX v1.0 with DeeperSpeed 0.3.15.

Sources: GPT-NeoX v1.0 megatron/checkpointing.py (save_ds_checkpoint); DeeperSpeed 0.3.15
runtime/engine.py (_save_checkpoint, _save_zero_checkpoint) and runtime/zero/stage1.py
(best_max_elems_per_comm, _elastic_state_dict).
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from neox_bridge.errors import Refused
from neox_bridge.findings import Finding
from neox_bridge.formats.pickle_writer import TensorSlot
from neox_bridge.formats.pickles import Record
from neox_bridge.formats.torch_zip import layout_pt
from neox_bridge.frameworks.deepspeed import SUB_PARTITIONS
from neox_bridge.frameworks.writers import OLD_SPARSE_NAMES
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.file_names import states_file
from neox_bridge.layouts.universal_folder import MASTER
from neox_bridge.layouts.untrusted import mapping, whole
from neox_bridge.optimizer.derived_settings import derived_settings
from neox_bridge.optimizer.rank_states import INTERVALS, RANKS
from neox_bridge.optimizer.states import Group, Optimizer, SavedForm, loss_scaler
from neox_bridge.optimizer.write_zero import SIZE, RankGroup, flat_slots
from neox_bridge.planning.neox_files import V1_KEYS
from neox_bridge.planning.random_states import old_cuda_state
from neox_bridge.stores.paths import read_at
from neox_bridge.tensors.flat import Flat
from neox_bridge.tensors.fragments import Parts, put
from neox_bridge.tensors.pieces import OutputFile, OutputTensor

BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default of zero_optimization.reduce_bucket_size
_SINCE_09 = ("dynamic", "dtype")  # fields of loss scalers that are missing in DeeperSpeed 0.3.15
_GPU_STATES = ("cuda_rng_state", "rng_tracker_states.", "model-parallel-rng")


@dataclass(frozen=True)
class SubPartitions(Flat):
    """A flat group, split into communication intervals, each of which is split over the ranks.

    Part interval x dp + rank of the group belongs to that rank in that interval.

    Attributes:
        bucket: ``reduce_bucket_size``, in elements.
    """

    bucket: int

    @property
    def intervals(self) -> int:
        """The number of communication intervals."""
        return self._cut[0]

    @cached_property
    def partition(self) -> int:
        """The number of elements of a part, including padding."""
        return self._cut[1]

    @cached_property
    def _cut(self) -> tuple[int, int]:
        """stage1.py: best_max_elems_per_comm and get_data_parallel_sub_partitions."""
        elements, bucket = self.numel, self.bucket
        whole_buckets = elements // bucket
        if whole_buckets >= 1:
            extra = -(-elements // (self.dp * whole_buckets))
            if bucket * -(-elements // bucket) - elements > extra:
                bucket += extra
        share, limit = -(-elements // self.dp), bucket // self.dp
        if share <= limit:
            return 1, share
        if limit < 1:
            raise Refused(
                f"zero_optimization.reduce_bucket_size is {self.bucket}, less than the number of "
                f"data-parallel ranks, {self.dp}, so GPT-NeoX v1.0 cannot partition a bucket. Use "
                "a larger one in the yml, or fewer ranks with `dp=`."
            )
        return -(-share // limit), limit


def is_v1(optimizer: Optimizer) -> bool:
    """Whether the files of an optimizer have the format of GPT-NeoX v1.0."""
    return optimizer.form is not None and optimizer.form.generation is SUB_PARTITIONS


def check_v1_run(optimizer: Optimizer, stage: int, dtype: str, universal: bool) -> None:
    """Raise Refused for a run that GPT-NeoX v1.0 cannot resume, or that cannot be written.

    stage: the ZeRO stage of the target; stages 1 and 2 have the same files.
    """
    if universal:
        raise Refused(
            "`universal=True`: GPT-NeoX v1.0 does not load universal checkpoints. Leave it out, "
            "or choose a later GPT-NeoX: `era=today`."
        )
    if dtype != "float16" or optimizer.wrapper == "bf16":
        raise Refused(
            f"precision: the run is in {dtype}, and DeeperSpeed 0.3.15, which GPT-NeoX v1.0 "
            "requires, supports ZeRO only for float16. Choose a later GPT-NeoX with `era=`."
        )
    if stage != 1:
        raise Refused(
            f"the run would resume at ZeRO stage {stage}, but for GPT-NeoX v1.0 only stage 1 can "
            "be written. Use `zero=1`."
        )


def in_v1_form(checkpoint: Checkpoint, optimizer: Optimizer, raw: Mapping[str, Any]) -> Optimizer:
    """Return the optimizer with the keys of v1.0 files. Raises Refused if it is not Adam.

    Args:
        optimizer: An optimizer of ZeRO stage 1 in float16, in any format.
        raw: The yml of the target, from which v1.0 takes the hyperparameters.
    """
    metas = tuple(map(_meta, optimizer.metas))
    scaler = optimizer.head.get("loss_scaler")
    head = {
        "loss_scaler": _scaler(scaler),
        "dynamic_loss_scale": bool(optimizer.head.get("dynamic_loss_scale")),
        "overflow": bool(optimizer.head.get("overflow")),
        "outer": {},
    }
    no_scalars: list[dict[str, Any]] = [{} for _ in optimizer.groups]
    folder = checkpoint.neox_state.folder
    derived = derived_settings(
        raw, metas[0], no_scalars, folder, f"{checkpoint.path}: mp_rank_00", ""
    )
    groups = tuple(Group(settings, {}) for settings in derived.groups)
    return replace(
        optimizer,
        groups=groups,
        head=head,
        metas=metas,
        generators={n: old_cuda_state(data) for n, data in optimizer.generators.items()},
        form=SavedForm("elastic", SUB_PARTITIONS, optimizer.dp, ()),
    )


def step_lost() -> Finding:
    return Finding(
        "adam-step-lost",
        "warning",
        "GPT-NeoX v1.0 does not save and load Adam's step. It restarts at 1, so the bias "
        "correction makes the first updates smaller or larger than in the original run. Learning "
        "rate, betas, eps and weight decay come from the yml",
    )


def _scaler(scaler: Any) -> Any:
    if not isinstance(scaler, Record) or not isinstance(scaler.state, dict):
        return scaler
    dynamic = "scale_window" in scaler.state
    state = {key: value for key, value in scaler.state.items() if key not in _SINCE_09}
    return loss_scaler(state, dynamic=dynamic)


def _meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    names = meta.get(OLD_SPARSE_NAMES, meta.get("sparse_tensor_module_names"))
    values = {**meta, OLD_SPARSE_NAMES: set() if names is None else names}
    values["optimizer"] = None
    return {key: values.get(key) for key in V1_KEYS}


def old_random_states(tensors: Sequence[OutputTensor]) -> list[OutputTensor]:
    """The tensors of an mp_rank file, with the GPU generator states of old torch versions."""
    changed = []
    for tensor in tensors:
        if tensor.name.startswith(_GPU_STATES):
            source = tensor.pieces[0].source if len(tensor.pieces) == 1 else None
            data = tensor.inline
            if source is not None:
                data = read_at(source.file, source.offset, source.nbytes)
            if data is not None:
                state = old_cuda_state(data)
                tensor = OutputTensor(tensor.name, "uint8", (len(state),), inline=state)
        changed.append(tensor)
    return changed


def v1_files(
    folder: str,
    optimizer: Optimizer,
    number: int,
    dp: int,
    groups: Sequence[RankGroup],
    raw: Mapping[str, Any],
    order: Sequence[str],
) -> Iterator[OutputFile]:
    """The optimizer state files of one model-parallel rank, by the number of its mp_rank file.

    Args:
        optimizer: The optimizer in the format of v1.0.
        raw: The yml of the target.
        order: DeepSpeed's names of the rank's parameters, in the order in which the model registers
            them.
    """
    zero = mapping(raw, "zero_optimization", "the yml")
    bucket = whole(zero, "reduce_bucket_size", "the yml") or BUCKET_ELEMENTS
    flats = [SubPartitions(group.shapes, dp, bucket) for group in groups]
    shapes = {name: shape for group in groups for name, shape in group.shapes.items()}
    param_shapes = OrderedDict(
        (name, Record(SIZE, (shapes[name],))) for name in order if name in shapes
    )
    head = {key: value for key, value in optimizer.head.items() if key != "outer"}
    for rank in range(dp):
        parts: dict[str, Parts] = {}
        tensors: list[OutputTensor] = []
        states: list[list[dict[str, TensorSlot]]] = []
        masters: list[list[TensorSlot]] = []
        for index, (group, flat) in enumerate(zip(groups, flats, strict=True)):
            states.append([])
            masters.append([])
            for interval in range(flat.intervals):
                number_of_part = interval * dp + rank
                name = f"{{}}.{index}.{interval}"
                slots = flat_slots(group, flat, number_of_part, name, tensors, parts)
                masters[-1].append(slots.pop(MASTER))
                states[-1].append(slots)
        value = {
            "optimizer_state_dict": {
                **head,
                "base_optimizer_state": states,
                "zero_stage": 1,
                RANKS: dp,
                INTERVALS: [flat.intervals for flat in flats],
                SUB_PARTITIONS.masters: masters,
            },
            "param_shapes": param_shapes,
        }
        path = f"{folder}/{states_file(rank, number)}"
        yield put(layout_pt(path, value, tensors), parts)
