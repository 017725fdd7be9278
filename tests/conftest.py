"""Fixtures that several files of tests share."""

from collections.abc import Iterator

import pytest
import s3_server
from s3_server import Store

from neox_bridge.stores import retry


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
