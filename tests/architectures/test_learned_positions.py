"""Families with learned positions, both ways: bits, logits, names, and what can't be."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import reference_logits
import torch
from checkpoint_edits import edit_yml
from click.testing import CliRunner
from common import (
    assert_same,
    convert,
    hf_logits,
    hf_tensors,
    make_hf,
    neox_config,
    neox_ranks,
    plan_of,
    step_of,
)
from safetensors.torch import load_file, save_file

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.doctor.compare import compare
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.frameworks.eras import LATER_ERAS, era_named
from neox_bridge.verification.logits import compare_logits
from neox_bridge.verification.tokens import read_tokens
from neox_bridge.verification.verify import verify

# family, settings of its config, settings of the yml
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("gpt2", {}, {"activation": "gelu", "bias_gelu_fusion": True, "pos_emb": "learned"}),
    (
        "gpt2",
        {"tie_word_embeddings": False, "activation_function": "gelu", "layer_norm_epsilon": 1e-3},
        {"activation": "gelu", "bias_gelu_fusion": False, "no_weight_tying": True},
    ),
    ("gpt2", {"n_inner": 120, "activation_function": "relu"}, {"intermediate_size": 120}),
    (
        "opt",
        {},
        {"activation": "relu", "max_position_embeddings": 34, "seq_length": 32},
    ),
    ("opt", {"tie_word_embeddings": False, "activation_function": "gelu"}, {}),
]
IDS = [f"{family}{number}" for number, (family, *_) in enumerate(CASES)]
TOKENS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))


def edited(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def logits_of(root: Path) -> torch.Tensor:
    return reference_logits.forward(neox_ranks(root), neox_config(root), TOKENS)[..., :300]


@pytest.mark.parametrize("era", [era.name for era in LATER_ERAS])
@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize(("family", "config", "meaning"), CASES, ids=IDS)
def test_both_ways(
    family: str,
    config: dict[str, Any],
    meaning: dict[str, Any],
    tp: int,
    era: str,
    tmp_path: Path,
) -> None:
    hf = make_hf(tmp_path / "hf", family=family, **config)
    if config.get("n_inner") and era in ("2024-03", "2024-09"):
        with pytest.raises(Refused, match="intermediate_size: 120"):
            plan_of(hf, tmp_path / "neox", era=era_named(era))
        return
    layout = {"layout": "ranks"} if tp == 2 else {"pp": 2}
    plan = convert(hf, tmp_path / "neox", tp=tp, era=era_named(era), **layout)
    # OPT has 0.1, and no dropout of the embeddings
    codes = ["embedding-dropout"] if family == "opt" else []
    assert [finding.code for finding in plan.findings] == codes
    yml = neox_config(tmp_path / "neox")
    assert {key: yml.get(key) for key in meaning} == meaning
    assert "rotary_save_freqs_buffer" not in yml
    for rank in neox_ranks(tmp_path / "neox"):
        rows = 34 if family == "opt" else 32
        assert rank["0.position_embeddings.weight"].shape == (rows, 48)
    assert float((logits_of(tmp_path / "neox") - hf_logits(hf, TOKENS)).abs().max()) <= 1e-5
    first, second = open_checkpoint(str(hf)), open_checkpoint(str(tmp_path / "neox"))
    assert verify(first, second).holds
    convert(tmp_path / "neox", tmp_path / "back")
    assert_same(hf_tensors(hf), hf_tensors(tmp_path / "back"))
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    original = json.loads((hf / "config.json").read_text())
    assert {key: written.get(key) for key in original} == original


@pytest.mark.parametrize(("family", "config", "_meaning"), CASES, ids=IDS)
def test_without_a_record_the_tensors_and_the_yml_tell(
    family: str, config: dict[str, Any], _meaning: dict[str, Any], tmp_path: Path
) -> None:
    dtype, allowed = (torch.float16, 0.0) if family == "gpt2" else (torch.float32, 1e-5)
    hf = make_hf(tmp_path / "hf", dtype, family=family, **config)
    convert(hf, tmp_path / "neox", tp=2)
    (step_of(tmp_path / "neox") / "neox_bridge.json").unlink()
    convert(tmp_path / "neox", tmp_path / "other", to="neox", tp=3, layout="ranks")
    convert(tmp_path / "other", tmp_path / "back", vocab_rows=300)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    # without its record an OPT is the same model as a GPT-2
    assert written["model_type"] == "gpt2"
    if family == "gpt2":
        assert_same(hf_tensors(hf), hf_tensors(tmp_path / "back"))
    apart = hf_logits(tmp_path / "back", TOKENS) - hf_logits(hf, TOKENS)
    assert float(apart.abs().max()) <= allowed


@pytest.mark.parametrize(("family", "config", "_meaning"), CASES, ids=IDS)
def test_verify_computes_their_logits(
    family: str, config: dict[str, Any], _meaning: dict[str, Any], tmp_path: Path
) -> None:
    hf = make_hf(tmp_path / "hf", family=family, **config)
    convert(hf, tmp_path / "neox", tp=2)
    pair = open_checkpoint(str(hf)), open_checkpoint(str(tmp_path / "neox"))
    compared = compare_logits(*pair, read_tokens(None, pair).tokens)
    assert compared.agrees
    assert compared.relative <= 1e-6


@pytest.mark.parametrize(("family", "config", "_meaning"), CASES, ids=IDS)
def test_doctor_knows_that_nothing_is_rotated(
    family: str, config: dict[str, Any], _meaning: dict[str, Any], tmp_path: Path
) -> None:
    hf = make_hf(tmp_path / "hf", family=family, **config)
    convert(hf, tmp_path / "neox", tp=2)
    for folder in (hf, tmp_path / "neox"):
        rows = {row.feature: row for row in compare(open_checkpoint(str(folder)))}
        assert rows["positions"].neox == "32 learned (pos_emb: learned)"
        assert not {"RoPE base", "inv_freq"} & set(rows)
        assert rows["query, key, value"].answer == "translated"
        default = {"gpt2": "gelu_new", "opt": "relu"}[family]
        assert rows["activation"].transformers == config.get("activation_function", default)
    shown = CliRunner().invoke(app, ["inspect", str(hf)]).stdout
    assert re.search(r"rotary +none", shown)
    old = CliRunner().invoke(app, ["doctor", str(hf), "--for", "transformers@4.48"])
    assert old.exit_code == 0, old.output


def test_a_head_has_its_rows_of_q_k_and_v(tmp_path: Path) -> None:
    """c_attn is transposed and has all of q, then all of k, then all of v."""
    hf = make_hf(tmp_path / "hf", family="gpt2")
    convert(hf, tmp_path / "neox", tp=2)
    columns = hf_tensors(hf)["transformer.h.1.attn.c_attn.weight"].T.reshape(3, 12, 4, 48)
    for rank, tensors in enumerate(neox_ranks(tmp_path / "neox")):
        heads = tensors["3.attention.query_key_value.weight"].reshape(6, 3, 4, 48)
        assert torch.equal(heads, columns[:, 6 * rank : 6 * rank + 6].transpose(0, 1))


def test_files_of_the_bare_model_and_the_usual_keys(tmp_path: Path) -> None:
    """The first GPT-2 on the Hub has no prefix, and stores its causal masks."""
    hf = make_hf(tmp_path / "hf", family="gpt2")
    old = make_hf(tmp_path / "old", family="gpt2")
    tensors = {name.removeprefix("transformer."): t for name, t in hf_tensors(hf).items()}
    masks = {f"h.{n}.attn.bias": torch.ones(1, 1, 32, 32) for n in range(2)}
    stored(old, {**tensors, **masks})
    raw = json.loads((old / "config.json").read_text())
    usual = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    raw = {usual.get(key, key): value for key, value in raw.items()}
    del raw["tie_word_embeddings"]  # true by default
    (old / "config.json").write_text(json.dumps(raw))
    plan = convert(old, tmp_path / "neox")
    assert {dropped.name for dropped in plan.dropped} == set(masks)
    convert(tmp_path / "neox", tmp_path / "back")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(hf))


def test_biases_that_transformers_always_has_are_zeros(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="gpt2")
    tensors = hf_tensors(hf)
    for name, tensor in tensors.items():
        if ".attn." in name and name.endswith(".bias"):
            tensor.zero_()
    stored(hf, tensors)
    convert(hf, tmp_path / "neox", tp=2)
    step = step_of(tmp_path / "neox")
    for path in step.glob("layer_*"):
        rank = torch.load(path, weights_only=False)
        rank = {name: tensor for name, tensor in rank.items() if not is_attention_bias(name)}
        torch.save(rank, path)
    edit_yml(use_bias_in_attn_linear=False)(step)
    plan = convert(tmp_path / "neox", tmp_path / "back")
    added = next(f for f in plan.findings if f.code == "biases-added")
    assert "8 biases" in added.message
    assert "gpt2 in transformers" in added.message
    written = hf_tensors(tmp_path / "back")
    assert {name: t for name, t in written.items() if (t != tensors[name]).any()} == {}


def is_attention_bias(name: str) -> bool:
    return name.startswith("attention.") and name.endswith(".bias")


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_optimizer_states_have_the_form_of_the_weights(family: str, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family=family)
    convert(hf, tmp_path / "neox", tp=2, optimizer="fresh")
    run, states, other = (str(tmp_path / name) for name in ("neox", "states", "other"))
    for words in (
        ["export-optimizer", run, states],
        ["reshard", run, other, "--states", states, "--tp", "3"],
        ["export-optimizer", other, str(tmp_path / "again")],
    ):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    for folder in ("states", "again"):
        masters = load_file(tmp_path / folder / "master.safetensors")
        words = ("wte.weight", "embed_tokens.weight")
        rows = {n: t[:300] if n.endswith(words) else t for n, t in masters.items()}
        assert_same(rows, hf_tensors(hf))
    named = json.loads((tmp_path / "states" / "optimizer.json").read_text())["groups"]
    assert {name for group in named for name in group["tensors"]} == set(hf_tensors(hf))


def test_a_tensor_that_its_parts_cannot_share(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="gpt2")
    tensors = hf_tensors(hf)
    name = "transformer.h.0.attn.c_attn.weight"
    stored(hf, {**tensors, name: torch.zeros(48, 145)})
    with pytest.raises(BridgeError, match=r"c_attn\.weight has the shape \[48, 145\]"):
        open_checkpoint(str(hf))
    stored(hf, {**tensors, name: torch.zeros(48)})
    with pytest.raises(BridgeError, match=r"c_attn\.weight \(q\) has the shape \[16\]"):
        open_checkpoint(str(hf))
    del tensors[name]
    stored(hf, tensors)
    with pytest.raises(BridgeError, match=r"missing: transformer\.h\.0\.attn\.c_attn\.weight"):
        open_checkpoint(str(hf))


def test_biases_that_a_config_denies_are_refused_by_its_key(tmp_path: Path) -> None:
    """Also if the files do not contain them."""
    hf = make_hf(tmp_path / "hf", family="opt", enable_bias=False)
    with pytest.raises(Refused, match=r"enable_bias: the plain MLP of GPT-NeoX needs biases"):
        open_checkpoint(str(hf))


@pytest.mark.parametrize(
    ("family", "config", "key", "written"),
    [
        ("opt", {"dropout": 0.25}, "config.json sets dropout: 0.25. opt", 0.25),
        ("opt", {"layerdrop": 0.5, "dropout": 0.0}, "sets layerdrop: 0.5", 0.0),
        ("phi3", {"resid_pdrop": 0.25}, "config.json sets resid_pdrop: 0.25. phi3", 0.25),
        ("stablelm", {"hidden_dropout": 0.25}, "config.json sets hidden_dropout: 0.25", 0.0),
    ],
)
def test_a_dropout_that_gpt_neox_applies_elsewhere_is_told(
    family: str, config: dict[str, Any], key: str, written: float, tmp_path: Path
) -> None:
    hf = make_hf(tmp_path / "hf", family=family, **config)
    (finding,) = convert(hf, tmp_path / "neox").findings
    assert finding.severity == "warning"
    assert key in finding.message
    assert neox_config(tmp_path / "neox").get("hidden_dropout", 0.0) == written


def test_a_default_dropout_is_told(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="opt")
    raw = json.loads((hf / "config.json").read_text())
    del raw["dropout"]
    (hf / "config.json").write_text(json.dumps(raw))
    (finding,) = plan_of(hf, tmp_path / "neox").findings
    assert "config.json does not set dropout, which is 0.1 by default" in finding.message


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_settings_of_a_quantization_are_refused(key: str, tmp_path: Path) -> None:
    hf = edited(make_hf(tmp_path / "hf", family="gpt2"), **{key: {"quant_method": "x", "bits": 4}})
    with pytest.raises(Refused, match=f"{key}: GPT-NeoX does not support quantized weights"):
        plan_of(hf, tmp_path / "neox")


def test_another_dropout_of_the_embeddings_is_told(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="gpt2", embd_pdrop=0.0)
    (finding,) = plan_of(hf, tmp_path / "neox").findings
    assert finding.code == "embedding-dropout"
    assert "embd_pdrop: 0.0" in finding.message
    convert(hf, tmp_path / "neox")
    assert neox_config(tmp_path / "neox")["hidden_dropout"] == 0.1


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"reorder_and_upcast_attn": True}),
        ("gpt2", {"add_cross_attention": True}),
        ("gpt2", {"activation_function": "tanh"}),
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"_remove_final_layer_norm": True}),
        ("opt", {"enable_bias": False}),
        ("opt", {"layer_norm_elementwise_affine": False}),
        ("opt", {"word_embed_proj_dim": 24}),
    ],
)
def test_what_gpt_neox_has_not_is_refused(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    hf = edited(make_hf(tmp_path / "hf", family=family), **changes)
    with pytest.raises(Refused, match=next(iter(changes))):
        plan_of(hf, tmp_path / "out")


def test_a_form_of_opt_that_gpt_neox_has_not_is_refused_by_its_settings(tmp_path: Path) -> None:
    """Its tensors are others too: OPT 350m projects its embeddings, and has no final norm."""
    settings = {"word_embed_proj_dim": 24, "do_layer_norm_before": False}
    hf = make_hf(tmp_path / "hf", family="opt", **settings)
    with pytest.raises(BridgeError, match=r"project_out.*word_embed_proj_dim.*do_layer_norm_befor"):
        plan_of(hf, tmp_path / "out")
    hf = make_hf(tmp_path / "other", family="opt", layer_norm_elementwise_affine=False)
    with pytest.raises(Refused, match="layer_norm_elementwise_affine"):
        plan_of(hf, tmp_path / "out")


@pytest.mark.parametrize("changes", [{"seq_length": 33}, {"layernorm_epsilon": 1e-3}])
def test_an_opt_trained_as_something_else_is_a_gpt_2(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    """Texts that reach the two positions of the padding make them ordinary ones."""
    hf = make_hf(tmp_path / "hf", family="opt")
    convert(hf, tmp_path / "neox", tp=2)
    edit_yml(**changes)(step_of(tmp_path / "neox"))
    plan = convert(tmp_path / "neox", tmp_path / "back")
    assert plan.target["architecture"] == "gpt2"
    positions = hf_tensors(hf)["model.decoder.embed_positions.weight"]
    moved = hf_tensors(tmp_path / "back")["transformer.wpe.weight"]
    assert torch.equal(moved, positions.roll(-2, 0))


def test_positions_that_config_json_states_wrongly(tmp_path: Path) -> None:
    hf = edited(make_hf(tmp_path / "hf", family="opt"), max_position_embeddings=30)
    (finding,) = open_checkpoint(str(hf)).findings
    assert finding.message.startswith(
        "config.json says max_position_embeddings: 30, but the tensors say 32"
    )
    convert(hf, tmp_path / "again", to="hf")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["max_position_embeddings"] == 32
    assert_same(hf_tensors(hf), hf_tensors(tmp_path / "again"))
    done = CliRunner().invoke(app, ["doctor", str(hf), "--for", "transformers@5.24"])
    assert "param with shape torch.Size([34, 48])" in " ".join(done.output.split())
    assert "current model is torch.Size([32, 48])" in " ".join(done.output.split())


def test_sizes_that_config_json_states_wrongly_are_corrected(tmp_path: Path) -> None:
    hf = edited(make_hf(tmp_path / "hf", family="gpt2"), n_inner=100)
    assert [f.code for f in open_checkpoint(str(hf)).findings] == ["config-size"]
    convert(hf, tmp_path / "again", to="hf")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["n_inner"] is None
    edited(hf, n_layer=3, n_inner=None)
    with pytest.raises(BridgeError, match="n_layer: 3, but the files contain 2"):
        open_checkpoint(str(hf))


@pytest.mark.parametrize(
    "changes",
    [
        {"opt_pos_emb_offset": 2},
        {"attention_config": [[["local"], 2]]},
        {"use_mup": True},
        {"gpt_j_residual": True},
    ],
)
def test_what_transformers_has_not_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    """And moves between layouts of GPT-NeoX."""
    hf = make_hf(tmp_path / "hf", family="gpt2")
    convert(hf, tmp_path / "neox", tp=2)
    step = step_of(tmp_path / "neox")
    (step / "neox_bridge.json").unlink()
    edit_yml(**changes)(step)
    with pytest.raises(Refused, match=next(iter(changes))):
        plan_of(tmp_path / "neox", tmp_path / "out", to="hf")
    convert(tmp_path / "neox", tmp_path / "one", to="neox", tp=1)
    (rank,) = neox_ranks(tmp_path / "one")
    assert torch.equal(
        rank["0.position_embeddings.weight"], hf_tensors(hf)["transformer.wpe.weight"]
    )
