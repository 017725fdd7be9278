"""What is left of a conversion that ends early, and how the same one goes on."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from common import assert_same, hf_tensors, make_hf, plan_of, step_of

from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError
from neox_bridge.execution import disk, journal
from neox_bridge.execution.execute import execute
from neox_bridge.planning.plan import Plan

SHAPE = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 300}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("unfinished") / "hf", torch.float16, **SHAPE)


def stopped(plan: Plan, target: Path, error: BaseException, after: int = 3) -> BaseException:
    """The error that an execution ends with, when that error comes after some finished files."""
    real, count = disk.append, []

    def append(*args: Any) -> None:
        real(*args)
        count.append(1)
        if len(count) == after:
            raise error

    with pytest.MonkeyPatch.context() as patch, pytest.raises(BaseException) as caught:
        patch.setattr(disk, "append", append)
        execute(plan, str(target), workers=1)
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        OSError(code, os.strerror(code))
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
    ]
    + [KeyboardInterrupt()],
    ids=lambda error: str(error) or "interrupted",
)
def test_finished_files_are_used_again(error: BaseException, source: Path, tmp_path: Path) -> None:
    plan = plan_of(source, tmp_path / "out")
    said = stopped(plan, tmp_path / "out", error)
    assert isinstance(said, BridgeError | KeyboardInterrupt)
    assert re.search(r"[34] finished files are kept in", str(said)), "those of one thread's turn"
    assert "Run the same command again" in str(said)
    assert [path.name for path in tmp_path.iterdir()] == [".out.neox-bridge"]
    assert execute(plan, str(tmp_path / "out")).kept > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    execute(plan_of(tmp_path / "out", tmp_path / "back"), str(tmp_path / "back"))
    assert_same(hf_tensors(source), hf_tensors(tmp_path / "back"))


def test_a_finished_file_that_changed_is_made_anew(source: Path, tmp_path: Path) -> None:
    plan = plan_of(source, tmp_path / "out")
    stopped(plan, tmp_path / "out", KeyboardInterrupt())
    work = tmp_path / ".out.neox-bridge"
    lines = (work / "journal").read_text().splitlines()
    first, second, *others = (json.loads(line)["path"] for line in lines[1:])
    assert others
    data = bytearray((work / "files" / first).read_bytes())
    data[-1] ^= 1
    (work / "files" / first).write_bytes(data)
    (work / "files" / second).unlink()
    sizes = {file.path: file.size for file in plan.files}
    assert execute(plan, str(tmp_path / "out")).kept == sum(sizes[other] for other in others)
    execute(plan_of(source, tmp_path / "again"), str(tmp_path / "again"))
    for path in step_of(tmp_path / "again").glob("*.pt"):
        assert path.read_bytes() == (step_of(tmp_path / "out") / path.name).read_bytes()


@pytest.mark.parametrize("what", ["options", "source", "journal"])
def test_another_conversion_starts_anew(what: str, source: Path, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", torch.float16, **SHAPE)
    stopped(plan_of(hf, tmp_path / "out"), tmp_path / "out", KeyboardInterrupt())
    if what == "source":
        os.utime(hf / "model.safetensors", ns=(1, 1))
    if what == "journal":
        path = tmp_path / ".out.neox-bridge" / "journal"
        path.write_bytes(b"\xff" + path.read_bytes())
    options = {"tp": 2} if what == "options" else {}
    assert not execute(plan_of(hf, tmp_path / "out", **options), str(tmp_path / "out")).kept


def test_a_journal_can_t_name_files_elsewhere(source: Path, tmp_path: Path) -> None:
    """Whoever writes into the folder beside the target can't have other files read or removed."""
    plan = plan_of(source, tmp_path / "out")
    stopped(plan, tmp_path / "out", KeyboardInterrupt())
    other = tmp_path / "other"
    other.write_text("mine")
    path = tmp_path / ".out.neox-bridge" / "journal"
    digest = journal.hash_file(str(other), "xxh3_128")
    entry = {"path": "../../other", "size": 4, "hash": digest}
    path.write_text(path.read_text() + json.dumps(entry) + "\n")
    execute(plan, str(tmp_path / "out"))
    assert other.read_text() == "mine"
    record = json.loads((step_of(tmp_path / "out") / "neox_bridge.json").read_text())
    assert not [name for name in record["written"]["files"] if "other" in name]


def test_two_runs_into_one_target(source: Path, tmp_path: Path) -> None:
    """The second is refused, and says who has it; a killed one holds nothing."""
    code = (
        "import sys, time\n"
        "from neox_bridge.execution.work import locked, work_of\n"
        "with locked(work_of(sys.argv[1]), 'out'):\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(100)\n"
    )
    target = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout
        assert holder.stdout.readline() == "locked\n"
        plan = plan_of(source, target)
        with pytest.raises(BridgeError, match=rf"process {holder.pid} on .* is writing"):
            execute(plan, str(target))
        assert (tmp_path / ".out.neox-bridge" / "lock").exists()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    execute(plan, str(target))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_cleanly(number: signal.Signals, tmp_path: Path) -> None:
    """Exit code 130, and a line that says what is on the disk."""
    runner = CliRunner()
    hf = tmp_path / "hf"
    done = runner.invoke(app, ["toy", "pythia-160m", str(hf), "--as", "hf", "-q"])
    assert not done.exit_code
    process = subprocess.Popen(
        [sys.executable, "-m", "neox_bridge", "convert", hf, tmp_path / "out", "--tp", "2"],
        stderr=subprocess.PIPE,
        text=True,
    )
    journal_ = tmp_path / ".out.neox-bridge" / "journal"
    limit = time.monotonic() + 60
    while time.monotonic() < limit and not (
        journal_.exists() and len(journal_.read_text().splitlines()) > 1
    ):
        time.sleep(0.002)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: " in said
    assert not (tmp_path / "out").exists()
    assert "kept in" in said
    again = runner.invoke(app, ["convert", str(hf), str(tmp_path / "out"), "--tp", "2", "--json"])
    assert json.loads(again.stdout)["result"]["kept"] > 0


def test_long_names(source: Path, tmp_path: Path) -> None:
    target = tmp_path / ("n" * 250)
    execute(plan_of(source, target), str(target))
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def anonymous(pid: int) -> int:
    """Bytes of a process's memory that aren't maps of files; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_eight_at_once(source: Path, tmp_path: Path) -> None:
    """As separate processes on few cores: each right, and beside it nothing."""
    command = [sys.executable, "-m", "neox_bridge", "convert", source]
    runs = [
        subprocess.Popen([*command, tmp_path / f"out{i}", "--tp", str((1, 2, 4)[i % 3]), "-q"])
        for i in range(8)
    ]
    most = 0
    while any(run.poll() is None for run in runs):
        most = max(most, *(anonymous(run.pid) for run in runs))
        time.sleep(0.005)
    assert [run.wait() for run in runs] == [0] * 8
    assert 0 < most < 256 << 20
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"out{i}" for i in range(8)]
    for i in (0, 1, 3):
        back = tmp_path / f"back{i}"
        execute(plan_of(tmp_path / f"out{i}", back), str(back))
        assert_same(hf_tensors(source), hf_tensors(back))


# --- into a run that is there ------------------------------------------------------------------


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Path:
    """A run that has step 7, and a yml of its own."""
    root = tmp_path / "run"
    execute(plan_of(source, root), str(root))
    (root / "global_step0").rename(root / "global_step7")
    (root / "latest").write_text("global_step7")
    (root / "finetune.yml").write_text("mine: true\n")
    return root


def test_a_step_is_added_to_a_run(source: Path, run: Path) -> None:
    seven = {path.name: path.read_bytes() for path in (run / "global_step7").glob("*.pt")}
    execute(plan_of(source, run, tp=2), str(run))
    assert (run / "latest").read_text() == "global_step0"
    assert {path.name: path.read_bytes() for path in (run / "global_step7").glob("*.pt")} == seven
    assert (run / "finetune.yml").read_text() == "mine: true\n"
    assert len(list((run / "global_step0").glob("mp_rank*"))) == 2


def test_a_step_that_is_there_is_replaced_if_told(source: Path, run: Path) -> None:
    execute(plan_of(source, run), str(run))
    with pytest.raises(BridgeError, match=r"global_step0 exists"):
        execute(plan_of(source, run, tp=2), str(run))
    execute(plan_of(source, run, tp=2), str(run), overwrite=True)
    assert len(list((run / "global_step0").glob("mp_rank*"))) == 2
    assert (run / "global_step7").is_dir(), "the others stay, whatever is told"


def test_a_step_isn_t_replaced_by_itself(run: Path) -> None:
    plan = plan_of(run, run, to="neox", tp=2)
    with pytest.raises(BridgeError, match="contains the source"):
        execute(plan, str(run), overwrite=True)


# --- hashes ------------------------------------------------------------------------------------


def ask(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    return done.exit_code, done.stdout


@pytest.mark.parametrize("kind", ["hf", "neox"])
@pytest.mark.parametrize("name", ["xxh3_128", "sha256"])
def test_every_flipped_byte_is_found(kind: str, name: str, tmp_path: Path, source: Path) -> None:
    from neox_bridge.verification.sealed import check_seal, find_record

    target = tmp_path / "out"
    neox = tmp_path / "neox"
    execute(plan_of(source, neox, tp=2), str(neox))
    plan = plan_of(neox, target) if kind == "hf" else plan_of(source, target, tp=2)
    execute(plan, str(target), hash_name=name)  # type: ignore[arg-type]
    record = find_record(str(target))
    assert check_seal(record).changes == ()
    for path in sorted(target.rglob("*")):
        if not path.is_file():
            continue
        data = path.read_bytes()
        # all of the record, whose every byte means something; elsewhere a hash sees all or none
        places = range(len(data)) if path.name == "neox_bridge.json" else (0, len(data) // 2, -1)
        step = 1 if name == "xxh3_128" else 7
        for at in places[::step] if path.name == "neox_bridge.json" else places:
            changed = bytearray(data)
            changed[at] ^= 1 << (at % 8)
            path.write_bytes(changed)
            try:
                found = check_seal(record)
            except BridgeError:
                continue
            assert found.changes, (path, at)
            in_root = kind == "neox" and "global_step" not in str(path.relative_to(target))
            assert found.holds == in_root, (path, at)
        path.write_bytes(data)
    assert check_seal(record).holds


def test_every_byte_of_every_file(source: Path, tmp_path: Path) -> None:
    """One flipped bit of each, in place, seen by the comparison that ``verify DST`` makes."""
    from neox_bridge.verification.sealed import _changed

    execute(plan_of(source, tmp_path / "out"), str(tmp_path / "out"))
    step = step_of(tmp_path / "out")
    files = json.loads((step / "neox_bridge.json").read_text())["written"]["files"]
    tried = 0
    for name, (size, digest) in files.items():
        path = str(step / name)
        fd = os.open(path, os.O_RDWR)
        data = os.pread(fd, size, 0)
        for at in range(0, size, 1 if size < 40_000 else 7):
            os.pwrite(fd, bytes([data[at] ^ 1 << at % 8]), at)
            assert _changed(path, size, digest, "xxh3_128") == "changed", (name, at)
            os.pwrite(fd, data[at : at + 1], at)
            tried += 1
        os.close(fd)
        assert _changed(path, size, digest, "xxh3_128") is None
    assert tried > 60_000


def test_a_folder_may_be_moved_and_renamed(source: Path, tmp_path: Path) -> None:
    execute(plan_of(source, tmp_path / "out"), str(tmp_path / "out"))
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    code, text = ask(tmp_path / "elsewhere")
    assert code == 0
    assert "unchanged since it was written" in text
    with (tmp_path / "elsewhere" / "finetune.yml").open("a") as file:
        file.write("data_path: mine\n")
    code, text = ask(tmp_path / "elsewhere")
    assert code == 0
    assert "edited: ../finetune.yml (this file is meant to be edited)" in text
    for name in ("finetune.yml", "latest"):
        file = tmp_path / "elsewhere" / name
        written = file.read_bytes()
        file.unlink()
        code, text = ask(tmp_path / "elsewhere")
        assert code == 3
        assert f"missing: ../{name}\n" in text
        file.write_bytes(written)
    next(step_of(tmp_path / "elsewhere").glob("layer_02*")).unlink()
    code, text = ask(tmp_path / "elsewhere")
    assert code == 3
    assert "missing: layer_02-model_00-model_states.pt" in text
    assert "CHANGED since it was written" in text


def test_what_has_no_hashes(source: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["verify", str(source)])
    assert done.exit_code == 1
    assert "no neox_bridge.json" in done.stderr
    execute(plan_of(source, tmp_path / "out"), str(tmp_path / "out"), hash_name=None)
    code, text = ask(tmp_path / "out")
    assert code == 0
    assert "only the size was checked" in text


def test_hashes_are_those_of_the_usual_tools(source: Path, tmp_path: Path) -> None:
    from hashlib import sha256

    execute(plan_of(source, tmp_path / "out"), str(tmp_path / "out"), hash_name="sha256")
    step = step_of(tmp_path / "out")
    files = json.loads((step / "neox_bridge.json").read_text())["written"]["files"]
    assert len(files) > 5
    for path, (size, digest) in files.items():
        data = (step / path).read_bytes()
        assert (len(data), sha256(data).hexdigest()) == (size, digest)
