"""What nodes of a Ray cluster are asked to do by a test: units that stop in the middle."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neox_bridge.execution.placement import Places, places_of, reaches

_WAIT = 300.0  # seconds


def _same(_: str, call: Callable[..., Any], *args: Any) -> Places:
    return places_of(call, args)


@reaches(_same)
def held(folder: str, call: Callable[..., Any], *args: Any) -> Any:
    """A call that stops before or after a file gets its name, until ``folder``/go is there.

    Which of both is said by the node's environment, TEST_HOLDS. A file of that name and of the
    process's id in the folder says that it has stopped.
    """
    go, real, when = Path(folder) / "go", os.replace, os.environ["TEST_HOLDS"]

    def hold(source: str, target: str) -> None:
        os.replace = real
        if when == "after":
            real(source, target)
        (Path(folder) / f"{when}-{os.getpid()}").touch()
        until = time.monotonic() + _WAIT
        while not go.exists() and time.monotonic() < until:
            time.sleep(0.02)
        if when == "before":
            real(source, target)

    if when != "never" and not go.exists():
        os.replace = hold
    try:
        return call(*args)
    finally:
        os.replace = real


def version_and_node() -> tuple[str, str]:
    import ray

    import neox_bridge

    time.sleep(0.2)  # so that all nodes get some
    return neox_bridge.__version__, ray.get_runtime_context().get_node_id()
