"""The documentation is complete, in order, and its commands work."""

import json
import os
import pickle
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from hub_stub import Stub, serving
from pages import DOCS, ROOT, Shell, all_pages, commands, console_blocks, name_of, prints
from stand_in_trees import write_tree

import neox_bridge
from neox_bridge.cli.app import COMMANDS, app

# built with the site: they are no files
GENERATED = {"reference/cli.md"}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {f"w{n}": n for n in range(250)}, "unk_token": "w0"},
}
# pages whose blocks run in one folder, in their order; test_docs_pythia.py runs those of Pythia
RUN = ("docs/index.md", "docs/how-to/convert.md", "docs/how-to/fine-tune.md")
# pages whose blocks run where pythia-410m and pythia-neox are such models
RUN_ON_MODELS = (
    "docs/explanation/formats.md",
    "docs/how-to/doctor.md",
    "docs/reference/changes.md",
    "docs/reference/families.md",
    "docs/reference/glossary.md",
    "docs/reference/schemas.md",
)
# How many blocks of the other pages show what a larger model or another run prints. Their commands
# run on stand-ins (``STAND_INS``), and their output is not compared. The numbers may only shrink.
NOT_COMPARED = {
    "README.md": 1,
    "docs/explanation/benchmarks.md": 1,
    "docs/explanation/exactness.md": 1,
    "docs/explanation/safety.md": 2,
    "docs/explanation/writing.md": 4,
    "docs/how-to/audit.md": 6,
    "docs/how-to/batch.md": 4,
    "docs/how-to/object-stores.md": 1,
    "docs/how-to/patch.md": 1,
    "docs/how-to/publish.md": 1,
    "docs/how-to/reshard.md": 8,
    "docs/how-to/verify.md": 5,
    "docs/reference/loads-in-gpt-neox.md": 1,
    "docs/reference/refused.md": 2,
}
RUN_OF_TWO_RANKS = ROOT / "tests" / "data" / "reshard" / "bf16_tp2_dp2"
# What is copied for each name that these pages use: a small model, its GPT-NeoX form, or a run.
STAND_INS = {
    "model": ("hf-model", "pythia-12b", "pythia-410m", "pythia-20b", "llama-bf16", "llama-fp16"),
    "neox": ("pythia-neox",),
    "run": ("run", "old-run", "run-a", "run-b", "run-dp1", "run-dp2", "suite"),
}
# Commands that end with another exit code than 0, by how they begin: they show an error or a
# difference, or the stand-in is no such case.
EXITS = {
    "neox-bridge audit": 3,  # the steps of the stand-in are one step
    "neox-bridge convert run hf --ignore-key rope_scaling": 2,
    "neox-bridge doctor pythia-neox --error traceback.txt --for": 4,
    "neox-bridge doctor pythia-neox --for neox": 4,
    "neox-bridge doctor pythia-neox --for neox@2024-03 --fix": 0,
    "neox-bridge inspect --security downloaded.bin": 1,
    "neox-bridge inspect downloaded.bin --security": 1,
    "neox-bridge report audit.json": 3,
    "neox-bridge reshard old-run run-today": 4,  # --dp 8 with a global batch of 4
    "neox-bridge reshard run new --dp 3": 4,
}
# Commands that never run. The list may only shrink.
NEVER_RUN = {
    "neox-bridge audit EleutherAI/neox-ckpt": "runs on the page about Pythia",
    "neox-bridge batch EleutherAI/neox-ckpt": "runs on the page about Pythia",
    "neox-bridge batch pythia-20b": "a Ray cluster",
    "neox-bridge batch run/ converted/ --executor ray": "a Ray cluster",
    "neox-bridge batch run/ hf://": "an account of the Hub",
    "neox-bridge batch s3://": "a store",
    "neox-bridge convert pythia-410m s3://": "a store",
    "neox-bridge convert run hf://": "an account of the Hub",
    "neox-bridge convert s3://": "a store",
    "neox-bridge diff hf://": "a store",
    "neox-bridge inspect s3://": "a store",
    "neox-bridge verify pythia-410m s3://": "a store",
    "neox-bridge verify s3://": "a store",
    "for n in $(seq 20); do neox-bridge toy": "20 checkpoints of 141 MB",
    "time neox-bridge audit toys": "20 checkpoints of 141 MB",
}


# what GPT-NeoX of March 2024 prints for a checkpoint of today
TRACEBACK = """\
RuntimeError: Error(s) in loading state_dict for ParallelTransformerLayerPipe:
\tMissing key(s) in state_dict: "attention.rotary_emb.inv_freq", "mlp.dense_h_to_4h.weight", \
"mlp.dense_4h_to_h.weight".
\tUnexpected key(s) in state_dict: "mlp.linear1.weight", "mlp.linear2.weight".
"""


class _Loader(yaml.SafeLoader):
    """mkdocs.yml may name Python functions."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda *_: None)


def nav() -> list[str]:
    """The pages in the order of the navigation."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    return list(leaves(yaml.load(text, _Loader)["nav"]))


def leaves(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    for part in entry.values() if isinstance(entry, dict) else entry:
        if not isinstance(entry, str):
            yield from leaves(part)


def written() -> list[str]:
    return [page for page in nav() if page not in GENERATED]


def shown_commands() -> list[tuple[str, str]]:
    """Each call of neox-bridge that a console block shows, and its page."""
    calls = []
    for page in all_pages():
        for block in console_blocks(page):
            for command, _ in commands(block):
                text = re.sub(r"\$\([^)]*\)|\$\{?\w+\}?", "1", command)
                for part in re.split(r"\n|;|&&", text):
                    words = shlex.split(part, comments=True)
                    if "neox-bridge" in words:
                        call = words[words.index("neox-bridge") + 1 :]
                        calls.append((name_of(page), shlex.join(before(call, ">"))))
    return calls


def before(words: list[str], mark: str) -> list[str]:
    return words[: words.index(mark)] if mark in words else words


def test_every_page_is_in_the_navigation() -> None:
    assert {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} == set(written())


@pytest.mark.parametrize("page", written())
def test_a_page_begins_with_something_that_works(page: str) -> None:
    """A title of one line, then soon a block of commands or of Python."""
    text = (DOCS / page).read_text(encoding="utf-8")
    assert text.startswith("# ")
    block = re.search(r"^```(console|python|sh)$", text, re.M)
    assert block is not None
    assert text[: block.start()].count("\n") <= 12


@pytest.mark.parametrize("page", written())
def test_a_page_ends_with_a_link_to_another(page: str) -> None:
    last = (DOCS / page).read_text(encoding="utf-8").rstrip().split("\n\n")[-1]
    link = re.fullmatch(r"Next: \[[^\]]+\]\(([^)#]+)(#[^)]*)?\)\.", last.replace("\n", " "))
    assert link, last
    target = (DOCS / page).parent.joinpath(link[1]).resolve()
    assert target.relative_to(DOCS).as_posix() in nav()


def test_the_python_api_has_every_export() -> None:
    text = (DOCS / "reference" / "python-api.md").read_text(encoding="utf-8")
    exports = set(neox_bridge.__all__) - {"__version__"}
    assert set(re.findall(r"^::: neox_bridge\.(\w+)$", text, re.M)) == exports


def test_the_help_of_every_command_is_a_section() -> None:
    from runpy import run_path

    pytest.importorskip("mkdocs")
    text = run_path(str(DOCS / "_generate.py"))["commands_page"]()
    assert re.findall(r"^## (.*)$", text, re.M) == list(COMMANDS)
    assert all(f"Usage: neox-bridge {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("page", all_pages(), ids=name_of)
def test_pages_address_users(page: Path) -> None:
    """No page sends a user to a test or a module, except where a measurement is repeated."""
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"\]\((?:\.\./)*(?:src|tests)/[^)]*\)", text) == []


@pytest.mark.parametrize(("page", "call"), shown_commands())
def test_a_command_is_one(page: str, call: str, tmp_path: Path) -> None:
    """The command exists, with these options and values, and as many arguments."""
    words = shlex.split(call)
    if "gpt-neox" in call:
        tree = str(write_tree("2024-09", tmp_path / "tree"))
        words = [re.sub(r"(~|/path/to)/gpt-neox", tree, word) for word in words]
    if words[0].startswith("-"):
        app.make_context("neox-bridge", words, resilient_parsing=True)
        return
    command = app.get_command(click.Context(app), words[0])
    assert command is not None, words[0]
    if {"-h", "--help"} & set(words):
        return
    command.make_context(words[0], words[1:])


def test_the_blocks_whose_output_is_not_compared() -> None:
    counts = {name_of(page): len(console_blocks(page)) for page in all_pages()}
    run = {*RUN, *RUN_ON_MODELS, "docs/how-to/pythia.md"}
    counts["README.md"] -= 1  # its first block is that of the page "Get started"
    assert {name: n for name, n in counts.items() if n and name not in run} == NOT_COMPARED


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A folder where the Hub has two small Pythias, with their tokenizer."""
    import torch
    from common import make_hf

    model = make_hf(tmp_path_factory.mktemp("hub") / "model", torch.float16)
    (model / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    stub = Stub()
    for name in ("pythia-70m", "pythia-410m"):
        for revision in ("main", "step0", "step1000", "step100000", "step143000"):
            stub.put_files(f"EleutherAI/{name}", revision, model)
    with serving(stub):
        yield Shell(tmp_path_factory.mktemp("page"), stub.url, model)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RUN, *RUN_ON_MODELS, "README.md"])
def test_blocks_work_as_printed(name: str, shell: Shell, tmp_path: Path) -> None:
    places = {"/path/to/gpt-neox": str(write_tree("2024-09", tmp_path / "gpt-neox"))}
    shell.cwd = tmp_path / "cwd"
    shell.cwd.mkdir()
    if name in RUN_ON_MODELS:
        (shell.cwd / "pythia-410m").symlink_to(shell.model)
        shell.run("neox-bridge convert pythia-410m pythia-neox")
        (shell.cwd / "traceback.txt").write_text(TRACEBACK)
    blocks = console_blocks(ROOT / name)
    for block in blocks[:1] if name == "README.md" else blocks:
        for command, shown in commands(block):
            if "pythia-neox/finetuned" in command:
                train(shell.cwd / "pythia-neox")
            printed = shell.run(command, places, exit_code(command))
            assert [line for line in shown if not prints(printed, line)] == [], printed


def exit_code(command: str) -> int:
    """That of the longest beginning in ``EXITS``, or 0."""
    starts = [start for start in EXITS if command.startswith(start)]
    return EXITS[max(starts, key=len)] if starts else 0


def train(run: Path) -> None:
    """Save a step where the run's settings say, with a copy of them, as GPT-NeoX does."""
    settings = yaml.safe_load((run / "finetune.yml").read_text())
    step = Path(settings["save"]) / "global_step0"
    shutil.copytree(run / "global_step0", step)
    (step / "neox_bridge.json").unlink()
    shutil.rmtree(step / "configs")
    (step / "configs").mkdir()
    shutil.copy(run / "finetune.yml", step / "configs")
    (step.parent / "latest").write_text(step.name)


def other_pages() -> list[str]:
    return sorted(name for name in NOT_COMPARED if neox_commands(name))


def neox_commands(name: str) -> list[str]:
    """The commands of a page that call neox-bridge, without those that never run."""
    blocks = console_blocks(ROOT / name)[1 if name == "README.md" else 0 :]
    shown = [pair for block in blocks for pair in commands(block)]
    texts = [command for command, _ in shown if "neox-bridge" in command]
    return [text for text in texts if not any(text.startswith(start) for start in NEVER_RUN)]


def test_what_never_runs_is_shown() -> None:
    pages = [block for page in all_pages() for block in console_blocks(page)]
    shown = [command for block in pages for command, _ in commands(block)]
    for start in (*NEVER_RUN, *EXITS):
        assert any(command.startswith(start) for command in shown), start


@pytest.fixture(scope="module")
def stand_ins(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the other pages name."""
    assert shell.model is not None
    folder = shell.cwd = tmp_path_factory.mktemp("stand-ins") / "all"
    folder.mkdir()
    for name in STAND_INS["model"]:
        shutil.copytree(shell.model, folder / name)
    shell.run("neox-bridge convert pythia-410m pythia-neox --tp 2 -q")
    for name in STAND_INS["run"]:
        run = Path(shutil.copytree(RUN_OF_TWO_RANKS, folder / name))
        step = run / (run / "latest").read_text().strip()
        for number in (1000, 2000):
            shutil.copytree(step, run / f"global_step{number}")
    shell.run("neox-bridge convert run exported --step 1000 -q; cp -r run hf-run")
    (folder / "downloaded.bin").write_bytes(pickle.dumps(Hostile()))
    return folder


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


@pytest.mark.slow
@pytest.mark.parametrize("name", other_pages())
def test_other_commands_run_on_stand_ins(
    name: str, shell: Shell, stand_ins: Path, tmp_path: Path
) -> None:
    places = {"~/gpt-neox": str(write_tree("2024-03", tmp_path / "tree"))}
    shell.cwd = Path(shutil.copytree(stand_ins, tmp_path / "cwd"))
    if name == "docs/explanation/writing.md":
        shell.run("rm -r pythia-neox; cp -r pythia-410m hf")
    if name == "README.md":
        shell.run("neox-bridge convert pythia-neox pythia-hf -q")
    for command in neox_commands(name):
        shell.run(command, places, exit_code(command))
