"""The patch of train.py and deepy.py, on stand-ins and by ``make test-neox`` on real trees."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run
from file_trees import content

from neox_bridge import Refused
from neox_bridge.patch.patcher import KEPT, apply, plan_patch, revert
from neox_bridge.patch.train_scripts import IMPORT, plan_train

SCRIPTS = ("train.py", "deepy.py", "eval.py", "generate.py")


def test_adds_the_import_before_all_others(tree: Path) -> None:
    plan = plan_train(tree)
    assert [file.path for file in plan.files] == [*SCRIPTS]
    for file in plan.files:
        removed = [line for line in file.diff.splitlines() if line[:1] == "-"]
        assert removed == [f"--- a/{file.path}"]
        before, _, after = file.new.decode().partition(IMPORT)
        assert not re.search("^(import|from) ", before, re.MULTILINE)
        assert after.startswith(("from megatron", "import logging", "import os"))


def test_revert_is_byte_for_byte(tree: Path) -> None:
    before = content(tree)
    apply(plan_train(tree))
    apply(plan_patch(tree))  # with the same record
    assert plan_train(tree).files == ()
    assert plan_patch(tree).files == ()
    revert(tree)
    assert content(tree) == before
    assert not (tree / KEPT).exists()


def test_the_command(today: Path) -> None:
    before = content(today)
    output = run("patch", today, "--train").stdout
    assert "train.py:" in output
    assert f"patched {today}: 4 files" in output
    assert "patched already" in run("patch", today, "--train").stdout
    both = run("patch", today, "--train", "--scripts")
    assert both.exit_code == 2
    assert "--train, --scripts: only one at a time" in both.stderr
    run("patch", today, "--revert")
    assert content(today) == before


def test_windows_newlines_stay(today: Path) -> None:
    path = today / "train.py"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    apply(plan_train(today))
    assert b"\n" not in path.read_bytes().replace(b"\r\n", b"")
    assert plan_train(today).files == ()


def test_leftovers_of_a_killed_run_are_deleted(today: Path) -> None:
    (today / ".train.py.neox-bridge-tmp").write_text("half")
    apply(plan_train(today))
    assert not (today / ".train.py.neox-bridge-tmp").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_neox_bridge_it_says_what_to_install(today: Path, script: str) -> None:
    apply(plan_train(today))
    command = [
        sys.executable,
        "-S",
        "-E",
        str(today / script),
    ]  # neither site-packages nor PYTHONPATH
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=today)
    assert done.returncode == 1
    assert "pip install ./neox-bridge. Or restore" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_error_of_the_import_is_shown(today: Path, tmp_path: Path) -> None:
    apply(plan_train(today))
    (tmp_path / "neox_bridge").mkdir()
    (tmp_path / "neox_bridge" / "__init__.py").write_text("")
    (tmp_path / "neox_bridge" / "neox.py").write_text("import missing_package\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(today / "train.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "No module named 'missing_package'" in done.stderr


def edited(tree: Path, old: str, new: str) -> None:
    text = (tree / "train.py").read_text()
    assert old in text
    (tree / "train.py").write_text(text.replace(old, new))


@pytest.mark.parametrize("kind", ["missing", "other", "syntax", "link", "half"])
def test_unknown_forms_are_refused(today: Path, tmp_path: Path, kind: str) -> None:
    path = today / "train.py"
    if kind == "missing":
        path.unlink()
    elif kind == "other":
        edited(today, "pretrain", "learn")
    elif kind == "syntax":
        edited(today, "def main(", "def main")
    elif kind == "link":
        shutil.move(path, tmp_path / "elsewhere.py")
        path.symlink_to(tmp_path / "elsewhere.py")
    else:
        apply(plan_train(today))
        edited(today, "    raise SystemExit(\n", "    print(\n")
    messages = {
        "missing": r"train.py is missing or does not call pretrain",
        "other": r"train.py is missing or does not call pretrain",
        "syntax": r"train.py cannot be parsed",
        "link": r"train.py is a link",
        "half": r"train.py contains a part of the patch",
    }
    before = content(today)
    with pytest.raises(Refused, match=messages[kind]):
        apply(plan_train(today))
    assert content(today) == before
