"""Every console block of the page about Pythia runs as printed, and prints what the page shows.

The Hub is a stub. Its branches hold a genuine checkpoint of GPT-NeoX v1.0, saved by as many ranks
and with as large a batch as Pythia-160M's, at the steps that the page names.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from hub_stub import Stub, serving
from pages import DOCS, Shell, commands, console_blocks, prints
from published import PUBLISHED

from neox_bridge.cli.app import app

PAGE = DOCS / "how-to" / "pythia.md"
FLAT = PUBLISHED / "v1_dp4_intervals" / "flat"
RAW, TWIN = "EleutherAI/neox-ckpt-pythia-160m", "EleutherAI/pythia-160m"
STEPS = (0, 512, 1000, 2000, 143000)
RANKS, MICRO_BATCH = 64, 16
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {f"w{n}": n for n in range(250)}, "unk_token": "w0"},
}


def blocks() -> list[str]:
    return console_blocks(PAGE)


def convert(*words: object) -> None:
    done = CliRunner().invoke(app, [*map(str, words), "-q"])
    assert done.exit_code == 0, done.output


def saved_by_many_ranks(folder: Path) -> Path:
    """The checkpoint as 64 data-parallel ranks save it, and its yml with their micro-batch."""
    setting = '"train_micro_batch_size_per_gpu": 2'
    text = (FLAT / "160M.yml").read_text()
    assert setting in text
    larger = shutil.copytree(FLAT, folder / "larger")
    total = RANKS * MICRO_BATCH // 4
    (larger / "160M.yml").write_text(text.replace(setting, setting[:-1] + str(total)))
    convert("reshard", larger, folder / "run", "--dp", RANKS)
    flat = shutil.copytree(folder / "run" / "global_step8", folder / "flat")
    shutil.rmtree(flat / "configs")
    (flat / "neox_bridge.json").unlink()
    (flat / "160M.yml").write_text(text.replace(setting, setting[:-1] + str(MICRO_BATCH)))
    return flat


def at_step(flat: Path, step: int, folder: Path) -> Path:
    """A copy that says that it is another step."""
    shutil.copytree(flat, folder)
    path = folder / "mp_rank_00_model_states.pt"
    value = torch.load(path, weights_only=False)
    value |= {"iteration": step, "global_steps": step, "global_samples": step * 1024}
    torch.save(value, path)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stub]:
    """A raw suite, and its twin for transformers with the tokenizer on ``main``."""
    folder = tmp_path_factory.mktemp("hub")
    flat = saved_by_many_ranks(folder)
    model = folder / "model"
    convert("convert", flat, model)
    (model / "neox_bridge.json").unlink()
    stub = Stub()
    stub.put_files(TWIN, "main", model)
    stub.put(TWIN, "main", **{"tokenizer.json": json.dumps(TOKENIZER).encode()})
    for step in STEPS:
        stub.put_files(RAW, f"step{step}", at_step(flat, step, folder / f"step{step}"))
        stub.put_files(TWIN, f"step{step}", model)
    with serving(stub):
        yield stub


@pytest.fixture(scope="module")
def outputs(hub: Stub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each command prints, run in the page's order in one folder."""
    shell = Shell(tmp_path_factory.mktemp("page"), hub.url)
    shown = [pair for block in blocks() for pair in commands(block)]
    return {command: shell.run(command) for command, _ in shown} | {"cwd": str(shell.cwd)}


@pytest.mark.parametrize("number", range(len(blocks())))
def test_a_block_works_as_printed(number: int, outputs: dict[str, str]) -> None:
    for command, shown in commands(blocks()[number]):
        missing = [line for line in shown if not prints(outputs[command], line)]
        assert missing == [], f"{command}\n{outputs[command]}"


def test_the_page_shows_what_it_is_about() -> None:
    """A page without its blocks would pass the test above."""
    verbs = re.findall(r"neox-bridge ([\w-]+)", "\n".join(blocks()))
    assert set(verbs) >= {"convert", "export-optimizer", "reshard", "audit", "batch", "inspect"}
    shown = [line for block in blocks() for _, lines in commands(block) for line in lines]
    assert len(shown) > 10


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
    assert {path.name for path in (folder / "moments").iterdir()} == {f"step{n}" for n in STEPS}
    exported = json.loads((folder / "moments" / "step1000" / "optimizer.json").read_text())
    assert [group["step"] for group in exported["groups"]] == [1001, 1001], "1 + 1000 - 0"
    assert exported["derived"]["step"] == "1 + iteration - skipped_steps"
    converted = {path.name for path in (folder / "converted").iterdir()}
    assert converted == {f"step{n}" for n in STEPS if n % 1000 == 0}
