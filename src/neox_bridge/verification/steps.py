"""Reads one checkpoint of a run for an audit: fingerprints and config."""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import xxhash

from neox_bridge.findings import Severity
from neox_bridge.frameworks.unknown_keys import UnknownKey
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.optimizer.read_export import number_in
from neox_bridge.optimizer.states import Optimizer
from neox_bridge.verification.hash_cache import check_same, identify, look_up, remember
from neox_bridge.verification.hashes import Fingerprint, fingerprints, sources
from neox_bridge.verification.optimizer import named
from neox_bridge.verification.runs import Fault, StepLocation

_SEED = re.compile(r"seed[-_]?(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Step:
    """The content of a checkpoint for an audit.

    Attributes:
        meaning: The config under neutral key names, with the sizes of the tensors except the
            vocabulary.
        seed: From the yml, or from the run's name (``pythia-70m-seed3``).
        making: The other settings that the initial weights depend on.
        files: The names of the files that contain a tensor, by rank.
        read: How many tensors were read; the fingerprints of the others were cached.
        states: Fingerprints of the optimizer states, as "exp_avg: name", if they are audited.
        updates: How many steps the optimizer has made and skipped, by parameter group.
        unknown_keys: The unknown keys in the checkpoint's settings.
    """

    run: str
    label: str
    number: int | None
    path: str
    kind: str
    tp: int
    dtype: str
    meaning: Mapping[str, object]
    seed: int | None
    making: tuple[str, ...]
    tensors: Mapping[str, Fingerprint]
    files: Mapping[str, tuple[str, ...]]
    size: int
    read: int
    iteration: int | None = None
    states: Mapping[str, Fingerprint] = field(default_factory=dict)
    updates: tuple[int, ...] = ()
    unknown_keys: tuple[UnknownKey, ...] = ()

    @cached_property
    def hash(self) -> str:
        """The hash of all tensors together, with their names."""
        state = xxhash.xxh3_128()
        for name, tensor in sorted(self.tensors.items()):
            state.update(f"{name} {tensor.hash}\n".encode())
        return state.hexdigest()

    @cached_property
    def norm(self) -> float:
        """The L2 norm of all tensors together."""
        return math.sqrt(sum(tensor.norm**2 for tensor in self.tensors.values()))

    def fault(
        self,
        code: str,
        severity: Severity,
        message: str,
        remedy: str = "",
        tensors: Iterable[str] = (),
    ) -> Fault:
        """A finding of this step."""
        return Fault(code, severity, message, remedy, self.run, (self.label,), tuple(tensors))

    @property
    def bad(self) -> int:
        """The number of elements that are NaN or infinite."""
        return sum(tensor.bad for tensor in self.tensors.values())


def read_step(
    run: str,
    place: StepLocation,
    checkpoint: Checkpoint,
    *,
    optimizer: Optimizer | None = None,
    cache: str | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Step:
    """Read everything that is not cached. Raises BridgeError if a file cannot be read.

    optimizer: the optimizer of the checkpoint, if its states are also read.
    """
    weights = checkpoint
    if optimizer is not None:
        checkpoint = replace(
            checkpoint, tensors={**checkpoint.tensors, **named(checkpoint, optimizer)}
        )
    files = identify(checkpoint)
    known = look_up(cache, checkpoint, files)
    if progress is not None:
        progress(sum(checkpoint.tensors[name].nbytes for name in known))
    tensors = fingerprints(checkpoint, known=known, workers=workers, progress=progress)
    if len(known) < len(tensors):
        check_same(files, checkpoint)
        remember(cache, checkpoint, files, tensors)
    state = checkpoint.neox
    return Step(
        run=run,
        label=place.label,
        number=place.number,
        path=place.path,
        kind=checkpoint.kind,
        tp=1 if state is None else state.tp,
        dtype=checkpoint.config.dtype,
        meaning=_meaning(checkpoint),
        seed=_seed(run, checkpoint.raw if state is not None else {}),
        making=_making(checkpoint),
        tensors={name: tensors[name] for name in weights.tensors},
        files={
            name: tuple(os.path.basename(ref.file) for ref in sources(whole))
            for name, whole in checkpoint.tensors.items()
        },
        size=weights.size,
        read=len(tensors) - len(known),
        iteration=_iteration(checkpoint),
        states={name: tensors[name] for name in tensors if name not in weights.tensors},
        updates=_updates(optimizer) if optimizer is not None else (),
        unknown_keys=checkpoint.unknown_keys,
    )


def _updates(optimizer: Optimizer) -> tuple[int, ...]:
    """Per group: its step count, and the steps that a loss scaler skipped."""
    skipped = optimizer.metas[0].get("skipped_steps")
    skipped = skipped if isinstance(skipped, int) else 0
    steps = (
        number_in(group.scalars.get("step", group.settings.get("step")))
        for group in optimizer.groups
    )
    return tuple(int(step) + skipped for step in steps if isinstance(step, int | float))


def _meaning(checkpoint: Checkpoint) -> dict[str, object]:
    config = checkpoint.config
    sizes = {f"{dim} size": size for dim, size in config.dims.items() if dim != "vocab"}
    return {"family": checkpoint.architecture.name, **config.meaning(), **sizes}


def _seed(run: str, raw: Mapping[str, Any]) -> int | None:
    seed = raw.get("seed")
    if isinstance(seed, int):
        return seed
    match = _SEED.search(os.path.basename(os.path.abspath(run)))
    return int(match[1]) if match else None


def _making(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the initial weights depend on besides the seed: number of ranks and init methods."""
    state = checkpoint.neox
    if state is None:
        return (checkpoint.config.dtype,)
    keys = (key for key in sorted(checkpoint.raw) if "init" in key or "mup" in key)
    settings = [f"{key}={checkpoint.raw[key]}" for key in keys if not key.startswith("initial_")]
    return (checkpoint.config.dtype, f"tp={state.tp}", f"pp={state.pp}", *settings)


def _iteration(checkpoint: Checkpoint) -> int | None:
    """The step in the metadata of a GPT-NeoX checkpoint, if it differs from the folder."""
    state = checkpoint.neox
    if state is None or state.named_step in (None, state.iteration):
        return None
    return state.iteration
