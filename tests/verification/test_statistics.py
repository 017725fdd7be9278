"""Statistics against torch's on whole tensors; what is found in broken models, and only there."""

import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from common import GPT_NEOX, LLAMA, convert, fixture, hf_tensors, make_hf
from safetensors.torch import load_file, save_file

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.findings import Finding
from neox_bridge.verification import statistics as module
from neox_bridge.verification.statistics import Statistics, findings, statistics

QKV = "gpt_neox.layers.0.attention.query_key_value.weight"
NORM = "gpt_neox.layers.1.input_layernorm.weight"
BIAS = "gpt_neox.layers.1.mlp.dense_4h_to_h.bias"


def measured(folder: Path, **options: Any) -> dict[str, Statistics]:
    return {s.name: s for s in statistics(open_checkpoint(str(folder)), **options)}


def found_in(folder: Path) -> list[Finding]:
    checkpoint = open_checkpoint(str(folder))
    return findings(statistics(checkpoint), checkpoint)


def edited(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: Any
) -> Path:
    """A small model with its tensors changed."""
    make_hf(folder, **config)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def fill(name: str, value: float, rows: slice = slice(None)) -> Callable[..., object]:
    return lambda tensors: tensors[name][rows].fill_(value)


def assert_as_torch_says(found: dict[str, Statistics], tensors: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(tensors)
    for name, tensor in tensors.items():
        s, x = found[name], tensor.double()
        assert (s.shape, f"torch.{s.dtype}") == (tuple(tensor.shape), str(tensor.dtype))
        assert s.elements == tensor.numel()
        assert (s.minimum, s.maximum) == (float(x.min()), float(x.max()))
        assert s.mean == pytest.approx(float(x.mean()), rel=1e-12, abs=1e-15)
        assert s.std == pytest.approx(float(x.std(correction=0)), rel=1e-12, abs=1e-15)
        assert s.norm == pytest.approx(float(x.norm()), rel=1e-12)
        assert s.zeros == float((x == 0).double().mean())
        assert (s.nans, s.infs) == (0, 0)


@pytest.mark.parametrize("block", [7, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_as_torch_says(
    dtype: torch.dtype, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of seven elements end within rows, and are joined hundreds of times."""
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    hf = make_hf(tmp_path / "hf", dtype)
    assert_as_torch_says(measured(hf), load_file(hf / "model.safetensors"))


@pytest.mark.parametrize("name", [*GPT_NEOX, *LLAMA])
def test_ranks_are_put_together_and_nothing_is_found(name: str, tmp_path: Path) -> None:
    """The tensors of genuine checkpoints are those that a conversion writes, biases summed."""
    convert(fixture(name), tmp_path / "hf", to="hf")
    tensors = hf_tensors(tmp_path / "hf")
    found = measured(fixture(name))
    for joined, parts in (("qkv_proj", "qkv"), ("gate_up_proj", ("gate", "up"))):  # of Phi-3
        for key in [key for key in tensors if joined in key]:
            names = [key.replace(joined, f"{part}_proj") for part in parts]
            rows = [found[part].shape[0] for part in names]
            tensors |= zip(names, tensors.pop(key).split(rows), strict=True)
    if name.startswith(
        "tied_norms"
    ):  # a conversion writes the other norm in the unused one's place
        for key in [key for key in found if "post_attention" in key]:
            del found[key], tensors[key]
    assert_as_torch_says(found, tensors)
    assert found_in(fixture(name)) == []


def test_a_large_mean_leaves_the_std_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of squares would lose all of it: 1e8**2 has no digit left for 0.5."""
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 64)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        values = 1e8 + torch.arange(tensors[QKV].numel()).double() % 2
        tensors[QKV] = values.reshape(tensors[QKV].shape)

    s = measured(edited(tmp_path / "hf", change))[QKV]
    assert s.mean == pytest.approx(1e8 + 0.5, rel=1e-15)
    assert s.std == pytest.approx(0.5, rel=1e-9)


def test_nan_and_infinities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 100)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[QKV].fill_(0.25)
        tensors[QKV][0, :2] = math.nan
        tensors[QKV][100, 0] = math.nan
        tensors[QKV][5, 1] = math.inf
        tensors[BIAS][0] = -math.inf
        tensors[NORM].fill_(math.nan)

    hf = edited(tmp_path / "hf", change)
    found = measured(hf)
    x = load_file(hf / "model.safetensors")[QKV].double()
    finite = x[x.isfinite()]
    assert finite.numel() == x.numel() - 4
    s = found[QKV]
    assert (s.nans, s.infs, s.dead_rows, s.constant) == (3, 1, 0, False)
    assert (s.minimum, s.maximum, s.mean, s.std) == (0.25, 0.25, 0.25, 0)
    assert s.norm == pytest.approx(float(finite.norm()), rel=1e-12)
    assert (found[BIAS].infs, found[NORM].nans) == (1, 48)
    assert math.isnan(found[NORM].mean)
    assert not found[NORM].constant
    nan, inf = found_in(hf)
    assert (nan.code, nan.severity) == ("nan-values", "error")
    assert nan.message == f"NaN in 2 of 28 tensors: {QKV} (3 of 6,912), {NORM} (48 of 48)"
    assert (inf.code, inf.severity) == ("inf-values", "error")
    assert inf.message == f"infinities in 2 of 28 tensors: {QKV} (1 of 6,912), {BIAS} (1 of 48)"


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        (QKV, 0.0, "all-zero"),
        (QKV, -0.0, "all-zero"),
        (QKV, 0.25, "all-equal"),
        ("gpt_neox.embed_in.weight", 0.0, "all-zero"),
        (NORM, 0.0, "all-zero"),
    ],
)
def test_constant_tensors(name: str, value: float, code: str, tmp_path: Path) -> None:
    hf = edited(tmp_path / "hf", fill(name, value))
    s = measured(hf)[name]
    assert (s.constant, s.std, s.zeros) == (True, 0.0, float(value == 0))
    (finding,) = found_in(hf)
    assert (finding.code, finding.severity) == (code, "warning")
    assert finding.message.count(name) == 1


def test_a_model_at_its_start_is_healthy(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.dim() == 1:
                tensor.fill_(float(name.endswith("norm.weight")))

    hf = edited(tmp_path / "hf", change)
    assert sum(s.constant for s in measured(hf).values()) == 18
    assert found_in(hf) == []


@pytest.mark.parametrize("block", [7, 48, 1 << 18])
def test_dead_rows(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that blocks cut in pieces count once, and a last element keeps a row alive."""
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[QKV][3:6] = 0
        tensors[QKV][4, -1] = 1
        tensors[QKV][9] = 0
        tensors[QKV][9, 0] = 1
        tensors[QKV][-1] = 0

    hf = edited(tmp_path / "hf", change)
    s = measured(hf)[QKV]
    assert (s.dead_rows, s.padding_rows) == (3, 0)
    (finding,) = found_in(hf)
    assert (finding.code, finding.severity) == ("dead-rows", "warning")
    assert f"{QKV} (3 of 144)" in finding.message


def test_padding_is_no_dead_row(tmp_path: Path) -> None:
    """What a conversion pads, and rows of zeros at an embedding's end, but none in its middle."""
    hf = make_hf(tmp_path / "hf")
    convert(hf, tmp_path / "neox", tp=2, vocab_multiple=128)
    found = measured(tmp_path / "neox")
    for name in ("gpt_neox.embed_in.weight", "embed_out.weight"):
        assert (found[name].shape[0], found[name].padding_rows, found[name].dead_rows) == (
            512,
            212,
            0,
        )
    assert found_in(tmp_path / "neox") == []
    # a last row that isn't zero makes the others no less padding
    path = next((tmp_path / "neox").glob("*/layer_00-model_01*"))
    tensors = torch.load(path, weights_only=False)
    tensors["word_embeddings.weight"][-1] = 1
    torch.save(tensors, path)
    s = measured(tmp_path / "neox")["gpt_neox.embed_in.weight"]
    assert (s.padding_rows, s.dead_rows) == (211, 0)
    hf = edited(tmp_path / "two", fill("embed_out.weight", 0, slice(290, None)))
    assert measured(hf)["embed_out.weight"].padding_rows == 10
    assert found_in(hf) == []
    hf = edited(tmp_path / "three", fill("embed_out.weight", 0, slice(7, 9)))
    assert [f.code for f in found_in(hf)] == ["dead-rows"]


def test_only_some_names_in_the_models_order(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", num_hidden_layers=11)
    seen: list[int] = []
    checkpoint = open_checkpoint(str(hf))
    found = statistics(checkpoint, pattern="*.attention.dense.bias", progress=seen.append)
    assert [s.name for s in found] == [
        f"gpt_neox.layers.{i}.attention.dense.bias" for i in range(11)
    ]
    assert seen == [48 * 4] * 11


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """48 MiB of embedding, 192 MiB as float64; blocks of 2 MiB and what is made of them."""
    hf = make_hf(tmp_path / "hf", torch.float16, vocab_size=1 << 18, hidden_size=96)
    checkpoint = open_checkpoint(str(hf))
    statistics(checkpoint, pattern="*bias")  # imports
    tracemalloc.start()
    statistics(checkpoint, pattern="*embed_in*", workers=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def test_the_table(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM].fill_(1)
        tensors[BIAS].fill_(math.nan)

    hf = edited(tmp_path / "hf", change)
    done = run(hf, "--stats")
    assert done.exit_code == 0
    table = done.stdout.split("\n\n")[1].splitlines()
    assert len(table) == 29
    assert table[0].split() == "tensor dtype shape min max mean std norm zeros NaN".split()
    assert len({len(line) for line in table}) == 1, "columns are aligned"
    row = next(line.split() for line in table if line.startswith(NORM))
    assert row[1:] == ["float32", "48", "1", "1", "1", "0", "6.93", "0.0%", "0"]
    row = next(line.split() for line in table if line.startswith(BIAS))
    assert row[1:] == ["float32", "48", "-", "-", "-", "-", "-", "0.0%", "48"]
    assert done.stderr.startswith(f"error: NaN in 1 of 28 tensors: {BIAS} (48 of 48)")
    assert "NaN" not in run(hf).output
    assert len(run(hf, "--tensor", "*.bias").stdout.split("\n\n")[1].splitlines()) == 14


def test_json(tmp_path: Path) -> None:
    hf = edited(tmp_path / "hf", fill(BIAS, math.nan))
    done = run(hf, "--stats", "--json", "--max-workers", 1)
    assert (done.exit_code, done.stderr) == (0, "")

    def never(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    told = json.loads(done.stdout, parse_constant=never)
    stats = {s["name"]: s for s in told["stats"]}
    assert (stats[BIAS]["mean"], stats[BIAS]["nans"], stats[BIAS]["shape"]) == (None, 48, [48])
    assert stats[NORM]["norm"] == measured(hf)[NORM].norm
    assert "nan-values" in [f["code"] for f in told["findings"]]
    assert "stats" not in json.loads(run(hf, "--json").stdout)


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    convert(make_hf(tmp_path / "hf"), tmp_path / "neox", layout="ranks")
    checkpoint = open_checkpoint(str(tmp_path / "neox"))
    path = next((tmp_path / "neox").glob("*/mp_rank_00*"))
    path.write_bytes(path.read_bytes()[:5000])
    from neox_bridge.errors import BridgeError

    with pytest.raises(BridgeError, match="mp_rank_00"):
        statistics(checkpoint)
