"""Exports beside a training, and GPT-NeoX's own exporter, which take turns.

Each step appears in the folder of a run, as if GPT-NeoX had just saved it.
"""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from cases import EXPORTER, neox
from measure import Failed, run
from sources import exporter_settings, make

from neox_bridge.training.exports import JOURNAL, ExporterProcess, Exports

POLL_SECONDS = 0.005
LIMIT_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Inside:
    """What a run with ``save_hf`` measures, one number a step, all in seconds.

    size: bytes of a step. blocked: how long the training waits for neox-bridge after its save.
    exported: from a native save until its export is verified. theirs: GPT-NeoX's exporter, which
    does not verify; empty if it was not measured.
    """

    shape: str
    size: int
    blocked: tuple[float, ...]
    exported: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """How many times longer GPT-NeoX's exporter takes, step by step."""
        return [b / a for a, b in zip(self.exported, self.theirs, strict=True)]


def inside(work: Path, shape: str, steps: int, skipped: list[str]) -> Inside:
    """Measure exports of a model of this shape; ``work`` gets a folder for it."""
    folder = work / "inside"
    make(folder, shape, ["neox"])
    shutil.rmtree(folder / "hf")
    (source,) = (folder / "neox").glob("global_step*")
    command = _command(folder, source)
    if not command:
        skipped.append(f"inside GPT-NeoX, {EXPORTER}: NEOX_HOME has none")
    save, target = folder / "run", folder / "exported"
    save.mkdir()
    exporter = ExporterProcess(Exports(str(save), str(target), keep=1))
    exporter.start()
    blocked, exported, theirs = [], [], []
    for step in range(1, steps + 1):
        shutil.copytree(source, save / f"global_step{step}")
        (save / "latest").write_text(f"global_step{step}")
        start = time.perf_counter()
        exporter.saved(step)
        blocked.append(time.perf_counter() - start)
        _wait_for_export(target / JOURNAL, step)
        exported.append(time.perf_counter() - start)
        shutil.rmtree(save / f"global_step{step}")
        if command:
            try:
                theirs.append(run(command, environment={"DS_ACCELERATOR": "cpu"}).seconds)
            except Failed as error:
                skipped.append(f"inside GPT-NeoX, {EXPORTER}: {error}")
                command, theirs = (), []
            shutil.rmtree(folder / "theirs", ignore_errors=True)
    exporter.finish()
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    shutil.rmtree(folder)
    return Inside(shape, size, tuple(blocked), tuple(exported), tuple(theirs))


def _command(folder: Path, source: Path) -> tuple[str, ...]:
    """GPT-NeoX's exporter of the step, or () if it is missing."""
    tree, python = neox()
    script = tree / "tools" / "ckpts" / "convert_neox_to_hf.py"
    if not script.is_file() or not os.access(python, os.X_OK):
        return ()
    return (
        *(str(python), str(script), "--input_dir", str(source), "--no_save_tokenizer"),
        *("--config_file", str(exporter_settings(folder)), "--output_dir", str(folder / "theirs")),
    )


def _wait_for_export(journal: Path, step: int) -> None:
    """Wait for the line of the journal that says that a step is done."""
    end = time.monotonic() + LIMIT_SECONDS
    done = ["done", str(step)]
    while not (
        journal.exists()
        and any(line.split()[:2] == done for line in journal.read_text().splitlines())
    ):
        if time.monotonic() > end:
            raise Failed(f"{journal} has no line for step {step}")
        time.sleep(POLL_SECONDS)
