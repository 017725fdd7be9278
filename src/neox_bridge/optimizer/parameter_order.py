"""Which parameters a flat group of ZeRO's holds, in which order, where its files do not say it all.

Since DeepSpeed 0.5.4 ``param_shapes`` is a list of parameter groups. Before, it is one mapping of
all parameters, and before 0.3.14 there is none. GPT-NeoX's own rule then divides the parameters:
megatron/model/utils.py, get_params_for_weight_decay_optimization, the same from 2021 to v1.0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from neox_bridge.errors import BridgeError, Refused
from neox_bridge.layouts.checkpoint import Checkpoint, NeoxState
from neox_bridge.layouts.deepspeed_values import shapes
from neox_bridge.optimizer.read_stage0 import source_bounds, stored_parameters
from neox_bridge.tensors.pieces import Shape

OrderSource = Literal["groups", "parameters", "weights"]
"""Where the order of the parameters is from.

"groups": a file lists them by group. "parameters": a file lists them all, and GPT-NeoX's rule
divides them. "weights": no file lists them, so they are taken in the order of the weights.
"""


@dataclass(frozen=True)
class ParameterOrder:
    """The parameters of one model-parallel rank by group, under DeepSpeed's names, with shapes."""

    groups: tuple[Mapping[str, Shape], ...]
    source: OrderSource


def parameter_order(
    checkpoint: Checkpoint,
    number: int,
    recorded: Sequence[tuple[str, Mapping[str, Any]]],
    count: int,
    path: str,
) -> ParameterOrder:
    """The parameters of a model-parallel rank, in the order of its flat groups.

    Args:
        number: of the mp_rank file.
        recorded: the dictionaries that may hold ``param_shapes``, each with its file; the first
            one that does counts.
        count: how many groups the optimizer states have.
        path: the file of those states, for messages.

    Raises:
        BridgeError: ``param_shapes`` is not what DeepSpeed writes, or has another number of groups.
        Refused: there are more groups than GPT-NeoX makes.
    """
    for file, values in recorded:
        value = values.get("param_shapes")
        if isinstance(value, list | tuple):
            groups = shapes(values, file)
            if len(groups) != count:
                raise BridgeError(
                    f"{path} has {count} parameter groups, and param_shapes of {file} has "
                    f"{len(groups)}. Are they of one save?"
                )
            return ParameterOrder(tuple(groups), "groups")
        if value is not None:
            (all_shapes,) = shapes({"param_shapes": [value]}, file)
            return ParameterOrder(divided(all_shapes, count, path), "parameters")
    assert checkpoint.neox is not None
    return ParameterOrder(
        divided(_shapes_of_weights(checkpoint, checkpoint.neox, number), count, path), "weights"
    )


def divided(named: Mapping[str, Shape], count: int, path: str) -> tuple[Mapping[str, Shape], ...]:
    """The parameters in GPT-NeoX's groups: those that decay, then the norms and the biases.

    GPT-NeoX makes one group of all parameters if ``weight_decay`` is 0. It keeps their order.
    """
    if count == 1:
        return (named,)
    if count != 2:
        raise Refused(
            f"{path} has {count} parameter groups, and GPT-NeoX makes one or two. Another program "
            "divided these parameters, so they cannot be assigned. Convert the weights alone."
        )
    return (
        {name: shape for name, shape in named.items() if not is_without_decay(name)},
        {name: shape for name, shape in named.items() if is_without_decay(name)},
    )


def dealt_out(named: Mapping[str, Shape], dp: int) -> Mapping[str, Shape]:
    """A group's parameters in the order in which they lie where they were dealt out to the ranks.

    Parameter i belongs to rank i % dp, and the parameters of a rank lie one behind the other
    (DeepSpeed 0.4.2 runtime/zero/stage2.py, _round_robin_reorder).

    Args:
        named: in the order of the model.
        dp: data-parallel ranks.
    """
    items = list(named.items())
    return dict(item for rank in range(dp) for item in items[rank::dp])


def is_without_decay(name: str) -> bool:
    """Whether GPT-NeoX exempts a parameter from weight decay: a bias, or any of a norm."""
    module, _, leaf = name.rpartition(".")
    return leaf == "bias" or "norm" in module.rpartition(".")[2]


def _shapes_of_weights(checkpoint: Checkpoint, state: NeoxState, number: int) -> dict[str, Shape]:
    """A rank's parameters in the order of its weight files, named as in a pipeline."""
    stage, rank = divmod(number, state.tp)
    bounds = source_bounds(checkpoint)
    named = stored_parameters(checkpoint, bounds[stage], rank)
    return {f"{layer}.{name}": shape for (layer, name), shape in named.items()}
