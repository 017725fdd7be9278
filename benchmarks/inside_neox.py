"""Exports beside a training, and GPT-NeoX's own exporter. Run by hand, with NEOX_HOME.

    inside_neox.py FOLDER [SHAPE] [--steps 5]

Each step appears in the folder of a run, as if GPT-NeoX had just saved it. Prints for how long the
training would be blocked, and how long it takes until the export is verified.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path

from cases import EXPORTER, neox
from sources import exporter_settings, make

from neox_bridge.training.exports import JOURNAL, ExporterProcess, Exports

POLL_SECONDS = 0.005
LIMIT_SECONDS = 3600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("shape", nargs="?", default="pythia-410m")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    make(folder, options.shape, ["neox"])
    (source,) = (folder / "neox").glob("global_step*")
    blocked, exported = _exports(folder, source, options.steps)
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    print(f"{options.shape}, {size / 1e9:.2f} GB, median of {options.steps} steps\n")
    print("| | seconds |\n|---|--:|")
    print(f"| training blocked per save | {statistics.median(blocked):.6f} |")
    print(f"| training blocked, worst save | {max(blocked):.6f} |")
    print(f"| saved until exported and verified | {statistics.median(exported):.2f} |")
    print(f"| {EXPORTER}, not verified | {_by_neox(folder, source)} |")


def _exports(folder: Path, source: Path, steps: int) -> tuple[list[float], list[float]]:
    """For each step: seconds in which the training is blocked, and until it is exported."""
    save, target = folder / "run", folder / "exported"
    save.mkdir()
    exporter = ExporterProcess(Exports(str(save), str(target), keep=1))
    exporter.start()
    blocked, exported = [], []
    for step in range(1, steps + 1):
        shutil.copytree(source, save / f"global_step{step}")
        (save / "latest").write_text(f"global_step{step}")
        start = time.perf_counter()
        exporter.saved(step)
        blocked.append(time.perf_counter() - start)
        _wait_for(target / JOURNAL, f"done {step}")
        exported.append(time.perf_counter() - start)
        shutil.rmtree(save / f"global_step{step}")
    exporter.finish()
    return blocked, exported


def _wait_for(journal: Path, line: str) -> None:
    end = time.monotonic() + LIMIT_SECONDS
    while not journal.exists() or line not in journal.read_text().splitlines():
        if time.monotonic() > end:
            raise SystemExit(f"{journal} has no line {line!r}")
        time.sleep(POLL_SECONDS)


def _by_neox(folder: Path, source: Path) -> str:
    """Seconds of GPT-NeoX's exporter, or why it was not measured."""
    tree, python = neox()
    script = tree / "tools" / "ckpts" / "convert_neox_to_hf.py"
    if not script.is_file() or not python.is_file():
        return "NEOX_HOME (or NEOX_TREE and NEOX_PYTHON) has none"
    command = [str(python), str(script), "--input_dir", str(source), "--no_save_tokenizer"]
    command += ["--config_file", str(exporter_settings(folder))]
    command += ["--output_dir", str(folder / "by-neox")]
    start = time.perf_counter()
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - start
    return f"{seconds:.2f}" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


if __name__ == "__main__":
    main()
