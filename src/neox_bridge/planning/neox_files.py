"""Lays out the files of a global_stepN: the tensors of each rank and the metadata.

Names and keys as GPT-NeoX and DeepSpeed write them (megatron/checkpointing.py, save_ds_checkpoint;
deepspeed/runtime/engine.py, _save_checkpoint; deepspeed/runtime/pipe/module.py, save_state_dict).
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neox_bridge.architectures.base import Architecture, ModelConfig
from neox_bridge.architectures.pipeline_stages import stages_of, with_owners
from neox_bridge.architectures.rows import Row, table_rows
from neox_bridge.formats.pickle_writer import TensorSlot, dump
from neox_bridge.formats.torch_zip import layout_pickled
from neox_bridge.frameworks.deepspeed import StatesForm
from neox_bridge.frameworks.eras import InvFreq, MlpNames
from neox_bridge.frameworks.module_order import in_module_order
from neox_bridge.frameworks.setting_defaults import WRITER
from neox_bridge.frameworks.writers import OLD_SPARSE_NAMES
from neox_bridge.layouts.checkpoint import LayoutName
from neox_bridge.layouts.derived_values import inv_freq_bytes
from neox_bridge.layouts.file_names import layer_file, rank_file
from neox_bridge.layouts.transformer_engine import BOTH, te_name
from neox_bridge.layouts.universal_folder import Parameter
from neox_bridge.planning import random_states, transformer_engine
from neox_bridge.tensors.fused import GqaOrder, scatter_parts
from neox_bridge.tensors.geometry import Split, constant, scatter
from neox_bridge.tensors.pieces import OutputFile, OutputTensor, Whole
from neox_bridge.version import __version__

# the keys of an mp_rank file in DeepSpeed's order, with their values for a run without such states
MP_RANK: Mapping[str, Any] = {
    "module": None,
    "buffer_names": [],
    "optimizer": None,
    "param_shapes": None,
    "frozen_param_shapes": None,
    "shared_params": {},
    "frozen_param_fragments": None,
    "lr_scheduler": None,
    "data_sampler": None,
    "random_ltd": None,
    "sparse_tensor_module_names": set(),
    "skipped_steps": 0,
    "global_steps": 0,
    "global_samples": 0,
    "dp_world_size": 1,
    "mp_world_size": 1,
    "ds_config": {},
    "ds_version": "",
}
_NOT_AT_START = ("shared_params", "frozen_param_fragments")
_ON_GPU = ("cuda_rng_state", "model-parallel-rng")
# the keys of an mp_rank file of GPT-NeoX v1.0, in order (megatron/checkpointing.py and DeeperSpeed
# 0.3.15 runtime/engine.py, _save_checkpoint)
V1_KEYS = (
    "module",
    "optimizer",
    "lr_scheduler",
    OLD_SPARSE_NAMES,
    "skipped_steps",
    "global_steps",
    "global_samples",
    "dp_world_size",
    "mp_world_size",
    "iteration",
    "args",
    "random_rng_state",
    "np_rng_state",
    "torch_rng_state",
    "cuda_rng_state",
    "rng_tracker_states",
)
SEED = 1234  # GPT-NeoX's default
# from the number of an mp_rank file and its module (None if layers have separate files): the value
# of the file, and its tensors that are not in the module
Metadata = Callable[[int, Any], tuple[dict[str, Any], list[OutputTensor]]]
Groups = dict[Parameter, list[Row]]
Pickles = dict[object, tuple[bytes, Sequence[str]]]


@dataclass(frozen=True, slots=True)
class RankLayout:
    """The layout of a target over ranks.

    Attributes:
        row_bias: See ``geometry.scatter``.
        stages: The number of pipeline stages; 1 for the layout "ranks".
        inv_freq: Whether the rotary buffer is written.
        te: Whether the blocks have modules of Transformer Engine.
        states: How the optimizer states are split over ranks; see ``StatesForm``.
    """

    name: LayoutName
    tp: int
    stages: int
    mlp_names: MlpNames
    inv_freq: InvFreq
    row_bias: str
    gqa_order: GqaOrder = "grouped"
    te: bool = False
    states: StatesForm = "partitions"

    @property
    def pipe_parallel_size(self) -> int:
        """The setting of GPT-NeoX, which is 0 without stages."""
        return self.stages if self.name == "layers" else 0

    @property
    def predates_deepspeed_06(self) -> bool:
        """Whether the files are for GPT-NeoX v1.0 and its DeeperSpeed 0.3.15."""
        return self.states == "sub-partitions"

    @property
    def old_names(self) -> bool:
        """Whether the MLP has its names from before 2024-09."""
        return self.mlp_names == "dense"


@dataclass(frozen=True)
class NeoxModel:
    """A model as stored in a GPT-NeoX target.

    wholes: the tensors by Hugging Face name, with the vocabulary rows and the dtype of the target.
    """

    architecture: Architecture
    config: ModelConfig
    wholes: Mapping[str, Whole]
    layout: RankLayout


def weight_files(
    folder: str, model: NeoxModel, metadata: Metadata, *, alike: bool = False
) -> Iterator[OutputFile]:
    """Yield every ``.pt`` file: one per layer and rank or one per rank, and the metadata.

    alike: whether the metadata of all numbers is equal, except for the module.
    """
    layout = model.layout
    groups = _grouped(_stored_rows(model), model)
    dumped: Pickles = {}
    modules: list[tuple[Any, list[OutputTensor]]] = [(None, [])] * (layout.stages * layout.tp)
    if layout.name == "layers":
        # a final norm without parameters also has a file
        layers: dict[int, Groups] = {model.config.layers + 3: {}}
        for (layer, name), parts in groups.items():
            layers.setdefault(layer, {})[layer, name] = parts
        for layer, layer_groups in sorted(layers.items()):
            for rank in range(layout.tp):
                tensors = _with_biases(_tensors(layer_groups, model, rank), model)
                value: Mapping[str, TensorSlot | None] = _state_dict(tensors, layout)
                # save_state_dict of deepspeed/runtime/pipe/module.py wrote a plain dict then
                value = dict(value) if layout.predates_deepspeed_06 else value
                yield _laid_out(
                    f"{folder}/{layer_file(layer, rank)}", value, value, tensors, dumped
                )
    else:
        modules = rank_modules(model)
    metas: Pickles | None = {} if alike else None
    for number, (module, tensors) in enumerate(modules):
        yield mp_rank_file(folder, number, metadata, module, tensors, metas)


def rank_modules(model: NeoxModel) -> list[tuple[Any, list[OutputTensor]]]:
    """The state dict of each tensor-parallel rank, with all layers, and its tensors."""
    groups = _grouped(_stored_rows(model), model)
    modules: list[tuple[Any, list[OutputTensor]]] = []
    for rank in range(model.layout.tp):
        tensors = _with_biases(_tensors(groups, model, rank, numbered=True), model)
        modules.append((_state_dict(tensors, model.layout), tensors))
    return modules


def _stored_rows(model: NeoxModel) -> list[Row]:
    """The rows of the tensors that the target stores, with or without derived buffers."""
    rows = table_rows(model.architecture, model.config.layers)
    store = model.layout.inv_freq == "store"
    return [row for row in rows if store or row.weight.split != "derived"]


def mp_rank_file(
    folder: str,
    number: int,
    metadata: Metadata,
    module: Any = None,
    tensors: Sequence[OutputTensor] = (),
    dumped: Pickles | None = None,
) -> OutputFile:
    """One metadata file. module, tensors: the weights in it, if there are any.

    dumped: a cache of pickles, shared by files with the same metadata.
    """
    value, states = metadata(number, module)
    path = f"{folder}/{rank_file(number)}"
    pickles = {} if dumped is None else dumped
    return _laid_out(path, value, module or (), [*tensors, *states], pickles)


def _laid_out(
    path: str,
    value: object,
    names: Iterable[str],
    tensors: Sequence[OutputTensor],
    dumped: Pickles,
) -> OutputFile:
    """Lay out one file. names: the tensors of its module.

    dumped: a cache of pickles by content: a layer has the same pickle on every rank and in every
    block, and a rank the same as every other rank.
    """
    slots = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    key = tuple(names), tuple(slots.items())
    if key not in dumped:
        dumped[key] = dump(value, slots)
    return layout_pickled(path, *dumped[key], tensors)


def rank_parameters(model: NeoxModel, rank: int) -> dict[Parameter, OutputTensor]:
    """The parameters of one tensor-parallel rank."""
    groups = _grouped(parameter_rows(model.architecture, model.config), model)
    return dict(zip(groups, _tensors(groups, model, rank), strict=True))


def stage_layers(model: NeoxModel, raw: Mapping[str, Any]) -> list[range]:
    """The layers of each pipeline stage; all layers in one without stages. raw: the yml."""
    # DeepSpeed counts a parameter that blocks share in each of them
    each = [range(layer, layer + 1) for layer in range(model.config.head_layer)]
    counted = with_owners(model.architecture, model.config.layers, each)

    def shapes() -> Iterator[tuple[int, tuple[int, ...]]]:
        parameters = rank_parameters(replace(model, architecture=counted), 0)
        return ((layer, tensor.shape) for (layer, _), tensor in parameters.items())

    return stages_of(model.architecture, model.config, raw, model.layout.stages, shapes)


def parameter_rows(architecture: Architecture, config: ModelConfig) -> list[Row]:
    """The rows of the weights that GPT-NeoX trains, without buffers."""
    rows = (row for row in table_rows(architecture, config.layers) if row.weight.is_in(config))
    return [row for row in rows if row.weight.split != "derived" and row.weight.trained]


def _with_biases(tensors: Iterable[OutputTensor], model: NeoxModel) -> list[OutputTensor]:
    """The tensors of a rank, with the biases that Transformer Engine's modules always have."""
    present = list(tensors)
    if model.layout.te:
        present += list(transformer_engine.lacking_biases(present, model.config.dtype))
    return present


def _grouped(rows: Iterable[Row], model: NeoxModel) -> Groups:
    """The rows of the model by layer and name. Rows with the same key are parts of one tensor."""
    groups: Groups = {}
    for row in rows:
        if row.weight.is_in(model.config):
            name = row.weight.named(model.layout.old_names)
            name = te_name(name) if model.layout.te else name
            groups.setdefault((row.layer, name), []).append(row)
    return in_module_order(groups)


def _tensors(
    groups: Groups, model: NeoxModel, rank: int, numbered: bool = False
) -> Iterator[OutputTensor]:
    """The tensors of one rank, in the order of groups. numbered: prefix names with the layer."""
    for (layer, name), rows in groups.items():
        full = f"sequential.{layer}.{name}" if numbered else name
        yield _tensor(full, rows[0].weight.split_as(name), rows, model, rank)


def _tensor(
    name: str, split: Split, rows: Sequence[Row], model: NeoxModel, rank: int
) -> OutputTensor:
    config, layout, wholes = model.config, model.layout, model.wholes
    if split == "derived":
        data = inv_freq_bytes(config, config.dtype)
        size = (config.rotary_dim + 1) // 2
        return OutputTensor(name, config.dtype, (size,), inline=data)
    if split == "zero":
        size = config.dims[rows[0].weight.shape[0]]
        return OutputTensor(name, config.dtype, (size,), (constant((size,), -0.0),))
    if split in ("fused", "gated"):
        parts = {row.weight.part: wholes[row.hf] for row in rows}
        fusion = config.fusion(layout.gqa_order, frozenset(BOTH if layout.te else ()))
        return scatter_parts(name, fusion, parts, layout.tp, rank)
    return scatter(name, split, wholes[rows[0].hf], layout.tp, rank, row_bias=layout.row_bias)


def _state_dict(
    tensors: Sequence[OutputTensor], layout: RankLayout
) -> "OrderedDict[str, TensorSlot | None]":
    named: OrderedDict[str, TensorSlot | None] = OrderedDict(
        (tensor.name, TensorSlot(tensor.name)) for tensor in tensors
    )
    if layout.te:
        named.update(dict.fromkeys(transformer_engine.states(tensors)))
    return named


@dataclass(frozen=True)
class NewOptimizer:
    """An optimizer that is written with the weights; see ``optimizer.fresh``.

    Attributes:
        stage: The ZeRO stage.
        values: What each mp_rank file contains about it, by number.
        files: The separate files of the optimizer.
    """

    stage: int
    values: Sequence[Mapping[str, Any]]
    files: Sequence[OutputFile]


# arguments: the model with tensors in the source's dtype, keys of the yml, iteration, dp
MakeOptimizer = Callable[[NeoxModel, Mapping[str, Any], int, int], NewOptimizer]


def start_of_run(
    layout: RankLayout,
    args: Mapping[str, Any],
    iteration: int,
    optimizer: NewOptimizer | None,
    number: int,
    module: Any,
) -> tuple[dict[str, Any], list[OutputTensor]]:
    """The contents of an mp_rank file to start from. Its tensors are random states as bytes."""
    count, tp_rank = layout.stages * layout.tp, number % layout.tp
    states = {
        "torch_rng_state": random_states.torch_state(SEED),
        "cuda_rng_state": random_states.cuda_state(SEED),
        "model-parallel-rng": random_states.cuda_state(
            random_states.model_parallel_seed(SEED, tp_rank)
        ),
    }
    value = {
        **{key: value for key, value in MP_RANK.items() if key not in _NOT_AT_START},
        "module": module,
        "global_steps": iteration,
        "mp_world_size": count,
        "ds_version": f"{WRITER}{__version__}",
        "iteration": iteration,
        "args": dict(args),
        "random_rng_state": random_states.python_state(SEED),
        "np_rng_state": random_states.numpy_state(SEED),
        "torch_rng_state": TensorSlot("torch_rng_state"),
        "cuda_rng_state": TensorSlot("cuda_rng_state"),
        "rng_tracker_states": {"model-parallel-rng": TensorSlot("model-parallel-rng")},
    }
    if optimizer is not None:
        value |= optimizer.values[number]
    if layout.predates_deepspeed_06:
        states |= {name: random_states.old_cuda_state(states[name]) for name in _ON_GPU}
        value = {key: {**value, OLD_SPARSE_NAMES: set()}[key] for key in V1_KEYS}
    tensors = [
        OutputTensor(name, "uint8", (len(data),), inline=data) for name, data in states.items()
    ]
    return value, tensors
