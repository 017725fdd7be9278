"""Tensors that a checkpoint stores twice: the same bits, or two models in one folder."""

import os
from dataclasses import replace

from neox_bridge.errors import Refused
from neox_bridge.findings import Finding
from neox_bridge.layouts.checkpoint import Checkpoint, Copy
from neox_bridge.layouts.same_values import Relation, same_bytes
from neox_bridge.wording import some

_SHOWN = 3


def check_copies(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a finding for copies that are the same bits. Refused where two differ."""
    if not checkpoint.copies:
        return checkpoint
    if differing := _with(checkpoint, "differs", None):
        raise Refused(f"{checkpoint.path}: {_differ(differing)}. {_remedy(differing)}.")
    return replace(
        checkpoint, copies=(), findings=(*checkpoint.findings, *copy_findings(checkpoint))
    )


def copy_findings(checkpoint: Checkpoint, most_bytes: int | None = None) -> list[Finding]:
    """What to say of tensors that are stored twice.

    most_bytes: of each copy, to compare at most.
    """
    if not checkpoint.copies:
        return []
    if differing := _with(checkpoint, "differs", most_bytes):
        message, remedy = _differ(differing), _remedy(differing)
        return [Finding("copies-differ", "error", message, remedy[0].lower() + remedy[1:])]
    names = some([_both(copy) for copy in checkpoint.copies], _SHOWN)
    if _with(checkpoint, "unknown", most_bytes):
        message = f"stored twice: {names}. The first bytes are equal; converting compares them all"
        return [Finding("copies-not-compared", "info", message)]
    return [Finding("copies-equal", "info", f"stored twice, byte for byte the same: {names}")]


def _with(checkpoint: Checkpoint, wanted: Relation, most_bytes: int | None) -> list[Copy]:
    """The copies that stand so to the tensors that are read."""
    return [
        copy
        for copy in checkpoint.copies
        if same_bytes(copy.read, copy.other, most_bytes) == wanted
    ]


def _differ(copies: list[Copy]) -> str:
    names = some([_both(copy) for copy in copies], _SHOWN)
    first = copies[0]
    read, other = (os.path.basename(ref.file) for ref in (first.read, first.other))
    message = f"stored twice with different values: {names}"
    if read == other:
        return f"{message}, so which model this is depends on who reads it"
    which = max(read, other)  # transformers loads shard after shard, in the order of their names
    of = f" for {first.name}" if len(copies) > 1 else ""
    return f"{message}. The index names {read}{of}, transformers takes the copy in {which}"


def _remedy(copies: list[Copy]) -> str:
    if any(copy.read.file != copy.other.file for copy in copies):
        return "Remove the wrong copy, or download or save the checkpoint again"
    return "Remove the wrong one from the file, or save the checkpoint again"


def _both(copy: Copy) -> str:
    """A tensor, and the two places where it is."""
    read, other = (os.path.basename(ref.file) for ref in (copy.read, copy.other))
    if read == other:
        return f"{copy.read_as} and {copy.other_as} in {read}"
    if copy.read_as == copy.other_as:
        return f"{copy.read_as} in {read} and {other}"
    return f"{copy.read_as} in {read} and {copy.other_as} in {other}"
