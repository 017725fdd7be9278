"""Batches of tiny models in this process: which steps, what becomes of each, what is said."""

import dataclasses
import json
import os
import threading
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from tiny import Inline, plan_of, tensors, write_hf

from neox_bridge.batches import run as running
from neox_bridge.batches.items import Item, Source, find_items
from neox_bridge.batches.on_hub import HubModel
from neox_bridge.batches.row import BatchRow
from neox_bridge.batches.run import Batch, Event, convert_one, default_ahead, run_batch, verify_part
from neox_bridge.batches.target_state import TargetState
from neox_bridge.batches.watch import is_finished, rounds
from neox_bridge.errors import BridgeError, Refused, Unverified, UsageError
from neox_bridge.execution.staging import left_over
from neox_bridge.execution.work import Work
from neox_bridge.planning.options import Options
from neox_bridge.stores import hub_revisions
from neox_bridge.stores.hub_revisions import Revision
from neox_bridge.verification import runs
from neox_bridge.verification.runs import StepLocation
from neox_bridge.verification.step_choice import check_steps, chosen

# --- which steps


@pytest.mark.parametrize("words", ["all", " all ", "last", "0", "1,2", "0-5", "0-5:5", "1, last"])
def test_words_for_steps(words: str) -> None:
    check_steps(words)


@pytest.mark.parametrize(
    "words", ["", "x", "-1", "1-", "1,,2", "1;2", "alls", "z", "1,z", "z,1", "last,z", "all,z"]
)
def test_other_words_are_no_steps(words: str) -> None:
    with pytest.raises(UsageError, match="is not a step"):
        check_steps(words)


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ("all", None),
        (" all", None),
        ("3", {3}),
        ("3, 5", {3, 5}),
        ("last", {9}),
        ("3,last", {3, 9}),
        ("3-7", {3, 5, 7}),
        ("4-6", {5}),
        ("3-9:2", {3, 5, 7, 9}),
        ("1-9:4", {1, 5, 9}),
        ("2-9:4", set()),
        ("5-9:0", {5, 7, 8, 9}),
        ("5-5", {5}),
        ("20-30", set()),
    ],
)
def test_steps_are_chosen_among_those_there(words: str, steps: set[int] | None) -> None:
    assert chosen(words, [1, 3, 5, 7, 8, 9]) == steps


def test_a_step_that_is_not_there_is_an_error_and_the_last_of_none_is_none() -> None:
    with pytest.raises(UsageError, match=r"no step 4\. Available steps: 1, 3"):
        chosen("4", [3, 1])
    assert chosen("last", []) == set()


def names(home: Path, steps: str = "all") -> list[str]:
    return [item.name for item in find_items([str(home)], steps)[0]]


def test_items_are_the_chosen_places(tmp_path: Path) -> None:
    for name in ("run/step1", "run/step2", "run/step10", "empty"):
        (tmp_path / name).mkdir(parents=True)
    assert names(tmp_path / "run") == ["step1", "step2", "step10"]
    assert names(tmp_path / "run", "2-20") == ["step2", "step10"]
    with pytest.raises(UsageError, match=r"3-9 matches no step\. Available steps: 1, 2, 10"):
        names(tmp_path / "run", "1,3-9")
    with pytest.raises(UsageError, match="no step 3"):
        names(tmp_path / "run", "3")
    with pytest.raises(UsageError, match="is not a step"):
        names(tmp_path / "run", "x")
    with pytest.raises(BridgeError, match=r"contains no checkpoint \(give the folder of a run"):
        names(tmp_path / "empty")
    items, _ = find_items(
        [str(tmp_path / "run")], "1", configs=["a.yml"], gqa_order="grouped", masters=True
    )
    path = str(tmp_path / "run/step1")
    source = Source(path, ("a.yml",), "grouped", True)
    assert items == [Item("step1", str(tmp_path / "run"), 1, source)]


def test_a_range_may_be_in_one_of_several_runs(tmp_path: Path) -> None:
    for name in ("one/step1", "two/step5"):
        (tmp_path / name).mkdir(parents=True)
    assert names(tmp_path, "4-6") == ["two/step5"]
    (tmp_path / "else/one/step1").mkdir(parents=True)
    with pytest.raises(BridgeError, match=r"^one/step1: several checkpoints would get this name"):
        find_items([str(tmp_path / "one"), str(tmp_path / "else/one")])


def test_a_checkpoint_without_a_number_is_chosen_with_all(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    assert names(tmp_path / "model") == ["model"]
    with pytest.raises(UsageError, match="last matches no step"):
        names(tmp_path / "model", "last")


REVISIONS = (
    Revision("main", "branch", "c2", None),
    Revision("notes", "branch", "c9", None),
    Revision("step1", "branch", "c1", 1),
    Revision("step1", "tag", "c0", 1),
    Revision("step/10", "branch", "c3", 10),
)


def test_steps_of_a_model_of_the_hub(monkeypatch: Any, tmp_path: Path) -> None:
    asked: list[str] = []

    def revisions(repo: str) -> Any:
        asked.append(repo)
        return REVISIONS

    monkeypatch.setattr(hub_revisions, "revisions", revisions)
    monkeypatch.chdir(tmp_path)
    items, _ = find_items(["org/model"])
    assert asked == ["org/model"]
    assert [(item.name, item.number, item.source.path) for item in items] == [
        ("step1", 1, "hf://org/model@step1"),
        ("step10", 10, "hf://org/model@step%2F10"),
    ]
    monkeypatch.setattr(hub_revisions, "revisions", lambda _: REVISIONS[:2])
    (only,), _ = find_items(["hf://org/model"])
    assert (only.name, only.number, only.source.path) == ("main", None, "hf://org/model@main")


def test_a_source_is_of_the_hub_where_no_folder_has_its_name(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert runs.model_on_hub("org/model") == ("org/model", "")
    assert runs.model_on_hub("hf://org/model") == ("org/model", "")
    assert runs.model_on_hub("org/model@step1") == ("org/model", "step1")
    assert runs.model_on_hub("hf://org/model@step%2F1") == ("org/model", "step/1")
    assert runs.model_on_hub("/org/model") is None
    assert runs.model_on_hub("model") is None
    (tmp_path / "org/model").mkdir(parents=True)
    assert runs.model_on_hub("org/model") is None
    assert runs.model_on_hub("hf://org/model") == ("org/model", "")


# --- watching


def item(path: Path, number: int | None) -> Item:
    return Item(path.name, "run", number, Source(str(path)))


def test_a_step_is_finished_when_latest_has_reached_it(tmp_path: Path) -> None:
    steps = {number: item(tmp_path / f"global_step{number}", number) for number in (8, 9, 10, 11)}

    def finished() -> list[int]:
        return [number for number, step in steps.items() if is_finished(step)]

    assert finished() == []
    (tmp_path / "latest").write_text("global_step10\n")
    assert finished() == [8, 9, 10]
    (tmp_path / "latest").write_text("global_step")
    assert finished() == []
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    assert finished() == []
    assert is_finished(item(tmp_path / "step7", 7)), "no step of a GPT-NeoX run"
    (tmp_path / "latest").write_text("global_step10")
    assert not is_finished(item(tmp_path / "global_step8", None))


def test_a_run_is_looked_at_again_until_it_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("global_step1")
    steps = [item(tmp_path / f"global_step{number}", number) for number in (1, 2)]
    answers: list[Any] = [BridgeError("nothing yet"), steps[1:], steps]

    def find() -> list[Item]:
        answer = answers.pop(0)
        if isinstance(answer, BridgeError):
            raise answer
        return list(answer)

    stopped = threading.Event()
    seen = []
    for found in rounds(find, 0.0, stopped):
        seen.append([one.number for one in found])
        if not answers:
            stopped.set()
    assert seen == [[], [], [1]]


# --- what becomes of each


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for number in (1, 2):
        write_hf(tmp_path / f"run/step{number}", seed=number)
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_PAUSE_SECONDS", 0.0)


def batch_of(target: Path, events: list[Event] | None = None, **more: Any) -> Batch:
    tell = events.append if events is not None else running._silent
    options = more.pop("options", Options())
    return Batch(str(target), options, ahead=1, tell=tell, **more)


def convert(run: Path, batch: Batch, pool: Any = None, steps: str = "1") -> BatchRow:
    (one,), _ = find_items([str(run)], steps)
    return convert_one(one, batch, pool or Inline())


def test_a_conversion_is_a_row_and_events(run: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    row = convert(run, batch_of(tmp_path / "out", events))
    out = tmp_path / "out/step1"
    files = [path for path in out.rglob("*") if path.is_file()]
    expected = BatchRow(
        "step1",
        str(run),
        1,
        "done",
        str(run / "step1"),
        str(out),
        files=len(files),
        size=plan_of(run / "step1", out, iteration=1).size,
        seconds=row.seconds,
        verified=True,
    )
    assert dataclasses.replace(row, findings=(), shared=0) == expected
    assert row.seconds > 0
    assert events[0] == Event("begun", "step1", 2 * row.size)
    assert events[-1] == Event("ended", "step1", row.size, row=row)
    assert {event.kind for event in events[1:-1]} == {"written"}
    assert sum(event.size for event in events[1:-1]) == 2 * row.size
    assert (out / "latest").read_text() == "global_step1", "its folder tells the step"


def test_without_verification_nothing_is_called_verified(run: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    row = convert(run, batch_of(tmp_path / "out", events, verify=False))
    assert (row.status, row.verified) == ("done", None)
    assert events[0].size == row.size
    assert sum(event.size for event in events[1:-1]) == row.size


def test_what_a_killed_run_left_and_cannot_be_removed_is_said(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(tmp_path / "out")
    convert(run, batch)
    leftover = left_over("folder", "Permission denied")
    monkeypatch.setattr(running, "sweep", lambda _: leftover)
    row = convert(run, batch)
    assert row.status == "skipped"
    assert row.findings[-1] == leftover


def test_what_is_done_is_skipped_and_what_changed_is_written_anew(
    run: Path, tmp_path: Path
) -> None:
    batch = batch_of(tmp_path / "out")
    first = convert(run, batch)
    layer = tmp_path / "out/step1/global_step1/layer_02-model_00-model_states.pt"
    left = tmp_path / "out/.step1.neox-bridge"
    left.mkdir()
    (left / "journal").touch()
    again = convert(run, batch)
    assert (again.status, again.verified, again.norms) == ("skipped", None, None)
    assert (again.files, again.size) == (first.files, first.size)
    assert not left.exists(), "what a killed run left is removed"
    good = layer.read_bytes()
    layer.write_bytes(b"short")
    events: list[Event] = []
    fixed = convert(run, batch_of(tmp_path / "out", events))
    assert fixed.status == "done"
    assert layer.read_bytes() == good
    assert (tmp_path / "out/step1.changed/global_step1" / layer.name).read_bytes() == b"short"
    (finding,) = [f for f in fixed.findings if f.code == "not-whole"]
    assert finding.severity == "warning"
    assert finding.message == (
        f"{layer} was changed: converted again; kept as {tmp_path / 'out/step1.changed'}"
    )


@pytest.mark.parametrize("recheck", [False, True])
@pytest.mark.parametrize("name", ["latest", "finetune.yml"])
def test_a_target_without_a_file_above_its_step_is_written_anew(
    name: str, recheck: bool, run: Path, tmp_path: Path
) -> None:
    """GPT-NeoX finds no checkpoint without `latest`. A yml that is only edited is the user's."""
    batch = batch_of(tmp_path / "out", every_hash=recheck)
    convert(run, batch)
    file = tmp_path / "out/step1" / name
    good = file.read_bytes()
    with (tmp_path / "out/step1/finetune.yml").open("a") as yml:
        yml.write("train_iters: 7\n")
    assert convert(run, batch).status == "skipped"
    file.unlink()
    again = convert(run, batch)
    assert again.status == "done"
    assert file.read_bytes() == good
    (finding,) = [f for f in again.findings if f.code == "not-whole"]
    kept = tmp_path / "out/step1.changed"
    assert finding.message == f"{file} is missing: converted again; kept as {kept}"
    assert (kept / "global_step1").is_dir()


@pytest.mark.parametrize(
    "name",
    [
        "global_step1/configs/more.yml",
        "global_step1/layer_09-model_00-model_states.pt",
        "latest_universal",
        "tokenizer/tokenizer.json",
    ],
)
def test_a_target_to_which_a_file_was_added_is_written_anew(
    name: str, run: Path, tmp_path: Path
) -> None:
    """As verify has it: whoever loads the folder could read the file."""
    convert(run, batch_of(tmp_path / "out"))
    added = tmp_path / "out/step1" / name
    added.parent.mkdir(exist_ok=True)
    added.write_text("{}")
    again = convert(run, batch_of(tmp_path / "out"))
    assert again.status == "done"
    assert not added.exists()
    assert (tmp_path / "out/step1.changed" / name).read_text() == "{}"
    (finding,) = [f for f in again.findings if f.code == "not-whole"]
    assert finding.message.startswith(f"{added} was added: converted again; kept as ")
    assert convert(run, batch_of(tmp_path / "out")).status == "skipped"


def test_a_file_that_nothing_reads_changes_no_target(run: Path, tmp_path: Path) -> None:
    convert(run, batch_of(tmp_path / "out"))
    for place in ("notes.txt", "global_step1/notes.txt", "global_step1/.DS_Store"):
        (tmp_path / "out/step1" / place).write_text("mine")
    assert convert(run, batch_of(tmp_path / "out")).status == "skipped"


def test_in_a_store_a_file_that_was_added_is_not_replaced_unasked(
    run: Path, tmp_path: Path
) -> None:
    batch = Batch("memory://added-batch", Options(to="hf"), ahead=1)
    assert convert(run, batch).status == "done"
    assert convert(run, batch).status == "skipped"
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/added-batch/step1/pytorch_model.bin", b"mine")
    row = convert(run, batch)
    assert row.status == "failed"
    assert "memory://added-batch/step1/pytorch_model.bin was added" in row.error
    assert "`overwrite=True`" in row.error
    assert fs.cat_file("/added-batch/step1/pytorch_model.bin") == b"mine"


def test_overwriting_keeps_no_changed_folder(run: Path, tmp_path: Path) -> None:
    convert(run, batch_of(tmp_path / "out"))
    layer = tmp_path / "out/step1/global_step1/layer_02-model_00-model_states.pt"
    layer.write_bytes(b"short")
    row = convert(run, batch_of(tmp_path / "out", overwrite=True))
    assert row.status == "done"
    assert [finding.code for finding in row.findings if finding.code == "not-whole"] == []
    assert sorted(os.listdir(tmp_path / "out")) == ["step1"]


def test_something_else_is_refused_and_not_tried_again(run: Path, tmp_path: Path) -> None:
    convert(run, batch_of(tmp_path / "out"))
    events: list[Event] = []
    row = convert(run, batch_of(tmp_path / "out", events, options=Options(tp=2)))
    assert (row.status, row.tries) == ("failed", 1)
    assert row.error == (
        f"{tmp_path / 'out/step1'} was converted with other options, or from other files. Choose "
        "another target, or use `overwrite=True` to replace it."
    )
    assert [event.kind for event in events] == ["ended"]
    again = convert(run, batch_of(tmp_path / "out", options=Options(tp=2), overwrite=True))
    assert again.status == "done"


def failing(monkeypatch: Any, *errors: BaseException) -> list[int]:
    """``execute`` raises these, one at each call, before it works."""
    real, left, calls = running.execute, list(errors), [0]

    def execute(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if left:
            raise left.pop(0)
        return real(*args, **options)

    monkeypatch.setattr(running, "execute", execute)
    return calls


@pytest.mark.parametrize("error", [BridgeError("unreachable"), OSError("unreachable")])
def test_a_failure_is_tried_again_and_the_last_is_told(
    error: Exception, run: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    events: list[Event] = []
    calls = failing(monkeypatch, error, error)
    row = convert(run, batch_of(tmp_path / "out", events, retries=2))
    assert (row.status, row.tries, row.error, calls) == ("done", 3, "", [3])
    retries = [event for event in events if event.kind == "retry"]
    assert retries == [Event("retry", "step1", words="unreachable")] * 2
    calls = failing(monkeypatch, error, OSError("gone"))
    row = convert(run, batch_of(tmp_path / "other", retries=1))
    assert (row.status, row.tries, row.error, calls) == ("failed", 2, "gone", [2])


def test_the_pause_is_doubled_and_ends_where_all_is_stopped(
    run: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(running, "_PAUSE_SECONDS", 3.0)
    pauses: list[float] = []

    class Stopped:
        def wait(self, seconds: float) -> bool:
            pauses.append(seconds)
            return len(pauses) == 3

        def is_set(self) -> bool:
            return False

    pool: Any = Inline()
    pool.stopped = Stopped()
    calls = failing(monkeypatch, *[OSError("x")] * 9)
    row = convert(run, batch_of(tmp_path / "out", retries=8), pool)
    assert (row.status, row.tries, calls, pauses) == ("failed", 3, [3], [3.0, 6.0, 12.0])


@pytest.mark.parametrize(
    "error", [Refused("no"), Unverified("no"), UsageError(["tp"], "no")], ids=lambda e: type(e)
)
def test_what_no_retry_helps_is_tried_once(
    error: BridgeError, run: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    calls = failing(monkeypatch, error)
    row = convert(run, batch_of(tmp_path / "out"))
    assert (row.status, row.tries, calls) == ("failed", 1, [1])
    assert row.error == str(error)


def test_a_bug_ends_one_checkpoint_and_says_so(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    calls = failing(monkeypatch, ZeroDivisionError("by zero"))
    row = convert(run, batch_of(tmp_path / "out"))
    assert (row.status, row.tries, calls) == ("failed", 1, [1])
    assert row.error == (
        "this is a bug in neox-bridge: ZeroDivisionError: by zero. Please report it."
    )


def test_the_targets_folder_stays_where_all_fail(
    run: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    failing(monkeypatch, Refused("no"))
    convert(run, batch_of(tmp_path / "deep/out"))
    assert os.listdir(tmp_path / "deep") == ["out"]
    failing(monkeypatch, Refused("no"))
    monkeypatch.chdir(tmp_path / "deep/out")
    monkeypatch.setattr(running, "state_of", lambda *_, **__: ("absent", ""))
    (one,), _ = find_items([str(run)], "1")
    row = convert_one(one, Batch("s3://bucket/out", Options()), Inline())
    assert row.error == "no"
    assert os.listdir(tmp_path / "deep/out") == [], "a URL is no folder"


# --- verification


def test_a_result_that_is_not_the_source_is_kept_aside(
    run: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def unverified(*_: Any) -> None:
        raise Unverified("not the source.")

    monkeypatch.setattr(running, "verify_part", unverified)
    row = convert(run, batch_of(tmp_path / "out"))
    assert (row.status, row.verified) == ("failed", None)
    assert row.error.startswith("not the source. The result is kept as ")
    assert sorted(os.listdir(tmp_path / "out")) == ["step1.unverified"]
    assert convert(run, batch_of(tmp_path / "out", verify=False)).status == "done"


def test_every_part_of_a_checkpoint_is_verified(
    run: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(running, "_PART_BYTES", 4096)
    seen: list[Any] = []
    real = running.verify_part
    monkeypatch.setattr(
        running, "verify_part", lambda *args: (seen.append(args[1:4:2]), real(*args))
    )
    row = convert(run, batch_of(tmp_path / "out"), Inline(3))
    assert row.status == "done"
    assert row.size > 2 * 4096
    assert seen == [("none", (number, 3)) for number in range(3)]


@pytest.mark.parametrize("part", [(0, 1), (0, 3), (1, 3), (2, 3)])
def test_a_wrong_tensor_is_found_in_its_part(part: tuple[int, int], tmp_path: Path) -> None:
    """Every tensor in turn is changed; the part that holds it says so, and no other does."""
    model = write_hf(tmp_path / "hf")
    convert(tmp_path, batch_of(tmp_path / "out", verify=False), steps="all")
    folder = str(tmp_path / "out/hf")
    verify_part(Source(str(model)), "none", folder, part, {})
    every = sorted(tensors())
    for number in (0, 5, 10):
        name = every[number]
        changed = {name: tensors()[name] + np.float32(1)}
        other = write_hf(tmp_path / f"other{number}", changed=changed)
        if number % part[1] == part[0]:
            with pytest.raises(Unverified, match=f"{name}: "):
                verify_part(Source(str(other)), "none", folder, part, {})
        else:
            verify_part(Source(str(other)), "none", folder, part, {})


@pytest.mark.parametrize(
    ("optimizer", "part", "checked"),
    [("fresh", (0, 2), True), ("fresh", (1, 2), False), ("none", (0, 2), False)],
)
def test_a_fresh_optimizer_is_checked_once(
    optimizer: str, part: tuple[int, int], checked: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    from neox_bridge.verification import optimizer as checking
    from neox_bridge.verification import verify as verifying

    seen: list[str] = []
    monkeypatch.setattr(verifying, "checker", lambda *_, **__: seen.append)
    monkeypatch.setattr(
        checking, "fresh_checker", lambda _, check, **__: lambda folder: check("fresh " + folder)
    )
    source = Source(str(write_hf(tmp_path / "hf")))
    verify_part(source, optimizer, "folder", part, {})
    assert seen == ["fresh folder" if checked else "folder"]


# --- norms


def test_norms_are_taken_of_the_result(run: Path, tmp_path: Path) -> None:
    row = convert(run, batch_of(tmp_path / "out", norms=True))
    expected = {name: float(np.linalg.norm(v.astype("f8"))) for name, v in tensors(1).items()}
    assert row.norms == pytest.approx(expected, rel=1e-12)
    assert convert(run, batch_of(tmp_path / "out", norms=True)).norms == row.norms
    assert convert(run, batch_of(tmp_path / "out")).norms is None


# --- the Hub


@pytest.mark.parametrize("state", ["absent", "whole"])
def test_a_branch_is_published_from_a_folder_that_is_whole(
    state: TargetState, run: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    sent: list[Any] = []
    work = Work(str(tmp_path / "work"))

    @contextmanager
    def made_in(*_: Any) -> Any:
        yield work

    monkeypatch.setattr(running.on_hub, "made_in", made_in)
    monkeypatch.setattr(running.on_hub, "state_of", lambda *_: ("absent", ""))
    monkeypatch.setattr(running.on_hub, "send", lambda *args: sent.append(args[1:]))
    model = HubModel("org/model", str(tmp_path / "work"))
    if state == "whole":
        convert(run, batch_of(tmp_path, hub=model))
        sent.clear()
        monkeypatch.setattr(running, "execute", lambda *_, **__: 1 / 0)
    row = convert(run, batch_of(tmp_path, hub=model, norms=True, overwrite=True))
    assert (row.status, row.error) == ("done", "")
    assert row.target == "hf://org/model@step1"
    assert row.norms is not None
    assert sent == [(work, model, "step1", True)]
    assert (tmp_path / "work/files/latest").exists()
    monkeypatch.setattr(running.on_hub, "state_of", lambda *_: ("whole", ""))
    skipped = convert(run, batch_of(tmp_path, hub=model))
    assert (skipped.status, len(sent)) == ("skipped", 1)


# --- several at a time, and stopping


def test_all_are_converted_few_at_a_time(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    lock, now, most = threading.Lock(), [0], [0]
    more = threading.Event()

    def one(item: Item, *_: Any) -> BatchRow:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
            if now[0] == 2:
                more.set()
        more.wait(5)
        with lock:
            now[0] -= 1
        return BatchRow(item.name, "", 0, "done", "", "")

    monkeypatch.setattr(running, "convert_one", one)
    items = [Item(f"step{n}", "", n, Source("")) for n in range(6)]
    batch = dataclasses.replace(batch_of(tmp_path), ahead=2)
    rows = list(run_batch(items, batch, Inline()))
    assert sorted(row.name for row in rows) == [f"step{n}" for n in range(6)]
    assert most == [2]
    assert list(run_batch([], batch, Inline())) == []


def test_an_interruption_stops_the_pool(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def interrupted(*_: Any) -> BatchRow:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "convert_one", interrupted)
    items, _ = find_items([str(run)])
    pool = Inline()
    with pytest.raises(KeyboardInterrupt):
        list(run_batch(items, batch_of(tmp_path / "out"), pool))
    assert pool.stopped.is_set()
    calm = Inline()
    monkeypatch.setattr(running, "convert_one", lambda *_: BatchRow("x", "", 0, "done", "", ""))
    list(run_batch(items, batch_of(tmp_path / "out"), calm))
    assert not calm.stopped.is_set()


def test_calls_that_wait_are_cancelled_where_all_is_stopped() -> None:
    class Waiting(Future[Any]):
        def cancel(self) -> bool:
            """As an executor answers that has not begun with it."""
            return super().cancel() and not self.set_running_or_notify_cancel()

    waiting = Waiting()

    class Busy(Inline):
        def submit(self, *_: Any) -> Any:
            return waiting

    pool = Busy()
    pool.stopped.set()
    timer = threading.Timer(3, lambda: waiting.set_result(None))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        running._share(pool, [(abs, 1)])
    timer.cancel()
    assert waiting.cancelled()


@pytest.mark.parametrize(("slots", "ahead"), [(1, 3), (29, 31), (30, 32), (31, 32), (64, 32)])
def test_two_more_than_processes_are_worked_on(slots: int, ahead: int) -> None:
    assert default_ahead(slots) == ahead


# --- the plan of one


def test_keys_are_ignored_where_a_checkpoint_has_them(tmp_path: Path) -> None:
    model = write_hf(tmp_path / "run/step1", attention_scale=2.0)
    refused = convert(model.parent, batch_of(tmp_path / "out"))
    assert "attention_scale" in refused.error
    options = Options(ignore_keys=("attention_scale", "logit_scale"))
    row = convert(model.parent, batch_of(tmp_path / "out", options=options))
    assert row.status == "done"
    absent = [f.message for f in row.findings if f.code == "ignored-key-absent"]
    assert absent == ["`ignore_keys=logit_scale`: this checkpoint has no unknown key of this name"]


def test_a_cast_is_in_the_row(run: Path, tmp_path: Path) -> None:
    row = convert(run, batch_of(tmp_path / "out", options=Options(dtype="bfloat16")))
    assert [(cast.source, cast.target) for cast in row.casts] == [("float32", "bfloat16")]
    assert json.loads(json.dumps(row.to_json()))["casts"]


def test_defaults_of_an_event_and_a_row() -> None:
    assert Event("retry", "x") == Event("retry", "x", 0, "", None)
    told = BatchRow("step0", "run", 0, "failed", "a", "b").to_json()
    assert told == {
        **{"name": "step0", "run": "run", "number": 0, "status": "failed"},
        **{"source": "a", "target": "b", "files": 0, "size": 0, "shared": 0, "seconds": 0.0},
        **{"tries": 1, "verified": None, "norms": None, "findings": [], "error": "", "casts": []},
        **{"carried": [], "not_carried": []},
    }


def test_a_place_of_an_item_is_below_the_target() -> None:
    one = Item("run/step1", "run", 1, Source("x"))
    assert running.place_of(one, Batch("out", Options())) == os.path.join("out", "run/step1")
    assert StepLocation("a", "b") == StepLocation("a", "b", None)
