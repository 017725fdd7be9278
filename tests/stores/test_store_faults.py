"""A store that fails in the ways that stores do, over HTTP: the target is right, or not there."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from common import make_hf, plan_of
from s3_server import Store, one_in_four
from store_files import WIDE, assert_same, contents, files, run, s3, unfinished_uploads, upload

from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError, Unreachable
from neox_bridge.execution.execute import execute
from neox_bridge.stores import objects

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose embeddings need two parts of an upload."""
    return make_hf(tmp_path_factory.mktemp("faults") / "hf", num_hidden_layers=1, **WIDE)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("faults") / "hf")


def once(how: str, *methods: str, query: str = "", key: str = "") -> Any:
    """Spoils the first request of these methods to each key, and no other."""
    seen: set[tuple[str, str]] = set()

    def spoil(method: str, path: str, asked: str) -> str:
        fits = method in methods and query in asked and key in path
        if not fits or (method, path + asked) in seen:
            return ""
        seen.add((method, path + asked))
        return how

    return spoil


def test_internal_errors_are_tried_again(store: Store, small: Path, tmp_path: Path) -> None:
    run(small, tmp_path / "neox", tp=2)
    store.spoil = one_in_four("error")
    run(small, s3("error/neox"), tp=2)
    assert sum(r.spoiled == "error" for r in store.requests) > 10
    store.spoil = lambda *_: ""
    assert_same(contents(s3("error/neox")), files(tmp_path / "neox"))


def test_errors_that_stay_name_the_object_and_leave_no_record(store: Store, small: Path) -> None:
    store.spoil = lambda method, key, _: (
        "error" if method in ("PUT", "POST") and "layer_02-model_01" in key else ""
    )
    done = RUNNER.invoke(app, ["convert", str(small), s3("stays/neox"), "--tp", "2"])
    assert done.exit_code == 1
    assert "layer_02-model_01-model_states.pt cannot be written" in done.output
    assert not [name for name in contents(s3("stays/neox")) if name.endswith("neox_bridge.json")]
    store.spoil = lambda *_: ""
    assert RUNNER.invoke(app, ["verify", s3("stays/neox")]).exit_code == 1
    assert RUNNER.invoke(app, ["convert", str(small), s3("stays/neox"), "--tp", "2"]).exit_code == 0
    assert RUNNER.invoke(app, ["verify", s3("stays/neox")]).exit_code == 0


def test_a_lost_answer_to_the_end_of_an_upload(store: Store, wide: Path, tmp_path: Path) -> None:
    run(wide, tmp_path / "neox")
    store.spoil = once("lost", "POST", query="uploadId=")
    run(wide, s3("lost/complete"))
    assert {r.method for r in store.requests if r.spoiled} == {"POST"}
    store.spoil = lambda *_: ""
    assert_same(contents(s3("lost/complete")), files(tmp_path / "neox"))
    assert unfinished_uploads() == []
    assert RUNNER.invoke(app, ["verify", s3("lost/complete")]).exit_code == 0


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_lost_answers_to_what_was_done(
    method: str, store: Store, wide: Path, tmp_path: Path
) -> None:
    run(wide, tmp_path / "neox")
    run(wide, s3(f"lost/{method}"), dtype="bfloat16")
    store.spoil = once("lost", method)
    run(wide, s3(f"lost/{method}"), overwrite=True)
    assert sum(r.spoiled == "lost" for r in store.requests) > 0
    store.spoil = lambda *_: ""
    assert_same(contents(s3(f"lost/{method}")), files(tmp_path / "neox"))
    assert unfinished_uploads() == []


def test_an_upload_that_fails_in_the_middle_is_aborted(store: Store, wide: Path) -> None:
    store.spoil = lambda method, key, query: "error" if "partNumber=2" in query else ""
    with pytest.raises(Unreachable):
        run(wide, s3("middle"))
    assert any("partNumber=1" in r.query and not r.spoiled for r in store.requests)
    store.spoil = lambda *_: ""
    assert unfinished_uploads() == []
    assert not [name for name in contents(s3("middle")) if name.endswith("neox_bridge.json")]


def test_a_source_that_changes_between_its_parts_is_an_error(
    store: Store, wide: Path, tmp_path: Path
) -> None:
    """The size stays the same, and every range is answered: only the tag tells."""
    url = upload(wide, s3("changes/hf"))
    objects.forget(url)
    plan = plan_of(url, tmp_path / "neox")  # type: ignore[arg-type]
    store.spoil = once("change", "GET", key="model.safetensors")
    with pytest.raises(BridgeError, match=r"model\.safetensors .*changed"):
        execute(plan, str(tmp_path / "neox"))
    assert any(r.spoiled == "change" for r in store.requests)
    assert not (tmp_path / "neox").exists()


def test_short_answers_are_noticed(store: Store, wide: Path, tmp_path: Path) -> None:
    url = upload(wide, s3("short/hf"))
    objects.forget(url)
    store.spoil = once("short", "GET", key="model.safetensors")
    run(url, tmp_path / "neox")
    assert any(r.spoiled == "short" for r in store.requests)
    run(wide, tmp_path / "disk")
    assert_same(files(tmp_path / "neox"), files(tmp_path / "disk"))


def test_listings_that_lag_behind_end_in_the_right_files_or_in_none(
    store: Store, small: Path, tmp_path: Path
) -> None:
    run(small, tmp_path / "neox", tp=2)
    store.spoil = lambda method, _key, query: (
        "stale" if method == "GET" and ("list-type" in query or "prefix" in query) else ""
    )
    done = RUNNER.invoke(app, ["convert", str(small), s3("stale/neox"), "--tp", "2"])
    assert any(r.spoiled == "stale" for r in store.requests)
    store.spoil = lambda *_: ""
    left = contents(s3("stale/neox"))
    has_record = any(name.endswith("neox_bridge.json") for name in left)
    assert has_record == (done.exit_code == 0), done.output
    if has_record:
        kept = {n: d for n, d in left.items() if not n.startswith(".neox-bridge/")}
        assert_same(kept, files(tmp_path / "neox"))
        return
    objects.forget(s3("stale/neox"))
    done = RUNNER.invoke(app, ["convert", str(small), s3("stale/neox"), "--tp", "2"])
    assert done.exit_code == 0, done.output
    assert_same(contents(s3("stale/neox")), files(tmp_path / "neox"))


def test_an_overwrite_that_fails_leaves_no_old_record(
    store: Store, small: Path, tmp_path: Path
) -> None:
    """An old record beside new files would say that they are whole."""
    url = s3("old/neox")
    run(small, url, tp=2)
    other = make_hf(tmp_path / "other", seed=1)
    store.spoil = lambda method, key, _: (
        "refuse" if method in ("PUT", "POST") and "layer_03" in key else ""
    )
    with pytest.raises(Unreachable):
        run(other, url, tp=2, overwrite=True)
    store.spoil = lambda *_: ""
    assert not [name for name in contents(url) if name.endswith("neox_bridge.json")]
    done = RUNNER.invoke(app, ["verify", url])
    assert done.exit_code == 1
    run(other, url, tp=2, overwrite=True)
    run(other, tmp_path / "neox", tp=2)
    assert_same(contents(url), files(tmp_path / "neox"))
