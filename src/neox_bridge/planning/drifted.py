"""What a plan says of biases that drifted apart between the source's ranks."""

from dataclasses import replace

from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.rank_biases import drifted_biases, row_bias_names
from neox_bridge.planning.plan import Plan


def with_drifted_biases(plan: Plan, checkpoint: Checkpoint) -> Plan:
    """The plan with a warning where it writes the mean of biases that differ between ranks.

    A GPT-NeoX target of as many tensor-parallel ranks keeps each rank's own.
    """
    state = checkpoint.neox
    if state is None or plan.target.get("tensor_parallel") == state.tp:
        return plan
    drifted = drifted_biases(checkpoint)
    if drifted is None:
        return plan
    return replace(
        plan,
        findings=(*plan.findings, drifted.finding()),
        known_deviations=row_bias_names(checkpoint.architecture),
    )
