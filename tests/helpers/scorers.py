"""Classification models made by transformers, and the scores that they give."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import TINY_LLAMA, TINY_MODELS

if TYPE_CHECKING:
    import torch


def make_scorer(folder: Path, family: str = "gpt_neox", labels: int = 1, **config: Any) -> Path:
    """A classification model made and saved by transformers, with every tensor random."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    tiny = TINY_MODELS.get(family, TINY_LLAMA)
    made = {**tiny, "num_labels": labels, "pad_token_id": 0, **config}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **made))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def scores(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """[b, s, 1]: the model's score of every beginning of every text, text by text."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model, told = AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        rows = [
            [model.eval()(row[None, : end + 1]).logits[0] for end in range(len(row))]
            for row in tokens
        ]
    return torch.stack([torch.stack(row) for row in rows])
