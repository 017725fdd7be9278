"""What a run exports, and the process that does it beside the training.

The trainer only writes a line into a pipe after each save. The process converts the step and
verifies it, as ``convert`` does. It outlives the trainer until every saved step is exported, and
what is left after a crash is exported when the run starts again.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

from neox_bridge.errors import BridgeError

LOG = "neox_bridge_exports.log"


@dataclass(frozen=True, slots=True)
class Exports:
    """The exports of a run.

    Attributes:
        save: The folder of GPT-NeoX's checkpoints.
        target: The folder for the exported steps, ``stepN`` each.
        interval: Iterations between exports; 0 for every saved step.
        keep: How many steps to keep; 0 for all.
        repository: ``ORG/NAME`` on the Hub, to which each step is pushed as a branch, or "".
    """

    save: str
    target: str
    interval: int = 0
    keep: int = 0
    repository: str = ""

    def is_due(self, iteration: int) -> bool:
        """Whether the step of this iteration is exported."""
        return not self.interval or iteration % self.interval == 0


def exports_of(settings: Mapping[str, Any]) -> Exports | None:
    """What the keys of a yml ask for; None if nothing is exported.

    settings: the attributes of the run's ``NeoXArgs``. Raises BridgeError for keys that do not go
    together.
    """
    target, save = settings.get("save_hf"), settings.get("save")
    interval, keep = settings.get("save_hf_interval"), settings.get("save_hf_keep")
    repository = settings.get("push_to_hub")
    if not target:
        given = [k for k in ("save_hf_interval", "save_hf_keep", "push_to_hub") if settings.get(k)]
        if given:
            raise BridgeError(f"{given[0]}: only with save_hf, which names the folder to write to.")
        return None
    if not save:
        raise BridgeError(
            "save_hf: GPT-NeoX saves no steps that could be exported. Set `save` to a folder."
        )
    for name, value in (("save_hf_interval", interval), ("save_hf_keep", keep)):
        if value is not None and value < 1:
            raise BridgeError(f"{name}: {value} is not a number of at least 1.")
    if os.path.abspath(target) == os.path.abspath(save):
        raise BridgeError(
            f"save_hf: {target} is the folder of GPT-NeoX's own checkpoints. Name another one."
        )
    if repository:
        from neox_bridge.stores.hub_names import model_id

        if model_id(repository) is None:
            raise BridgeError(f"push_to_hub: {repository!r} is not ORG/NAME.")
    return Exports(
        os.path.abspath(save),
        os.path.abspath(target),
        int(interval or 0),
        int(keep or 0),
        repository or "",
    )


class Exporter:
    """The process that exports, as its trainer sees it."""

    def __init__(self, exports: Exports) -> None:
        self.exports = exports
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process. It exports first what an earlier run has left."""
        one = self.exports
        os.makedirs(one.target, exist_ok=True)
        command = [sys.executable, "-m", "neox_bridge.training.exporter", one.save, one.target]
        command += ["--keep", str(one.keep), "--interval", str(one.interval)]
        command += ["--push", one.repository] if one.repository else []
        environment = {k: v for k, v in os.environ.items() if k not in _OF_RANKS}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # so that it finishes its step when the trainer is killed
        )

    def saved(self, iteration: int) -> None:
        """Tell the process that a step is complete. Never raises, and never waits for it."""
        if not self.exports.is_due(iteration):
            return
        try:
            if self._process is None or self._process.poll() is not None:
                self.start()  # it was killed; it finds in its journal what it has not finished
            assert self._process is not None
            pipe: IO[bytes] | None = self._process.stdin
            assert pipe is not None
            pipe.write(f"{iteration}\n".encode())
            pipe.flush()
        except OSError as error:
            print(f"neox-bridge: step {iteration} is not exported yet: {error}", file=sys.stderr)


# variables that tell a process that it is a rank of a distributed program
_OF_RANKS = frozenset(
    {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
)
