"""Exports to disks that are really full, slow or hang. These tests mount disks, as root."""

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from disks import disk, fill, hanging, slowed, small_disk

from neox_bridge import verify
from neox_bridge.api import convert
from neox_bridge.errors import DiskFull
from neox_bridge.progress import Progress
from neox_bridge.training import disk_space
from neox_bridge.training.disk_space import Watch
from neox_bridge.training.exporter import convert_step, run
from neox_bridge.training.exports import JOURNAL, LOG, ExporterProcess, Exports

SIZE = 16 << 20
Start = Callable[[Exports], ExporterProcess]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", SIZE) as point:
        yield point


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Path]:
    with disk(tmp_path / "disk", SIZE) as point:
        yield point


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes, and kills them if the test fails."""
    processes: list[ExporterProcess] = []

    def started(exports: Exports) -> ExporterProcess:
        processes.append(ExporterProcess(exports))
        processes[-1].start()
        return processes[-1]

    yield started
    for process in processes:
        assert process._process is not None
        process._process.kill()
        process._process.wait()


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A step of a run, to copy."""
    convert(str(tiny.write_hf(tmp_path / "hf")), str(tmp_path / "neox"), layout="ranks")
    (folder,) = (tmp_path / "neox").glob("global_step*")
    return folder


def exports_of(save: Path, disk: Path) -> Exports:
    save.mkdir()
    (disk / "exported").mkdir()
    return Exports(str(save), str(disk / "exported"))


def save_step(exports: Exports, step: Path, iteration: int) -> None:
    shutil.copytree(step, Path(exports.save) / f"global_step{iteration}")
    (Path(exports.save) / "latest").write_text(f"global_step{iteration}")


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def until(condition: Callable[[], object]) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def folders(exports: Exports) -> list[str]:
    return sorted(p.name for p in Path(exports.target).iterdir() if p.is_dir())


def log_of(exports: Exports) -> str:
    path = Path(exports.target) / LOG
    return path.read_text() if path.exists() else ""


# full


def test_a_step_waits_until_a_full_disk_has_space(
    small: Path, step: Path, tmp_path: Path, start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not even its log can be written, which says later what happened."""
    exports = exports_of(tmp_path / "save", small)
    filler = fill(small)
    process = start(exports)
    said = ""

    def failed() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "step 5 failed" in said

    save_step(exports, step, 5)
    process.saved(5)
    until(failed)
    assert log_of(exports) == ""
    assert folders(exports) == []
    filler.unlink()
    until(lambda: folders(exports) == ["step5"])
    process.finish()
    assert verify(f"{exports.save}/global_step5", f"{exports.target}/step5").holds
    first, last = (line.partition("neox-bridge: ")[2] for line in log_of(exports).splitlines()[-2:])
    assert first.startswith(f"step 5 failed: No space left while writing {exports.target}/step5: ")
    assert first.endswith(
        "The partial files were removed. Free some space. Retry once there is space"
    )
    assert last.startswith(f"step 5 exported to {exports.target}/step5")


def test_a_disk_that_becomes_full_in_the_middle(small: Path, step: Path, tmp_path: Path) -> None:
    exports = exports_of(tmp_path / "save", small)
    save_step(exports, step, 5)

    def fills() -> bool:  # asked when the conversion begins to write
        fill(small)
        return True

    with pytest.raises(DiskFull) as error:
        convert_step(exports, 5, fills)
    assert str(error.value).startswith(f"No space left while writing {exports.target}/step5: ")
    assert str(error.value).endswith("The partial files were removed. Free some space.")
    assert list(Path(exports.target).iterdir()) == []
    (small / "filler").unlink()
    assert convert_step(exports, 5) == f"{exports.target}/step5"


def test_the_next_checkpoint_has_precedence(small: Path, step: Path) -> None:
    """Until the training ends, the export leaves the disk to it."""
    exports = exports_of(small / "save", small)
    save_step(exports, step, 5)
    fill(small, left=bytes_of(step) + 20_000)  # some files take a part of a page
    said = threading.Event()
    log: list[str] = []
    seen: list[str] = []

    def say(text: str) -> None:
        log.append(text)
        said.set()

    def lines() -> Iterator[str]:
        yield "5\n"
        said.wait(60)
        seen.extend(folders(exports))
        save_step(exports, step, 10)  # which fits
        (small / "filler").unlink()
        fill(small, left=60_000)

    assert run(exports, lines(), say)
    assert seen == []
    assert log[0].startswith(
        f"step 5 failed: {exports.target} and {exports.save} are on one disk with "
    )
    assert f"of which the next checkpoint needs {bytes_of(step):,} and the export " in log[0]
    assert log[0].endswith("Retry once there is space")
    assert log[1].startswith(f"step 5 exported to {exports.target}/step5")


def test_an_export_gives_way_when_the_disk_fills(
    small: Path, step: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_space, "CHECK_SECONDS", 0.0)
    exports = exports_of(small / "save", small)
    save_step(exports, step, 5)
    size, total = bytes_of(step), 1 << 20
    source = f"{exports.save}/global_step5"
    watch = Watch(exports, source, lambda: False)
    watch(Progress("writing", 0, total))
    fill(small, left=size + 4096)
    watch(Progress("writing", 1, total))
    (small / "filler").unlink()
    fill(small, left=size - 4096)
    with pytest.raises(DiskFull) as error:
        watch(Progress("writing", 2, total))
    assert error.value.needed == size + total
    # a save that has begun needs less
    (small / "filler").unlink()
    (Path(exports.save) / "global_step10").mkdir()
    (Path(exports.save) / "global_step10" / "mp_rank_00_model_states.pt").write_bytes(bytes(8192))
    fill(small, left=size - 4096)
    watch(Progress("writing", 3, total))
    Watch(exports, source, lambda: True)(Progress("writing", 0, 2 * SIZE))
    elsewhere = replace(exports, save=str(step.parent))
    Watch(elsewhere, source, lambda: False)(Progress("writing", 0, 2 * SIZE))
    shutil.rmtree(source)
    with pytest.raises(FileNotFoundError):
        watch(Progress("writing", 4, total))


# slow


def test_a_slow_disk_blocks_no_training_and_removed_steps_are_skipped(
    loop: Path, step: Path, tmp_path: Path, start: Start
) -> None:
    exports = exports_of(tmp_path / "save", loop)
    process = start(exports)
    with slowed(loop, 20_000):
        for iteration in (5, 10, 15, 20):
            save_step(exports, step, iteration)
            process.saved(iteration)
            shutil.rmtree(f"{exports.save}/global_step{iteration - 5}", ignore_errors=True)
            time.sleep(0.5)
        assert "exported to" not in log_of(exports)  # the training was faster
    process.finish()
    log = log_of(exports)
    for iteration in (5, 10, 15):
        assert f"step {iteration} was removed before it was exported" in log
    assert folders(exports) == ["step20"]
    assert verify(f"{exports.save}/global_step20", f"{exports.target}/step20").holds


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_disk_that_hangs_blocks_no_training(
    is_killed: bool, loop: Path, step: Path, tmp_path: Path, start: Start
) -> None:
    """Even if the process must be started again while the disk hangs."""
    exports = exports_of(tmp_path / "save", loop)
    process = start(exports)
    assert process._process is not None
    until((Path(exports.target) / JOURNAL).exists)
    if is_killed:
        process._process.send_signal(signal.SIGKILL)
        process._process.wait()
    save_step(exports, step, 5)
    saving = threading.Thread(target=process.saved, args=(5,), daemon=True)
    with hanging(loop):
        saving.start()
        saving.join(60)
        assert not saving.is_alive()
        time.sleep(1)
        assert folders(exports) == []
        assert process._process.poll() is None
    process.finish()
    assert folders(exports) == ["step5"]
