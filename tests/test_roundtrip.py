"""Hugging Face to GPT-NeoX and back is the same bits, in every layout."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import reference_logits
import torch
from common import (
    assert_same,
    convert,
    fixture,
    hf_logits,
    hf_tensors,
    make_hf,
    neox_config,
    neox_files,
    neox_ranks,
    same_bits,
    step_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from neox_bridge.api import open_checkpoint

LAYOUTS = [("ranks", None), ("layers", 1), ("layers", 2)]


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize(("layout", "pp"), LAYOUTS)
def test_every_layout(tp: int, layout: str, pp: int | None, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", torch.bfloat16)
    convert(hf, tmp_path / "neox", tp=tp, layout=layout, pp=pp)
    count = tp * (pp or 1)
    names = [name for name in neox_files(tmp_path / "neox") if name.startswith("mp_rank")]
    assert len(names) == count
    state = neox_files(tmp_path / "neox")["mp_rank_00_model_states.pt"]
    assert state["mp_world_size"] == count
    assert state["args"]["model_parallel_size"] == tp
    convert(tmp_path / "neox", tmp_path / "back")
    assert_same(hf_tensors(hf), hf_tensors(tmp_path / "back"))


def test_tp_8(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", hidden_size=64, num_attention_heads=8, intermediate_size=256)
    convert(hf, tmp_path / "neox", tp=8)
    convert(tmp_path / "neox", tmp_path / "back")
    assert_same(hf_tensors(hf), hf_tensors(tmp_path / "back"))


@st.composite
def models(draw: Any) -> dict[str, Any]:
    heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    head_dim = draw(st.sampled_from([4, 8, 12]))
    hidden = heads * head_dim
    ffn = draw(st.sampled_from([4 * hidden, heads * 2, heads * 10]))
    return {
        "num_attention_heads": heads,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(3, 700)),
        "rotary_pct": draw(st.sampled_from([0.25, 0.5, 1.0])),
        "use_parallel_residual": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_fast", "gelu_new", "relu", "silu"])),
    }


@settings(max_examples=60, deadline=None)
@given(
    model=models(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    tp=st.sampled_from([1, 2, 3, 6]),
    layout=st.sampled_from(LAYOUTS),
    options=st.fixed_dictionaries(
        {
            "inv_freq": st.sampled_from(["omit", "store"]),
            "mlp_names": st.sampled_from(["linear", "dense"]),
            "shard_size": st.sampled_from([5_000, 20_000, 10**9]),
        }
    ),
    multiple=st.sampled_from([None, 1024]),
)
def test_any_model(
    model: dict[str, Any],
    dtype: torch.dtype,
    tp: int,
    layout: tuple[str, int | None],
    options: dict[str, Any],
    multiple: int | None,
) -> None:
    tp = tp if model["num_attention_heads"] % tp == 0 else 1
    stages = min(layout[1] or 1, model["num_hidden_layers"]) if layout[1] else None
    if options["mlp_names"] == "dense":
        model["intermediate_size"] = 4 * model["hidden_size"]
        # parallel blocks of trees with these names need them
        model["attention_bias"] |= model["use_parallel_residual"]
    shard_size = options.pop("shard_size")
    with TemporaryDirectory() as name:
        folder = Path(name)
        hf = make_hf(folder / "hf", dtype, **model)
        convert(
            hf,
            folder / "neox",
            tp=tp,
            layout=layout[0],
            pp=stages,
            vocab_multiple=multiple,
            **options,
        )
        ranks = neox_ranks(folder / "neox")
        padded = sum(len(rank["0.word_embeddings.weight"]) for rank in ranks)
        args = neox_files(folder / "neox")["mp_rank_00_model_states.pt"]["args"]
        assert padded == args["padded_vocab_size"]
        step = args["make_vocab_size_divisible_by"] * tp
        assert padded == -(-model["vocab_size"] // step) * step
        # another layout in between changes nothing
        convert(folder / "neox", folder / "one", to="neox", tp=1, layout="layers")
        convert(folder / "one", folder / "back", shard_size=shard_size)
        assert_same(hf_tensors(hf), hf_tensors(folder / "back"))
        written = json.loads((folder / "back" / "config.json").read_text())
        original = json.loads((hf / "config.json").read_text())
        assert {k: written[k] for k in original if k != "dtype"} == {
            k: v for k, v in original.items() if k != "dtype"
        }


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("act", ["gelu", "gelu_fast", "silu"])
def test_gpt_neox_would_compute_the_same(tp: int, parallel: bool, act: str, tmp_path: Path) -> None:
    """The reference computes from each rank's own shards, as GPT-NeoX does."""
    hf = make_hf(tmp_path / "hf", use_parallel_residual=parallel, hidden_act=act)
    convert(hf, tmp_path / "neox", tp=tp)
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    ranks, config = neox_ranks(tmp_path / "neox"), neox_config(tmp_path / "neox")
    computed = reference_logits.forward(ranks, config, tokens)[..., :300]
    assert float((computed - hf_logits(hf, tokens)).abs().max()) <= 1e-5


def test_row_bias_split_is_what_gpt_neox_does(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    convert(hf, tmp_path / "neox", tp=4, row_bias="split")
    whole = hf_tensors(hf)["gpt_neox.layers.0.attention.dense.bias"]
    for rank in neox_ranks(tmp_path / "neox"):
        assert torch.equal(rank["2.attention.dense.bias"], whole / 4)


def test_row_bias_whole_is_on_the_first_rank(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    convert(hf, tmp_path / "neox", tp=3)
    whole = hf_tensors(hf)["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"]
    first, *others = [rank["3.mlp.linear2.bias"] for rank in neox_ranks(tmp_path / "neox")]
    assert same_bits(first, whole)
    assert all(same_bits(other, torch.full_like(whole, -0.0)) for other in others)


@pytest.mark.parametrize("bits", [0x8000, 0x7E01, 0xFE00, 0x0001, 0x7C00])
def test_biases_of_any_bits_come_back(bits: int, tmp_path: Path) -> None:
    """Negative zero, NaNs with payloads, subnormals: a sum with -0.0 must not change them."""
    from safetensors.torch import load_file, save_file

    hf = make_hf(tmp_path / "hf", torch.float16)
    tensors = load_file(hf / "model.safetensors")
    name = "gpt_neox.layers.0.attention.dense.bias"
    tensors[name].view(torch.int16)[:5] = bits - 0x10000 if bits > 0x7FFF else bits
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    convert(hf, tmp_path / "neox", tp=4)
    convert(tmp_path / "neox", tmp_path / "back")
    assert_same(tensors, hf_tensors(tmp_path / "back"))


def test_inv_freq_is_stored_as_gpt_neox_computes_it(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", torch.bfloat16, rotary_pct=1.0)
    convert(hf, tmp_path / "neox", inv_freq="store")
    stored = neox_ranks(tmp_path / "neox")[0]["2.attention.rotary_emb.inv_freq"]
    want = 1.0 / 10000 ** (torch.arange(0, 4, 2).float() / 4)
    assert torch.equal(stored, want.bfloat16())
    assert neox_config(tmp_path / "neox")["rotary_save_freqs_buffer"] is True


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
def test_casts(dtype: str, source: torch.dtype, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", source)
    convert(hf, tmp_path / "neox", tp=2, dtype=dtype)
    convert(tmp_path / "neox", tmp_path / "back")
    want = {k: v.to(getattr(torch, dtype)) for k, v in hf_tensors(hf).items()}
    assert_same(want, hf_tensors(tmp_path / "back"))


def test_record_stays_out_of_args_and_yml(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", vocab_size=301)
    convert(hf, tmp_path / "neox", tp=2)
    args = neox_files(tmp_path / "neox")["mp_rank_00_model_states.pt"]["args"]
    assert "vocab_size" not in args
    assert "vocab_size" not in neox_config(tmp_path / "neox")
    record = json.loads((step_of(tmp_path / "neox") / "neox_bridge.json").read_text())
    assert record["vocab_size"] == 301


def test_pytorch_bin_sources(tmp_path: Path) -> None:
    """Zip and pre-1.6 pickles, whole and sharded, give what safetensors give."""
    hf = make_hf(tmp_path / "hf", torch.float16)
    tensors = hf_tensors(hf)
    for zipped in (True, False):
        one = tmp_path / f"bin{zipped}"
        two = tmp_path / f"shards{zipped}"
        for folder in (one, two):
            folder.mkdir()
            (folder / "config.json").write_text((hf / "config.json").read_text())
        torch.save(tensors, one / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        names = sorted(tensors)
        halves = {"pytorch_model-00001-of-00002.bin": names[:9]}
        halves["pytorch_model-00002-of-00002.bin"] = names[9:]
        for file, keys in halves.items():
            part = {key: tensors[key] for key in keys}
            torch.save(part, two / file, _use_new_zipfile_serialization=zipped)
        index = {key: file for file, keys in halves.items() for key in keys}
        (two / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
        for folder in (one, two):
            convert(folder, tmp_path / f"{folder.name}-hf", to="hf")
            assert_same(tensors, hf_tensors(tmp_path / f"{folder.name}-hf"))


def test_old_buffers_are_dropped_and_reported(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", torch.float16)
    tensors = hf_tensors(hf)
    old = dict(tensors)
    for block in range(2):
        prefix = f"gpt_neox.layers.{block}.attention."
        old[f"{prefix}bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
        old[f"{prefix}masked_bias"] = torch.tensor(-1e9)
        old[f"{prefix}rotary_emb.inv_freq"] = torch.tensor([1.0])
    (hf / "model.safetensors").unlink()
    torch.save(old, hf / "pytorch_model.bin")
    plan = convert(hf, tmp_path / "neox")
    assert len(plan.dropped) == 6
    convert(tmp_path / "neox", tmp_path / "back")
    assert_same(tensors, hf_tensors(tmp_path / "back"))


def test_lm_head_is_an_alias(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    hf = make_hf(tmp_path / "hf")
    tensors = hf_tensors(hf)
    renamed = {k.replace("embed_out", "lm_head"): v for k, v in tensors.items()}
    save_file(renamed, hf / "model.safetensors", {"format": "pt"})
    convert(hf, tmp_path / "neox", tp=2)
    convert(tmp_path / "neox", tmp_path / "back")
    assert_same(tensors, hf_tensors(tmp_path / "back"))


def test_reading_needs_no_torch() -> None:
    import subprocess
    import sys

    source = str(fixture("pythia_fp32_pp1_tp2"))
    code = (
        "import sys; from neox_bridge.layouts.open import open_checkpoint; "
        "import neox_bridge.planning.make, neox_bridge.execution.execute; "
        f"open_checkpoint({source!r}); "
        "print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_vocab_size_survives_in_the_opened_checkpoint(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", vocab_size=301)
    convert(hf, tmp_path / "neox", tp=2)
    assert open_checkpoint(str(tmp_path / "neox")).record["vocab_size"] == 301
