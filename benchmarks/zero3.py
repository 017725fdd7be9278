"""Weights of a ZeRO stage 3 run, beside DeepSpeed's own ``zero_to_fp32.py``."""

import os
import shutil
from pathlib import Path

import resharding
from cases import CP, neox
from measure import Job, Row, rounds
from places import Place
from sources import TOOL, must

SCRIPT = "zero_to_fp32.py --safe_serialization"


def gatherings(place: Place, shape: str, runs: int, skipped: list[str]) -> list[Row]:
    """The rows, ``cp`` first. The folder gets a run of its own: fp16 with ZeRO 3, DP 2."""
    hf, first, run, out = (place.folder / name for name in ("hf3", "run1", "run3", "out"))
    must(TOOL, "toy", shape, str(hf), "--as", "hf")
    start = ("--optimizer", "fresh", "--layout", "ranks", "--no-verify")
    must(TOOL, "convert", str(hf), str(first), *start)
    must(TOOL, "reshard", str(first), str(run), "--zero", "3", "--dp", "2", "--no-verify")
    shutil.rmtree(first)
    for path in run.rglob("*.pt"):
        resharding.fill(path)
    command = (TOOL, "convert", str(run), str(out))
    options = {"in fp32": ("--weights", "masters"), "in fp16": ()}
    jobs = [
        Job(
            f"convert, {title}" + (", read back and compared" if verified else ""),
            "tool",
            (*command, *words, *(() if verified else ("--no-verify",))),
            run,
            out,
        )
        for title, words in options.items()
        for verified in (False, True)
    ]
    _, python = neox()
    script = _script(python)
    if script is None:
        skipped.append(f"{SCRIPT}: NEOX_HOME (or NEOX_PYTHON) has no DeepSpeed")
    else:
        shutil.copy(script, run)  # as DeepSpeed does when it saves
        script = run / script.name
        words = (str(python), str(script), str(run), str(out), "--safe_serialization")
        on_cpu = {"DS_ACCELERATOR": "cpu"}
        jobs.append(Job(SCRIPT, "other", words, run, out, flush=True, environment=on_cpu))
    base = Job(CP, "cp", ("cp", "-r", str(run), str(out)), run, out, flush=True)
    rows, failed = rounds(jobs, [base], runs, place)
    skipped += failed
    for folder in (hf, run, out):
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def _script(python: Path) -> Path | None:
    """DeepSpeed's script in the environment of a Python."""
    found = (
        Path(os.path.abspath(python))
        .parents[1]
        .glob("lib/python3*/site-packages/deepspeed/utils/zero_to_fp32.py")
    )
    return next(iter(found), None)
