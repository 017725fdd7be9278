"""Raw checkpoints as they are published: the files of one step flat in a folder of any name."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from common import convert, hf_logits

from neox_bridge.layouts.open import open_checkpoint

PUBLISHED = Path(__file__).parent / "data" / "published"


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """A copy of a published step in a folder whose name tells nothing."""
    return Path(shutil.copytree(PUBLISHED / "v1_dp2" / "flat", tmp_path / "downloaded"))


@pytest.mark.parametrize("name", ["v1_dp2", "v1_dp4_intervals"])
def test_logits_agree_with_gpt_neox_v1(name: str, tmp_path: Path) -> None:
    convert(PUBLISHED / name / "flat", tmp_path / "hf", dtype="float32")
    with np.load(PUBLISHED / name / "logits.npz") as file:
        tokens = torch.from_numpy(file["tokens"])
        logits = torch.from_numpy(file["logits_fp32"])
    computed = hf_logits(tmp_path / "hf", tokens)[..., : logits.shape[-1]]
    assert float((computed - logits).abs().max()) < 4e-6


def test_a_flat_folder_is_its_own_root(flat: Path) -> None:
    state = open_checkpoint(str(flat)).neox
    assert state is not None
    assert (state.root, state.folder, state.flat) == (str(flat), str(flat), True)
    assert (state.step, state.iteration, state.named_step) == ("global_step8", 8, None)
