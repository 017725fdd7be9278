"""Universal checkpoints: held against what DeepSpeed writes, and loaded by the real GPT-NeoX."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import real_neox
from common import convert, make_hf
from real_training import BATCH, LAYOUTS, PRECISION, TOLERANCE, Layout, apart, asked, losses, start
from resharding import ZERO, differences, inside, reshard

from neox_bridge.formats.torch_file import read_torch

pytestmark = pytest.mark.neox

SCRIPT = Path(__file__).parent / "to_universal.py"
MP_RANK = "mp_rank_00_model_states.pt"


def held_against_deepspeeds(python: str, source: Path, folder: Path) -> list[str]:
    """Where our files differ from those of ds_to_universal.py, which is told our patterns."""
    reshard(source, folder / "mine", universal=True)
    mine, theirs = inside(folder / "mine"), folder / "their" / "universal"
    theirs.parent.mkdir()
    step = source / (source / "latest").read_text()
    command = [python, str(SCRIPT), str(step), str(theirs), str(mine / MP_RANK)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = [{str(p.relative_to(root)) for p in root.rglob("*.pt")} for root in (mine, theirs)]
    assert names[0] == names[1]
    found = []
    for name in sorted(names[0]):
        pair = [read_torch(str(root / name)) for root in (mine, theirs)]
        found += list(differences(*pair, name))
    # without stages DeepSpeed copies the weights in the mp_rank files too, and reads them nowhere
    return [line for line in found if ".pt.module: None" not in line]


@pytest.mark.parametrize("source", ZERO, ids=lambda path: path.name)
def test_the_files_are_deepspeeds(source: Path, neox_python: str, tmp_path: Path) -> None:
    """Every file, key, shape and bit, of genuine runs."""
    assert held_against_deepspeeds(neox_python, source, tmp_path) == []


@pytest.mark.parametrize("heads", [2, 4])
def test_fused_ones_are_deepspeeds(heads: int, neox_python: str, tmp_path: Path) -> None:
    """Gated MLPs and grouped-query attention, whose tensors are several in one."""
    made = make_hf(tmp_path / "hf", family="llama", num_key_value_heads=heads)
    hf = real_neox.with_tokenizer(made)
    convert(hf, tmp_path / "run", tp=2, optimizer="fresh")
    assert held_against_deepspeeds(neox_python, tmp_path / "run", tmp_path) == []


@pytest.mark.parametrize(
    ("precision", "residual"),
    [(precision, residual) for precision in PRECISION for residual in ("parallel", "sequential")],
)
def test_they_load(precision: str, residual: str, neox_python: str, tmp_path: Path) -> None:
    """One written for each layout; and one of them on other DP and PP than it was written for.

    The losses of the run that went on by itself, but after the first step where another TP moves
    biases otherwise.
    """
    settings = {**PRECISION[precision], "gpt_j_residual": residual == "parallel"}
    own = Layout(2, 1, 2)
    yml, run = str(start(tmp_path / "run", own, settings)), tmp_path / "run" / "run"
    jobs: list[dict[str, Any]] = [
        {"yml": yml, "losses": 9, "alike": True, "save": str(run)},
        {"yml": yml, "losses": 3, "alike": True, "set": {"load": str(run)}},
    ]
    _, want = losses(neox_python, own, jobs, tmp_path / "run")
    allowed, wrong = TOLERANCE[precision], []
    tries = [(target, target) for target in LAYOUTS]
    tries += [(Layout(2, 1, 2), Layout(2, 1, 1)), (Layout(2, 1, 2), Layout(2, 2, 1))]
    for written, target in tries:
        new = tmp_path / str(written)
        if not new.exists():
            reshard(run, new, **asked(own, written), universal=True)
        here = {**BATCH, "pipe_parallel_size": target.pp}
        job = {"yml": str(new / "resume_universal.yml"), "losses": 3, "alike": True, "set": here}
        (mine,) = losses(neox_python, target, [job], tmp_path / f"{written} on {target}")
        steps = (0, 1, 2) if residual == "sequential" or target.tp == own.tp else (0,)
        if any(apart(want[n], mine[n]) > allowed for n in steps):
            wrong.append((str(written), str(target), want, mine))
    assert wrong == []
