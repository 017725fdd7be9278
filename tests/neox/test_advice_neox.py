"""Every command that doctor and doctor --error advise is run as printed, and ends in a strict load.

In the real GPT-NeoX: checkpoints written for each time are loaded in each tree; where that fails,
the message of that tree is pasted, with and without what else the user may know.
"""

import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from common import convert
from real_neox import ALL_TREES, run_alone, tree_of

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.doctor.advice import ANY_TREE, advise
from neox_bridge.doctor.diagnose import judge
from neox_bridge.frameworks.eras import era_named
from neox_bridge.frameworks.targets import target_named

pytestmark = pytest.mark.neox
SOURCES: dict[str, dict[str, Any]] = {
    "2024-03": {"era": era_named("2024-03")},
    "2024-09 in ranks": {"era": era_named("2024-09"), "pp": 0},
    "2024-10": {"era": era_named("2024-10")},
    "today in ranks": {"era": era_named("today"), "pp": 0},
    "with the flag": {"inv_freq": "store"},
    "old names with the flag": {"inv_freq": "store", "era": era_named("2024-09")},
}


def advised(root: Path, error: str, tree: Path, target: str) -> set[str]:
    """By doctor, and by the message: alone, with a tree's name, with the frames of a traceback."""
    checkpoint = open_checkpoint(str(root))
    verdict = judge(checkpoint, target_named(target))
    assert verdict.answer == "fails"
    commands = {case.finding.remedy for case in verdict.cases if case.fails}
    framed = f'  File "{tree}/megatron/checkpointing.py", line 1, in load_checkpoint\n{error}'
    for text, named in ((error, None), (error, target_named(target)), (framed, None)):
        advice = advise(text, str(root), checkpoint, named)
        assert advice is not None, error
        if ANY_TREE in advice.fix:
            assert (text, named) == (error, None)
            assert "neox_arguments" in error or "NeoXArgs" in error
            continue
        commands.add(advice.fix)
    return commands


@pytest.mark.parametrize("name", ALL_TREES)
def test_every_advised_command(name: str, hf: Path, neox_python: str, tmp_path: Path) -> None:
    tree, target = tree_of(name), "today" if name == "today" else f"neox@{name}"
    roots = {source: tmp_path / source for source in SOURCES}
    for source, options in SOURCES.items():
        convert(hf, roots[source], **options)
    jobs = [{"yml": str(root / "finetune.yml")} for root in roots.values()]
    before = run_alone(neox_python, tree, jobs, tmp_path / "before")
    commands: dict[Path, str] = {}
    for source, error in zip(SOURCES, before.errors, strict=True):
        if error is None:
            opened = open_checkpoint(str(roots[source]))
            assert judge(opened, target_named(target)).answer == "loads"
            continue
        for number, command in enumerate(sorted(advised(roots[source], error, tree, target))):
            words = shlex.split(command)
            place = words.index("--fix") + 1 if "--fix" in words else 3
            words[place] = str(tmp_path / f"fixed {source} {number}")
            done = CliRunner().invoke(app, words[1:])
            assert done.exit_code == 0, (command, done.output)
            commands[Path(words[place])] = command
    assert commands
    jobs = [{"yml": str(root / "finetune.yml")} for root in commands]
    after = run_alone(neox_python, tree, jobs, tmp_path / "after")
    failed = {
        command: error
        for command, error in zip(commands.values(), after.errors, strict=True)
        if error is not None
    }
    assert failed == {}
