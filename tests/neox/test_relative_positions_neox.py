"""Relative positions in the real GPT-NeoX: one parameter of all blocks of a pipeline stage."""

from pathlib import Path
from typing import Any

import pytest
from real_training import BATCH, PRECISION, TOLERANCE, Layout, apart, losses, start
from resharding import compared, reshard

pytestmark = pytest.mark.neox
MODEL: dict[str, Any] = {"pos_emb": "rpe", "num_layers": 4}
SOURCES = {
    "two stages": (Layout(2, 2, 1), 1),
    "one stage": (Layout(1, 1, 2), 1),
    "ZeRO 3": (Layout(1, 0, 2), 3),
}
# the source, the target and its ZeRO stage
TARGETS = [
    ("two stages", Layout(1, 2, 1), 1),
    ("two stages", Layout(1, 2, 1), 0),
    ("two stages", Layout(1, 2, 2), 1),
    ("one stage", Layout(1, 0, 2), 3),
    ("one stage", Layout(1, 0, 1), 3),
    ("ZeRO 3", Layout(1, 0, 1), 3),
    ("ZeRO 3", Layout(1, 0, 2), 2),
    ("ZeRO 3", Layout(1, 0, 2), 1),
    ("ZeRO 3", Layout(2, 1, 1), 1),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_runs_go_on(precision: str, neox_python: str, tmp_path: Path) -> None:
    """Resumed runs compute the losses of the run that was not converted."""
    wanted = {}
    for name, (layout, zero) in SOURCES.items():
        settings = {**PRECISION[precision], **MODEL, "zero_optimization": {"stage": zero}}
        home = tmp_path / name
        yml, run = str(start(home, layout, settings)), str(home / "run")
        jobs = [
            {"yml": yml, "losses": 9, "alike": True, "save": run},
            {"yml": yml, "losses": 3, "alike": True, "set": {"load": run}},
        ]
        _, wanted[name] = losses(neox_python, layout, jobs, home)
    by_layout: dict[Layout, list[tuple[str, Path]]] = {}
    for name, layout, zero in TARGETS:
        if zero == 0 and precision == "bf16":
            continue  # GPT-NeoX has another optimizer there
        new = tmp_path / f"{name} to {zero} on {layout}"
        micro = BATCH["train_micro_batch_size_per_gpu"] * SOURCES[name][0].dp // layout.dp
        asked = {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp, "micro_batch": max(1, micro)}
        reshard(tmp_path / name / "run", new, zero=zero, **asked)
        by_layout.setdefault(layout, []).append((name, new))
    wrong = []
    for layout, targets in by_layout.items():
        jobs = [
            {"yml": str(new / "resume.yml"), "losses": 3, "alike": True, "set": BATCH}
            for _, new in targets
        ]
        continued = losses(neox_python, layout, jobs, tmp_path / f"jobs {layout}")
        for (name, new), have in zip(targets, continued, strict=True):
            pairs = zip(wanted[name], have, strict=True)
            if any(apart(a, b) > TOLERANCE[precision] for a, b in pairs):
                wrong.append((new.name, wanted[name], have))
    assert wrong == []


def test_another_number_of_ranks_and_back_is_the_same_files(
    neox_python: str, tmp_path: Path
) -> None:
    layout = Layout(1, 2, 1)
    yml = str(start(tmp_path / "home", layout, {**PRECISION["bf16"], **MODEL}))
    run = tmp_path / "home" / "run"
    losses(neox_python, layout, [{"yml": yml, "losses": 5, "save": str(run)}], tmp_path)
    reshard(run, tmp_path / "two", tp=2, dp=2, micro_batch=1)
    reshard(tmp_path / "two", tmp_path / "back", tp=1, dp=1, micro_batch=2)
    assert compared(run, tmp_path / "back") == []
