"""Runs of the real GPT-NeoX go on as they were where gradient_accumulation_steps changes.

Its pipeline engine (DeepSpeed 0.16.5) sums the gradients of micro-batches. Each source trains,
saves and goes on for three steps by itself; each save is resharded and goes on from the written
resume.yml alone. The global batch has the same sequences everywhere. Clipping is active in some
steps and not in others, and eps is not negligible, so that a wrong one would be noticed: where
every step is clipped, gradients of any scale are the same run.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from real_training import PRECISION, Layout, apart, losses, start
from resharding import reshard

pytestmark = pytest.mark.neox

# right pairs differ by 1.6e-7 and 1.5e-4 at most, wrong ones by 5e-4 and more
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-4, "fp16": 3e-4}
SETTINGS: dict[str, Any] = {
    "gpt_j_residual": False,
    "optimizer": {"type": "Adam", "params": {"lr": 0.03, "betas": [0.9, 0.95], "eps": 1.0e-4}},
}
CLIPPING = 1.75  # of the mean gradient, whose norm is 1.0 to 2.2 in these runs
Source = tuple[Layout, int, int]  # micro-batch, accumulation
Runs = Callable[[str, Source], tuple[Path, list[float]]]

ONCE: Source = (Layout(1, 1, 2), 2, 1)
FOUR: Source = (Layout(1, 1, 1), 1, 4)
PLAIN: Source = (Layout(1, 0, 1), 2, 2)


def run_of(python: str, source: Source, precision: str, home: Path) -> tuple[Path, list[float]]:
    """A saved run, and the losses with which it goes on by itself."""
    layout, micro, accumulation = source
    batch = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": CLIPPING * (accumulation if layout.pp else 1),
    }
    yml = str(start(home, layout, {**SETTINGS, **PRECISION[precision], **batch}))
    run = home / "run"
    jobs = [
        {"yml": yml, "losses": 6, "save": str(run)},
        {"yml": yml, "losses": 3, "set": {"load": str(run)}},
    ]
    return run, losses(python, layout, jobs, home)[1]


def resumed(python: str, root: Path, layout: Layout, **more: Any) -> list[float]:
    job = {"yml": str(root / "resume.yml"), "losses": 3, **more}
    return losses(python, layout, [job], root.parent / f"{root.name} jobs")[0]


def furthest(want: list[float], losses_: list[float]) -> float:
    return max(map(apart, want, losses_))


CASES = [
    # precision, source, target, accumulation of the target, by what its gradients are larger
    ("fp32", ONCE, Layout(1, 1, 1), 2, 2),
    ("fp32", ONCE, Layout(2, 1, 2), 1, 1),
    ("fp32", FOUR, Layout(1, 0, 2), 2, 1 / 4),
    ("fp32", FOUR, Layout(1, 1, 2), 2, 1 / 2),
    ("fp32", FOUR, Layout(2, 2, 1), 4, 1),
    ("fp32", PLAIN, Layout(2, 1, 1), 2, 2),
    ("bf16", ONCE, Layout(1, 2, 1), 2, 2),
    ("bf16", FOUR, Layout(1, 0, 1), 4, 1 / 4),
    ("fp16", ONCE, Layout(2, 1, 1), 2, 2),
    ("fp16", FOUR, Layout(1, 0, 2), 2, 1 / 4),
]


@pytest.fixture(scope="module")
def runs(neox_python: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs a source in a precision, once."""

    @cache
    def run(precision: str, source: Source) -> tuple[Path, list[float]]:
        return run_of(neox_python, source, precision, tmp_path_factory.mktemp("source") / "home")

    return run


@pytest.mark.parametrize(
    ("precision", "source", "target", "accumulation", "factor"),
    CASES,
    ids=[f"{p} {s[0]} x{s[2]} to {t} x{a}" for p, s, t, a, _ in CASES],
)
def test_the_run_goes_on(
    precision: str,
    source: Source,
    target: Layout,
    accumulation: int,
    factor: float,
    runs: Runs,
    neox_python: str,
    tmp_path: Path,
) -> None:
    run, want = runs(precision, source)
    new = tmp_path / "new"
    plan, _ = reshard(run, new, tp=target.tp, pp=target.pp, dp=target.dp)
    assert f"gradient_accumulation_steps: {accumulation}\n" in (new / "resume.yml").read_text()
    warned = [f.severity for f in plan.findings if f.code == "gradient-scale"]
    assert ("warning" in warned) == (factor != 1)
    assert furthest(want, resumed(neox_python, new, target)) <= TOLERANCE[precision]


@pytest.mark.parametrize(
    ("precision", "source", "target", "wrong"),
    [
        ("fp32", ONCE, Layout(1, 1, 1), {"engine": "averages"}),
        ("bf16", FOUR, Layout(1, 0, 1), {"source_engine": "averages"}),
        ("fp16", FOUR, Layout(1, 0, 1), {"source_engine": "averages"}),
    ],
    ids=["fp32", "bf16", "fp16"],
)
def test_states_of_the_old_scale_are_noticed(
    precision: str,
    source: Source,
    target: Layout,
    wrong: dict[str, Any],
    runs: Runs,
    neox_python: str,
    tmp_path: Path,
) -> None:
    """States that are not scaled, since the engine is said to do what it does not, are another run.

    So the losses above would tell them apart.
    """
    run, want = runs(precision, source)
    new = tmp_path / "new"
    reshard(run, new, tp=target.tp, pp=target.pp, dp=target.dp, **wrong)
    assert furthest(want, resumed(neox_python, new, target)) > TOLERANCE[precision]


def test_into_an_engine_that_averages(runs: Runs, neox_python: str, tmp_path: Path) -> None:
    run, want = runs("fp32", FOUR)
    new = tmp_path / "new"
    reshard(run, new, engine="averages")
    right = resumed(neox_python, new, Layout(1, 1, 1), averages=True)
    assert furthest(want, right) <= TOLERANCE["fp32"]
