"""Derived values to the last bit, and what is accepted on both sides of each limit."""

from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from model_configs import config

from neox_bridge.errors import BridgeError
from neox_bridge.formats.yml import (
    DuplicateKey,
    dump_yml,
    duplicate_finding,
    merge_ymls,
    read_yml,
)
from neox_bridge.layouts.derived_values import (
    check_inv_freq,
    inv_freq,
    inv_freq_bytes,
    inv_freq_error,
    is_zero,
    mismatch_finding,
)
from neox_bridge.tensors.tensor_ref import TensorRef

DTYPES: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


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
    assert check_inv_freq(model, {"x": stored(tmp_path, exact, dtype)}) is None
    assert check_inv_freq(model, {"x": stored(tmp_path, inside, dtype)}) is None
    mismatch = check_inv_freq(model, {"x": stored(tmp_path, outside, dtype)})
    assert mismatch is not None
    assert (mismatch.tensor, mismatch.base, mismatch.fraction) == ("x", 10000.0, 0.0625)
    assert mismatch.error == pytest.approx(allowed, abs=3 * spacing + 6e-6)


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
    for order in (sorted(buffers), sorted(buffers, reverse=True)):
        mismatch = check_inv_freq(model, {name: buffers[name] for name in order})
        assert mismatch is not None
        assert mismatch.tensor == "worst"
        assert mismatch.error == pytest.approx(0.05, rel=1e-5)
    finding = mismatch_finding(mismatch)
    assert (finding.code, finding.severity) == ("inv-freq-differs", "warning")
    assert finding.message == (
        "worst does not match rotary_emb_base 10000 and rotary_pct 0.25: its values differ by "
        "up to 0.05 (relative)"
    )


def test_inv_freq_error_is_relative_to_the_exact_value() -> None:
    model = config()
    exact = inv_freq(model)
    assert inv_freq_error(model, exact.tobytes(), "float32") == 0.0
    for at in (0, 3, 7):
        next_value = exact.copy()
        next_value[at] = np.nextafter(exact[at], np.float32(np.inf))
        error = inv_freq_error(model, next_value.tobytes(), "float32")
        assert error == (float(next_value[at]) - float(exact[at])) / float(exact[at])
    assert inv_freq_error(model, (exact * 0).tobytes(), "float32") == 1.0
    assert inv_freq_error(model, exact[:-1].tobytes(), "float32") == np.inf


def test_buffers_of_other_dtypes_and_strided_ones_are_not_judged(tmp_path: Path) -> None:
    model = config()
    wrong = stored(tmp_path, np.ones(8), "float32")
    assert check_inv_freq(model, {"x": wrong}) is not None
    assert check_inv_freq(model, {"x": replace(wrong, dtype="int32")}) is None
    assert check_inv_freq(model, {"x": replace(wrong, strides=(0,))}) is None
    assert check_inv_freq(model, {}) is None
    assert is_zero(replace(stored(tmp_path, np.zeros(8), "float32"), strides=(0,))) is False


@pytest.mark.parametrize(("numel", "read"), [(1 << 20, True), ((1 << 20) + 1, False)])
def test_a_buffer_of_more_than_4_mib_is_not_read(numel: int, read: bool, tmp_path: Path) -> None:
    ref = stored(tmp_path, np.zeros(numel, np.float32), "float32")
    assert is_zero(ref) is read


def test_a_buffer_of_another_length_is_another_buffer(tmp_path: Path) -> None:
    mismatch = check_inv_freq(config(), {"x": stored(tmp_path, np.ones(7), "float32")})
    assert mismatch is not None
    assert mismatch.error == np.inf
    assert "its length differs" in mismatch_finding(mismatch).message


def test_the_smallest_values_of_fp16_may_be_coarse(tmp_path: Path) -> None:
    model = config(fraction=1.0)  # the smallest value is 1.3e-4, stored in steps of 6e-8 at most
    exact = inv_freq(model).astype(np.float64)
    coarse = exact.copy()
    coarse[-1] *= 1 + 2e-3 + 3e-4
    assert check_inv_freq(model, {"x": stored(tmp_path, coarse, "float16")}) is None
    wrong = exact.copy()
    wrong[-1] *= 1 + 2e-3 + 1.5e-3
    assert check_inv_freq(model, {"x": stored(tmp_path, wrong, "float16")}) is not None


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
    merged, duplicates = merge_ymls(paths)
    assert merged == {"hidden_size": 2, "seed": 7, "num_layers": 4}
    assert duplicates == [DuplicateKey("hidden_size", "a.yml", "b.yml", (1, 2), False)]
    assert merge_ymls(paths[::-1]) == (merged, duplicates)
    finding = duplicate_finding(duplicates[0])
    assert (finding.code, finding.severity) == ("yml-key-twice", "warning")
    assert finding.message == (
        "hidden_size is set in a.yml and b.yml, to 1 and to 2; the second value is used"
    )
    assert "silently uses the second value" in finding.remedy


def test_of_three_files_each_repetition_is_named(tmp_path: Path) -> None:
    merged, duplicates = merge_ymls(ymls(tmp_path, a="x: 1\n", b="x: 1\n", c="x: 3\n"))
    assert merged == {"x": 3}
    assert duplicates == [
        DuplicateKey("x", "a.yml", "b.yml", (1, 1), True),
        DuplicateKey("x", "b.yml", "c.yml", (1, 3), True),
    ]
    same, other = map(duplicate_finding, duplicates)
    assert same.message == "x is set in a.yml and b.yml, to the same value"
    assert "rejects duplicate keys" in same.remedy
    assert "to 1 and to 3" in other.message


def test_two_spellings_in_one_file_are_a_repetition(tmp_path: Path) -> None:
    merged, duplicates = merge_ymls(ymls(tmp_path, a="a-b: 1\na_b: 2\n"))
    assert merged == {"a_b": 2}
    assert duplicates == [DuplicateKey("a_b", "a.yml", "a.yml", (1, 2), True)]
    assert "twice in a.yml, spelled with - and with _" in duplicate_finding(duplicates[0]).message


@pytest.mark.parametrize(("length", "cut"), [(98, False), (99, True)])
def test_a_long_value_is_cut_in_the_finding(length: int, cut: bool) -> None:
    duplicate = DuplicateKey("x", "a", "b", (1, "v" * length), True)  # the quotes count
    assert ("…" in duplicate_finding(duplicate).message) is cut


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -1, 10**30, 1e-8, 1e-5, 0.1, 2.0, 1e22, float("inf"), "", "text", "1e-08",
        "yes", "null", "12", "a: b", "# no", "line\nline", "é\u2028", "2024-01-01", " x ", [], {},
        [1, "two", None, [3.5]], {"b": 1, "a": {"c": [True, "no"]}}, {"w" * 150: "v" * 400},
    ],
)  # fmt: skip
def test_what_is_written_is_read_again(value: Any, tmp_path: Path) -> None:
    sections = [("one\ntwo", {"z": value, "key": value}), ("rest", {"a": 1})]
    data = dump_yml(sections)
    (path,) = ymls(tmp_path, a=data.decode())
    loaded = read_yml(path)
    assert loaded == {"z": value, "key": value, "a": 1}
    assert list(loaded) == ["z", "key", "a"], "the order stays"
    assert repr(loaded["z"]) == repr(value), "and that within a value"
    assert type(loaded["z"]) is type(value)
    assert data.startswith(b"# one\n# two\nz: ")
    assert b"\n\n# rest\na: 1\n" in data


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
    yield "values", f"x: [{'1,' * 39_992}]\n", f"x: [{'1,' * 39_993}]\n"
    yield "key", "k: 1\n", "'': 1\n"
    yield "print", "k: 1\n", '"a\\u202eb": 1\n'
    yield "kind", "k: 1\n", "k: !!binary aGk=\n"
    yield "kinds", "k: 1\n", "k: {? [1, 2] : 3}\n"
    yield "base 60", f"x: {'1:' * 19}11\n", f"x: {'1:' * 20}1\n"


@pytest.mark.parametrize(("name", "within", "beyond"), list(limits()), ids=lambda v: v[:6])
def test_limits_of_a_yml(name: str, within: str, beyond: str, tmp_path: Path) -> None:
    (path,) = ymls(tmp_path, within=within)
    assert len(read_yml(path)) == 1
    (path,) = ymls(tmp_path, beyond=beyond)
    with pytest.raises(BridgeError, match=r"beyond\.yml"):
        read_yml(path)


@pytest.mark.parametrize(
    "text", ["- 1\n", "1\n", "x: !!python/none\n", "a: &n 1\nb: *n\n", "a: [\n", "\tx"]
)
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


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.yml"
    path.write_bytes(b"a: \xff\n")
    with pytest.raises(BridgeError, match=r"bad\.yml is not a text file"):
        read_yml(str(path))


def test_the_line_of_a_fault_is_named(tmp_path: Path) -> None:
    (path,) = ymls(tmp_path, bad="a: 1\nb: 2\nc: }\n")
    with pytest.raises(BridgeError, match=r"bad\.yml, line 3: not valid YAML"):
        read_yml(path)


def test_a_number_behind_another_length_stays_one(tmp_path: Path) -> None:
    (path,) = ymls(tmp_path, a=f"text: {'x' * 41}\nquoted: '{'1' * 40}'\nnumber: {'1' * 40}\n")
    assert read_yml(path) == {"text": "x" * 41, "quoted": "1" * 40, "number": int("1" * 40)}
