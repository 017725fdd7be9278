"""Describes what a fix will change in each file: settings and tensors, old and new."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from neox_bridge.architectures.base import INV_FREQ
from neox_bridge.doctor.judge_hf import stored_names
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.text_files import read_json
from neox_bridge.planning.plan import Plan
from neox_bridge.stores.paths import real, walk
from neox_bridge.tensors.pieces import OutputFile, OutputTensor
from neox_bridge.tensors.tensor_ref import TensorRef

Kind = Literal["added", "removed", "changed", "renamed", "rewritten"]
_LAYER = re.compile(r"^sequential\.\d+\.|(?<=layers\.)\d+(?=\.)")
# A stored tensor: its file, and its offset there.
_Place = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Edit:
    """A setting or a tensor that changes.

    Attributes:
        kind: What happens to it. The values of "renamed" tensors stay the same.
        before: A setting with its value, or tensors with their shapes; "" if it is added.
        after: The new value, shape or tensor; "" if it is removed.
        count: How many tensors change in this way, one in each layer.
    """

    kind: Kind
    before: str
    after: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class FileChange:
    """A file that the fix writes or leaves out.

    Attributes:
        path: Relative to the fixed checkpoint; for a removed file, to the folder of its weights.
        kind: What happens to the file. A "rewritten" file has the same settings and tensors.
        edits: What changes in it.
    """

    path: str
    kind: Kind
    edits: tuple[Edit, ...] = ()


def new_args(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """The args in the mp_rank files of a fixed GPT-NeoX checkpoint, of those that may change."""
    return {
        "make_vocab_size_divisible_by": plan.target["vocab_multiple"],
        "padded_vocab_size": plan.target["vocab_rows"],
        "model_parallel_size": checkpoint.neox_state.tp,
    }


def changes_of(checkpoint: Checkpoint, plan: Plan) -> list[FileChange]:
    """Every file that a plan of ``fixes`` writes or leaves out, in plan order."""
    folder = checkpoint.neox.folder if checkpoint.neox is not None else checkpoint.path
    old = {
        inside: path
        for path, size in walk(folder)
        if size is not None
        and ".git" not in (inside := path[len(os.path.join(folder, "")) :]).split("/")
    }
    stored = _stored(checkpoint)
    unused = dict(stored)
    changes: dict[str, FileChange] = {}
    kept = {file.copy_of for file in plan.files}
    for file in plan.files:
        if file.copy_of is None:
            edits = [*_setting_edits(checkpoint, plan, file)]
            edits += _tensor_edits(checkpoint, file.tensors, stored, unused)
            is_neox = checkpoint.neox is not None
            inside = re.sub(r"^global_step\w+/", "", file.path) if is_neox else file.path
            kind: Kind = "rewritten" if inside in old else "added"
            if edits and inside in old:
                kind = "changed"
            changes[inside] = FileChange(file.path, kind, _counted(edits))
    gone: dict[str, list[Edit]] = {}
    for name, ref in unused.values():
        gone.setdefault(ref.file, []).append(Edit("removed", _shown(name, ref), ""))
    for inside, path in old.items():
        if real(path) not in kept:
            change = changes.get(inside, FileChange(inside, "removed"))
            if path in gone and change.kind == "rewritten":
                change = replace(change, kind="changed")
            edits = [*change.edits, *_counted(gone.get(path, ()))]
            changes[inside] = replace(change, edits=tuple(edits))
    return list(changes.values())


def _stored(checkpoint: Checkpoint) -> dict[_Place, tuple[str, TensorRef]]:
    """Every stored tensor with its name in its file, without the layer number."""
    if checkpoint.neox is None:
        named: Iterable[tuple[str, TensorRef]] = stored_names(checkpoint).items()
    else:
        layers = (layer for rank in checkpoint.neox.ranks for layer in rank.values())
        named = (pair for layer in layers for pair in layer.items())
    return {(ref.file, ref.offset): (name, ref) for name, ref in named}


def _tensor_edits(
    checkpoint: Checkpoint,
    tensors: Iterable[OutputTensor],
    stored: Mapping[_Place, tuple[str, TensorRef]],
    unused: dict[_Place, tuple[str, TensorRef]],
) -> Iterator[Edit]:
    """The changes of tensors. Removes the tensors that they are made of from ``unused``."""
    names = {name for name, _ in stored.values()}
    for tensor in tensors:
        sources = [piece.source for piece in tensor.pieces if piece.source is not None]
        places = list(dict.fromkeys((source.file, source.offset) for source in sources))
        parts = [stored[place] for place in places if place in stored]
        for place in places:
            unused.pop(place, None)
        plain = re.sub(r"^sequential\.\d+\.", "", tensor.name)
        after = f"{plain} {list(tensor.shape)}"
        before = " + ".join(_shown(name, ref) for name, ref in parts)
        if not parts and plain in names:  # a buffer that is recomputed
            for place in [place for place, (name, _) in unused.items() if name == plain]:
                del unused[place]
            if checkpoint.inv_freq_mismatch is not None:
                yield Edit("changed", after, "computed from the settings")
        elif not parts:
            if tensor.inline is None or plain.endswith(INV_FREQ):  # others are RNG states
                yield Edit("added", "", after)
        elif before != after:
            if len(parts) == 1 and parts[0][0] == plain:
                yield Edit("changed", before, f"{list(tensor.shape)}")
            else:
                yield Edit("renamed", before, after)


def _shown(name: str, ref: TensorRef) -> str:
    return f"{name} {list(ref.shape)}"


def _counted(edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """Merge equal edits of all layers."""
    counts: dict[Edit, int] = {}
    for edit in edits:
        plain = replace(edit, before=_any_layer(edit.before), after=_any_layer(edit.after))
        counts[plain] = counts.get(plain, 0) + 1
    return tuple(replace(edit, count=count) for edit, count in counts.items())


def _any_layer(text: str) -> str:
    return _LAYER.sub(lambda match: "*" if match[0].isdigit() else "", text)


def _setting_edits(checkpoint: Checkpoint, plan: Plan, file: OutputFile) -> Iterator[Edit]:
    """The changed settings of a yml, of config.json, or of the args of an mp_rank file."""
    before: Mapping[str, Any] = {}
    after: Mapping[str, Any] = {}
    if checkpoint.neox is not None and file.path.endswith("/configs/neox_bridge.yml"):
        import yaml

        before, after = checkpoint.raw, yaml.safe_load(_text(file))
    elif checkpoint.neox is not None and "/mp_rank_" in file.path:
        after = new_args(checkpoint, plan)
        before = {key: checkpoint.neox.args.get(key, value) for key, value in after.items()}
    elif checkpoint.neox is None and file.path == "config.json":
        before = read_json(os.path.join(checkpoint.path, file.path))
        after = json.loads(_text(file))
    for key in dict.fromkeys((*before, *after)):
        old, new = (json.dumps(side.get(key), default=str) for side in (before, after))
        if key not in after:
            yield Edit("removed", f"{key}: {old}", "")
        elif key not in before:
            yield Edit("added", "", f"{key}: {new}")
        elif before[key] != after[key]:
            yield Edit("changed", f"{key}: {old}", new)


def _text(file: OutputFile) -> bytes:
    return b"".join(data for _, data in file.literals)
