"""Runs of the real GPT-NeoX over two hosts, each with its own network and its own disk."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import real_neox
import torch
from checkpoint_edits import tokenizer
from common import convert, make_hf
from hosts import Hosts, two_hosts
from hub_stub import Stub, serving
from inside_neox import check_exports, exporting, wait_for
from s3_server import BUCKET, server

from neox_bridge import verify
from neox_bridge.errors import BridgeError
from neox_bridge.stores import objects
from neox_bridge.training.exports import JOURNAL

pytestmark = pytest.mark.neox


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with two_hosts(tmp_path) as both:
        yield both


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    model = make_hf(tmp_path / "hf", torch.float32)
    tokenizer(model / "tokenizer.json")
    return model


def train(
    python: str, hosts: Hosts, job: dict[str, Any], folder: Path, ranks: int = 1, **env: str
) -> tuple[dict[str, Any], list[str]]:
    """What rank 0 says of a job, and the stderr of each rank."""
    path = folder / "jobs.json"
    path.write_text(json.dumps([{"drop": [], "logits": None, "steps": 0, **job}]))
    tree = str(real_neox.tree_of("today"))
    done = hosts.train([python, str(real_neox.SCRIPT), tree, str(path)], ranks, **env)
    results = real_neox.results_in(done[0].stdout)
    assert len(results) == 1, done[0].stderr[-4000:]
    return results[0], [rank.stderr for rank in done]


@pytest.mark.parametrize("layout", [(2, 0), (1, 2)], ids=["tensor-parallel", "pipeline"])
def test_a_run_over_two_hosts_exports_what_convert_writes(
    layout: tuple[int, int],
    hosts: Hosts,
    hf: Path,
    neox_python: str,
    inside: None,
    tmp_path: Path,
) -> None:
    """From a folder, with weights that are split over the hosts, in a ``save`` that they share."""
    job = {**exporting(hf, "today", layout, tmp_path), "losses": 10}
    result, _ = train(neox_python, hosts, job, tmp_path)
    assert result["error"] is None
    assert len(result["losses"]) == 10
    wait_for(tmp_path / "exported" / JOURNAL, "done 10")
    check_exports(tmp_path, (5, 10))
    # the same yml resumes
    result, _ = train(neox_python, hosts, {**job, "losses": 5}, tmp_path)
    assert result["error"] is None
    wait_for(tmp_path / "exported" / JOURNAL, "done 15")
    check_exports(tmp_path, (15,))


def test_each_host_downloads_the_model_once(
    hosts: Hosts, hf: Path, neox_python: str, inside: None, tmp_path: Path
) -> None:
    """With two ranks on each host, and a cache on the disk of each."""
    job = exporting(hf, "today", (2, 2), tmp_path)
    job = {**job, "losses": 0, "set": {"load": "org/model"}, "save": str(tmp_path / "saved")}
    del job["save_every"]
    cache = str(tmp_path / "local" / "cache")
    with serving(Stub(), hosts.address) as hub:
        commit = hub.put_files("org/model", "main", hf)
        keys = {"HF_ENDPOINT": hub.url, "HF_HOME": cache, "HF_HUB_DISABLE_XET": "1"}
        result, _ = train(neox_python, hosts, job, tmp_path, ranks=2, **keys)
        downloads = [s for s in hub.served if s.method == "GET" and "/lfs/" in s.target]
    assert result["error"] is None
    assert len(downloads) == 2
    for host in hosts.hosts:
        model = f"cache/hub/models--org--model/snapshots/{commit}/model.safetensors"
        assert (host.disk / model).read_bytes() == (hf / "model.safetensors").read_bytes()
    assert verify(str(hf), str(tmp_path / "saved")).holds


def test_a_save_on_the_disk_of_each_host_is_refused(
    hosts: Hosts, hf: Path, neox_python: str, inside: None, tmp_path: Path
) -> None:
    job = {**exporting(hf, "today", (1, 2), tmp_path), "losses": 5}
    save = str(tmp_path / "local" / "run")
    job = {**job, "save": save, "set": {**job["set"], "save": save}}
    result, errors = train(neox_python, hosts, job, tmp_path)
    assert "is not the same folder on all nodes" in result["error"]
    for text in errors:
        assert f"BridgeError: save: {save} is not the same folder on all nodes" in text
        assert "Use a folder on a file system that all nodes share" in text
    assert not list(tmp_path.glob("disk-*/run/*"))
    assert not (tmp_path / "exported").exists()


# a ``save`` on the disk of each host


def saving_locally(job: dict[str, Any], folder: Path, target: str) -> dict[str, Any]:
    save = str(folder / "local" / "run")
    return {**job, "save": save, "set": {"save": save, "save_hf": target}}


def copy_together(hosts: Hosts, step: int, folder: Path) -> None:
    """Copy the step of both hosts to a folder, with ``latest``."""
    name = f"global_step{step}"
    for host in hosts.hosts:
        if host.disk / "run" != folder:
            shutil.copytree(host.disk / "run" / name, folder / name, dirs_exist_ok=True)
    (folder / "latest").write_text(name)


@pytest.mark.parametrize("layout", [(2, 0), (1, 2)], ids=["tensor-parallel", "pipeline"])
def test_weights_that_are_split_over_hosts_are_brought_together_in_a_store(
    layout: tuple[int, int],
    hosts: Hosts,
    hf: Path,
    neox_python: str,
    inside: None,
    store_packages: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{os.environ['PYTHONPATH']}:{store_packages}")
    with server(hosts.address):
        target = f"s3://{BUCKET}/exported"
        job = exporting(hf, "today", layout, tmp_path)
        job = saving_locally({**job, "losses": 10}, tmp_path, target)
        result, errors = train(neox_python, hosts, job, tmp_path)
        assert result["error"] is None
        wait_for(hosts[0].disk / "run" / JOURNAL, "done 10")
        # neither host has all weights
        for host in hosts.hosts:
            with pytest.raises(BridgeError):
                convert(host.disk / "run" / "global_step5", tmp_path / "half", to="hf")
        copy_together(hosts, 5, tmp_path / "run")
        # the same yml resumes, as the warning says
        assert "copy `latest` and the step together before" in errors[0]
        copy_together(hosts, 10, tmp_path / "run")
        for host in hosts.hosts:
            copy_together(hosts, 10, host.disk / "run")
        result, errors = train(neox_python, hosts, {**job, "losses": 5}, tmp_path)
        assert result["error"] is None
        assert "resuming from global_step10" in errors[0]
        wait_for(hosts[0].disk / "run" / JOURNAL, "done 15")
        copy_together(hosts, 15, tmp_path / "run")
        download(target, tmp_path / "exported")
    check_exports(tmp_path, (5, 10, 15))
    assert sorted(p.name for p in (tmp_path / "exported").iterdir()) == [
        "step10",
        "step15",
        "step5",
    ]


def download(target: str, folder: Path) -> None:
    for url, state in objects.below(target).items():
        path = folder / url.removeprefix(f"{target}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(objects.fetch(url, 0, state.size))


def test_one_host_exports_alone_if_the_others_have_copies(
    hosts: Hosts, hf: Path, neox_python: str, inside: None, tmp_path: Path
) -> None:
    """Two data-parallel replicas, each of which is split over the ranks of a host."""
    target = str(tmp_path / "exported")
    job = exporting(hf, "today", (2, 1), tmp_path)
    job = saving_locally({**job, "losses": 5}, tmp_path, target)
    result, errors = train(neox_python, hosts, job, tmp_path, ranks=2)
    assert result["error"] is None
    assert "is on a disk of each node's own" in errors[0]
    wait_for(tmp_path / "exported" / JOURNAL, "done 5")
    shutil.copytree(hosts[0].disk / "run", tmp_path / "run")
    check_exports(tmp_path, (5,))
    assert not list((hosts[1].disk / "run" / "global_step5").glob("layer_*"))
