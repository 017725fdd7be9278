"""What a report reads: results of commands as JSON."""

from pathlib import Path
from typing import Any

import pytest

from neox_bridge.errors import BridgeError
from neox_bridge.report.read import inputs
from neox_bridge.report.sections import section_of

ROW: dict[str, Any] = {
    **{"name": "", "number": None, "run": "pythia", "status": "done", "error": "", "norms": {}},
    **{"files": 3, "size": 4096, "shared": 0, "seconds": 2.0, "tries": 1, "verified": True},
    "findings": [],
}


def row(name: str, **values: Any) -> dict[str, Any]:
    return {**ROW, "name": name, **values}


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    with open(path, "wb") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(BridgeError, match=f"{path} is larger than .*, which no result"):
        inputs([str(path)])


def test_a_batch_with_failures_and_findings() -> None:
    """A failure is an error of its checkpoint, and a finding of several is shown once."""
    same = {"code": "tokenizer-missing", "severity": "info", "message": "none", "remedy": "add one"}
    rows = [
        row("step1", findings=[same]),
        row("step2", findings=[same]),
        row("step3", status="failed", error="layer_02 is missing", size=0),
    ]
    section = section_of({"batch": "out", "holds": False, "rows": rows}, "a.json", "p")
    assert section.verdict.words == "1 of 3 checkpoints failed"
    shown = [(one.code, one.severity, one.message, one.remedy) for one in section.findings]
    assert shown == [
        ("failed", "error", "step3: layer_02 is missing", ""),
        ("tokenizer-missing", "info", "step1 and 1 more: none", "add one"),
    ]
