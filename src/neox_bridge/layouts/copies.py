"""Tensors that a checkpoint stores twice: identical copies, or two models in one folder."""

import os
from dataclasses import replace

from neox_bridge.errors import Refused
from neox_bridge.findings import Finding
from neox_bridge.layouts.checkpoint import Checkpoint, Copy
from neox_bridge.layouts.same_values import same_bytes
from neox_bridge.wording import some

_SHOWN = 3


def check_copies(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a finding for identical copies. Raises Refused if two differ."""
    if not checkpoint.copies:
        return checkpoint
    differing, unknown = _compared(checkpoint, None)
    if differing:
        raise Refused(f"{checkpoint.path}: {_differ(differing)}. {_remedy(differing)}.")
    finding = _not_differing(checkpoint, unknown)
    return replace(checkpoint, copies=(), findings=(*checkpoint.findings, finding))


def copy_findings(checkpoint: Checkpoint, most_bytes: int | None = None) -> list[Finding]:
    """The findings about tensors that are stored twice.

    most_bytes: the most bytes of each copy to compare.
    """
    if not checkpoint.copies:
        return []
    differing, unknown = _compared(checkpoint, most_bytes)
    if not differing:
        return [_not_differing(checkpoint, unknown)]
    remedy = _remedy(differing)
    remedy = remedy[0].lower() + remedy[1:]
    return [Finding("copies-differ", "error", _differ(differing), remedy)]


def _compared(checkpoint: Checkpoint, most_bytes: int | None) -> tuple[list[Copy], bool]:
    """The copies that differ, and whether some could not be compared completely."""
    copies = checkpoint.copies
    relations = [same_bytes(copy.read, copy.other, most_bytes) for copy in copies]
    differing = [copy for copy, how in zip(copies, relations, strict=True) if how == "differs"]
    return differing, "unknown" in relations


def _not_differing(checkpoint: Checkpoint, unknown: bool) -> Finding:
    names = some([_both(copy) for copy in checkpoint.copies], _SHOWN)
    if unknown:
        message = (
            f"stored twice: {names}. The first bytes are equal. A conversion compares all of them"
        )
        return Finding("copies-not-compared", "info", message)
    return Finding("copies-equal", "info", f"stored twice with identical bytes: {names}")


def _differ(copies: list[Copy]) -> str:
    names = some([_both(copy) for copy in copies], _SHOWN)
    first = copies[0]
    read, other = (os.path.basename(ref.file) for ref in (first.read, first.other))
    message = f"stored twice with different values: {names}"
    if read == other:
        return f"{message}, so different programs load different models"
    which = max(read, other)  # transformers loads shard after shard, in the order of their names
    of = f" for {first.name}" if len(copies) > 1 else ""
    return f"{message}. The index names {read}{of}, transformers uses the copy in {which}"


def _remedy(copies: list[Copy]) -> str:
    if any(copy.read.file != copy.other.file for copy in copies):
        return "Remove the wrong copy, or download or save the checkpoint again"
    return "Remove the wrong one from the file, or save the checkpoint again"


def _both(copy: Copy) -> str:
    """A tensor and its two places."""
    read, other = (os.path.basename(ref.file) for ref in (copy.read, copy.other))
    if read == other:
        return f"{copy.read_as} and {copy.other_as} in {read}"
    if copy.read_as == copy.other_as:
        return f"{copy.read_as} in {read} and {other}"
    return f"{copy.read_as} in {read} and {copy.other_as} in {other}"
