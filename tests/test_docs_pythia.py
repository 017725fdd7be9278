"""Every console block of the page about Pythia runs as printed, and prints what the page shows.

The Hub is a stub. Its branches hold a genuine checkpoint of GPT-NeoX v1.0, saved by as many ranks
and with as large a batch as Pythia-160M's, at the steps that the page names.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pages import ROOT, commands, difference
from rehearsal import PYTHIA, RAW_STEPS, perform, stage

COMMANDS = commands(ROOT / PYTHIA)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What each command prints, run in the page's order in one folder."""
    folder = tmp_path_factory.mktemp("page")
    with stage(PYTHIA, folder, folder) as shell:
        printed = {command.text: perform(command, shell) for command in COMMANDS}
        yield printed | {"cwd": str(shell.cwd)}


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_a_command_works_as_printed(number: int, outputs: dict[str, str]) -> None:
    command = COMMANDS[number]
    output = outputs[command.text]
    assert difference(command, output) == "", f"{command.text}\n{output}"


def test_the_page_shows_what_it_is_about() -> None:
    """A page without its blocks would pass the test above."""
    verbs = re.findall(r"neox-bridge ([\w-]+)", "\n".join(one.text for one in COMMANDS))
    assert set(verbs) >= {"convert", "export-optimizer", "reshard", "audit", "batch", "inspect"}
    assert sum(len(command.shown) for command in COMMANDS) > 10


def test_what_the_page_says_of_resume_yml(outputs: dict[str, str]) -> None:
    run = Path(outputs["cwd"]) / "RUN"
    settings = yaml.safe_load((run / "resume.yml").read_text())
    keys = ("train_data_paths", "valid_data_paths", "test_data_paths")
    assert all(settings[key][0].startswith("/fsx/") for key in keys), "still to be filled in"
    assert settings["vocab_file"] == str(run / "tokenizer" / "tokenizer.json")
    assert Path(settings["vocab_file"]).is_file()
    assert settings["load"] == settings["save"] == str(run)
    assert not {"launcher", "deepspeed_slurm", "gas"} & set(settings)
    assert settings["gradient_clipping"] == 8
    assert settings["optimizer"]["params"]["eps"] == 8e-8


def test_every_step_is_there(outputs: dict[str, str]) -> None:
    folder = Path(outputs["cwd"])
    assert {path.name for path in (folder / "moments").iterdir()} == {f"step{n}" for n in RAW_STEPS}
    exported = json.loads((folder / "moments" / "step1000" / "optimizer.json").read_text())
    assert [group["step"] for group in exported["groups"]] == [1001, 1001], "1 + 1000 - 0"
    assert exported["derived"]["step"] == "1 + iteration - skipped_steps"
    converted = {path.name for path in (folder / "converted").iterdir()}
    assert converted == {f"step{n}" for n in RAW_STEPS if n % 1000 == 0}
