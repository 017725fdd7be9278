"""A batch into branches of a model of the Hub, and from them."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Run
from common import make_hf
from file_trees import same_tree
from hub_stub import Stub, serving

STEPS = ("step0", "step1000")
REPO = "org/model"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batch") / "run"
    for seed, step in enumerate(STEPS):
        make_hf(folder / step, torch.float16, seed=seed)
    return folder


@pytest.fixture
def hub() -> Iterator[Stub]:
    with serving(Stub()) as stub:
        yield stub


@pytest.fixture
def run(hub: Stub, tmp_path: Path) -> Run:
    (tmp_path / "cwd").mkdir()
    return Run(hub, tmp_path / "cwd")


def rows(run: Run, *arguments: object, code: int = 0) -> list[dict[str, Any]]:
    out, _ = run("batch", *arguments, "--json", code=code)
    found: list[dict[str, Any]] = json.loads(out)["rows"]
    return found


def statuses(run: Run, *arguments: object, code: int = 0) -> dict[str, str]:
    return {row["name"]: row["status"] for row in rows(run, *arguments, code=code)}


def branch(hub: Stub, name: str, folder: Path) -> Path:
    """What a branch holds, as files."""
    for path, data in hub.files(REPO, name).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    (folder / ".gitattributes").unlink(missing_ok=True)
    return folder


def test_a_branch_for_each_step(hub: Stub, run: Run, source: Path, tmp_path: Path) -> None:
    told = (source, f"hf://{REPO}", "--to", "hf", "--dtype", "float32")
    assert statuses(run, *told, "--private") == dict.fromkeys(STEPS, "done")
    assert statuses(run, source, "local", *told[2:]) == dict.fromkeys(STEPS, "done")
    for step in STEPS:
        same_tree(branch(hub, step, tmp_path / step), run.folder / "local" / step)
    assert os.listdir(run.folder) == ["local"], "nothing is left of what was uploaded"
    commits = hub.count("POST /api/models/org/model/commit")
    assert statuses(run, *told, "--private") == dict.fromkeys(STEPS, "skipped")
    assert hub.count("POST /api/models/org/model/commit") == commits
    _, err = run("batch", source, f"hf://{REPO}", "--to", "hf", "--retries", 0, code=1)
    assert err.count("holds other files") == len(STEPS)


def test_a_batch_chooses_the_branches_itself(run: Run, source: Path) -> None:
    _, err = run("batch", source, f"hf://{REPO}@main", code=2)
    assert err.startswith(f"error: DST: hf://{REPO}@main: a batch writes one branch per step")


def test_the_norms_of_a_branch_that_is_there_already(run: Run, source: Path) -> None:
    told = (source, f"hf://{REPO}", "--steps", "0", "--to", "hf", "--norms")
    (made,), (there,) = rows(run, *told), rows(run, *told)
    assert (made["status"], there["status"]) == ("done", "skipped")
    assert made["target"] == there["target"] == f"hf://{REPO}@step0"
    assert there["norms"] == made["norms"] != {}
    (planned,) = rows(run, *told, "--dry-run")
    assert (planned["status"], planned["target"]) == ("skipped", made["target"])


def test_what_could_not_be_uploaded_is_kept(hub: Stub, run: Run, source: Path) -> None:
    told = (source, f"hf://{REPO}", "--steps", "0", "--retries", 0, "--to", "hf")
    hub.fail("POST /api/models/org/model/commit", 403, times=1)
    assert statuses(run, *told, code=1) == {"step0": "failed"}
    made = run.folder / ".org--model@step0.neox-bridge" / "files"
    assert (made / "model.safetensors").stat().st_size
    assert statuses(run, *told, "--log", "log.jsonl") == {"step0": "done"}
    assert '"ended"' in (log := (run.folder / "log.jsonl").read_text())
    assert '"begun"' not in log, "it wasn't made again"
    assert not made.parent.exists()
    assert "model.safetensors" in hub.files(REPO, "step0")


def test_the_revisions_of_a_model(hub: Stub, run: Run, source: Path, tmp_path: Path) -> None:
    """Only what is needed is read, by ranges; nothing lands in the cache."""
    for step in STEPS:
        files = {path.name: path.read_bytes() for path in (source / step).iterdir()}
        hub.make(REPO) if step == STEPS[0] else None
        hub.put(REPO, step, **files)
    assert statuses(run, REPO, "out") == dict.fromkeys(STEPS, "done")
    assert statuses(run, f"hf://{REPO}", "out") == dict.fromkeys(STEPS, "skipped")
    shutil.copytree(source, run.folder / "source")
    assert statuses(run, "source", "local") == dict.fromkeys(STEPS, "done")
    for step in STEPS:
        same_tree(run.folder / "out" / step, run.folder / "local" / step, but=(".json", ".yml"))
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert statuses(run, REPO, "last", "--steps", "last") == {"step1000": "done"}
