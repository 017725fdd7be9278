"""Where the real GPT-NeoX is, and the table of what loads in it."""

import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from common import TESTS, make_hf
from loads_table import write_table
from real_neox import with_tokenizer
from real_trees import RealTrees

# of neox-bridge, beyond what GPT-NeoX's environment has
PACKAGES = {"ml_dtypes": "ml_dtypes", "xxhash": "xxhash", "click": "click", "zlib_ng": "zlib-ng"}
PASSED = pytest.StashKey[Path | None]()


def pytest_configure(config: pytest.Config) -> None:
    """Where the tests that passed are recorded: in NEOX_RESUME, by commit; nowhere without it."""
    folder = os.environ.get("NEOX_RESUME")
    config.stash[PASSED] = None
    if folder:
        root = str(config.rootpath)
        head = ["git", "-C", root, "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
        Path(folder).mkdir(parents=True, exist_ok=True)
        config.stash[PASSED] = Path(folder) / f"passed-{commit}.txt"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what passed at this commit, so that an interrupted run goes on."""
    path = config.stash[PASSED]
    passed = set(path.read_text().splitlines()) if path is not None and path.is_file() else set()
    left_out = [item for item in items if item.nodeid in passed]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid not in passed]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report, path = outcome.get_result(), item.config.stash[PASSED]  # type: ignore[attr-defined]
    if path is not None and report.when == "call" and report.passed:
        with path.open("a") as file:
            file.write(f"{item.nodeid}\n")


@pytest.fixture(scope="session")
def neox_python() -> str:
    home = os.environ.get("NEOX_HOME", "")
    python = os.environ.get("NEOX_PYTHON") or f"{home}/venv/bin/python"
    if not Path(python).exists():
        pytest.skip("no NEOX_HOME (trees and venv), no NEOX_TREE with NEOX_PYTHON")
    return python


@pytest.fixture(scope="session")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The sources of the real trees by date, in place of the stand-ins of tests/conftest.py."""
    return RealTrees(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="session", autouse=True)
def table() -> Iterator[None]:
    yield
    write_table()


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of fewer entries than it has rows."""
    return with_tokenizer(make_hf(tmp_path_factory.mktemp("source") / "hf", num_hidden_layers=4))


@pytest.fixture(scope="session")
def packages(neox_python: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the packages that neox-bridge needs in the Python of GPT-NeoX."""
    code = f"import {', '.join(PACKAGES)}"
    if subprocess.run([neox_python, "-c", code], capture_output=True).returncode == 0:
        return ""
    folder = str(tmp_path_factory.mktemp("packages"))
    command = [neox_python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    done = subprocess.run([*command, *PACKAGES.values()], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{' '.join(PACKAGES.values())} cannot be installed: {done.stderr[-300:]}")
    return folder


@pytest.fixture(scope="session")
def store_packages(neox_python: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the packages that reach object stores from the Python of GPT-NeoX."""
    folder = str(tmp_path_factory.mktemp("store-packages"))
    command = [neox_python, "-m", "pip", "install", "--quiet", "--target", folder]
    done = subprocess.run([*command, "obstore", "botocore"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"obstore and botocore cannot be installed: {done.stderr[-300:]}")
    return folder


@pytest.fixture
def inside(packages: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of GPT-NeoX import ``neox_bridge.neox``, as a patched train.py does."""
    paths = [str(TESTS.parent / "src"), *([packages] if packages else [])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("RUN_CPU_IMPORTS", "neox_bridge.neox")
