"""Renames and reorders the parameters of a run for another GPT-NeoX version."""

from dataclasses import replace

from neox_bridge.frameworks.module_order import in_module_order
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.transformer_engine import te_name
from neox_bridge.layouts.universal_folder import Parameter
from neox_bridge.optimizer.states import Optimizer
from neox_bridge.planning.neox_files import RankLayout, parameter_rows


def with_target_names(
    checkpoint: Checkpoint, optimizer: Optimizer, layout: RankLayout
) -> Optimizer:
    """The optimizer with parameters that have the names and the flat-group order of the target.

    Versions before neox-mlp-names have other names for the layers of the MLP, and store the two
    halves of a gated MLP as two parameters. So one parameter of one side may correspond to two of
    the other. Both are in one parameter group.
    """
    state = checkpoint.neox_state
    stored = {(layer, name): None for layer, names in state.ranks[0].items() for name in names}
    place = {parameter: index for index, parameter in enumerate(in_module_order(stored))}
    sources: dict[Parameter, Parameter] = {}
    for row in parameter_rows(checkpoint.architecture, checkpoint.config):
        target_name = row.weight.named(layout.old_names)
        target = row.layer, te_name(target_name) if layout.te else target_name
        names = (row.weight.named(state.mlp_names == "dense"), row.weight.also)
        source = next((p for n in names if (p := (row.layer, n)) in optimizer.members), None)
        if source is not None:
            sources.setdefault(target, source)
    ordered = in_module_order(dict(sorted(sources.items(), key=lambda item: item[0][0])))
    by_place = sorted(ordered.items(), key=lambda item: place.get(item[1], 0))
    members = {target: optimizer.members[source] for target, source in by_place}
    return replace(optimizer, members=members)
