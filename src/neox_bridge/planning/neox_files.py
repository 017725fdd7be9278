"""The files of a global_stepN: which tensors of which rank go where, and the metadata beside them.

Names and keys as GPT-NeoX and DeepSpeed write them (megatron/checkpointing.py, save_ds_checkpoint;
deepspeed/runtime/engine.py, _save_checkpoint; deepspeed/runtime/pipe/module.py, save_state_dict).
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neox_bridge import __version__
from neox_bridge.architectures.base import Architecture, ModelConfig, Weight
from neox_bridge.formats.pickle_writer import TensorSlot
from neox_bridge.formats.torch_zip import layout_pt
from neox_bridge.layouts.checkpoint import LayoutName
from neox_bridge.layouts.eras import DENSE, InvFreq, MlpNames
from neox_bridge.layouts.weights import expand, layer_of, model_weights
from neox_bridge.planning import random_states
from neox_bridge.planning.derived import inv_freq_bytes
from neox_bridge.planning.geometry import scatter
from neox_bridge.planning.pieces import OutputFile, OutputTensor, Whole

SEED = 1234  # GPT-NeoX's default


@dataclass(frozen=True, slots=True)
class Shape:
    """How a target is laid out. row_bias: see ``geometry.scatter``.

    stages: pipeline stages, 1 for the layout "ranks". inv_freq: whether the buffer is written.
    """

    layout: LayoutName
    tp: int
    stages: int
    mlp_names: MlpNames
    inv_freq: InvFreq
    row_bias: str


def weight_files(
    folder: str,
    architecture: Architecture,
    config: ModelConfig,
    wholes: Mapping[str, Whole],
    shape: Shape,
    args: Mapping[str, Any],
    iteration: int,
) -> Iterator[OutputFile]:
    """Every ``.pt`` file of the folder: one a layer and rank, or one a rank, and the metadata.

    wholes: by Hugging Face name, with the vocabulary's rows and the dtype of the target.
    """
    present = [
        (weight, block)
        for weight, block in _ordered(architecture, config)
        if weight.split != "derived" or shape.inv_freq == "store"
    ]
    count = shape.stages * shape.tp
    modules: list[tuple[Any, list[OutputTensor]]] = [(None, [])] * count
    if shape.layout == "layers":
        for layer in sorted({layer_of(w, b, config.layers) for w, b in present}):
            group = [(w, b) for w, b in present if layer_of(w, b, config.layers) == layer]
            for rank in range(shape.tp):
                tensors = [_tensor(w, b, config, wholes, shape, rank) for w, b in group]
                path = f"{folder}/layer_{layer:02d}-model_{rank:02d}-model_states.pt"
                yield layout_pt(path, _state_dict(tensors), tensors)
    else:
        modules = []
        for rank in range(shape.tp):
            tensors = [
                _renamed(w, b, config, _tensor(w, b, config, wholes, shape, rank))
                for w, b in present
            ]
            modules.append((_state_dict(tensors), tensors))
    for number, (module, tensors) in enumerate(modules):
        value, states = _metadata(module, args, iteration, count, number % shape.tp)
        path = f"{folder}/mp_rank_{number:02d}_model_states.pt"
        yield layout_pt(path, value, [*tensors, *states])


def _ordered(architecture: Architecture, config: ModelConfig) -> Iterator[tuple[Weight, int]]:
    """The model's weights and derived buffers in the order of GPT-NeoX's modules."""
    real = {(weight.neox, block) for weight, block in model_weights(architecture, config)}
    for weight, block in expand(architecture, config.layers):
        if weight.split == "derived" or (weight.neox, block) in real:
            yield weight, block


def _tensor(
    weight: Weight,
    block: int,
    config: ModelConfig,
    wholes: Mapping[str, Whole],
    shape: Shape,
    rank: int,
) -> OutputTensor:
    if weight.split == "derived":
        data = inv_freq_bytes(config, config.dtype)
        size = (config.rotary_dim + 1) // 2
        return OutputTensor(weight.neox, config.dtype, (size,), inline=data)
    name = DENSE.get(weight.neox, weight.neox) if shape.mlp_names == "dense" else weight.neox
    whole = wholes[weight.hf.format(i=block)]
    return scatter(name, weight.split, whole, shape.tp, rank, row_bias=shape.row_bias)


def _renamed(weight: Weight, block: int, config: ModelConfig, tensor: OutputTensor) -> OutputTensor:
    layer = layer_of(weight, block, config.layers)
    return replace(tensor, name=f"sequential.{layer}.{tensor.name}")


def _state_dict(tensors: Sequence[OutputTensor]) -> "OrderedDict[str, TensorSlot]":
    return OrderedDict((tensor.name, TensorSlot(tensor.name)) for tensor in tensors)


def _metadata(
    module: Any, args: Mapping[str, Any], iteration: int, count: int, tp_rank: int
) -> tuple[dict[str, Any], list[OutputTensor]]:
    """The dictionary of an mp_rank file, and its tensors: random states as bytes."""
    states = {
        "torch_rng_state": random_states.torch_state(SEED),
        "cuda_rng_state": random_states.cuda_state(SEED),
        "model-parallel-rng": random_states.cuda_state(
            random_states.model_parallel_seed(SEED, tp_rank)
        ),
    }
    value = {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": None,
        "frozen_param_shapes": None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": set(),
        "skipped_steps": 0,
        "global_steps": iteration,
        "global_samples": 0,
        "dp_world_size": 1,
        "mp_world_size": count,
        "ds_config": {},
        "ds_version": f"neox-bridge {__version__}",
        "iteration": iteration,
        "args": dict(args),
        "random_rng_state": random_states.python_state(SEED),
        "np_rng_state": random_states.numpy_state(SEED),
        "torch_rng_state": TensorSlot("torch_rng_state"),
        "cuda_rng_state": TensorSlot("cuda_rng_state"),
        "rng_tracker_states": {"model-parallel-rng": TensorSlot("model-parallel-rng")},
    }
    tensors = [
        OutputTensor(name, "uint8", (len(data),), inline=data) for name, data in states.items()
    ]
    return value, tensors
