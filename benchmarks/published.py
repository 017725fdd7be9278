"""A raw Pythia branch: how long planning takes, and what a step costs that is taken from the Hub.

``python benchmarks/published.py`` prints a line of JSON for each. The branches are sparse files of
their full size (tests/helpers/hollow_branch.py), the Hub is tests/helpers/hub_stub.py on this
machine.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from measure import run
from sources import TOOL

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))

from hollow_branch import SIZES, STEP, hollow_branch, weight_bytes
from hub_stub import Stub, serving

_PLANS = {
    "convert --dry-run": ("convert", "--dry-run"),
    "export-optimizer --dry-run": ("export-optimizer", "--dry-run"),
    "reshard --tp 1 --dp 8 --dry-run": (
        *("reshard", "--tp", "1", "--pp", "1", "--dp", "8", "--for", "today", "--dry-run"),
    ),
}
_REPO = "EleutherAI/neox-ckpt-pythia-{}"


@dataclass(frozen=True, slots=True)
class Planned:
    """A command that plans and writes nothing. cpu: seconds. memory: bytes, anonymous."""

    branch: str
    title: str
    files: int
    seconds: float
    cpu: float
    memory: int


@dataclass(frozen=True, slots=True)
class Taken:
    """A command on a branch of the Hub. fetched, needed: bytes. requests: all that were made."""

    branch: str
    title: str
    needed: int
    fetched: int
    requests: int
    optimizer_files: int
    seconds: float


def plans(folder: Path, size: str = "12b") -> list[Planned]:
    """Planning of a large branch on the disk: 36 layers on 4 ranks, 256 files of states."""
    branch = hollow_branch(SIZES[size], folder / size)
    files = len(list(branch.iterdir()))
    found = []
    for title, (command, *options) in _PLANS.items():
        done = run((TOOL, command, str(branch), str(folder / "out"), *options))
        found.append(Planned(size, title, files, done.seconds, done.cpu, done.memory))
    shutil.rmtree(branch)
    return found


def taken(folder: Path, size: str = "160m") -> Iterator[Taken]:
    """What commands fetch of one step of a branch."""
    branch = hollow_branch(SIZES[size], folder / size)
    repo, stub = _REPO.format(size), Stub()
    stub.put_files(repo, f"step{STEP}", branch)
    source, out = f"{repo}@step{STEP}", folder / "out"
    whole = sum(path.stat().st_size for path in branch.iterdir())
    commands = {
        "inspect": (("inspect", source), 0),
        "convert": (("convert", source, str(out)), weight_bytes(branch)),
        "export-optimizer": (("export-optimizer", source, str(out)), whole),
    }
    with serving(stub):
        environment = {
            "HF_ENDPOINT": stub.url,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        for title, (command, needed) in commands.items():
            stub.served.clear()
            done = run((TOOL, *command), environment=environment)
            shutil.rmtree(out, ignore_errors=True)
            states = {s.target for s in stub.served if "optim_states" in s.target}
            fetched = stub.bytes_of_requests()
            counts = (len(stub.served), len(states))
            yield Taken(size, title, needed, fetched, *counts, done.seconds)
    shutil.rmtree(branch)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        for row in (*plans(Path(name)), *taken(Path(name))):
            print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main()
