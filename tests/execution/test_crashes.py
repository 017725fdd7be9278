"""A conversion that is killed at any moment: the source untouched, the target whole or absent."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from common import HELPERS, convert, make_hf, step_of
from crash_run import CASES

MAIN = HELPERS / "crash_run.py"
SHAPE = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 192, "vocab_size": 300}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A Hugging Face model, the same as GPT-NeoX's, and a run that has another step.

    In memory where there is such a place: what is tried doesn't depend on a disk, and is flushed
    thousands of times.
    """
    with TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        yield made(Path(name))


def made(found: Path) -> Path:
    make_hf(found / "hf", torch.float16, num_hidden_layers=2, **SHAPE)
    convert(found / "hf", found / "neox", tp=2)
    convert(found / "hf", found / "run", tp=1)
    step_of(found / "run").rename(found / "run" / "global_step7")
    (found / "run" / "latest").write_text("global_step7")
    (found / "run" / "finetune.yml").write_text("mine: true\n")
    (found / "hf" / "LICENSE").write_text("the former one")
    convert(found / "hf", found / "root", tp=1, tokenizer=str(tokenizer(found / "words")))
    make_tokenizer(found / "hf", "other")
    (found / "hf" / "LICENSE").write_text("the license")
    return found


def tokenizer(folder: Path) -> Path:
    """One with the same vocabulary as ``make_tokenizer`` gives, formatted otherwise."""
    folder.mkdir()
    make_tokenizer(folder, "first", indent=2)
    return folder


def make_tokenizer(folder: Path, name: str, indent: int | None = None) -> None:
    vocab = {"<|endoftext|>": 0, **{f"w{number}": number for number in range(1, 280)}}
    value = {"model": {"type": "WordLevel", "vocab": vocab}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(value, indent=indent))
    (folder / "tokenizer_config.json").write_text(json.dumps({"name": name}))


@pytest.mark.parametrize("case", sorted(CASES))
def test_killed_at_every_call_that_changes_the_disk(case: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, MAIN, folder, case], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["points"] > 30
    if not case.startswith("fixed"):  # few files are written there
        assert found["resumed"] > found["points"] / 4, "finished files are used again"


@pytest.mark.parametrize("case", ["patch", "revert", "report"])
def test_patch_and_report_killed_at_every_call(case: str, tmp_path: Path) -> None:
    """Every file is the old one or the new one, and the next run leaves nothing else."""
    program = HELPERS / "crash_files.py"
    done = subprocess.run(
        [sys.executable, program, tmp_path, case], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr[-2000:]
    assert int(done.stdout) > 3
