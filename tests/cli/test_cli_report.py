"""Plans as data: numbers, hash, schema."""

from dataclasses import replace

import pytest
from jsonschema import Draft202012Validator, ValidationError
from schemas import plan_schema

from neox_bridge.findings import Dropped
from neox_bridge.planning.plan import Plan
from neox_bridge.planning.report import plan_hash, summary, to_json
from neox_bridge.tensors.pieces import OutputFile, OutputTensor, Piece, box
from neox_bridge.tensors.tensor_ref import TensorRef

REF = TensorRef("/source", 100, "float16", (4, 6))


def plan_of(*tensors: OutputTensor, literal: bytes = b"header") -> Plan:
    size = len(literal) + sum(tensor.nbytes for tensor in tensors)
    copy = OutputFile("tokenizer.json", 10, copy_of="/tokenizer.json")
    target = {
        "kind": "hf",
        "architecture": "gpt_neox",
        "layout": "1 safetensors file",
        "dtype": "float16",
        "vocab_rows": 4,
        "parameters": 24,
    }
    source = {"kind": "hf", "name": "x", "dtype": "float16"}
    file = OutputFile("model.safetensors", size, ((0, literal),), tensors)
    return Plan(source, target, (file, copy), (Dropped("a", "why"), Dropped("b", "why")))


def whole(**changes: object) -> OutputTensor:
    return replace(OutputTensor("w", "float16", (4, 6), (box(REF),)), **changes)


COLUMNS = Piece(REF, (0, 0), (0, 0), (4, 3))


@pytest.mark.parametrize(
    ("tensor", "copied", "transformed"),
    [
        (whole(), 48, 0),
        (whole(shape=(4, 3), pieces=(COLUMNS,)), 0, 24),
        (whole(dtype="float32"), 0, 96),
        (whole(reduce="sum", pieces=(box(REF), box(REF))), 0, 48),
        (whole(divisor=2), 0, 48),
        (whole(pieces=(), random=1), 0, 48),
        (whole(pieces=(Piece(None, (0, 0), (0, 0), (4, 6)),)), 0, 48),
        (whole(shape=(8, 6), pieces=(box(REF), Piece(None, (0, 0), (4, 0), (4, 6)))), 48, 48),
    ],
)
def test_bytes_by_how_they_move(tensor: OutputTensor, copied: int, transformed: int) -> None:
    numbers = summary(plan_of(tensor), 0)
    assert numbers["bytes_copied"] == copied + 10
    assert numbers["bytes_transformed"] == transformed
    assert numbers["bytes_from_plan"] == len(b"header")
    assert numbers["bytes"] == copied + transformed + 16
    assert numbers["dropped"] == {"why": 2}


def test_inline_bytes_are_the_plan_s_own() -> None:
    numbers = summary(plan_of(whole(shape=(2,), pieces=(), inline=b"abcd")), 0)
    assert numbers["bytes_from_plan"] == 10
    assert numbers["bytes_transformed"] == 0


def test_the_hash_covers_every_byte_and_source() -> None:
    base = plan_of(whole())
    inline = whole(shape=(2,), pieces=(), inline=b"abcd")
    others = [
        plan_of(whole(), literal=b"HEADER"),
        plan_of(whole(pieces=(box(replace(REF, offset=101)),))),
        plan_of(whole(pieces=(box(replace(REF, file="/other")),))),
        plan_of(whole(dtype="bfloat16")),
        plan_of(whole(pieces=(Piece(None, (0, 0), (0, 0), (4, 6), 0.0),))),
        plan_of(whole(pieces=(Piece(None, (0, 0), (0, 0), (4, 6), -0.0),))),
        plan_of(inline),
        plan_of(replace(inline, inline=b"abce")),
    ]
    hashes = {plan_hash(plan) for plan in [base, *others]}
    assert len(hashes) == 1 + len(others)
    assert plan_hash(base) == plan_hash(plan_of(whole()))
    assert plan_hash(replace(base, notes=("another word",))) == plan_hash(base)


def test_the_hash_stays_the_same_between_versions() -> None:
    """A resumed run compares it with one of an earlier process."""
    known = "b1ccc66db1857d559642b275e7861383d00639aa67c66bcdf40daf57f7693501"
    assert plan_hash(plan_of(whole())) == known


def test_the_schema_is_strict() -> None:
    schema = plan_schema()
    Draft202012Validator.check_schema(schema)
    document = to_json(plan_of(whole()), 0)
    Draft202012Validator(schema).validate(document)
    for part in (document, document["files"][0], document["files"][0]["tensors"][0]):
        part["more"] = 1
        with pytest.raises(ValidationError):
            Draft202012Validator(schema).validate(document)
        del part["more"]
