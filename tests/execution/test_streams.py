"""Commands whose stdout, stderr or stdin is closed, full, or read by somebody who leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from common import fixture

import neox_bridge

pytestmark = pytest.mark.slow
RUN = str(fixture("pythia_fp32_pp1_tp2"))
FULL = "/dev/full"
needs_full = pytest.mark.skipif(not os.path.exists(FULL), reason="this system has no /dev/full")


def shell(command: str, cwd: Path) -> Any:
    """Run with bash, in which ``nb`` is the command line."""
    environment = os.environ | {"PYTHONPATH": str(Path(neox_bridge.__file__).parent.parent)}
    start = f'nb() {{ {sys.executable} -m neox_bridge "$@"; }}; set -o pipefail; '
    return subprocess.run(
        ["bash", "-c", start + command], capture_output=True, text=True, cwd=cwd, env=environment
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_a_closed_stream_is_no_error(closed: str, tmp_path: Path) -> None:
    """Also with other processes, which would inherit a checkpoint's file as their stdout."""
    for number, command in enumerate((f"convert {RUN}", f"batch {RUN}")):
        done = shell(f"nb {command} out{number} {closed}", tmp_path)
        assert (done.returncode, "error" in done.stderr) == (0, False), done.stderr
    (made,) = (tmp_path / "out1").glob("*/model.safetensors")
    assert made.read_bytes() == (tmp_path / "out0" / "model.safetensors").read_bytes()
    assert shell("nb verify out0", tmp_path).returncode == 0


def test_an_error_is_one_without_streams(tmp_path: Path) -> None:
    assert shell("nb inspect none >&- 2>&-", tmp_path).returncode == 1
    assert shell(f"nb convert {RUN} out --tp 3 --to neox >&- 2>&-", tmp_path).returncode == 4
    assert shell("nb convert >&- 2>&-", tmp_path).returncode == 2


def test_a_reader_that_leaves(tmp_path: Path) -> None:
    """The command ends as it would have: 0, or 3 for what differs."""
    done = shell(f"nb convert {RUN} out | true", tmp_path)
    assert (done.returncode, done.stderr.count("error")) == (0, 0), done.stderr
    assert (tmp_path / "out" / "config.json").exists()
    done = shell(f"nb inspect {RUN} --tensors --json | head -1", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")
    other = fixture("pythia_fp32_pp0_tp1")
    done = shell(f"nb diff {RUN} {other} | true", tmp_path)
    assert (done.returncode, done.stderr) == (3, "")
    assert shell("nb --help | true", tmp_path).returncode == 0
    assert shell(f"nb inspect {RUN} 2>&1 >/dev/null | true", tmp_path).returncode == 0


@needs_full
@pytest.mark.parametrize("more", ["", " --json"])
def test_a_full_stdout_is_an_error(more: str, tmp_path: Path) -> None:
    """What the command wrote stays, and the message doesn't blame the target."""
    words = (
        "error: cannot write to stdout: No space left on device. "
        "Files that were already written are kept."
    )
    done = shell(f"nb convert {RUN} out{more} > {FULL}", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == words
    assert "Exception ignored" not in done.stderr
    assert shell("nb verify out", tmp_path).returncode == 0
    done = shell(f"nb batch {RUN} out2 {more} > {FULL}", tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, words)
    done = shell(f"nb diff {RUN} {fixture('pythia_fp32_pp0_tp1')}{more} > {FULL}", tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (3, words)
    assert shell(f"nb --help > {FULL}", tmp_path).returncode == 1


@needs_full
def test_a_full_stderr_changes_nothing(tmp_path: Path) -> None:
    done = shell(f"nb batch {RUN} out --json 2> {FULL}", tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout)["holds"]
    assert shell(f"nb inspect none 2> {FULL}", tmp_path).returncode == 1


@needs_full
def test_a_full_log_names_the_log(tmp_path: Path) -> None:
    done = shell(f"nb batch {RUN} out --log {FULL}", tmp_path)
    assert done.returncode == 0
    assert f"warning: {FULL}: No space left on device. The batch continues" in done.stderr
    assert done.stderr.count("warning") == 1
    assert (tmp_path / "out").is_dir()
