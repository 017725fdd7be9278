"""Plans of very large conversions: how many outputs, how large, made in what time and memory.

``python benchmarks/scale.py`` prints a line of JSON for each: Pythia-12B at TP 4, and a model of
10^12 parameters at TP 64, whose sources are sparse files of their full size.
"""

import json
import pickle
import tempfile
import time
from pathlib import Path
from typing import Any

from simulate import anonymous
from sources import hollow_hf, wide

from neox_bridge import Options, open_checkpoint
from neox_bridge import plan as make_plan
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.planning.report import plan_hash
from neox_bridge.tensors.coverage import check_files

SHAPES = {
    "Pythia-12B, TP 4": (wide(36, 40, 5120, 50688), Options(tp=4)),
    "1T parameters, TP 64": (wide(128, 256, 25600, 50432), Options(tp=64)),
}


def measured(checkpoint: Checkpoint, options: Options, folder: Path) -> dict[str, Any]:
    """Seconds, bytes and counts of opening and planning."""
    source = hollow_hf(checkpoint, folder / "hf")
    before, begin = anonymous(), time.perf_counter()
    opened = open_checkpoint(str(source))
    read = time.perf_counter()
    plan = make_plan(opened, options, str(folder / "out"))
    planned = time.perf_counter()
    check_files(plan.files)
    plan_hash(plan)
    checked = time.perf_counter()
    return {
        "bytes": plan.size,
        "outputs": len(plan.files),
        "tensors": sum(len(file.tensors) for file in plan.files),
        "open_s": round(read - begin, 3),
        "plan_s": round(planned - read, 3),
        "check_and_hash_s": round(checked - planned, 3),
        "memory": anonymous() - before,
        "pickled": sum(len(pickle.dumps(file)) for file in plan.files),
    }


def main() -> None:
    for title, (checkpoint, options) in SHAPES.items():
        with tempfile.TemporaryDirectory() as name:
            print(json.dumps({"what": title, **measured(checkpoint, options, Path(name))}))


if __name__ == "__main__":
    main()
