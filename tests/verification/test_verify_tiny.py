"""Comparing tensors and verifying tiny models: every verdict, on both sides of each boundary."""

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import convert, tensors, write_hf

from neox_bridge.api import open_checkpoint
from neox_bridge.architectures.base import Weight
from neox_bridge.errors import BridgeError, Unverified
from neox_bridge.execution.context import Context
from neox_bridge.tensors.dtypes import to_numpy
from neox_bridge.tensors.geometry import constant
from neox_bridge.tensors.pieces import Piece, Whole
from neox_bridge.tensors.sharing import LEAST_SHARED_BYTES as WORTH
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.verification import compare as comparing
from neox_bridge.verification import equal as equality
from neox_bridge.verification.compare import (
    Difference,
    compare,
    each,
    overflowed,
    values,
    without_reduction,
    zero_beyond,
)
from neox_bridge.verification.equal import equal
from neox_bridge.verification.verify import (
    Verification,
    checker,
    describe,
    divided,
    summary,
    verify,
)


def whole(path: Path, array: Any, dtype: str | None = None) -> Whole:
    """A tensor in a file of its own. dtype: where its meaning is another than what is stored."""
    path.write_bytes(array.tobytes())
    ref = TensorRef(str(path), 0, dtype or str(array.dtype), array.shape)
    zero = (0,) * array.ndim
    return Whole(dtype or str(array.dtype), array.shape, (Piece(ref, zero, zero, array.shape),))


# --- two tensors


def test_a_difference_is_measured(tmp_path: Path) -> None:
    first = np.array([[1.0, -8.0, 0.0], [2.0, 4.0, 1.0]], np.float32)
    second = first + np.array([[0, 2, 0], [-1, 0, 0]], np.float32)
    a, b = whole(tmp_path / "a", first), whole(tmp_path / "b", second)
    assert compare("x", a, b, Context()) == Difference("x", "values", 6, 2, 2.0, 0.5, 0.25)
    assert compare("x", a, a, Context()) == Difference("x", "equal", 6)
    flat = whole(tmp_path / "c", first.reshape(3, 2))
    assert compare("x", a, flat, Context()) == Difference(
        "x", "shape", 6, detail="[2, 3] and [3, 2]"
    )


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (np.nan, np.nan, (0, 0.0, 0.0, 0.0)),
        (np.nan, 1.0, (1, np.inf, 0.0, np.inf)),
        (1.0, np.nan, (1, np.inf, 0.0, np.inf)),
        (1.0, np.inf, (1, np.inf, 0.0, np.inf)),
        (np.inf, -np.inf, (1, np.inf, 0.0, np.inf)),
        (0.0, -0.0, (1, 0.0, 0.0, 0.0)),
        (0.0, 1e-30, (1, 1e-30, 5e-31, 2.5e-31)),
    ],
)
def test_a_difference_to_what_is_not_finite_is_infinite(
    first: float, second: float, expected: tuple[float, ...], tmp_path: Path
) -> None:
    a = whole(tmp_path / "a", np.array([first, 4.0]))
    b = whole(tmp_path / "b", np.array([second, 4.0]))
    found = compare("x", a, b, Context())
    numbers = (found.differing, found.largest, found.mean, found.relative)
    assert numbers == pytest.approx(expected)
    assert found.kind == ("equal" if expected[0] == 0 else "values")


def test_all_zero_beside_something_is_infinitely_far(tmp_path: Path) -> None:
    zero, one = (whole(tmp_path / str(n), np.full(3, n, np.float32)) for n in (0, 1))
    assert compare("x", zero, one, Context()).relative == np.inf
    assert compare("x", one, zero, Context()).relative == 1.0


def test_elements_of_sixteen_bytes_differ_as_one(tmp_path: Path) -> None:
    first = np.zeros(4, np.complex128)
    second = first.copy()
    second[1] = 1 + 1j
    second[3] = 2j
    a, b = whole(tmp_path / "a", first), whole(tmp_path / "b", second)
    difference = compare("x", a, b, Context())
    assert (difference.differing, difference.largest) == (2, 2.0)


def test_a_source_of_another_dtype_is_cast_and_not_compared_by_its_bytes(tmp_path: Path) -> None:
    """Both tensors mean float16, and the second's file holds float32."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    half = array.astype(np.float16)
    first = whole(tmp_path / "a", half)
    wide = whole(tmp_path / "b", array)
    second = Whole("float16", (2, 3), wide.pieces)
    assert equal(first, second, Context())
    assert equal(second, first, Context())
    assert equal(second, second, Context())
    wrong = Whole("float16", (2, 3), whole(tmp_path / "c", array + 1).pieces)
    assert not equal(first, wrong, Context())


def test_a_bfloat16_tensor_in_a_float32_file(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32)
    short = array.astype(to_numpy("bfloat16"))
    first = whole(tmp_path / "a", short, "bfloat16")
    second = Whole("bfloat16", (6,), whole(tmp_path / "b", array).pieces)
    assert equal(first, second, Context())
    assert equal(second, first, Context())


def test_reductions_and_random_values_are_not_equal_unseen(tmp_path: Path) -> None:
    one = whole(tmp_path / "a", np.zeros(3, np.float32))
    for other in (replace(one, reduce="sum"), replace(one, reduce="replica")):
        assert not equal(one, other, Context())
        assert not equal(other, one, Context())
    assert not equal(replace(one, random=0), one, Context())
    assert not equal(one, replace(one, random=0), Context())


def test_constants_count_to_the_elements(tmp_path: Path) -> None:
    """A box that two constants and a file tile, against one file."""
    array = np.concatenate([np.zeros((2, 3)), np.ones((1, 3)), np.full((2, 3), 7)])
    array = array.astype(np.float32)
    stored = whole(tmp_path / "a", array)
    middle = whole(tmp_path / "b", array[2:3]).pieces[0]
    pieces = (
        constant((2, 3), 0.0),
        replace(middle, to=(2, 0)),
        replace(constant((2, 3), 7.0), to=(3, 0)),
    )
    assert equal(Whole("float32", (5, 3), pieces), stored, Context())
    assert equal(stored, Whole("float32", (5, 3), pieces), Context())
    assert not equal(Whole("float32", (5, 3), pieces[:2]), stored, Context())
    assert not equal(Whole("float32", (5, 3), pieces[1:]), stored, Context())


@pytest.mark.parametrize("size", [WORTH - 4, WORTH, WORTH + 4096])
def test_every_byte_of_a_run_counts(size: int, tmp_path: Path) -> None:
    array = np.zeros(size // 4, np.float32)
    a = whole(tmp_path / "a", array)
    (tmp_path / "b").write_bytes(bytes(size))
    piece = replace(a.pieces[0], source=replace(a.pieces[0].source, file=str(tmp_path / "b")))  # type: ignore[type-var]
    b = replace(a, pieces=(piece,))
    assert equal(a, b, Context())
    for at in (0, 1, 4095, 4096, size // 2, size - 4097, size - 1):
        with open(tmp_path / "b", "r+b") as file:
            file.seek(at)
            file.write(b"\1")
        assert not equal(a, b, Context()), at
        (tmp_path / "b").write_bytes(bytes(size))


def test_blocks_that_are_shared_are_not_read_and_all_others_are(
    tmp_path: Path, monkeypatch: Any
) -> None:
    array = np.zeros(WORTH // 4 + 2048, np.float32)
    a, b = whole(tmp_path / "a", array), whole(tmp_path / "b", array)
    asked: list[tuple[int, ...]] = []

    def same_blocks(_one: int, start: int, _other: int, to: int, size: int) -> bool:
        asked.append((start, to, size))
        return True

    monkeypatch.setattr(equality, "same_blocks", same_blocks)
    refs = [replace(side.pieces[0].source, offset=100) for side in (a, b)]  # type: ignore[type-var]
    short = len(array) - 25
    a, b = (Whole("float32", (short,), (Piece(ref, (0,), (0,), (short,)),)) for ref in refs)
    (tmp_path / "b").write_bytes(b"\1" * 100 + array.tobytes()[100:])
    assert equal(a, b, Context()), "what is before the tensor is not of it"
    low, high = 4096, array.nbytes // 4096 * 4096
    assert asked == [(low, low, high - low)]
    for at, unequal in ((100, True), (low - 1, True), (low, False), (high - 1, False)):
        data = bytearray(array.tobytes())
        data[at] = 1
        (tmp_path / "b").write_bytes(data)
        assert equal(a, b, Context()) != unequal, at


def test_replicas_that_are_the_same_are_one_of_them(tmp_path: Path) -> None:
    array = np.arange(4, dtype=np.float32)
    one, two, other = (
        whole(tmp_path / name, array + n).pieces[0] for n, name in enumerate(("a", "b", "c"))
    )
    (tmp_path / "b").write_bytes(array.tobytes())
    same = Whole("float32", (4,), (one, two), "replica")
    assert without_reduction(same, Context()).reduce == "none"
    assert len(without_reduction(same, Context()).pieces) == 1
    apart = Whole("float32", (4,), (one, other), "replica")
    assert without_reduction(apart, Context()) == apart
    plain = Whole("float32", (4,), (one,))
    assert without_reduction(plain, Context()) is plain


def test_a_box_of_a_tensor_is_flat(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    found = values(whole(tmp_path / "a", array), "float32", (1, 2), (2, 2), Context())
    assert found.tolist() == [6.0, 7.0, 10.0, 11.0]


# --- padding and overflows


@pytest.mark.parametrize("at", [None, 0, 5, 6, 7, 8, 11])
def test_padding_is_zero_from_its_first_row_to_the_last(at: int | None, tmp_path: Path) -> None:
    array = np.zeros((4, 3), np.float32)
    if at is not None:
        array.flat[at] = -0.0
    assert zero_beyond(whole(tmp_path / "a", array), 2, Context()) == (at is None or at < 6)
    assert zero_beyond(whole(tmp_path / "b", np.ones((4, 3), np.float32)), 4, Context())


def test_padding_is_read_in_blocks(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(comparing, "BLOCK_BYTES", 32)
    real, sizes = comparing.values, []

    def seen(*args: Any) -> Any:
        found = real(*args)
        sizes.append(found.nbytes)
        return found

    monkeypatch.setattr(comparing, "values", seen)
    array = np.zeros((10, 5), np.float32)
    assert zero_beyond(whole(tmp_path / "a", array), 2, Context())
    assert max(sizes) <= 32
    assert sum(sizes) == 8 * 5 * 4


def test_overflows_are_finite_values_that_become_infinite(tmp_path: Path) -> None:
    array = np.array([1e6, np.inf, np.nan, -1e6, 65504.0, 3.0], np.float32)
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    a, b = whole(tmp_path / "a", array), whole(tmp_path / "b", half)
    assert overflowed(a, b, Context()) == 2
    assert overflowed(a, a, Context()) == 0
    assert overflowed(b, a, Context()) == 0, "an exact cast overflows nowhere"
    assert overflowed(a, whole(tmp_path / "c", half[:5]), Context()) == 0


def test_overflows_of_all_blocks_are_counted(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(comparing, "MEASURED_ELEMENTS", 4)
    array = np.full(11, 1e6, np.float32)
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    pair = whole(tmp_path / "a", array), whole(tmp_path / "b", half)
    assert overflowed(*pair, Context()) == 11
    assert compare("x", *pair, Context()).kind == "equal", "as the cast makes it"
    half[10] = 0
    (tmp_path / "b").write_bytes(half.tobytes())
    found = compare("x", *pair, Context())
    assert (found.elements, found.differing, found.largest) == (11, 1, np.inf)


# --- in threads


def test_one_worker_is_this_thread_and_files_are_closed() -> None:
    class Files:
        closed = 0

        def close(self) -> None:
            self.closed += 1

    context = Context()
    files: Any = Files()
    context.files = files
    here = threading.get_ident()
    assert each(["a", "b"], lambda _: threading.get_ident(), context, 1) == [here, here]
    assert here not in each(["a"], lambda _: threading.get_ident(), context, 2)
    assert each(["b", "a"], str.upper, context, None) == ["B", "A"]
    assert files.closed == 3

    def fails(_: str) -> None:
        raise BridgeError("broken")

    for workers in (1, 2):
        with pytest.raises(BridgeError, match="broken"):
            each(["a"], fails, context, workers)
    assert files.closed == 5


# --- a bias divided over ranks


@pytest.mark.parametrize(("factor", "kind"), [(1.0, "equal"), (1.0001, "values")])
@pytest.mark.parametrize(
    ("dtype", "epsilon"),
    [("float32", 2.0**-24), ("float16", 2.0**-11), ("bfloat16", 2.0**-8), ("float64", 2.0**-53)],
)
def test_a_divided_bias_may_be_rounded_on_each_rank_and_in_the_sum(
    dtype: str, epsilon: float, factor: float, kind: str
) -> None:
    bias = Weight("block", "x", "x", "row_bias", ("hidden",))
    second = Whole(dtype, (4,), (constant((4,), 0.0),) * 3, "sum")
    found = Difference("x", "values", 4, 1, 1.0, 1.0, 4 * epsilon * factor)
    assert divided(found, bias, second) == replace(found, kind=kind)  # type: ignore[arg-type]
    for other_weight, other_second in (
        (replace(bias, split="replicated"), second),
        (bias, replace(second, reduce="replica")),
        (bias, replace(second, dtype="int8")),
    ):
        assert divided(found, other_weight, other_second) == found
    shape = replace(found, kind="shape")
    assert divided(shape, bias, second) == shape


# --- whole models


def check(first: Path, second: Path, **options: Any) -> Verification:
    a, b = open_checkpoint(str(first)), open_checkpoint(str(second))
    return verify(a, b, workers=1, **options)


def test_a_conversion_is_the_same_model_in_every_layout(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf")
    for name, options in {
        "tp1": {},
        "tp2": {"tp": 2},
        "ranks": {"tp": 2, "layout": "ranks"},
    }.items():
        counted: list[int] = []
        found = check(hf, convert(hf, tmp_path / name, **options), progress=counted.append)
        assert (found.holds, found.differences, found.casts) == (True, (), ())
        assert found.tensors == len(tensors())
        assert sum(counted) == found.size
        back = check(tmp_path / name, hf)
        assert (back.holds, back.size) == (True, sum(v.nbytes for v in tensors().values()))
        assert back.verdict == found.verdict


@pytest.mark.parametrize("name", sorted(tensors()))
def test_one_element_of_any_tensor_is_found(name: str, tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf")
    changed = tensors()[name].copy()
    changed.flat[-1] += 1
    other = write_hf(tmp_path / "other", changed={name: changed})
    for second in (other, convert(other, tmp_path / "neox", tp=2)):
        found = check(hf, second)
        (difference,) = found.differences
        assert (difference.name, difference.kind, difference.differing) == (name, "values", 1)
        assert difference.elements == changed.size
        assert not found.holds
        assert found.verdict == "DIFFERS from the source"
        with pytest.raises(Unverified, match=f"does not match {hf}: {name}: 1 of "):
            checker(open_checkpoint(str(hf)), workers=1)(str(second))


def test_tensors_that_only_one_side_has(tmp_path: Path) -> None:
    a = open_checkpoint(str(write_hf(tmp_path / "hf")))
    name = "gpt_neox.layers.0.mlp.dense_4h_to_h.bias"
    less = replace(a, tensors={n: w for n, w in a.tensors.items() if n != name})
    (gone,) = verify(a, less, workers=1).differences
    assert gone == Difference(name, "only-first", 8)
    (more,) = verify(less, a, workers=1).differences
    assert more == Difference(name, "only-second", 8)
    assert describe(gone) == f"{name} is only in the first"
    assert describe(more) == f"{name} is only in the second"


def test_casts_are_counted_and_their_overflows_too(tmp_path: Path) -> None:
    name = "gpt_neox.layers.0.mlp.dense_4h_to_h.bias"
    huge = tensors()[name].copy()
    huge[:3] = 1e6
    hf = write_hf(tmp_path / "hf", changed={name: huge})
    neox = convert(hf, tmp_path / "neox", dtype="float16")
    found = check(hf, neox)
    (cast,) = found.casts
    assert (cast.source, cast.target) == ("float32", "float16")
    assert found.overflows == {name: 3}
    assert [f.code for f in found.findings] == ["cast-overflow"]
    assert found.holds
    assert "cast" in found.verdict
    quick = check(hf, neox, count_overflows=False)
    assert (quick.overflows, quick.findings, quick.casts) == ({}, (), found.casts)
    assert check(hf, hf).overflows == {}


@pytest.mark.parametrize(
    ("key", "first", "second"),
    [
        ("hidden_act", "gelu", "relu"),
        ("hidden_act", "relu", "gelu"),
        ("layer_norm_eps", 1e-5, 1e-6),
        ("layer_norm_eps", 1e-6, 1e-5),
        ("rotary_pct", 0.5, 1.0),
        ("rotary_pct", 1.0, 0.5),
        ("use_parallel_residual", True, False),
        ("use_parallel_residual", False, True),
    ],
)
def test_a_config_that_means_another_model_is_an_error_both_ways(
    key: str, first: Any, second: Any, tmp_path: Path
) -> None:
    one = write_hf(tmp_path / "one", **{key: first})
    two = write_hf(tmp_path / "two", **{key: second})
    found = check(one, two)
    (finding,) = found.findings
    assert (finding.code, finding.severity) == ("config-differs", "error")
    assert "the source has " in finding.message
    assert not found.holds
    assert summary(found) == finding.message


def test_rows_that_are_not_there_are_said(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf")
    rows = {name: tensors()[name][:12] for name in ("embed_out.weight", "gpt_neox.embed_in.weight")}
    cut = write_hf(tmp_path / "cut", changed=rows, vocab_size=12)
    found = check(hf, cut)
    assert found.holds
    (finding,) = found.findings
    assert (finding.code, finding.severity) == ("rows-not-compared", "info")
    assert finding.message.startswith(f"vocabulary rows 12 to 15 of the source are not in {cut}: ")
    padded = check(cut, hf)
    details = [difference.detail for difference in padded.differences]
    assert details == ["rows 12 to 15 are padding, but are not zero"] * 2
    assert [d.elements for d in padded.differences] == [32, 32]


def test_parts_share_the_tensors(tmp_path: Path) -> None:
    hf, other = write_hf(tmp_path / "hf"), write_hf(tmp_path / "other", seed=1)
    parts = [
        [difference.name for difference in check(hf, other, part=(number, 3)).differences]
        for number in range(3)
    ]
    assert parts == [sorted(tensors())[number::3] for number in range(3)]


def test_a_summary_names_three_and_counts_the_rest() -> None:
    differences = tuple(Difference(f"t{n}", "values", 1000, 20, 0.5, 0.25, 0.125) for n in range(5))
    found = Verification("a", "b", 5, 1, differences, ())
    assert summary(found).endswith("; 2 more tensors differ")
    assert summary(found).startswith(
        "t0: 20 of 1,000 elements differ, by 0.5 at most (relative 0.12, mean 0.25); t1: "
    )
    assert summary(replace(found, differences=differences[:3])).count("; ") == 2
    assert describe(Difference("x", "shape", 1, detail="[1] and [2]")) == "x: [1] and [2]"


def test_biases_that_drifted_apart_are_said_once(tmp_path: Path) -> None:
    """With a sequential residual each rank holds the whole bias, and the mean is compared."""
    hf = write_hf(tmp_path / "hf", use_parallel_residual=False)
    neox = convert(hf, tmp_path / "neox", tp=2)
    name = "gpt_neox.layers.0.attention.dense.bias"
    for ref, sign in zip(open_checkpoint(str(neox)).tensors[name].shards, (1, -1), strict=True):
        value = tensors()[name] + np.float32(sign * 0.25)
        with open(ref.file, "r+b") as file:
            file.seek(ref.offset)
            file.write(value.astype(np.float32).tobytes())
    mean = convert(neox, tmp_path / "mean", to="hf")
    alone = [finding.code for finding in check(hf, hf).findings]
    assert alone == []
    for first, second in ((neox, mean), (mean, neox)):
        parts = [
            [f.code for f in check(first, second, part=(number, 2)).findings] for number in range(2)
        ]
        assert [len(codes) for codes in parts] == [1, 0], parts
    assert check(neox, neox).holds


def test_ranks_that_differ_are_no_model(tmp_path: Path) -> None:
    """The layer norms of both ranks are the source's on average, and on neither."""
    hf = write_hf(tmp_path / "hf")
    neox = convert(hf, tmp_path / "neox", tp=2)
    name = "gpt_neox.layers.0.input_layernorm.weight"
    target = open_checkpoint(str(neox))
    tensor = target.tensors[name]
    assert tensor.reduce == "replica"
    for piece, sign in zip(tensor.pieces, (1, -1), strict=True):
        assert piece.source is not None
        value = tensors()[name] + np.float32(sign * 0.5)
        with open(piece.source.file, "r+b") as file:
            file.seek(piece.source.offset)
            file.write(value.astype(np.float32).tobytes())
    found = check(hf, neox)
    (difference,) = found.differences
    assert difference.name == name
    assert difference.kind in ("replicas", "values")
    assert not found.holds
    assert os.path.isdir(neox)
