"""Raw GPT-NeoX branches on the Hub: what is fetched of them, and how it ends where that fails.

Commands are processes of their own, since huggingface_hub takes its settings when it is imported.
"""

import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from hollow_branch import STEP, Shape, hollow_branch, weight_bytes
from hub_stub import READ, WRITE, Stub, serving
from published import PUBLISHED
from tiny import convert

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError, Unreachable
from neox_bridge.frameworks import suites
from neox_bridge.stores import fetched, objects, paths, ranges, retry

pytestmark = pytest.mark.slow

RAW = "EleutherAI/neox-ckpt-pythia-160m"
TWIN = "EleutherAI/pythia-160m"
FLAT = PUBLISHED / "v1_dp4_intervals" / "flat"
MEDIUM = Shape(layers=4, hidden=512, heads=8, rows=8192, tp=1, dp=4)
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {f"w{n}": n for n in range(200)}, "unk_token": "w0"},
}


@pytest.fixture
def hub() -> Iterator[Stub]:
    """A Hub with a raw branch at step 8."""
    with serving(Stub()) as stub:
        stub.put_files(RAW, "step8", FLAT)
        yield stub


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A branch of 42 MB of weights with sparse files, so that headers are a small part of it."""
    return hollow_branch(MEDIUM, tmp_path_factory.mktemp("medium") / "branch")


class Commands:
    """neox-bridge in a folder, with a Hub and a home of its own."""

    def __init__(self, hub: Stub, folder: Path) -> None:
        self.hub, self.folder = hub, folder / "cwd"
        self.folder.mkdir()
        self.home = folder / "home"
        own = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HOME": str(folder)}
        self.environment = {**os.environ, **own, "HF_HOME": str(self.home)}
        for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "XDG_CACHE_HOME"):
            self.environment.pop(name, None)

    def start(self, *words: object, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "neox_bridge", *map(str, words)],
            cwd=self.folder,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: object, code: int = 0, **environment: str) -> tuple[str, str]:
        self.hub.seen.clear()
        self.hub.served.clear()
        process = self.start(*words, **environment)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, (words, out, err)
        assert "Traceback" not in err
        return out, err

    def cached(self, repo: str, folder: Path, revision: str = "step8") -> Path:
        """What huggingface_hub leaves of a revision in its cache: links to blobs."""
        commit = self.hub.repos[repo].branches[revision]
        root = self.home / "hub" / f"models--{repo.replace('/', '--')}"
        snapshot, blobs = root / "snapshots" / commit, root / "blobs"
        for place in (root / "refs", snapshot, blobs):
            place.mkdir(parents=True, exist_ok=True)
        (root / "refs" / revision).write_text(commit)
        for path in folder.iterdir():
            shutil.copy(path, blobs / path.name)
            (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
        return snapshot


@pytest.fixture
def run(hub: Stub, tmp_path: Path) -> Commands:
    return Commands(hub, tmp_path)


def optimizer_requests(hub: Stub) -> list[str]:
    return [request for request in hub.seen if "optim_states" in request]


# --- what is fetched


def test_inspect_reads_headers(hub: Stub, run: Commands, medium: Path) -> None:
    hub.put_files(RAW, f"step{STEP}", medium)
    out, _ = run("inspect", f"{RAW}@step{STEP}", "--json")
    facts = json.loads(out)
    assert (facts["kind"], facts["revision"]) == ("neox", f"{RAW}@step{STEP}")
    assert facts["path"] == f"hf://{RAW}@step{STEP}"
    files = len(list(medium.glob("layer_*.pt")))
    assert hub.bytes_of_requests("GET /lfs/") < files * (64 << 10) + (200 << 10)
    assert hub.bytes_of_requests() < 0.02 * weight_bytes(medium)
    assert len(set(optimizer_requests(hub))) <= 1, "one file, to say what kind the states are"
    assert not list(run.home.rglob("*.pt")), "nothing lands in the cache"
    by_option, _ = run("inspect", RAW, "--revision", f"step{STEP}", "--json")
    assert json.loads(by_option) == facts


def test_a_conversion_costs_the_weights(hub: Stub, run: Commands, medium: Path) -> None:
    """Fetched once, though the result is compared with its source, and no optimizer at all."""
    hub.put_files(RAW, f"step{STEP}", medium)
    out, _ = run("convert", f"{RAW}@step{STEP}", "hf")
    assert "verified bit by bit" in out
    assert optimizer_requests(hub) == []
    needed = weight_bytes(medium)
    assert needed <= hub.bytes_of_requests() <= 1.01 * needed
    assert os.listdir(run.folder) == ["hf"], "what was fetched is gone"
    run("batch", RAW, "many", "--steps", "0-143000:1000")
    assert optimizer_requests(hub) == []
    assert hub.bytes_of_requests() <= 1.03 * needed, "each process reads the headers"
    assert os.listdir(run.folder / "many") == [f"step{STEP}"]


def test_the_optimizer_is_fetched_once_where_it_is_needed(
    hub: Stub, run: Commands, medium: Path
) -> None:
    hub.put_files(RAW, f"step{STEP}", medium)
    run("export-optimizer", f"{RAW}@step{STEP}", "states")
    needed = sum(path.stat().st_size for path in medium.glob("*optim_states.pt"))
    headers = len(list(medium.iterdir())) * (96 << 10)
    assert needed <= hub.bytes_of_requests("GET /lfs/") <= 1.01 * needed + headers


@pytest.mark.parametrize("command", [["doctor"], ["inspect", "--stats"], ["convert", "--dry-run"]])
def test_commands_that_need_no_states(command: Sequence[str], hub: Stub, run: Commands) -> None:
    words = [command[0], f"{RAW}@step8", *(["out"] if command[0] == "convert" else [])]
    run(*words, *command[1:], code=4 if command[0] == "doctor" else 0)
    assert len({request.split("?")[0] for request in optimizer_requests(hub)}) <= 1


def test_the_result_is_that_of_the_same_files_here(hub: Stub, run: Commands) -> None:
    run("convert", f"{RAW}@step8", "there")
    convert(FLAT, run.folder / "here", to="hf")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        there, here = (run.folder / place / name for place in ("there", "here"))
        assert there.read_bytes() == here.read_bytes()
    record = json.loads((run.folder / "there" / "neox_bridge.json").read_text())["source"]
    assert record["revision"] == f"{RAW}@step8"
    assert record["iteration"] == 8
    run("verify", f"{RAW}@step8", "there")
    run("diff", f"{RAW}@step8", FLAT)
    run("export-optimizer", f"{RAW}@step8", "states-there")
    run("export-optimizer", FLAT, "states-here")
    for path in (run.folder / "states-here").glob("*.safetensors"):
        there = run.folder / "states-there" / path.name
        assert there.read_bytes() == path.read_bytes()


def test_runs_made_of_the_hub_are_those_made_of_the_same_files(hub: Stub, run: Commands) -> None:
    for source, place in ((f"{RAW}@step8", "there"), (FLAT, "here")):
        run("reshard", source, f"run-{place}", "--dp", 8, "--for", "neox@today")
        run("doctor", source, "--for", "neox@2024-03", "--fix", f"fixed-{place}")
    for kind in ("run", "fixed"):
        here, there = (run.folder / f"{kind}-{place}" for place in ("here", "there"))
        names = [path.relative_to(here) for path in here.rglob("*.pt")]
        assert len(names) > 8
        for name in names:
            assert (there / name).read_bytes() == (here / name).read_bytes(), name


@pytest.mark.parametrize("target", ["neox@v1.0", "neox@2024-03", "today"])
def test_what_doctor_advises_works(target: str, hub: Stub, run: Commands) -> None:
    """As it is printed: to fix it, and to reshard it."""
    out, _ = run("doctor", f"{RAW}@step8", "--for", target, code=4)
    fixes = set(re.findall(r"^  (?:fix|then)  +(neox-bridge .*)$", out, re.M))
    # resharding for a later tree settles the layout of the folder and the keys of the yml too
    (way,) = {command.split()[1] for command in fixes}
    assert way == ("doctor" if target == "neox@v1.0" else "reshard")
    for command in fixes:
        words = shlex.split(command)
        run(*words[1:])
        written = words[words.index("--fix") + 1] if "--fix" in words else words[3]
        run("doctor", written, "--for", target)


def test_in_place_names_the_command_that_writes_a_copy(run: Commands) -> None:
    asked = ("doctor", f"hf://{RAW}@step8", "--for", "today", "--in-place", "--drop-optimizer")
    _, err = run(*asked, code=4)
    run(*shlex.split(err.partition("Write a copy here: neox-bridge ")[2]))
    assert (run.folder / "neox-ckpt-pythia-160m-step8-fixed" / "latest").is_file()


def test_starts_are_fetched_at_the_same_time(hub: Stub, run: Commands, medium: Path) -> None:
    """A hundred files in a row would take a hundred times the way to the Hub."""
    many = hollow_branch(Shape(2, 64, 4, 512, 1, 48), run.folder.parent / "many")
    hub.put_files(RAW, "step16", many)
    hub.delay = 0.1
    run("export-optimizer", f"{RAW}@step16", "states", "--dry-run")
    states = [one for one in hub.served if "optim_states" in one.target]
    assert len({one.target for one in states}) == 48
    assert hub.busy >= 8
    took = max(one.time for one in states) - min(one.time for one in states)
    in_a_row = 2 * hub.delay * len(states)  # the Hub redirects to where the bytes are
    assert took < in_a_row / 3


def test_one_listing_is_enough(hub: Stub, run: Commands) -> None:
    run("inspect", f"{RAW}@step8")
    assert hub.count(f"GET /api/models/{RAW}/tree/") == 1
    assert hub.count(f"GET /api/models/{RAW}/revision/") == 2, "to look it up, and fsspec's own"
    commit = hub.repos[RAW].branches["step8"]
    assert hub.count(f"GET /{RAW}/resolve/") == hub.count(f"GET /{RAW}/resolve/{commit}/")


def test_a_branch_that_moves_while_it_is_read(hub: Stub, run: Commands) -> None:
    """All files are those of the commit that the branch was at in the beginning."""
    other = PUBLISHED / "v1_dp2" / "flat"
    hub.before.append(("layer_03", lambda: hub.put_files(RAW, "step8", other) and None))
    run("convert", f"{RAW}@step8", "there")
    convert(FLAT, run.folder / "here", to="hf")
    there, here = (run.folder / place / "model.safetensors" for place in ("there", "here"))
    assert there.read_bytes() == here.read_bytes()


def test_the_models_of_transformers_go_through_the_cache(
    hub: Stub, run: Commands, tmp_path: Path
) -> None:
    convert(FLAT, tmp_path / "hf", to="hf")
    hub.put_files(TWIN, "step8", tmp_path / "hf")
    out, _ = run("inspect", f"{TWIN}@step8", "--stats", "--json")
    facts = json.loads(out)
    assert (facts["kind"], facts["revision"]) == ("hf", f"{TWIN}@step8")
    assert facts["path"].startswith(str(run.home))
    assert list(run.home.rglob("model.safetensors"))


# --- many steps


def test_audit_and_batch_go_through_branches(hub: Stub, run: Commands, tmp_path: Path) -> None:
    other = PUBLISHED / "v1_dp2" / "flat"
    hub.put_files(RAW, "step16", other)
    hub.put_files(RAW, "notes", other)
    convert(FLAT, tmp_path / "hf", to="hf")
    hub.put_files(TWIN, "step8", tmp_path / "hf")
    hub.put_files(TWIN, "step16", tmp_path / "hf")
    hub.put_files(TWIN, "step24", tmp_path / "hf")
    out, _ = run("audit", RAW, "--cache", "none", "--json", code=3)
    found = json.loads(out)
    assert [(step["run"], step["step"]) for step in found["steps"]] == [(RAW, 8), (RAW, 16)]
    assert [one["steps"] for one in found["findings"] if one["severity"] != "info"] == [["16"]]
    out, _ = run("audit", RAW, "--against", TWIN, "--cache", "none", "--json", code=3)
    (comparison,) = json.loads(out)["comparisons"]
    assert (comparison["source"], comparison["twin"]) == (RAW, TWIN)
    assert [(row["step"], row["status"]) for row in comparison["rows"]] == [
        *((8, "same"), (16, "differs"), (24, "no counterpart"))
    ]
    assert {"side": "source", "step": "8", "tensors": 40} in comparison["rows"][1]["origins"]
    out, _ = run("audit", RAW, "--against", TWIN, "--steps", "8", "--cache", "none")
    assert "1 step: 1 equal" in out
    assert hub.count("GET /.*step16") == 0
    out, _ = run("batch", RAW, "out", "--steps", "0-143000:16", "--json")
    assert [row["name"] for row in json.loads(out)["rows"]] == ["step16"]


def test_an_audit_fetches_each_byte_once(hub: Stub, run: Commands, tmp_path: Path) -> None:
    """Of a model that is larger than the ranges that are kept in memory."""
    branch = hollow_branch(Shape(8, 1024, 8, 8192, 1, 2), tmp_path / "large")
    hub.put_files(RAW, f"step{STEP}", branch)
    run("audit", RAW, "--steps", str(STEP), "--cache", "none", "-q")
    needed = weight_bytes(branch)
    assert needed > 2 * ranges.MEMORY
    assert needed <= hub.bytes_of_requests() <= 1.01 * needed
    assert optimizer_requests(hub) == []


def test_a_branch_without_some_files_is_named(hub: Stub, run: Commands, tmp_path: Path) -> None:
    shutil.copytree(FLAT, tmp_path / "part")
    (tmp_path / "part" / "layer_03-model_00-model_states.pt").unlink()
    hub.put_files(RAW, "step16", tmp_path / "part")
    _, err = run("convert", f"{RAW}@step16", "out", code=1)
    assert f"hf://{RAW}@step16 is incomplete: layer_03-model_00-model_states.pt missing" in err
    assert not (run.folder / "out").exists()
    out, _ = run("batch", RAW, "many", "--retries", 0, "--json", code=1)
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert rows["step8"]["status"] == "done"
    assert "layer_03-model_00-model_states.pt missing" in rows["step16"]["error"]
    (tmp_path / "part" / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    hub.put_files(RAW, "step24", tmp_path / "part")
    shutil.copy(FLAT / "layer_03-model_00-model_states.pt", tmp_path / "part")
    hub.put_files(RAW, "step24", tmp_path / "part")
    run("convert", f"{RAW}@step24", "weights")
    _, err = run("export-optimizer", f"{RAW}@step24", "states", code=1)
    assert "zero_pp_rank_2_mp_rank_00_optim_states.pt" in err


# --- names


def test_a_step_that_is_not_there(hub: Stub, run: Commands) -> None:
    for step in (0, 1000, 2000):
        hub.put_files(RAW, f"step{step}", FLAT)
    _, err = run("inspect", f"{RAW}@step1500", code=1)
    assert f"{RAW} has no step1500" in err
    assert "step0, step8, step1000, step2000" in err
    _, err = run("inspect", f"{RAW}@nothing", code=1)
    assert f"{RAW} has no branch, tag or commit nothing" in err
    _, err = run("inspect", RAW, code=1)
    assert f"It has 4 steps as branches, from step0 to step2000. Name one: {RAW}@step2000" in err
    _, err = run("inspect", RAW, "--step", 8, code=2)
    assert "--revision step8" in err
    out, _ = run("inspect", RAW, "--revision", "step8")
    assert "iteration 8" in out


def test_a_renamed_repository(hub: Stub, run: Commands) -> None:
    hub.renamed["EleutherAI/neox-ckpt-old"] = RAW
    run("convert", "EleutherAI/neox-ckpt-old@step8", "out")
    record = json.loads((run.folder / "out" / "neox_bridge.json").read_text())["source"]
    assert record["revision"] == f"{RAW}@step8"
    out, _ = run("inspect", "EleutherAI/neox-ckpt-old@step8")
    assert f"EleutherAI/neox-ckpt-old is called {RAW} now" in out
    run("batch", "EleutherAI/neox-ckpt-old", "many")


def test_a_name_that_is_nearly_right(hub: Stub, run: Commands) -> None:
    for words in (("neox-ckpt-pythia-160m", "out"), ("neox-ckpt-pythia-160m@step8", "out")):
        done = CliRunner().invoke(app, ["convert", *words])
        assert done.exit_code == 1
        full = f"EleutherAI/{words[0]}"
        assert f"On the Hub: {full}." in done.stderr
    run("convert", f"{RAW}@step8", "out")
    _, err = run("inspect", "EleutherAI/neox-ckpt-pythia-160", code=1)
    assert f"Did you mean {RAW}?" in err
    _, err = run("inspect", "org/model", code=1)
    assert "Did you mean" not in err


def test_suites_that_are_known() -> None:
    assert suites.twin_of(RAW) == TWIN
    assert suites.twin_of("EleutherAI/neox-ckpt-pythia-70m-deduped-v1") == (
        "EleutherAI/pythia-70m-deduped"
    )
    assert suites.twin_of("EleutherAI/neox-ckpt-pythia-1b-v0") == "EleutherAI/pythia-1b-v0"
    for other in (TWIN, "org/neox-ckpt-pythia-160m", "EleutherAI/neox-ckpt-pythia-14m-seed0"):
        assert suites.twin_of(other) is None
    assert suites.full_id("Pythia-1.4B") == "EleutherAI/pythia-1.4b"
    assert suites.full_id("neox-ckpt-pythia-410m-seed8") == (
        "EleutherAI/neox-ckpt-pythia-410m-seed8"
    )
    assert suites.full_id("pythia-13b") is None
    assert suites.nearest("EleutherAI/pythia-160") == TWIN
    assert suites.nearest("EleutherAI/gpt-j-6b") is None
    out = CliRunner().invoke(app, ["families"]).stdout
    document = json.loads(CliRunner().invoke(app, ["families", "--json"]).stdout)
    for suite in suites.SUITES:
        assert suite.repo in out
    assert {"repo": RAW, "twin": TWIN, "checkpoints": 154} in document["suites"]


# --- how it ends


def test_a_gated_repository(hub: Stub, run: Commands) -> None:
    hub.repos[RAW].gated = True
    for token in ({}, {"HF_TOKEN": READ}):
        _, err = run("convert", f"{RAW}@step8", "out", code=1, **token)
        assert "is gated" in err
        assert "hf auth login" in err
        assert err.count("\n") == 1
    run("convert", f"{RAW}@step8", "out", HF_TOKEN=WRITE)


def test_a_private_or_missing_repository(hub: Stub, run: Commands) -> None:
    hub.repos[RAW].private = True
    _, err = run("inspect", f"{RAW}@step8", code=1)
    assert "hf auth login" in err
    run("inspect", f"{RAW}@step8", HF_TOKEN=READ)
    _, err = run("inspect", "org/absent@step8", code=1, HF_TOKEN=READ)
    assert "org/absent" in err
    assert "the repository does not exist" in err


def test_a_rate_limit_is_waited_for(hub: Stub, run: Commands) -> None:
    """Of any kind of request; huggingface_hub adds a second of its own where it retries itself."""
    for request in (
        f"GET /api/models/{RAW}/revision/",
        f"GET /api/models/{RAW}/tree/",
        f"GET /{RAW}/resolve/.*layer_03",
    ):
        hub.fail(request, 429, times=1, Retry_After="1")
        run("convert", f"{RAW}@step8", "out")
        shutil.rmtree(run.folder / "out")
        limited = next(one for one in hub.served if one.status == 429)
        again = next(
            one.time
            for one in hub.served
            if one.time > limited.time
            and (one.target, one.range) == (limited.target, limited.range)
        )
        assert again - limited.time >= 1


def test_a_run_that_was_stopped_goes_on(hub: Stub, run: Commands, medium: Path) -> None:
    """What was fetched lies beside the target, and is not fetched again."""
    hub.put_files(RAW, f"step{STEP}", medium)
    begun = 3 * fetched.UNIT_BYTES
    process = run.start("convert", f"{RAW}@step{STEP}", "hf")
    hub.delay = 0.05
    while hub.bytes_of_requests("GET /lfs/") < begun and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.delay = 0
    work = run.folder / ".hf.neox-bridge"
    kept = fetched.kept_bytes(str(work))
    assert kept >= fetched.UNIT_BYTES
    run("convert", f"{RAW}@step{STEP}", "hf")
    assert hub.bytes_of_requests("GET /lfs/") <= 1.01 * weight_bytes(medium) - kept
    assert os.listdir(run.folder) == ["hf"]


def test_what_was_fetched_waits_for_the_next_try(hub: Stub, run: Commands, medium: Path) -> None:
    hub.put_files(RAW, f"step{STEP}", medium)
    # the first two requests are for its header, the start and the end of the file
    hub.fail(f"GET /{RAW}/resolve/.*layer_08", 403, times=100, skip=2)
    _, err = run("convert", f"{RAW}@step{STEP}", "hf", code=1)
    assert "layer_08-model_00-model_states.pt cannot be read" in err
    kept = fetched.kept_bytes(str(run.folder / ".hf.neox-bridge"))
    assert kept > 0
    assert f"{kept:,} downloaded bytes are kept in" in err
    assert "Run the same command again to continue" in err
    hub.faults.clear()
    run("convert", f"{RAW}@step{STEP}", "hf")
    assert hub.bytes_of_requests("GET /lfs/") <= 1.01 * weight_bytes(medium) - kept
    assert os.listdir(run.folder) == ["hf"]


# --- offline, and caches


def test_offline_the_cache_is_read(hub: Stub, run: Commands) -> None:
    offline = {"HF_HUB_OFFLINE": "1"}
    _, err = run("inspect", f"{RAW}@step8", code=1, **offline)
    assert f"{RAW}@step8 is not in the cache" in err
    assert "HF_HUB_OFFLINE is set" in err
    assert f"hf download {RAW} --revision step8" in err
    run.cached(RAW, FLAT)
    out, _ = run("inspect", f"{RAW}@step8", "--json", **offline)
    assert json.loads(out)["revision"] == f"{RAW}@step8"
    run("convert", f"hf://{RAW}@step8", "hf", **offline)
    run("export-optimizer", f"{RAW}@step8", "states", **offline)
    run("batch", RAW, "many", **offline)
    out, _ = run("audit", RAW, "--against", RAW, "--cache", "none", **offline)
    assert "1 step: 1 equal" in out
    _, err = run("inspect", f"{RAW}@step9", code=1, **offline)
    assert f"{RAW}@step9 is not in the cache" in err
    assert hub.seen == [], "nobody was asked"


def test_without_a_network_the_cache_is_read(hub: Stub, run: Commands) -> None:
    gone = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    _, err = run("inspect", f"{RAW}@step8", code=1, **gone)
    assert "cannot be reached" in err
    command = err.strip().partition("To try neox-bridge without a network: neox-bridge ")[2]
    run(*shlex.split(command), **gone)
    run("convert", "pythia-70m", "pythia-neox", **gone)
    run.cached(RAW, FLAT)
    out, _ = run("inspect", f"{RAW}@step8", **gone)
    assert "the Hub cannot be reached, so the cached copy" in out


def test_a_cache_that_is_half_filled(hub: Stub, run: Commands) -> None:
    """Offline what is missing is named; online it is fetched."""
    snapshot = run.cached(RAW, FLAT)
    layer = snapshot / "layer_03-model_00-model_states.pt"
    for state in ("missing", "dangling"):
        if state == "missing":
            layer.unlink()
        else:
            layer.symlink_to(Path("../../blobs/absent"))
        _, err = run("convert", f"{RAW}@step8", "out", code=1, HF_HUB_OFFLINE="1")
        assert "layer_03-model_00-model_states.pt" in err
        assert not (run.folder / "out").exists()
        _, err = run("inspect", snapshot, code=1)
        assert "layer_03-model_00-model_states.pt" in err
        run("convert", f"{RAW}@step8", "out")
        assert hub.count("GET /lfs/") > 0
        shutil.rmtree(run.folder / "out")


def test_a_cache_that_is_whole_is_used(hub: Stub, run: Commands) -> None:
    run.cached(RAW, FLAT)
    hub.put_files(RAW, "step8", FLAT)
    shutil.rmtree(run.home)
    run.cached(RAW, FLAT)
    out, _ = run("inspect", f"{RAW}@step8", "--json")
    assert json.loads(out)["path"].startswith(str(run.home))
    assert hub.count("GET /lfs/") == 0
    hub.put_files(RAW, "step8", PUBLISHED / "v1_dp2" / "flat")
    out, _ = run("inspect", f"{RAW}@step8", "--json")
    assert json.loads(out)["path"] == f"hf://{RAW}@step8", "the branch has moved since"


# --- the tokenizer


@pytest.mark.parametrize("repo", [TWIN, "EleutherAI/gpt-neox-20b"])
def test_the_tokenizer_is_found_on_the_hub(repo: str, hub: Stub, run: Commands) -> None:
    data = json.dumps(TOKENIZER).encode()
    hub.make(repo, **{"tokenizer.json": data})
    _, err = run("convert", f"{RAW}@step8", "out")
    assert f"the tokenizer of {repo} is used" in err
    assert (run.folder / "out" / "tokenizer.json").read_bytes() == data
    run("batch", RAW, "many")
    assert (run.folder / "many" / "step8" / "tokenizer.json").read_bytes() == data
    run("convert", f"{RAW}@step8", "again", HF_HUB_OFFLINE="0")
    assert hub.count(f"GET /{repo}/resolve/") == 0, "it is in the cache"


def test_a_tokenizer_that_cannot_be_had_is_named(hub: Stub, run: Commands) -> None:
    _, err = run("convert", f"{RAW}@step8", "out")
    assert "/fsx/pile/20B_tokenizer.json" in err
    assert "the Hub does not have a tokenizer" in err
    assert "EleutherAI/gpt-neox-20b" in err
    assert not (run.folder / "out" / "tokenizer.json").exists()
    vocabulary = {f"w{n}": n for n in range(257)}
    large = {**TOKENIZER, "model": {**TOKENIZER["model"], "vocab": vocabulary}}  # type: ignore[dict-item]
    hub.make(TWIN, **{"tokenizer.json": json.dumps(large).encode()})
    _, err = run("convert", f"{RAW}@step8", "large")
    assert f"the tokenizer of {TWIN} has 257 entries, and this model has 256 rows" in err
    run.cached(RAW, FLAT)
    _, err = run("convert", f"{RAW}@step8", "offline", HF_HUB_OFFLINE="1")
    assert "does not have a tokenizer" in err
    assert hub.seen == []


def test_a_folder_is_no_reason_to_ask_the_hub(hub: Stub, run: Commands) -> None:
    hub.make(TWIN, **{"tokenizer.json": json.dumps(TOKENIZER).encode()})
    _, err = run("convert", FLAT, "out")
    assert "/fsx/pile/20B_tokenizer.json" in err
    assert hub.seen == []
    run("convert", FLAT, "asked", "--tokenizer", TWIN)
    assert (run.folder / "asked" / "tokenizer.json").exists()
    _, err = run("convert", FLAT, "absent", "--tokenizer", "org/absent", code=1)
    assert "org/absent" in err


# --- the parts


def test_how_long_a_server_asks_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def error(**headers: str) -> Exception:
        found = Exception("429")
        found.response = SimpleNamespace(status_code=429, headers=headers)  # type: ignore[attr-defined]
        return found

    soon = datetime.now(timezone.utc) + timedelta(seconds=30)
    assert retry.retry_after(error(**{"Retry-After": "12"})) == 12
    assert 25 < (retry.retry_after(error(**{"retry-after": format_datetime(soon)})) or 0) <= 30
    past = format_datetime(soon - timedelta(days=1))
    assert retry.retry_after(error(**{"Retry-After": past})) == 0
    for nothing in ({}, {"Retry-After": "soon"}, {"Retry-After": "-1"}):
        assert retry.retry_after(error(**nothing)) is None
    botocore = Exception("slow down")
    botocore.response = {  # type: ignore[attr-defined]
        "ResponseMetadata": {"HTTPStatusCode": 503, "HTTPHeaders": {"retry-after": "3"}}
    }
    assert retry.retry_after(botocore) == 3
    waits: list[float] = []
    monkeypatch.setattr("neox_bridge.stores.retry.time.sleep", waits.append)
    answers: list[Any] = [error(**{"Retry-After": "2"}), error(), "bytes"]

    def call() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert retry.steadily("hf://org/name", "read", call) == "bytes"
    assert 2 <= waits[0] <= 2 + 0.4
    assert waits[1] <= 0.8
    answers[:] = [error(**{"Retry-After": "86400"})]
    with pytest.raises(Unreachable, match="86400 seconds"):
        retry.steadily("hf://org/name", "read", call)


def test_a_long_wait_is_announced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("neox_bridge.stores.retry.time.sleep", lambda _: None)
    for seconds, said in (("4", 0), ("60", 1)):
        limited = Exception("429")
        limited.response = SimpleNamespace(  # type: ignore[attr-defined]
            status_code=429, headers={"Retry-After": seconds}
        )
        answers: list[Any] = [limited, "bytes"]

        def call(answers: list[Any] = answers) -> Any:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert retry.steadily("hf://org/name", "read", call) == "bytes"
        assert len(caplog.messages) == said


def test_ranges_are_kept_while_a_run_lasts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = os.urandom(3 * 1000 + 7)
    requests: list[tuple[int, int]] = []

    def fetch(url: str, start: int, end: int) -> bytes:
        requests.append((start, end))
        return data[start:end]

    monkeypatch.setattr(fetched, "fetch", fetch)
    monkeypatch.setattr(fetched, "UNIT_BYTES", 1000)
    monkeypatch.setattr(fetched, "look", lambda _: objects.FileState(len(data), "tag"))
    folder = str(tmp_path / "fetched")
    with fetched.keeping(folder, ["hf://org/name/a", "s3://bucket/b"]):
        for start, end in ((0, 10), (990, 1010), (2500, 3007), (3000, 3007), (0, 3007)):
            assert fetched.fetch_kept("hf://org/name/a", start, end) == data[start:end]
        assert sorted(requests) == [(0, 1000), (1000, 2000), (2000, 3000), (3000, 3007)]
        fetched.fetch_kept("hf://org/name/other", 5, 6)
        fetched.fetch_kept("s3://bucket/b", 5, 6)
        assert requests[-2:] == [(5, 6), (5, 6)], "of other objects only what is read"
    assert fetched.kept_bytes(str(tmp_path)) == len(data)
    requests.clear()
    fetched.fetch_kept("hf://org/name/a", 0, 10)
    assert requests == [(0, 10)], "nothing is kept any more"
    with fetched.keeping(folder, ["hf://org/name/a"]):
        assert fetched.fetch_kept("hf://org/name/a", 0, 3007) == data
        assert len(requests) == 1, "the next run finds them"
        for path in Path(folder).iterdir():
            path.write_bytes(path.read_bytes()[:-1])
        assert fetched.fetch_kept("hf://org/name/a", 0, 3007) == data, "those that aren't whole"
        monkeypatch.setattr(fetched, "look", lambda _: objects.FileState(len(data), "another"))
        before = len(requests)
        fetched.fetch_kept("hf://org/name/a", 0, 1)
        assert len(requests) == before + 1, "the object is another one now"


def test_nothing_is_kept_where_there_is_no_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = {"hf://org/name/a": 10**9, "/a/file": 10**12}
    usage = SimpleNamespace(free=3 * 10**9)
    monkeypatch.setattr("neox_bridge.stores.fetched.shutil.disk_usage", lambda _: usage)
    assert fetched.range_folder(str(tmp_path), sizes, 10**9) == str(tmp_path / "fetched")
    assert fetched.range_folder(str(tmp_path), sizes, 2 * 10**9) is None
    assert fetched.range_folder(str(tmp_path), {"/a/file": 5, "s3://b/c": 5}, 1) is None


def test_pieces_of_files_here_are_read_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    places = [(str(tmp_path / "a"), 7, 2), (str(tmp_path / "a"), 0, 3)]
    assert paths.read_pieces(places) == [b"78", b"012"]


def test_a_pointer_of_git_lfs_is_no_checkpoint(tmp_path: Path) -> None:
    """What a clone without git-lfs holds in place of the files."""
    shutil.copytree(FLAT, tmp_path / "clone")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
    (tmp_path / "clone" / "layer_03-model_00-model_states.pt").write_bytes(pointer)
    with pytest.raises(BridgeError, match=r"layer_03-model_00-model_states\.pt.*git.lfs"):
        open_checkpoint(str(tmp_path / "clone"))
