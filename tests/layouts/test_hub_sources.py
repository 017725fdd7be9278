"""Where a model of the Hub is read from, and what is said if it is not there. In this process."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_stub import Stub, serving, use
from published import PUBLISHED

from neox_bridge.api import open_checkpoint
from neox_bridge.errors import BridgeError, Unreachable, UsageError
from neox_bridge.layouts.hub_cache import snapshot_of
from neox_bridge.layouts.hub_download import cached_snapshot, download
from neox_bridge.layouts.hub_source import find_source, find_url_source, look_up
from neox_bridge.layouts.hub_tokenizer import published_tokenizer, with_published_tokenizer
from neox_bridge.stores import retry

RAW, TWIN = "EleutherAI/neox-ckpt-pythia-160m", "EleutherAI/pythia-160m"
FLAT = PUBLISHED / "v1_dp4_intervals" / "flat"
COMMIT = "a" * 40


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stub]:
    monkeypatch.setattr(retry, "FIRST_SECONDS", 0.001)
    published_tokenizer.cache_clear()
    with serving(Stub()) as stub:
        use(stub, monkeypatch, tmp_path)
        yield stub
    published_tokenizer.cache_clear()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    published_tokenizer.cache_clear()


def unplug(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server answers from now on."""
    from huggingface_hub import constants

    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    template = f"{nowhere}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def cached(tmp_path: Path, repo: str, *files: str, ref: str = "main") -> Path:
    """A snapshot in the cache, with these empty files."""
    root = tmp_path / "cache" / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / ref).write_text(COMMIT)
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in files:
        (snapshot / name).write_text("{}")
    return snapshot


# --- the cache


def test_folders_of_the_cache_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "datasets--org--words" / "snapshots" / COMMIT).mkdir(parents=True)
    with pytest.raises(BridgeError, match="words is a dataset in the Hugging Face cache, not a mo"):
        snapshot_of(str(tmp_path / "datasets--org--words"))
    snapshot = cached(tmp_path, "org/model")
    (snapshot.parents[1] / "refs" / "main").write_text("b" * 40)
    with pytest.raises(BridgeError) as caught:
        snapshot_of(str(snapshot.parents[1]))
    assert f"the snapshot {'b' * 40} that its refs/main names is missing" in str(caught.value)
    assert str(caught.value).endswith(f"Name one of its snapshots: {snapshot}")


def test_what_is_not_in_the_cache(offline: None, tmp_path: Path) -> None:
    with pytest.raises(BridgeError) as caught:
        find_source("org/model", "step3")
    assert f"org/model@step3 is not in the cache ({tmp_path / 'cache'})." in str(caught.value)
    assert str(caught.value).endswith("hf download org/model --revision step3")
    snapshot = cached(tmp_path, "org/model")
    assert find_source("org/model", None).path == str(snapshot)
    with pytest.raises(BridgeError) as caught:
        find_source("org/model", "step3")
    assert "org/model@step3 is not in the cache: " in str(caught.value)
    assert f"has no revision step3. Name one of its snapshots: {snapshot}" in str(caught.value)


def test_without_a_network_the_cache_is_read(
    hub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unplug(monkeypatch)
    with pytest.raises(BridgeError, match=r"org/model is not in the cache, and the Hub cannot be"):
        download("org/model", None)
    with pytest.raises(Unreachable, match="the Hub cannot be reached"):
        find_source("org/model", None)
    snapshot = cached(tmp_path, "org/model")
    source = find_source("org/model", None)
    (finding,) = source.findings
    assert (source.path, finding.code) == (str(snapshot), "read-from-cache")


# --- the Hub


def test_names_that_are_not_there(hub: Stub) -> None:
    hub.put_files(RAW, "step8", FLAT)
    for repo, revision, words in (
        (RAW, "step9", f"{RAW} has no step9. The nearest of 1 step: step8."),
        (RAW, "new", f"{RAW} has no branch, tag or commit new. It has step8."),
        ("EleutherAI/neox-ckpt-pythia-160", None, f"Did you mean {RAW}?"),
        ("org/absent", None, "org/absent: "),
    ):
        with pytest.raises(BridgeError) as caught:
            look_up(repo, revision)
        assert words in str(caught.value)


def test_a_file_that_the_hub_refuses(hub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.make("org/model", **{"config.json": b"{}"})
    hub.repos["org/model"].gated = True
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(BridgeError, match=r"org/model is gated\. Request access on its page"):
        download("org/model", None)


def test_revisions_without_a_model(hub: Stub) -> None:
    hub.make("org/notes", **{"README.md": b"soon"})
    with pytest.raises(BridgeError, match=r"org/notes@main does not contain a checkpoint\. Check"):
        find_source("org/notes", None)
    hub.put_files(RAW, "step8", FLAT)
    hub.put_files(RAW, "step16", FLAT)
    with pytest.raises(BridgeError) as caught:
        find_source(RAW, None)
    assert "It has 2 steps as branches, from step8 to step16." in str(caught.value)
    assert str(caught.value).endswith(f"Name one: {RAW}@step16")


def test_a_repository_that_was_renamed(hub: Stub) -> None:
    hub.put_files(RAW, "step8", FLAT)
    hub.renamed["EleutherAI/old"] = RAW
    source = find_source("EleutherAI/old", "step8")
    (finding,) = source.findings
    assert (source.repo, finding.code) == (RAW, "renamed-repository")
    assert f"EleutherAI/old is called {RAW} now." in f"{finding.message}."


@pytest.mark.parametrize(
    ("url", "revision", "kind", "words"),
    [
        ("hf://model", None, BridgeError, "hf://model is not a valid Hub URL. Write hf://ORG/N"),
        ("hf://org/model@step3", "main", UsageError, "revision: hf://org/model@step3 already na"),
        ("hf://org/model/global_step3", None, BridgeError, "It contains .gitattributes, latest."),
    ],
)
def test_urls_that_lead_nowhere(
    url: str, revision: str | None, kind: Any, words: str, hub: Stub
) -> None:
    hub.make("org/model", latest=b"global_step4")
    with pytest.raises(kind) as caught:
        find_url_source(url, revision)
    assert words in str(caught.value)


# --- the tokenizer of a published run


def test_the_tokenizer_of_a_published_run(hub: Stub) -> None:
    checkpoint = replace(open_checkpoint(str(FLAT)), hub_repo=RAW)
    finding = with_published_tokenizer(checkpoint).findings[-1]
    assert finding.code == "tokenizer-not-on-hub"
    assert f"{TWIN}: " in finding.message
    hub.make(TWIN, **{"README.md": b"weights only"})
    vocabulary = ",".join(f'"w{n}": {n}' for n in range(257))
    hub.make(
        "EleutherAI/gpt-neox-20b",
        **{"tokenizer.json": f'{{"model": {{"vocab": {{{vocabulary}}}}}}}'.encode()},
    )
    finding = with_published_tokenizer(checkpoint).findings[-1]
    assert f"{TWIN} has no tokenizer.json." in finding.message
    assert "gpt-neox-20b has 257 entries, and this model has 256 rows" in finding.message
    published_tokenizer.cache_clear()
    hub.make(TWIN, **{"tokenizer.json": b'{"model": {"vocab": {"w0": 0}}}'})
    named = with_published_tokenizer(checkpoint)
    assert named.findings[-1].code == "tokenizer-from-hub"
    assert [os.path.basename(file) for file in named.tokenizer] == ["tokenizer.json"]


def test_a_cache_without_the_tokenizer(offline: None, tmp_path: Path) -> None:
    cached(tmp_path, TWIN, "config.json")
    with pytest.raises(BridgeError, match=rf"{TWIN} has no tokenizer\.json in the cache\."):
        published_tokenizer(TWIN)
    assert cached_snapshot(TWIN, None).endswith(COMMIT)
