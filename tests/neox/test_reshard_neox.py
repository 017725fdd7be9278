"""Runs of the real GPT-NeoX go on, resharded, as they were: every layout to every other.

Each layout trains nine steps from scratch and saves; each save is resharded for every other layout
and resumed there for three steps. The first loss shows the weights, the next the masters, the
moments, the step and the schedule too. All data-parallel ranks have the same sequences there, so
that their gradients' mean is exact; each its share of the batch, as the written yml says, in one
step more.
"""

from pathlib import Path

import pytest
import real_neox
from common import convert, make_hf
from real_training import (
    LAYOUTS,
    PRECISION,
    TOLERANCE,
    Layout,
    apart,
    asked,
    losses,
    resuming,
    start,
)
from resharding import reshard, without_moments

from neox_bridge.api import open_checkpoint
from neox_bridge.optimizer.read_files import read_optimizer

pytestmark = pytest.mark.neox


@pytest.mark.parametrize(
    ("precision", "residual"),
    [(precision, residual) for precision in PRECISION for residual in ("parallel", "sequential")],
)
def test_every_layout_to_every_other(
    precision: str, residual: str, neox_python: str, tmp_path: Path
) -> None:
    settings = {**PRECISION[precision], "gpt_j_residual": residual == "parallel"}
    allowed = TOLERANCE[precision]
    wanted: dict[Layout, list[float]] = {}
    for layout in LAYOUTS:
        home = tmp_path / str(layout)
        yml, run = str(start(home, layout, settings)), str(home / "run")
        jobs = [
            {"yml": yml, "losses": 9, "alike": True, "save": run},
            {"yml": yml, "losses": 3, "alike": True, "set": {"load": run}},
        ]
        _, wanted[layout] = losses(neox_python, layout, jobs, home)
    noticed, wrong = [], []
    for target in LAYOUTS:
        sources = [layout for layout in LAYOUTS if layout != target]
        jobs = []
        for source in sources:
            new = tmp_path / str(target) / f"from {source}"
            reshard(tmp_path / str(source) / "run", new, **asked(source, target))
            jobs.append(resuming(new))
        cold = tmp_path / str(target) / "cold"
        reshard(tmp_path / str(sources[0]) / "run", cold, **asked(sources[0], target))
        without_moments(cold)
        jobs.append(resuming(cold))
        *found, forgetful = losses(neox_python, target, jobs, tmp_path / str(target) / "jobs")
        for source, mine in zip(sources, found, strict=True):
            want = wanted[source]
            steps = (0, 2) if residual == "sequential" or source.tp == target.tp else (0,)
            if any(apart(want[n], mine[n]) > allowed for n in steps):
                wrong.append((str(source), str(target), want, mine))
        noticed.append(max(map(apart, wanted[sources[0]], forgetful)))
    assert wrong == []
    assert min(noticed) > allowed  # a run that had lost its moments would be among the wrong ones


def test_each_rank_its_share(neox_python: str, tmp_path: Path) -> None:
    """From the written yml, with its micro-batch and accumulation, the global batch is the same."""
    settings = {**PRECISION["fp32"], "gpt_j_residual": True, "train_micro_batch_size_per_gpu": 4}
    one, home = Layout(1, 1, 1), tmp_path / "one"
    yml, run = str(start(home, one, settings)), home / "run"
    jobs = [
        {"yml": yml, "losses": 2, "save": str(run)},
        {"yml": yml, "losses": 1, "set": {"load": str(run)}},
    ]
    (_, want) = losses(neox_python, one, jobs, home)
    for target in (Layout(1, 1, 2), Layout(1, 0, 4), Layout(2, 1, 2)):
        new = tmp_path / str(target)
        reshard(run, new, tp=target.tp, pp=target.pp, dp=target.dp, micro_batch=1)
        ((mine,),) = losses(
            neox_python, target, [{"yml": str(new / "resume.yml"), "losses": 1}], new
        )
        assert apart(want[0], mine) <= TOLERANCE["fp32"]


@pytest.mark.parametrize("precision", PRECISION)
def test_a_fresh_optimizer_is_what_finetune_starts_with(
    precision: str, neox_python: str, tmp_path: Path
) -> None:
    """The same three losses; and at a later step GPT-NeoX goes on from there."""
    hf = real_neox.with_tokenizer(make_hf(tmp_path / "hf"))
    dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision]
    shape = {"tp": 2, "pp": 2, "dtype": dtype}
    convert(hf, tmp_path / "tuned", **shape)
    convert(hf, tmp_path / "fresh", **shape, optimizer="fresh")
    convert(hf, tmp_path / "later", **shape, optimizer="fresh", iteration=700)
    # fine-tuning has masters from the rounded weights, a fresh optimizer from the source
    allowed = TOLERANCE[precision]
    here = {"no_load_rng": True}  # what is written is a GPU's, which this machine hasn't
    fresh, later = (
        {"yml": str(tmp_path / name / "resume.yml"), "set": here} for name in ("fresh", "later")
    )
    jobs = [
        {"yml": str(tmp_path / "tuned" / "finetune.yml"), "losses": 3},
        {**fresh, "losses": 3},
        {**later, "losses": 1, "save": str(tmp_path / "own")},
    ]
    tuned, mine, _ = losses(neox_python, Layout(2, 2, 1), jobs, tmp_path / "jobs")
    assert all(apart(*pair) <= allowed for pair in zip(tuned, mine, strict=True))
    optimizer = read_optimizer(open_checkpoint(str(tmp_path / "own"), step=701))
    assert optimizer.metas[0]["lr_scheduler"]["num_iters"] == 701


def test_a_fresh_optimizer_of_a_llama_with_biases(neox_python: str, tmp_path: Path) -> None:
    """After the first step the weights are the masters: those of each bias are its own."""
    biases = {"attention_bias": True, "mlp_bias": True}
    hf = real_neox.with_tokenizer(make_hf(tmp_path / "hf", family="llama", **biases))
    convert(hf, tmp_path / "tuned")
    convert(hf, tmp_path / "fresh", optimizer="fresh")
    jobs = [
        {"yml": str(tmp_path / "tuned" / "finetune.yml"), "losses": 3},
        {"yml": str(tmp_path / "fresh" / "resume.yml"), "losses": 3, "set": {"no_load_rng": True}},
    ]
    tuned, mine = losses(neox_python, Layout(1, 1, 1), jobs, tmp_path / "jobs")
    assert all(apart(*pair) <= TOLERANCE["fp32"] for pair in zip(tuned, mine, strict=True))
