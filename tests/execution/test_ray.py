"""A real Ray cluster: three nodes, of which one is killed, and a worker, in the middle."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from common import HELPERS, make_hf

import neox_bridge
from neox_bridge.batches.items import Item, Source
from neox_bridge.batches.run import Batch, run_batch
from neox_bridge.execution.executors import Processes
from neox_bridge.planning.options import Options

pytestmark = pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray isn't installed (its wheels are for some systems only)"
)


def _told(folder: Path) -> Any:
    """What ``ray_run`` did."""
    source = make_hf(
        folder / "step0", torch.float16, hidden_size=192, num_hidden_layers=6, vocab_size=9000
    )
    program = HELPERS / "ray_run.py"
    command = [sys.executable, str(program), str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_bit_differs_whatever_is_lost(tmp_path: Path) -> None:
    """One test, since a cluster takes its time to start."""
    told = _told(tmp_path)
    a_node_and_a_worker_are_lost(tmp_path, told)
    the_command_makes_the_same(tmp_path, told["cli"])
    a_node_that_has_another_version_gets_this_one(told)


def a_node_and_a_worker_are_lost(folder: Path, told: Any) -> None:
    assert told["killed"] == ["after", "before"]
    assert told["attempts"] >= 1  # what the node had written, when it was killed
    assert len(told["words"]) == 1
    assert "was lost; its work is repeated" in told["words"][0]
    assert told["slots"][:2] == [3, 2]
    (row,) = told["rows"]
    assert (row["status"], row["error"], row["tries"]) == ("done", "", 1)
    assert row["verified"]
    same_as_local(folder, "ray")


def the_command_makes_the_same(folder: Path, cli: Any) -> None:
    assert cli["code"] == 0, cli["stderr"]
    (row,) = json.loads(cli["stdout"])["rows"]  # nothing of Ray's is among the results
    assert (row["status"], row["verified"]) == ("done", True)
    assert "Traceback" not in cli["stderr"]
    same_as_local(folder, "cli")


def a_node_that_has_another_version_gets_this_one(told: Any) -> None:
    assert told["slots"][2] == 3
    assert len({node for _, node in told["versions"]}) == 3
    assert {version for version, _ in told["versions"]} == {neox_bridge.__version__}


def same_as_local(folder: Path, name: str) -> None:
    """The local executor, into the same place, since a yml names it."""
    made, aside = folder / name, folder / f"{name}.ray"
    made.rename(aside)
    pool = Processes(2)
    (row,) = run_batch(
        [Item("step0", "run", 0, Source(str(folder / "step0")))],
        Batch(str(made), Options(tp=2)),
        pool,
    )
    pool.close()
    assert row.status == "done"
    files = [path.relative_to(aside) for path in sorted(aside.rglob("*")) if path.is_file()]
    assert files == [path.relative_to(made) for path in sorted(made.rglob("*")) if path.is_file()]
    assert len(files) > 10
    for file in files:
        assert (aside / file).read_bytes() == (made / file).read_bytes(), file
    assert not [path for path in aside.parent.rglob("*attempts*") if path.is_dir()]
