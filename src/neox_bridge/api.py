"""The public verbs: they compose opening, planning, execution and verification."""

from collections.abc import Sequence

from neox_bridge.layouts import open as layouts
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.planning.make import make_plan
from neox_bridge.planning.options import Options
from neox_bridge.planning.plan import Plan
from neox_bridge.tensors.fused import GqaOrder


def open_checkpoint(
    source: str,
    *,
    revision: str | None = None,
    step: int | None = None,
    configs: Sequence[str] = (),
    gqa_order: GqaOrder | None = None,
    masters: bool = False,
) -> Checkpoint:
    """Open a checkpoint without reading a tensor. Nothing in it is executed.

    Args:
        source: A folder of either kind, its URL, or ``ORG/NAME[@REVISION]`` on the Hub.
        revision: A branch, tag or commit of a model on the Hub.
        step: The step of a GPT-NeoX run; by default the one that ``latest`` names.
        configs: The yml files of a GPT-NeoX checkpoint that has none of its own.
        gqa_order: The order of the rows of grouped-query attention, if the files do not tell it.
        masters: Read the optimizer's fp32 master weights in place of the stored weights.

    Raises:
        BridgeError: The source is missing, damaged, or no checkpoint that this package knows.
        Refused: The source is a checkpoint that cannot be represented.
    """
    checkpoint = layouts.open_checkpoint(
        source, revision=revision, step=step, configs=configs, gqa_order=gqa_order
    )
    if not masters:
        return checkpoint
    from neox_bridge.optimizer.masters import with_masters

    return with_masters(checkpoint)


def plan(checkpoint: Checkpoint, options: Options, target: str) -> Plan:
    """Say everything that a conversion will write, before a byte is written.

    Args:
        checkpoint: What ``open_checkpoint`` returned.
        options: What to write, and how.
        target: The folder or URL to be written; the yml of a GPT-NeoX target names it.

    Raises:
        Refused: The target cannot express the source; the message has every reason.
        UsageError: Options that do not apply to this conversion, or contradict each other.
    """
    if options.optimizer != "fresh":
        return make_plan(checkpoint, options, target)
    from neox_bridge.optimizer.fresh import fresh

    return make_plan(checkpoint, options, target, fresh)
