"""Running jobs in the real GPT-NeoX, on CPU."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from checkpoint_edits import tokenizer
from common import TESTS, hf_logits

TREES = {"today": "gpt-neox", "2024-03": "neox-2024-03", "2024-09": "neox-2024-09"}
ALL_TREES = {**TREES, "2024-10": "neox-2024-10"}
if os.environ.get("NEOX_TREE"):
    TREES = ALL_TREES = {os.environ.get("NEOX_ERA", "today"): os.environ["NEOX_TREE"]}
HOME = os.environ.get("NEOX_HOME", ".")
SCRIPT = TESTS / "neox" / "run_cpu.py"
INSTALLED = """\
import runpy, sys
sys.path.insert(0, {src!r})
from neox_bridge.compat import install
install()
sys.argv = sys.argv[1:]
runpy.run_path({script!r}, run_name="__main__")
"""


def with_tokenizer(folder: Path) -> Path:
    """The folder, with a tokenizer of 290 words added."""
    tokenizer(folder / "tokenizer.json")
    return folder


def run(
    python: str, tree: str, processes: int, jobs: list[dict[str, Any]], folder: Path
) -> list[str | None]:
    """Each job's error in the real GPT-NeoX, None where it went through."""
    return [result["error"] for result in results(python, tree, processes, jobs, folder)]


def results(
    python: str, tree: str, processes: int, jobs: list[dict[str, Any]], folder: Path
) -> list[dict[str, Any]]:
    """What run_cpu.py says of each job."""
    path = folder / "jobs.json"
    defaults = {"drop": [], "logits": None, "steps": 0}
    path.write_text(json.dumps([{**defaults, **job} for job in jobs]))
    where = tree if os.path.isabs(tree) else f"{HOME}/{tree}"
    command = [python, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += [f"--master_port={20000 + os.getpid() % 12000}", str(SCRIPT), where, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    found = results_in(done.stdout)
    assert len(found) == len(jobs), done.stdout[-2000:] + done.stderr[-4000:]
    return found


def agree(path: Path, hf: Path) -> float:
    with np.load(path) as file:
        tokens, logits = torch.from_numpy(file["tokens"]), torch.from_numpy(file["logits"])
    return float((hf_logits(hf, tokens) - logits[..., :300]).abs().max())


def era(tree: str) -> Any:
    from neox_bridge.frameworks.eras import era_named

    return era_named(tree)


def results_in(output: str) -> list[dict[str, Any]]:
    """What run_cpu.py said of its jobs; other ranks may print right behind it."""
    lines = [line[7:] for line in output.splitlines() if line.startswith("RESULT ")]
    return [json.JSONDecoder().raw_decode(line)[0] for line in lines]


class Done(NamedTuple):
    """What a process said: each job's error, and all of its text."""

    errors: list[str | None]
    text: str


def run_alone(
    python: str, tree: Path, jobs: list[dict[str, Any]], folder: Path, **how: bool
) -> Done:
    """Jobs in one process of a tree; installed: with install() and no patch."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "jobs.json"
    path.write_text(json.dumps([{"drop": [], "logits": None, "steps": 0, **job} for job in jobs]))
    command = [python, str(SCRIPT), str(tree), str(path)]
    if how.get("installed"):
        src = str(TESTS.parent / "src")
        code = INSTALLED.format(src=src, script=str(SCRIPT))
        command = [python, "-c", code, "run_cpu", str(tree), str(path)]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    alone["MASTER_PORT"] = str(20000 + os.getpid() % 12000)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1200, env={**os.environ, **alone}
    )
    results = results_in(done.stdout)
    text = done.stdout + done.stderr
    assert len(results) == len(jobs), text[-5000:]
    return Done([result["error"] for result in results], text)


def tree_of(name: str) -> Path:
    path = Path(HOME) / ALL_TREES[name]
    if not path.is_dir():
        pytest.skip(f"no tree {path}")
    return path
