"""The logits alone of the torch reference, which gives every stage of a model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from neox_bridge.verification import reference


def forward(
    ranks: Sequence[Mapping[str, torch.Tensor]],
    config: Mapping[str, Any],
    tokens: torch.Tensor,
    *,
    gqa_order: str = "grouped",
    rms_eps: str = "inside",
) -> torch.Tensor:
    """The last stage's output; see ``reference.stages``."""
    meant = {**config, "gqa_order": gqa_order, "rms_eps": rms_eps}
    *_, last = reference.stages(ranks, meant, tokens)
    return last.output
