"""A path that does not exist: the nearest one, and the model of that name on the Hub."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import Run
from hub_stub import Stub, serving
from tiny import write_hf

from neox_bridge.api import open_checkpoint
from neox_bridge.errors import BridgeError
from neox_bridge.layouts.near_names import nearest_path, suggestions
from neox_bridge.verification.runs import find_runs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model and a run of two steps."""
    hf = write_hf(tmp_path / "cwd" / "pythia-neox")
    for step in ("step1000", "step2000"):
        shutil.copytree(hf, tmp_path / "cwd" / "runs" / step)
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "cwd"


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("pythia-noex", "pythia-neox"),
        ("./pythia-noex", "./pythia-neox"),
        ("runs/step100", "runs/step1000"),
        ("runs/step2000x/", "runs/step2000"),
        ("rnus/step1000", "runs/step1000"),
        ("rnus/step3", ""),
        ("pythia-neox/confg.json", ""),  # a file is no checkpoint
        ("something", ""),
        ("", ""),
        ("/", ""),
        ("/nowhere/at/all", ""),
    ],
)
def test_the_nearest_path(path: str, near: str, folder: Path) -> None:
    assert nearest_path(path) == near
    assert nearest_path(str(folder / path)) in ("", str(folder / near).replace("./", ""))


def test_models_are_suggested_for_names_without_an_owner(folder: Path) -> None:
    assert suggestions("pythia-410m") == "On the Hub: EleutherAI/pythia-410m."
    assert suggestions("pythia-410") == "On the Hub: EleutherAI/pythia-410m."
    assert suggestions("pythia-410m@step3").endswith("EleutherAI/pythia-410m@step3.")
    assert suggestions("my-model") == ""


def test_a_misspelled_folder_is_not_looked_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look_up(*_: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("neox_bridge.layouts.hub_source.look_up", look_up)
    for path, words in (
        ("pythia-noex", "pythia-noex: no such folder. Did you mean pythia-neox?"),
        ("./runs/step100", "./runs/step100: no such folder. Did you mean ./runs/step1000?"),
        ("pythia-410m", "pythia-410m: no such folder. On the Hub: EleutherAI/pythia-410m."),
    ):
        with pytest.raises(BridgeError) as caught:
            open_checkpoint(path)
        assert str(caught.value) == words


NOT_ASKED = (
    "The Hub was not asked, because the folder {} exists. For a model of the Hub, write hf://{}"
)


@pytest.mark.parametrize("read", [open_checkpoint, lambda path: find_runs([path])])
def test_what_looks_like_a_path_below_an_existing_folder_is_not_looked_up(
    read: Callable[[str], object], folder: Path
) -> None:
    near, absent = "runs/step100", "pythia-neox/finetuned"
    (folder / "pythia-neox" / "finetune.yml").touch()
    with pytest.raises(BridgeError) as caught:
        read(near)
    words = f"{near}: no such folder. Did you mean runs/step1000? {NOT_ASKED.format('runs', near)}"
    assert str(caught.value) == words
    with pytest.raises(BridgeError) as caught:  # finetune.yml is not suggested: it is a file
        read(absent)
    assert str(caught.value) == (
        f"{absent}: no such folder. {NOT_ASKED.format('pythia-neox', absent)}"
    )


@pytest.fixture
def hub() -> Iterator[Stub]:
    with serving(Stub()) as stub:
        yield stub


def test_the_hub_is_not_asked_without_saying_so(hub: Stub, folder: Path) -> None:
    run = Run(hub, folder)
    for words in (("inspect",), ("convert", "--to", "neox"), ("audit",), ("batch",)):
        target = () if words[0] in ("inspect", "audit") else ("out",)
        _, error = run(words[0], "rnus/step1000", *target, *words[1:], code=1)
        assert "There is no local folder rnus/step1000 either." in error
        assert "Did you mean runs/step1000?" in error
    hub.put_files("runs/step100", "main", folder / "pythia-neox")
    out, _ = run("inspect", "hf://runs/step100")  # as the error of that path advises
    assert "gpt_neox" in out
    out, _ = run("inspect", "runs/step100", "--revision", "main")
    assert "gpt_neox" in out
    hub.put_files("runs/other", "main", folder / "pythia-neox")
    out, _ = run("inspect", "runs/other")
    assert "there is no local folder runs/other, so the model on the Hub is read" in out
    shutil.rmtree(folder / "runs")
    out, _ = run("inspect", "runs/other")
    assert "no local folder" not in out
