"""A pytest plugin for the run without a mutant: which test executes which lines, and how long.

It also tells which tests start processes, in which coverage sees no lines.
"""

import json
import os
import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import coverage
import pytest

_SECONDS: dict[str, float] = {}
_WITH_PROCESSES: set[str] = set()  # tests; or files, where a fixture starts the process
_EVENTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: Any) -> Iterator[None]:
    """Attributes the lines that coverage sees from now on to this test."""
    measuring = coverage.Coverage.current()
    if measuring is not None:
        measuring.switch_context(item.nodeid)
    try:
        return (yield)
    finally:
        if measuring is not None:
            measuring.switch_context("")


def _process_started() -> None:
    """Attributes a process to the test that runs now (pytest names it and its phase)."""
    test, _, phase = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")
    _WITH_PROCESSES.add(test if phase == "(call)" else test.partition("::")[0])


def _audit(event: str, _: object) -> None:
    if event in _EVENTS:
        _process_started()


def _start(process: BaseProcess, start: Any = BaseProcess.start) -> None:
    _process_started()
    start(process)


def pytest_configure() -> None:
    """Watches for processes from now on."""
    sys.addaudithook(_audit)
    BaseProcess.start = _start  # type: ignore[method-assign]


def pytest_runtest_logreport(report: Any) -> None:
    """Adds up the seconds of a test's three phases."""
    _SECONDS[report.nodeid] = _SECONDS.get(report.nodeid, 0.0) + report.duration


def pytest_sessionfinish() -> None:
    """Writes what is known of each test to the file that MUTANTS_TESTS names."""
    known = {
        name: [seconds, not _WITH_PROCESSES.isdisjoint({name, name.partition("::")[0]})]
        for name, seconds in _SECONDS.items()
    }
    Path(os.environ["MUTANTS_TESTS"]).write_text(json.dumps(known), encoding="utf-8")
