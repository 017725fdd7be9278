"""Llama as Meta publishes it, split over files, is the same model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from common import convert, hf_logits, hf_tensors, make_hf, neox_ranks, same_bits
from raw_llama import write_raw
from safetensors.torch import save_file

from neox_bridge.api import open_checkpoint
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.verification.verify import verify


@pytest.mark.parametrize("vocab_rows", [False, True])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_is_the_model_that_it_was(
    kv_heads: int, shards: int, vocab_rows: bool, tmp_path: Path
) -> None:
    hf = make_hf(tmp_path / "hf", family="llama", num_key_value_heads=kv_heads)
    raw = write_raw(hf, tmp_path / "raw", shards, vocab_rows)
    checkpoint = open_checkpoint(str(raw))
    assert [d.name for d in checkpoint.dropped] == ["rope.freqs"]
    assert not checkpoint.findings
    convert(raw, tmp_path / "neox", tp=2)
    convert(tmp_path / "neox", tmp_path / "back")
    convert(raw, tmp_path / "direct", to="hf")
    want = hf_tensors(hf)
    for folder in ("back", "direct"):
        have = hf_tensors(tmp_path / folder)
        assert sorted(have) == sorted(want)
        assert all(same_bits(have[name], want[name]) for name in want)
        tokens = torch.arange(20)[None]
        assert torch.equal(hf_logits(hf, tokens), hf_logits(tmp_path / folder, tokens))
    assert verify(checkpoint, open_checkpoint(str(tmp_path / "neox"))).holds


def test_positions_are_assumed_aloud(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="llama")
    raw = write_raw(hf, tmp_path / "raw", 1)
    params = json.loads((raw / "params.json").read_text())
    for eps, base, positions in ((1e-6, None, 2048), (1e-5, None, 4096), (1e-5, 5e5, 8192)):
        told = {**params, "norm_eps": eps, "rope_theta": base}
        del told["max_seq_len"]
        (raw / "params.json").write_text(json.dumps(told))
        checkpoint = open_checkpoint(str(raw))
        assert checkpoint.config.max_positions == positions
        assert checkpoint.config.rotary_base == (base or 10000.0)
        assert [finding.code for finding in checkpoint.findings] == ["positions-assumed"]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"use_scaled_rope": True}, "use_scaled_rope"),
        ({"n_heads": 3}, "heads"),
        ({"n_kv_heads": 3}, "heads"),
        ({"dim": "wide"}, "dim"),
        ({"moe": {}}, "experts"),
    ],
)
def test_what_is_no_plain_llama(params: dict[str, Any], said: str, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="llama")
    raw = write_raw(hf, tmp_path / "raw", 1, **params)
    with pytest.raises(BridgeError, match=said):
        open_checkpoint(str(raw))


def test_parts_are_missed(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="llama")
    raw = write_raw(hf, tmp_path / "raw", 4)
    (raw / "consolidated.02.pth").unlink()
    with pytest.raises(BridgeError, match=r"consolidated\.02\.pth is missing"):
        open_checkpoint(str(raw))
    for file in raw.glob("*.pth"):
        tensors = torch.load(file)
        tensors["layers.0.attention.wq.bias"] = torch.zeros(3)
        torch.save(tensors, raw / "consolidated.02.pth")
    with pytest.raises(BridgeError, match="no Llama model has"):
        open_checkpoint(str(raw))


def as_mistral(raw: Path, files: int = 1) -> Path:
    """Meta's form as Mistral publishes it: one safetensors file, or several with whole tensors."""
    (path,) = raw.glob("consolidated.*.pth")
    tensors = torch.load(path)
    path.unlink()
    names = sorted(set(tensors) - {"rope.freqs"})
    for number in range(files):
        part = {name: tensors[name].clone() for name in names[number::files]}
        of = f"-{number + 1:05d}-of-{files:05d}" if files > 1 else ""
        save_file(part, raw / f"consolidated{of}.safetensors")
    return raw


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("window", [None, 8])
def test_mistrals_own_form(window: int | None, files: int, tmp_path: Path) -> None:
    family = "llama" if window is None else "mistral"
    more = {} if window is None else {"sliding_window": window}
    hf = make_hf(tmp_path / "hf", family=family, num_key_value_heads=2, **more)
    raw = write_raw(hf, tmp_path / "raw", 1, head_dim=16, **more)
    plan = convert(as_mistral(raw, files), tmp_path / "direct", to="hf")
    assert plan.target["architecture"] == family
    want, have = hf_tensors(hf), hf_tensors(tmp_path / "direct")
    assert sorted(have) == sorted(want)
    assert all(same_bits(have[name], want[name]) for name in want)
    tokens = torch.arange(20)[None]
    assert torch.equal(hf_logits(hf, tokens), hf_logits(tmp_path / "direct", tokens))


def test_what_is_missing_or_quantized_of_mistrals_own_form(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="llama")
    raw = as_mistral(write_raw(hf, tmp_path / "raw", 1), 3)
    second = raw / "consolidated-00002-of-00003.safetensors"
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(BridgeError, match="consolidated-00002-of"):
        open_checkpoint(str(raw))
    second.write_bytes(content)
    save_file({"layers.0.attention.wq.qscale_weight": torch.ones(1)}, second)
    with pytest.raises(Refused, match="unquantized"):
        open_checkpoint(str(raw))


def test_embeddings_are_split_as_gpt_neox_splits_them(tmp_path: Path) -> None:
    """Meta's files hold columns of them, and a rank as many rows, whose number may be the same."""
    hf = make_hf(tmp_path / "hf", family="llama", vocab_size=256)
    raw = write_raw(hf, tmp_path / "raw", 2)
    convert(raw, tmp_path / "neox", tp=2)
    ranks = neox_ranks(tmp_path / "neox")
    assert [rank["0.word_embeddings.weight"].shape for rank in ranks] == [(128, 64)] * 2
    joined = torch.cat([rank["0.word_embeddings.weight"] for rank in ranks])
    assert torch.equal(joined, hf_tensors(hf)["model.embed_tokens.weight"])
