"""Fixtures that several files of tests share, and markers by what a test needs."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import hypothesis
import message_record
import needs
import pytest
import real_trees
import s3_server
import stand_in_trees
from s3_server import Store

from neox_bridge.stores import retry

# how long an example takes says nothing on a busy machine
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


QUICK_CASES = 1


def pytest_addoption(parser: pytest.Parser) -> None:
    text = f"tests that need none of {', '.join(needs.MARKERS)}, and few cases of each"
    parser.addoption("--quick", action="store_true", help=text)
    text = "write an example of every message that the tests provoke into a file"
    record = str(message_record.RECORD)
    parser.addoption("--record-messages", nargs="?", const=record, metavar="FILE", help=text)


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in needs.MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    message_record.configure(config)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --quick a file is not even imported if all of its tests are left out."""
    if config.getoption("quick") and collection_path.suffix == ".py":
        return needs.all_tests_need(collection_path) or None
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks each test by what it needs; with --quick leaves out those that need anything.

    Of a parametrized test, --quick runs the first cases.
    """
    kept, left_out = [], []
    cases: Counter[str] = Counter()
    for item in items:
        if isinstance(item, pytest.Function):
            name = item.originalname if item.cls is None else item.cls.__name__
            for marker in sorted(needs.needs(item.path, name)):
                item.add_marker(marker)
        function = item.nodeid.partition("[")[0]
        cases[function] += 1
        is_marked = any(item.get_closest_marker(name) for name in needs.MARKERS)
        (left_out if is_marked or cases[function] > QUICK_CASES else kept).append(item)
    if config.getoption("quick"):
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    """One S3 server for a file of tests."""
    with s3_server.server() as found:
        yield found


@pytest.fixture
def store(server: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The server with nothing spoiled and nothing counted; retries come soon."""
    monkeypatch.setattr(retry, "FIRST_SECONDS", 0.005)
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
