"""Models of the Hub, from huggingface_hub's cache, without a network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from common import make_hf

REVISION = "a" * 40


def cached(home: Path, hf: Path) -> None:
    """What huggingface_hub leaves after it downloaded org/model at step3."""
    repo = home / "hub" / "models--org--model"
    (repo / "refs").mkdir(parents=True)
    for ref in ("main", "step3"):
        (repo / "refs" / ref).write_text(REVISION)
    shutil.copytree(hf, repo / "snapshots" / REVISION)


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-m", "neox_bridge", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_cached_model(tmp_path: Path) -> None:
    cached(tmp_path / "home", make_hf(tmp_path / "hf"))
    target = tmp_path / "neox"
    done = run(tmp_path / "home", "convert", "org/model", str(target), "--revision", "step3")
    assert done.returncode == 0, done.stderr
    assert (target / "latest").read_text() == "global_step3"
    record = json.loads((target / "global_step3/neox_bridge.json").read_text())
    assert record["source"]["name"] == "org/model"
    assert record["source"]["revision"] == "org/model@step3"


def test_what_is_not_cached_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, "convert", "org/other", str(tmp_path / "neox"))
    assert done.returncode == 1
    assert "org/other" in done.stderr
    assert "HF_HUB_OFFLINE" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_revision_of_a_folder_is_an_error(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    done = run(tmp_path, "convert", str(hf), str(tmp_path / "neox"), "--revision", "main")
    assert done.returncode == 2
    assert "--revision" in done.stderr
