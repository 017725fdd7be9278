"""Derived values to the last bit, and what is accepted on both sides of each limit."""

from collections.abc import Iterator
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from neox_bridge.architectures.base import ModelConfig
from neox_bridge.errors import BridgeError
from neox_bridge.formats.tensor_ref import TensorRef
from neox_bridge.formats.yml import merge_ymls, read_yml
from neox_bridge.layouts.derived_check import check_inv_freq, is_zero
from neox_bridge.planning.derived import inv_freq, inv_freq_bytes

DTYPES: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


def config(head: int = 64, fraction: float = 0.25, base: float = 10000.0) -> ModelConfig:
    return ModelConfig(
        layers=1,
        heads=2,
        dims={"hidden": 2 * head},
        max_positions=32,
        norm_eps=1e-5,
        rotary_pct=fraction,
        rotary_base=base,
        activation="gelu",
        parallel_residual=True,
        tied_norms=False,
        tied_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
        norm_bias=True,
        dtype="float32",
    )


def exactly(dim: int, base: float) -> list[np.float32]:
    """1 / base ** (i / dim): exponent, power and quotient each rounded once to float32."""
    values = []
    with localcontext() as context:
        context.prec = 60
        for i in range(0, dim, 2):
            exponent = Decimal(float(np.float32(i) / np.float32(dim)))
            power = np.float32(float(Decimal(base) ** exponent))
            values.append(np.float32(1) / power)
    return values


@pytest.mark.parametrize("base", [10000.0, 500000.0, 1000000.0, 25000.0])
@pytest.mark.parametrize(
    ("head", "fraction", "dim"), [(64, 0.25, 16), (128, 1.0, 128), (80, 0.4, 32), (96, 0.25, 24)]
)
def test_inv_freq_is_rounded_once_at_each_step(
    head: int, fraction: float, dim: int, base: float
) -> None:
    model = config(head, fraction, base)
    assert model.rotary_dim == dim
    computed = inv_freq(model)
    assert computed.dtype == np.float32
    assert computed.tolist() == [float(value) for value in exactly(dim, base)]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_the_stored_buffer_is_the_float32_one_rounded(dtype: str) -> None:
    expected = np.array(exactly(16, 10000.0), np.float32).astype(DTYPES[dtype])
    assert inv_freq_bytes(config(), dtype) == expected.tobytes()


def stored(folder: Path, values: Any, dtype: str) -> TensorRef:
    data = np.asarray(values).astype(DTYPES[dtype])
    path = folder / "buffer"
    path.write_bytes(b"xx" + data.tobytes())
    return TensorRef(str(path), 2, dtype, data.shape)


@pytest.mark.parametrize(
    ("dtype", "allowed"),
    [("float64", 1e-6), ("float32", 1e-6), ("bfloat16", 1.6e-2), ("float16", 2e-3)],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_stored_buffer_may_be_off_by_its_rounding_only(
    dtype: str, allowed: float, sign: int, tmp_path: Path
) -> None:
    model = config(fraction=0.0625)  # 4 rotated dimensions: no values so small that fp16 is coarse
    exact = inv_freq(model).astype(np.float64)
    spacing = {"float64": 1e-12, "float32": 6e-8, "float16": 5e-4, "bfloat16": 4e-3}[dtype]
    inside, outside = exact.copy(), exact.copy()
    inside[0] *= 1 + sign * (allowed - spacing)
    outside[0] *= 1 + sign * (allowed + 2 * spacing + (6e-6 if dtype == "float16" else 0))
    assert check_inv_freq(model, {"x": stored(tmp_path, exact, dtype)}) == []
    assert check_inv_freq(model, {"x": stored(tmp_path, inside, dtype)}) == []
    (finding,) = check_inv_freq(model, {"x": stored(tmp_path, outside, dtype)})
    assert (finding.code, finding.severity) == ("inv-freq-differs", "warning")
    assert finding.message.startswith("x ")


def test_the_worst_of_several_buffers_is_named(tmp_path: Path) -> None:
    model = config()
    exact = inv_freq(model)
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
    buffers = {
        "first": stored(folders[0], exact * 1.01, "float32"),
        "worst": stored(folders[1], exact * 1.05, "float32"),
        "fine": stored(folders[2], exact, "float32"),
    }
    (finding,) = check_inv_freq(model, buffers)
    assert finding.message.startswith("worst ")
    assert "0.05" in finding.message


def test_a_buffer_of_another_length_is_another_buffer(tmp_path: Path) -> None:
    (finding,) = check_inv_freq(config(), {"x": stored(tmp_path, np.ones(7), "float32")})
    assert "length" in finding.message


def test_the_smallest_values_of_fp16_may_be_coarse(tmp_path: Path) -> None:
    model = config(fraction=1.0)  # the smallest value is 1.3e-4, stored in steps of 6e-8 at most
    exact = inv_freq(model).astype(np.float64)
    coarse = exact.copy()
    coarse[-1] *= 1 + 2e-3 + 3e-4
    assert check_inv_freq(model, {"x": stored(tmp_path, coarse, "float16")}) == []
    wrong = exact.copy()
    wrong[-1] *= 1 + 2e-3 + 1.5e-3
    assert len(check_inv_freq(model, {"x": stored(tmp_path, wrong, "float16")})) == 1


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_zero_of_either_sign_is_zero_and_the_smallest_number_is_not(
    dtype: str, tmp_path: Path
) -> None:
    assert is_zero(stored(tmp_path, [0.0, -0.0, 0.0], dtype))
    smallest = np.array([0.0, 0.0, 1.0])
    smallest[2] = {"float64": 5e-324, "float32": 1e-45, "float16": 6e-8, "bfloat16": 1e-40}[dtype]
    assert not is_zero(stored(tmp_path, smallest, dtype))
    assert not is_zero(stored(tmp_path, [0.0, np.nan], dtype))


# --- yml files


def ymls(folder: Path, **texts: str) -> list[str]:
    paths = []
    for name, text in texts.items():
        path = folder / f"{name}.yml"
        path.write_text(text, encoding="utf-8")
        paths.append(str(path))
    return paths


def test_of_two_files_with_different_values_the_later_name_wins(tmp_path: Path) -> None:
    paths = ymls(tmp_path, b="hidden-size: 2\nnum_layers: 4\n", a="hidden_size: 1\nseed: 7\n")
    merged, findings = merge_ymls(paths)
    assert merged == {"hidden_size": 2, "seed": 7, "num_layers": 4}
    (finding,) = findings
    assert (finding.code, finding.severity) == ("yml-key-twice", "warning")
    assert "hidden_size stands in a.yml and b.yml" in finding.message
    assert "1 and 2" in finding.message
    assert merge_ymls(paths[::-1])[0] == merged


def test_of_three_files_each_repetition_is_named(tmp_path: Path) -> None:
    merged, findings = merge_ymls(ymls(tmp_path, a="x: 1\n", b="x: 1\n", c="x: 3\n"))
    assert merged == {"x": 3}
    assert ["same value" in finding.message for finding in findings] == [True, False]
    assert "b.yml and c.yml" in findings[1].message


def nested(depth: int) -> str:
    return "x: " + "[" * (depth - 1) + "]" * (depth - 1) + "\n"


def limits() -> Iterator[tuple[str, str, str]]:
    """A name, a yml that is just within a limit, and one that is just beyond it."""
    yield "depth", nested(32), nested(33)
    yield "digits", f"x: {'1' * 40}\n", f"x: {'1' * 41}\n"
    yield "key", f"{'k' * 200}: 1\n", f"{'k' * 201}: 1\n"
    pad = "x: 1\n#"
    yield "bytes", pad + "y" * ((1 << 20) - len(pad)), pad + "y" * ((1 << 20) - len(pad) + 1)
    # of the parser's events, 6 and the end of a list are not values
    yield "values", f"x: [{'1,' * 39_990}]\n", f"x: [{'1,' * 40_000}]\n"


@pytest.mark.parametrize(("name", "within", "beyond"), list(limits()), ids=lambda v: v[:6])
def test_limits_of_a_yml(name: str, within: str, beyond: str, tmp_path: Path) -> None:
    (path,) = ymls(tmp_path, within=within)
    assert len(read_yml(path)) == 1
    (path,) = ymls(tmp_path, beyond=beyond)
    with pytest.raises(BridgeError, match=r"beyond\.yml"):
        read_yml(path)


@pytest.mark.parametrize("text", ["- 1\n", "1\n", "x: !!python/none\n", "a: &n 1\nb: *n\n"])
def test_what_is_no_plain_mapping_is_refused(text: str, tmp_path: Path) -> None:
    (path,) = ymls(tmp_path, bad=text)
    with pytest.raises(BridgeError, match=r"bad\.yml"):
        read_yml(path)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_yml_has_no_keys(text: str, tmp_path: Path) -> None:
    (path,) = ymls(tmp_path, empty=text)
    assert read_yml(path) == {}


def test_keys_are_told_with_underscores_and_values_are_plain(tmp_path: Path) -> None:
    (path,) = ymls(tmp_path, a="zero-optimization: {stage: 1}\nwhen: 2024-03-01\nlist: [1, 2.5]\n")
    assert read_yml(path) == {
        "zero_optimization": {"stage": 1},
        "when": "2024-03-01",
        "list": [1, 2.5],
    }
