"""Runs every target on new examples, for as many minutes as wanted: python run.py MINUTES [NAME].

NAME: only targets whose names hold it. Ends with 1 at the first failure, whose smallest example is
printed; it becomes an ordinary test.
"""

import importlib
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["FUZZ"] = "1"  # before the targets are made
_MEMORY = 1 << 30  # bytes beyond what the imports take


def _targets(part: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(path.stem)
        for name, value in vars(module).items():
            label = f"{path.stem}.{name}"
            if hasattr(value, "hypothesis") and value.__module__ == path.stem and part in label:
                yield label, value


def _bound_memory() -> None:
    with open("/proc/self/status", encoding="ascii") as file:
        data = next(line for line in file if line.startswith("VmData"))
    limit = (int(data.split()[1]) << 10) + _MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main(minutes: float, part: str = "") -> int:
    targets = list(_targets(part))
    _bound_memory()
    end, rounds = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < end:
        for label, target in targets:
            print(f"round {rounds + 1}: {label}", flush=True)
            target()
        rounds += 1
    print(f"{len(targets)} targets, {rounds} rounds of 300 examples each: nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), *sys.argv[2:3]))
