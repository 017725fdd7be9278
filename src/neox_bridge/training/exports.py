"""What a run exports, and the process that does it beside the training, as the trainer sees it.

The trainer only writes the number of a step into a pipe after each save. The process
(training/exporter.py) converts the step and verifies it, as ``convert`` does. It finishes what was
saved even if the trainer is killed, and the next run exports what is left after a crash.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neox_bridge.errors import BridgeError

# variables that tell a process that it is a rank of a distributed program
_RANK_VARIABLES = frozenset(
    {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
)


@dataclass(frozen=True, slots=True)
class Exports:
    """The exports of a run.

    Attributes:
        save: The folder of GPT-NeoX's checkpoints.
        target: The folder for the exported steps, ``stepN`` each.
        interval: Steps are exported whose iteration is a multiple of it; 0 for every saved step.
        keep: How many exported steps to keep; 0 for all.
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
        keys = [k for k in ("save_hf_interval", "save_hf_keep", "push_to_hub") if settings.get(k)]
        if keys:
            raise BridgeError(
                f"{keys[0]} is set without save_hf. Set `save_hf` to the folder for the exported "
                "steps."
            )
        return None
    if not save:
        raise BridgeError(
            "save_hf is set without `save`, so there are no checkpoints to export. Set `save` to "
            "the folder for GPT-NeoX's checkpoints."
        )
    for name, value in (("save_hf_interval", interval), ("save_hf_keep", keep)):
        if value is not None and value < 1:
            raise BridgeError(f"{name}: {value} must be at least 1.")
    if os.path.realpath(target) == os.path.realpath(save):
        raise BridgeError(
            f"save_hf: {target} is also the folder of GPT-NeoX's checkpoints (`save`). Set save_hf "
            "to another folder."
        )
    if repository:
        from neox_bridge.stores.hub_names import model_id

        repo_and_branch = model_id(repository)
        if repo_and_branch is None or repo_and_branch[1]:
            raise BridgeError(
                f"push_to_hub: {repository!r} is not ORG/NAME. Each step becomes a branch of the "
                "repository."
            )
    return Exports(
        os.path.abspath(save),
        os.path.abspath(target),
        int(interval or 0),
        int(keep or 0),
        repository or "",
    )


class ExporterProcess:
    """The process that exports, as the trainer sees it."""

    def __init__(self, exports: Exports) -> None:
        self.exports = exports
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, which first exports what an earlier run left.

        Raises OSError if the folder or the process cannot be created.
        """
        os.makedirs(self.exports.target, exist_ok=True)
        self._launch()

    def _launch(self) -> None:
        """Start the process without a look at the folder, whose disk may hang."""
        exports = self.exports
        command = [sys.executable, "-m", "neox_bridge.training.exporter"]
        command += [exports.save, exports.target]
        command += ["--interval", str(exports.interval), "--keep", str(exports.keep)]
        command += ["--push", exports.repository] if exports.repository else []
        self._process = subprocess.Popen(
            command,
            bufsize=0,  # a line of a broken pipe must not be sent again with the next one
            stdin=subprocess.PIPE,
            env={k: v for k, v in os.environ.items() if k not in _RANK_VARIABLES},
            start_new_session=True,  # so that it finishes its step if the trainer is killed
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)  # it may hang on a dead disk

    def saved(self, iteration: int) -> None:
        """Tell the process that a step is complete. Never raises, and never waits for it.

        If the process was killed, a new one exports what it has left.
        """
        if not self.exports.is_due(iteration):
            return
        try:
            if self._process is None or self._process.poll() is not None:
                self._launch()
            assert self._process is not None
            assert self._process.stdin is not None
            self._process.stdin.write(f"{iteration}\n".encode())
        except OSError as error:
            print(
                f"neox-bridge: step {iteration} is not exported yet: {error}. The next save tries "
                "again",
                file=sys.stderr,
                flush=True,
            )

    def finish(self) -> None:
        """Wait until every saved step is exported or has failed. For the end of a training."""
        if self._process is None or self._process.poll() is not None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
