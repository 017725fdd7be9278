"""The program that exports saved steps: what it does with each failure, and what a crash leaves."""

import errno
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from hub_stub import Stub, serving, use

from neox_bridge import verify
from neox_bridge.api import convert
from neox_bridge.errors import BridgeError
from neox_bridge.layouts.checkpoint import RECORD
from neox_bridge.training import exporter
from neox_bridge.training.exporter import convert_step, remove_old, run
from neox_bridge.training.exports import JOURNAL, LOG, ExporterProcess, Exports, StepGone

Convert = Callable[[Exports, int], str]


@pytest.fixture
def exports(tmp_path: Path) -> Exports:
    (tmp_path / "save").mkdir()
    (tmp_path / "exported").mkdir()
    return Exports(str(tmp_path / "save"), str(tmp_path / "exported"))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits before retries, which take no time."""
    seconds: list[float] = []
    clock = [0.0]

    def sleep(wait: float) -> None:
        if wait:
            seconds.append(wait)
        clock[0] += wait

    monkeypatch.setattr(exporter.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(exporter.time, "sleep", sleep)
    return seconds


def save_step(exports: Exports, iteration: int, seed: int = 0) -> None:
    """A step of a run, with ``latest``."""
    folder = Path(exports.save).parent / f"of-{iteration}-{seed}"
    convert(str(tiny.write_hf(folder / "hf", seed)), str(folder / "neox"), layout="ranks")
    (step,) = (folder / "neox").glob("global_step*")
    step.rename(Path(exports.save) / f"global_step{iteration}")
    (Path(exports.save) / "latest").write_text(f"global_step{iteration}")


def fake(exports: Exports, iteration: int) -> str:
    """A conversion that only creates the folder."""
    folder = Path(exports.target) / f"step{iteration}"
    folder.mkdir(exist_ok=True)
    (folder / RECORD).write_text("{}")
    return str(folder)


def folders(exports: Exports) -> list[str]:
    return sorted(p.name for p in Path(exports.target).iterdir() if p.is_dir())


def lines(exports: Exports) -> list[str]:
    """What was saved and done, without the ids of the saves."""
    text = (Path(exports.target) / JOURNAL).read_text()
    words = [line.split() for line in text.splitlines()]
    return [" ".join(w[:2]) for w in words if w[0] not in ("of", "own")]


def test_exports_what_a_conversion_would(exports: Exports) -> None:
    save_step(exports, 5)
    log: list[str] = []
    assert run(exports, ["5\n"], log.append)
    (line,) = log
    assert line.startswith(f"step 5 exported to {exports.target}/step5 and verified in ")
    convert(f"{exports.save}/global_step5", f"{exports.target}/alone", to="hf")
    one, other = (Path(exports.target) / name for name in ("step5", "alone"))
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert verify(f"{exports.save}/global_step5", str(one)).holds
    assert lines(exports) == ["after 5", "saved 5", "done 5"]


def test_a_step_that_is_saved_again_replaces_its_export(exports: Exports) -> None:
    save_step(exports, 5)
    assert run(exports, ["5\n"], print)
    before = (Path(exports.target) / "step5" / "model.safetensors").read_bytes()
    shutil.rmtree(f"{exports.save}/global_step5")
    save_step(exports, 5, seed=1)
    assert run(exports, ["5\n"], print)
    assert (Path(exports.target) / "step5" / "model.safetensors").read_bytes() != before
    assert verify(f"{exports.save}/global_step5", f"{exports.target}/step5").holds


@pytest.mark.parametrize(
    "error",
    [
        BridgeError("damaged."),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyError("a bug"),
        MemoryError(),
    ],
)
def test_a_failure_is_tried_again(exports: Exports, waits: list[float], error: Exception) -> None:
    failures = [error, error]
    log: list[str] = []

    def fails(exports: Exports, iteration: int) -> str:
        if failures:
            raise failures.pop()
        return fake(exports, iteration)

    assert run(exports, ["5\n"], log.append, fails)
    assert waits == [10.0, 60.0]
    assert [line.partition(":")[0] for line in log[:2]] == ["step 5 failed"] * 2
    assert log[0].endswith("Retry in 10 s")
    assert lines(exports)[-1] == "done 5"


def test_what_fails_for_good_is_left_to_the_next_run(exports: Exports, waits: list[float]) -> None:
    log: list[str] = []

    def fails(exports: Exports, iteration: int) -> str:
        if iteration == 5:
            raise BridgeError("damaged.")
        return fake(exports, iteration)

    assert not run(exports, ["5\n", "10\n"], log.append, fails)
    assert log[-1] == "step 5 failed: damaged. The next run tries again"
    assert waits == [10.0, 60.0, 300.0]
    assert folders(exports) == ["step10"]
    assert run(exports, [], log.append, fake)
    assert folders(exports) == ["step10", "step5"]
    assert "steps left by an earlier run: 5" in log


def test_a_failure_does_not_hold_up_other_steps(exports: Exports, waits: list[float]) -> None:
    order: list[int] = []

    def fails(exports: Exports, iteration: int) -> str:
        order.append(iteration)
        if order == [10]:
            raise BridgeError("damaged.")
        return fake(exports, iteration)

    (Path(exports.target) / JOURNAL).write_text("saved 5\nsaved 10\n")
    assert run(exports, [], print, fails)
    assert order == [10, 5, 10]  # the newest first, because GPT-NeoX removes the oldest


def test_a_step_that_was_removed_is_skipped(exports: Exports) -> None:
    log: list[str] = []
    assert run(exports, ["5\n"], log.append)
    expected = "step 5 was removed before it was exported (keep_last_n_checkpoints), skipped"
    assert log == [expected]
    assert lines(exports)[-1] == "done 5"


def test_a_step_that_is_removed_while_it_is_read_is_skipped(
    exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(exports, 5)

    def removing(source: str, target: str, **_options: object) -> None:
        work = Path(exports.target) / ".step5.neox-bridge"
        work.mkdir()
        shutil.rmtree(source)
        raise FileNotFoundError(source)

    monkeypatch.setattr("neox_bridge.api.convert", removing)
    with pytest.raises(StepGone):
        convert_step(exports, 5)
    assert folders(exports) == []


def test_a_failed_step_leaves_the_disk_to_the_training(
    exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(exports, 5)

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises((BridgeError, OSError), match=r"[Nn]o space left"):
        convert_step(exports, 5)
    assert folders(exports) == []


def test_keeps_the_newest_exports(exports: Exports) -> None:
    keeping = Exports(exports.save, exports.target, keep=2)
    (Path(exports.target) / ".step0.removed").mkdir()  # of a killed process
    (Path(exports.target) / "notes").mkdir()
    assert run(keeping, [f"{n}\n" for n in (5, 10, 100, 20)], print, fake)
    assert folders(keeping) == ["notes", "step100", "step20"]
    remove_old(Exports(exports.save, exports.target), [100, 20])
    assert folders(keeping) == ["notes", "step100", "step20"]


def test_a_run_that_went_back_keeps_its_newest_exports(exports: Exports) -> None:
    keeping = Exports(exports.save, exports.target, keep=2)
    assert run(keeping, ["90\n", "100\n"], print, fake)
    assert run(keeping, ["60\n"], print, fake)
    assert folders(keeping) == ["step100", "step60"]
    assert run(keeping, ["70\n"], print, fake)
    assert folders(keeping) == ["step60", "step70"]


def test_a_step_that_is_not_pushed_yet_is_kept(exports: Exports, waits: list[float]) -> None:
    keeping = Exports(exports.save, exports.target, keep=1, repository="org/model")
    (Path(exports.target) / JOURNAL).write_text("saved 5\nsaved 10\n")
    pushed: list[int] = []

    def push(exports: Exports, iteration: int) -> str:
        assert f"step{iteration}" in folders(exports)
        if iteration == 5 and not waits:
            raise BridgeError("the Hub failed.")
        pushed.append(iteration)
        return "url"

    (Path(exports.target) / "step10").mkdir()
    with (Path(exports.target) / JOURNAL).open("a") as file:
        file.write("own 10\n")
    assert run(keeping, ["15\n"], print, fake, push)
    assert sorted(pushed) == [5, 10, 15]
    assert folders(keeping) == ["step15"]


@pytest.mark.parametrize("keep", [0, 1])
def test_folders_of_others_are_neither_replaced_nor_removed(
    exports: Exports, waits: list[float], keep: int
) -> None:
    tiny.write_hf(Path(exports.target) / "step5")
    convert(str(Path(exports.target) / "step5"), str(Path(exports.target) / "step7"), to="hf")
    before = [p.read_bytes() for p in sorted(Path(exports.target).rglob("*")) if p.is_file()]
    for iteration in (5, 10):
        save_step(exports, iteration)
    log: list[str] = []
    assert not run(replace(exports, keep=keep), ["5\n", "10\n"], log.append)
    assert folders(exports) == ["step10", "step5", "step7"]
    shutil.rmtree(Path(exports.target) / "step10")
    for name in (JOURNAL, LOG):
        (Path(exports.target) / name).unlink(missing_ok=True)
    after = [p.read_bytes() for p in sorted(Path(exports.target).rglob("*")) if p.is_file()]
    assert after == before
    assert f"{exports.target}/step5 exists, and this run has not exported it. Move" in log[-1]


def test_a_run_that_went_back_and_was_killed_exports_its_new_steps(exports: Exports) -> None:
    for iteration in (5, 10, 15):
        save_step(exports, iteration)
        assert run(exports, [f"{iteration}\n"], print, fake)
    (Path(exports.save) / "latest").write_text("global_step15")
    with (Path(exports.target) / JOURNAL).open("a") as file:
        file.write("saved 5 again\n")  # and the process is killed
    order: list[int] = []

    def counted(exports: Exports, iteration: int) -> str:
        order.append(iteration)
        return fake(exports, iteration)

    assert run(exports, [], print, counted)
    assert order == [15, 10, 5]


def test_steps_are_noted_while_another_is_converted(exports: Exports) -> None:
    """So that a kill in a long conversion loses none."""
    noted: list[str] = []

    def slow(exports: Exports, iteration: int) -> str:
        if iteration == 5:
            wait_for_text(exports, "saved 10")
            noted.extend(lines(exports))
        return fake(exports, iteration)

    assert run(exports, ["5\n", "10\n"], print, slow)
    assert "saved 10" in noted


def wait_for_text(exports: Exports, text: str) -> None:
    for _ in range(200):
        if text in lines(exports):
            return
        time.sleep(0.05)
    raise AssertionError(f"{text} is not in the journal")


def test_an_unreadable_latest_ends_nothing(exports: Exports) -> None:
    (Path(exports.save) / "latest").write_bytes(b"\xff\xfe")
    assert run(exports, ["5\n"], print, fake)
    assert folders(exports) == ["step5"]


def test_pushes_each_step_as_a_branch(
    exports: Exports, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, waits: list[float]
) -> None:
    save_step(exports, 5)
    pushing = Exports(exports.save, exports.target, repository="org/model")
    conversions: list[int] = []
    log: list[str] = []

    def counted(exports: Exports, iteration: int) -> str:
        conversions.append(iteration)
        return convert_step(exports, iteration)

    pushes = []

    def push(exports: Exports, iteration: int) -> str:
        pushes.append(iteration)
        if len(pushes) == 1:
            raise BridgeError("the Hub failed.")
        return exporter.push_step(exports, iteration)

    with serving(Stub()) as hub:
        use(hub, monkeypatch, tmp_path)
        assert run(pushing, ["5\n"], log.append, counted, push)
        assert "model.safetensors" in hub.files("org/model", "step5")
    assert conversions == [5]  # only the push was repeated
    assert waits == [10.0]
    assert log[-1].startswith("step 5 pushed to http")


def test_the_first_run_leaves_older_steps_alone(exports: Exports) -> None:
    save_step(exports, 5)
    assert run(exports, [], print, fake)
    assert folders(exports) == []


def test_what_the_process_never_knew_of_is_exported_by_the_next(exports: Exports) -> None:
    save_step(exports, 5)
    assert run(exports, ["5\n"], print, fake)
    for iteration in (10, 12, 15):
        save_step(exports, iteration)
    (Path(exports.save) / "global_step20").mkdir()  # not complete: latest does not name it
    every = Exports(exports.save, exports.target, interval=5)
    assert run(every, [], print, fake)
    assert folders(exports) == ["step10", "step15", "step5"]


def test_a_journal_that_cannot_be_written_stops_nothing(exports: Exports) -> None:
    (Path(exports.target) / JOURNAL).mkdir()
    log: list[str] = []
    with pytest.raises(IsADirectoryError):
        exporter.Journal(str(Path(exports.target) / JOURNAL), log.append).left(exports)
    os.rmdir(Path(exports.target) / JOURNAL)
    exporter.Journal("/dev/full", log.append).note("saved", 5)
    assert log == ["/dev/full cannot be written: [Errno 28] No space left on device"]


# the process beside the training


@pytest.fixture
def process(exports: Exports) -> Iterator[ExporterProcess]:
    running = ExporterProcess(exports)
    yield running
    running.finish()


def wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear")


def test_the_process_exports_beside_the_training(exports: Exports) -> None:
    process = ExporterProcess(Exports(exports.save, exports.target, interval=5))
    process.start()
    for iteration in (5, 6):
        save_step(exports, iteration)
        process.saved(iteration)
    process.finish()
    assert folders(exports) == ["step5"]
    log = (Path(exports.target) / LOG).read_text()
    assert "step 5 exported to" in log


def test_a_killed_process_is_started_again(exports: Exports) -> None:
    process = ExporterProcess(exports)
    process.start()
    save_step(exports, 5)
    assert process._process is not None
    wait_for(Path(exports.target) / JOURNAL)
    process._process.send_signal(signal.SIGKILL)
    process._process.wait()
    process.saved(5)
    save_step(exports, 10)
    process.saved(10)
    process.finish()
    assert folders(exports) == ["step10", "step5"]


def test_the_end_of_the_training_exports_what_a_killed_process_left(exports: Exports) -> None:
    process = ExporterProcess(exports)
    process.start()
    assert process._process is not None
    wait_for(Path(exports.target) / JOURNAL)
    process._process.send_signal(signal.SIGKILL)
    process._process.wait()
    save_step(exports, 5)
    process.finish()
    assert folders(exports) == ["step5"]


def test_the_end_does_not_wait_for_processes_that_inherited_the_pipe(exports: Exports) -> None:
    """As the workers of a data loader do."""
    process = ExporterProcess(exports)
    process.start()
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        start = time.monotonic()
        process.finish()
        assert time.monotonic() - start < 50  # the child lives longer
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(child, 0)


def test_a_second_exporter_says_for_whom_it_waits(exports: Exports) -> None:
    process = ExporterProcess(exports)
    process.check()
    process.start()
    wait_for(Path(exports.target) / JOURNAL)
    other = ExporterProcess(exports)
    other.start()
    for _ in range(200):
        if "waiting for the exports of an earlier run" in Path(exports.log).read_text():
            break
        time.sleep(0.05)
    process.finish()
    other.finish()
    assert f"which still writes into {exports.target}" in Path(exports.log).read_text()


def test_a_process_that_hangs_blocks_no_save(exports: Exports) -> None:
    process = ExporterProcess(exports)
    process.start()
    assert process._process is not None
    process._process.send_signal(signal.SIGSTOP)
    for _ in range(70_000):  # more than its pipe holds
        process.saved(5)
    process._process.send_signal(signal.SIGCONT)
    process.finish()
    assert lines(exports)[-1] == "done 5"


def test_a_process_that_cannot_start_fails_no_save(
    exports: Exports, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    ExporterProcess(exports).saved(5)
    assert "step 5 is not exported yet: [Errno 2]" in capsys.readouterr().err
