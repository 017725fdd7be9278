"""A pytest plugin for the run without a mutant: which test executes which lines, and how long."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest

_SECONDS: dict[str, float] = {}


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


def pytest_runtest_logreport(report: Any) -> None:
    """Adds up the seconds of a test's three phases."""
    _SECONDS[report.nodeid] = _SECONDS.get(report.nodeid, 0.0) + report.duration


def pytest_sessionfinish() -> None:
    """Writes the seconds of each test to the file that MUTANTS_SECONDS names."""
    Path(os.environ["MUTANTS_SECONDS"]).write_text(json.dumps(_SECONDS), encoding="utf-8")
