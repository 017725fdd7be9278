"""Folders in which a target is made: locks, journals, what is put aside, undone or gone on with."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import xxhash
from tiny import Inline, convert, plan_of, write_hf

from neox_bridge.errors import BridgeError, DiskFull, Refused, Unreachable, Unverified
from neox_bridge.execution import disk, exchange, output, units
from neox_bridge.execution.context import Context
from neox_bridge.execution.execute import execute
from neox_bridge.execution.install import LATEST, RootFiles, clear, install, is_begun, settle
from neox_bridge.execution.journal import Key, Written, append, begun, finished, resume
from neox_bridge.execution.movers import SEND_BYTES
from neox_bridge.execution.placement import Places, View, choose, local_bytes, unrequested, unseen
from neox_bridge.execution.staging import (
    check_free,
    check_replaceable,
    check_room,
    check_target,
    holds_others,
    is_run,
    kept_files,
    set_aside,
    staged,
    sweep,
)
from neox_bridge.execution.units import Made, drive, grouped, read_of
from neox_bridge.execution.work import Work, held, locked, remove, work_of
from neox_bridge.tensors.pieces import OutputFile, OutputTensor, Piece
from neox_bridge.tensors.tensor_ref import TensorRef


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# --- the folder beside the target


@pytest.mark.parametrize(("length", "hashed"), [(150, False), (151, True)])
def test_a_long_name_is_hashed(length: int, hashed: bool, tmp_path: Path) -> None:
    work = work_of(str(tmp_path / ("x" * length)))
    name = os.path.basename(work.folder)
    assert os.path.dirname(work.folder) == str(tmp_path)
    assert (name == f".{'x' * length}.neox-bridge") == (not hashed)
    assert len(name) == (32 if hashed else length) + len("..neox-bridge")
    other = work_of(str(tmp_path / ("x" * (length - 1) + "y")))
    assert other.folder != work.folder


def work_in(home: Path) -> Work:
    return work_of(str(home / "out"))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    work = work_in(tmp_path)
    with locked(work, "out"):
        said = Path(work.lock).read_text()
        assert said == f"process {os.getpid()} on {os.uname().nodename}\n"
        words = rf"Another neox-bridge \(process {os.getpid()} on .*\) is writing out\. Wait"
        with pytest.raises(BridgeError, match=words), locked(work, "out"):
            pass
    with locked(work, "out"):
        pass


@pytest.mark.parametrize(
    ("said", "words"),
    [(b"", "process unknown"), (b" \n", "process unknown"), (b"p\xff 3\n", "p� 3")],
)
def test_whoever_holds_the_lock_may_have_written_anything(
    said: bytes, words: str, tmp_path: Path
) -> None:
    work = work_in(tmp_path)
    os.mkdir(work.folder)
    Path(work.lock).write_bytes(said)
    with open(work.lock, "rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(BridgeError, match=rf"\({words}\)"), locked(work, "out"):
            pass
    with locked(work, "out"):
        assert Path(work.lock).read_bytes().startswith(b"process ")
        assert Path(work.lock).read_bytes().count(b"\n") == 1


def test_a_lock_that_was_replaced_is_taken_anew(tmp_path: Path, monkeypatch: Any) -> None:
    """Another run ended between the opening of the lock and the locking, and removed it."""
    work = work_in(tmp_path)
    real, calls = fcntl.flock, []

    def flock(fd: int, how: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            shutil.rmtree(work.folder)
        if len(calls) == 2:
            os.unlink(work.lock)
            Path(work.lock).touch()
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(work, "out"):
        assert len(calls) == 3
        with open(work.lock, "rb") as other, pytest.raises(OSError):
            real(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_file_system_without_locks_has_none(tmp_path: Path, monkeypatch: Any) -> None:
    def flock(_fd: int, _how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(work_in(tmp_path), "out"):
        pass


@pytest.mark.parametrize("name", [None, "files/a", "journal", "zz"])
def test_what_is_worth_keeping_stays_on_an_error(
    name: str | None, tmp_path: Path, monkeypatch: Any
) -> None:
    """Whatever the order in which the folder's entries are listed."""
    work, real = work_in(tmp_path), os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(real(path)))
    with pytest.raises(BridgeError), held(work, "out"):
        if name is not None:
            write(Path(work.folder) / name)
        raise BridgeError("failed")
    assert os.path.isdir(work.folder) == (name is not None)
    with held(work, "out"):
        pass
    assert not os.path.isdir(work.folder)


def test_what_a_killed_run_left_is_swept_unless_it_has_files_or_an_owner(tmp_path: Path) -> None:
    work = work_in(tmp_path)
    target = str(tmp_path / "out")
    sweep(target)
    os.makedirs(work.files)
    sweep(target)
    assert os.path.isdir(work.files)
    os.rmdir(work.files)
    with locked(work, target):
        sweep(target)
        assert os.path.isdir(work.folder)
    sweep(target)
    assert not os.path.exists(work.folder)


# --- the journal


KEY = Key("plan", {"/a": (1, 2)}, "xxh3_128")


def written(work: Work, name: str, data: bytes) -> Written:
    write(Path(work.files) / name).write_bytes(data)
    return Written(len(data), xxhash.xxh3_128(data).hexdigest())


def journal_of(work: Work, *names: str) -> dict[str, Written]:
    resume(work, KEY, names)
    entries = {name: written(work, name, name.encode()) for name in names}
    append(work, entries.items())
    return entries


def test_finished_files_are_gone_on_with(tmp_path: Path) -> None:
    work = work_in(tmp_path)
    os.mkdir(work.folder)
    assert not begun(work, KEY)
    assert finished(work) == 0
    entries = journal_of(work, "a", "b/c")
    assert begun(work, KEY)
    assert finished(work) == 2
    write(Path(work.files) / "stray")
    assert resume(work, KEY, ["a", "b/c", "d"]) == entries
    assert tree(Path(work.files)) == ["a", "b/c"]
    lines = Path(work.journal).read_text().splitlines()
    assert lines[0] == KEY.line()
    assert [json.loads(line)["path"] for line in lines[1:]] == ["a", "b/c"]


@pytest.mark.parametrize(
    "other",
    [
        Key("other", {"/a": (1, 2)}, "xxh3_128"),
        Key("plan", {"/a": (1, 3)}, "xxh3_128"),
        Key("plan", {"/b": (1, 2)}, "xxh3_128"),
        Key("plan", {"/a": (1, 2)}, "sha256"),
        Key("plan", {"/a": (1, 2)}, None),
    ],
)
def test_another_plan_begins_anew(other: Key, tmp_path: Path) -> None:
    work = work_in(tmp_path)
    os.mkdir(work.folder)
    journal_of(work, "a")
    assert not begun(work, other)
    assert resume(work, other, ["a"]) == {}
    assert tree(Path(work.files)) == []
    assert finished(work) == 0
    assert begun(work, other)


def test_without_hashes_nothing_is_gone_on_with(tmp_path: Path) -> None:
    work, key = work_in(tmp_path), Key("plan", {}, None)
    os.mkdir(work.folder)
    resume(work, key, ["a"])
    append(work, [("a", written(work, "a", b"a"))])
    assert resume(work, key, ["a"]) == {}
    resume(work, KEY, ["a"])
    append(work, [("a", Written(1, None))])
    write(Path(work.files) / "a", "a")
    assert resume(work, KEY, ["a"]) == {}


def test_a_file_that_is_not_planned_is_not_kept(tmp_path: Path) -> None:
    work = work_in(tmp_path)
    os.mkdir(work.folder)
    entries = journal_of(work, "a", "b")
    assert resume(work, KEY, ["b"]) == {"b": entries["b"]}
    assert tree(Path(work.files)) == ["b"]


@pytest.mark.parametrize("data", [b"", b"A", b"aa"])
def test_a_file_that_is_not_what_its_line_says_is_made_anew(data: bytes, tmp_path: Path) -> None:
    work = work_in(tmp_path)
    os.mkdir(work.folder)
    entries = journal_of(work, "a", "b")
    (Path(work.files) / "a").write_bytes(data)
    assert resume(work, KEY, ["a", "b"]) == {"b": entries["b"]}
    (Path(work.files) / "b").unlink()
    assert resume(work, KEY, ["a", "b"]) == {}


def test_lines_that_are_not_whole_do_not_count(tmp_path: Path) -> None:
    work = work_in(tmp_path)
    os.mkdir(work.folder)
    entries = journal_of(work, "a", "b", "c")
    lines = Path(work.journal).read_text().splitlines(keepends=True)
    Path(work.journal).write_text("".join([*lines[:2], "[]\n", "{}\n", lines[2], lines[3][:-9]]))
    assert resume(work, KEY, ["a", "b", "c"]) == {name: entries[name] for name in ("a", "b")}
    Path(work.journal).write_text("")
    assert resume(work, KEY, ["a", "b", "c"]) == {}


# --- targets that can be


def test_a_target_that_holds_the_source_is_none(tmp_path: Path) -> None:
    source = write(tmp_path / "out/model.safetensors")
    inside = write(tmp_path / "run/global_step4/model.safetensors")
    write(tmp_path / "out2/x")
    for target, step, path in (
        ("out", None, source),
        ("run", None, inside),
        ("run", "global_step4", inside),
    ):
        with pytest.raises(BridgeError, match=f"contains the source {path}, which"):
            check_target(str(tmp_path / target), [str(write(tmp_path / "o")), str(path)], step)
    check_target(str(tmp_path / "run"), [str(inside)], "global_step5")
    check_target(str(tmp_path / "out2"), [str(source)], None)
    check_target(str(tmp_path / "ou"), [str(source)], None)


def test_a_file_a_mount_point_and_a_folder_that_is_closed_are_no_targets(
    tmp_path: Path, monkeypatch: Any
) -> None:
    file = write(tmp_path / "file")
    with pytest.raises(BridgeError, match=r"is a file\. Choose a folder"):
        check_target(str(file), [], None)
    with pytest.raises(BridgeError, match="is a file, but must be a folder"):
        check_target(str(file / "below/it"), [], None)
    run = write(tmp_path / "run/latest", "global_step1").parent
    monkeypatch.setattr(os.path, "ismount", lambda path: path == str(run))
    with pytest.raises(BridgeError, match="is a mount point"):
        check_target(str(run), [], None)
    check_target(str(run), [], "global_step4")
    asked_for: list[Any] = []

    def access(path: str, mode: int) -> bool:
        asked_for.append((path, mode))
        return False

    monkeypatch.setattr(os, "access", access)
    with pytest.raises(BridgeError, match=f"^{tmp_path} is not writable"):
        check_target(str(tmp_path / "new/deep"), [], None)
    assert asked_for == [(str(tmp_path), os.W_OK | os.X_OK)]


def test_a_target_that_is_there_is_not_free(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    check_free(str(folder), None)
    folder.mkdir()
    check_free(str(folder), None)
    check_free(str(folder), "global_step4")
    write(folder / "x")
    for step in (None, "global_step4"):
        with pytest.raises(BridgeError, match=f"^{folder} exists and is not empty"):
            check_free(str(folder), step)
    write(folder / "latest", "global_step1")
    check_free(str(folder), "global_step4")
    with pytest.raises(BridgeError, match=f"^{folder} exists"):
        check_free(str(folder), None)
    (folder / "global_step4").mkdir()
    with pytest.raises(BridgeError, match=f"^{folder}/global_step4 exists and is not empty"):
        check_free(str(folder), "global_step4")


@pytest.mark.parametrize(
    ("free", "shared", "enough", "asks"),
    [(100, 0, True, False), (99, 0, False, True), (99, 1, True, True), (60, 40, True, True),
     (59, 40, False, True)],
)  # fmt: skip
def test_room_is_counted_without_what_is_shared(
    free: int, shared: int, enough: bool, asks: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    usage = type("Usage", (), {"free": free})
    looked: list[str] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (looked.append(path), usage)[1])
    calls: list[int] = []

    def share() -> int:
        calls.append(1)
        return shared

    words = rf"{100 - shared} bytes are needed and {free} are free in {tmp_path}\."
    with contextlib.nullcontext() if enough else pytest.raises(BridgeError, match=words):
        check_room(str(tmp_path / "new/out"), 100, share)
    assert bool(calls) == asks
    assert looked == [str(tmp_path)]


@pytest.mark.parametrize(
    ("name", "answer"),
    [("latest", True), ("latest_universal", True), ("global_step4", True), ("step4", False)],
)
def test_what_is_a_run(name: str, answer: bool, tmp_path: Path) -> None:
    write(tmp_path / "run" / name)
    assert is_run(str(tmp_path / "run")) == answer
    assert not is_run(str(tmp_path / "none"))


@pytest.mark.parametrize("step", [None, "global_step4"])
def test_what_is_no_part_of_a_checkpoint_is_not_deleted(step: str | None, tmp_path: Path) -> None:
    check_replaceable(str(tmp_path / "out"), step, ["a"])
    replaced = tmp_path / "out" / (step or "")
    write(replaced / "mine.txt")
    write(tmp_path / "out/latest")
    name = f"{step}/mine.txt" if step else "mine.txt"
    check_replaceable(str(tmp_path / "out"), step, [name, "other"])
    for planned in (["other"], ["else/mine.txt"]):
        with pytest.raises(
            Refused, match=rf"^{replaced} contains files .*them: mine\.txt\. Nothing"
        ):
            check_replaceable(str(tmp_path / "out"), step, planned)
    write(tmp_path / "out/notes.txt")
    if step:
        check_replaceable(str(tmp_path / "out"), step, [name])


def test_five_names_are_said() -> None:
    names = [f"f{number}" for number in range(7)]
    assert "them: f0, f1, f2, f3, f4. Nothing" in str(holds_others("t", names[:5]))
    assert "them: f0, f1, f2, f3, f4 and 2 more. Nothing" in str(holds_others("t", names))


# --- putting in place


def stage(
    target: Path, files: dict[str, str], replace: bool = False, beside: RootFiles | None = None
) -> None:
    with staged(str(target), 100) as work:
        resume(work, KEY, [])
        for name, text in files.items():
            write(Path(work.files) / name, text)
        install(work, str(target), beside, replace=replace)
        assert clear(work) == ""


def test_a_target_appears_whole(tmp_path: Path) -> None:
    stage(tmp_path / "deep/out", {"a": "1", "b/c": "2"})
    assert tree(tmp_path) == ["deep/out/a", "deep/out/b/c"]
    assert sorted(os.listdir(tmp_path / "deep")) == ["out"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_target_is_replaced_whole(can_exchange: bool, tmp_path: Path, monkeypatch: Any) -> None:
    if not can_exchange:
        monkeypatch.setattr(exchange, "_exchange", lambda *_: False)
    write(tmp_path / "out/old")
    with pytest.raises(BridgeError, match="exists and is not empty"):
        stage(tmp_path / "out", {"new": ""})
    assert tree(tmp_path) == ["out/old"]
    stage(tmp_path / "out", {"new": ""}, replace=True)
    assert tree(tmp_path) == ["out/new"]
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / "empty").mkdir()
    stage(tmp_path / "empty", {"new": ""}, replace=True)
    stage(tmp_path / "none", {"new": ""}, replace=True)
    assert tree(tmp_path) == ["empty/new", "none/new", "out/new"]


OLD = {
    "global_step1/a": "old",
    "global_step2/a": "old",
    "latest": "old",
    "mine.txt": "old",
    "finetune.yml": "old",
    "tokenizer/t": "old",
}
FRESH = {
    "global_step2/b": "new",
    "latest": "new",
    "finetune.yml": "new",
    "tokenizer/t": "new",
    "notes": "new",
    "mine.txt": "new",
}
BESIDE = RootFiles(
    "global_step2",
    {name: name for name in ("finetune.yml", "tokenizer", "mine.txt")},
    ("finetune.yml", "tokenizer"),
)
BOTH = {
    "global_step1/a": "old",
    "global_step2/b": "new",
    "latest": "new",
    "mine.txt": "old",
    "finetune.yml": "new",
    "tokenizer/t": "new",
}


def texts(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in tree(folder)}


def old_run(home: Path) -> Path:
    for name, text in OLD.items():
        write(home / "run" / name, text)
    return home / "run"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_step_is_put_into_a_run_and_latest_follows(
    can_exchange: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    """Only what is named is put beside it, and nothing that somebody has there is replaced."""
    if not can_exchange:
        monkeypatch.setattr(exchange, "_exchange", lambda *_: False)
    run = old_run(tmp_path)
    with pytest.raises(BridgeError, match="exists and is not empty"):
        stage(run, FRESH, beside=BESIDE)
    assert texts(run) == OLD
    stage(run, FRESH, replace=True, beside=BESIDE)
    assert texts(run) == BOTH
    assert os.listdir(tmp_path) == ["run"]


def test_the_root_never_contradicts_itself(tmp_path: Path, monkeypatch: Any) -> None:
    """finetune.yml is away while the step and latest change, and the last to appear."""
    run, order = old_run(tmp_path), []
    real = {name: getattr(os, name) for name in ("rename", "replace")}

    def record(name: str) -> Callable[[str, str], None]:
        def call(source: str, target: str) -> None:
            order.append((os.path.relpath(target, tmp_path), (run / "finetune.yml").exists()))
            real[name](source, target)

        return call

    for name in real:
        monkeypatch.setattr(os, name, record(name))
    monkeypatch.setattr(exchange, "_exchange", lambda *_: False)
    stage(run, FRESH, replace=True, beside=BESIDE)
    work = ".run.neox-bridge"
    assert order[-7:] == [
        (f"{work}/retired/finetune.yml", True),
        (f"{work}/retired/tokenizer", False),
        (f"{work}/files/global_step2.old", False),
        ("run/global_step2", False),
        ("run/tokenizer", False),
        ("run/latest", False),
        ("run/finetune.yml", False),
    ]


def killed_after(count: int, call: Callable[[], None]) -> bool:
    """Whether a process that makes this call is killed after so many changes of the disk."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    calls = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **options: Any) -> Any:
            nonlocal calls
            result = real(*args, **options)
            calls += 1
            if calls == count:
                os._exit(9)
            return result

        return changed

    for name in ("rename", "replace", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    try:
        call()
    finally:
        os._exit(0)


@pytest.mark.parametrize("into_run", [False, True])
@pytest.mark.parametrize("can_exchange", [True, False])
def test_whatever_a_killed_run_had_moved_the_next_one_completes(
    can_exchange: bool, into_run: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    """Killed after each call in turn: the target is the old one or, when it goes on, the new."""
    if not can_exchange:
        monkeypatch.setattr(exchange, "_exchange", lambda *_: False)
    beside = BESIDE if into_run else None
    states: list[str] = []
    for count in range(1, 60):
        home = tmp_path / str(count)
        run = old_run(home)
        killed = killed_after(count, lambda: stage(run, FRESH, replace=True, beside=beside))  # noqa: B023
        work = work_of(str(run))
        if killed and is_begun(work):
            states.append("begun")
            sweep(str(run))
        elif killed and texts(run) == OLD:
            states.append("old")
            with locked(work, str(run)):
                assert not settle(work, str(run))
            assert texts(run) == OLD
            continue
        else:
            states.append("new")
        assert texts(run) == (BOTH if into_run else FRESH), count
        if not killed:
            break
        with locked(work, str(run)):
            assert clear(work) == ""
        assert os.listdir(home) == ["run"]
    assert not killed
    assert states == sorted(states, key=["old", "begun", "new"].index)
    assert {"old", "begun", "new"} == set(states)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_where_the_folder_cannot_be_moved_all_is_as_before(
    can_exchange: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    if not can_exchange:
        monkeypatch.setattr(exchange, "_exchange", lambda *_: False)
    run = old_run(tmp_path)

    def fails(*_: Any) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr("neox_bridge.execution.install.swap", fails)
    with pytest.raises(BridgeError, match="cannot be written: I/O error"):
        stage(run, FRESH, replace=True, beside=BESIDE)
    assert texts(run) == OLD
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beside", ["../x"]),
        ("beside", [".."]),
        ("beside", [""]),
        ("retired", ["a/b"]),
        ("retired", ["."]),
        ("step", "../x"),
        ("step", "step2"),
        ("folder", [1]),
        ("folder", "x"),
    ],
)
def test_moves_that_lead_elsewhere_do_not_count(key: str, value: Any, tmp_path: Path) -> None:
    run, work = old_run(tmp_path), work_of(str(tmp_path / "run"))
    for name, text in FRESH.items():
        write(Path(work.files) / name, text)
    status = os.stat(Path(work.files) / "global_step2")
    moves: dict[str, Any] = {
        "step": "global_step2",
        "replace": True,
        "folder": [status.st_dev, status.st_ino],
        "beside": [],
        "retired": [],
    }
    Path(work.moves).write_text(json.dumps({**moves, key: value}))
    assert not settle(work, str(run))
    assert texts(run) == OLD
    Path(work.moves).write_text(json.dumps(moves))
    assert settle(work, str(run))
    settled = {**OLD, "global_step2/b": "new", "latest": "new"}
    del settled["global_step2/a"]
    assert texts(run) == settled


def test_a_failed_move_leaves_what_the_next_run_needs(tmp_path: Path, monkeypatch: Any) -> None:
    run, work = old_run(tmp_path), work_of(str(tmp_path / "run"))
    with monkeypatch.context() as patch, pytest.raises(BridgeError, match="1 finished file is"):
        patch.setattr(exchange, "_exchange", lambda *_: False)
        real, calls = os.rename, []

        def rename(source: str, target: str) -> None:
            calls.append(target)
            if target == str(run / "global_step2"):
                patch.setattr(os, "rename", real)
                raise OSError(errno.EIO, "I/O error")
            real(source, target)

        patch.setattr(os, "rename", rename)
        with staged(str(run), 100):
            journal_of(work, "global_step2/b")
            install(work, str(run), BESIDE, replace=True)
    assert texts(run) == OLD
    assert sorted(os.listdir(work.folder)) == ["files", "journal", "lock"]


def test_what_is_installed_is_no_unfinished_run(tmp_path: Path) -> None:
    """Even before what it replaced is removed; and a run may get a step and nothing else."""
    run = old_run(tmp_path)
    with staged(str(run), 100) as work:
        journal_of(work, "global_step3/b")
        install(work, str(run), RootFiles("global_step3"), replace=False)
        assert not os.path.exists(work.journal)
        assert is_begun(work)
        assert clear(work) == ""
    assert texts(run) == {**OLD, "global_step3/b": "global_step3/b"}


def test_latest_alone_may_be_left_to_move(tmp_path: Path) -> None:
    run, work = old_run(tmp_path), work_of(str(tmp_path / "run"))
    write(Path(work.files) / "latest", "new")
    status = os.stat(run / "global_step2")
    moves = {
        "step": "global_step2",
        "replace": True,
        "folder": [status.st_dev, status.st_ino],
        "beside": [],
        "retired": [],
    }
    Path(work.moves).write_text(json.dumps(moves))
    assert settle(work, str(run))
    assert texts(run) == {**OLD, "latest": "new"}
    Path(work.moves).write_text(json.dumps(moves))
    assert not settle(work, str(run)), "nothing was left to move"
    assert not settle(work, str(run)), "nothing is known to move"


def test_a_yml_beside_an_edited_one_does_not_start_a_run(tmp_path: Path, monkeypatch: Any) -> None:
    run, order = old_run(tmp_path), []
    real = os.rename

    def rename(source: str, target: str) -> None:
        order.append(os.path.basename(target))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    names = ("finetune.new.yml", "resume.yml")
    beside = RootFiles("global_step3", {name: name for name in names})
    files = {"global_step3/b": "", "latest": "new", **dict.fromkeys(names, "new")}
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(os.path.basename(b)), real(a, b)))
    stage(run, files, beside=beside)
    wanted = ["global_step3", "finetune.new.yml", "latest", "resume.yml"]
    assert [name for name in order if name in wanted] == wanted


def test_what_cannot_be_removed_is_said(tmp_path: Path, monkeypatch: Any) -> None:
    work = work_of(str(tmp_path / "out"))
    write(Path(work.files) / "old")
    write(Path(work.moves), "{}")

    def fails(path: str) -> None:
        raise OSError(errno.EACCES, "Permission denied", path)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fails)
        assert clear(work) == "Permission denied"
        assert is_begun(work), "the next run must know"
        finding = sweep(str(tmp_path / "out"))
        assert finding is not None
        assert (finding.code, finding.severity) == ("left-over", "warning")
        assert f"could not be deleted from {work.folder}: Permission" in finding.message
    assert sweep(str(tmp_path / "out")) is None
    assert os.listdir(tmp_path) == []
    assert clear(work) == ""


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [OSError(5, "x"), KeyboardInterrupt()])
def test_a_swap_that_fails_leaves_both_where_they_were(
    failing: int, error: BaseException, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(exchange, "_exchange", lambda *_: False)
    write(tmp_path / "new/n")
    write(tmp_path / "old/o")
    real, calls = os.rename, []

    def rename(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == failing:
            raise error
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(type(error)):
        exchange.swap(str(tmp_path / "new"), str(tmp_path / "old"))
    assert tree(tmp_path) == ["new/n", "old/o"]


def test_names_aside_are_counted(tmp_path: Path) -> None:
    target = str(tmp_path / "out")
    expected = [f"{target}.changed", f"{target}.changed-2", f"{target}.changed-3"]
    for aside in expected:
        os.mkdir(target)
        assert set_aside(target, target, "changed") == aside
    assert sorted(os.listdir(tmp_path)) == [os.path.basename(path) for path in expected]


# --- ends


def end(home: Path, error: BaseException, finished_files: int) -> BaseException:
    """The error that a staging ends with where this one comes after some files are finished."""
    with (
        pytest.raises(BaseException) as caught,
        staged(str(home / "deep/out"), 1234) as work,
    ):
        journal_of(work, *[f"f{number}" for number in range(finished_files)])
        write(Path(work.files) / "part")
        raise error
    return caught.value


FULL = "No space left while writing {}: 1,234 bytes are needed in total. Free some space, or choose"


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "full"), DiskFull, FULL),
        (OSError(errno.EDQUOT, "quota"), DiskFull, "The quota is exceeded while writing {}: "),
        (OSError(errno.EEXIST, "there"), BridgeError, "{} exists and is not empty."),
        (OSError(errno.ENOTEMPTY, "there"), BridgeError, "{} exists and is not empty."),
        (OSError(errno.EIO, "I/O error"), BridgeError, "{} cannot be written: I/O error."),
        (OSError("odd"), BridgeError, "{} cannot be written: odd."),
        (Unreachable("store away."), Unreachable, "store away."),
        (Refused("no."), Refused, "no."),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
    ids=lambda value: str(value)[:12] if isinstance(value, BaseException) else "",
)
def test_finished_files_wait_for_the_next_run(
    error: BaseException, kind: type, words: str, count: int, tmp_path: Path
) -> None:
    said = str(found := end(tmp_path, error, count))
    assert type(found) is kind
    target = tmp_path / "deep/out"
    assert said.startswith(words.format(target))
    work = work_of(str(target))
    if count:
        assert said.endswith(kept_files(work.folder, count))
        assert finished(work) == count
    else:
        assert "kept" not in said
        assert os.listdir(tmp_path) == [], "folders that were made for it go too"
        if kind is BridgeError:
            assert said.endswith("The partial output was deleted.")


def test_how_many_files_are_kept_is_said() -> None:
    assert kept_files("w", 1).startswith("1 finished file is kept in w. Run the same command again")
    assert kept_files("w", 2).startswith("2 finished files are kept in w. ")


@pytest.mark.parametrize("error", [BridgeError("x"), ValueError("x"), SystemExit(1)])
def test_any_other_error_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    assert end(tmp_path, error, 2) is error
    assert os.listdir(tmp_path) == []


def test_a_closed_pipe_is_no_fault_of_the_disk(tmp_path: Path) -> None:
    error = BrokenPipeError(errno.EPIPE, "x")
    assert end(tmp_path, error, 0) is error


def test_a_result_that_is_not_the_source_is_set_aside(tmp_path: Path) -> None:
    found = end(tmp_path, Unverified("wrong."), 1)
    target = tmp_path / "deep/out"
    assert str(found) == (
        f"wrong. The result is kept as {target}.unverified, and {target} is unchanged."
    )
    assert tree(tmp_path) == ["deep/out.unverified/f0", "deep/out.unverified/part"]


def test_a_conversion_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf")
    plan = plan_of(hf, tmp_path / "out", tp=2)
    convert(hf, tmp_path / "whole", tp=2)
    real, calls = disk.append, []

    def interrupted(*args: Any) -> None:
        real(*args)
        calls.append(args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(disk, "append", interrupted)
        execute(plan, str(tmp_path / "out"), workers=1)
    assert calls
    counted: list[int] = []
    result = execute(plan, str(tmp_path / "out"), workers=1, progress=counted.append)
    assert result.kept > 0
    assert sum(counted) == plan.size
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


# --- files and units


@pytest.mark.parametrize(
    ("size", "sent"), [(SEND_BYTES - 1, True), (SEND_BYTES, False), (SEND_BYTES + 1, False)]
)
def test_small_files_are_sent_to_the_disk_before_they_are_waited_for(
    size: int, sent: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(output, "send", lambda _fd, *range_, least: calls.append((*range_, least)))
    path = write(tmp_path / "a")
    context = Context()
    output.begin_flush(str(path), size, context)
    context.files.close()
    assert calls == ([(0, size, 0)] if sent else [])


def test_every_small_file_is_begun_with(tmp_path: Path, monkeypatch: Any) -> None:
    hf = write_hf(tmp_path / "hf")
    plan = plan_of(hf, tmp_path / "out", tp=2)
    begun_with: list[str] = []
    real = output.begin_flush

    def begin(path: str, size: int, context: Context) -> None:
        begun_with.append(path)
        real(path, size, context)

    monkeypatch.setattr(output, "begin_flush", begin)
    execute(plan, str(tmp_path / "out"), workers=1)
    names = [path.partition("/files/")[2] for path in begun_with]
    assert sorted(names) == sorted(file.path for file in plan.files if not file.seals)


@pytest.mark.parametrize(
    ("size", "copy", "small"),
    [(output.SMALL_BYTES, None, True), (output.SMALL_BYTES + 1, None, False), (1, "/x", False)],
)
def test_what_is_put_together_in_memory(size: int, copy: str | None, small: bool) -> None:
    assert output.is_small(OutputFile("a", size, copy_of=copy)) == small


@pytest.mark.parametrize("pool", [None, Inline()], ids=["threads", "units"])
@pytest.mark.parametrize("small", [0, 400, 1 << 20])
def test_a_record_has_every_hash_however_its_file_is_made(
    small: int, pool: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """In memory or through the kernel: what is recorded is what the file has."""
    monkeypatch.setattr(output, "SMALL_BYTES", small)
    hf, target = write_hf(tmp_path / "hf"), tmp_path / "out"
    execute(plan_of(hf, target, tp=2), str(target), workers=1, pool=pool)
    (record,) = target.glob("global_step*/neox_bridge.json")
    entries = json.loads(record.read_text())["written"]["files"]
    found = {
        name: [path.stat().st_size, xxhash.xxh3_128(path.read_bytes()).hexdigest()]
        for name in entries
        if (path := record.parent / name)
    }
    assert entries == found
    assert len(entries) == len(tree(target)) - 1


def files(*sizes: int) -> list[OutputFile]:
    return [OutputFile(f"f{number}", size) for number, size in enumerate(sizes)]


def sizes_of(groups: Any) -> list[list[int]]:
    return [[file.size for file in group] for group in groups]


def test_files_are_grouped_by_bytes_and_by_number(monkeypatch: Any) -> None:
    monkeypatch.setattr(units, "_UNIT_BYTES", 100)
    monkeypatch.setattr(units, "_UNIT_FILES", 3)
    assert sizes_of(grouped(files(500, 60, 40, 1))) == [[500], [60, 40, 1]]
    assert sizes_of(grouped(files(500, 60, 40, 9))) == [[500], [60, 40], [9]]
    assert sizes_of(grouped(files(10, 10, 10, 10))) == [[10, 10, 10], [10]]
    assert sizes_of(grouped(files(60, 60, 60, 60))) == [[60, 60], [60, 60]], "about the same each"
    assert sizes_of(grouped([])) == []


def test_what_a_unit_reads() -> None:
    near, far = (TensorRef(path, 0, "float32", (4, 4)) for path in ("/near", "s3://b/far"))
    pieces = (
        Piece(near, (0, 0), (0, 0), (2, 4)),
        Piece(near, (2, 0), (2, 0), (1, 4)),
        Piece(far, (0, 0), (3, 0), (1, 4)),
        Piece(None, (0, 0), (4, 0), (1, 4)),
    )
    tensor = OutputTensor("t", "float16", (5, 4), pieces)
    outputs = [OutputFile("a", 80, tensors=(tensor,)), OutputFile("b", 7, copy_of="/copied")]
    assert read_of(outputs) == {"/near": 48, "/copied": 7}


MADE = Made((), {}, (), ())


class Later(Inline):
    """A pool whose calls are done when a test says so."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.futures: list[Future[Any]] = []

    def submit(self, call: Callable[..., Any], /, *args: Any) -> Any:
        future: Future[Any] = Future()
        self.futures.append(future)
        return future


def test_two_units_wait_for_each_process(monkeypatch: Any) -> None:
    pool, seen, taken = Later(3), [], []
    real = units.wait

    def waited(waiting: Any, *how: Any) -> Any:
        seen.append(len(waiting))
        next(future for future in pool.futures if not future.done()).set_result(MADE)
        return real(waiting, *how)

    monkeypatch.setattr(units, "wait", waited)
    drive(pool, lambda _: MADE, iter(range(8)), taken.append)
    assert seen == [6, 6, 6, 5, 4, 3, 2, 1]
    assert len(taken) == 8


@pytest.mark.parametrize("stopped", [False, True])
def test_the_first_failure_cancels_what_waits_and_takes_what_is_done(
    stopped: bool, monkeypatch: Any
) -> None:
    pool, taken = Later(2), []
    real, calls = units.wait, []

    def waited(waiting: Any, *how: Any) -> Any:
        calls.append(len(waiting))
        if len(calls) == 1:
            if stopped:
                pool.stopped.set()
                pool.futures[0].set_result(MADE)
            else:
                pool.futures[0].set_exception(BridgeError("first"))
            return real(waiting, *how)
        states = [future.cancelled() for future in pool.futures]
        assert states == [False, True, True, False], "before all are waited for"
        return set(waiting), set()

    def running(self: Any) -> bool:
        return False

    monkeypatch.setattr(units, "wait", waited)
    real_submit = pool.submit

    def submit(call: Any, *args: Any) -> Any:
        future = real_submit(call, *args)
        if len(pool.futures) == 4:  # runs already: it cannot be cancelled
            future.set_running_or_notify_cancel()
        return future

    pool.submit = submit  # type: ignore[method-assign]

    def finish(made: Made) -> None:
        taken.append(made)

    late = Made((), {"copied": 1}, (), ())
    original = Future.exception

    def exception(self: Any, timeout: Any = None) -> Any:
        if not self.done():
            self.set_result(late)
        return original(self, timeout)

    monkeypatch.setattr(Future, "exception", exception)
    with pytest.raises(KeyboardInterrupt if stopped else BridgeError):
        drive(pool, lambda _: MADE, iter(range(4)), finish)
    assert calls == [4, 3]
    assert late in taken
    assert len(taken) == (2 if stopped else 1)


def test_what_a_killed_run_was_making_is_removed(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf")
    left = write(tmp_path / ".out.neox-bridge/attempts-old/x").parent
    seen: list[bool] = []
    plan = plan_of(hf, tmp_path / "out", tp=2)
    execute(plan, str(tmp_path / "out"), pool=Inline(), check=lambda _: seen.append(left.exists()))
    assert seen == [False]
    convert(hf, tmp_path / "threads", tp=2)
    assert tree(tmp_path / "out") == tree(tmp_path / "threads")
    assert sorted(os.listdir(tmp_path)) == ["hf", "out", "threads"]


# --- where a call is made


def test_a_machine_must_see_what_is_read_and_written() -> None:
    places = Places({"/a/x": 5, "/b/y": 7}, ("/c",), ("/w",))
    assert places.all_folders() == {"/a", "/b", "/c", "/w"}
    all_there = dict.fromkeys(("/a", "/b", "/c", "/w"), View(frozenset()))
    assert unseen(places, all_there) == []
    some = {
        "/a": View(frozenset({"x"})),
        "/b": View(frozenset({"other"})),
        "/c": View(frozenset({"z"})),
        "/w": View(None),
    }
    assert unseen(places, some) == ["/a/x", "/c/z", "/w"]
    none = dict.fromkeys(all_there, View(None))
    assert unseen(places, none) == ["/a/x", "/b/y", "/c", "/w"]


def test_the_machine_with_most_of_the_bytes_is_chosen_then_the_one_with_most_free() -> None:
    places = Places({"/a/x": 5, "/b/y": 7})
    shared, own = View(frozenset()), View(frozenset(), local=True)
    views = {
        "one": {"/a": own, "/b": shared},
        "two": {"/a": shared, "/b": own},
        "three": {"/a": shared, "/b": own},
        "blind": {"/a": own, "/b": View(None, local=True)},
    }
    assert local_bytes(places, views["one"]) == 5
    assert local_bytes(places, views["two"]) == 7
    free = {"one": 9, "two": 1, "three": 2, "blind": 9}
    assert choose(places, views, free) == "three"
    assert choose(places, views, {**free, "two": 0, "three": 0}) == "one"
    assert choose(places, views, {"blind": 9, "one": 0}) is None


def test_a_machine_is_asked_once() -> None:
    assert unrequested(["/a", "/b", "/c"], {"/a": View(None)}, ["/c"]) == ["/b"]


def test_the_lock_goes_last(tmp_path: Path) -> None:
    work = work_in(tmp_path)
    with locked(work, "out"):
        write(Path(work.files) / "a")
        remove(work)
        assert not os.path.exists(work.folder)
    assert LATEST == ("latest", "latest_universal")
