"""The pool of a Ray cluster, with a Ray that does as it is told; the real one is in test_ray."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from common import make_hf, plan_of

from neox_bridge.errors import BridgeError, Unverified
from neox_bridge.execution import ray_cluster, ray_connect, ray_node
from neox_bridge.execution.output import DiskWriter
from neox_bridge.execution.placement import (
    Places,
    View,
    choose,
    local_bytes,
    places_of,
    reaches,
    unseen,
)
from neox_bridge.execution.ray_cluster import RayCluster
from neox_bridge.execution.units import Unit, make

ray: Any = pytest.importorskip("ray") if find_spec("ray") else None
needs_ray = pytest.mark.skipif(ray is None, reason="Ray isn't installed")


# --- which node ------------------------------------------------------------------------------


def view(*lacks: str, own: bool = False) -> View:
    return View(frozenset(lacks), own)


def test_who_sees_all_is_chosen_and_of_those_who_has_most() -> None:
    places = Places({"/a/x": 10, "/b/y": 30}, writes=("/out",))
    views = {
        "blind": {"/a": view("x", own=True), "/b": view(own=True), "/out": view()},
        "no target": {"/a": view(own=True), "/b": view(own=True), "/out": View(None)},
        "far": {"/a": view(), "/b": view(), "/out": view("unfinished")},
        "some": {"/a": view("z", own=True), "/b": view(), "/out": view()},
        "most": {"/a": view(), "/b": view(own=True), "/out": view()},
    }
    free = dict.fromkeys(views, 1)
    assert choose(places, views, free) == "most"
    assert choose(places, views, free | {"most": 0}) == "some"
    assert choose(places, views, free | {"most": 0, "some": 0}) == "far"
    assert choose(places, views, free | {"most": 0, "some": 0, "far": 0}) is None
    assert {name: unseen(places, seen) for name, seen in views.items()} == {
        "blind": ["/a/x"],
        "no target": ["/out"],
        "far": [],
        "some": [],
        "most": [],
    }
    assert local_bytes(places, views["most"]) == 30


def test_of_equals_the_least_busy_is_chosen() -> None:
    views = {name: {"/a": view()} for name in "abc"}
    assert choose(Places({"/a/x": 1}), views, {"a": 1, "b": 3, "c": 2}) == "b"


def test_a_folder_whose_files_are_read_must_be_the_same_one() -> None:
    places = Places(folders=("/a",))
    assert unseen(places, {"/a": view("x")}) == ["/a/x"]
    assert unseen(places, {"/a": view()}) == []
    assert unseen(places, {"/a": View(None)}) == ["/a"]


def test_a_unit_reaches_the_sources_of_its_files_and_no_others(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf", torch.float32)
    plan = plan_of(source, tmp_path / "neox", dtype="float16")
    total: Counter[str] = Counter()
    for file in plan.files:
        unit = Unit((file,), DiskWriter("/files", "/attempts", False, None, False))
        places = places_of(make, (unit,))
        assert (places.folders, places.writes) == ((), ("/attempts",))
        total.update(places.files)
    weights = source / "model.safetensors"
    data = weights.read_bytes()
    assert total.pop(str(weights)) == len(data) - 8 - int.from_bytes(data[:8], "little")
    assert total == {file.copy_of: file.size for file in plan.files if file.copy_of is not None}


# --- what a node does ------------------------------------------------------------------------


def test_what_a_call_raises_comes_as_it_is() -> None:
    def ask(call: Callable[..., Any], *args: Any) -> Any:
        return ray_node.pickle.loads(ray_node.perform(ray_node.packed(call, args), "/"))

    assert ask(divmod, 7, 2) == (True, (3, 1))
    good, error = ask(_refuse, "words")
    assert (good, type(error), str(error)) == (False, Unverified, "words")
    good, error = ask(_odd)
    assert (good, type(error), str(error)) == (False, BridgeError, "_Odd: 1 and 2")


def _refuse(words: str) -> None:
    raise Unverified(words)


class _Odd(Exception):
    """One that pickle can't make again."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def _odd() -> None:
    raise _Odd(1, 2)


def test_a_call_that_has_begun_ends_although_it_is_cancelled() -> None:
    """Ray cancels a task by an interrupt, and repeats no cancelled one."""
    handler = signal.getsignal(signal.SIGINT)
    data = ray_node.perform(ray_node.packed(os.kill, (os.getpid(), signal.SIGINT)), "/")
    assert ray_node.pickle.loads(data) == (True, None)
    assert signal.getsignal(signal.SIGINT) is handler, "processes started later would inherit it"


def test_a_look_finds_what_is_another_file_or_none(tmp_path: Path) -> None:
    for name in ("same", "longer", "older", "gone"):
        (tmp_path / name).write_bytes(b"abc")
    (tmp_path / "link").symlink_to("same")
    wanted = {str(tmp_path): ray_node.listed(str(tmp_path)), "/no/such": {}}
    (tmp_path / "longer").write_bytes(b"abcd")
    (tmp_path / "gone").unlink()
    ray_node.os.utime(tmp_path / "older", (1, 1))
    (tmp_path / "more").touch()
    found = ray_node.look(wanted)
    assert found[str(tmp_path)].missing == {"longer", "older", "gone"}
    assert found["/no/such"] == View(None)


def test_a_disk_is_a_nodes_own_unless_its_mount_is_a_networks() -> None:
    mounts = {"/": "overlay", "/data": "xfs", "/data/nfs": "nfs4", "/s3": "fuse.rclone"}
    own = {path: ray_node._is_local(path, mounts) for path in ("/home/x", "/data/a", "/database")}
    assert own == {"/home/x": True, "/data/a": True, "/database": True}
    assert not ray_node._is_local("/data/nfs/a/b", mounts)
    assert not ray_node._is_local("/s3/bucket", mounts)
    assert not ray_node._is_local("/s3/bucket", {})  # where the system doesn't tell


def test_the_code_of_a_node() -> None:
    mine = ray_node.asker()()
    assert ray_connect.difference(ray_node.asker()(), mine) == ""
    assert "cannot import neox-bridge (No module" in ray_connect.difference(
        (None, "No module"), mine
    )
    assert "has neox-bridge 0.0.1, and" in ray_connect.difference(("abc", "0.0.1"), mine)
    assert "has different code" in ray_connect.difference(("abc", mine[1]), mine)


# --- the pool --------------------------------------------------------------------------------


@dataclass
class Fake:
    """A Ray of some nodes. sees: by node, what it answers to a look; all where it isn't there.

    fail: by node, the exceptions that its next tasks end with, and are repeated after as Ray does.
    hold: tasks wait for it. cancelled: whether tasks were, which are not repeated then.
    joined: whether this process had joined before. silent: whether no node answers.
    """

    cpus: dict[str, int]
    sees: dict[str, dict[str, View]] = field(default_factory=dict)
    fail: dict[str, list[Exception]] = field(default_factory=dict)
    codes: dict[str, tuple[str | None, str]] = field(default_factory=dict)
    hold: threading.Event = field(default_factory=threading.Event)
    ran: list[str] = field(default_factory=list)
    most: int = 0
    running: int = 0
    lost: Exception | None = None
    cancelled: bool = False
    joined: bool = True
    silent: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def exceptions(self) -> Any:
        return ray.exceptions

    def nodes(self) -> list[dict[str, Any]]:
        if self.lost is not None:
            raise self.lost
        return [
            {
                "NodeID": name.encode().hex().ljust(56, "0"),
                "Alive": True,
                "Resources": {"CPU": count},
                "NodeManagerAddress": name,
            }
            for name, count in self.cpus.items()
        ]

    def remote(self, call: Callable[..., Any]) -> "Task":
        return Task(self, call, "", 0)

    def cancel(self, _: "Task") -> None:
        self.cancelled = True

    def is_initialized(self) -> bool:
        return self.joined

    def init(self, _address: str, **_options: Any) -> None:
        if not self.cpus:
            raise ConnectionError("no head")

    def shutdown(self) -> None:
        return

    def wait(self, tasks: list["Task"], **_: Any) -> tuple[list["Task"], list["Task"]]:
        return ([], tasks) if self.silent else (tasks, [])

    def get(self, task: "Task") -> Any:
        return task.inner.result(20)


@dataclass(eq=False)
class Task:
    ray: Fake
    call: Callable[..., Any]
    node: str
    retries: int

    def options(self, **options: Any) -> "Task":
        name = bytes.fromhex(options["scheduling_strategy"].node_id).rstrip(b"\0").decode()
        return Task(self.ray, self.call, name, options["max_retries"])

    def remote(self, *args: Any) -> "Task":
        self.inner: Future[Any] = Future()
        threading.Thread(target=self._run, args=args, daemon=True).start()
        return self

    def future(self) -> "Future[Any]":
        return self.inner

    def _run(self, *args: Any) -> None:
        own = self.ray
        if self.call is ray_node.look:
            told = {folder: View(frozenset()) for folder in args[0]}
            return self.inner.set_result(told | own.sees.get(self.node, {}))
        if self.call is not ray_node.perform:
            return self.inner.set_result(own.codes.get(self.node) or self.call())
        with own.lock:
            own.ran.append(self.node)
            own.running += 1
            own.most = max(own.most, own.running)
            error = own.fail[self.node].pop(0) if own.fail.get(self.node) else None
        own.hold.wait(30)
        result = error or ray_node.perform(*args)
        with own.lock:
            own.running -= 1
        final = isinstance(error, (ray.exceptions.NodeDiedError, ray.exceptions.RayTaskError))
        if error and self.retries and not final and not own.cancelled:
            self.retries -= 1
            return self._run(*args)
        if error:
            return self.inner.set_exception(error)
        return self.inner.set_result(result)


@reaches(lambda path, *_: Places({path: 1}))
def name_of(path: str, number: int = 0) -> tuple[str, int]:
    return path, number


@contextlib.contextmanager
def joined(
    monkeypatch: pytest.MonkeyPatch, fake: Fake, workers: int | None = None
) -> Iterator[tuple[RayCluster, list[str]]]:
    words: list[str] = []
    monkeypatch.setattr(ray_cluster, "ray_module", lambda: fake)
    monkeypatch.setattr(
        ray_cluster, "connect", lambda *_: (False, {node["NodeID"] for node in fake.nodes()})
    )
    monkeypatch.setattr(ray_cluster, "_LISTEN_SECONDS", 0.05)
    pool = RayCluster("auto", workers, words.append)
    try:
        yield pool, words
    finally:
        fake.hold.set()
        pool.close()


def ended(*futures: "Future[Any]") -> list[Any]:
    return [future.result(20) for future in futures]


@needs_ray
def test_calls_go_where_their_files_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there, path = str(tmp_path), str(tmp_path / "x")
    fake = Fake({"near": 2, "far": 2, "blind": 4})
    fake.sees = {"near": {there: view(own=True)}, "blind": {there: view("x")}}
    fake.hold.set()
    with joined(monkeypatch, fake) as (pool, _):
        for number in range(6):  # one at a time: the nearest is always free
            assert ended(pool.submit(name_of, path, number)) == [(path, number)]
        assert set(fake.ran) == {"near"}
        fake.hold.clear()
        futures = [pool.submit(name_of, path, number) for number in range(6)]
        until(lambda: fake.running == 4)
        fake.hold.set()
        assert ended(*futures) == [(path, number) for number in range(6)]
    assert set(fake.ran) == {"near", "far"}


@needs_ray
def test_what_no_node_sees_is_an_error_that_names_node_and_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there, path = str(tmp_path), str(tmp_path / "x")
    fake = Fake({"one": 1, "two": 1}, {"one": {there: view("x")}, "two": {there: View(None)}})
    with joined(monkeypatch, fake) as (pool, _):
        with pytest.raises(BridgeError, match=f"node (one|two) cannot read {path}.*rsync -a"):
            pool.submit(name_of, path).result(20)
        fake.sees["two"] = {}  # it was mounted meanwhile
        fake.hold.set()
        assert ended(pool.submit(name_of, path)) == [(path, 0)]
    assert fake.ran == ["two"]


@needs_ray
def test_never_more_are_with_ray_than_there_are_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake({"one": 2, "two": 2})
    with joined(monkeypatch, fake, workers=3) as (pool, _):
        assert pool.slots == 3
        futures = [pool.submit(name_of, "/x", number) for number in range(50)]
        until(lambda: fake.running == 3)
        fake.hold.set()
        assert ended(*futures) == [("/x", number) for number in range(50)]
    assert fake.most == 3
    assert len(fake.ran) == 50


@needs_ray
def test_a_call_whose_worker_is_lost_is_made_again_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost = [ray.exceptions.WorkerCrashedError() for _ in range(2)]
    fake = Fake({"one": 1}, fail={"one": list(lost)})
    fake.hold.set()
    with joined(monkeypatch, fake) as (pool, _):
        assert ended(pool.submit(name_of, "/x")) == [("/x", 0)]
        assert fake.ran == ["one"] * 3
        fake.fail = {"one": [ray.exceptions.OutOfMemoryError("no memory"), *lost]}
        with pytest.raises(BridgeError, match=r"lost 3 times, the last on node one.*`workers=`"):
            pool.submit(name_of, "/x").result(20)


@needs_ray
def test_a_call_that_needs_more_memory_than_there_is_names_no_number_of_tries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray decides itself how often it repeats such a call."""
    fake = Fake({"one": 1}, fail={"one": [ray.exceptions.OutOfMemoryError("no memory")] * 3})
    fake.hold.set()
    with joined(monkeypatch, fake) as (pool, _):
        words = r"was lost on node one: no memory\. If memory ran out.*`workers=`"
        with pytest.raises(BridgeError, match=words):
            pool.submit(name_of, "/x").result(20)


@needs_ray
def test_a_node_on_which_the_code_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that cannot be unpickled there is not repeated."""
    error = ray.exceptions.RayTaskError("perform", "Traceback:\nImportError: no numpy", None)
    fake = Fake({"one": 1}, fail={"one": [error]})
    fake.hold.set()
    with joined(monkeypatch, fake) as (pool, _):
        with pytest.raises(BridgeError, match=r"Node one .* cannot run .*: ImportError"):
            pool.submit(name_of, "/x").result(20)
        assert fake.ran == ["one"]


@needs_ray
@pytest.mark.parametrize(
    ("fake", "words"),
    [
        (
            Fake({"one": 1}, codes={"one": ("other", "0.0.1")}),
            r"In the Ray cluster, node one has neox-bridge 0\.0\.1, .*runtime_env of the ray\.init",
        ),
        (
            Fake({"one": 1}, codes={"one": ("other", "0.0.1")}, joined=False),
            r"node one has neox-bridge 0\.0\.1, .*on every node: .*pip install",
        ),
        (Fake({"one": 1, "two": 1}, silent=True), r"None of the 2 nodes .* answers.*`ray status`"),
    ],
)
def test_nodes_that_cannot_be_used(fake: Fake, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_connect, "ray_module", lambda: fake)
    monkeypatch.setattr(ray_connect, "guard", lambda: None)
    with pytest.raises(BridgeError, match=words):
        ray_connect.connect("local", 1)


@needs_ray
@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("local", r"Ray cannot be started here \(no head\)\. Use `executor=local`"),
        ("auto", r"no Ray cluster running here \(no head\)\. Start one with `ray start --head`"),
    ],
)
def test_a_ray_that_does_not_start(
    address: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_connect, "ray_module", lambda: Fake({}, joined=False))
    monkeypatch.setattr(ray_connect, "guard", lambda: None)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(BridgeError, match=words):
        ray_connect.connect(address, None)


@needs_ray
def test_a_node_that_died_gets_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    died = ray.exceptions.NodeDiedError("gone")
    fake = Fake({"one": 4, "two": 1}, fail={"one": [died] * 4})
    with joined(monkeypatch, fake) as (pool, words):
        futures = [pool.submit(name_of, "/x", number) for number in range(8)]
        until(lambda: fake.running == 5)
        fake.hold.set()
        assert ended(*futures) == [("/x", number) for number in range(8)]
        assert Counter(fake.ran) == {"one": 4, "two": 8}
        assert words == ["Ray: node one was lost; its work is repeated"]
        assert pool.slots == 1
        del fake.cpus["one"]
        fake.cpus["three"] = 3
        until(lambda: pool.slots == 4)


@needs_ray
def test_only_what_waits_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake({"one": 1})
    with joined(monkeypatch, fake) as (pool, _):
        futures = [pool.submit(name_of, "/x", number) for number in range(5)]
        until(lambda: fake.running == 1)
        assert [future.cancel() for future in futures] == [False, True, True, True, True]
        until(lambda: len(wait(futures, 0).done) == 4)
        fake.hold.set()
        assert not wait(futures, 20).not_done
        assert ended(futures[0]) == [("/x", 0)]
    assert fake.ran == ["one"]


@needs_ray
def test_who_stops_waits_for_none_to_be_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake({"one": 1}, fail={"one": [ray.exceptions.WorkerCrashedError()]})
    with joined(monkeypatch, fake) as (pool, _):
        future = pool.submit(name_of, "/x")
        until(lambda: fake.running == 1)
        pool.stopped.set()
        until(lambda: fake.cancelled)
        fake.hold.set()
        with pytest.raises(BridgeError, match="was stopped"):
            future.result(20)
    assert fake.ran == ["one"]


@needs_ray
def test_a_node_that_joins_with_other_code_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake({"one": 1}, codes={"two": ("other", "0.0.1")})
    fake.hold.set()
    with joined(monkeypatch, fake) as (pool, words):
        fake.cpus["two"] = 7
        until(lambda: bool(words))
        assert "node two has neox-bridge 0.0.1, and this is" in words[0]
        assert ended(*[pool.submit(name_of, "/x", n) for n in range(9)])
        assert pool.slots == 1
    assert set(fake.ran) == {"one"}


@needs_ray
def test_without_a_node_calls_wait_a_while_and_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake({"one": 1}, fail={"one": [ray.exceptions.NodeDiedError("gone")]})
    fake.hold.set()
    with joined(monkeypatch, fake) as (pool, _):
        future = pool.submit(name_of, "/x")
        until(lambda: bool(fake.ran))
        assert not wait([future], 0.3).done
        del fake.cpus["one"]
        fake.cpus["two"] = 1
        assert ended(future) == [("/x", 0)]
        fake.cpus.clear()
        until(lambda: not pool._members)
        monkeypatch.setattr(ray_cluster, "_PATIENCE_SECONDS", 0.1)
        with pytest.raises(BridgeError, match="no usable node left"):
            pool.submit(name_of, "/x").result(20)


@needs_ray
def test_a_lost_cluster_ends_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake({"one": 1})
    with joined(monkeypatch, fake) as (pool, _):
        futures = [pool.submit(name_of, "/x", number) for number in range(3)]
        until(lambda: fake.running == 1)
        fake.lost = ray.exceptions.RpcError("the head is gone")
        for future in futures:
            with pytest.raises(BridgeError, match=r"Ray cluster is lost: the head is gone"):
                future.result(20)
        with pytest.raises(BridgeError, match="lost"):
            pool.submit(name_of, "/x")


@needs_ray
def test_what_nodes_see_is_forgotten_when_nobody_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake({"one": 2})
    fake.hold.set()
    with joined(monkeypatch, fake) as (pool, _):
        ended(*[pool.submit(name_of, f"/{number}/x") for number in range(50)])
        until(lambda: not pool._needed)
        assert [member.views for member in pool._members.values()] == [{}]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://head:10001", "Ray Client is not supported"),
        ("127.0.0.1:1", r"no Ray cluster at 127\.0\.0\.1:1 .*ray start --head"),
        ("head:port", "`address=head:port`: not HOST:PORT"),
    ],
)
@needs_ray
def test_an_address_where_no_cluster_is(address: str, words: str) -> None:
    with pytest.raises(BridgeError, match=words):
        ray_connect.connect(address, None)


@needs_ray
def test_a_cluster_that_ran_here_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(BridgeError, match=r"There is no Ray cluster at [\d.]+:1 "):
        ray_connect.connect("auto", None)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BridgeError, match=r"Install it on every node: .*pip install .*\[ray\]"):
        RayCluster()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)
