"""The known changes: every entry has a detector and an example, and the page and command agree."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from common import GPT_NEOX, fixture, make_hf
from tree_changes import has_change

import neox_bridge
from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError
from neox_bridge.findings import Dropped
from neox_bridge.frameworks.change import (
    RELEASED,
    Change,
    Commit,
    not_after,
    not_before,
    parse_moment,
)
from neox_bridge.frameworks.changes import CHANGES, HISTORY, change_named, select, touches
from neox_bridge.frameworks.eras import ERAS, MERGED, TODAY, changes_of, known_keys, merged
from neox_bridge.frameworks.facts import TreeFacts
from neox_bridge.frameworks.page import page, where
from neox_bridge.frameworks.targets import target_named
from neox_bridge.layouts.checkpoint import Checkpoint

RUNNER = CliRunner()
OLD = TreeFacts(
    "old",
    "",
    "always",
    "dense",
    "interleaved",
    "outside",
    plain_mlp_4h=True,
    gated_biases="none",
    rope_tables_fp32=False,
    transformer_engine=False,
    states="sub-partitions",
    deepspeed="",
)
_NEW_KEYS = frozenset(
    """moe_expert_interval num_kv_heads use_qk_layernorm gpt_j_tied use_bias_in_mlp
    mlp_multiple_of""".split()
)
NEW = TreeFacts(
    "new",
    "",
    "flag",
    "linear",
    "grouped",
    "inside",
    plain_mlp_4h=False,
    gated_biases="optional",
    rope_tables_fp32=True,
    transformer_engine=True,
    states="partitions",
    deepspeed="",
    keys=_NEW_KEYS,
)


@dataclass(frozen=True)
class Example:
    """What must trigger a change's detectors (the first of each pair), and what must not.

    checkpoint: (kind, edit) for both; kind: "neox", "hf"; edit: see ``made``.
    tree: two trees. error: two messages.
    """

    checkpoint: tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]] | None = None
    tree: tuple[TreeFacts, TreeFacts] | None = None
    error: tuple[str, str] | None = None


def neox(**edit: Any) -> tuple[str, dict[str, Any]]:
    return "neox", edit


def hf(model_type: str = "gpt_neox", **edit: Any) -> tuple[str, dict[str, Any]]:
    return "hf", {"model_type": model_type, **edit}


def unknown(key: str) -> str:
    return f"TypeError: NeoXArgs.__init__() got an unexpected keyword argument '{key}'"


def without(key: str) -> TreeFacts:
    return replace(NEW, keys=NEW.keys - {key})


def with_key(key: str) -> TreeFacts:
    return replace(NEW, keys=NEW.keys | {key})


def missing(*keys: str) -> str:
    return "\tMissing key(s) in state_dict: " + ", ".join(f'"{key}"' for key in keys) + ". "


def unexpected(*keys: str) -> str:
    return missing(*keys).replace("Missing", "Unexpected")


def size(key: str) -> str:
    shape = "torch.Size([8, 8])"
    return (
        f"\tsize mismatch for {key}: copying a param with shape {shape} from checkpoint, the "
        f"shape in current model is {shape}."
    )


def unused(model: str, key: str) -> str:
    return (
        f"Some weights of the model checkpoint at x were not used when initializing {model}: "
        f"['{key}']"
    )


def new(model: str, key: str) -> str:
    return (
        f"Some weights of {model} were not initialized from the model checkpoint at x and are "
        f"newly initialized: ['{key}']"
    )


GROUPED = {"num_kv_heads": 2, "num_attention_heads": 4}
NO_MODULE = "TypeError: Expected state_dict to be dict-like, got <class 'NoneType'>."
LAYERS = "gpt_neox.layers.0.attention."
RANKS = neox(_layout="ranks", pipe_parallel_size=1)
EXAMPLES: dict[str, Example] = {
    "neox-head-dim": Example(
        (neox(head_dim=128), neox()), (with_key("head_dim"), NEW), (unknown("head_dim"), "head_dim")
    ),
    "neox-separate-qk-norms": Example(
        (neox(qk_layernorm_over_heads=False), neox(use_qk_layernorm=True)),
        (with_key("qk_layernorm_over_heads"), NEW),
        (unexpected("attention.q_norm.scale"), unexpected("attention.qk_layernorm.scale")),
    ),
    "neox-norm-placement": Example(
        (neox(norm_placement="post_norm_inside_residual"), neox(norm="rmsnorm")),
        (with_key("norm_placement"), NEW),
        (unknown("norm_placement"), unknown("norm")),
    ),
    "neox-rms-epsilon": Example(
        (neox(norm="rmsnorm"), neox(norm="layernorm")), (NEW, replace(NEW, rms_eps="outside"))
    ),
    "neox-te-gated-width": Example(
        (neox(te_layernorm_mlp=True, activation="swiglu"), neox(te_layernorm_mlp=True)),
        error=(size("mlp.fc1_weight"), size("mlp.linear1.weight")),
    ),
    "neox-moe-keys": Example(
        (neox(moe_type="megablocks"), neox(moe_num_experts=8)),
        (NEW, without("moe_expert_interval")),
        (unknown("moe_type"), unknown("moe_router_type")),
    ),
    "neox-nvlink-key": Example(
        (neox(detect_nvlink_pairs=True), neox()),
        (NEW, with_key("detect_nvlink_pairs")),
        (unknown("detect_nvlink_pairs"), unknown("detect_nvlink")),
    ),
    "neox-non-parametric-layernorm": Example(
        (neox(norm="non_parametric_layernorm"), neox(norm="layernorm")),
        error=(
            "ValueError: norm non_parametric_layernorm not recognized",
            "ValueError: norm batchnorm not recognized",
        ),
    ),
    "neox-transformer-engine": Example(
        (neox(te_mha=True), neox(te_mha=False)),
        (NEW, replace(NEW, transformer_engine=False)),
        (missing("sequential.2.attention.qkv.weight"), missing("attention.query_key_value.weight")),
    ),
    "neox-gated-biases": Example(
        (neox(activation="geglu", _mlp_bias=False), neox(activation="geglu", _mlp_bias=True)),
        (NEW, replace(NEW, gated_biases="by activation")),
        (
            "AttributeError: 'NoneType' object has no attribute 'expand_as'",
            "AttributeError: 'NoneType' object has no attribute 'shape'",
        ),
    ),
    "neox-gqa-order": Example(
        (neox(**GROUPED), neox(num_kv_heads=4, num_attention_heads=4)),
        (NEW, replace(NEW, gqa_order="interleaved")),
    ),
    "neox-mlp-type": Example(
        (neox(mlp_type="regular"), neox()),
        (NEW, with_key("mlp_type")),
        (unknown("mlp_type"), unknown("mlp_typo")),
    ),
    "neox-gpt-j-no-mlp-bias": Example(
        (
            neox(gpt_j_residual=True, use_bias_in_mlp=False),
            neox(gpt_j_residual=False, use_bias_in_mlp=False),
        )
    ),
    "neox-mlp-names": Example(
        (neox(), neox(activation="swiglu")),
        (NEW, replace(NEW, mlp_names="dense")),
        (missing("mlp.dense_h_to_4h.weight"), missing("attention.dense.weight")),
    ),
    "neox-gated-mlp": Example(
        (neox(activation="swiglu"), neox(activation="gelu")),
        error=(unexpected("sequential.2.mlp.w3.weight"), unexpected("mlp.linear1.weight")),
    ),
    "neox-mlp-width": Example(
        (neox(_ffn=100), neox()),
        (NEW, replace(NEW, plain_mlp_4h=True)),
        (
            size("mlp.dense_h_to_4h.weight"),
            size("gpt_neox.layers.0.mlp.dense_h_to_4h.weight"),
        ),
    ),
    "neox-hf-import-bias-split": Example(
        (neox(_tp=2, _parallel=True), neox(_tp=1, _parallel=True))
    ),
    "neox-pipe-1-again": Example(
        (RANKS, neox(_layout="layers", pipe_parallel_size=1)),
        error=(NO_MODULE, "TypeError: got <class 'NoneType'>"),
    ),
    "neox-pipe-1-ranks": Example(
        (RANKS, neox(_layout="ranks", pipe_parallel_size=0)),
        error=(NO_MODULE, "KeyError: 'module'"),
    ),
    "neox-inv-freq": Example(
        (neox(pos_emb="rotary"), neox(pos_emb="alibi")),
        (replace(NEW, buffer="either"), replace(NEW, buffer="always")),
        (missing("mlp.x", "attention.rotary_emb.inv_freq"), missing("attention.dense.weight")),
    ),
    "neox-num-kv-heads": Example(
        (neox(num_kv_heads=4), neox()),
        (NEW, without("num_kv_heads")),
        (unknown("num_kv_heads"), unknown("num_heads")),
    ),
    "neox-qk-layernorm": Example(
        (neox(use_qk_layernorm=True), neox(use_qk_layernorm=False)),
        (NEW, without("use_qk_layernorm")),
        (missing("attention.qk_layernorm.weight"), missing("input_layernorm.weight")),
    ),
    "neox-rope-fp32": Example(
        (neox(_dtype="bfloat16"), neox(_dtype="float32")),
        (NEW, replace(NEW, rope_tables_fp32=False)),
    ),
    "neox-bf16-key": Example(
        (neox(_optimizer="bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"), neox()),
        error=(
            "AssertionError: DeepSpeed fp16 field was set but precision conflicts",
            "AssertionError: precision",
        ),
    ),
    "neox-pipe-1-layers": Example(
        (RANKS, neox(_layout="layers", pipe_parallel_size=1)),
        error=("KeyError: 'module'", NO_MODULE),
    ),
    "neox-gpt-j-tied-fixed": Example(
        (neox(_parallel=True, gpt_j_tied=False), neox(_parallel=True))
    ),
    "neox-gas-key": Example(
        (neox(gas=1), neox(gradient_accumulation_steps=1)),
        (NEW, with_key("gas")),
        (unknown("gas"), unknown("gradient_accumulation_steps")),
    ),
    "neox-deepspeed-08": Example(
        (neox(_ds_version=""), neox(_ds_version="0.16.5")),
        (NEW, replace(NEW, states="sub-partitions")),
        ("KeyError: 'csr_tensor_module_names'", "KeyError: 'sparse_tensor_module_names'"),
    ),
    "neox-gpt-j-tied": Example(
        (neox(gpt_j_tied=True), neox(gpt_j_tied=False)),
        (NEW, without("gpt_j_tied")),
        (unknown("gpt_j_tied"), unknown("gpt_j_residual")),
    ),
    "neox-gpt-j-reduce": Example((neox(_tp=2), neox(_tp=1))),
    "hf-lm-head": Example(
        (hf(), hf("llama")),
        error=(
            new("GPTNeoXForCausalLM", "embed_out.weight"),
            new("GPTNeoXForCausalLM", "gpt_neox.embed_in.weight"),
        ),
    ),
    "hf-rotary-pct-kept": Example(
        (
            hf(rope_parameters={"partial_rotary_factor": 0.5}),
            hf(rope_parameters={"partial_rotary_factor": 0.5}, rotary_pct=0.5),
        )
    ),
    "hf-rope-parameters": Example(
        (hf(rotary_pct=0.25), hf(rotary_pct=0.25, rope_parameters={"rope_theta": 10000}))
    ),
    "hf-dtype-auto": Example((hf(_dtype="float16"), hf(_dtype="float32"))),
    "hf-no-bin": Example((hf(_file="pytorch_model.bin"), hf())),
    "hf-dtype-key": Example((hf(dtype="float32"), hf(dtype="float32", torch_dtype="float32"))),
    "hf-qwen2-layer-types": Example((hf("qwen2", layer_types=["full_attention"]), hf("qwen2"))),
    "hf-torch-load": Example(
        (hf(_file="pytorch_model.bin"), hf()),
        error=(
            "ValueError: Due to a serious vulnerability issue in `torch.load`, even with",
            "ValueError: torch.load",
        ),
    ),
    "hf-phi3-partial-rotary": Example(
        (hf("phi3", partial_rotary_factor=0.75), hf("phi3", partial_rotary_factor=1.0))
    ),
    "hf-llama-head-dim": Example(
        (hf("llama", head_dim=128), hf("llama")),
        error=(size("model.layers.0.self_attn.q_proj.weight"), size("lm_head.weight")),
    ),
    "hf-mistral-head-dim": Example(
        (hf("mistral", head_dim=128), hf("llama", head_dim=128)),
        error=(size("model.layers.0.self_attn.o_proj.weight"), size("lm_head.weight")),
    ),
    "hf-llama3-rope": Example(
        (
            hf("llama", rope_scaling={"rope_type": "llama3"}),
            hf("llama", rope_scaling={"rope_type": "linear"}),
        ),
        error=(
            "ValueError: `rope_scaling` must be a dictionary with two fields, `type` and `factor`",
            "ValueError: `rope_scaling`'s factor field must be a float > 1",
        ),
    ),
    "hf-llama-mlp-bias": Example(
        (hf("llama", mlp_bias=True), hf("llama", mlp_bias=False)),
        error=(
            unused("LlamaForCausalLM", "model.layers.0.mlp.up_proj.bias"),
            unused("LlamaForCausalLM", "model.layers.0.self_attn.q_proj.bias"),
        ),
    ),
    "hf-llama-rope-fp32": Example((hf("llama", _dtype="bfloat16"), hf("llama", _dtype="float32"))),
    "hf-attention-bias": Example(
        (hf(_attention_bias=False), hf(_attention_bias=True)),
        error=(
            new("GPTNeoXForCausalLM", LAYERS + "query_key_value.bias"),
            new("GPTNeoXForCausalLM", LAYERS + "query_key_value.weight"),
        ),
    ),
    "hf-neox-inv-freq": Example(
        (hf(_dropped=LAYERS + "rotary_emb.inv_freq"), hf()),
        error=(
            unused("GPTNeoXForCausalLM", LAYERS + "rotary_emb.inv_freq"),
            unused("LlamaForCausalLM", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ),
    ),
    "hf-neox-rope-rounded": Example((hf(_dtype="float16"), hf(_dtype="float32"))),
    "hf-safetensors-default": Example(
        (hf(), hf(_file="pytorch_model.bin")),
        error=(
            "OSError: x does not appear to have a file named pytorch_model.bin",
            "OSError: x does not appear to have a file named config.json",
        ),
    ),
    "hf-llama-attention-bias": Example(
        (hf("llama", attention_bias=True), hf("llama", attention_bias=False)),
        error=(
            unused("LlamaForCausalLM", "model.layers.0.self_attn.q_proj.bias"),
            unused("LlamaForCausalLM", "model.layers.0.mlp.up_proj.bias"),
        ),
    ),
    "hf-llama-rope-theta": Example(
        (hf("llama", rope_theta=500000.0), hf("llama", rope_theta=10000.0))
    ),
    "hf-llama-inv-freq": Example(
        (hf("llama", _dropped="model.layers.0.self_attn.rotary_emb.inv_freq"), hf("llama")),
        error=(
            unused("LlamaForCausalLM", "model.layers.0.self_attn.rotary_emb.inv_freq"),
            unused("GPTNeoXForCausalLM", LAYERS + "rotary_emb.inv_freq"),
        ),
    ),
    "hf-masks": Example(
        (hf(_dropped=LAYERS + "masked_bias"), hf()),
        error=(unexpected(LAYERS + "masked_bias"), unexpected(LAYERS + "dense.bias")),
    ),
    "hf-rope-scaling": Example((hf(rope_scaling={"type": "linear"}), hf(rope_scaling=None))),
    "hf-llama-grouped": Example(
        (
            hf("llama", num_key_value_heads=2, num_attention_heads=4),
            hf("llama", num_key_value_heads=4, num_attention_heads=4),
        ),
        error=(
            size("model.layers.0.self_attn.k_proj.weight"),
            size("model.layers.0.self_attn.q_proj.weight"),
        ),
    ),
    "hf-parallel-residual": Example((hf(_parallel=False), hf(_parallel=True))),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = make_hf(tmp_path_factory.mktemp("changes") / "hf")
    return {
        "neox": open_checkpoint(str(fixture("pythia_fp32_pp1_tp2"))),
        "hf": open_checkpoint(str(folder)),
    }


def made(bases: dict[str, Checkpoint], kind: str, edit: dict[str, Any]) -> Checkpoint:
    """An opened checkpoint with facts put in their place; "_name" isn't a key of its config."""
    base = bases[kind]
    keys = {key: value for key, value in edit.items() if not key.startswith("_")}
    raw = {**base.raw, **keys}
    if kind == "hf":  # what this transformers writes isn't what is tested
        for key in ("rotary_pct", "rotary_emb_base", "rope_parameters", "torch_dtype", "dtype"):
            if key not in keys:
                raw.pop(key, None)
    config = base.config
    if "_dtype" in edit:
        config = replace(config, dtype=edit["_dtype"])
    if "_parallel" in edit:
        config = replace(config, parallel_residual=edit["_parallel"])
    if "_attention_bias" in edit:
        config = replace(config, attention_bias=edit["_attention_bias"])
    if "_mlp_bias" in edit:
        config = replace(config, mlp_bias=edit["_mlp_bias"])
    if "_ffn" in edit:
        config = replace(config, dims={**config.dims, "ffn": edit["_ffn"]})
    state = base.neox
    if state is not None:
        layout, tp = edit.get("_layout", state.layout), edit.get("_tp", state.tp)
        optimizer = (edit["_optimizer"],) if "_optimizer" in edit else ()
        version = edit.get("_ds_version", state.ds_version)
        state = replace(state, layout=layout, tp=tp, optimizer=optimizer, ds_version=version)
    dropped = (Dropped(edit["_dropped"], "derived"),) if "_dropped" in edit else ()
    files = (f"/x/{edit['_file']}",) if "_file" in edit else base.files
    return replace(base, raw=raw, config=config, neox=state, dropped=dropped, files=files)


def test_every_change_has_an_example_of_each_of_its_detectors() -> None:
    assert sorted(EXAMPLES) == sorted(change.id for change in CHANGES)
    for change in CHANGES:
        example = EXAMPLES[change.id]
        assert (change.in_checkpoint is None) == (example.checkpoint is None), change.id
        told = has_change(NEW, change) if change.framework == "gpt-neox" else None
        assert (told is None) == (example.tree is None), change.id
        assert bool(change.in_error) == (example.error is not None), change.id


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.id)
def test_detectors_see_the_one_and_not_the_other(change: Any, bases: dict[str, Checkpoint]) -> None:
    example = EXAMPLES[change.id]
    if example.checkpoint is not None:
        yes, no = (made(bases, kind, edit) for kind, edit in example.checkpoint)
        assert touches(change, yes)
        assert not touches(change, no)
    if example.tree is not None:
        yes_tree, no_tree = example.tree
        assert has_change(yes_tree, change)
        assert not has_change(no_tree, change)
    if example.error is not None:
        yes_text, no_text = example.error
        assert matches(change, yes_text)
        assert not matches(change, no_text)


def matches(change: Any, text: str) -> bool:
    return any(re.search(pattern, text, re.M) for pattern in change.in_error)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.id)
def test_entries_are_whole(change: Any) -> None:
    assert change.in_checkpoint or change.sets or change.in_error
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", change.id)
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", change.date)
    assert re.fullmatch(r"(#\d+)?", change.pull)
    assert re.fullmatch(r"([0-9a-f]{8,40})?", change.commit)
    owner = "EleutherAI/gpt-neox" if change.framework == "gpt-neox" else "huggingface/transformers"
    assert change.link.startswith(f"https://github.com/{owner}/")
    if change.pull:
        assert change.link.endswith("/pull/" + change.pull[1:])
    if change.framework == "gpt-neox":
        assert bool(change.commit) != change.proposed
        assert change.version == ""
    else:
        minor = change.version.rpartition(".")[0]
        assert change.version.endswith(".0") is (change.date == RELEASED[minor])
    assert all(not getattr(change, k).endswith(".") for k in ("title", "symptom", "remedy"))


def test_ids_are_unique_and_the_newest_comes_first() -> None:
    assert len({change.id for change in CHANGES}) == len(CHANGES)
    dates = [change.date for change in CHANGES]
    assert dates == sorted(dates, reverse=True)


def test_old_and_new_trees_differ_in_all_that_a_tree_tells() -> None:
    for change in CHANGES:
        if change.framework != "gpt-neox" or has_change(NEW, change) is None or change.proposed:
            continue
        if "key" not in change.id and change.id != "neox-mlp-type":
            assert has_change(NEW, change), change.id
            assert not has_change(OLD, change), change.id


def test_the_page_is_up_to_date() -> None:
    written = Path(__file__).parents[2] / "docs" / "reference" / "changes.md"
    assert written.read_text(encoding="utf-8") == page(), (
        "python -m neox_bridge.frameworks.page docs/reference/changes.md"
    )


@pytest.mark.parametrize(
    ("since", "until", "there", "absent"),
    [
        ("4.30", "4.35", {"hf-masks", "hf-neox-inv-freq", "neox-rope-fp32"}, {"hf-dtype-key"}),
        (
            "4.35.0",
            "4.35.0",
            {"hf-neox-inv-freq"},
            {"hf-llama-attention-bias", "hf-attention-bias"},
        ),
        ("5.5", None, {"hf-rotary-pct-kept", "hf-lm-head"}, {"hf-dtype-auto", "neox-rms-epsilon"}),
        (None, "5.4", {"hf-dtype-auto"}, {"hf-rotary-pct-kept"}),
        ("5.10", None, {"hf-lm-head"}, {"hf-rotary-pct-kept"}),  # 5.10 is newer than 5.5
        ("2024-03", "2024-03", {"neox-inv-freq", "neox-pipe-1-ranks"}, {"neox-num-kv-heads"}),
        ("2024-03-07", None, {"neox-pipe-1-ranks"}, {"neox-inv-freq"}),
        ("2023-11-02", "2023-11-02", {"hf-neox-inv-freq"}, {"neox-qk-layernorm"}),
        ("4.38", "2024-09", {"neox-inv-freq", "neox-mlp-names"}, {"neox-gqa-order"}),
        ("5", None, {"hf-dtype-auto"}, {"hf-dtype-key"}),
    ],
)
def test_spans(since: str | None, until: str | None, there: set[str], absent: set[str]) -> None:
    moments = [None if text is None else parse_moment(text) for text in (since, until)]
    found = {change.id for change in select(None, *moments)}
    assert there <= found
    assert not absent & found


def test_both_ends_of_a_span_are_in_it() -> None:
    change = change_named("hf-llama-rope-fp32")  # 4.38.2
    for text in ("4.38", "4.38.2", "2024-03-01", "2024-03", "2024"):
        assert not_before(change, parse_moment(text)), text
        assert not_after(change, parse_moment(text)), text
    assert not not_after(change, parse_moment("4.38.1"))
    assert not not_before(change, parse_moment("4.38.3"))


@pytest.mark.parametrize("text", ["", "4", "6.1", "2024-13", "yesterday", "4.30.x", "24-03"])
def test_other_words_for_a_moment_are_refused(text: str) -> None:
    with pytest.raises(BridgeError):
        parse_moment(text)


def run(*args: object) -> Any:
    return RUNNER.invoke(app, ["changes", *map(str, args)])


def ids(*args: object) -> list[str]:
    done = run(*args, "--json")
    assert done.exit_code == 0, done.output
    return [change["id"] for change in json.loads(done.stdout)["changes"]]


def test_the_command_lists_all() -> None:
    assert ids() == [change.id for change in CHANGES]
    neox_only = ids("--framework", "gpt-neox")
    assert neox_only == [c.id for c in CHANGES if c.framework == "gpt-neox"]
    done = run()
    for change in CHANGES:
        assert f"  link     {change.link}\n" in done.stdout
        assert change.title in done.stdout  # not wrapped


def test_the_command_for_one_checkpoint(tmp_path: Path) -> None:
    found = ids("--for", fixture("pythia_bf16_pp1_tp2_dp2"))
    assert {"neox-inv-freq", "neox-mlp-names", "neox-rope-fp32", "neox-gpt-j-reduce"} <= set(found)
    assert not {"neox-gqa-order", "neox-rms-epsilon", "hf-masks"} & set(found)
    assert all(name.startswith("neox") for name in found)
    folder = make_hf(tmp_path / "hf", torch.float16, attention_bias=False)
    found = ids("--for", folder, "--framework", "transformers")
    assert {"hf-attention-bias", "hf-dtype-auto", "hf-safetensors-default"} <= set(found)
    assert "hf-torch-load" not in found
    assert "hf-neox-inv-freq" not in found


@pytest.mark.parametrize("name", GPT_NEOX)
def test_every_fixture_can_be_asked(name: str) -> None:
    found = ids("--for", fixture(name))
    tied = "tied_norms" in name
    assert ("neox-gpt-j-tied" in found) is tied


def test_what_the_command_refuses() -> None:
    assert run("--since", "nonsense").exit_code == 2
    assert run("--framework", "megatron").exit_code == 2
    assert run("--for", "/nowhere").exit_code == 1


def test_nothing_found_is_said() -> None:
    done = run("--since", "2031")
    assert (done.exit_code, done.stdout) == (0, "no known change matches\n")
    assert ids("--since", "2031") == []


def test_detectors_are_pure(bases: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_files(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a detector opened a file")

    monkeypatch.setattr("builtins.open", no_files)
    for base in bases.values():
        for change in CHANGES:
            assert touches(change, base) in (True, False)


def test_changes_of_one_side_touch_its_checkpoints_only(bases: dict[str, Checkpoint]) -> None:
    both = {"neox-mlp-width"}  # what an old tree can't hold, wherever the model comes from
    for kind, prefix in (("hf", "hf-"), ("neox", "neox-")):
        for example in EXAMPLES.values():
            for wanted, edit in example.checkpoint or ():
                checkpoint = made(bases, kind, edit)
                found = {c.id for c in select(None, checkpoint=checkpoint)} - both
                assert all(name.startswith(prefix) for name in found), (kind, wanted, edit)


def test_a_commit_stands_in_one_source_file() -> None:
    """Other modules name a change by its id."""
    commits = {change.commit for change in HISTORY if change.commit}
    stand = {
        (commit, path.name)
        for path in Path(neox_bridge.__file__).parent.rglob("*.py")
        for commit in set(re.findall(r"[0-9a-f]{8}", path.read_text(encoding="utf-8")))
        if commit in commits
    }
    assert {commit for commit, _ in stand} == commits
    assert {name for _, name in stand} == {"changes_neox.py", "changes_transformers.py"}
    assert len(stand) == len(commits)


def test_a_proposed_change_is_marked_and_no_tree_has_it() -> None:
    proposed = Change(
        "neox-proposed",
        Commit("f" * 40, 1, "2026-06-01", proposed=True),
        ("gpt_neox",),
        "a title",
        sets={"rms_eps": "outside"},
    )
    assert where(proposed) == "GPT-NeoX #1 (proposed)"
    assert proposed.cited == "#1 (proposed, 2026-06-01)"
    assert merged((proposed, *CHANGES)) == merged(CHANGES)


PROPOSED = ("neox-head-dim", "neox-separate-qk-norms", "neox-norm-placement")


def test_no_era_and_no_day_has_a_proposed_change() -> None:
    assert {change.id for change in HISTORY if change.proposed} == set(PROPOSED)
    for change_id in PROPOSED:
        change = change_named(change_id)
        assert change not in MERGED
        assert not change.sets
        assert all(change not in changes_of(era.name) for era in ERAS)
        assert not known_keys(TODAY) & change.keys
        day = target_named("neox@2026-12-31")
        assert isinstance(day, TreeFacts)
        assert not day.keys & change.keys


def test_the_command_shows_what_is_proposed() -> None:
    done = run("--framework", "gpt-neox", "--since", "2026-09")
    heads = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert heads == [
        "2026-09-20  GPT-NeoX #1436 (proposed)  neox-head-dim",
        "2026-09-09  GPT-NeoX #1424 (proposed)  neox-separate-qk-norms",
        "2026-09-05  GPT-NeoX #1408 (proposed)  neox-norm-placement",
    ]
    told = json.loads(run("--json").stdout)["changes"]
    assert [change["id"] for change in told if change["proposed"]] == list(PROPOSED)
