"""Writes the mp_rank files of a resharded run, from those of the source."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neox_bridge.formats.pickle_writer import TensorSlot
from neox_bridge.formats.pickles import Record
from neox_bridge.layouts.checkpoint import LayoutName
from neox_bridge.layouts.universal_folder import INFO, Parameter
from neox_bridge.planning.random_states import of_rank
from neox_bridge.tensors.pieces import OutputTensor, box
from neox_bridge.tensors.tensor_ref import TensorRef

_LAYER = re.compile(r"(?:sequential\.)?(\d+)\.(.+)")


@dataclass(frozen=True)
class Sources:
    """The contents of the source's mp_rank files by number, and the number of its TP ranks.

    generators: the state of each tracked generator on rank 0, by name.
    """

    metas: Sequence[Mapping[str, Any]]
    tp: int
    generators: Mapping[str, bytes]

    def of(self, stage: int, rank: int) -> Mapping[str, Any]:
        """The content that is closest to a stage and rank; rank 0 for missing ranks."""
        stages = len(self.metas) // self.tp
        return self.metas[min(stage, stages - 1) * self.tp + (rank if rank < self.tp else 0)]

    def derived(self, tp: int) -> tuple[int, ...]:
        """The ranks of ``tp`` whose random states must be derived."""
        return tuple(range(self.tp, tp)) if self.generators else ()


def mp_rank(
    sources: Sources, stage: int, rank: int, new: Mapping[str, Any]
) -> tuple[dict[str, Any], list[OutputTensor]]:
    """The content of one file, and its tensors. new: values that differ from the source."""
    tensors: list[OutputTensor] = []
    value = {**sources.of(stage, rank), **new}
    if value.get(INFO) is None:
        value.pop(INFO, None)
    states = value.get("rng_tracker_states")
    if rank >= sources.tp and isinstance(states, dict):
        generators = {}
        for name in states:
            data, _ = of_rank(sources.generators[name], rank)
            slot = f"rng_tracker_states.{name}"
            tensors.append(OutputTensor(slot, "uint8", (len(data),), inline=data))
            generators[name] = TensorSlot(slot)
        value["rng_tracker_states"] = generators
    return {key: with_slots(entry, key, tensors) for key, entry in value.items()}, tensors


def with_slots(value: Any, name: str, tensors: list[OutputTensor]) -> Any:
    """Prepare a value for writing: tensors are replaced by slots and added to ``tensors``."""
    if isinstance(value, TensorRef):
        tensors.append(OutputTensor(name, value.dtype, value.shape, (box(value),)))
        return TensorSlot(name)
    if isinstance(value, dict):
        slots = {key: with_slots(entry, f"{name}.{key}", tensors) for key, entry in value.items()}
        return type(value)(slots)
    if isinstance(value, list | tuple):
        entries = [with_slots(entry, f"{name}.{n}", tensors) for n, entry in enumerate(value)]
        return type(value)(entries)
    if isinstance(value, Record) and not isinstance(value.state, tuple):
        return replace(value, state=with_slots(value.state, name, tensors))
    return value


def buffer_names(metas: Sequence[Mapping[str, Any]], layers: range, prefix: str) -> list[str]:
    """The buffers that a stage with these layers stores. prefix: the prefix of their names."""
    named = {name for meta in metas for name in meta.get("buffer_names") or ()}
    buffers = [(int(m[1]), m[2]) for name in named if (m := _LAYER.fullmatch(name))]
    return [f"{prefix}{layer}.{name}" for layer, name in sorted(buffers) if layer in layers]


def parameter_name(parameter: Parameter, *, layout: LayoutName, tied: bool) -> str:
    """DeepSpeed's name of a parameter. tied: whether the head is the embeddings."""
    layer, name = parameter
    if layout == "ranks":
        return f"sequential.{layer}.{name}"
    return f"tied_modules.embed.{name}" if layer == 0 and tied else f"{layer}.{name}"
