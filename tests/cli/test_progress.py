"""Progress: phases with their own totals, a bar on a terminal, plain lines elsewhere."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import run
from tiny import plan_of, write_hf

from neox_bridge.batches.row import BatchRow
from neox_bridge.batches.run import Event
from neox_bridge.cli import batch_view
from neox_bridge.cli import progress as progress_module
from neox_bridge.cli.progress import PROGRESS_SECONDS, progress_line, shown_phases
from neox_bridge.execution import disk
from neox_bridge.execution.execute import execute
from neox_bridge.progress import Phases, Progress

CASE = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def bars_on(monkeypatch: CASE) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)


class Clock:
    """A clock that goes on by ``step`` seconds whenever it is read."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


def patched(monkeypatch: CASE, step: float) -> None:
    monkeypatch.setattr(progress_module, "time", Clock(step))


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "hf")


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("writing", "verif", "check"))]


def test_off_a_terminal_a_line_every_ten_seconds(hf: Path, monkeypatch: CASE) -> None:
    assert PROGRESS_SECONDS == 10
    patched(monkeypatch, 11)
    shown = lines(run("convert", hf, hf.parent / "out", "--max-workers", "1").stderr)
    assert shown[0].startswith("writing: 0 B of 33.")
    assert any(line.startswith("verifying: ") for line in shown)
    assert all(line.count(", ETA 0:") <= 1 for line in shown)
    assert any("kB/s" in line or "B/s, ETA 0:0" in line for line in shown)
    patched(monkeypatch, 6)
    fewer = lines(run("convert", hf, hf.parent / "second", "--max-workers", "1").stderr)
    assert 0 < len(fewer) < len(shown)


def test_a_short_run_prints_none_and_quiet_neither(hf: Path, monkeypatch: CASE) -> None:
    patched(monkeypatch, 1e-6)
    assert run("convert", hf, hf.parent / "out").stderr == ""
    patched(monkeypatch, 11)
    assert run("convert", hf, hf.parent / "quiet", "--quiet").stderr == ""
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    assert lines(run("convert", hf, hf.parent / "off").stderr) == []


@pytest.mark.parametrize(
    ("progress", "seconds", "line"),
    [
        (
            Progress("writing", 3_000_000_000, 12_000_000_000),
            3.0,
            "writing: 3 GB of 12 GB (25%), 1 GB/s, ETA 0:00:09",
        ),
        (Progress("reading", 5_000_000), 2.0, "reading: 5 MB, 2.5 MB/s"),
        (Progress("verifying", 0, 10), 0.0, "verifying: 0 B of 10 B (0%)"),
        (
            Progress("checking", 5, 10),
            5.0,
            "checking finished files: 5 B of 10 B (50%), 1 B/s, ETA 0:00:05",
        ),
    ],
)
def test_what_a_line_says(progress: Progress, seconds: float, line: str) -> None:
    assert progress_line(progress, seconds) == line


def test_phases_have_their_own_totals_and_end_whole() -> None:
    seen: list[Progress] = []
    phases = Phases(seen.append)
    phases.count(5)  # of no phase
    phases.begin("writing", 10)
    phases.count(4)
    phases.begin("verifying", 3)
    phases.count(9)
    phases.end()
    assert [(one.phase, one.done, one.total) for one in seen] == [
        ("writing", 0, 10),
        ("writing", 4, 10),
        ("writing", 10, 10),
        ("verifying", 0, 3),
        ("verifying", 3, 3),
    ]


def watched(target: Path, hf: Path) -> list[Progress]:
    """Every progress of a conversion. No phase may count more than its total."""
    seen: list[Progress] = []

    def begin(phase: Any, total: int | None) -> None:
        seen.append(Progress(phase, 0, total))

    def count(size: int) -> None:
        seen.append(replace(seen[-1], done=seen[-1].done + size))

    plan = plan_of(hf, target, tp=2)
    execute(plan, str(target), workers=1, progress=count, phase=begin)
    return seen


def test_a_resumed_run_shows_that_it_reads_what_is_finished(hf: Path, tmp_path: Path) -> None:
    whole = watched(tmp_path / "one", hf)
    assert {one.phase for one in whole} == {"writing"}
    size = whole[0].total
    assert size is not None
    append = disk.append

    def interrupt(*args: Any) -> None:
        append(*args)
        raise KeyboardInterrupt

    with CASE.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(disk, "append", interrupt)
        watched(tmp_path / "out", hf)
    seen = watched(tmp_path / "out", hf)
    checking = [one for one in seen if one.phase == "checking"]
    writing = [one for one in seen if one.phase == "writing"]
    assert checking[0].done == 0
    assert checking[-1].total
    assert checking[-1].done == checking[-1].total
    assert {one.total for one in writing} == {size - checking[-1].total}
    assert (writing[0].done, writing[-1].done) == (0, writing[-1].total)


def test_bars_of_phases_replace_each_other(monkeypatch: CASE) -> None:
    shown: list[Any] = []

    class Display:
        def __enter__(self) -> "Display":
            return self

        def __exit__(self, *_error: object) -> None: ...

        def add_task(self, name: str, total: int | None) -> str:
            shown.append(("add", name, total))
            return name

        def remove_task(self, name: str) -> None:
            shown.append(("remove", name))

        def update(self, name: str, completed: int) -> None:
            shown.append((name, completed))

    monkeypatch.setattr(progress_module, "bars", Display)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with shown_phases(quiet=False) as phases:
        assert phases is not None
        phases.begin("checking", 5)
        phases.begin("writing", 7)
        phases.count(7)
    assert shown == [
        ("add", "checking finished files", 5),
        ("checking finished files", 0),
        ("checking finished files", 5),
        ("remove", "checking finished files"),
        ("add", "writing", 7),
        ("writing", 0),
        ("writing", 7),
    ]


def test_a_batch_says_how_far_it_is(monkeypatch: CASE, capsys: Any) -> None:
    monkeypatch.setattr(batch_view, "time", Clock(6))
    row = BatchRow("step1", "run", 1, "done", "a", "b", size=500, seconds=2.0)
    with batch_view.view(4, None, quiet=False) as tell:
        for event in (
            Event("begun", "step1", 1000),
            Event("written", "step1", 500),
            Event("written", "step1", 500),
            Event("ended", "step1", row=row),
            Event("begun", "step2", 1000),
            Event("written", "step2", 500),
        ):
            tell(event)
    assert capsys.readouterr().err.splitlines() == [
        "0 of 4: 500 B of 4 kB (12%), 42 B/s, ETA 0:01:24",
        "step1: 500 B in 2.0 s",
        "1 of 4: 1 kB of 4 kB (25%), 42 B/s, ETA 0:01:12",
    ]
    with batch_view.view(1, None, quiet=True) as tell:
        tell(Event("begun", "step1", 1000))
        tell(Event("written", "step1", 500))
        tell(Event("written", "step1", 500))
    assert capsys.readouterr().err == ""
