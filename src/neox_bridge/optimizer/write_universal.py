"""Writes universal checkpoints of DeepSpeed: one folder per parameter, one file per state.

Keys and their order as deepspeed 0.16 writes them (checkpoint/ds_to_universal.py). How ranks share
a parameter is recorded in its files, where DeepSpeed reads it at load, and as name patterns in the
mp_rank files, where ds_to_universal.py reads it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from neox_bridge.architectures.base import Architecture, ModelConfig
from neox_bridge.formats.pickle_writer import TensorSlot
from neox_bridge.formats.pickles import Global, Record
from neox_bridge.formats.torch_zip import layout_pt
from neox_bridge.layouts.universal_folder import MASTER, STATE, STEP, ZERO, Parameter, file_name
from neox_bridge.optimizer.states import Optimizer, Scalar, States
from neox_bridge.optimizer.write_zero import whole_head
from neox_bridge.planning.neox_files import NeoxModel, RankLayout, parameter_rows, rank_parameters
from neox_bridge.tensors.fragments import cut_reductions
from neox_bridge.tensors.geometry import Split
from neox_bridge.tensors.pieces import OutputFile, OutputTensor

_VERSION = 0.2
_SUBPARAM = Global("deepspeed.checkpoint.universal_checkpoint", "SubparamShape")
_NUMBER = re.compile(r"(\d+)\\\.")


@dataclass(frozen=True)
class Universal:
    """The unsplit parameters of a model, for universal files.

    Attributes:
        states: The tensors, by state and parameter.
        splits: How ranks share a parameter.
        names: DeepSpeed's names, in the order of GPT-NeoX's modules.
        config: The model config of the target.
        layout: The layout of the target.
    """

    states: Mapping[str, Mapping[Parameter, OutputTensor]]
    splits: Mapping[Parameter, Split]
    names: Mapping[Parameter, str]
    config: ModelConfig
    layout: RankLayout

    def info(self) -> dict[str, Any]:
        """``universal_checkpoint_info`` of an mp_rank file."""
        by_kind: dict[str, list[str]] = {}
        shapes = []
        for parameter, name in self.names.items():
            pattern = _pattern(name)
            kind = _kind(self.splits[parameter], self.layout, self.config)
            if kind == "sub_params":
                entry = self._sub_params(parameter)
                shapes += [entry] if entry not in shapes else []
            elif kind in _PATTERNS and pattern not in by_kind.setdefault(_PATTERNS[kind], []):
                by_kind[_PATTERNS[kind]].append(pattern)
            if name.startswith("tied_modules."):
                by_kind.setdefault("pipeline_replicated_parameter_patterns", []).append(pattern)
        return {
            "universal_checkpoint_version": _VERSION,
            "original_vocab_size": self.config.dims["vocab"],
            "padded_vocab_size": self.config.dims["vocab"],
            **by_kind,
            **({"parameter_with_sub_params": shapes} if shapes else {}),
        }

    def marks(self, parameter: Parameter) -> dict[str, Any]:
        """The other keys in the files of a parameter."""
        kind = _kind(self.splits[parameter], self.layout, self.config)
        if kind == "sub_params":
            state = self._sub_params(parameter)
            return {"sub_param_shape": Record(_SUBPARAM, state=state, new=True)}
        return dict(_MARKS[kind])

    def _sub_params(self, parameter: Parameter) -> dict[str, Any]:
        """The rows of q, k and v in a tensor of all three, as SubparamShape has them."""
        tensor = self.states[MASTER][parameter]
        heads, kv_heads = self.config.heads, self.config.key_value_heads
        width = tensor.shape[0] // (heads + 2 * kv_heads)
        rows = (heads * width, kv_heads * width, kv_heads * width)
        pattern = _pattern(self.names[parameter])
        return {"patterns": [pattern], "shape": (rows, *tensor.shape[1:]), "partition_dim": 0}


_MARKS: dict[str, dict[str, Any]] = {
    "column": {"cat_dim": 0},
    "row": {"cat_dim": 1},
    "vocab": {"cat_dim": 0, "vocab_tensor": True},
    "replicated": {},
    "average": {},
    "gated": {"cat_dim": 0, "param_n_sub_params": 2},
}
_PATTERNS = {
    "replicated": "tp_replicated_parameter_patterns",
    "average": "parameter_to_average_patterns",
    "row": "parameter_with_row_parallelism_patterns",
    "vocab": "vocabulary_parameter_patterns",
    "gated": "parameter_with_2_sub_params_cat_dim_0",
}


def universal(
    model: NeoxModel,
    wholes: States,
    names: Mapping[Parameter, str],
) -> Universal:
    """Assemble the unsplit parameters.

    A bias that ranks sum is stored as an equal share of the sum, because DeepSpeed gives every rank
    the stored value at load.

    Args:
        model: The model of the target, without its tensors.
        wholes: The assembled tensors, by state and Hugging Face name.
        names: DeepSpeed's names, in the order of GPT-NeoX's modules.
    """
    config, layout = model.config, model.layout
    plain = replace(model, config=replace(config, dtype="float32"))
    splits = splits_of(model.architecture, config, layout)
    states = {}
    for key, tensors in wholes.items():
        one = replace(plain, wholes=tensors, layout=replace(layout, tp=1))
        parameters = rank_parameters(one, 0)
        if key == MASTER:
            bare = {name: replace(whole, shards=(), parts=()) for name, whole in tensors.items()}
            each = replace(layout, row_bias="split" if config.parallel_residual else "replicated")
            parts = rank_parameters(replace(plain, wholes=bare, layout=each), 0)
            parameters |= {p: parts[p] for p in names if splits[p] == "row_bias"}
        states[key] = {p: parameters[p] for p in names}
    return Universal(states, {p: splits[p] for p in names}, names, config, layout)


def splits_of(
    architecture: Architecture, config: ModelConfig, layout: RankLayout
) -> dict[Parameter, Split]:
    """How ranks share each parameter."""
    splits: dict[Parameter, Split] = {}
    for row in parameter_rows(architecture, config):
        name = row.weight.named(layout.old_names)
        splits.setdefault((row.layer, name), row.weight.split_as(name))
    return splits


def universal_files(
    folder: str, model: Universal, optimizer: Optimizer, dp: int, stage: int
) -> Iterator[OutputFile]:
    """Every file of ``zero``. dp: ranks, over which files are not split. stage: of ZeRO."""
    for parameter, name in model.names.items():
        place, marks = f"{folder}/{ZERO}/{name}", model.marks(parameter)
        for key, tensors in model.states.items():
            tensor = replace(tensors[parameter], name="param")
            value = {**marks, "param": TensorSlot("param")}
            yield cut_reductions(layout_pt(f"{place}/{file_name(key)}", value, [tensor]))
        scalars = optimizer.groups[optimizer.members[parameter]].scalars
        if STEP in scalars:
            yield _step(f"{place}/{STEP}.pt", scalars[STEP])
    value = whole_head(optimizer, stage, dp)
    yield layout_pt(f"{folder}/{ZERO}/{STATE}", value, [])


def _step(path: str, step: Any) -> OutputFile:
    if not isinstance(step, Scalar):
        return layout_pt(path, step, [])
    tensor = OutputTensor(STEP, step.dtype, step.shape, inline=step.data)
    return layout_pt(path, TensorSlot(STEP), [tensor])


def _kind(split: Split, layout: RankLayout, config: ModelConfig) -> str:
    """The name of a split in ds_to_universal.py."""
    if split == "fused":
        return "sub_params" if config.grouped_query and layout.gqa_order == "grouped" else "column"
    if split == "row_bias":
        return "average" if config.parallel_residual else "replicated"
    return "replicated" if split == "zero" else split


def _pattern(name: str) -> str:
    """A pattern for re.match that matches a name with any layer number."""
    return _NUMBER.sub(r"\\d+\\.", re.escape(name), count=1) + "$"
