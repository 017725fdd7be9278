"""What is renamed or entered in the journal is on the disk before, whatever power cut follows."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from common import make_hf, plan_of, step_of
from durability import recording
from tiny import Inline

from neox_bridge.errors import BridgeError
from neox_bridge.execution import exchange, movers, output, units
from neox_bridge.execution.execute import execute

SHAPE = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 300}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    return make_hf(folder, torch.float16, num_hidden_layers=2, **SHAPE)


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files of every kind: put together in memory, by the kernel, through a buffer."""
    monkeypatch.setattr(output, "SMALL_BYTES", 20_000)
    monkeypatch.setattr(output, "_GROUP_BYTES", 30_000)
    monkeypatch.setattr(units, "_UNIT_BYTES", 30_000)
    monkeypatch.setattr(movers, "LEAST_SHARED_BYTES", 4_000)


@pytest.mark.parametrize("pool", [None, Inline()], ids=["threads", "units"])
@pytest.mark.parametrize(
    "options",
    [
        {"tp": 2},
        {"tp": 2, "layout": "ranks"},
        {"dtype": "bfloat16"},
        {"to": "hf", "shard_size": 100_000},
    ],
    ids=["layers", "ranks", "cast", "hf"],
)
def test_everything_is_flushed_before_it_is_named(
    model: Path, tmp_path: Path, monkeypatch: Any, options: dict[str, Any], pool: Any
) -> None:
    target = tmp_path / "new" / "out"
    plan = plan_of(model, target, **options)
    with recording(monkeypatch) as disk:
        execute(plan, str(target), workers=1, pool=pool)
    disk.check(target)
    assert (target / "new").parent.parent.exists()
    assert any(name.endswith("/files") for name in disk.renames)
    assert disk.journaled == len([file for file in plan.files if not file.seals])


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "two renames"])
def test_an_overwritten_target_is_flushed_before_the_exchange(
    model: Path, tmp_path: Path, monkeypatch: Any, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(exchange, "_exchange", lambda *_: False)
    target = tmp_path / "out"
    with recording(monkeypatch) as disk:
        execute(plan_of(model, target, tp=1), str(target), workers=1)
        execute(plan_of(model, target, tp=2), str(target), workers=1, overwrite=True)
    disk.check(target)
    assert any(name.endswith("/files") for name in disk.renames)


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "replaced"])
def test_latest_names_a_step_that_is_on_the_disk(
    model: Path, tmp_path: Path, monkeypatch: Any, overwrite: bool
) -> None:
    target = tmp_path / "run"
    with recording(monkeypatch) as disk:
        execute(plan_of(model, target, tp=2), str(target), workers=1)
    if not overwrite:
        step_of(target).rename(target / "global_step7")
        (target / "latest").write_text("global_step7")
    with recording(monkeypatch, disk):
        execute(plan_of(model, target, tp=2), str(target), workers=1, overwrite=overwrite)
    disk.check(target)
    assert disk.renames[-1] == "files/latest"
    assert step_of(target).name in {name.split("/")[-1] for name in disk.renames[:-1]}


def test_a_resumed_run_is_flushed_as_well(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    target = tmp_path / "out"
    plan = plan_of(model, target, tp=2)

    def interrupted(_written: int) -> None:
        seen.append(1)
        if len(seen) == 30:
            raise KeyboardInterrupt

    seen: list[int] = []
    with recording(monkeypatch) as disk:
        with pytest.raises(KeyboardInterrupt):
            execute(plan, str(target), workers=1, progress=interrupted)
        entered = disk.journaled
        result = execute(plan, str(target), workers=1)
    disk.check(target)
    assert 0 < entered < len(plan.files)
    assert result.kept > 0
    assert disk.journaled == len(plan.files) - 1, "each file is entered once in both runs together"


def test_the_recorder_notices_a_missing_fsync(
    model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    target = tmp_path / "out"
    with recording(monkeypatch) as disk:
        monkeypatch.setattr(os, "fsync", lambda _fd: None)
        execute(plan_of(model, target, tp=2), str(target), workers=1)
    assert any("in the journal before" in problem for problem in disk.problems)
    assert any("when" in problem for problem in disk.problems)
    with pytest.raises(AssertionError):
        disk.check(target)


def test_a_source_inside_the_target_is_found_through_links(model: Path, tmp_path: Path) -> None:
    """Neither name contains the other: each differs from its real path in another way."""
    home = tmp_path / "out"
    inside = home / "weights"
    shutil.copytree(model, inside)
    (tmp_path / "linked source").symlink_to(inside)
    (tmp_path / "linked target").symlink_to(home)
    before = sorted(path.name for path in inside.iterdir())
    for source, target in (("linked source", "out"), ("out/weights", "linked target")):
        plan = plan_of(tmp_path / source, tmp_path / target, tp=1)
        with pytest.raises(BridgeError, match="contains the source"):
            execute(plan, str(tmp_path / target), overwrite=True)
        assert sorted(path.name for path in inside.iterdir()) == before


def test_links_of_a_source_inside_the_target_are_found(model: Path, tmp_path: Path) -> None:
    """The weights lie elsewhere, as in a Hugging Face cache, but their link would be replaced."""
    snapshot = tmp_path / "out" / "snapshot"
    shutil.copytree(model, snapshot)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(model / "model.safetensors")
    plan = plan_of(snapshot, tmp_path / "out", tp=1)
    with pytest.raises(BridgeError, match="contains the source"):
        execute(plan, str(tmp_path / "out"), overwrite=True)
    assert (snapshot / "model.safetensors").is_symlink()


def test_a_source_that_is_a_link_into_the_target_is_found(model: Path, tmp_path: Path) -> None:
    """The link lies elsewhere, but the file that it leads to would be replaced."""
    source, blobs = tmp_path / "source", tmp_path / "out"
    shutil.copytree(model, source)
    blobs.mkdir()
    (source / "model.safetensors").rename(blobs / "weights")
    (source / "model.safetensors").symlink_to(blobs / "weights")
    plan = plan_of(source, blobs, tp=1)
    with pytest.raises(BridgeError, match="contains the source"):
        execute(plan, str(blobs), overwrite=True)
    assert (blobs / "weights").is_file()
