"""Many small checkpoints as a batch, beside one large one of as many bytes."""

import shutil
from pathlib import Path

from measure import Job, Row, rounds
from places import ordinary
from sources import TOOL, must

STEPS = 20


def batches(folder: Path, runs: int, small: str, large: str) -> list[Row]:
    """``convert`` of one, and ``batch`` of ``STEPS`` small ones, in turns; all are verified.

    small, large: shapes; so many of the one have about the bytes of the other.
    """
    place = ordinary(folder)
    must(TOOL, "toy", large, str(folder / "large"), "--as", "hf")
    for step in range(STEPS):
        target = str(folder / "run" / f"step{step}")
        must(TOOL, "toy", small, target, "--as", "hf", "--seed", str(step))
    out = folder / "out"
    one = Job(
        f"`convert`, {large}",
        "tool",
        (TOOL, "convert", str(folder / "large"), str(out), "--quiet"),
        folder / "large",
        out,
    )
    many = Job(
        f"`batch`, {STEPS} steps of {small}",
        "tool",
        (TOOL, "batch", str(folder / "run"), str(out), "--quiet"),
        folder / "run",
        out,
    )
    aside = folder / "aside"
    rows, _ = rounds([many], [one], runs, place, aside)
    for name in ("large", "run", "out", "aside"):
        shutil.rmtree(folder / name)
    return rows
