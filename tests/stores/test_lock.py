"""Two runs into one folder of a store: one of them writes."""

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from common import make_hf
from s3_server import Store
from store_files import contents, run, s3

from neox_bridge.errors import BridgeError
from neox_bridge.stores import lock, objects


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEWED_SECONDS", 0.1)
    monkeypatch.setattr(lock, "DEAD_SECONDS", 2.0)
    monkeypatch.setattr(lock, "_SETTLE_SECONDS", 0.05)


def write_lock(url: str, **facts: object) -> None:
    owner = {"run": "other", "machine": "far away", "host": "far", "process": 1, "user": "eve"}
    objects.put_small(f"{url}/.neox-bridge/lock", json.dumps({**owner, **facts}).encode())


def test_a_run_that_is_alive_is_named(store: Store) -> None:
    url = s3("alive")
    with lock.locked(url) as held:
        with pytest.raises(BridgeError, match=r"is being written by another run \(process \d+ of"):
            lock.Lock(held.url).take()
        held.check()
    assert not contents(url)


def test_the_second_of_two_conversions_fails_and_changes_nothing(
    store: Store, tmp_path: Path
) -> None:
    hf, url = make_hf(tmp_path / "hf"), s3("two")
    other = make_hf(tmp_path / "other", seed=1)
    waiting, goes_on = threading.Event(), threading.Event()

    def spoil(method: str, key: str, query: str) -> str:
        if method == "PUT" and "layer_02" in key and not waiting.is_set():
            waiting.set()
        return ""

    store.spoil = spoil
    original = objects.put_small

    def slow(target: str, data: bytes) -> None:
        if target.endswith("neox_bridge.json"):
            goes_on.wait(60)
        original(target, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neox_bridge.execution.object_store.put_small", slow)
        first = threading.Thread(target=run, args=(hf, url), kwargs={"tp": 2})
        first.start()
        assert waiting.wait(60)
        with pytest.raises(BridgeError, match="is being written by another run"):
            run(other, url, tp=2, overwrite=True)
        goes_on.set()
        first.join()
    run(hf, s3("alone"), tp=2)
    names = [name for name in contents(s3("alone")) if name.endswith(".pt")]
    assert names
    written, alone = contents(url), contents(s3("alone"))
    assert set(written) == set(alone)
    assert all(written[name] == alone[name] for name in names)


def test_a_lock_that_nobody_renews_is_taken_over(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a run on another machine, which was killed."""
    url = s3("dead")
    write_lock(url)
    with caplog.at_level(logging.WARNING), lock.locked(url) as held:
        held.check()
    assert "process 1 of eve on far" in caplog.text
    assert "taking over" in caplog.text
    assert not contents(url)


def test_a_lock_that_cannot_be_read_is_taken_over(store: Store) -> None:
    url = s3("unreadable")
    objects.put_small(f"{url}/.neox-bridge/lock", b"{")
    with lock.locked(url) as held:
        held.check()


def test_a_process_of_this_machine_that_ended_is_not_waited_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "DEAD_SECONDS", 600.0)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    url = s3("ended")
    write_lock(url, machine=lock._machine(), process=process.pid)
    with lock.locked(url) as held:
        held.check()


def test_a_lock_that_this_process_left_is_not_waited_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store did not let it be removed; the next run is of the same process, which is alive."""

    def refuse(_: list[str]) -> None:
        raise BridgeError("Not now.")

    url = s3("left")
    with monkeypatch.context() as patched:
        patched.setattr(lock, "remove", refuse)
        with lock.locked(url):
            pass
    assert contents(url)
    monkeypatch.setattr(lock, "DEAD_SECONDS", 600.0)
    with lock.locked(url) as held:
        held.check()


def test_a_run_that_lost_its_lock_does_not_finish(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was suspended for so long that another one took its target over."""
    hf, url = make_hf(tmp_path / "hf"), s3("suspended")

    def put_mark(target: str, data: bytes) -> None:
        original(target, data)
        write_lock(url)

    original = objects.put_small
    monkeypatch.setattr("neox_bridge.execution.object_store.put_small", put_mark)
    with pytest.raises(BridgeError, match="was taken over by another run"):
        run(hf, url, tp=1)
    left = contents(url)
    assert not [name for name in left if name.endswith(("neox_bridge.json", "latest"))]
    assert json.loads(left[".neox-bridge/lock"])["run"] == "other"


def test_an_answer_that_was_lost_is_no_other_run(store: Store) -> None:
    seen: list[str] = []

    def spoil(method: str, key: str, query: str) -> str:
        if method == "PUT" and key.endswith("/lock") and not seen:
            seen.append(key)
            return "lost"
        return ""

    store.spoil = spoil
    with lock.locked(s3("answer")) as held:
        held.check()
    assert seen


def test_a_server_that_knows_no_conditions_is_asked_otherwise(store: Store) -> None:
    """Of those of S3 that are not Amazon's."""
    url, asked = s3("conditions/x"), list[str]()

    def spoil(method: str, key: str, _query: str) -> str:
        # the server logs a request after its answer, when the next one may be there
        if method == "HEAD":
            asked.append(key)
        return "unknown" if method == "PUT" and not asked else ""

    store.spoil = spoil
    assert objects.put_if_absent(url, b"1")
    asked.clear()
    assert not objects.put_if_absent(url, b"2")
    store.spoil = lambda *_: ""
    assert objects.fetch(url, 0, 1) == b"1"
