"""``convert`` to a place on the Hub, as a process of its own."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Run
from common import make_hf
from hub_stub import READ, Stub, serving

REPO = "org/model"
PLACE = "hf://org/model@step3"
WORK = ".org--model@step3.neox-bridge"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("source") / "pythia-tiny")


@pytest.fixture
def hub() -> Iterator[Stub]:
    with serving(Stub()) as stub:
        yield stub


@pytest.fixture
def run(hub: Stub, tmp_path: Path) -> Run:
    (tmp_path / "cwd").mkdir()
    return Run(hub, tmp_path / "cwd")


def locally(run: Run, model: Path, *arguments: object) -> dict[str, bytes]:
    """What a conversion to a folder holds."""
    run("convert", model, "local", *arguments)
    folder = run.folder / "local"
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_model_as_a_private_branch(hub: Stub, run: Run, model: Path) -> None:
    run("convert", model, "neox", "--tp", "2")
    out, err = run("convert", "neox", PLACE, "--private")
    assert f"files are written to {run.folder / WORK}" in err
    assert f"published {PLACE}: Hugging Face gpt_neox" in out
    assert "verified bit by bit" in out
    assert f"{hub.url}/org/model/tree/step3" in out
    assert hub.repos[REPO].private
    run("convert", "neox", "local")
    files = hub.files(REPO, "step3")
    local = {path.name: path.read_bytes() for path in (run.folder / "local").iterdir()}
    assert files == local
    assert hub.count("POST /commit/") == 1
    title = hub.repos[REPO].commits[hub.repos[REPO].branches["step3"]].title
    assert title.startswith("Convert neox/global_step0 with neox-bridge")
    assert sorted(os.listdir(run.folder)) == ["local", "neox"]


def test_twice_converts_once(hub: Stub, run: Run, model: Path) -> None:
    run("convert", model, PLACE, "--tp", "2")
    head = hub.repos[REPO].branches["step3"]
    hub.seen.clear()
    out, _ = run("convert", model, PLACE, "--tp", "2")
    assert "nothing was uploaded" in out
    assert [s for s in hub.seen if not s.startswith(("GET", "HEAD"))] == []
    told = run.json("convert", model, PLACE, "--tp", "2")
    assert told["hub"]["done"] is True
    assert told["published"] is None
    assert hub.repos[REPO].branches["step3"] == head


def test_another_plan_is_refused_before_anything_is_made(hub: Stub, run: Run, model: Path) -> None:
    run("convert", model, "hf://org/model", "--tp", "2")
    before = hub.files(REPO)
    _, err = run("convert", model, "hf://org/model", "--tp", "4", code=1)
    assert "--overwrite" in err
    assert "are written to" not in err
    assert hub.files(REPO) == before
    done = run.json("convert", model, "hf://org/model", "--tp", "4", "--overwrite")
    assert "global_step0/mp_rank_03_model_states.pt" in done["published"]["uploaded"]
    assert hub.files(REPO) != before


def test_a_gpt_neox_target_names_no_folder_of_this_machine(
    hub: Stub, run: Run, model: Path
) -> None:
    out, _ = run("convert", model, PLACE, "--tp", "2")
    assert "fill in: data_path and vocab_file and load and save in" in out
    files = hub.files(REPO, "step3")
    assert files["latest"] == b"global_step0"
    for name, data in files.items():
        assert str(run.folder).encode() not in data, name
    assert b"/path/to/model" in files["finetune.yml"]


def test_what_would_be_done(hub: Stub, run: Run, model: Path) -> None:
    out, _ = run("convert", model, PLACE, "--private", "--dry-run")
    assert "hub      org/model will be created, private\n" in out
    assert "branch   step3 will be created\n" in out
    told = run.json("convert", model, PLACE, "--private", "--dry-run")
    assert told["hub"]["size"] == told["summary"]["bytes"]
    assert sorted(told["hub"]["new"]) == sorted(file["path"] for file in told["files"])
    assert [s for s in hub.seen if not s.startswith(("GET", "HEAD"))] == []
    assert hub.repos == {}
    assert os.listdir(run.folder) == []
    run("convert", model, PLACE, "--private")
    out, _ = run("convert", model, PLACE, "--dry-run")
    assert "hub      org/model exists, private\n" in out
    assert "branch   step3 exists\n" in out
    assert "upload   nothing" in out
    out, _ = run("convert", model, PLACE, "--tp", "4", "--dry-run")
    assert "conflicts, replaced only with --overwrite: " in out


def test_a_pull_request(hub: Stub, run: Run, model: Path) -> None:
    _, err = run("convert", model, "hf://org/model", "--create-pr", code=1)
    assert "no such repository" in err
    hub.make(REPO)
    out, _ = run("convert", model, "hf://org/model", "--create-pr")
    assert "proposed for hf://org/model@main" in out
    assert f"{hub.url}/org/model/discussions/1" in out
    assert hub.files(REPO) == {}
    assert "latest" in hub.files(REPO, "refs/pr/1")


def test_killed_while_it_uploads(hub: Stub, run: Run, model: Path) -> None:
    started: list[subprocess.Popen[str]] = []

    def kill() -> None:
        started[0].send_signal(signal.SIGKILL)
        started[0].wait()

    hub.before.append(("PUT ", kill))
    started.append(run.start("convert", model, PLACE))
    started[0].communicate(timeout=120)
    assert started[0].returncode == -signal.SIGKILL
    assert hub.files(REPO, "step3") == {}
    done = run.json("convert", model, PLACE)
    assert done["result"]["kept"] == done["result"]["size"]
    assert done["verified"] is True
    assert done["published"]["changed"] is True
    assert "latest" in hub.files(REPO, "step3")
    assert os.listdir(run.folder) == []


@pytest.mark.parametrize("verify", [[], ["--no-verify"]])
def test_what_was_kept_is_not_trusted(hub: Stub, run: Run, model: Path, verify: list[str]) -> None:
    hub.fail("PUT /lfs/", 403, times=99)
    _, err = run("convert", model, PLACE, *verify, code=1)
    assert f"The files are kept in {run.folder / WORK}" in err
    hub.faults.clear()
    path = run.folder / WORK / "files/global_step0/layer_00-model_00-model_states.pt"
    data = bytearray(path.read_bytes())
    data[-2000] ^= 1
    path.write_bytes(data)
    done = run.json("convert", model, PLACE, *verify)
    assert done["result"]["kept"] == 0
    expected = locally(run, model)
    name = "global_step0/layer_00-model_00-model_states.pt"
    assert hub.files(REPO, "step3")[name] == expected[name]


def test_interrupted_while_it_uploads(hub: Stub, run: Run, model: Path) -> None:
    started: list[subprocess.Popen[str]] = []
    hub.before.append(("POST .*/preupload/", lambda: started[0].send_signal(signal.SIGINT)))
    hub.fail("POST /preupload/", 503, times=99)
    started.append(run.start("convert", model, PLACE))
    _, err = started[0].communicate(timeout=120)
    assert started[0].returncode == 130
    assert f"interrupted: The files are kept in {run.folder / WORK}" in err


def test_one_at_a_time(hub: Stub, run: Run, model: Path) -> None:
    refused: list[str] = []
    hub.before.append(
        ("POST .*/commit/", lambda: refused.append(run("convert", model, PLACE, code=1)[1]))
    )
    run("convert", model, PLACE)
    assert "Another neox-bridge" in refused[0]


def test_where_it_is_made(hub: Stub, run: Run, model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    run.environment["TMPDIR"] = str(tmp_path / "a")
    _, err = run("convert", model, PLACE)
    assert f"are written to {tmp_path / 'a' / WORK}" in err
    _, err = run("convert", model, "hf://org/two", "--work", tmp_path / "b")
    assert f"are written to {tmp_path / 'b' / '.org--two@main.neox-bridge'}" in err
    _, err = run("convert", model, "hf://org/three", "--work", tmp_path / "c", code=1)
    assert "no such folder" in err
    assert os.listdir(tmp_path / "a") == os.listdir(tmp_path / "b") == []


def test_tokens_are_looked_at_first(hub: Stub, run: Run, model: Path) -> None:
    for token, words in ((READ, "is read-only"), ("", "hf auth login"), ("x", "HF_TOKEN")):
        run.environment["HF_TOKEN"] = token
        _, err = run("convert", model, PLACE, code=1)
        assert words in err
        assert "are written to" not in err


def test_usage(run: Run, model: Path) -> None:
    for option in (("--private",), ("--create-pr",), ("--work", ".")):
        _, err = run("convert", model, "folder", *option, code=2)
        assert "hf://ORG/NAME" in err
    _, err = run("convert", model, "hf://model", code=1)
    assert "hf://ORG/NAME@BRANCH" in err


def test_files_are_not_written_inside_the_source(run: Run, model: Path) -> None:
    before = sorted(os.listdir(model))
    for command in (("convert", model, PLACE), ("batch", model, "hf://org/model")):
        _, err = run(*command, "--work", model, code=2)
        assert f"error: --work: {model}/.org--model@" in err
        assert f"is inside the source {model}. Choose a folder outside of the source." in err
        assert sorted(os.listdir(model)) == before
