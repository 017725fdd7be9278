"""Many checkpoints through the real planner, journal and processes; the mover moves nothing.

``python benchmarks/simulate.py --checkpoints 10000`` shows what a batch costs beside its bytes: the
time of an output file and the memory of the process that leads. Every source is opened and planned,
every folder locked, entered in a journal, sealed, flushed and renamed; only the bytes of the files
are left out, and comparing them.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from sources import hollow_hf

from neox_bridge.batches.items import Item, Source
from neox_bridge.batches.run import Batch, default_ahead, run_batch, verify_part
from neox_bridge.execution.executors import Processes
from neox_bridge.execution.journal import Written
from neox_bridge.execution.units import Made, Unit, make
from neox_bridge.planning.options import Options
from neox_bridge.toy import toy_checkpoint

FILES = 97  # of each target, with its model card
LAYERS, RANKS = 19, 4


def move_nothing(unit: Unit) -> Made:
    """What ``make`` says when it has made the files."""
    written = tuple((file.path, Written(file.size, "0" * 32)) for file in unit.outputs)
    return Made(written, {"copied": sum(file.size for file in unit.outputs)}, (), ())


def nothing(*_: object) -> None:
    """In place of comparing what wasn't written."""


class Hollow(Processes):
    """Processes that do what they are told but for the bytes."""

    def submit(self, call: Callable[..., Any], /, *args: Any) -> "Future[Any]":
        faked = {make: move_nothing, verify_part: nothing}
        return super().submit(faked.get(call, call), *args)


def simulate(checkpoints: int, workers: int, folder: Path) -> dict[str, Any]:
    """Convert one hollow model so many times. folder: for sources and targets; emptied as it goes.

    Returns counts, seconds, bytes of memory of this process after each tenth of the way.
    """
    source = hollow_hf(toy_checkpoint("pythia-70m", layers=LAYERS), folder / "hf")
    items = (Item(f"step{n}", "run", n, Source(str(source))) for n in range(checkpoints))
    target = folder / "out"
    pool = Hollow(workers)
    batch = Batch(str(target), Options(tp=RANKS), ahead=default_ahead(workers))
    outputs, size, memory = 0, 0, []
    begin, own = time.perf_counter(), time.process_time()
    for number, row in enumerate(run_batch(items, batch, pool), 1):
        if row.status != "done":
            sys.exit(f"{row.name}: {row.error}")
        outputs, size = outputs + row.files, size + row.size
        shutil.rmtree(row.target)
        if number % max(1, checkpoints // 10) == 0:
            memory.append(anonymous())
    seconds, own = time.perf_counter() - begin, time.process_time() - own
    pool.close()
    if outputs != checkpoints * FILES:
        sys.exit(f"{outputs} outputs, and {FILES} each were wanted")
    return {
        "checkpoints": checkpoints,
        "outputs": outputs,
        "bytes": size,
        "workers": workers,
        "seconds": seconds,
        "ms_an_output": seconds / outputs * 1e3,
        "leader_cpu_ms_an_output": own / outputs * 1e3,
        "memory": memory,
    }


def anonymous() -> int:
    """Bytes of this process that no file stands for."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1 + (os.cpu_count() or 1))
    parser.add_argument("--folder", type=Path, help="Where to work; a temporary folder by default.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        print(json.dumps(simulate(given.checkpoints, given.workers, Path(name)), indent=2))


if __name__ == "__main__":
    main()
