"""A plan as plain data: to print, to save as JSON (``plan.schema.json``), and to hash."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from hashlib import sha256
from typing import Any

from neox_bridge.documents import SCHEMA_VERSION
from neox_bridge.findings import Dropped, finding_json
from neox_bridge.planning.plan import Plan
from neox_bridge.tensors.pieces import OutputFile, OutputTensor, Piece, byte_range
from neox_bridge.tensors.tensor_ref import TensorRef

_HASH_VERSION = 1  # version of what the hash covers


def summary(plan: Plan, peak_memory: int | None) -> dict[str, Any]:
    """The plan in numbers. ``peak_memory`` is left out if it is None; see ``execution.memory``.

    bytes_copied: are copied unchanged, as runs of bytes. bytes_transformed: are cast, strided,
    summed, filled or generated. bytes_from_plan: are in the plan itself: headers, pickles, small
    text files.
    """
    tensors = [tensor for file in plan.files for tensor in file.tensors]
    unchanged = sum(copied(tensor) for tensor in tensors)
    inline = sum(len(tensor.inline) for tensor in tensors if tensor.inline is not None)
    transformed = sum(tensor.nbytes for tensor in tensors) - unchanged - inline
    taken_over = sum(file.size for file in plan.files if file.copy_of is not None)
    return {
        "files": len(plan.files),
        "tensors": len(tensors),
        "parameters": plan.target.get("parameters"),
        "bytes": plan.size,
        "bytes_copied": unchanged + taken_over,
        "bytes_transformed": transformed,
        "bytes_from_plan": plan.size - unchanged - taken_over - transformed,
        **({} if peak_memory is None else {"peak_memory": peak_memory}),
        "dropped": {reason: len(names) for reason, names in by_reason(plan.dropped).items()},
    }


def to_json(
    plan: Plan, peak_memory: int | None, source: str = "", target: str = ""
) -> dict[str, Any]:
    """The whole plan, with only the place and length of literal bytes.

    source, target: the paths of both sides, as the caller named them.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "hash": plan_hash(plan),
        **sides(plan, source, target),
        "summary": summary(plan, peak_memory),
        "files": [_file(file) for file in plan.files],
        "casts": casts_json(plan),
        **remarks(plan),
    }


def sides(plan: Plan, source: str, target: str) -> dict[str, Any]:
    """A description of both sides of a plan, with their paths as the caller named them."""
    return {
        "source": {**plan.source, **({"path": source} if source else {})},
        "target": {**plan.target, **({"path": target} if target else {})},
    }


def remarks(plan: Plan) -> dict[str, Any]:
    """The information in a plan besides its files."""
    return {
        "dropped": [{"name": drop.name, "reason": drop.reason} for drop in plan.dropped],
        "findings": [finding_json(finding) for finding in plan.findings],
        "blanks": [{"file": file, "key": key} for file, key in plan.blanks],
        "notes": list(plan.notes),
        "carried": list(plan.carried),
        "not_carried": [asdict(file) for file in plan.left],
    }


def casts_json(plan: Plan) -> list[dict[str, Any]]:
    """The casts of a plan as plain data."""
    return [asdict(cast) for cast in plan.casts]


def plan_hash(plan: Plan) -> str:
    """The SHA-256 of what is written and from where, including literal bytes.

    Explanatory texts do not affect it.
    """
    digest = sha256(str(_HASH_VERSION).encode())
    for file in plan.files:
        digest.update(repr((file.path, file.size, file.copy_of, file.seals)).encode())
        for at, data in file.literals:
            digest.update(repr((at, len(data))).encode() + data)
        for t in file.tensors:
            pieces = [_piece_facts(p) for p in t.pieces]
            facts = (t.name, t.dtype, t.shape, t.reduce, t.divisor, t.random, t.offset, t.crc_at)
            digest.update(repr((facts, t.inline, pieces)).encode())
    return digest.hexdigest()


def _piece_facts(piece: Piece) -> tuple[object, ...]:
    """The facts of a piece. A scale of 1 is left out, so that older plans keep their hash."""
    source = piece.source and _facts(piece.source)
    scale = () if piece.scale == 1 else (piece.scale,)
    return (source, piece.start, piece.to, piece.shape, piece.fill, *scale)


def _facts(ref: TensorRef) -> tuple[object, ...]:
    return ref.file, ref.offset, ref.dtype, ref.shape, ref.strides


def by_reason(dropped: Iterable[Dropped]) -> Mapping[str, list[str]]:
    """Group the names of what was dropped by reason, in the order of first appearance."""
    names: dict[str, list[str]] = {}
    for drop in dropped:
        names.setdefault(drop.reason, []).append(drop.name)
    return names


def is_plain(tensor: OutputTensor) -> bool:
    """Whether values are copied unchanged: no sum, cast, division or generated value."""
    return (
        tensor.reduce == "none"
        and tensor.divisor == 1
        and tensor.inline is None
        and tensor.random is None
    )


def copied(tensor: OutputTensor) -> int:
    """Bytes of a tensor that are copied unchanged, as runs of bytes."""
    if not is_plain(tensor):
        return 0
    runs = (
        byte_range(piece, tensor.shape)
        for piece in tensor.pieces
        if piece.source is not None and piece.source.dtype == tensor.dtype
    )
    return sum(run[2] for run in runs if run is not None)


def _file(file: OutputFile) -> dict[str, Any]:
    return {
        "path": file.path,
        "size": file.size,
        "copy_of": file.copy_of,
        "literals": [{"offset": offset, "length": len(data)} for offset, data in file.literals],
        "tensors": [_tensor(tensor) for tensor in file.tensors],
    }


def _tensor(tensor: OutputTensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "offset": tensor.offset,
        "nbytes": tensor.nbytes,
        "reduce": tensor.reduce,
        "divisor": tensor.divisor,
        "random": tensor.random,
        "inline": None if tensor.inline is None else len(tensor.inline),
        "crc_at": list(tensor.crc_at),
        "pieces": [_piece(piece) for piece in tensor.pieces],
    }


def _piece(piece: Piece) -> dict[str, Any]:
    return {
        "source": None if piece.source is None else _ref(piece.source),
        "start": list(piece.start),
        "to": list(piece.to),
        "shape": list(piece.shape),
        "fill": piece.fill,
        "scale": piece.scale,
    }


def _ref(ref: TensorRef) -> dict[str, Any]:
    return {
        "file": ref.file,
        "offset": ref.offset,
        "dtype": ref.dtype,
        "shape": list(ref.shape),
        "strides": None if ref.strides is None else list(ref.strides),
    }
