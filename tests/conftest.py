"""Fixtures that several files of tests share."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import hypothesis
import pytest
import real_trees
import s3_server
import stand_in_trees
from s3_server import Store

from neox_bridge.stores import retry

# how long an example takes says nothing on a busy machine
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    """One S3 server for a file of tests."""
    with s3_server.server() as found:
        yield found


@pytest.fixture
def store(server: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The server with nothing spoiled and nothing counted; retries come soon."""
    monkeypatch.setattr(retry, "_FIRST", 0.005)
    server.requests.clear()
    server.listings.clear()
    yield server
    server.spoil = lambda method, key, query: ""


@pytest.fixture(scope="session", params=["stand-in", pytest.param("real", marks=pytest.mark.neox)])
def trees(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    """GPT-NeoX's source trees by date; a test that edits one copies it first.

    Every test of them runs on small stand-ins, and by ``make test-neox`` also on the real sources.
    """
    folder = tmp_path_factory.mktemp("trees")
    if request.param == "real":
        return real_trees.RealTrees(folder)
    return {name: stand_in_trees.write_tree(name, folder / name) for name in stand_in_trees.NAMES}
