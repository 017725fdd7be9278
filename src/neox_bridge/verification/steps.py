"""Reads one checkpoint of a run for an audit: fingerprints and config."""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import xxhash

from neox_bridge.findings import Severity
from neox_bridge.frameworks.unknown_keys import UnknownKey
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.stored_model import StoredModel, dtype_of_most_elements
from neox_bridge.layouts.text_files import LARGE_BYTES, read_bytes
from neox_bridge.optimizer.read_export import number_in
from neox_bridge.optimizer.states import Optimizer
from neox_bridge.stores.folder import is_hub
from neox_bridge.stores.paths import states
from neox_bridge.verification.config_differences import config_values
from neox_bridge.verification.hash_cache import check_same, identify, look_up, remember
from neox_bridge.verification.hashes import Fingerprint, fingerprints, sources
from neox_bridge.verification.optimizer import named
from neox_bridge.verification.runs import Fault, StepLocation

ReadBy = Literal["family", "names"]
_CONTENT_HASH = re.compile(r"[0-9a-f]{40,64}")
_SEED = re.compile(r"seed[-_]?(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Step:
    """The content of a checkpoint for an audit.

    Attributes:
        meaning: The config under neutral key names, with the sizes of the tensors except the
            vocabulary; {} if its family is unknown.
        seed: From the yml, or from the run's name (``pythia-70m-seed3``).
        making: The other settings that the initial weights depend on.
        files: The names of the files that contain a tensor, by rank.
        read: How many tensors were read; the fingerprints of the others were cached.
        states: Fingerprints of the optimizer states, as "exp_avg: name", if they are audited.
        updates: How many steps the optimizer has made and skipped, by parameter group.
        unknown_keys: The unknown keys in the checkpoint's settings.
        read_by: Whether a family or only the names in the files say which tensors there are.
        reason: Why no family is used, as a sentence; "" if one would be.
        config: The values of config.json by their keys, as text. Keys in blocks have dots.
        transformers: The version that wrote config.json, or "".
        tokenizer: A hash of each tokenizer file beside the weights.
    """

    run: str
    label: str
    number: int | None
    path: str
    kind: str
    tp: int
    dtype: str
    seed: int | None
    tensors: Mapping[str, Fingerprint]
    files: Mapping[str, tuple[str, ...]]
    size: int
    read: int
    meaning: Mapping[str, object] = field(default_factory=dict)
    making: tuple[str, ...] = ()
    iteration: int | None = None
    states: Mapping[str, Fingerprint] = field(default_factory=dict)
    updates: tuple[int, ...] = ()
    unknown_keys: tuple[UnknownKey, ...] = ()
    read_by: ReadBy = "family"
    reason: str = ""
    config: Mapping[str, str] = field(default_factory=dict)
    transformers: str = ""
    tokenizer: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def hash(self) -> str:
        """The hash of all tensors together, with their names."""
        state = xxhash.xxh3_128()
        for name, tensor in sorted(self.tensors.items()):
            state.update(f"{name} {tensor.hash}\n".encode())
        return state.hexdigest()

    @cached_property
    def norm(self) -> float:
        """The L2 norm of all tensors together that can be decoded."""
        return math.sqrt(sum((tensor.norm or 0.0) ** 2 for tensor in self.tensors.values()))

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
    checkpoint: Checkpoint | StoredModel,
    *,
    family: Checkpoint | None = None,
    optimizer: Optimizer | None = None,
    cache: str | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Step:
    """Read everything that is not cached. Raises BridgeError if a file cannot be read.

    Args:
        family: A Hugging Face checkpoint as its family reads it, if its weights are read by names.
        optimizer: The optimizer of the checkpoint, if its states are also read.
    """
    weights = checkpoint
    if optimizer is not None and isinstance(checkpoint, Checkpoint):
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
    if isinstance(checkpoint, StoredModel):
        tensors = {name: _undecoded(checkpoint, name, one) for name, one in tensors.items()}
        facts = dict[str, Any](
            dtype=dtype_of_most_elements(checkpoint), read_by="names", reason=checkpoint.reason
        )
    else:
        family = checkpoint
        facts = dict[str, Any](dtype=checkpoint.config.dtype, making=_making(checkpoint))
    if family is not None:
        facts |= {"meaning": _meaning(family), "unknown_keys": family.unknown_keys}
    state = checkpoint.neox
    return Step(
        run=run,
        label=place.label,
        number=place.number,
        path=place.path,
        kind=checkpoint.kind,
        tp=1 if state is None else state.tp,
        seed=_seed(run, checkpoint.raw if state is not None else {}),
        tensors={name: tensors[name] for name in weights.tensors},
        files={
            name: tuple(_file_name(checkpoint, ref.file) for ref in sources(whole))
            for name, whole in checkpoint.tensors.items()
        },
        size=weights.size,
        read=len(tensors) - len(known),
        iteration=_iteration(checkpoint),
        config=config_values(checkpoint) if checkpoint.kind == "hf" else {},
        transformers=str(checkpoint.raw.get("transformers_version", "")),
        tokenizer=_tokenizer(checkpoint.tokenizer) if checkpoint.kind == "hf" else {},
        states={name: tensors[name] for name in tensors if name not in weights.tensors},
        updates=_updates(optimizer) if optimizer is not None else (),
        **facts,
    )


def _undecoded(model: StoredModel, name: str, fingerprint: Fingerprint) -> Fingerprint:
    """The fingerprint of a tensor, without a norm if only its bytes are known."""
    tensor = model.stored[name]
    if tensor.decoded:
        return fingerprint
    return replace(fingerprint, dtype=tensor.dtype, shape=tensor.shape, norm=None, bad=0)


def _file_name(checkpoint: Checkpoint | StoredModel, file: str) -> str:
    """The name of a file of weights, with its folder if there are several components."""
    if isinstance(checkpoint, StoredModel):
        return file.removeprefix(checkpoint.path).lstrip("/")
    return os.path.basename(file)


def _tokenizer(files: Iterable[str]) -> dict[str, str]:
    """A hash of each file: of a model on the Hub the one that the Hub states, without reading."""
    hashes = {}
    for file in files:
        stated = states([file])[file].tag if is_hub(file) else ""
        if not _CONTENT_HASH.fullmatch(stated):
            stated = xxhash.xxh3_128(read_bytes(file, LARGE_BYTES)).hexdigest()
        hashes[os.path.basename(file)] = stated
    return hashes


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


def _iteration(checkpoint: Checkpoint | StoredModel) -> int | None:
    """The step in the metadata of a GPT-NeoX checkpoint, if it differs from the folder."""
    state = checkpoint.neox
    if state is None or state.named_step in (None, state.iteration):
        return None
    return state.iteration
