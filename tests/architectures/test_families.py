"""Llama and its relatives, both ways: bits, logits, and what can't be."""

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import reference_logits
import torch
from common import (
    LLAMA,
    assert_same,
    convert,
    fixture,
    hf_logits,
    hf_tensors,
    make_hf,
    neox_config,
    neox_ranks,
    plan_of,
    recorded,
    same_bits,
    step_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from neox_bridge.api import open_checkpoint
from neox_bridge.architectures import ARCHITECTURES
from neox_bridge.architectures.llama_like import gated_setting
from neox_bridge.errors import BridgeError, NotOfFamily, Refused
from neox_bridge.frameworks.eras import LATER_ERAS, era_named
from neox_bridge.tensors.fused import Fusion
from neox_bridge.verification.verify import verify

OLD_ORDER = "llama_gqa_fp32_2024_10_old_order_tp1"
# family, settings of its config, the ranks that its heads allow
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 2}),
    ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 500000.0}),
    ("llama", {"attention_bias": True, "num_key_value_heads": 2}),
    ("mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
    ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    ("qwen2", {}),
    ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    ("olmo", {}),
    ("olmo", {"num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True}),
    ("stablelm", {}),
    ("stablelm", {"num_key_value_heads": 2, "use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    ("phi3", {}),
    ("phi3", {"num_key_value_heads": 2, "sliding_window": 5, "resid_pdrop": 0.1}),
    ("phi3", {"num_key_value_heads": 2, "partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
    ("starcoder2", {}),
    ("starcoder2", {"num_key_value_heads": 2, "sliding_window": 5, "rope_theta": 500000.0}),
    ("starcoder2", {"num_key_value_heads": 2, "hidden_act": "gelu", "tie_word_embeddings": False}),
    ("glm", {}),
    ("glm", {"num_key_value_heads": 2, "attention_bias": False, "partial_rotary_factor": 1.0}),
    ("glm", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
]
# a family that has no cases of its own yet
CASES += [(a.name, {}) for a in ARCHITECTURES if a.gated and a.name not in dict(CASES)]
IDS = [f"{family}{number}" for number, (family, _) in enumerate(CASES)]


def order_of(name: str) -> str | None:
    return "interleaved" if name == OLD_ORDER else None


@pytest.mark.parametrize("name", LLAMA)
def test_logits_agree_with_gpt_neox(name: str, tmp_path: Path) -> None:
    """1e-3 for older trees: their RMSNorm adds its epsilon elsewhere."""
    plan = convert(fixture(name), tmp_path / "hf", gqa_order=order_of(name))
    tokens, logits = recorded(name)
    computed = hf_logits(tmp_path / "hf", tokens)[..., : logits.shape[-1]]
    old = "2024" in name
    assert float((computed - logits).abs().max()) <= (1e-3 if old else 1e-5)
    assert ("rms-epsilon" in [f.code for f in plan.findings]) == old
    source = open_checkpoint(str(fixture(name)), gqa_order=order_of(name))  # type: ignore[arg-type]
    assert verify(source, open_checkpoint(str(tmp_path / "hf"))).holds


def test_the_wrong_order_is_another_model(tmp_path: Path) -> None:
    plan = convert(fixture(OLD_ORDER), tmp_path / "hf")
    order, tokenizer = plan.findings
    assert (order.code, tokenizer.code) == ("gqa-order-unknown", "tokenizer-missing")
    assert "`gqa_order=interleaved`" in order.remedy
    tokens, logits = recorded(OLD_ORDER)
    assert float((hf_logits(tmp_path / "hf", tokens) - logits).abs().max()) > 1


@pytest.mark.parametrize("name", LLAMA)
def test_same_layout_is_the_same_bits(name: str, tmp_path: Path) -> None:
    convert(fixture(name), tmp_path / "neox", to="neox", gqa_order=order_of(name))
    for a, b in zip(neox_ranks(fixture(name)), neox_ranks(tmp_path / "neox"), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("name", LLAMA)
def test_to_hf_and_back_is_the_same_bits(name: str, tmp_path: Path) -> None:
    state = open_checkpoint(str(fixture(name))).neox
    assert state is not None
    order = order_of(name)
    convert(fixture(name), tmp_path / "hf", gqa_order=order)
    again = {"tp": state.tp, "mlp_names": state.mlp_names, "gqa_order": order, "vocab_multiple": 1}
    convert(tmp_path / "hf", tmp_path / "neox", **again)
    for a, b in zip(neox_ranks(fixture(name)), neox_ranks(tmp_path / "neox"), strict=True):
        for key in a:
            assert same_bits(a[key], b[key][: len(a[key])]), key


def logits_of(root: Path, tokens: torch.Tensor, **how: str) -> torch.Tensor:
    return reference_logits.forward(neox_ranks(root), neox_config(root), tokens, **how)[..., :300]


@pytest.mark.parametrize("era", [era.name for era in LATER_ERAS])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(("family", "config"), CASES, ids=IDS)
def test_both_ways(family: str, config: dict[str, Any], tp: int, era: str, tmp_path: Path) -> None:
    """Bits come back, GPT-NeoX would compute the same logits, and verify holds."""
    hf = make_hf(tmp_path / "hf", family=family, **config)
    if family == "olmo" and era != "today":
        with pytest.raises(Refused, match="non_parametric_layernorm"):
            convert(hf, tmp_path / "neox", tp=tp, era=era_named(era))
        return
    windowed = config.get("sliding_window") is not None  # such a model cannot be ranks
    layout = {"layout": "ranks"} if tp == 2 and not windowed else {"pp": 2}
    plan = convert(hf, tmp_path / "neox", tp=tp, era=era_named(era), **layout)
    layernorm = family in ("stablelm", "starcoder2")
    expected = [] if era == "today" or layernorm else ["rms-epsilon"]
    expected += ["embedding-dropout"] if config.get("resid_pdrop") else []
    assert [f.code for f in plan.findings] == expected
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    order = "grouped" if era == "today" else "interleaved"
    # the epsilon's place is the tree's; the weights are compared as today's would use them
    computed = logits_of(tmp_path / "neox", tokens, gqa_order=order)
    assert float((computed - hf_logits(hf, tokens)).abs().max()) <= 1e-5
    found = verify(open_checkpoint(str(hf)), open_checkpoint(str(tmp_path / "neox")))
    assert found.holds, found
    convert(tmp_path / "neox", tmp_path / "back")
    assert_same(hf_tensors(hf), hf_tensors(tmp_path / "back"))
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    original = json.loads((hf / "config.json").read_text())
    assert {k: written.get(k) for k in original if k != "dtype"} == {
        k: v for k, v in original.items() if k != "dtype"
    }


@st.composite
def models(draw: Any) -> dict[str, Any]:
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 3]))
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * draw(st.sampled_from([4, 6, 12])),
        "intermediate_size": kv_heads * draw(st.integers(1, 9)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "vocab_size": draw(st.integers(3, 400)),
        "tie_word_embeddings": draw(st.booleans()),
    }


@settings(max_examples=60, deadline=None)
@given(
    model=models(),
    family=st.sampled_from(["llama", "mistral", "qwen2", "olmo", "stablelm", "phi3", "glm"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    tp=st.sampled_from([1, 2, 3, 6]),
    between=st.sampled_from([1, 2, 3]),
    mlp_names=st.sampled_from(["linear", "dense"]),
    order=st.sampled_from([None, "grouped", "interleaved"]),
)
def test_any_model(
    model: dict[str, Any],
    family: str,
    dtype: torch.dtype,
    tp: int,
    between: int,
    mlp_names: str,
    order: str | None,
) -> None:
    kv_heads = model["num_key_value_heads"]
    tp, between = (n if kv_heads % n == 0 else 1 for n in (tp, between))
    head_dim = model["hidden_size"] // model["num_attention_heads"]
    if family == "olmo" or head_dim * kv_heads % model["num_attention_heads"]:
        mlp_names, order = "linear", "grouped"
    if family == "glm":  # an even part of the head
        model |= {"head_dim": head_dim, "partial_rotary_factor": 2 / 3}
    with TemporaryDirectory() as name:
        folder = Path(name)
        hf = make_hf(folder / "hf", dtype, family=family, **model)
        convert(hf, folder / "neox", tp=tp, mlp_names=mlp_names, gqa_order=order)
        convert(folder / "neox", folder / "other", to="neox", tp=between, layout="ranks")
        convert(folder / "other", folder / "back")
        assert_same(hf_tensors(hf), hf_tensors(folder / "back"))


@given(
    kv_heads=st.integers(1, 6),
    groups=st.integers(1, 4),
    head_dim=st.integers(1, 6),
    order=st.sampled_from(["grouped", "interleaved"]),
)
def test_row_maps_cover_every_row_once(
    kv_heads: int, groups: int, head_dim: int, order: Any
) -> None:
    heads, head_dim = kv_heads * groups, head_dim * groups
    fusion = Fusion(heads, kv_heads, order)
    total = (heads + 2 * kv_heads) * head_dim
    seen: list[int] = []
    for part in ("q", "k", "v"):
        rows = fusion.part_rows(part, total)  # type: ignore[arg-type]
        own: list[int] = []
        for run in fusion.runs(part, rows, 1):  # type: ignore[arg-type]
            seen += range(run.fused, run.fused + run.rows)
            own += range(run.part, run.part + run.rows)
        assert sorted(own) == list(range(rows))
    assert sorted(seen) == list(range(total))


@given(st.integers(1, 100_000))
def test_the_ymls_width_is_the_models(width: int) -> None:
    both = int(gated_setting(width) * 2 / 3)  # megatron/model/transformer.py, ParallelMLP
    assert (both // 2, both % 2) == (width, 0)


def test_an_era_in_between(tmp_path: Path) -> None:
    """GPT-NeoX to GPT-NeoX of another time: names, order and settings change, the bits don't."""
    hf = make_hf(tmp_path / "hf", family="llama", num_key_value_heads=2)
    convert(hf, tmp_path / "new", tp=2)
    convert(tmp_path / "new", tmp_path / "old", to="neox", era=era_named("2024-09"))
    yml = neox_config(tmp_path / "old")
    assert (yml["mlp_type"], yml["activation"], yml["intermediate_size"]) == ("llama", "silu", 88)
    assert "use_bias_in_mlp" not in yml
    assert {k.split(".", 1)[1] for k in neox_ranks(tmp_path / "old")[1]} >= {
        "mlp.w1.weight",
        "mlp.w2.weight",
        "mlp.w3.weight",
    }
    tokens = torch.arange(20)[None]
    computed = logits_of(tmp_path / "old", tokens, gqa_order="interleaved")
    assert float((computed - hf_logits(hf, tokens)).abs().max()) <= 1e-5
    convert(tmp_path / "old", tmp_path / "today", to="neox", era=era_named("today"), tp=1)
    yml = neox_config(tmp_path / "today")
    assert (yml["activation"], yml["intermediate_size"]) == ("swiglu", 264)
    assert "mlp_type" not in yml
    convert(tmp_path / "today", tmp_path / "back")
    assert_same(hf_tensors(hf), hf_tensors(tmp_path / "back"))


def test_a_window_counts_the_query_itself(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="mistral", sliding_window=5)
    convert(hf, tmp_path / "neox")
    assert neox_config(tmp_path / "neox")["sliding_window_width"] == 4
    root = step_of(tmp_path / "neox")
    (root / "neox_bridge.json").unlink()
    assert open_checkpoint(str(tmp_path / "neox")).architecture.name == "mistral"


def test_qwen_trained_further_becomes_llama(tmp_path: Path) -> None:
    """A dense bias that is no longer zero has no place in Qwen2, and one in Llama."""
    hf = make_hf(tmp_path / "hf", family="qwen2")
    convert(hf, tmp_path / "neox", tp=2)
    for rank in (0, 1):
        path = step_of(tmp_path / "neox") / f"layer_02-model_{rank:02d}-model_states.pt"
        tensors = torch.load(path, weights_only=False)
        assert torch.equal(tensors["attention.dense.bias"], torch.zeros(64))
        tensors["attention.dense.bias"] += 0.5
        torch.save(tensors, path)
    convert(tmp_path / "neox", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "llama"
    tokens = torch.arange(20)[None]
    computed = logits_of(tmp_path / "neox", tokens)
    assert float((computed - hf_logits(tmp_path / "back", tokens)).abs().max()) <= 1e-5


def test_stablelm_trained_further_is_moved_only(tmp_path: Path) -> None:
    """No class of transformers has LayerNorm, a gated MLP and a bias after the attention."""
    hf = make_hf(tmp_path / "hf", family="stablelm", use_qkv_bias=True)
    convert(hf, tmp_path / "neox", tp=2)
    for path in step_of(tmp_path / "neox").glob("layer_02-*"):
        tensors = torch.load(path, weights_only=False)
        tensors["attention.dense.bias"] += 0.5
        torch.save(tensors, path)
    with pytest.raises(Refused, match="rotary_pct"):
        plan_of(tmp_path / "neox", tmp_path / "back", to="hf")
    convert(tmp_path / "neox", tmp_path / "one", to="neox", tp=1)
    tokens = torch.arange(20)[None]
    computed = logits_of(tmp_path / "one", tokens)
    assert float((computed - logits_of(tmp_path / "neox", tokens)).abs().max()) <= 1e-5


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("llama", {"num_key_value_heads": 2}, {"tp": 4}, "2 key-value heads"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, {}, "rope_scaling"),
    ("llama", {"hidden_act": "tanh"}, {}, "hidden_act"),
    ("llama", {"head_dim": 32}, {}, "head_dim"),
    ("llama", {"mlp_bias": True}, {"era": era_named("2024-09")}, "mlp_bias"),
    ("llama", {"mlp_bias": True}, {"era": era_named("2024-10")}, "mlp_bias"),
    ("llama", {"hidden_act": "gelu"}, {"era": era_named("2024-10")}, "use_bias_in_mlp"),
    ("mistral", {"hidden_act": "gelu"}, {"era": era_named("2024-10")}, "use_bias_in_mlp"),
    (
        "llama",
        {"hidden_act": "gelu", "mlp_bias": True},
        {"era": era_named("2024-09")},
        "mlp_bias",
    ),
    ("llama", {"mlp_bias": True}, {"mlp_names": "dense"}, "mlp_bias"),
    ("llama", {"hidden_act": "sigmoid"}, {"era": era_named("2024-09")}, "MLP with sigmoid"),
    ("stablelm", {}, {"te": True}, "not tested with Transformer Engine"),
    ("olmo", {"clip_qkv": 8.0}, {}, "clip_qkv"),
    ("glm", {"head_dim": 6, "partial_rotary_factor": 0.5}, {}, "partial_rotary_factor"),
    ("glm", {"head_dim": 32}, {}, "head_dim"),
    (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [1.0] * 8,
            }
        },
        {},
        "rope_scaling: GPT-NeoX does not support RoPE scaling, but this model uses 'longrope'",
    ),
    ("olmo", {}, {"te": True}, "norms have no biases"),
    (
        "llama",
        {"hidden_size": 24, "num_key_value_heads": 1},
        {"gqa_order": "interleaved"},
        "6 rows",
    ),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4}, {}, "use_sliding_window"),
]


@pytest.mark.parametrize(("family", "config", "options", "key"), REFUSED)
def test_refused(
    family: str, config: dict[str, Any], options: dict[str, Any], key: str, tmp_path: Path
) -> None:
    hf = make_hf(tmp_path / "hf", family=family, **config)
    with pytest.raises(Refused, match=key) as caught:
        plan_of(hf, tmp_path / "out", **options)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("family", ["llama", "starcoder2", "stablelm", "qwen2"])
def test_heads_that_no_setting_explains_are_an_error(family: str, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family=family)
    tensors = load_file(hf / "model.safetensors")
    for name, tensor in tensors.items():
        if re.search(r"[qkv]_proj\.", name):
            tensors[name] = torch.cat([tensor, tensor])
        elif "o_proj.weight" in name:
            tensors[name] = torch.cat([tensor, tensor], 1).contiguous()
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    config = json.loads((hf / "config.json").read_text())
    config.pop("head_dim", None)
    (hf / "config.json").write_text(json.dumps(config))
    with pytest.raises(BridgeError, match="has no head_dim"):
        open_checkpoint(str(hf))


def test_stablelm_with_norms_of_q_and_k_is_refused_by_its_key(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="stablelm", qk_layernorm=True)
    with pytest.raises(NotOfFamily, match="qk_layernorm: GPT-NeoX has one norm for q and k"):
        open_checkpoint(str(hf))


@pytest.mark.parametrize("key", ["use_parallel_residual", "qk_layernorm"])
def test_what_stablelm_may_be_is_refused(key: str, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="stablelm")
    path = hf / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: True}))
    with pytest.raises(Refused, match=key):
        plan_of(hf, tmp_path / "out")


@pytest.mark.parametrize(
    "changes",
    [
        {"rotary_pct": 0.5, "attention_config": [[["local"], 2]]},
        {"gpt_j_residual": True},
        {"pos_emb": "alibi"},
        {"attention_config": [[["local"], 2]]},
        {"use_qk_layernorm": True},
    ],
)
def test_what_transformers_has_not_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    from checkpoint_edits import edit_yml

    shutil.copytree(fixture("llama_fp32_tp2"), tmp_path / "neox")
    edit_yml(**changes)(step_of(tmp_path / "neox"))
    with pytest.raises(Refused, match=next(iter(changes))):
        plan_of(tmp_path / "neox", tmp_path / "out")


def test_another_epsilon_is_not_olmo(tmp_path: Path) -> None:
    """OlmoLayerNorm has no setting for it."""
    import shutil

    from checkpoint_edits import edit_yml

    shutil.copytree(fixture("olmo_fp32_tp2"), tmp_path / "neox")
    edit_yml(layernorm_epsilon="1e-6")(step_of(tmp_path / "neox"))
    with pytest.raises(Refused, match="layernorm_epsilon: the norms of olmo"):
        plan_of(tmp_path / "neox", tmp_path / "out", to="hf")
    convert(tmp_path / "neox", tmp_path / "out", to="neox", tp=1)


def test_wrong_key_value_heads_are_named(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="llama", num_key_value_heads=2)
    path = hf / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_key_value_heads": 3}))
    with pytest.raises(BridgeError, match="num_key_value_heads"):
        open_checkpoint(str(hf))


def test_the_page_is_that_of_the_tables() -> None:
    from neox_bridge.architectures.page import page

    path = Path(__file__).parents[2] / "docs" / "reference" / "families.md"
    assert path.read_text(encoding="utf-8") == page()


def test_the_page_names_models_of_transformers() -> None:
    """Each is one that transformers has, and stands in one of the lists of the page."""
    from transformers import CONFIG_MAPPING

    from neox_bridge.architectures import CANNOT
    from neox_bridge.architectures.page import NOT_YET

    names = [*CANNOT, *NOT_YET, *(architecture.name for architecture in ARCHITECTURES)]
    assert len(set(names)) == len(names)
    assert [name for name in names if name not in CONFIG_MAPPING] == []


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    from neox_bridge.cli.families import families
    from neox_bridge.cli.options import Output

    families.function(Output(as_json=True))
    told = json.loads(capsys.readouterr().out)
    assert [row["family"] for row in told["families"]] == [a.name for a in ARCHITECTURES]
    families.function(Output())
    assert "Qwen2ForCausalLM" in capsys.readouterr().out


def test_the_fused_norms_spelling(tmp_path: Path) -> None:
    """apex's RMSNorm (rmsnorm_fusion) says weight where GPT-NeoX's own says scale."""
    hf = make_hf(tmp_path / "hf", family="llama")
    convert(hf, tmp_path / "neox")
    for path in step_of(tmp_path / "neox").glob("layer_*"):
        tensors = torch.load(path, weights_only=False)
        torch.save({k.replace(".scale", ".weight"): v for k, v in tensors.items()}, path)
    convert(tmp_path / "neox", tmp_path / "back")
    assert_same(hf_tensors(hf), hf_tensors(tmp_path / "back"))


@pytest.mark.slow
def test_the_option_on_the_command_line(tmp_path: Path) -> None:
    """convert verifies in the order that it was told; verify has to be told it as well."""
    import subprocess
    import sys

    def run(*arguments: object) -> int:
        command = [sys.executable, "-m", "neox_bridge", *map(str, arguments)]
        return subprocess.run(command, capture_output=True).returncode

    source, target, told = fixture(OLD_ORDER), tmp_path / "hf", ("--gqa-order", "interleaved")
    assert run("convert", source, target, *told) == 0
    assert run("verify", source, target, *told) == 0
    assert run("verify", source, target) == 3
    assert run("convert", target, tmp_path / "neox", "--for", "neox@2024-10") == 0
    assert run("verify", target, tmp_path / "neox") == 0
    assert run("convert", target, tmp_path / "again", "--to", "hf", *told) == 2


@pytest.mark.parametrize(
    ("family", "config", "version", "code"),
    [
        ("qwen2", {}, "4.30", "class-unknown"),
        ("llama", {"num_key_value_heads": 2}, "4.30", "class-unknown"),
        ("llama", {"rope_theta": 500000.0}, "4.48", "rope-spelling"),
        ("llama", {"rope_theta": 500000.0}, "5.24", None),
        ("stablelm", {"partial_rotary_factor": 0.5}, "4.48", "rope-spelling"),
        ("stablelm", {"partial_rotary_factor": 0.25}, "4.48", None),
        ("stablelm", {"partial_rotary_factor": 0.5}, "5.24", None),
        ("phi3", {"rope_theta": 500000.0}, "4.55", "rope-spelling"),
        ("phi3", {"partial_rotary_factor": 0.5}, "4.48", "llama-ignored"),
        ("phi3", {}, "4.36", "class-unknown"),
        ("phi3", {}, "4.55", None),
        ("glm", {}, "4.42", "class-unknown"),
        ("glm", {}, "4.48", None),
        ("glm", {"rope_theta": 500000.0}, "4.55", "rope-spelling"),
        ("mistral", {}, "4.48", None),
    ],
)
def test_the_doctor(
    family: str, config: dict[str, Any], version: str, code: str | None, tmp_path: Path
) -> None:
    from neox_bridge.doctor.diagnose import judge
    from neox_bridge.frameworks.targets import target_named

    hf = make_hf(tmp_path / "hf", family=family, **config)
    verdict = judge(open_checkpoint(str(hf)), target_named(f"transformers@{version}"))
    errors = [c.finding.code for c in verdict.cases if c.finding.severity == "error"]
    assert errors == ([code] if code else [])


@pytest.mark.parametrize(
    ("config", "version", "ignored"),
    [
        ({"rope_theta": 500000.0}, "4.30", "rope_theta"),
        ({"rope_theta": 500000.0}, "4.33", None),
        ({"attention_bias": True}, "4.33", "attention_bias"),
        ({"attention_bias": True}, "4.34", None),
        ({}, "4.30", None),
    ],
)
def test_what_old_transformers_leave_out_of_a_llama(
    config: dict[str, Any], version: str, ignored: str | None, tmp_path: Path
) -> None:
    """Both spellings in config.json don't help where the version computes with a constant."""
    from neox_bridge.architectures.transformers_limits import refuse_version
    from neox_bridge.doctor.diagnose import diagnose
    from neox_bridge.frameworks.targets import target_named

    source = make_hf(tmp_path / "source", family="llama", **config)
    convert(source, tmp_path / "hf", to="hf")
    checkpoint = open_checkpoint(str(tmp_path / "hf"))
    target = target_named(f"transformers@{version}")
    told = [f.message for f in diagnose(checkpoint, target) if f.severity == "error"]
    assert [ignored in message for message in told] == ([True] if ignored else [])
    if ignored:
        with pytest.raises(Refused, match=ignored):
            refuse_version("llama", checkpoint.config, target)
    else:
        refuse_version("llama", checkpoint.config, target)
