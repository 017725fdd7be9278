"""NaN and infinities in logits are never the same model, and a cast is named in every verdict."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from common import FIXTURES, convert, fixture, hf_tensors, make_hf
from safetensors.torch import save_file

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.verification.logits import Agreement, compare_logits
from neox_bridge.verification.tokens import read_tokens
from neox_bridge.verification.verify import verify

RUNNER = CliRunner()
DOWN = "model.layers.1.mlp.down_proj.weight"
Change = Callable[[dict[str, torch.Tensor]], None]


def run(*args: object) -> Any:
    return RUNNER.invoke(app, [str(arg) for arg in args])


def document(text: str) -> dict[str, Any]:
    """Strict JSON, in which no NaN and no Infinity may stand."""

    def refuse(word: str) -> float:
        raise AssertionError(word)

    found: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return found


def edit(folder: Path, change: Change) -> Path:
    tensors = hf_tensors(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def put(name: str, value: float, *at: int) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][at or (0, 0)] = value

    return change


def agreement(first: Path, second: Path) -> Agreement:
    a, b = open_checkpoint(str(first)), open_checkpoint(str(second))
    return compare_logits(a, b, read_tokens(None, (a, b)).tokens)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 Llama with one weight that float16 cannot hold."""
    folder = tmp_path_factory.mktemp("large") / "hf"
    make_hf(folder, torch.bfloat16, family="llama")
    return edit(folder, put(DOWN, 1e5))


@pytest.mark.parametrize("to", ["neox", "hf"])
def test_a_weight_that_a_cast_made_infinite_is_another_model(
    large: Path, to: str, tmp_path: Path
) -> None:
    made = run("convert", large, tmp_path / "f16", "--to", to, "--dtype", "float16")
    assert made.exit_code == 0
    assert "overflowed to infinity" in made.stderr
    assert ("layer_03" if to == "neox" else DOWN) in made.stderr
    assert "verified: equal after casting bfloat16 to float16" in made.stdout
    for pair in ((large, tmp_path / "f16"), (tmp_path / "f16", large)):
        found = agreement(*pair)
        assert not found.agrees
        assert found.comparable
        assert not found.causes
        assert found.non_finite is not None
        assert found.non_finite.tensor == DOWN
        assert found.place == "layer 1, mlp"
    done = run("verify", large, tmp_path / "f16", "--logits")
    assert done.exit_code == 3
    assert "ANOTHER MODEL" in done.stdout
    assert DOWN in done.stdout
    facts = document(run("verify", large, tmp_path / "f16", "--logits", "--json").stdout)
    assert facts["holds"] is False
    assert facts["logits"]["agrees"] is False
    assert facts["logits"]["comparable"] is True
    assert facts["logits"]["non_finite"]["tensor"] == DOWN


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_the_same_places_on_both_sides_cannot_be_compared(value: float, tmp_path: Path) -> None:
    source = edit(make_hf(tmp_path / "hf", family="llama"), put(DOWN, value))
    convert(source, tmp_path / "neox", tp=2)
    done = run("verify", source, tmp_path / "neox", "--logits")
    assert done.exit_code == 3
    assert "equal, bit by bit" in done.stdout
    assert "CANNOT BE COMPARED" in done.stdout
    assert "ANOTHER" not in done.stdout
    assert DOWN in done.stdout
    found = agreement(source, tmp_path / "neox")
    assert (found.agrees, found.comparable) == (False, False)
    assert found.non_finite is not None
    assert (found.non_finite.tensor_first, found.non_finite.tensor_second) == (1, 1)


def test_an_overflow_in_the_forward_has_a_place_and_no_weight(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("up_proj", "gate_proj"):
            tensors[f"model.layers.1.mlp.{name}.weight"] *= 1e30

    source = edit(make_hf(tmp_path / "hf", family="llama"), change)
    convert(source, tmp_path / "neox")
    done = run("verify", source, tmp_path / "neox", "--logits")
    assert done.exit_code == 3
    assert "CANNOT BE COMPARED" in done.stdout
    assert "all weights are finite" in done.stdout
    assert "layer 1, mlp" in done.stdout


def test_one_row_of_tokens_counts(tmp_path: Path) -> None:
    """The tokens of the other row are finite, and are the same."""
    source = make_hf(tmp_path / "hf", family="llama")
    convert(source, tmp_path / "neox")
    b = open_checkpoint(str(tmp_path / "neox"))
    tokens = torch.arange(32).reshape(2, 16)
    edit(source, put("model.embed_tokens.weight", float("nan"), 31, 3))
    a = open_checkpoint(str(source))
    found = compare_logits(a, b, tokens)
    assert found.non_finite is not None
    assert 1 <= found.non_finite.tokens <= 16
    assert found.tokens == 32 - found.non_finite.tokens
    assert found.relative < 1e-6
    assert not found.non_finite.same_places
    assert found.non_finite.tensor == "model.embed_tokens.weight"
    assert found.place == "embeddings"
    assert not found.agrees


def test_a_weight_of_both_sides_is_not_blamed_for_one(tmp_path: Path) -> None:
    """Both have a NaN that no token meets, and one has an infinity that all meet."""
    source = make_hf(tmp_path / "hf", family="llama")
    a = open_checkpoint(str(source))
    tokens = read_tokens(None, (a, a)).tokens
    unused = next(row for row in range(300) if not (tokens == row).any())
    edit(source, put("model.embed_tokens.weight", float("nan"), unused, 0))
    other = tmp_path / "other"
    convert(source, other, to="hf")
    assert agreement(source, other).agrees
    edit(other, put(DOWN, float("inf")))
    found = agreement(source, other)
    assert found.non_finite is not None
    assert found.non_finite.tensor == DOWN


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_recorded_logits_that_are_not_finite(value: float, tmp_path: Path) -> None:
    name = "pythia_fp32_pp1_tp2"
    with np.load(FIXTURES / name / "logits.npz") as arrays:
        tokens, logits = arrays["tokens"], arrays["logits"].copy()
    logits[0, 2, 5] = value
    np.savez(tmp_path / "odd.npz", tokens=tokens, logits=logits)
    convert(fixture(name), tmp_path / "hf")
    words = ("verify", fixture(name), tmp_path / "hf", "--logits", "--tokens", tmp_path / "odd.npz")
    done = run(*words)
    assert done.exit_code == 3
    assert "the recorded logits alone: ANOTHER MODEL" in done.stdout
    facts = document(run(*words, "--json").stdout)
    assert facts["logits"]["agrees"] is True
    assert facts["recorded"]["agrees"] is False
    assert facts["recorded"]["comparable"] is True


def test_recorded_logits_that_are_not_finite_where_the_model_is_not(tmp_path: Path) -> None:
    source = edit(make_hf(tmp_path / "hf", family="llama"), put(DOWN, float("inf")))
    tokens = np.arange(8)[None]
    recorded = np.full((1, 8, 300), np.nan, np.float32)
    np.savez(tmp_path / "odd.npz", tokens=tokens, logits=recorded)
    words = ("verify", source, source, "--logits", "--tokens", tmp_path / "odd.npz", "--json")
    facts = document(run(*words).stdout)
    assert facts["recorded"]["comparable"] is False
    assert facts["recorded"]["non_finite"]["tensor"] == DOWN


def test_recorded_logits_of_other_tokens_are_an_error(tmp_path: Path) -> None:
    name = "pythia_fp32_pp1_tp2"
    with np.load(FIXTURES / name / "logits.npz") as arrays:
        np.savez(tmp_path / "odd.npz", tokens=arrays["tokens"], logits=arrays["logits"][:, :-1])
    words = ("--logits", "--tokens", tmp_path / "odd.npz")
    done = run("verify", fixture(name), fixture(name), *words)
    assert done.exit_code == 1
    assert "logits" in done.stderr
    assert "bug" not in done.stderr


@pytest.mark.parametrize("to", ["neox", "hf"])
def test_a_cast_is_named_in_every_verdict(to: str, tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf")
    words = "equal after casting float32 to bfloat16"
    done = run("convert", source, tmp_path / "out", "--to", to, "--dtype", "bf16")
    assert f"verified: {words}" in done.stdout
    assert "bit by bit" not in done.stdout
    done = run("verify", source, tmp_path / "out")
    assert done.exit_code == 0
    assert done.stdout.strip().endswith(words)
    facts = document(run("verify", source, tmp_path / "out", "--json").stdout)
    assert facts["verdict"] == words
    assert facts["casts"] == [{"source": "float32", "target": "bfloat16", "tensors": 28}]
    assert facts["overflows"] == {}
    planned = run("convert", source, tmp_path / "x", "--to", to, "--dtype", "bf16", "--dry-run")
    assert planned.exit_code == 0
    done = run("convert", source, tmp_path / "json", "--to", to, "--dtype", "bf16", "--json")
    assert document(done.stdout)["casts"] == facts["casts"]


def test_batch_and_report_name_the_cast(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "runs" / "step1")
    done = run("batch", tmp_path / "runs", tmp_path / "out", "--dtype", "fp16")
    assert "verified: equal after casting float32 to float16" in done.stdout
    done = run("batch", source, tmp_path / "kept")
    assert "verified bit by bit" in done.stdout
    result = run("verify", source, tmp_path / "out" / "step1", "--json").stdout
    (tmp_path / "verify.json").write_text(result)
    page = run("report", tmp_path / "verify.json", "-o", tmp_path / "page.html")
    assert "Equal after casting float32 to float16" in page.stdout


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_difference_that_is_not_finite_is_strict_json(value: float, tmp_path: Path) -> None:
    """JSON has no Infinity and no NaN; the page reads what stands for them."""
    tiny.write_hf(tmp_path / "one")
    odd = tiny.tensors()["embed_out.weight"]
    odd[3, 2] = value
    tiny.write_hf(tmp_path / "two", changed={"embed_out.weight": odd})
    for command, entries in (("verify", "differences"), ("diff", "tensors")):
        done = run(command, tmp_path / "one", tmp_path / "two", "--json")
        assert done.exit_code == 3
        (entry,) = (e for e in document(done.stdout)[entries] if e["kind"] != "equal")
        assert (entry["name"], entry["differing"]) == ("embed_out.weight", 1)
        assert (entry["largest"], entry["relative"]) == ("Infinity", "Infinity")
        path = tmp_path / f"{command}.json"
        path.write_text(done.stdout)
        page = run("report", path, "-o", tmp_path / f"{command}.html")
        assert page.exit_code == 3, page.output
        assert "embed_out.weight" in (tmp_path / f"{command}.html").read_text()
    facts = document(run("inspect", tmp_path / "two", "--stats", "--json").stdout)
    (row,) = (row for row in facts["stats"] if row["name"] == "embed_out.weight")
    assert row["nans"] + row["infs"] == 1


def test_without_a_cast_it_is_bit_by_bit(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf")
    convert(source, tmp_path / "neox", tp=3)
    found = verify(open_checkpoint(str(source)), open_checkpoint(str(tmp_path / "neox")))
    assert (found.casts, found.verdict) == ((), "equal, bit by bit")
    edit(source, put("gpt_neox.layers.0.attention.dense.weight", 3.0))
    done = run("verify", source, tmp_path / "neox")
    assert done.stdout.strip().endswith("DIFFERS from the source")


def test_plain_verify_names_what_a_cast_made_infinite(large: Path, tmp_path: Path) -> None:
    convert(large, tmp_path / "f16", dtype="float16", tp=2)
    done = run("verify", large, tmp_path / "f16")
    assert done.exit_code == 0  # a cast was asked for, and this is what it makes
    assert f"1 finite value overflowed to infinity in the cast: {DOWN} (1)" in done.stderr
    facts = document(run("verify", large, tmp_path / "f16", "--json").stdout)
    assert facts["overflows"] == {DOWN: 1}
    # an infinity that the source has itself is no overflow
    other = edit(make_hf(tmp_path / "hf", family="llama"), put(DOWN, float("inf")))
    convert(other, tmp_path / "inf", dtype="float16")
    found = verify(open_checkpoint(str(other)), open_checkpoint(str(tmp_path / "inf")))
    assert (found.overflows, found.findings) == ({}, ())
