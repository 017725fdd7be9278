"""Trains with sequence_parallel: true; its biases drift apart where the ranks should share them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from real_training import PRECISION, Layout, losses, start

from common import neox_config, neox_ranks  # isort: skip

import reference_logits

from neox_bridge.api import open_checkpoint
from neox_bridge.layouts.rank_biases import drifted_biases

pytestmark = pytest.mark.neox


@pytest.mark.parametrize("parallel", [False, True])
def test_biases_drift_apart(parallel: bool, neox_python: str, tmp_path: Path) -> None:
    """Only with gpt_j_residual: false is that another model on each rank."""
    settings = {**PRECISION["fp32"], "gpt_j_residual": parallel, "sequence_parallel": True}
    settings["seq_length"] = settings["max_position_embeddings"] = 24
    run = tmp_path / "run"
    yml = str(start(tmp_path / "start", Layout(2, 1, 1), settings))
    jobs = [
        {"yml": yml, "losses": 9, "save": str(run)},
        {"yml": yml, "losses": 0, "logits": str(tmp_path / "x.npz"), "set": {"load": str(run)}},
    ]
    losses(neox_python, Layout(2, 1, 1), jobs, tmp_path / "jobs")
    drifted = drifted_biases(open_checkpoint(str(run)))
    assert (drifted is None) is parallel
    if drifted is None:
        return
    assert (drifted.count, drifted.sequence_parallel) == (4, True)
    assert drifted.largest > 1e-3
    with np.load(tmp_path / "x.npz") as file:
        tokens, logits = torch.from_numpy(file["tokens"]), torch.from_numpy(file["logits"])
    computed = reference_logits.forward(neox_ranks(run), neox_config(run), tokens)
    assert float((computed - logits).abs().max()) <= 1e-5
