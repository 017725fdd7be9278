"""Sources and targets in stores: a real S3 server on loopback whose answers are spoiled at will."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import xxhash
from attack_zip import DISAGREED
from click.testing import CliRunner
from common import fixture, make_hf, plan_of
from s3_server import Store, one_in_four
from store_files import WIDE, assert_same, contents, files, run, s3, unfinished_uploads, upload

from neox_bridge.api import open_checkpoint
from neox_bridge.api import plan as make_plan
from neox_bridge.cli.app import app
from neox_bridge.doctor import fixes
from neox_bridge.errors import BridgeError, ChoiceNeeded, Unreachable, Unverified
from neox_bridge.execution import transform
from neox_bridge.execution.context import Context
from neox_bridge.execution.digests import hash_file
from neox_bridge.execution.execute import execute
from neox_bridge.execution.executors import Processes
from neox_bridge.execution.files import Files
from neox_bridge.execution.object_store import ObjectWriter
from neox_bridge.execution.streams import Stream
from neox_bridge.execution.transform import load
from neox_bridge.execution.units import Unit, make
from neox_bridge.execution.write_tensor import fill_tensor
from neox_bridge.formats.torch_zip import read_pt
from neox_bridge.planning.options import Options
from neox_bridge.stores import objects, paths, ranges
from neox_bridge.stores.store import PART_BYTES, part_size
from neox_bridge.tensors.pieces import OutputTensor, cut, transposed, whole_of
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.verification.verify import checker, verify

RUNNER = CliRunner()
# what is said of an empty answer to a look, to a listing, to a range, and to what is written
EMPTY = (
    "the answer is empty with status 200|Got invalid list response|Received non-partial response"
    "|ETag Header missing from response"
)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of half a megabyte."""
    return make_hf(tmp_path_factory.mktemp("stores") / "hf")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "hf"
    return make_hf(folder, num_hidden_layers=1, tie_word_embeddings=True, **WIDE)


@pytest.fixture(scope="module")
def neox(hf: Path) -> Path:
    """The same in GPT-NeoX's files, written to a disk with every CRC."""
    run(hf, hf.parent / "neox", tp=2)
    return hf.parent / "neox"


def test_both_directions_are_those_of_a_disk(
    store: Store, hf: Path, neox: Path, tmp_path: Path
) -> None:
    run(hf, s3("both/neox"), tp=2)
    assert_same(contents(s3("both/neox")), files(neox))
    run(neox, tmp_path / "hf")
    run(s3("both/neox"), s3("both/hf"))
    assert_same(contents(s3("both/hf")), files(tmp_path / "hf"))
    run(s3("both/neox"), tmp_path / "from-store")
    assert_same(files(tmp_path / "from-store"), files(tmp_path / "hf"))


def test_transposed_matrices_are_those_of_a_disk(store: Store, tmp_path: Path) -> None:
    """Of an object, a matrix of 4.7 MB is fetched a few times at most, not once for each block."""
    wide = {"n_embd": 384, "n_layer": 1, "n_inner": 3072}
    hf = make_hf(tmp_path / "hf", family="gpt2", **wide)
    upload(hf, s3("transposed/hf"))
    run(hf, tmp_path / "neox", tp=2)
    store.requests.clear()
    run(s3("transposed/hf"), s3("transposed/neox"), tp=2)
    weights = sum(r.sent for r in store.of("GET", "transposed/hf/model.safetensors"))
    assert weights <= 4 * (hf / "model.safetensors").stat().st_size
    assert_same(contents(s3("transposed/neox")), files(tmp_path / "neox"))
    run(tmp_path / "neox", tmp_path / "back")
    run(s3("transposed/neox"), s3("transposed/back"))
    assert_same(contents(s3("transposed/back")), files(tmp_path / "back"))


def test_only_headers_are_read_to_open(store: Store, hf: Path, neox: Path) -> None:
    upload(hf, s3("open/hf"))
    upload(neox, s3("open/neox"))
    for folder, tensors in (("hf", len(open_checkpoint(str(hf)).tensors)), ("neox", 0)):
        store.requests.clear()
        found = open_checkpoint(s3(f"open/{folder}"))
        assert len(found.tensors) == (tensors or len(found.tensors))
        weights = [r for r in store.of("GET", f"open/{folder}") if r.key.endswith(("s", "pt"))]
        assert sum(r.sent for r in store.requests) < 40_000 * len(found.files) + 100_000
        assert {r.key.rpartition("/")[2] for r in weights} <= set(
            map(os.path.basename, found.files)
        )
        assert not [r for r in weights if not r.range]
    # the last request of the other folder may be noted after the list was cleared
    mine = [r for r in store.requests if "open%2Fneox" in r.query]
    listings = [r for r in mine if "list-type" in r.query]
    assert len(listings) <= 8  # one that found nothing is asked for twice


def test_a_tied_head_is_compared_by_ranges(store: Store, tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf", tie_word_embeddings=False)
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    url = upload(source, s3("head/hf"))
    with pytest.raises(ChoiceNeeded, match=r"embed_out\.weight"):
        make_plan(open_checkpoint(url), Options(), str(tmp_path / "neox"))
    assert all(request.range for request in store.of("GET", "model.safetensors"))
    run(url, tmp_path / "neox", head="keep")
    assert verify(open_checkpoint(url), open_checkpoint(str(tmp_path / "neox"))).holds


@pytest.mark.parametrize("name", ["pythia_fp32_pp1_tp2", "pythia_fp32_pp0_tp2"])
def test_no_request_for_a_tensor(store: Store, name: str) -> None:
    """Of files that torch wrote: their start and their end, or all of a small one at once."""
    url = upload(fixture(name), s3(name))
    store.requests.clear()
    found = open_checkpoint(url)
    asked = Counter(r.key for r in store.of("GET") if r.key.endswith(".pt"))
    assert set(asked.values()) <= {1, 2}
    assert len(found.tensors) == len(open_checkpoint(str(fixture(name))).tensors)


@pytest.mark.parametrize("how", ["drop", "refuse", "slow down", "short", "trickle"])
def test_spoiled_answers_change_nothing(store: Store, neox: Path, tmp_path: Path, how: str) -> None:
    """One answer of four, to reads and to writes."""
    url = upload(neox, s3(f"spoiled/{how}/neox"))
    run(neox, tmp_path / "hf")
    objects.forget(url)
    store.requests.clear()
    read_only = how == "short"
    store.spoil = one_in_four(
        how, lambda method, key: not read_only or bool(method == "GET" and key)
    )
    run(url, s3(f"spoiled/{how}/hf"))
    store.spoil = lambda method, key, query: ""
    assert sum(r.spoiled == how for r in store.requests) > 10
    assert_same(contents(s3(f"spoiled/{how}/hf")), files(tmp_path / "hf"))


@pytest.mark.parametrize("method", ["GET", "HEAD", ""])
def test_a_store_that_answers_nothing_is_an_error(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """200 and an empty answer, as of a proxy or another server: no checkpoint is blamed."""
    monkeypatch.setattr("neox_bridge.stores.retry.time.sleep", lambda _: None)
    url = s3(f"nothing/{method or 'any'}")
    hf = fixture("pythia_fp32_pp1_tp2")
    store.spoil = lambda m, key, query: "empty" if method in ("", m) else ""
    out = str(tmp_path / "out")
    try:
        for command in (
            ["inspect", url], ["inspect", f"{url}/model.safetensors"], ["convert", url, out],
            ["batch", url, out], ["audit", url], ["verify", url], ["convert", str(hf), url],
            ["inspect", "--security", f"{url}/x.pt"],
        ):  # fmt: skip
            objects.forget(url)
            done = RUNNER.invoke(app, command)
            if method == "HEAD" and "empty" not in done.output:
                assert "no such" in done.output or "missing" in done.output
                continue
            assert done.exit_code == 1, (command, done.output)
            assert re.search(EMPTY, done.output), (command, done.output)
            assert "AWS_ENDPOINT_URL" in done.output
    finally:
        store.spoil = lambda method, key, query: ""
    assert not (tmp_path / "out").exists()


def test_one_empty_answer_changes_nothing(store: Store, neox: Path, tmp_path: Path) -> None:
    """Every fourth answer to a listing or a look is empty: they are asked for again."""
    url = upload(neox, s3("empty/neox"))
    run(neox, tmp_path / "hf")
    objects.forget(url)
    store.spoil = one_in_four("empty", lambda method, key: not key or method == "HEAD")
    run(url, tmp_path / "from-store")
    store.spoil = lambda method, key, query: ""
    assert sum(r.spoiled == "empty" for r in store.requests) > 1
    assert_same(files(tmp_path / "from-store"), files(tmp_path / "hf"))


def test_a_store_that_stays_away_is_an_error(
    store: Store, neox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(neox, s3("away/neox"))
    store.spoil = lambda method, key, query: "slow down" if "layer_03" in key else ""
    done = RUNNER.invoke(app, ["convert", url, str(tmp_path / "hf")])
    assert done.exit_code == 1
    assert "layer_03-model_00-model_states.pt cannot be read" in done.output
    assert "reduce your request rate" in done.output
    assert "tried 6 times" in done.output
    assert not (tmp_path / "hf").exists()
    assert sum("layer_03" in r.key for r in store.requests) <= 4 * 2 * 2 * 6


def test_the_record_comes_last_and_latest_after_it(store: Store, hf: Path) -> None:
    seen: list[list[str]] = []
    checkpoint = open_checkpoint(str(hf))
    plan = make_plan(checkpoint, Options(layout="ranks"), s3("last"))

    def check(url: str) -> None:
        seen.append(sorted(contents(url)))
        checker(checkpoint)(url)

    execute(plan, s3("last"), check=check)
    assert seen
    assert not [name for name in seen[0] if name.endswith(("neox_bridge.json", "latest"))]
    wrote = [r.key for r in store.of("PUT")]
    assert wrote[-2:] == ["last/global_step0/neox_bridge.json", "last/latest"]
    left = contents(s3("last"))
    assert sorted(left) == sorted(file.path for file in plan.files)
    assert RUNNER.invoke(app, ["verify", s3("last")]).exit_code == 0


def test_a_failed_verification_leaves_no_record(store: Store, hf: Path) -> None:
    def check(url: str) -> None:
        raise Unverified("It isn't.")

    plan = plan_of(hf, Path("x"))
    with pytest.raises(Unverified, match=r"without its neox_bridge\.json"):
        execute(plan, s3("unverified"), check=check)
    assert not [n for n in contents(s3("unverified")) if n.endswith("neox_bridge.json")]
    with pytest.raises(BridgeError, match="`overwrite=True`"):
        execute(plan, s3("unverified"))


def test_what_is_there_is_only_replaced_when_told(store: Store, hf: Path, tmp_path: Path) -> None:
    other = make_hf(tmp_path / "other", seed=1)
    url = s3("there/hf")
    run(hf, s3("there/neox"), layout="ranks")
    run(s3("there/neox"), url, shard_size=300_000)
    before = contents(url)
    run(other, tmp_path / "neox", layout="ranks")
    with pytest.raises(BridgeError, match=r"exists and contains \d+ objects\. .*`overwrite=True`"):
        run(tmp_path / "neox", url)
    assert contents(url) == before
    store.requests.clear()
    run(tmp_path / "neox", url, overwrite=True)
    run(tmp_path / "neox", tmp_path / "hf")
    assert_same(contents(url), files(tmp_path / "hf"))
    changes = [
        (r.method, r.key)
        for r in store.requests
        if r.method in ("PUT", "DELETE", "POST") and not r.key.endswith("/.neox-bridge/lock")
    ]
    assert changes[0] == ("DELETE", "there/hf/neox_bridge.json"), "it isn't whole from here on"
    with pytest.raises(BridgeError, match="contains the source"):
        run(s3("there/neox"), s3("there"), overwrite=True, to="neox", tp=4)


def test_a_step_is_put_beside_others(store: Store, hf: Path, tmp_path: Path) -> None:
    for target in (tmp_path / "run", s3("run")):
        for step in (5, 10):
            run(hf, target, iteration=step, layout="ranks")
    found = contents(s3("run"))
    assert_same(found, files(tmp_path / "run"))
    assert found["latest"] == b"global_step10"
    with pytest.raises(BridgeError, match="global_step5 exists"):
        run(hf, s3("run"), iteration=5, layout="ranks")
    assert open_checkpoint(s3("run"), step=5).neox.iteration == 5  # type: ignore[union-attr]


class Test_stopped:  # noqa: N801
    """Uploads that end in the middle are gone on with."""

    def test_what_is_finished_isn_t_sent_again(self, store: Store, hf: Path, neox: Path) -> None:
        url = s3("stopped/neox")
        store.spoil = lambda method, key, query: (
            "refuse" if method in ("PUT", "POST") and "layer_00-model_01" in key else ""
        )
        with pytest.raises(Unreachable, match=r"kept in .*, without its neox_bridge\.json"):
            run(hf, url, tp=2)
        store.spoil = lambda method, key, query: ""
        left = contents(url)
        marks = [name for name in left if name.startswith(".neox-bridge/")]
        finished = {json.loads(left[m])["path"] for m in marks if not m.endswith("begun")}
        assert finished
        assert not [name for name in left if name.endswith(("neox_bridge.json", "latest"))]
        assert not unfinished_uploads()
        store.requests.clear()
        result = run(hf, url, tp=2)
        sent = {key.removeprefix("stopped/neox/") for key in store.uploads}
        assert not sent & finished
        assert result.kept == sum(len(left[name]) for name in finished)
        assert_same(contents(url), files(neox))

    def test_what_others_put_there_stays(self, store: Store, hf: Path) -> None:
        """A run that is gone on with may have got another step meanwhile."""
        url = s3("others")
        store.spoil = lambda method, key, query: (
            "refuse" if method == "PUT" and "finetune" in key else ""
        )
        with pytest.raises(Unreachable):
            run(hf, url, layout="ranks")
        store.spoil = lambda method, key, query: ""
        theirs = {"global_step7/neox_bridge.json": b"{}", "global_step7/x.pt": b"x"}
        fs, root = fsspec.core.url_to_fs(url)
        for name, data in theirs.items():
            fs.pipe_file(f"{root}/{name}", data)
        run(hf, url, layout="ranks")
        assert theirs.items() <= contents(url).items()

    def test_an_object_that_was_changed_is(self, store: Store, hf: Path, neox: Path) -> None:
        url = s3("changed/neox")
        store.spoil = lambda method, key, query: (
            "refuse" if method == "PUT" and "finetune" in key else ""
        )
        with pytest.raises(Unreachable):
            run(hf, url, tp=2)
        store.spoil = lambda method, key, query: ""
        name = "global_step0/mp_rank_00_model_states.pt"
        fs, root = fsspec.core.url_to_fs(url)
        assert name in contents(url)
        fs.pipe_file(f"{root}/{name}", b"another")
        run(hf, url, tp=2)
        assert_same(contents(url), files(neox))

    def test_killed(self, store: Store, wide: Path, tmp_path: Path) -> None:
        """By SIGKILL, while parts of an object are on their way."""
        run(wide, tmp_path / "neox")
        url = s3("killed/neox")
        held = []

        def spoil(method: str, key: str, query: str) -> str:
            if method == "PUT" and "partNumber=2" in query:
                held.append(key)
                time.sleep(2)
            return ""

        store.spoil = spoil
        command = [sys.executable, "-m", "neox_bridge", "convert", str(wide), url]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 30
        while not held and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert held, process.communicate()[0].decode()
        store.spoil = lambda method, key, query: ""
        left = contents(url)
        assert not [name for name in left if name.endswith(("neox_bridge.json", "latest"))]
        assert unfinished_uploads()
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not unfinished_uploads()
        assert_same(contents(url), files(tmp_path / "neox"))


def test_large_objects_go_in_parts(store: Store, wide: Path, tmp_path: Path) -> None:
    run(wide, tmp_path / "neox")
    store.requests.clear()
    run(tmp_path / "neox", s3("parts"))
    parts = [r for r in store.of("PUT") if "partNumber" in r.query]
    size = len(contents(s3("parts"))["model.safetensors"])
    assert [r.received for r in parts].count(PART_BYTES) == size // PART_BYTES == 1
    assert sum(r.received for r in parts) == size
    assert part_size(10**9) == PART_BYTES
    for size in (80 << 30, 10**12, 5 << 40):
        assert size / part_size(size) <= 10_000
        assert part_size(size) % 1024 == 0


def test_commands_take_urls(store: Store, hf: Path, neox: Path, tmp_path: Path) -> None:
    url = upload(neox, s3("cli/neox"))

    def call(*arguments: object, code: int = 0) -> str:
        done = RUNNER.invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == code, done.output
        return done.stdout

    facts = json.loads(call("inspect", url, "--json"))
    assert facts["path"] == url
    assert facts["bytes"] == json.loads(call("inspect", neox, "--json"))["bytes"]
    assert "equal" in call("verify", hf, url)
    assert "unchanged since it was written" in call("verify", url)
    assert "0 different" in call("diff", url, hf, "--stat")
    assert "0 different" in call("diff", hf, f"{url}/", "--stat")
    assert "model.safetensors" in call("convert", url, s3("cli/hf"), "--dry-run")
    assert not contents(s3("cli/hf"))
    assert "verified bit by bit" in call("convert", url, s3("cli/hf"))
    assert "verified bit by bit" in call("convert", s3("cli/hf"), tmp_path / "back", "--tp", 2)
    assert "9 more files like it" in call("inspect", url, "--security")
    assert call("audit", url, "--cache", tmp_path / "cache")
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{root}/global_step0/mp_rank_00_model_states.pt", b"another")
    assert "changed: mp_rank_00" in call("verify", url, code=3)


def test_errors_say_what_to_do(
    store: Store, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(hf, tmp_path / "x")
    for target, words in (
        ("s3://bucket", "Choose a folder in it"),
        ("s3://nobody/x", "bucket"),
        ("gopher://x/y", "gopher"),
        ("hf://org/name", "files on the Hub cannot be written"),
    ):
        with pytest.raises(BridgeError, match=words):
            execute(plan, target)
    with pytest.raises(BridgeError, match="no such folder"):
        open_checkpoint(s3("nothing/here"))
    with pytest.raises(BridgeError, match="no such folder"):
        open_checkpoint("s3://nobody/here")
    with pytest.raises(BridgeError, match="revision: only for models on the Hub"):
        open_checkpoint(upload(hf, s3("errors/hf")), revision="main")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_ACCESS")}
    environment |= {"HOME": str(tmp_path), "AWS_CONFIG_FILE": "/nowhere"}
    command = [sys.executable, "-m", "neox_bridge", "inspect", s3("errors/hf")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no credentials for S3" in done.stderr
    assert "Traceback" not in done.stderr


def test_memory_and_files(hf: Path, neox: Path, tmp_path: Path) -> None:
    run(f"file://{hf}", "memory://memory/neox", tp=2)
    assert_same(contents("memory://memory/neox"), files(neox))
    run("memory://memory/neox", f"file://{tmp_path}/hf")
    run(neox, tmp_path / "hf2")
    assert_same(files(tmp_path / "hf"), files(tmp_path / "hf2"))


def test_another_process_writes_an_object(store: Store, neox: Path, tmp_path: Path) -> None:
    """What it needs and what it returns are pickled."""
    plan = plan_of(neox, tmp_path / "hf")
    execute(plan, str(tmp_path / "hf"))
    file = max(plan.files, key=lambda file: file.size)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        writer = ObjectWriter(s3("process"), s3("marks"), "xxh3_128")
        ((path, written),) = pool.submit(make, Unit((file,), writer)).result().written
    assert contents(s3("process")) == {
        "model.safetensors": (tmp_path / "hf" / file.path).read_bytes()
    }
    assert path == file.path == "model.safetensors"
    assert written.hash == hash_file(str(tmp_path / "hf" / file.path), "xxh3_128")
    assert hash_file(s3("process/model.safetensors"), "xxh3_128") == written.hash


def test_the_hub_is_read_by_ranges(hf: Path, tmp_path: Path) -> None:
    hub = pytest.importorskip("hub_stub")
    stub = hub.Stub()
    stub.make("org/model", **{path.name: path.read_bytes() for path in hf.iterdir()})
    command = [
        sys.executable,
        "-m",
        "neox_bridge",
        "convert",
        "hf://org/model",
        "--revision",
        "main",
    ]
    with hub.serving(stub):
        environment = {**os.environ, "HF_ENDPOINT": stub.url, "HF_HOME": str(tmp_path / "home")}
        for more in ([str(tmp_path / "neox"), "--crc"], [str(tmp_path / "none"), "--dry-run"]):
            stub.seen.clear()
            done = subprocess.run(
                [*command, *more], env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            most = 1 if "--dry-run" in more else 3
            # at the commit that main is at: a branch may move meanwhile
            assert 1 <= stub.count(r"GET /org/model/resolve/\w{40}/model\.safetensors") <= most
    run(hf, tmp_path / "here")
    assert_same(files(tmp_path / "neox"), files(tmp_path / "here"))
    told = json.loads((tmp_path / "neox/global_step0/neox_bridge.json").read_text())["source"]
    assert (told["name"], told["revision"]) == ("org/model", "org/model@main")
    assert not (tmp_path / "home").exists(), "nothing is downloaded into the cache"


def test_no_local_path_is_taken_for_a_url() -> None:
    assert [not paths.is_local(p) for p in ("s3://b/x", "a/b", "C:/x", "/s3://x", "hf://o/n")] == [
        *(True, False, False, False, True)
    ]
    assert paths.plain("file:///a/b") == "/a/b"
    assert paths.plain("s3://b/x/") == "s3://b/x"
    code = (
        "import sys; from neox_bridge.stores import paths; paths.exists('/'); paths.listdir('/');"
        "sys.exit('fsspec' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_folder_is_walked_alike_on_a_disk_and_in_a_store(tmp_path: Path) -> None:
    """A pipe is told apart, which nobody may open; links to folders are not followed."""
    content = {"a.json": b"{}", "b/c.bin": b"12345", "b/d/.gitattributes": b"x"}
    here, there = tmp_path / "folder", "memory://walked/folder"
    for name, data in content.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(data)
        objects.put_small(f"{there}/{name}", data)
    for folder in (str(here), there):
        sizes = dict(paths.walk(folder))
        assert sizes == {f"{folder}/{name}": len(data) for name, data in content.items()}
        states = paths.states([*sizes, f"{folder}/gone"], missing_ok=True)
        assert {path: state.size for path, state in states.items()} == sizes
        with pytest.raises(BridgeError, match="folder/gone was deleted during the run"):
            paths.states([*sizes, f"{folder}/gone"])
    os.mkfifo(here / "pipe")
    (here / "again").symlink_to(here)
    (here / "nowhere").symlink_to(here / "gone")
    (here / "linked.json").symlink_to(here / "a.json")
    sizes = dict(paths.walk(str(here)))
    assert (sizes[f"{here}/pipe"], sizes[f"{here}/linked.json"]) == (None, 2)
    assert len(sizes) == len(content) + 2
    with pytest.raises(BridgeError, match="a named pipe, not a file"):
        paths.open_file(f"{here}/pipe")


def test_a_fixed_copy_leaves_out_the_folder_of_git_alone(tmp_path: Path) -> None:
    for folder in (str(tmp_path / "hf"), "memory://fixed/hf"):
        for name in (".gitattributes", "notes/.gitignore", ".git/HEAD", "config.json"):
            if paths.is_local(folder):
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / name).write_bytes(b"{}")
            else:
                objects.put_small(f"{folder}/{name}", b"{}")
        copies = {
            file.path for file in fixes.other_files(folder, lambda name: name == "config.json")
        }
        assert copies == {".gitattributes", "notes/.gitignore"}


def test_a_stream_fills_gaps_and_puts_sums_where_they_belong() -> None:
    class Parts:
        def __init__(self) -> None:
            self.parts: list[bytes] = []

        def send(self, data: bytearray) -> None:
            self.parts.append(bytes(data))

        def finish(self) -> str:
            return "tag"

        def abandon(self) -> None:
            self.parts.clear()

    upload, size = Parts(), PART_BYTES + 100
    stream = Stream(upload, size, "xxh3_128", frozenset({PART_BYTES + 52}))
    stream.literal(b"head", 0)
    stream.write(b"late", PART_BYTES + 52)
    stream.write(b"tensor", 1000)
    stream.literal(b"0123456789", PART_BYTES + 50)
    found, tag = stream.finish()
    want = bytearray(size)
    want[:4], want[1000:1006], want[PART_BYTES + 50 : PART_BYTES + 60] = (
        *(b"head", b"tensor", b"01late6789"),
    )
    assert upload.parts[0] + upload.parts[1] == want
    assert len(upload.parts[0]) == PART_BYTES
    assert (found, tag) == (xxhash.xxh3_128(want).hexdigest(), "tag")


@pytest.mark.slow
def test_ranges_are_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a tensor lies in 40 files, each read a little at a time in turns."""
    data = np.random.default_rng(0).integers(0, 255, 20 << 20, np.uint8).tobytes()
    fetched: Counter[str] = Counter()

    def fetch(url: str, start: int, end: int) -> bytes:
        fetched[url] += end - start
        return data[start:end]

    monkeypatch.setattr(ranges, "fetch", fetch)
    monkeypatch.setattr(ranges, "look", lambda url: objects.FileState(len(data), ""))
    found, step = ranges.Ranges(), 1 << 18
    buffer = memoryview(bytearray(step))
    for at in range(0, len(data), step):
        assert ranges.Remote("one", found).read_into(buffer, at) == step
        assert buffer == data[at : at + step]
    assert fetched["one"] == len(data)
    assert ranges.Remote("one", found).read_into(buffer, len(data)) == 0
    for at in range(0, len(data) // 2, step):
        for number in range(40):
            ranges.Remote(str(number), found).read_into(buffer, at)
            assert buffer == data[at : at + step]
    assert found.size < ranges.RANGE
    many = sum(fetched.values()) - fetched["one"]
    assert many < 3 * 40 * len(data) // 2, "each would be fetched 32 times as often as once"
    found.close()


def test_columns_of_an_object(tmp_path: Path) -> None:
    """A box with large gaps can't be mapped: it is read half by half."""
    values = np.arange(3000 * 5000, dtype=np.float32).reshape(3000, 5000)
    fsspec.filesystem("memory").pipe_file("/columns", values.tobytes())
    ref = TensorRef("memory://columns", 0, "float32", values.shape)
    context = Context()
    for start, shape in (((0, 7), (3000, 3)), ((10, 100), (200, 2000)), ((2999, 0), (1, 5000))):
        box = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
        assert np.array_equal(load(ref, start, shape, context), values[box])
    turned = TensorRef("memory://columns", 0, "float32", (5000, 3000), (1, 5000))
    assert np.array_equal(load(turned, (4, 5), (60, 2000), context), values.T[4:64, 5:2005])
    context.files.close()


TURNED = np.arange(2048 * 1280, dtype=np.float32).reshape(2048, 1280)


def transpose(monkeypatch: pytest.MonkeyPatch) -> int:
    """Transpose an object on two ranks, with memory for one range. Returns the bytes fetched."""
    data, fetched = TURNED.tobytes(), Counter[str]()

    def fetch(url: str, start: int, end: int) -> bytes:
        fetched[url] += end - start
        return data[start:end]

    monkeypatch.setattr(ranges, "fetch", fetch)
    monkeypatch.setattr(ranges, "look", lambda url: objects.FileState(len(data), ""))
    monkeypatch.setattr(ranges, "MEMORY", ranges.RANGE)
    turned = transposed(whole_of(TensorRef("s3://bucket/turned", 0, "float32", TURNED.shape)))
    context = Context()
    try:
        for low in (0, 640):
            pieces = cut(turned, (low, 0), (640, 2048), (0, 0))
            out = bytearray(len(data) // 2)
            tensor = OutputTensor("turned", "float32", (640, 2048), pieces)
            fill_tensor(tensor, memoryview(out), context)
            assert bytes(out) == np.ascontiguousarray(TURNED.T[low : low + 640]).tobytes()
    finally:
        context.files.close()
    return fetched["s3://bucket/turned"]


def test_a_large_transposed_object_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """If its ranges do not fit into memory, it is copied to a temporary file first."""
    assert transpose(monkeypatch) > 5 * TURNED.nbytes
    monkeypatch.setattr(transform, "_FETCHED_BYTES", TURNED.nbytes - 1)
    assert transpose(monkeypatch) == TURNED.nbytes


def test_no_space_for_a_transposed_object(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(transform, "_FETCHED_BYTES", 0)
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(BridgeError, match=r"turned: .*10,485,760 bytes.*No space.*Set TMPDIR"):
        transpose(monkeypatch)


def test_temporary_copies_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two are kept besides those in use."""
    monkeypatch.setattr(ranges, "fetch", lambda _url, start, end: bytes(end - start))
    monkeypatch.setattr(ranges, "look", lambda _url: objects.FileState(1 << 20, ""))
    files = Files()
    with files.copied("s3://bucket/used", 0, 4) as used:
        fds = []
        for start in range(5):
            with files.copied("s3://bucket/one", start, 4) as fd:
                fds.append(os.fstat(fd).st_ino)
        assert os.pread(used, 9, 0) == bytes(4)
        kept = [os.fstat(handle.fd).st_ino for handle in files._copies._copies.values()]
    assert kept[1:] == fds[2:]
    files.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(used)


@pytest.mark.parametrize("shift", [0, 1, 7])
def test_places_that_the_directory_can_t_tell_are_read(tmp_path: Path, shift: int) -> None:
    """Of files that torch didn't write as they are; bytes between records are refused."""
    torch.save({"a": torch.arange(9.0), "b": torch.arange(70.0)}, tmp_path / "made.pt")
    target = io.BytesIO()
    with zipfile.ZipFile(tmp_path / "made.pt") as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            new.fp.write(b"\0" * shift)  # type: ignore[union-attr]
            new.start_dir = new.fp.tell()  # type: ignore[attr-defined,union-attr]
            new.writestr(zipfile.ZipInfo(info.filename), old.read(info))
    for name, raw in (("torch", (tmp_path / "made.pt").read_bytes()), ("other", target.getvalue())):
        fsspec.filesystem("memory").pipe_file(f"/zip{shift}/{name}.pt", raw)
        (tmp_path / f"{name}.pt").write_bytes(raw)
        paths = f"memory://zip{shift}/{name}.pt", str(tmp_path / f"{name}.pt")
        if shift and name == "other":
            for path in paths:
                with pytest.raises(BridgeError, match="unknown data precedes"):
                    read_pt(path)
            continue
        found, here = map(read_pt, paths)
        assert {k: v.offset for k, v in found.items()} == {k: v.offset for k, v in here.items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", DISAGREED)
def test_zips_on_which_readers_disagree_are_refused_in_a_store(name: str) -> None:
    """Small files are read whole; the headers of large ones' tensors aren't all read."""
    url = f"memory://disagreed/{name}.pt"
    fsspec.filesystem("memory").pipe_file(f"/disagreed/{name}.pt", DISAGREED[name]())
    with pytest.raises(BridgeError, match="different programs could read different contents"):
        read_pt(url)


def test_a_batch_into_a_store(store: Store, hf: Path, tmp_path: Path) -> None:
    """Written and verified by other processes; what is done is skipped, a half-done one goes on."""
    for step in (5, 10):
        run(hf, tmp_path / "run", iteration=step, layout="ranks")
    command = ["batch", str(tmp_path / "run"), s3("batch"), "--max-workers", "1"]
    done = RUNNER.invoke(app, command)
    assert done.exit_code == 0, done.output
    run(tmp_path / "run", tmp_path / "hf")
    assert_same(contents(s3("batch/step10")), files(tmp_path / "hf"))
    store.requests.clear()
    assert RUNNER.invoke(app, command).exit_code == 0
    assert not store.of("PUT")
    objects.remove([s3("batch/step5/model.safetensors")])
    assert RUNNER.invoke(app, command).exit_code == 0
    assert sorted(contents(s3("batch/step5"))) == sorted(files(tmp_path / "hf"))


def test_what_a_batch_verifies_in_a_store_has_its_record(store: Store, tmp_path: Path) -> None:
    """Which isn't there yet; and only it says in which order grouped-query rows are."""
    source = fixture("llama_gqa_fp32_2024_10_old_order_tp1")
    options = ["--to", "neox", "--tp", "2", "--gqa-order", "interleaved"]
    command = ["batch", str(source), s3("batch"), *options, "--max-workers", "1"]
    done = RUNNER.invoke(app, command)
    assert done.exit_code == 0, done.output
    run(s3("batch/step2"), tmp_path / "back")
    there = open_checkpoint(str(source), gqa_order="interleaved")
    assert verify(there, open_checkpoint(str(tmp_path / "back"))).holds


def lose(*names: str, times: int = 10**6) -> Any:
    """PUTs of objects with such names are acknowledged and lost, so many times each."""
    counts: Counter[str] = Counter()

    def spoil(method: str, key: str, query: str) -> str:
        if method == "PUT" and key.endswith(names) and ".neox-bridge/" not in key:
            counts[key] += 1
            return "forget" if counts[key] <= times else ""
        return ""

    return spoil


ENDS = [
    *("layer_02-model_00-model_states.pt", "mp_rank_00_model_states.pt", "neox_bridge.yml"),
    *("neox_bridge.json", "latest", "finetune.yml"),
]


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("pool", [False, True])
def test_an_acknowledged_object_that_is_lost_is_written_again(
    store: Store, hf: Path, neox: Path, name: str, pool: bool
) -> None:
    url = s3(f"lost/{pool}/{name}")
    store.spoil = lose(name, times=1)
    checkpoint = open_checkpoint(str(hf))
    plan = make_plan(checkpoint, Options(tp=2), url)
    with closing(Processes(1)) if pool else nullcontext() as processes:
        execute(plan, url, pool=processes, check=checker(checkpoint))
    assert_names(contents(url), files(neox))
    store.spoil = lambda method, key, query: ""
    assert RUNNER.invoke(app, ["verify", url]).exit_code == 0


def assert_names(store: dict[str, bytes], disk: dict[str, bytes]) -> None:
    assert {n: len(d) for n, d in store.items() if n.endswith(".pt")} == {
        n: len(d) for n, d in disk.items() if n.endswith(".pt")
    }
    assert set(store) == set(disk)


@pytest.mark.parametrize("name", ENDS)
def test_a_store_that_loses_an_object_again_is_named(store: Store, hf: Path, name: str) -> None:
    """It, and not the checkpoint that lacks the object, is what the message is about."""
    url = s3(f"lossy/{name}")
    store.spoil = lose(name)
    done = RUNNER.invoke(app, ["convert", str(hf), url, "--to", "neox", "--tp", "2"])
    assert done.exit_code == 1
    assert f"{name} cannot be written: the store confirmed the object twice" in done.stderr
    assert "Copy the checkpoint again" not in done.stderr
    assert "Run the same command again to continue" in done.stderr
    store.spoil = lambda method, key, query: ""
    done = RUNNER.invoke(app, ["convert", str(hf), url, "--to", "neox", "--tp", "2"])
    assert done.exit_code == 0, done.stderr
    assert RUNNER.invoke(app, ["verify", url]).exit_code == 0


@pytest.mark.parametrize("how", ["deny", "refuse", "slow down"])
def test_a_clean_up_that_fails_is_a_warning(
    store: Store, hf: Path, neox: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target is finished and verified: exit code 0, and what is left is named."""
    url = s3(f"left/{how.replace(' ', '-')}")
    store.spoil = lambda method, key, query: how if method in ("DELETE", "POST") else ""
    done = RUNNER.invoke(app, ["convert", str(hf), url, "--to", "neox", "--tp", "2"])
    assert done.exit_code == 0, done.stderr
    assert "verified bit by bit" in done.stdout
    assert f"is complete, but temporary files could not be deleted from {url}/.neox-bridge" in (
        done.stderr
    )
    store.spoil = lambda method, key, query: ""
    left = {n: d for n, d in contents(url).items() if not n.startswith(".neox-bridge/")}
    assert_names(left, files(neox))
    assert RUNNER.invoke(app, ["verify", url]).exit_code == 0
    command = ["convert", str(hf), url, "--to", "neox", "--tp", "2", "--overwrite"]
    assert RUNNER.invoke(app, command).exit_code == 0
    assert_names(contents(url), files(neox))


def test_a_clean_up_that_fails_hides_no_verdict(store: Store, hf: Path) -> None:
    def check(url: str) -> None:
        raise Unverified("It isn't.")

    store.spoil = lambda method, key, query: "deny" if method in ("DELETE", "POST") else ""
    with pytest.raises(Unverified, match=r"It isn't\. .*without its neox_bridge\.json"):
        execute(plan_of(hf, Path("x")), s3("both-fail"), check=check)


def test_an_old_object_that_cannot_be_removed_is_an_error(store: Store, hf: Path) -> None:
    """It would be read with the new ones."""
    url = s3("stale/hf")
    run(hf, s3("stale/neox"), tp=1)
    run(s3("stale/neox"), url, shard_size=300_000)
    store.spoil = lambda method, key, query: (
        "deny" if method in ("DELETE", "POST") and ("-of-" in key or "delete" in query) else ""
    )
    with pytest.raises(Unreachable, match=r"-of-.*cannot be removed.*kept in"):
        run(s3("stale/neox"), url, overwrite=True)
    store.spoil = lambda method, key, query: ""
    assert "neox_bridge.json" not in contents(url)
    run(s3("stale/neox"), url, overwrite=True)
    assert not [name for name in contents(url) if "-of-" in name]


def test_processes_that_start_after_a_store_was_asked_can_ask_it(store: Store) -> None:
    """Threads of obstore are lost in a fork, and whoever waits for them waits forever."""
    upload_one(s3("fork/x"), b"x")
    code = (
        "from neox_bridge.execution.executors import Processes\n"
        "from neox_bridge.stores import objects\n"
        f"url = {s3('fork/x')!r}\n"
        "if __name__ == '__main__':\n"
        "    assert objects.look(url).size == 1\n"
        "    pool = Processes(1)\n"
        "    assert pool.submit(objects.look, url).result(timeout=30).size == 1\n"
        "    pool.close()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def upload_one(url: str, data: bytes) -> None:
    fs, path = fsspec.core.url_to_fs(url)
    fs.pipe_file(path, data)
