"""Converts on a real Ray cluster of three nodes, of which it kills one, and a worker; a program.

ray_run.py FOLDER SOURCE: leaves ``ray`` (the conversion that lost both) and ``cli`` (that of the
command, on the two nodes that are left) in the folder, and prints as JSON what happened. In the end
a node joins that has another version.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster
from ray_calls import held, version_and_node

import neox_bridge
from neox_bridge.batches.items import Item, Source
from neox_bridge.batches.run import Batch, run_batch
from neox_bridge.execution import units
from neox_bridge.execution.ray_cluster import RayCluster
from neox_bridge.planning.options import Options

_STORE = 80 << 20  # bytes of a node's object store, about the least that Ray allows
_WAIT = 300.0  # seconds


class Held(RayCluster):
    """Every call stops in the middle until the folder says go."""

    def __init__(self, folder: Path, address: str, tell: Callable[[str], None]) -> None:
        super().__init__(address, tell=tell)
        self.folder = folder

    def submit(self, call: Callable[..., Any], /, *args: Any) -> Any:
        return super().submit(held, str(self.folder), call, *args)


def main(folder: Path, source: Path) -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the nodes
    cluster = Cluster()
    nodes = [_node(cluster, holds) for holds in ("never", "before", "after")]
    told: dict[str, Any] = {"words": []}
    try:
        pool = Held(folder, cluster.address, told["words"].append)
        told["slots"] = [pool.slots]
        killer = threading.Thread(target=_kill, args=(folder, cluster, nodes[1], told))
        killer.start()
        units._UNIT_BYTES = 1  # each file is a unit
        batch = Batch(str(folder / "ray"), Options(tp=2), retries=0)
        rows = list(run_batch([Item("step0", "run", 0, Source(str(source)))], batch, pool))
        killer.join()
        told["rows"] = [row.to_json() for row in rows]
        told["slots"].append(pool.slots)
        pool.close()
        told["cli"] = _command(folder, source, cluster.address)
        _join_other(cluster, folder)
        pool = RayCluster(cluster.address)
        told["slots"].append(pool.slots)
        calls = [pool.submit(version_and_node) for _ in range(12)]
        told["versions"] = sorted({call.result(_WAIT) for call in calls})
        pool.close()
    finally:
        cluster.shutdown()
    print(json.dumps(told))


def _node(cluster: Cluster, holds: str) -> Any:
    os.environ["TEST_HOLDS"] = holds
    more = {"include_dashboard": False} if not cluster.list_all_nodes() else {}
    return cluster.add_node(num_cpus=1, object_store_memory=_STORE, **more)


def _join_other(cluster: Cluster, folder: Path) -> None:
    home = Path(neox_bridge.__file__).parent
    other = folder / "other"
    shutil.copytree(home, other / home.name, ignore=shutil.ignore_patterns("__pycache__"))
    text = (home / "__init__.py").read_text()
    (other / home.name / "__init__.py").write_text(text.replace(neox_bridge.__version__, "0.0.0"))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(other), *sys.path])
    _node(cluster, "never")


def _kill(folder: Path, cluster: Cluster, node: Any, told: dict[str, Any]) -> None:
    """One node when a file of its unit is written and has no name yet; one worker when it has."""
    until = time.monotonic() + _WAIT
    found: dict[str, int] = {}
    while set(found) != {"before", "after"} and time.monotonic() < until:
        time.sleep(0.02)
        names = [path.name.split("-") for path in folder.glob("*-*")]
        found = {when: int(pid) for when, pid in names}
    told["attempts"] = len(list(folder.glob("ray/.step0.neox-bridge/attempts-*/*")))
    cluster.remove_node(node, allow_graceful=False)
    os.kill(found["after"], signal.SIGKILL)
    told["killed"] = sorted(found)
    (folder / "go").touch()


def _command(folder: Path, source: Path, address: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "neox_bridge", "batch", str(source), str(folder / "cli")]
    words += ["--tp", "2", "--executor", "ray", "--address", address, "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=_WAIT)
    return {"code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
