"""The sources of the real GPT-NeoX, as far as this machine has them.

GPT_NEOX_GIT names a git directory of EleutherAI/gpt-neox, NEOX_HOME a folder with trees, and
NEOX_TREE one tree, of the date NEOX_ERA. Nothing of a tree is run.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from collect_keys import TREES as COMMITS
from stand_in_trees import NAMES

FOLDERS = {name: "gpt-neox" if name == "today" else f"neox-{name}" for name in NAMES}
_SCRIPTS = ("train.py", "deepy.py", "eval.py", "generate.py")
_PARTS = ("megatron", "configs", "requirements", "tools", *_SCRIPTS)


class RealTrees(Mapping[str, Path]):
    """A tree's sources by its date, copied into a folder when they are first asked for.

    A tree that is not there skips the test that asks for it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> Path:
        target = self.folder / name
        if not target.exists():
            copy_sources(name, target)
        return target

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


def copy_sources(name: str, target: Path) -> None:
    """Copy the parts of a tree. Skips the test if it is not there."""
    git = os.environ.get("GPT_NEOX_GIT")
    if git:
        _extract(git, COMMITS[name], target)
        return
    tree = _tree(name)
    if tree is None or not (tree / "megatron").is_dir():
        pytest.skip(f"no GPT-NeoX of {name}: set GPT_NEOX_GIT, NEOX_HOME or NEOX_TREE")
    target.mkdir(parents=True)
    for part in _PARTS:
        if (tree / part).is_file():
            shutil.copy(tree / part, target / part)
            continue
        shutil.copytree(tree / part, target / part, ignore=shutil.ignore_patterns("__pycache__"))


def _tree(name: str) -> Path | None:
    if os.environ.get("NEOX_TREE"):
        same = os.environ.get("NEOX_ERA", "today") == name
        return Path(os.environ["NEOX_TREE"]) if same else None
    home = os.environ.get("NEOX_HOME")
    return Path(home) / FOLDERS[name] if home else None


def _extract(git: str, commit: str, target: Path) -> None:
    archive = subprocess.run(
        ["git", f"--git-dir={git}", "archive", commit, *_PARTS], capture_output=True, check=False
    )
    if archive.returncode:
        pytest.fail(f"GPT_NEOX_GIT={git}: {archive.stderr.decode(errors='replace').strip()}")
    target.mkdir()
    subprocess.run(["tar", "-x", "-C", target], input=archive.stdout, check=True)
