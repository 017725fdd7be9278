"""Which order the rows of grouped-query attention have in a GPT-NeoX checkpoint.

The two orders have the same shapes (neox-gqa-order), so the tensors alone never
tell.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neox_bridge.errors import UsageError
from neox_bridge.findings import Finding, unrepeated
from neox_bridge.frameworks.changes import since
from neox_bridge.frameworks.eras import LATER_ERAS, TODAY, MlpNames, known_keys
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.tensors.fused import GqaOrder, gather_again


def told_order(
    raw: Mapping[str, Any], record: Mapping[str, Any], mlp_names: MlpNames
) -> GqaOrder | None:
    """The order as far as it is known without reading values; None if it isn't.

    From this tool's record; from the MLP's names before 2024-09; from yml keys that only trees
    after the change take.
    """
    if record.get("gqa_order") in ("grouped", "interleaved"):
        return "grouped" if record["gqa_order"] == "grouped" else "interleaved"
    if mlp_names == "dense":
        return "interleaved"
    older = {key for era in LATER_ERAS if era is not TODAY for key in known_keys(era)}
    return "grouped" if set(raw) & (known_keys(TODAY) - older) else None


def unknown_order() -> Finding:
    """What is said where the order had to be assumed."""
    return Finding(
        "gqa-order-unknown",
        "warning",
        "the row order of the grouped-query attention is unknown: GPT-NeoX changed it in "
        f"{since('neox-gqa-order')} without changing the shapes. Today's order (grouped) is "
        "assumed. With the wrong order the weights are those of another model",
        "use `gqa_order=interleaved` if an older GPT-NeoX trained the model, or "
        "`gqa_order=grouped` to confirm. To find out, compare with logits that the run "
        "computed: `neox-bridge verify --logits --tokens FILE.npz`",
        subject="GQA row order",
    )


def rms_epsilon() -> Finding:
    """What is said where an older tree is on one side and transformers on the other."""
    return Finding(
        "rms-epsilon",
        "warning",
        "this version of GPT-NeoX adds the epsilon of RMSNorm outside of the square root: x / "
        f"(rms + eps). transformers, and GPT-NeoX since {since('neox-rms-epsilon')}, add it "
        "inside: sqrt(var + eps). The logits differ by about 1e-4, which no conversion can avoid",
        subject="RMSNorm epsilon",
    )


def with_gqa_order(checkpoint: Checkpoint, order: GqaOrder) -> Checkpoint:
    """A GPT-NeoX checkpoint with its q, k and v read in this order; others as they are."""
    state, config = checkpoint.neox, checkpoint.config
    if state is None or not config.grouped_query:
        return checkpoint
    if "attention" in state.te:
        raise UsageError(
            ["gqa_order"],
            "Transformer Engine computes the attention of this checkpoint and has only one row "
            "order",
            "Leave it out.",
        )
    findings = tuple(unrepeated(checkpoint.findings, (), ["GQA row order"]))
    older = order == "interleaved" or state.mlp_names == "dense"
    if older and state.rms_eps == "inside" and checkpoint.raw.get("norm") == "rmsnorm":
        findings = (*findings, rms_epsilon())
    tensors = dict(checkpoint.tensors)
    fusion = config.fusion(order)
    for row in checkpoint.rows:
        if row.weight.split == "fused":
            tensors[row.hf] = gather_again(fusion, row.weight.part, tensors[row.hf])
    known = replace(
        state, gqa_order=order, gqa_order_known=True, rms_eps="outside" if older else state.rms_eps
    )
    return replace(checkpoint, tensors=tensors, findings=findings, neox=known)
