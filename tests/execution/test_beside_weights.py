"""What is written beside the weights: the yml's precision, an era's own keys, ZeRO's alignment."""

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from neox_bridge.api import open_checkpoint
from neox_bridge.api import plan as make_plan
from neox_bridge.execution.execute import execute
from neox_bridge.frameworks.eras import TODAY, era_named
from neox_bridge.planning.options import Options
from neox_bridge.tensors.flat import Flat
from neox_bridge.tensors.tensor_ref import TensorRef

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"


def settings(name: str, target: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """finetune.yml and the step's own yml of a genuine checkpoint that is converted."""
    source = open_checkpoint(str(FIXTURES / name / "checkpoints"))
    plan = make_plan(source, Options(to="neox", **options), str(target))
    execute(plan, str(target), workers=1)
    (inner,) = target.glob("global_step*/configs/*.yml")
    loaded = [yaml.safe_load(path.read_text()) for path in (target / "finetune.yml", inner)]
    return loaded[0], loaded[1]


# --- precision


def precision(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("precision", "fp16", "bf16", "fp32") if key in found}


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("pythia_fp16_pp1_tp1", "float32", {"precision": "fp32"}),
        ("pythia_fp16_pp1_tp1", "bfloat16", {"precision": "bfloat16"}),
        ("pythia_bf16_pp1_tp2_dp2", "float32", {"precision": "fp32"}),
        ("pythia_fp32_pp1_tp2", "bfloat16", {"precision": "bfloat16"}),
    ],
)
def test_the_precision_is_that_of_the_cast(
    name: str, dtype: Any, expected: dict[str, Any], tmp_path: Path
) -> None:
    for found in settings(name, tmp_path / "out", dtype=dtype):
        assert precision(found) == expected


def test_a_cast_to_half_precision_scales_the_loss(tmp_path: Path) -> None:
    for found in settings("pythia_fp32_pp1_tp2", tmp_path / "out", dtype="float16"):
        assert found["precision"] == "fp16"
        assert found["fp16"]["enabled"] is True
        assert found["fp16"]["loss_scale"] == 0, "a dynamic loss scale"
        assert "bf16" not in found


@pytest.mark.parametrize("dtype", ["keep", "float16"])
def test_without_a_cast_the_run_keeps_its_own_loss_scale(dtype: Any, tmp_path: Path) -> None:
    for found in settings("pythia_fp16_pp1_tp1", tmp_path / "out", dtype=dtype):
        assert found["fp16"] == {
            "enabled": True,
            "loss_scale": 0,
            "loss_scale_window": 1000,
            "initial_scale_power": 8,
            "hysteresis": 2,
            "min_loss_scale": 1,
        }


# --- eras


def test_an_eras_own_keys_replace_those_of_the_run(tmp_path: Path) -> None:
    """Trees before 2024-09 spell a gated MLP otherwise, and take its width as it is."""
    name = "llama_fp32_2024_09_w123_tp2"

    def width(name: str) -> int:
        return open_checkpoint(str(FIXTURES / name / "checkpoints")).config.dims["ffn"]

    for found in settings(name, tmp_path / "same"):
        assert (found["mlp_type"], found["activation"]) == ("llama", "silu")
    for found in settings(name, tmp_path / "new", era=TODAY):
        assert found["activation"] == "swiglu"
        assert "mlp_type" not in found
        assert found["intermediate_size"] == 3 * width(name)
        assert found["use_bias_in_mlp"] is False
    name = "llama_fp32_tp2"
    for found in settings(name, tmp_path / "old", era=era_named("2024-09")):
        assert (found["mlp_type"], found["activation"]) == ("llama", "silu")
        assert found["intermediate_size"] == width(name)
        assert "use_bias_in_mlp" not in found


def test_the_runs_own_keys_stay(tmp_path: Path) -> None:
    for found in settings("pythia_fp32_pp1_tp2", tmp_path / "out", tp=1):
        assert found["make_vocab_size_divisible_by"] * found["model_parallel_size"] == 256
        assert found["optimizer"]["params"]["betas"] == [0.9, 0.95]
        assert found["seq_length"] == 32
        assert found["model_parallel_size"] == 1


# --- ZeRO's partitions


SHAPES = [
    {"a": (3, 5)},
    {"a": (1,)},
    {"a": (7, 3), "b": (5,), "c": (2, 2, 2)},
    {"a": (4, 4), "b": (8,)},
    {"a": ()},
]


@pytest.mark.parametrize("dp", range(1, 8))
@pytest.mark.parametrize("shapes", SHAPES)
def test_a_group_is_padded_to_twice_the_ranks(shapes: dict[str, tuple[int, ...]], dp: int) -> None:
    flat = Flat(shapes, dp)
    numel = sum(map(prod, shapes.values()))
    padded = flat.partition * dp
    assert flat.numel == numel
    assert padded % (2 * dp) == 0
    assert numel <= padded < numel + 2 * dp
    assert sum(map(flat.used, range(dp))) == numel
    assert all(0 <= flat.used(rank) <= flat.partition for rank in range(dp))


@pytest.mark.parametrize("dp", range(1, 8))
@pytest.mark.parametrize("shapes", SHAPES)
def test_fragments_tile_the_parameters_in_order(
    shapes: dict[str, tuple[int, ...]], dp: int
) -> None:
    flat = Flat(shapes, dp)
    whole = [(name, at) for name, shape in shapes.items() for at in range(prod(shape))]
    seen = []
    for rank in range(dp):
        end = 0
        for part in flat.fragments(rank):
            assert part.start == end
            assert part.numel > 0
            seen += [(part.name, at) for at in range(part.low, part.low + part.numel)]
            end = part.start + part.numel
        assert end == flat.used(rank)
    assert seen == whole


@pytest.mark.parametrize("dp", [1, 2, 3, 5])
@pytest.mark.parametrize("longer", [0, 4], ids=["padded", "longer than padded"])
def test_parameters_are_put_together_from_partitions(dp: int, longer: int, tmp_path: Path) -> None:
    from neox_bridge.execution.context import Context
    from neox_bridge.verification.compare import values

    shapes = {"a": (7, 3), "b": (5,), "c": (2, 3, 2)}
    flat = Flat(shapes, dp)
    numbers = np.arange(flat.numel, dtype=np.float32)
    padded = np.full(flat.partition * dp, -1, np.float32)
    padded[: flat.numel] = numbers
    parts = []
    for rank, piece in enumerate(np.split(padded, dp)):
        path = tmp_path / str(rank)
        path.write_bytes(b"head" + np.append(piece, [-2] * longer).astype(np.float32).tobytes())
        parts.append(TensorRef(str(path), 4, "float32", (flat.partition + longer,)))
    at = 0
    for name, whole in flat.wholes(parts).items():
        shape = shapes[name]
        read = values(whole, "float32", (0,) * len(shape), shape, Context())
        assert read.tolist() == numbers[at : at + prod(shape)].tolist()
        at += prod(shape)
