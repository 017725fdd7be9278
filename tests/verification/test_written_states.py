"""The check of a written optimizer: a number that came out otherwise is an error."""

from pathlib import Path

import numpy as np
import pytest
from resharding import reshard, write
from tiny import convert, write_hf

from neox_bridge.api import open_checkpoint
from neox_bridge.errors import Unverified
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.optimizer.read_files import read_optimizer
from neox_bridge.verification.optimizer import checker, fresh_checker


def spoil(root: Path, key: str) -> None:
    """Change a number of the first tensor of a state in a checkpoint's files."""
    for states in read_optimizer(open_checkpoint(str(root))).shards.values():
        ref = states[key].pieces[0].source
        assert ref is not None
        write(ref, np.float32(1e30).tobytes())
        return


@pytest.mark.parametrize(
    ("key", "message"),
    [("master", "its master weights: .*: 1 of "), ("exp_avg", "the moments of its new optimizer")],
)
def test_a_new_optimizer_is_read_back(key: str, message: str, tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf")
    root = convert(hf, tmp_path / "neox", optimizer="fresh")
    check = fresh_checker(open_checkpoint(str(hf)), lambda folder: None, workers=1)
    check(str(root))
    spoil(root, key)
    with pytest.raises(Unverified, match=f"The result does not match {hf}: {message}"):
        check(str(root))


def test_a_resharded_run_is_read_back(tmp_path: Path) -> None:
    run = convert(write_hf(tmp_path / "hf"), tmp_path / "run", optimizer="fresh")
    reshard(run, tmp_path / "new", dp=2)
    source = open_checkpoint(str(run))
    check = checker(source, read_optimizer(source), workers=1)
    check(str(tmp_path / "new"))
    spoil(tmp_path / "new", "exp_avg")
    message = rf"does not match {run}: exp_avg: gpt_neox\.embed_in\.weight: 1 of "
    with pytest.raises(Unverified, match=message):
        check(str(tmp_path / "new"))
    (path,) = (tmp_path / "new").glob("global_step*/layer_04-model_00-model_states.pt")
    ref = read_torch(str(path))["norm.weight"]  # type: ignore[index]
    write(ref, np.float32(1e30).tobytes())
    with pytest.raises(Unverified, match=r"gpt_neox\.final_layer_norm\.weight: 1 of "):
        check(str(tmp_path / "new"))
