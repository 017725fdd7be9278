"""A run with pipe_parallel_size: 0 goes on with stages as it was: its window never counted."""

from pathlib import Path

import pytest
import yaml
from real_training import PRECISION, TOLERANCE, Layout, apart, losses, start
from resharding import reshard

pytestmark = pytest.mark.neox
RANKS, LAYERS = Layout(1, 0, 1), Layout(1, 1, 1)


def test_a_window_that_never_counted(neox_python: str, tmp_path: Path) -> None:
    """The losses agree without the window, and differ if the resumed yml still names it."""
    settings = {**PRECISION["fp32"], "gpt_j_residual": True, "sliding_window_width": 2}
    run = tmp_path / "ranks" / "run"
    yml = str(start(tmp_path / "ranks", RANKS, settings))
    jobs = [
        {"yml": yml, "losses": 6, "save": str(run)},
        {"yml": yml, "losses": 3, "set": {"load": str(run)}},
    ]
    _, want = losses(neox_python, RANKS, jobs, tmp_path / "ranks")
    reshard(run, tmp_path / "layers", pp=1)
    resume = tmp_path / "layers" / "resume.yml"
    assert "sliding_window_width" not in yaml.safe_load(resume.read_text())
    jobs = [
        {"yml": str(resume), "losses": 3},
        {"yml": str(resume), "losses": 3, "set": {"sliding_window_width": 2}},
    ]
    resumed, windowed = losses(neox_python, LAYERS, jobs, tmp_path / "jobs")
    assert max(map(apart, want, resumed)) <= TOLERANCE["fp32"]
    assert apart(want[0], windowed[0]) > 100 * TOLERANCE["fp32"]
