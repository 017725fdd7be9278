"""Finds the order of parameters in a flat ZeRO group if its files do not record it completely.

Since DeepSpeed 0.5.4, ``param_shapes`` is a list of parameter groups. Before, it is one mapping of
all parameters; before 0.3.14, it does not exist. The parameters are then grouped by the rule of
GPT-NeoX: megatron/model/utils.py, get_params_for_weight_decay_optimization, the same from 2021 to
v1.0.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from neox_bridge.architectures.pipeline_stages import holds, stages_of
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.deepspeed_values import shapes
from neox_bridge.layouts.transformer_engine import stored_name
from neox_bridge.layouts.universal_folder import Parameter
from neox_bridge.tensors.pieces import Shape
from neox_bridge.wording import plural

_WITHOUT_DECAY = ("mixer.A_log", "mixer.D")  # _no_weight_decay of megatron/model/mamba/mamba.py
_RWKV_NORMS = ("ln1", "ln2")  # LayerNorm of megatron/model/rwkv/v6/rwkv.py; ln_x is a GroupNorm
_Name = TypeVar("_Name", str, Parameter)
Groups = tuple[Mapping[str, Shape], ...]  # parameters under DeepSpeed's names

OrderSource = Literal["groups", "parameters", "weights"]
"""Where the order of the parameters is from.

"groups": a file lists them by group. "parameters": a file lists them all, and GPT-NeoX's rule
divides them. "weights": no file lists them, so they are taken in the order of the weights.
"""


def parameter_order(
    checkpoint: Checkpoint,
    number: int,
    recorded: Sequence[tuple[str, Mapping[str, Any]]],
    count: int,
    path: str,
) -> tuple[Groups, OrderSource]:
    """The parameters of a model-parallel rank in flat-group order, and the source of that order.

    Args:
        number: The number of the mp_rank file.
        count: The number of groups in the optimizer states in ``path``.
        recorded: The dictionaries that may contain ``param_shapes``, each with its file; the first
            one that does is used.
    """
    for file, values in recorded:
        value = values.get("param_shapes")
        if isinstance(value, list | tuple):
            groups = shapes(values, file)
            if len(groups) != count:
                raise BridgeError(
                    f"{path} has {plural(count, 'parameter group')}, and param_shapes of {file} "
                    f"has {len(groups)}. They may be from different saves. Copy the checkpoint "
                    "again."
                )
            return tuple(groups), "groups"
        if value is not None:
            (all_shapes,) = shapes({"param_shapes": [value]}, file)
            return divided(all_shapes, count, path), "parameters"
    stage, rank = divmod(number, checkpoint.neox_state.tp)
    stored = stored_parameters(checkpoint, source_bounds(checkpoint)[stage], rank)
    named = {f"{layer}.{name}": shape for (layer, name), shape in stored.items()}
    return divided(named, count, path), "weights"


def source_bounds(checkpoint: Checkpoint) -> list[range]:
    """The layers of each pipeline stage of the source; all layers in one without stages."""
    state = checkpoint.neox_state
    count = checkpoint.config.head_layer + 1
    if state.pp > count:
        raise BridgeError(
            f"{state.folder} has the mp_rank files of {state.pp} pipeline stages, but GPT-NeoX "
            f"divides this model into {count} layers. Some files may be left over from another "
            "layout. Keep the files of one layout."
        )
    layers = state.ranks[0].items()
    return stages_of(
        checkpoint.architecture,
        checkpoint.config,
        checkpoint.raw,
        state.pp,
        lambda: ((layer, ref.shape) for layer, tensors in layers for ref in tensors.values()),
    )


def stored_parameters(checkpoint: Checkpoint, layers: range, rank: int) -> dict[Parameter, Shape]:
    """The parameters of a tensor-parallel rank in a stage, in order, with their local shapes.

    Their names are those in the files.
    """
    used = {piece.source for whole in checkpoint.trained.values() for piece in whole.pieces}
    stored, modules = checkpoint.neox_state.ranks[rank], checkpoint.neox_state.te
    return {
        (layer, stored_name(name, modules)): ref.shape
        for layer in sorted(stored)
        if holds(checkpoint.config, layers, layer)
        for name, ref in stored[layer].items()
        if ref in used
    }


def divided(
    named: Mapping[_Name, Shape], count: int, path: str
) -> tuple[Mapping[_Name, Shape], ...]:
    """The parameters in the groups of GPT-NeoX: those with weight decay, then norms and biases.

    GPT-NeoX makes one group of all parameters if ``weight_decay`` is 0. Their order does not
    change.

    Args:
        named: The parameters by DeepSpeed's name, or by layer and name.
        path: The file that the error message names.
    """
    if count == 1:
        return (named,)
    if count != 2:
        raise Refused(
            f"{path} has {count} parameter groups, but GPT-NeoX writes one or two. Another "
            "program grouped these parameters, so they cannot be assigned. Convert only the "
            "weights."
        )
    still = {name: shape for name, shape in named.items() if is_without_decay(name)}
    return {name: shape for name, shape in named.items() if name not in still}, still


def is_without_decay(parameter: str | Parameter) -> bool:
    """Whether GPT-NeoX exempts a parameter from weight decay.

    It exempts biases, the parameters of norm modules, and parameters that their module marks. It
    does not exempt Transformer Engine's ``layer_norm_weight`` and ``fc1_bias``, although they have
    one dimension.
    """
    name = parameter if isinstance(parameter, str) else parameter[1]
    module, _, leaf = name.rpartition(".")
    kind = module.rpartition(".")[2]
    is_norm = "norm" in kind or kind in _RWKV_NORMS
    return leaf == "bias" or is_norm or name.endswith(_WITHOUT_DECAY)


def dealt_out(named: Mapping[str, Shape], dp: int) -> Mapping[str, Shape]:
    """The parameters of a group in round-robin order over the ranks.

    Parameter i belongs to rank i % dp, and the parameters of a rank are contiguous (DeepSpeed 0.4.2
    runtime/zero/stage2.py, _round_robin_reorder). named: the parameters in the order of the model.
    """
    items = list(named.items())
    return dict(item for rank in range(dp) for item in items[rank::dp])
