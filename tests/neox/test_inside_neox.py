"""Runs of the real GPT-NeoX that start from Hugging Face models and export their steps."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_neox
import torch
import yaml
from checkpoint_edits import tokenizer
from common import convert, make_hf
from disks import PAGE_BYTES, disk, enlarge, fill, slowed, small_disk
from inside_neox import check_exports, exporting, run, wait_for, yml_of
from real_training import PRECISION

from neox_bridge import verify
from neox_bridge.training.exports import JOURNAL, LOG

pytestmark = pytest.mark.neox

GROUPS = [[(1, 0), (1, 1)], [(2, 0), (2, 1)], [(1, 2)], [(2, 2)]]  # layouts of one start each
TREES = sorted(real_neox.ALL_TREES)


@pytest.fixture(params=["gpt_neox", "llama"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    # GPT-NeoX before 2025-05 adds the epsilon of RMSNorm outside of the root: with a small one,
    # its logits are those of transformers in every tree
    epsilon = {"rms_norm_eps": 1e-12} if request.param == "llama" else {}
    hf = make_hf(tmp_path / "hf", torch.float32, family=request.param, **epsilon)
    tokenizer(hf / "tokenizer.json")
    return hf


@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("tree", TREES)
def test_the_logits_at_step_0_are_those_of_transformers(
    tree: str,
    group: list[tuple[int, int]],
    model: Path,
    neox_python: str,
    inside: None,
    tmp_path: Path,
) -> None:
    """With two stages, no rank has logits: what GPT-NeoX saves has the model's bits."""
    real_neox.tree_of(tree)
    jobs = []
    for tp, pp in group:
        name = f"tp{tp}-pp{pp}"
        job = {"yml": str(yml_of(model, tree, tp, pp, tmp_path / name)), "logits": None}
        if pp < 2:
            job["logits"] = str(tmp_path / f"{name}.npz")
        jobs.append({**job, "save": str(tmp_path / f"{name}-saved")})
    tp, pp = group[0]
    run(neox_python, tree, tp * max(pp, 1), jobs, tmp_path)
    for job in jobs:
        if job["logits"]:
            assert real_neox.agree(Path(str(job["logits"])), model) < 1e-5
        assert verify(str(model), str(job["save"])).holds


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("precision", PRECISION)
def test_the_master_weights_are_those_of_the_model(
    precision: str, stage: int, neox_python: str, inside: None, tmp_path: Path
) -> None:
    """With two data-parallel ranks. A run with ``finetune`` starts in the same way."""
    if stage == 0 and precision != "fp32":
        pytest.skip("without pipeline stages, GPT-NeoX trains at stage 0 in fp32 only")
    hf = make_hf(tmp_path / "hf", torch.float32)
    tokenizer(hf / "tokenizer.json")
    zero = {"zero_optimization": {"stage": stage}, **PRECISION[precision]}
    yml = yml_of(hf, "today", 1, 0, tmp_path / "neox", **zero)
    if precision == "fp16":
        settings = yaml.safe_load(yml.read_text())
        del settings["precision"]
        yml.write_text(yaml.safe_dump(settings))
    dtype = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[precision]
    convert(hf, tmp_path / "cast", dtype=dtype, layout="ranks", era=real_neox.era("today"))
    (path,) = (tmp_path / "cast").glob("global_step*/mp_rank_00_model_states.pt")
    expected = torch.load(path, weights_only=False)["module"]
    jobs = []
    for finetune in (False, True):
        job = {"yml": str(yml), "set": {"finetune": finetune}, "losses": 0}
        job["save"] = str(tmp_path / f"saved-{finetune}")
        jobs.append(job)
        if stage:
            jobs[-1]["optimizer"] = str(tmp_path / f"masters-{finetune}")
    run(neox_python, "today", 2, jobs, tmp_path)
    for job in jobs:
        (saved,) = Path(str(job["save"])).glob("global_step*/mp_rank_00_model_states.pt")
        weights = torch.load(saved, weights_only=False)["module"]
        names = [name for name in weights if name.startswith("sequential.")]
        assert names
        assert [n for n in names if not torch.equal(weights[n], expected[n])] == []
        if stage:
            with np.load(f"{job['optimizer']}-0.npz") as file:
                masters = {k.removesuffix("/fp32"): file[k] for k in file if k.endswith("/fp32")}
            assert sorted(masters) == sorted(names)
            assert [n for n in names if (masters[n] != expected[n].float().numpy()).any()] == []


@pytest.mark.parametrize("tree", TREES)
def test_exports_are_conversions_and_the_losses_stay_the_same(
    tree: str, model: Path, neox_python: str, inside: None, tmp_path: Path
) -> None:
    real_neox.tree_of(tree)
    job = exporting(model, tree, (2, 0), tmp_path)
    plain = {**job, "set": {}, "save": str(tmp_path / "plain")}
    results = run(neox_python, tree, 2, [plain, job], tmp_path)
    assert len(results[0]["losses"]) == 20
    assert results[0]["losses"] == results[1]["losses"]
    wait_for(tmp_path / "exported" / JOURNAL, "done 20")
    check_exports(tmp_path, (5, 10, 15, 20))


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_kills_leave_whole_checkpoints_and_exports(
    neox_python: str,
    inside: None,
    tmp_path: Path,
    processes: list[subprocess.Popen[str]],
) -> None:
    """First the exporter is killed, then the trainer. The next run exports what is left."""
    hf = make_hf(tmp_path / "hf", torch.float32)
    tokenizer(hf / "tokenizer.json")
    job = {"drop": [], "logits": None, "steps": 0, **exporting(hf, "today", (1, 0), tmp_path)}
    (tmp_path / "jobs.json").write_text(json.dumps([{**job, "losses": 90}]))
    tree = str(real_neox.tree_of("today"))
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    alone["MASTER_PORT"] = str(20000 + os.getpid() % 12000)
    trainer = subprocess.Popen(
        [neox_python, str(real_neox.SCRIPT), tree, str(tmp_path / "jobs.json")],
        env={**os.environ, **alone},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    processes.append(trainer)
    journal = tmp_path / "exported" / JOURNAL
    wait_for(journal, "saved 5")
    (exporter,) = exporters(tmp_path / "exported")
    os.kill(exporter, signal.SIGKILL)
    wait_for(journal, "done 10")  # by another process, as the training went on
    os.killpg(trainer.pid, signal.SIGKILL)
    trainer.wait()
    native = sorted((tmp_path / "run").glob("global_step*"))
    latest = (tmp_path / "run" / "latest").read_text().strip()
    assert latest in [path.name for path in native]
    first = int(latest.removeprefix("global_step"))
    while exporters(tmp_path / "exported"):
        time.sleep(0.2)  # it finishes what was saved, without the trainer
    for step in range(5, first, 5):
        assert verify(str(tmp_path / "run" / f"global_step{step}"), export(tmp_path, step)).holds
    # the same yml resumes
    run(neox_python, "today", 1, [{**job, "losses": 5}], tmp_path)
    wait_for(journal, f"done {first + 5}")
    check_exports(tmp_path, tuple(range(5, first + 10, 5)))
    assert "failed" not in (tmp_path / "exported" / LOG).read_text()


def export(folder: Path, step: int) -> str:
    return str(folder / "exported" / f"step{step}")


def exporters(target: Path) -> list[int]:
    """The exporters that write into a folder."""
    ids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"neox_bridge.training.exporter" in words and str(target).encode() in words:
            ids.append(int(path.parent.name))
    return ids


# disks that are really full or slow; with root


STEPS = (30, 60, 90, 120)  # so far apart that exports take place in between


def steps_of(folder: Path) -> list[Path]:
    """The files of the steps that GPT-NeoX saved."""
    return sorted(path.relative_to(folder) for path in folder.glob("global_step*/**/*"))


def pages_of(folder: Path) -> int:
    """The bytes that a folder takes in memory."""
    return sum(-(-p.stat().st_size // PAGE_BYTES) * PAGE_BYTES for p in folder.rglob("*"))


@pytest.fixture
def alone(neox_python: str, inside: None, tmp_path: Path) -> tuple[dict[str, Any], list[float]]:
    """A job that exports, and the losses of a run of it that does not."""
    hf = make_hf(tmp_path / "hf", torch.float32)
    tokenizer(hf / "tokenizer.json")
    job = exporting(hf, "today", (1, 0), tmp_path) | {"losses": 120, "save_every": 30}
    plain = {**job, "set": {"save": str(tmp_path / "plain")}, "save": str(tmp_path / "plain")}
    (result,) = run(neox_python, "today", 1, [plain], tmp_path)
    return job, result["losses"]


def test_a_run_goes_on_while_the_disk_of_the_exports_is_full(
    neox_python: str, alone: tuple[dict[str, Any], list[float]], tmp_path: Path
) -> None:
    job, losses = alone
    with small_disk(tmp_path / "exported", 4 << 20) as disk, ThreadPoolExecutor(1) as pool:
        filler = fill(disk, left=3 * PAGE_BYTES)  # of which the log takes some
        running = pool.submit(run, neox_python, "today", 1, [job], tmp_path)
        wait_for(tmp_path / "run" / "latest", "global_step120")
        wait_for(disk / LOG, "step 120 failed")
        exported = list(disk.glob("step*"))
        filler.unlink()
        (result,) = running.result()
        assert exported == []
        assert result["losses"] == losses
        assert steps_of(tmp_path / "run") == steps_of(tmp_path / "plain")
        assert "step 120 failed: No space left" in (disk / LOG).read_text()
        check_exports(tmp_path, STEPS)


def test_exports_leave_a_shared_disk_to_the_checkpoints(
    neox_python: str, alone: tuple[dict[str, Any], list[float]], tmp_path: Path
) -> None:
    """The checkpoints and two of four exports would fit."""
    job, losses = alone
    convert(tmp_path / "plain" / "global_step30", tmp_path / "export", to="hf")
    size = pages_of(tmp_path / "plain") + pages_of(tmp_path / "export") * 5 // 2
    with small_disk(tmp_path / "disk", size) as disk, ThreadPoolExecutor(1) as pool:
        keys = {"save": str(disk / "run"), "save_hf": str(disk / "exported")}
        job = {**job, "set": keys, "save": keys["save"]}
        running = pool.submit(run, neox_python, "today", 1, [job], tmp_path)
        wait_for(disk / "run" / "latest", "global_step120")
        wait_for(disk / "exported" / JOURNAL, "done ")
        enlarge(disk, 2 * size)
        (result,) = running.result()
        assert result["losses"] == losses
        assert steps_of(disk / "run") == steps_of(tmp_path / "plain")
        for step in STEPS:
            source = str(tmp_path / "plain" / f"global_step{step}")
            assert verify(source, str(disk / "run" / f"global_step{step}")).holds
            assert verify(source, str(disk / "exported" / f"step{step}")).holds


def test_a_run_is_faster_than_the_disk_of_its_exports(
    neox_python: str, alone: tuple[dict[str, Any], list[float]], tmp_path: Path
) -> None:
    """GPT-NeoX removes steps before they are exported. The last one is there in the end."""
    job, losses = alone
    job["set"]["keep_last_n_checkpoints"] = 1
    with disk(tmp_path / "exported", 64 << 20) as target, ThreadPoolExecutor(1) as pool:
        with slowed(target, 10_000):
            running = pool.submit(run, neox_python, "today", 1, [job], tmp_path)
            wait_for(tmp_path / "run" / "latest", "global_step120")
            exported = list(target.glob("step*"))
        (result,) = running.result()
        assert exported == []
        assert result["losses"] == losses
        log = (target / LOG).read_text()
        for step in STEPS[:-1]:
            assert f"step {step} was removed before it was exported" in log
        check_exports(tmp_path, STEPS[-1:])
