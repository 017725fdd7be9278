"""The parameters of a run as GPT-NeoX of another date names and orders them."""

from neox_bridge.architectures.base import Weight
from neox_bridge.frameworks.module_order import in_module_order
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.universal_folder import Parameter
from neox_bridge.optimizer.states import Optimizer
from neox_bridge.planning.neox_files import RankLayout, parameter_rows


def target_parameters(
    checkpoint: Checkpoint, optimizer: Optimizer, layout: RankLayout
) -> dict[Parameter, Parameter]:
    """Maps each parameter of the target to one of the source that holds the same weights.

    Trees before neox-mlp-names name the layers of the MLP otherwise, and hold the two halves of
    a gated MLP as two parameters, so a parameter of one side may belong to two of the other. Both
    are in one parameter group.

    Args:
        checkpoint: The source, whose optimizer states have names by parameter.
        optimizer: Its states.
        shape: How the target is laid out.

    Returns:
        The source's parameter by the target's, in the order of the target's flat groups.
    """
    state = checkpoint.neox
    assert state is not None
    stored = {(layer, name): None for layer, names in state.ranks[0].items() for name in names}
    place = {parameter: index for index, parameter in enumerate(in_module_order(stored))}
    sources: dict[Parameter, Parameter] = {}
    for row in parameter_rows(checkpoint.architecture, checkpoint.config):
        target = row.layer, row.weight.named(layout.old_names)
        names = _names(row.weight, old=state.mlp_names == "dense")
        source = next((p for n in names if (p := (row.layer, n)) in optimizer.members), None)
        if source is not None:
            sources.setdefault(target, source)
    ordered = in_module_order(dict(sorted(sources.items(), key=lambda item: item[0][0])))
    return dict(sorted(ordered.items(), key=lambda item: place.get(item[1], 0)))


def _names(weight: Weight, *, old: bool) -> list[str]:
    """The names that the source may have for it."""
    return [name for name in (weight.named(old), weight.also) if name]
