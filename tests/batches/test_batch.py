"""A batch: what it finds, skips, mends, tries again; and how it outlives being killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batch_calls import die, die_once
from common import convert, fixture, make_hf, step_of
from file_trees import same_tree

import neox_bridge
from neox_bridge.batches import run as running
from neox_bridge.batches.items import Item, Source, find_items
from neox_bridge.batches.row import BatchRow
from neox_bridge.batches.run import Batch, run_batch
from neox_bridge.errors import BridgeError
from neox_bridge.execution.executors import Processes
from neox_bridge.planning.options import Options
from neox_bridge.verification.step_choice import chosen

STEPS = (0, 1000, 2000)


@pytest.fixture(scope="module")
def pool() -> Any:
    found = Processes(2)
    yield found
    found.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batch") / "run"
    for step in STEPS:
        make_hf(folder / f"step{step}", torch.float16, seed=step)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """Three steps as their users have them: some files, changed by nobody."""
    return Path(shutil.copytree(made, tmp_path / "run", copy_function=shutil.copy2))


def spawn(*args: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "neox_bridge", "batch", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def rows_of(*args: object) -> dict[str, dict[str, Any]]:
    """The rows by name, of a batch whatever became of it."""
    done = spawn(*args, "--json")
    assert "Traceback" not in done.stderr, done.stderr
    return {row["name"]: row for row in json.loads(done.stdout)["rows"]}


def statuses(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: row["status"] for name, row in rows.items()}


# --- which -----------------------------------------------------------------------------------


def test_steps_are_chosen() -> None:
    there = [0, 1, 2, 512, 1000, 2000, 3000, 143000]
    assert chosen("all", there) is None
    assert chosen("0,1000", there) == {0, 1000}
    assert chosen("1-2000", there) == {1, 2, 512, 1000, 2000}
    assert chosen("0-143000:1000, last", there) == {0, 1000, 2000, 3000, 143000}


@pytest.mark.parametrize("words", ["7", "1000-", "x", "1,,2", "-5"])
def test_steps_that_are_not_there_or_not_understood(words: str) -> None:
    with pytest.raises(BridgeError, match="steps: "):
        chosen(words, [0, 1000])


def test_a_root_gives_each_of_its_steps(tmp_path: Path, made: Path) -> None:
    root = tmp_path / "neox"
    for number in (5, 10):
        convert(made / "step0", root, iteration=number)
    items, _ = find_items([str(root)])
    assert [item.name for item in items] == ["step5", "step10"]


def test_several_runs_have_folders_of_their_own(run: Path, tmp_path: Path) -> None:
    second = shutil.copytree(run, tmp_path / "other")
    items, _ = find_items([str(run), str(second)], "0")
    assert sorted(item.name for item in items) == ["other/step0", "run/step0"]


def test_two_of_one_name_are_an_error(run: Path, tmp_path: Path) -> None:
    second = shutil.copytree(run, tmp_path / "elsewhere" / "run")
    with pytest.raises(BridgeError, match="this name"):
        find_items([str(run), str(second)])


def test_nothing_to_do(tmp_path: Path) -> None:
    done = spawn(tmp_path, tmp_path / "out")
    assert done.returncode == 1
    assert "contains no checkpoint" in done.stderr


# --- converts --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"tp": 2, "dtype": "float32"}])
def test_each_is_what_convert_makes(
    run: Path, tmp_path: Path, pool: Processes, options: dict[str, Any]
) -> None:
    items, _ = find_items([str(run)])
    batch = Batch(str(tmp_path / "out"), Options(**options))
    rows = list(run_batch(items, batch, pool))
    assert sorted((row.name, row.status, row.verified) for row in rows) == [
        (f"step{step}", "done", True) for step in STEPS
    ]
    for step in STEPS:
        own = tmp_path / "out" / f"step{step}"
        # the yml names its target, so both are made at the same place
        shutil.move(own, tmp_path / "aside")
        convert(run / f"step{step}", own, iteration=step, **options)
        same_tree(tmp_path / "aside", own)
        shutil.rmtree(tmp_path / "aside")


def test_genuine_checkpoints_of_several_layouts(tmp_path: Path, pool: Processes) -> None:
    names = ("pythia_fp32_pp1_tp2", "pythia_fp32_pp0_tp2")
    items = [Item(name, "", None, Source(str(fixture(name)))) for name in names]
    rows = list(run_batch(items, Batch(str(tmp_path / "out"), Options()), pool))
    assert [row.error for row in rows] == ["", ""]
    for name in names:
        neox_bridge.convert(str(fixture(name)), str(tmp_path / "one" / name))
        same_tree(tmp_path / "out" / name, tmp_path / "one" / name)


def test_a_failure_stops_no_other(run: Path, tmp_path: Path) -> None:
    weights = run / "step1000" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    done = spawn(run, tmp_path / "out", "--retries", 0)
    assert done.returncode == 1
    assert "error: step1000: " in done.stderr
    assert "model.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
    assert "3 checkpoints: 2 done, 1 failed" in done.stdout
    assert sorted(os.listdir(tmp_path / "out")) == ["step0", "step2000"]


def test_what_fails_is_tried_again(
    run: Path, tmp_path: Path, pool: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = running.execute, []

    def fails_twice(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) < 3:
            raise OSError(5, "Input/output error")
        return real(*args, **kwargs)

    monkeypatch.setattr(running, "execute", fails_twice)
    monkeypatch.setattr(running, "_PAUSE_SECONDS", 0.01)
    items, _ = find_items([str(run)], "0")
    events: list[str] = []
    batch = Batch(str(tmp_path / "out"), Options(), tell=lambda event: events.append(event.kind))
    (row,) = run_batch(items, batch, pool)
    assert (row.status, row.tries, row.error) == ("done", 3, "")
    assert events.count("retry") == 2


def test_a_refusal_is_not_tried_again(run: Path, tmp_path: Path, pool: Processes) -> None:
    items, _ = find_items([str(run)], "0")
    (row,) = run_batch(items, Batch(str(tmp_path / "out"), Options(tp=5)), pool)
    assert (row.status, row.tries) == ("failed", 1)
    assert "5" in row.error


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_target_that_contains_its_source_is_refused_at_once(
    overwrite: bool, run: Path, pool: Processes
) -> None:
    items, _ = find_items([str(run)], "0")
    (row,) = run_batch(items, Batch(str(run), Options(), overwrite=overwrite), pool)
    assert (row.status, row.tries) == ("failed", 1)
    assert "step0 contains the source" in row.error
    assert row.error.endswith("Choose another target.")  # --overwrite would be refused


def test_what_transformers_of_a_version_does_not_load_is_refused(
    made: Path, tmp_path: Path
) -> None:
    llama = make_hf(tmp_path / "run" / "step1", family="llama", rope_theta=500000.0)
    done = spawn(llama.parent, tmp_path / "out", "--to", "hf", "--for", "transformers@4.30")
    assert done.returncode == 1
    assert "4.30" in done.stderr
    assert not (tmp_path / "out" / "step1").exists()


def test_a_fault_of_this_program_stops_no_other(
    run: Path, tmp_path: Path, pool: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = running.execute

    def breaks(plan: Any, target: str, **kwargs: Any) -> Any:
        return real(plan, target, **kwargs) if target.endswith("0") else 1 / 0

    monkeypatch.setattr(running, "execute", breaks)
    (run / "step1000").rename(run / "step1001")
    items, _ = find_items([str(run)])
    rows = {
        row.name: row for row in run_batch(items, Batch(str(tmp_path / "out"), Options()), pool)
    }
    assert {name: row.status for name, row in rows.items()} == {
        "step0": "done",
        "step1001": "failed",
        "step2000": "done",
    }
    assert "ZeroDivisionError" in rows["step1001"].error


def test_norms_are_those_of_the_tensors(run: Path, tmp_path: Path) -> None:
    rows = rows_of(run, tmp_path / "out", "--to", "hf", "--steps", "1000", "--norms")
    from safetensors.torch import load_file

    norms = rows["step1000"]["norms"]
    tensors = load_file(run / "step1000" / "model.safetensors")
    assert set(norms) == set(tensors)
    for name, norm in norms.items():
        assert norm == pytest.approx(float(tensors[name].double().norm()), rel=1e-6)


# --- is safe to repeat -----------------------------------------------------------------------


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_what_is_done_is_skipped(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert set(statuses(rows_of(run, out)).values()) == {"done"}
    before = times(out)
    assert set(statuses(rows_of(run, out)).values()) == {"skipped"}
    assert times(out) == before


def test_folders_may_be_moved_and_renamed(run: Path, tmp_path: Path) -> None:
    rows_of(run, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    run.rename(tmp_path / "source")
    rows = rows_of(tmp_path / "source", tmp_path / "elsewhere")
    assert set(statuses(rows).values()) == {"skipped"}
    assert "written" in json.loads(
        next((tmp_path / "elsewhere").rglob("neox_bridge.json")).read_text()
    )


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, os.unlink, lambda path: os.truncate(path, 100)])
def test_what_is_not_whole_is_written_anew(
    run: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    out = tmp_path / "out"
    rows_of(run, out)
    good = (out / "step0" / "global_step0" / "layer_02-model_00-model_states.pt").read_bytes()
    damage(out / "step0" / "global_step0" / "layer_02-model_00-model_states.pt")
    rows = rows_of(run, out)
    assert statuses(rows) == {"step0": "done", "step1000": "skipped", "step2000": "skipped"}
    assert [f["code"] for f in rows["step0"]["findings"]].count("not-whole") == 1
    assert (
        out / "step0" / "global_step0" / "layer_02-model_00-model_states.pt"
    ).read_bytes() == good
    assert (out / "step0.changed").is_dir()  # nothing that somebody wrote is lost


def test_a_flipped_bit_with_its_old_time_is_found_by_recheck(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows_of(run, out)
    path = out / "step0" / "global_step0" / "layer_02-model_00-model_states.pt"
    stamp = path.stat()
    flip(path)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert statuses(rows_of(run, out))["step0"] == "skipped"
    assert statuses(rows_of(run, out, "--recheck"))["step0"] == "done"


def test_other_options_or_sources_are_no_repetition(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows_of(run, out)
    before = times(out)
    done = spawn(run, out, "--tp", 2)
    assert done.returncode == 1
    assert "converted with other options" in done.stderr
    make_hf(run / "step0", torch.float16, seed=77)
    assert statuses(rows_of(run, out))["step0"] == "failed"
    assert times(out) == before
    assert statuses(rows_of(run, out, "--overwrite"))["step0"] == "done"


def test_somebody_elses_folder_is_not_touched(run: Path, tmp_path: Path) -> None:
    kept = tmp_path / "out" / "step0" / "notes.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    rows = rows_of(run, tmp_path / "out")
    assert statuses(rows) == {"step0": "failed", "step1000": "done", "step2000": "done"}
    assert kept.read_text() == "mine"


def test_a_dry_run_writes_nothing(run: Path, tmp_path: Path) -> None:
    rows_of(run, tmp_path / "out", "--steps", "0")
    before = times(tmp_path)
    done = spawn(run, tmp_path / "out", "--dry-run", "--json")
    told = json.loads(done.stdout)
    assert {row["name"]: row["status"] for row in told["rows"]} == {
        "step0": "skipped",
        "step1000": "planned",
        "step2000": "planned",
    }
    assert told["bytes"] == sum(r["size"] for r in told["rows"] if r["status"] == "planned") > 0
    assert told["seconds"] > 0
    assert times(tmp_path) == before


def test_a_page_of_a_batch(run: Path, tmp_path: Path) -> None:
    os.truncate(run / "step1000" / "model.safetensors", 100)
    done = spawn(run, tmp_path / "out", "--json", "--norms", "--retries", 0)
    (tmp_path / "batch.json").write_text(done.stdout)
    command = [sys.executable, "-m", "neox_bridge", "report", "batch.json"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 3, made.stderr
    page = (tmp_path / "report.html").read_text()
    assert "1 of 3 checkpoints failed" in page
    assert "L2 norm of each kind of weight" in page
    assert all(f">step{step}<" in page for step in STEPS)


# --- is told by a file -----------------------------------------------------------------------


def test_a_yml_says_all(run: Path, tmp_path: Path) -> None:
    told = (
        f"sources: [{run}]\ntarget: {tmp_path / 'out'}\nsteps: [0, 2000]\ndtype: float32\ntp: 4\n"
    )
    (tmp_path / "batch.yml").write_text(told)
    rows = rows_of(tmp_path / "batch.yml", "--tp", 2)
    assert statuses(rows) == {"step0": "done", "step2000": "done"}
    root = tmp_path / "out" / "step2000"
    assert len(list(step_of(root).glob("mp_rank_*"))) == 2  # the command line goes before
    weights = torch.load(step_of(root) / "layer_02-model_00-model_states.pt", weights_only=True)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("target: out\n", "sources"),
        ("sources: [a]\n", "target"),
        ("sources: [a]\ntarget: out\nspeed: 9\n", "speed"),
        ("sources: [a]\ntarget: out\noverwrite: maybe\n", "overwrite"),
    ],
)
def test_a_yml_that_is_wrong(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "batch.yml").write_text(text)
    done = spawn(tmp_path / "batch.yml")
    assert done.returncode == 1
    assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_a_log_of_json_lines(run: Path, tmp_path: Path) -> None:
    done = spawn(run, tmp_path / "out", "--log", tmp_path / "log.jsonl")
    assert done.returncode == 0
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sorted(e["event"] for e in events) == ["begun"] * 3 + ["ended"] * 3
    assert {e["name"]: e["status"] for e in events if e["event"] == "ended"} == {
        f"step{step}": "done" for step in STEPS
    }
    ended = [line for line in done.stderr.splitlines() if " kB in " in line]
    assert sorted(line.split(":")[0] for line in ended) == [f"step{step}" for step in STEPS]


# --- outlives --------------------------------------------------------------------------------


def test_a_process_that_is_killed_is_replaced(tmp_path: Path) -> None:
    pool = Processes(2)
    calls = [pool.submit(die_once, str(tmp_path / "marker")) for _ in range(8)]
    assert [call.result(timeout=60) for call in calls] == ["alive"] * 8
    with pytest.raises(BridgeError, match="killed 3 times"):
        pool.submit(die).result(timeout=60)
    assert pool.submit(die_once, str(tmp_path / "marker")).result(timeout=60) == "alive"
    pool.close()


def begin(*args: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "neox_bridge", "batch", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children(pid: int) -> list[int]:
    """All processes below one."""
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        if parent == pid:
            found += [int(folder.name), *children(int(folder.name))]
    return found


def wait_for(what: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)
    return found


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps that take long enough to be caught in the middle."""
    folder = tmp_path_factory.mktemp("batch") / "large"
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 2}
    make_hf(folder / "step0", torch.float16, vocab_size=1024, **sizes)
    for step in range(1, 6):
        shutil.copytree(folder / "step0", folder / f"step{step}", copy_function=os.link)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_it_goes_on_after_it_was_stopped(large: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    process = begin(large, out, "--max-workers", 2, "--dtype", "float32")
    wait_for(lambda: list(out.glob("step*")))
    below = children(process.pid)
    assert below
    process.send_signal(number)
    stderr = process.communicate(timeout=60)[1]
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "Run the same command again" in stderr
    finished = {path.name for path in out.glob("step*")}
    assert finished < {f"step{step}" for step in range(6)}, "it was stopped too late"
    rows = rows_of(large, out, "--max-workers", 2, "--dtype", "float32")
    assert {n for n, status in statuses(rows).items() if status == "skipped"} >= finished
    assert set(statuses(rows).values()) <= {"skipped", "done"}
    assert sorted(os.listdir(out)) == [f"step{step}" for step in range(6)]
    convert(large / "step3", tmp_path / "one", dtype="float32", iteration=3)
    paths = ("pythia.yml", "neox_bridge.json", "finetune.yml")
    same_tree(out / "step3", tmp_path / "one", but=(*paths, ".yml"))


def test_what_was_killed_after_it_was_placed_leaves_nothing(run: Path, tmp_path: Path) -> None:
    rows_of(run, tmp_path / "out", "--steps", "0")
    left = tmp_path / "out" / ".step0.neox-bridge"
    left.mkdir()
    (left / "lock").touch()
    assert statuses(rows_of(run, tmp_path / "out", "--steps", "0")) == {"step0": "skipped"}
    assert not left.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_worker_that_is_killed_costs_nothing(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = begin(large, out, "--max-workers", 2, "--dtype", "float32", "--json")
    wait_for(lambda: list(out.glob("step*")))

    def workers() -> list[int]:
        return [pid for pid in children(process.pid) if not children(pid)]

    os.kill(wait_for(workers)[-1], signal.SIGKILL)
    told = json.loads(process.communicate(timeout=60)[0])
    assert {row["status"] for row in told["rows"]} == {"done"}
    assert sorted(os.listdir(out)) == [f"step{step}" for step in range(6)]
    assert not list(out.rglob("*attempts*"))


def test_a_run_is_watched(made: Path, tmp_path: Path) -> None:
    """Steps are converted when `latest` has reached them, not while they are written."""
    root, out = tmp_path / "run", tmp_path / "out"
    convert(made / "step0", root, iteration=1)
    process = begin(root, out, "--watch", "--interval", 0.1)
    wait_for(lambda: (out / "step1").exists())
    (root / "latest").write_text("global_step1")
    shutil.copytree(root / "global_step1", root / "global_step2")
    time.sleep(0.5)
    assert not (out / "step2").exists()
    (root / "latest").write_text("global_step2")
    wait_for(lambda: (out / "step2").exists())
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "2 checkpoints: 2 done" in stdout


def test_a_row_is_plain_data() -> None:
    row = BatchRow("step0", "run", 0, "done", "a", "b")
    assert json.loads(json.dumps(row.to_json()))["status"] == "done"


def test_a_library_that_lacks_is_named_once(run: Path, tmp_path: Path) -> None:
    (tmp_path / "obstore").mkdir()
    (tmp_path / "obstore" / "__init__.py").write_text("raise ImportError('not here')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = spawn(run, "s3://bucket/out", env=environment)
    assert done.returncode == 1
    assert done.stderr.count("obstore is missing") == done.stderr.count("[remote]") == 1


# --- the files beside the models


def test_files_that_are_not_copied_are_listed(run: Path, tmp_path: Path) -> None:
    for step in ("step0", "step1000"):
        (run / step / "README.md").write_text("A card.\n")
        (run / step / "training.py").write_text("print()\n")
        (run / step / "plot.png").write_bytes(b"\x89PNG")
    expected = [
        {"name": "plot.png", "reason": "not on the list"},
        {"name": "training.py", "reason": "code"},
    ]
    for more in (["--dry-run"], [], []):  # planned, done, skipped
        row = rows_of(run, tmp_path / "out", "--steps", "0,1000", *more)["step0"]
        assert row["carried"] == ["README.md", "generation_config.json"]
        assert row["not_carried"] == expected
    done = spawn(run, tmp_path / "out", "--steps", "0,1000")
    note = "2 files of the source not copied: plot.png, training.py (code)"
    assert done.stderr.count(f"note: step0 and 1 more: {note}\n") == 1, done.stderr


@pytest.mark.parametrize("name", ["README.md", "config.json"])
def test_a_changed_small_file_of_the_source_is_converted_again(
    name: str, run: Path, tmp_path: Path
) -> None:
    path = run / "step0" / name
    if name == "README.md":
        path.write_text("A card.\n")
    told = (run, tmp_path / "out", "--steps", "0,1000", "--to", "hf")
    assert set(statuses(rows_of(*told)).values()) == {"done"}
    path.write_text(path.read_text())  # touched, with the same content
    assert set(statuses(rows_of(*told)).values()) == {"skipped"}
    path.write_text(path.read_text().replace("A card", "Another card").replace("1e-05", "2e-05"))
    assert statuses(rows_of(*told, "--dry-run")) == {"step0": "planned", "step1000": "skipped"}
    rows = rows_of(*told)
    assert statuses(rows) == {"step0": "done", "step1000": "skipped"}
    (finding,) = [one for one in rows["step0"]["findings"] if one["code"] == "not-whole"]
    target = tmp_path / "out" / "step0"
    assert finding["message"].startswith(
        f"{name} of the source changed after {target} was written: converted again; kept as"
    )
    assert ("Another card" if name == "README.md" else "2e-05") in (target / name).read_text()
    assert set(statuses(rows_of(*told)).values()) == {"skipped"}
