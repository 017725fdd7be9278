"""Models without a class in transformers: other layouts load strictly, with the same logits."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_neox
import torch
import yaml
from common import convert, hf_logits
from neox_mixes import BASE, MIXES, Mix, add_noise
from real_training import PRECISION, Layout, apart, asked, losses, resuming, start
from real_training import TOLERANCE as LOSS_TOLERANCES
from resharding import reshard

pytestmark = pytest.mark.neox
TOLERANCE = 2e-6  # of the largest logit: sums over ranks are rounded in another order
LOSS_TOLERANCE = LOSS_TOLERANCES["fp32"]
TREES = sorted({mix.tree for mix in MIXES})
Jobs = Iterable[tuple[int, dict[str, Any]]]  # with the tensor-parallel ranks of each


def _start(mix: Mix, folder: Path) -> Path:
    """The yml of a run from random weights."""
    folder.mkdir()
    words = real_neox.with_tokenizer(folder) / "tokenizer.json"
    layout = {"pipe_parallel_size": mix.pp, "model_parallel_size": mix.tp}
    path = folder / "start.yml"
    settings = {**BASE, **layout, "vocab_file": str(words), **mix.settings}
    path.write_text(yaml.safe_dump(settings))
    return path


def _run(python: str, tree: str, jobs: Jobs, folder: Path) -> dict[str, str | None]:
    """The error of each job by its yml. One start of GPT-NeoX runs all jobs of as many ranks."""
    by_tp: dict[int, list[dict[str, Any]]] = {}
    for tp, job in jobs:
        by_tp.setdefault(tp, []).append(job)
    errors: dict[str, str | None] = {}
    for tp, some in by_tp.items():
        place = folder / f"{len(list(folder.iterdir()))}"
        place.mkdir()
        said = real_neox.run(python, real_neox.ALL_TREES[tree], tp, some, place)
        errors |= zip((job["yml"] for job in some), said, strict=True)
    return errors


def _apart(source: Path, target: Path) -> float:
    """The largest difference of two files of logits, as a part of the largest logit."""
    with np.load(source) as one, np.load(target) as other:
        assert (one["tokens"] == other["tokens"]).all()
        rows = min(one["logits"].shape[-1], other["logits"].shape[-1])
        a, b = one["logits"][..., :rows], other["logits"][..., :rows]
    return float(np.abs(a - b).max() / np.abs(a).max())


@pytest.mark.parametrize("tree", TREES)
def test_another_layout_computes_the_same(tree: str, neox_python: str, tmp_path: Path) -> None:
    real_neox.tree_of(tree)
    mixes = {mix.name: mix for mix in MIXES if mix.tree == tree}
    folders = {name: tmp_path / name.replace(" ", "-") for name in mixes}
    starts = {name: _start(mix, folders[name]) for name, mix in mixes.items()}
    (tmp_path / "jobs").mkdir()
    saving = [
        (mix.tp, {"yml": str(starts[name]), "save": str(folders[name] / "run")})
        for name, mix in mixes.items()
    ]
    errors = _run(neox_python, tree, saving, tmp_path / "jobs")
    assert {yml: error for yml, error in errors.items() if error} == {}
    loading: list[tuple[int, dict[str, Any]]] = []
    targets: dict[tuple[str, int, int], Path] = {}
    for name, mix in mixes.items():
        run = folders[name] / "run"
        parallel = bool({**BASE, **mix.settings}["gpt_j_residual"])
        add_noise(run / "global_step1", parallel=parallel)
        logits = str(folders[name] / "logits.npz")
        changes = {"load": str(run), "finetune": True}
        loading.append((mix.tp, {"yml": str(starts[name]), "set": changes, "logits": logits}))
        for tp, pp in mix.targets:
            target = folders[name] / f"tp{tp}-pp{pp}"
            # names that trees of 2024-10 and later share do not tell the order of grouped queries
            order = {"gqa_order": "interleaved"} if tree == "2024-10" else {}
            convert(run, target, to="neox", tp=tp, pp=pp, **order)
            targets[name, tp, pp] = target
            yml = str(target / "finetune.yml")
            loading.append((tp, {"yml": yml, "logits": str(target / "logits.npz")}))
    errors = _run(neox_python, tree, loading, tmp_path / "jobs")
    assert {yml: error for yml, error in errors.items() if error} == {}
    apart = {
        place: _apart(folders[place[0]] / "logits.npz", target / "logits.npz")
        for place, target in targets.items()
    }
    assert {place: value for place, value in apart.items() if value > TOLERANCE} == {}
    for name in (name for name, mix in mixes.items() if mix.hf):
        convert(folders[name] / "run", folders[name] / "hf")
        # trees before 2025-05 have the epsilon of RMSNorm elsewhere
        allowed = 1e-5 if tree == "today" else 1e-3
        with np.load(folders[name] / "logits.npz") as file:
            tokens, want = torch.from_numpy(file["tokens"]), torch.from_numpy(file["logits"])
        computed = hf_logits(folders[name] / "hf", tokens)
        assert float((computed - want[..., : computed.shape[-1]]).abs().max()) <= allowed


GOING_ON: dict[str, dict[str, Any]] = {
    "rmsnorm": {"norm": "rmsnorm"},
    "scalenorm": {"norm": "scalenorm", "gpt_j_residual": True},
    "no norm parameters": {
        "norm": "non_parametric_layernorm",
        "activation": "geglu",
        "intermediate_size": 192,
    },
    "alibi": {"pos_emb": "alibi"},
    "relative positions": {"pos_emb": "rpe"},
    "learned positions, tied": {"pos_emb": "learned", "no_weight_tying": False},
    "sinusoidal positions": {"pos_emb": "sinusoidal"},
    "grouped queries": {"num_kv_heads": 2, "activation": "relu"},
}


def test_a_resharded_run_goes_on(neox_python: str, tmp_path: Path) -> None:
    """The losses after resuming show the weights, masters, moments and the step."""
    source = Layout(2, 1, 1)
    targets = (Layout(1, 0, 1), Layout(1, 2, 1), Layout(4, 1, 1))
    jobs: list[dict[str, Any]] = []
    for name, settings in GOING_ON.items():
        home = tmp_path / name
        yml, run = str(start(home, source, {**PRECISION["fp32"], **settings})), str(home / "run")
        jobs.append({"yml": yml, "losses": 6, "alike": True, "save": run})
        jobs.append({"yml": yml, "losses": 3, "alike": True, "set": {"load": run}})
    wanted = dict(
        zip(GOING_ON, losses(neox_python, source, jobs, tmp_path / "jobs")[1::2], strict=True)
    )
    wrong = []
    for target in targets:
        names = [
            name
            for name, settings in GOING_ON.items()
            # relative positions are one parameter of a stage, grouped queries have two heads
            if (settings.get("pos_emb") != "rpe" or target.pp < 2)
            and (not settings.get("num_kv_heads") or target.tp < 4)
        ]
        jobs = []
        for name in names:
            new = tmp_path / name / str(target)
            reshard(tmp_path / name / "run", new, **asked(source, target))
            jobs.append(resuming(new))
        continued = losses(neox_python, target, jobs, tmp_path / f"jobs {target}")
        for name, mine in zip(names, continued, strict=True):
            # row biases that are summed over other ranks train at another rate
            steps = (0,) if GOING_ON[name].get("gpt_j_residual") else (0, 2)
            if any(apart(wanted[name][n], mine[n]) > LOSS_TOLERANCE for n in steps):
                wrong.append((name, str(target), wanted[name], mine))
    assert wrong == []
