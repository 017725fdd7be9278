"""Genuine GPT-NeoX checkpoints in which one file is replaced by a hostile one."""

import os
from pathlib import Path

from common import fixture, step_of

TWO_RANKS, ONE_RANK = "pythia_fp32_pp1_tp2", "pythia_fp32_fused_gelu_tp1"
LAYER, RANK = "layer_02-model_00-model_states.pt", "mp_rank_00_model_states.pt"


def checkpoint_with(folder: Path, file: str, data: bytes, name: str = TWO_RANKS) -> Path:
    """A genuine checkpoint in which one file is hostile."""
    source, copy = fixture(name), folder / "run"
    for path in source.rglob("*"):
        to = copy / path.relative_to(source)
        to.mkdir(parents=True) if path.is_dir() else (
            to.parent.mkdir(parents=True, exist_ok=True),
            os.link(path, to),
        )
    target = step_of(copy) / file
    target.unlink()
    target.write_bytes(data)
    return copy
