"""Checks the values in optimizer files as they are read, so that later code can rely on them.

Every function raises BridgeError, which names the file and the key, for a value that neither
DeepSpeed nor GPT-NeoX writes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.formats.pickles import Record
from neox_bridge.layouts.untrusted import CONFIGS, count, mapping, number, sequence, unexpected
from neox_bridge.tensors.dtypes import FLOATING
from neox_bridge.tensors.pieces import Shape
from neox_bridge.tensors.tensor_ref import TensorRef

MOST_NUMBER = 1e15  # of a learning-rate schedule's numbers
_MOST_RANKS = 1 << 20
_MOST_DIMENSIONS = 8
_LARGEST_SIZE = 1 << 48  # of a dimension
_BATCH = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)
_SCALER = ("cur_scale", "cur_iter", "scale_factor", "scale_window", "min_scale", "min_loss_scale")
_HALF = ("loss_scale", "min_loss_scale", "hysteresis")


def check_meta(meta: Mapping[str, Any], path: str) -> None:
    """Check the parts of an mp_rank file that reading or resharding an optimizer uses."""
    ranks = count(meta, "dp_world_size", path)
    if ranks is not None and ranks > _MOST_RANKS:
        raise unexpected(path, "dp_world_size", ranks, "a number of GPUs")
    version = meta.get("ds_version")
    if version is not None and not (isinstance(version, str) and len(version) <= 100):
        raise unexpected(path, "ds_version", version, "a version")
    check_config(mapping(meta, "ds_config", path), path, "ds_config.")
    for name in sequence(meta, "buffer_names", path):
        if not isinstance(name, str):
            raise unexpected(path, "buffer_names", name, "a list of names")
    for name, state in mapping(meta, "rng_tracker_states", path).items():
        if not isinstance(state, TensorRef):
            raise unexpected(path, f"rng_tracker_states.{name}", state, "a tensor")
    if meta.get("optimizer") is not None:
        mapping(meta, "optimizer", path)
    if meta.get("param_shapes") is not None:
        shapes(meta, path)


def check_settings(raw: Mapping[str, Any], folder: str) -> None:
    """Check the settings of a run's yml that go into an optimizer or its batch."""
    path = f"{folder}{CONFIGS}"
    check_config(raw, path, "")
    for key in ("pipe_partition_method",):
        if raw.get(key) is not None and not isinstance(raw[key], str):
            raise unexpected(path, key, raw[key], "a text")
    for key in ("checkpoint", "data_types"):
        mapping(raw, key, path)


def check_config(config: Mapping[str, Any], path: str, prefix: str) -> None:
    """Check what DeepSpeed's settings and GPT-NeoX's have in common."""
    for key in (*_BATCH, "gas"):
        count(config, key, path, prefix + key)
    for key in ("gradient_clipping", "weight_decay"):
        number(config, key, path, prefix + key)
    zero = mapping(config, "zero_optimization", path, f"{prefix}zero_optimization")
    number(zero, "stage", path, f"{prefix}zero_optimization.stage")
    for key in ("fp16", "bf16", "bfloat16"):
        half = mapping(config, key, path, prefix + key)
        for name in _HALF if key == "fp16" else ():
            number(half, name, path, f"{prefix}{key}.{name}")
    optimizer = mapping(config, "optimizer", path, f"{prefix}optimizer")
    kind = optimizer.get("type")
    if kind is not None and not isinstance(kind, str):
        raise unexpected(path, f"{prefix}optimizer.type", kind, "a name")
    params = mapping(optimizer, "params", path, f"{prefix}optimizer.params")
    for key in ("eps", "weight_decay"):
        number(params, key, path, f"{prefix}optimizer.params.{key}")


def shapes(meta: Mapping[str, Any], path: str) -> list[Mapping[str, Shape]]:
    """``param_shapes``: the shape of each parameter by its name, for each group."""
    groups: list[Mapping[str, Shape]] = []
    for index, group in enumerate(sequence(meta, "param_shapes", path)):
        if not isinstance(group, dict):
            raise unexpected(path, f"param_shapes[{index}]", group, "a mapping of names to shapes")
        groups.append(
            {_name(name, path): _shape(shape, name, path) for name, shape in group.items()}
        )
    return groups


def _name(name: object, path: str) -> str:
    if not isinstance(name, str):
        raise unexpected(path, "a name in param_shapes", name, "a text")
    return name


def _shape(shape: object, name: str, path: str) -> Shape:
    sizes = shape if isinstance(shape, list | tuple) and len(shape) <= _MOST_DIMENSIONS else None
    if sizes is None or not all(type(n) is int and 0 <= n <= _LARGEST_SIZE for n in sizes):
        raise unexpected(path, f"param_shapes: {name}", shape, "a shape")
    return tuple(sizes)


def parameter_groups(base: Mapping[str, Any], path: str) -> list[Mapping[str, Any]]:
    """``param_groups``, each with its hyperparameters by name."""
    groups = sequence(base, "param_groups", path)
    for index, group in enumerate(groups):
        if not isinstance(group, dict) or not all(isinstance(key, str) for key in group):
            raise unexpected(path, f"param_groups[{index}]", group, "a mapping of names to values")
        for key in ("eps", "weight_decay"):
            number(group, key, path, f"param_groups[{index}].{key}")
        name = group.get("name")
        if name is not None and not isinstance(name, str):
            raise unexpected(path, f"param_groups[{index}].name", name, "a text")
    return list(groups)


def check_betas(betas: object, path: str) -> list[float]:
    """Adam's two decay rates, as the yml has them."""
    name, pair = "optimizer.params.betas", "a pair of numbers from 0 to 1"
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise unexpected(path, name, betas, pair)
    values = [number({"beta": beta}, "beta", path, name) for beta in betas]
    if any(value is None or value > 1 for value in values):
        raise unexpected(path, name, betas, pair)
    return [float(value) for value in values if value is not None]


def numbers_of(group: Mapping[str, Any], index: int, path: str) -> Sequence[int]:
    """The numbers of a group's parameters."""
    numbers = sequence(group, "params", path, f"param_groups[{index}].params")
    for value in numbers:
        if type(value) is not int:
            raise unexpected(path, f"param_groups[{index}].params", value, "a list of numbers")
    return numbers


def states_of(base: Mapping[str, Any], number: int, path: str) -> Mapping[str, Any]:
    """The states of a parameter or a flat group, by their names; empty if there are none."""
    states = base.get("state")
    if not isinstance(states, dict):
        raise unexpected(path, "state", states, "a mapping of numbers to states")
    entry = states.get(number)
    if entry is None:
        return {}
    if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry):
        raise unexpected(path, f"state[{number}]", entry, "a mapping of names to values")
    return entry


def check_head(head: Mapping[str, Any], path: str) -> None:
    """Check what an optimizer has beside states: clipping and loss scaler."""
    number(head, "clip_grad", path)
    scaler = head.get("loss_scaler")
    if scaler is not None:
        state = scaler.state if isinstance(scaler, Record) else None
        if not isinstance(state, dict):
            raise unexpected(path, "loss_scaler", scaler, "a loss scaler")
        for key in _SCALER:
            number(state, key, path, f"loss_scaler.{key}")
    for key in _SCALER:
        number(head, key, path)


def check_stage0_scaler(head: Mapping[str, Any], path: str) -> None:
    """Check the loss scaler that stands in a stage 0 optimizer's own dictionary."""
    check_head(head, path)
    wanted = ["cur_scale"]
    if head.get("dynamic_loss_scale"):
        wanted += ["cur_iter", "last_overflow_iter", "scale_factor", "scale_window"]
    for key in wanted:
        value = head.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise unexpected(path, f"optimizer.{key}", value, "a number")


def check_tensor(key: str, value: object, path: str) -> TensorRef:
    """A state of a parameter's size, which is a tensor of floating dtype."""
    if not isinstance(value, TensorRef):
        raise unexpected(path, key, value, "a tensor")
    if value.dtype not in FLOATING:
        raise BridgeError(
            f"{path}: {key} has the dtype {value.dtype}, but only floating-point optimizer "
            "states, such as those of Adam, can be read. Convert only the weights."
        )
    return value
