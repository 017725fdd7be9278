"""``reshard`` of a run with its optimizer, beside ``cp`` of the same bytes."""

import os
import shutil
from pathlib import Path

import numpy as np
from cases import CP
from measure import Job, Row, rounds
from places import Place
from sources import TOOL, must

CASES = (
    ("DP 2 to DP 4", ("--dp", "4")),
    ("TP 1 to TP 2", ("--tp", "2")),
    ("PP 1 to PP 2", ("--pp", "2")),
)


def reshardings(place: Place, shape: str, runs: int) -> list[Row]:
    """The rows, ``cp`` first. The folder gets a run of its own: fp16 with ZeRO 1, DP 2."""
    hf, run, out = (place.folder / name for name in ("run-hf", "run", "out"))
    must(TOOL, "toy", shape, str(hf), "--as", "hf")
    must(TOOL, "convert", str(hf), str(run), "--optimizer", "fresh", "--dp", "2", "--no-verify")
    for path in run.rglob("*.pt"):
        fill(path)
    command = (TOOL, "reshard", str(run), str(out))
    jobs = [
        Job(
            title + (", read back and compared" if verified else ""),
            "tool",
            (*command, *options) if verified else (*command, *options, "--no-verify"),
            run,
            out,
        )
        for title, options in CASES
        for verified in (False, True)
    ]
    base = Job(CP, "cp", ("cp", "-r", str(run), str(out)), run, out, flush=True)
    rows, _ = rounds(jobs, [base], runs, place)
    for folder in (hf, run, out):
        shutil.rmtree(folder)
    return rows


def fill(path: Path) -> None:
    """Put small positive numbers in place of a file's holes, which fresh moments are: ``cp`` would
    make holes of them again, and a run that was trained has none.
    """
    words = np.random.default_rng(0).random(1 << 20, np.float32) * np.float32(1e-4)
    data, size, end = words.tobytes(), path.stat().st_size, 0
    with path.open("r+b", buffering=0) as file:
        fd = file.fileno()
        while (hole := os.lseek(fd, end, os.SEEK_HOLE)) < size:
            try:
                end = os.lseek(fd, hole, os.SEEK_DATA)
            except OSError:  # nothing but the hole up to the file's end
                end = size
            while hole < end:
                hole += os.pwrite(fd, data[: end - hole], hole)
            if end == size:
                return
