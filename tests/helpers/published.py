"""The checkpoints in tests/data/published, as the runs that wrote them, and what they hold."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from neox_bridge.execution.context import Context
from neox_bridge.optimizer.states import Optimizer
from neox_bridge.verification.compare import values

PUBLISHED = Path(__file__).parents[1] / "data" / "published"
NAMES = ("v1_dp2", "v1_dp4_intervals", "v1_dp2_rigid")
STATES = {"master": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}

Truth = dict[tuple[int, str], dict[str, Any]]


def run_folder(name: str, root: Path) -> Path:
    """A published checkpoint as GPT-NeoX v1.0 writes it: ``latest``, the step, its ``configs``."""
    step = root / "global_step8"
    shutil.copytree(PUBLISHED / name / "flat", step)
    (step / "configs").mkdir()
    (step / "160M.yml").rename(step / "configs" / "160M.yml")
    (root / "latest").write_text("global_step8")
    return root


def truth(name: str) -> Truth:
    """The live optimizer's states by layer and name, then by state."""
    source = "v1_dp2" if name == "v1_dp2_rigid" else name
    file = next((PUBLISHED / source / "optimizer").glob("*.npz"))
    states: Truth = {}
    with np.load(file) as arrays:
        for key in arrays:
            parameter, kind = key.split("/")
            layer, short = parameter.removeprefix("sequential.").split(".", 1)
            states.setdefault((int(layer), short), {})[kind] = arrays[key]
    return states


def facts(name: str) -> dict[str, Any]:
    """What the live optimizer said of its groups and loss scaler."""
    file = next((PUBLISHED / name / "optimizer").glob("*.json"))
    return dict(json.loads(file.read_text()))


def differing(optimizer: Optimizer, want: Truth, rank: int = 0) -> list[str]:
    """The states of a tensor-parallel rank that are not, bit for bit, those wanted."""
    held = {place: by_state for (at, place), by_state in optimizer.shards.items() if at == rank}
    wrong = [f"only one side has {place}" for place in set(held) ^ set(want)]
    context = Context()  # keeps files open until it is closed
    for place in set(held) & set(want):
        for ours, theirs in STATES.items():
            whole, array = held[place][ours], want[place][theirs]
            got = values(whole, whole.dtype, (0,) * len(whole.shape), whole.shape, context)
            if got.dtype != array.dtype or got.reshape(whole.shape).tobytes() != array.tobytes():
                wrong.append(f"{place}: {ours}")
    context.files.close()
    return sorted(wrong)
