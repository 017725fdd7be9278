"""What a run exports, and the process that does it beside the training, as the trainer sees it.

The trainer only writes the number of a step into a pipe after each save. The process
(training/exporter.py) converts the step and verifies it, as ``convert`` does. It finishes what was
saved even if the trainer is killed, and the next run exports what is left after a crash.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.layouts.file_names import STEP
from neox_bridge.stores.paths import absolute, is_local, is_writable, real

LOG = "neox_bridge_exports.log"
JOURNAL = ".neox_bridge_exports"
END = "end"  # the line with which the trainer says that no step follows
_OWNER = "of "  # the start of the first line of a journal
# variables that tell a process that it is a rank of a distributed program
_RANK_VARIABLES = frozenset(
    {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
)


class StepGone(Exception):
    """A step was removed or saved again, so that it cannot be exported. The text says which."""

    def __init__(
        self, text: str = "was removed before it was exported (keep_last_n_checkpoints)"
    ) -> None:
        super().__init__(text)


@dataclass(frozen=True, slots=True)
class Save:
    """One save of a step, on one of several nodes with a ``save`` of their own.

    Attributes:
        id: The same on all nodes, and never the same for two saves.
        fingerprint: Of the files on this node, taken when the save was complete.
    """

    id: str = ""
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Exports:
    """The exports of a run, as the process of one node sees them.

    Attributes:
        save: The folder of GPT-NeoX's checkpoints.
        target: The folder for the exported steps, ``stepN`` each, on a disk or in a store.
        interval: Steps are exported whose iteration is a multiple of it; 0 for every saved step.
        keep: How many exported steps to keep; 0 for all.
        repository: ``ORG/NAME`` on the Hub, to which each step is pushed as a branch, or "".
        node: The number of this node, if each has a part of the steps in a ``save`` of its own.
        nodes: How many of these nodes there are; 1 if one node has everything.
        saved: With several of these nodes, the save that is being exported.
    """

    save: str
    target: str
    interval: int = 0
    keep: int = 0
    repository: str = ""
    node: int = 0
    nodes: int = 1
    saved: Save = Save()

    @property
    def is_local(self) -> bool:
        """Whether the target is on a disk."""
        return is_local(self.target)

    @property
    def home(self) -> str:
        """The folder of the log and the journal."""
        return self.target if self.is_local else self.save

    @property
    def log(self) -> str:
        """The log of what was exported and what failed."""
        return os.path.join(self.home, LOG)

    @property
    def journal(self) -> str:
        """The file that says which steps were saved and which are done."""
        return os.path.join(self.home, JOURNAL)

    def step(self, iteration: int) -> str:
        """GPT-NeoX's folder of a step."""
        return os.path.join(self.save, f"global_step{iteration}")

    def is_due(self, iteration: int) -> bool:
        """Whether the step of this iteration is exported."""
        return not self.interval or iteration % self.interval == 0


def owner_line(save: str) -> str:
    """The first line of the journal of a run, with its ``save``."""
    return f"{_OWNER}{json.dumps(os.path.realpath(save))}"


def check_owner(exports: Exports) -> None:
    """Raise BridgeError if the folder has exports of another run, which this one would replace."""
    if not exports.is_local:  # the journal is in the run's own folder
        return
    with suppress(FileNotFoundError), open(exports.journal, "rb") as file:
        first = file.readline().decode(errors="replace").strip()
        if first.startswith(_OWNER) and first != owner_line(exports.save):
            owner = first.removeprefix(_OWNER)
            raise BridgeError(
                f"save_hf: {exports.target} contains the exports of the run in {owner}, and `save` "
                f"is {exports.save}. Set save_hf to another folder. If the folder of the run was "
                f"moved, change its path in the first line of {exports.journal}."
            )


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
    if interval and not _is_ever_due(settings, interval):
        raise BridgeError(
            f"save_hf_interval: {interval} matches none of the steps that the run saves "
            f"(checkpoint_factor: {settings.get('checkpoint_factor')}, train_iters: "
            f"{settings['train_iters']}), so nothing would be exported. Set save_hf_interval to a "
            "multiple of checkpoint_factor."
        )
    if target.startswith("~"):
        target = os.path.expanduser(target)
    if not is_writable(target):
        raise BridgeError(
            f"save_hf: {target} cannot be written file by file. Set save_hf to a folder or to a "
            "folder of an object store, and push_to_hub to the repository on the Hub."
        )
    if real(target) == real(save):
        raise BridgeError(
            f"save_hf: {target} is also the folder of GPT-NeoX's checkpoints (`save`). Set save_hf "
            "to another folder."
        )
    above = os.path.relpath(real(target), real(save)).split(os.sep)[0] if is_local(target) else ""
    if STEP.fullmatch(above):
        raise BridgeError(
            f"save_hf: {target} is inside {above}, a step in `save`, with which "
            "keep_last_n_checkpoints removes it. Set save_hf to a folder outside of the steps."
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
        absolute(target),
        int(interval or 0),
        int(keep or 0),
        repository or "",
    )


def _is_ever_due(settings: Mapping[str, Any], interval: int) -> bool:
    """Whether a run saves a step that is exported (megatron/training.py, ``is_save_iter``)."""
    last, factor = settings.get("train_iters"), settings.get("checkpoint_factor")
    if not last:
        return True
    saved = [last, *(settings.get("extra_save_iters") or ())]
    if factor and settings.get("checkpoint_scale") == "log":
        power = factor
        while 1 < power <= last:
            saved.append(int(power))
            power *= factor
    elif factor:
        saved += range(int(factor), last + 1, int(factor))
    return any(iteration % interval == 0 for iteration in saved)


class ExporterProcess:
    """The process that exports, as the trainer sees it.

    run: a name that no other run has, the same on all nodes.
    """

    def __init__(self, exports: Exports, run: str = "") -> None:
        self.exports, self._run = exports, run
        self._saves = 0  # also of steps that are not exported, so that all nodes count alike
        self._process: subprocess.Popen[bytes] | None = None

    def check(self) -> None:
        """Create the folder of the log and the journal.

        Raises:
            OSError: It cannot be written.
            BridgeError: It belongs to another run.
        """
        os.makedirs(self.exports.home, exist_ok=True)
        with open(self.exports.log, "a", encoding="ascii"):
            pass
        check_owner(self.exports)

    def start(self) -> None:
        """Start the process, which first exports what an earlier run left.

        It does not look at the folder, whose disk may hang. Raises OSError if the process cannot be
        created.
        """
        exports = self.exports
        command = [sys.executable, "-m", "neox_bridge.training.exporter"]
        command += [exports.save, exports.target]
        command += ["--interval", str(exports.interval), "--keep", str(exports.keep)]
        command += ["--push", exports.repository] if exports.repository else []
        command += ["--node", str(exports.node), "--nodes", str(exports.nodes)]
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
        self._saves += 1
        if not self.exports.is_due(iteration):
            return
        try:
            if self.exports.nodes > 1:
                from neox_bridge.training.nodes import note_save

                note_save(self.exports, iteration, f"{self._run}-{self._saves}")
            if self._process is None or self._process.poll() is not None:
                self.start()
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
        """Wait until every saved step is exported or has failed. For the end of a training.

        If the process was killed, a new one exports what it has left.
        """
        if self._process is None:
            return
        if (self._process.poll() or 0) < 0:
            with suppress(OSError):
                self.start()
        if self._process.poll() is not None:
            return
        assert self._process.stdin is not None
        with suppress(OSError):
            # workers of data loaders may have inherited the pipe, so that it stays open
            self._process.stdin.write(f"{END}\n".encode())
        self._process.stdin.close()
        self._process.wait()
