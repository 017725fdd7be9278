"""The estimate of the memory that an execution takes, against what it takes."""

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neox_bridge.execution import buffers, digests, movers, output, streams, transform
from neox_bridge.execution.execute import execute
from neox_bridge.execution.memory import RUNTIME_BYTES, peak_memory
from neox_bridge.planning.plan import Plan
from neox_bridge.stores import ranges
from neox_bridge.tensors.dtypes import itemsize
from neox_bridge.tensors.pieces import OutputFile, OutputTensor, Piece, box
from neox_bridge.tensors.tensor_ref import TensorRef

ROWS, COLUMNS = 2048, 2048
REF = TensorRef("/source", 0, "float32", (ROWS, COLUMNS))
HALF = Piece(REF, (0, 0), (0, 0), (ROWS, COLUMNS // 2))
TENSORS = {
    "copied": OutputTensor("t", "float32", REF.shape, (box(REF),)),
    "columns": OutputTensor("t", "float32", HALF.shape, (HALF,)),
    "cast": OutputTensor("t", "bfloat16", REF.shape, (box(REF),)),
    "scaled": OutputTensor("t", "float32", REF.shape, (replace(box(REF), scale=3.0),)),
    "divided": OutputTensor("t", "bfloat16", REF.shape, (box(REF),), divisor=3),
    "sum": OutputTensor("t", "float32", REF.shape, (box(REF),) * 4, reduce="sum"),
    "mean": OutputTensor("t", "float16", REF.shape, (box(REF),) * 4, reduce="replica"),
    "random": OutputTensor("t", "bfloat16", REF.shape, (), random=1),
}


def plan_of(tensor: OutputTensor, count: int = 1) -> Plan:
    size = ROWS * COLUMNS * itemsize(tensor.dtype) if not tensor.pieces else tensor.nbytes
    tensors = tuple(replace(tensor, name=f"t{n}", offset=8 + n * size) for n in range(count))
    file = OutputFile("model.safetensors", 8 + count * size, ((0, bytes(8)),), tensors)
    return Plan({}, {}, (file,))


def read_from(tensor: OutputTensor, folder: Path) -> OutputTensor:
    """The tensor with a file of its own for each piece, the values of which all differ."""
    pieces = []
    for number, piece in enumerate(tensor.pieces):
        values = np.random.default_rng(number).normal(size=REF.shape).astype(np.float32)
        (folder / f"source{number}").write_bytes(values.tobytes())
        ref = replace(REF, file=str(folder / f"source{number}"))
        pieces.append(replace(piece, source=ref))
    return replace(tensor, pieces=tuple(pieces))


def measured(plan: Plan, folder: Path, workers: int) -> int:
    """Bytes that are taken at most while a plan is executed."""
    execute(plan, str(folder / "before"), workers=1)  # what is taken once, such as tables
    tracemalloc.start()
    execute(plan, str(folder / "out"), workers=workers)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_is_taken_than_estimated_and_not_much_less(
    kind: str, workers: int, tmp_path: Path
) -> None:
    plan = plan_of(read_from(TENSORS[kind], tmp_path), count=4)
    peak = measured(plan, tmp_path, workers)
    estimate = peak_memory(plan, str(tmp_path / "out"), workers) - RUNTIME_BYTES
    assert peak <= estimate, (peak, estimate)
    assert estimate <= 5 * peak + output.SMALL_BYTES, (peak, estimate)


@pytest.mark.parametrize(
    ("module", "name", "kind", "place"),
    [
        (transform, "STEP_BYTES", "cast", ""),
        (transform, "WIDE_BYTES", "cast", ""),
        (transform, "GAPS", "sum", ""),
        (buffers, "ROOM_BYTES", "columns", ""),
        (digests, "STEP_BYTES", "copied", ""),
        (movers, "BUFFER_BYTES", "copied", ""),
        (output, "SMALL_BYTES", "copied", ""),
        (streams, "PARTS_IN_MEMORY", "copied", "target"),
        (ranges, "MEMORY", "copied", "source"),
    ],
)
def test_the_estimate_follows_what_the_executor_works_with(
    module: Any, name: str, kind: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = TENSORS[kind]
    if place == "source":
        tensor = replace(tensor, pieces=(box(replace(REF, file="s3://bucket/source")),))
    plan, target = plan_of(tensor), "s3://bucket/out" if place == "target" else "out"
    before = peak_memory(plan, target)
    monkeypatch.setattr(module, name, 3 * getattr(module, name))
    assert peak_memory(plan, target) != before


def test_larger_blocks_take_as_much_more_as_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(read_from(TENSORS["cast"], tmp_path))
    small = measured(plan, tmp_path / "small", 1)
    monkeypatch.setattr(transform, "STEP_BYTES", 4 * transform.STEP_BYTES)
    large = measured(plan, tmp_path / "large", 1)
    assert small < large <= peak_memory(plan, "", 1) - RUNTIME_BYTES


def test_threads_and_literal_bytes_are_counted() -> None:
    plan = plan_of(TENSORS["cast"])
    one, two = peak_memory(plan, "", 1), peak_memory(plan, "", 2)
    assert peak_memory(plan, "", 3) - two == two - one > 0
    (file,) = plan.files
    longer = replace(plan, files=(replace(file, literals=((0, bytes(1008)),)),))
    assert peak_memory(longer, "", 1) == one + 1000
