"""What doctor's judges say of one difference at a time, word for word, without writing a file."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tree_changes import has_change

from neox_bridge.api import open_checkpoint
from neox_bridge.architectures.transformers_limits import llama_ignores, refuse_version
from neox_bridge.doctor.advice import Expected, convert_options, expected_by
from neox_bridge.doctor.diagnose import cannot_open, judge, own_target, written_by
from neox_bridge.doctor.fixes import fix_plan
from neox_bridge.doctor.judge_hf import judge_hf, rope_as_read
from neox_bridge.doctor.judge_neox import expected_rows, judge_neox, mlp_width, stores_inv_freq
from neox_bridge.doctor.messages import read_message
from neox_bridge.doctor.verdict import Case, case, convert_command, fix_command, verdict
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.findings import Finding
from neox_bridge.formats.yml import DuplicateKey
from neox_bridge.frameworks import detectors
from neox_bridge.frameworks.change import Change, Commit
from neox_bridge.frameworks.changes import touches
from neox_bridge.frameworks.eras import ERAS, LATER_ERAS, TODAY, fitting
from neox_bridge.frameworks.facts import TransformersFacts, TreeFacts
from neox_bridge.frameworks.targets import ARGS, knows, name_of, target_named
from neox_bridge.frameworks.unknown_keys import UnknownKey
from neox_bridge.frameworks.writers import UNKNOWN, words_of, writer_of
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.tensors.tensor_ref import TensorRef

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"


def tree(name: str, /, **changes: Any) -> TreeFacts:
    facts = target_named(name if name == "today" else f"neox@{name}")
    assert isinstance(facts, TreeFacts)
    return replace(facts, **changes)


def version(name: str) -> TransformersFacts:
    facts = target_named(f"transformers@{name}")
    assert isinstance(facts, TransformersFacts)
    return facts


@pytest.fixture(scope="module")
def pythia() -> Checkpoint:
    return open_checkpoint(str(FIXTURES / "pythia_fp32_pp1_tp2" / "checkpoints"))


@pytest.fixture(scope="module")
def llama() -> Checkpoint:
    return open_checkpoint(str(FIXTURES / "llama_gqa_fp32_tp2" / "checkpoints"))


def with_state(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    assert checkpoint.neox is not None
    return replace(checkpoint, neox=replace(checkpoint.neox, **changes))


def with_raw(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    """Other keys in the yml or in config.json; None removes one."""
    raw = {**checkpoint.raw, **changes}
    return replace(checkpoint, raw={k: v for k, v in raw.items() if v is not None})


def with_config(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    return replace(checkpoint, config=replace(checkpoint.config, **changes))


def said(cases: Iterable[Case]) -> dict[str, str]:
    return {one.finding.code: one.finding.severity for one in cases}


def of(cases: Iterable[Case], code: str) -> Case:
    (one,) = [one for one in cases if one.finding.code == code]
    return one


# --- GPT-NeoX: what loads


def test_what_its_own_tree_wrote_loads(pythia: Checkpoint, llama: Checkpoint) -> None:
    assert said(judge_neox(pythia, tree("today"))) == {}
    assert said(judge_neox(with_state(llama, gqa_order_known=True), tree("today"))) == {}
    assert said(judge_neox(pythia, tree("2024-10"))) == {}
    assert judge(pythia, tree("today")).answer == "loads"


@pytest.mark.parametrize(
    ("stages", "layout", "right"),
    [
        (0, "ranks", True),
        (1, "layers", True),
        (3, "layers", True),
        (1, "ranks", False),
        (0, "layers", False),
    ],
)
def test_the_layout_follows_from_the_stages(
    stages: int, layout: str, right: bool, pythia: Checkpoint
) -> None:
    cases = list(
        judge_neox(
            with_raw(with_state(pythia, layout=layout), pipe_parallel_size=stages), tree("today")
        )
    )
    assert said(cases) == ({} if right else {"layout-kind": "error"})
    if not right:
        want = (
            "set pipe_parallel_size: 1 in the yml" if layout == "layers" else "size: 0 in the yml"
        )
        (one,) = cases
        assert want in one.finding.remedy
        assert f"pipe_parallel_size: {stages}, and" in one.finding.message
        assert (one.prints == "KeyError: 'module'") is (layout == "ranks")


def test_keys_of_the_yml(pythia: Checkpoint) -> None:
    known = tree("today")
    fewer = replace(known, keys=known.keys - {"rotary_pct"}, places={"keys": "args.py:3"})
    one = of(judge_neox(pythia, fewer), "yml-key-unknown")
    assert one.finding.remedy == fix_command(pythia, fewer)
    risky = replace(pythia, unknown_keys=(UnknownKey("neox", "rotary_pct", 3, "model"),))
    finding = of(judge_neox(risky, fewer), "yml-key-unknown").finding
    assert finding.remedy == fix_command(risky, fewer)
    assert " --ignore-key rotary_pct" in finding.remedy
    assert finding.message.endswith("A copy without it may be another model")
    assert "does not know and rejects: rotary_pct (args.py:3)" in one.finding.message
    assert one.prints.endswith("unexpected keyword argument 'rotary_pct'")
    refused = DuplicateKey("seed", "a.yml", "b.yml", (1, 2), True)
    for refuses, severity in ((True, "error"), (False, "info")):
        twice = with_state(pythia, duplicate_keys=(replace(refused, refused=refuses),))
        assert said(judge_neox(twice, known)) == {"yml-key-twice": severity}


# --- GPT-NeoX: the state dict


LINEAR = '"mlp.linear1.weight", "mlp.linear1.bias", "mlp.linear2.weight", "mlp.linear2.bias"'
DENSE = (
    '"mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias", '
    '"mlp.dense_4h_to_h.weight", "mlp.dense_4h_to_h.bias"'
)
INV_FREQ = '"attention.rotary_emb.inv_freq"'


@pytest.mark.parametrize(
    ("state", "facts", "codes", "missing", "unexpected"),
    [
        ({}, {"buffer": "always"}, ["inv-freq-missing"], INV_FREQ, ""),
        ({}, {"buffer": "flag"}, [], "", ""),
        ({}, {"buffer": "either"}, [], "", ""),
        ({}, {"buffer": "never"}, [], "", ""),
        ({"inv_freq": "store"}, {"buffer": "always"}, [], "", ""),
        ({"inv_freq": "store"}, {"buffer": "flag"}, ["inv-freq-unexpected"], "", INV_FREQ),
        ({"inv_freq": "store"}, {"buffer": "never"}, ["inv-freq-unexpected"], "", INV_FREQ),
        ({"inv_freq": "store"}, {"buffer": "either"}, [], "", ""),
        ({}, {"mlp_names": "dense"}, ["mlp-names"], DENSE, LINEAR),
        ({"mlp_names": "dense"}, {}, ["mlp-names"], LINEAR, DENSE),
        ({"mlp_names": "dense"}, {"mlp_names": "dense"}, [], "", ""),
    ],
)
def test_names_and_buffers(
    state: Any, facts: Any, codes: list[str], missing: str, unexpected: str, pythia: Checkpoint
) -> None:
    cases = list(judge_neox(with_state(pythia, **state), tree("today", **facts)))
    assert [one.finding.code for one in cases] == codes
    for one in cases:
        assert one.finding.severity == "error"
        lines = ["RuntimeError: Error(s) in loading state_dict for ParallelTransformerLayerPipe:"]
        lines += [f"Missing key(s) in state_dict: {missing}. "] * bool(missing)
        lines += [f"Unexpected key(s) in state_dict: {unexpected}. "] * bool(unexpected)
        assert one.prints == "\n\t".join(lines)


def test_what_is_said_of_the_buffer(pythia: Checkpoint) -> None:
    flag = "rotary_save_freqs_buffer"
    stored = with_state(pythia, inv_freq="store")
    for facts, has_way in (({"buffer": "flag"}, True), ({"buffer": "never"}, False)):
        one = of(judge_neox(stored, tree("today", **facts)), "inv-freq-unexpected")
        assert (
            f"(unless the yml says {flag}: true): loading is strict" in one.finding.message
        ) is has_way
    one = of(judge_neox(with_raw(pythia, **{flag: True}), tree("today")), "inv-freq-missing")
    assert one.finding.message.startswith(f"the yml says {flag}: true, and the checkpoint")
    assert said(judge_neox(with_raw(stored, **{flag: True}), tree("today"))) == {}
    facts = tree("today", buffer="always", places={"inv_freq": "p.py:7"})
    one = of(judge_neox(pythia, facts), "inv-freq-missing")
    assert one.finding.message.startswith("this GPT-NeoX stores inv_freq (p.py:7), and")
    assert one.finding.details.where == "p.py:7"
    plain = with_raw(pythia, pos_emb="learned")
    assert stores_inv_freq(plain, facts) is False
    assert stores_inv_freq(pythia, facts) is True
    assert stores_inv_freq(pythia, tree("today", buffer="never")) is False
    assert stores_inv_freq(pythia, tree("today")) is False
    assert stores_inv_freq(plain, tree("today", buffer="either")) is None


def test_a_gated_mlp_has_other_old_names(pythia: Checkpoint, llama: Checkpoint) -> None:
    dense = tree("today", mlp_names="dense")
    assert "the MLP dense_h_to_4h and dense_4h_to_h, and the checkpoint linear1 and linear2" in (
        of(judge_neox(pythia, dense), "mlp-names").finding.message
    )
    assert "the MLP w1, w2 and w3, and the checkpoint linear1 and linear2" in (
        of(judge_neox(llama, dense), "mlp-names").finding.message
    )


def test_every_layer_is_named_where_a_rank_is_a_file(pythia: Checkpoint) -> None:
    layers = pythia.config.layers
    assert layers > 1
    ranks = with_raw(with_state(pythia, layout="ranks"), pipe_parallel_size=0)
    one = of(judge_neox(ranks, tree("today", buffer="always")), "inv-freq-missing")
    keys = ", ".join(
        f'"sequential.{n}.attention.rotary_emb.inv_freq"' for n in range(2, layers + 2)
    )
    assert one.prints == (
        "RuntimeError: Error(s) in loading state_dict for SequentialWrapper:\n\t"
        f"Missing key(s) in state_dict: {keys}. "
    )


@pytest.mark.parametrize(
    ("raw", "flags", "codes"),
    [
        ({"use_bias_in_attn_linear": False}, {}, ["biases"]),
        ({}, {"attention_bias": False}, ["biases"]),
        ({"use_bias_in_attn_linear": False}, {"attention_bias": False}, []),
        ({"use_bias_in_mlp": False}, {}, ["biases"]),
        ({}, {"norm_bias": False}, ["biases"]),
    ],
)
def test_biases_that_the_yml_does_not_give(
    raw: Any, flags: Any, codes: list[str], pythia: Checkpoint
) -> None:
    cases = list(judge_neox(with_raw(with_config(pythia, **flags), **raw), tree("today")))
    assert [one.finding.code for one in cases] == codes
    for one in cases:
        is_mlp = "use_bias_in_mlp" in raw
        assert one.finding.remedy == (
            "use a GPT-NeoX since 2024-10, and name it with `era=`" if is_mlp else "correct the yml"
        )


def test_the_biases_of_a_block_are_named(pythia: Checkpoint) -> None:
    one = of(judge_neox(with_config(pythia, norm_bias=False), tree("today")), "biases")
    names = "input_layernorm.bias, post_attention_layernorm.bias"
    assert one.finding.message.endswith(f"of the yml in this GPT-NeoX: {names}")
    keys = '"input_layernorm.bias", "post_attention_layernorm.bias"'
    assert one.prints.endswith(f"Missing key(s) in state_dict: {keys}. ")


def test_old_trees_always_have_biases_in_a_plain_mlp(pythia: Checkpoint) -> None:
    bare = with_config(pythia, mlp_bias=False)
    one = of(judge_neox(bare, tree("2024-09")), "biases")
    assert "in this GPT-NeoX: the MLP has none" in one.finding.message
    assert "biases" not in said(judge_neox(pythia, tree("2024-09")))


# --- GPT-NeoX: sizes


@pytest.mark.parametrize(
    ("raw", "width"),
    [
        ({}, 4 * 64),
        ({"intermediate_size": 100}, 100),
        ({"intermediate_size": 101}, 102),
        ({"expansion_factor": 2.5}, 160),
        ({"expansion_factor": 2.5, "intermediate_size": 10}, 10),
        ({"intermediate_size": 100, "mlp_multiple_of": 1}, 100),
        ({"intermediate_size": 101, "mlp_multiple_of": 2}, 104),
        ({"intermediate_size": 100, "mlp_multiple_of": 64}, 128),
        ({"mlp_multiple_of": 129}, 258),
    ],
)
def test_the_width_of_a_plain_mlp(raw: Any, width: int, pythia: Checkpoint) -> None:
    keys = dict.fromkeys(("intermediate_size", "expansion_factor", "mlp_multiple_of"))
    model = with_raw(with_config(pythia, dims={**pythia.config.dims, "hidden": 64}), **keys | raw)
    assert mlp_width(model, tree("today")) == width
    assert mlp_width(model, tree("today", plain_mlp_4h=True)) == 256


@pytest.mark.parametrize("bias", [True, False])
def test_an_mlp_of_another_width(bias: bool, pythia: Checkpoint, llama: Checkpoint) -> None:
    hidden, wide = pythia.config.hidden, pythia.config.dims["ffn"]
    assert wide == 4 * hidden
    raw: dict[str, Any] = {"use_bias_in_mlp": bias, "intermediate_size": wide + 8}
    other = with_raw(with_config(pythia, mlp_bias=bias), **raw)
    cases = list(judge_neox(other, tree("today")))
    assert of(cases, "mlp-width").finding.message == (
        f"the MLP is {wide} wide, and {wide + 8} wide by the yml"
    )
    assert of(cases, "mlp-width").finding.remedy == f"set intermediate_size: {wide} in the yml"
    half, want = wide // 2, (wide + 8) // 2
    sizes = [("linear1.weight", [half, hidden], [want, hidden])]
    sizes += [("linear1.bias", [half], [want])] * bias
    sizes += [("linear2.weight", [hidden, half], [hidden, want])]
    assert of(cases, "mlp-width").prints == "\n\t".join(
        ["RuntimeError: Error(s) in loading state_dict for ParallelTransformerLayerPipe:"]
        + [
            f"size mismatch for mlp.{name}: copying a param with shape torch.Size({have}) from "
            f"checkpoint, the shape in current model is torch.Size({wanted})."
            for name, have, wanted in sizes
        ]
    )
    names = said(judge_neox(other, tree("today", mlp_names="dense")))
    assert "mlp-width" not in names, "the names already fail"
    assert "mlp-width" not in said(judge_neox(with_raw(llama, **raw), tree("today")))
    narrow = with_config(pythia, dims={**pythia.config.dims, "ffn": wide - 8})
    four = tree("today", plain_mlp_4h=True)
    one = of(judge_neox(narrow, four), "mlp-width")
    assert f"the MLP is {wide - 8} wide, and this GPT-NeoX always builds" in one.finding.message
    assert f"as wide as the model, here {wide}" in one.finding.message


def test_the_rows_of_the_vocabulary(pythia: Checkpoint) -> None:
    rows, hidden = pythia.config.dims["vocab"], pythia.config.hidden
    keys = {"make_vocab_size_divisible_by": 64, "model_parallel_size": 2}
    model = with_raw(replace(pythia, tokenizer_size=rows - 3), **keys)
    assert expected_rows(model) == rows
    assert "vocabulary-rows" not in said(judge_neox(model, tree("today")))
    assert expected_rows(replace(pythia, tokenizer_size=None)) is None
    defaults = dict.fromkeys(keys)
    assert expected_rows(with_raw(replace(model, tokenizer_size=129), **defaults)) == 256
    larger = replace(model, tokenizer_size=rows + 1)
    one = of(judge_neox(larger, tree("today")), "vocabulary-rows")
    assert one.finding.message == (
        f"the embeddings have {rows} rows, and GPT-NeoX computes {rows + 128} from the tokenizer's "
        f"{rows + 1} entries, make_vocab_size_divisible_by: 64 and TP 2"
    )
    assert one.prints == (
        "RuntimeError: Error(s) in loading state_dict for EmbeddingPipe:\n\tsize mismatch for "
        f"word_embeddings.weight: copying a param with shape torch.Size([{rows // 2}, {hidden}]) "
        "from checkpoint, the shape in current model is "
        f"torch.Size([{rows // 2 + 64}, {hidden}])."
    )
    ranks = with_raw(with_state(larger, layout="ranks"), pipe_parallel_size=0)
    one = of(judge_neox(ranks, tree("today")), "vocabulary-rows")
    assert "size mismatch for sequential.0.word_embeddings.weight:" in one.prints


def test_args(pythia: Checkpoint) -> None:
    assert pythia.neox is not None
    args, pythia = pythia.neox.args, replace(pythia, tokenizer_size=510)
    assert set(args) == set(ARGS)
    for key in set(ARGS):
        other = {**args, key: "other"}
        facts = tree("today")
        cases = list(judge_neox(with_state(pythia, args=other), facts))
        assert said(cases) == {"args-differ": "error"}
        assert f"{key}: the checkpoint's args say other" in cases[0].finding.message
        assert f"{key} value from checkpoint (other)" in cases[0].prints
        unchecked = replace(facts, args_checked=tuple(k for k in ARGS if k != key))
        assert said(judge_neox(with_state(pythia, args=other), unchecked)) == {}
    unknown = replace(pythia, tokenizer_size=None)
    other = {**args, "padded_vocab_size": 1024}
    assert said(judge_neox(with_state(unknown, args=other), tree("today"))) == {}


# --- GPT-NeoX: what is silent


def test_epsilons_and_tables(pythia: Checkpoint) -> None:
    rms = with_raw(pythia, norm="rmsnorm")
    outside = tree("today", rms_eps="outside")
    assert said(judge_neox(rms, outside)) == {"rms-epsilon": "warning"}
    assert said(judge_neox(rms, tree("today"))) == {}
    assert said(judge_neox(pythia, outside)) == {}
    old = tree("today", rope_tables_fp32=False)
    assert said(judge_neox(pythia, old)) == {"rope-tables": "info"}
    assert "rope-tables" not in said(judge_neox(with_raw(pythia, pos_emb="none"), old))


@pytest.mark.parametrize(
    ("names", "known", "order", "facts", "severity"),
    [
        ("linear", True, "grouped", "grouped", None),
        ("linear", True, "interleaved", "grouped", "error"),
        ("linear", True, "grouped", "interleaved", "error"),
        ("linear", True, "interleaved", "interleaved", None),
        ("linear", False, "grouped", "grouped", "warning"),
        ("dense", True, "interleaved", "grouped", "error"),
        ("dense", True, "interleaved", "interleaved", None),
    ],
)
def test_the_order_of_grouped_queries(
    names: str, known: bool, order: str, facts: Any, severity: str | None, llama: Checkpoint
) -> None:
    state = {"mlp_names": names, "gqa_order": order, "gqa_order_known": known}
    checkpoint = with_state(llama, **state)
    cases = said(judge_neox(checkpoint, tree("today", mlp_names=names, gqa_order=facts)))
    code = "gqa-order" if known else "gqa-order-unknown"
    assert cases.get(code) == severity
    assert len([name for name in cases if name.startswith("gqa")]) == (severity is not None)
    plain = with_raw(checkpoint, num_kv_heads=llama.raw["num_attention_heads"])
    assert not [n for n in said(judge_neox(plain, tree("today"))) if n.startswith("gqa")]


def test_the_unknown_order_says_what_the_tree_reads(llama: Checkpoint) -> None:
    unknown = with_state(llama, gqa_order_known=False)
    for order, words in (("grouped", "as all q, all k, all v"), ("interleaved", "by query head")):
        one = of(judge_neox(unknown, tree("today", gqa_order=order)), "gqa-order-unknown")
        assert f"This GPT-NeoX reads them {words}. If" in one.finding.message


@pytest.mark.parametrize(
    ("rule", "activation", "bias", "parallel", "answer"),
    [
        ("optional", "silu", False, False, ""),
        ("by activation", "silu", False, False, ""),
        ("by activation", "silu", True, False, "none"),
        ("by activation", "silu", True, True, ""),
        ("by activation", "gelu", False, False, "required"),
        ("by activation", "gelu", True, False, ""),
        ("none", "silu", True, False, ""),  # its state dict already fails
    ],
)
def test_biases_of_a_gated_mlp(
    rule: Any, activation: str, bias: bool, parallel: bool, answer: str, llama: Checkpoint
) -> None:
    model = with_config(llama, mlp_bias=bias, activation=activation, parallel_residual=parallel)
    model = with_raw(model, use_bias_in_mlp=bias)
    found = [
        one
        for one in judge_neox(model, tree("today", gated_biases=rule))
        if one.finding.code == "mlp-biases"
    ]
    assert len(found) == bool(answer)
    for one in found:
        assert ("has no biases" in one.finding.message) is (answer == "required")
        assert one.prints == (
            "AttributeError: 'NoneType' object has no attribute 'expand_as'"
            if answer == "required"
            else "AssertionError"
        )
        assert "f5325805" in one.finding.remedy
    te = with_state(model, te=frozenset({"mlp"}))
    assert "mlp-biases" not in said(judge_neox(te, tree("today", gated_biases=rule)))


# --- Hugging Face


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """A folder of each family, as the conversion writes it."""
    from neox_bridge.api import plan as make_plan
    from neox_bridge.execution.execute import execute
    from neox_bridge.planning.options import Options

    home, opened = tmp_path_factory.mktemp("hf"), {}
    for family, name in (("gpt_neox", "pythia_fp32_pp1_tp2"), ("llama", "llama_gqa_fp32_tp2")):
        source = open_checkpoint(str(FIXTURES / name / "checkpoints"))
        execute(make_plan(source, Options(), str(home / family)), str(home / family), workers=1)
        opened[family] = open_checkpoint(str(home / family))
    return opened


def test_what_was_converted_loads(hf: dict[str, Checkpoint]) -> None:
    for name in ("4.31", "4.37", "4.56", "5.0", "5.24"):
        assert said(judge_hf(hf["gpt_neox"], version(name))) == {}
        assert said(judge_hf(hf["llama"], version(name))) == {}


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@pytest.mark.parametrize("by", [1, -1])
def test_a_size_that_the_tensors_deny(family: str, by: int, hf: dict[str, Checkpoint]) -> None:
    dims = hf[family].config.dims
    for key, dim in (
        ("hidden_size", "hidden"),
        ("intermediate_size", "ffn"),
        ("vocab_size", "vocab"),
    ):
        told = dims[dim] + by
        one = of(judge_hf(with_raw(hf[family], **{key: told}), version("5.5")), "config-size")
        assert one.finding.message == (
            f"config.json says {key}: {told}, and the tensors have {dims[dim]}"
        )
        assert one.finding.severity == "error"
        assert f"model is torch.Size([{told}" in one.prints or f", {told}])" in one.prints


@pytest.mark.parametrize(
    ("tree", "loads"), [("2024-03", False), ("2024-09", False), ("2024-10", False), ("today", True)]
)
def test_a_norm_that_older_trees_do_not_have(tree: str, loads: bool) -> None:
    """It is the only case: a fixed copy would be another model, or refused."""
    source = open_checkpoint(str(FIXTURES / "olmo_fp32_tp2" / "checkpoints"))
    target = target_named(f"neox@{tree}")
    assert isinstance(target, TreeFacts)
    cases = list(judge_neox(source, target))
    errors = [one.finding.code for one in cases if one.finding.severity == "error"]
    assert errors == ([] if loads else ["norm-unknown"])
    assert loads or len(cases) == 1
    if not loads:
        with pytest.raises(Refused, match="norm: non_parametric_layernorm"):
            fix_plan(source, target, "/nowhere")
    if tree == "2024-10":  # older ones reject keys of this yml first
        assert cases[0].prints.endswith("NeoXArgs types cannot be validated")


@pytest.mark.parametrize(
    ("family", "since"), [("mistral", "4.34"), ("qwen2", "4.37"), ("mamba", "4.39")]
)
def test_the_version_that_brought_a_class(
    family: str, since: str, hf: dict[str, Checkpoint]
) -> None:
    before = f"4.{int(since[2:]) - 1}"
    architecture = replace(hf["llama"].architecture, name=family)
    model = replace(hf["llama"], architecture=architecture)
    one = of(judge_hf(model, version(before)), "class-unknown")
    assert f"needs transformers {since} or newer" in one.finding.message
    assert "class-unknown" not in said(judge_hf(model, version(since)))


def test_grouped_queries_came_to_llama_with_4_31(hf: dict[str, Checkpoint]) -> None:
    one = of(judge_hf(hf["llama"], version("4.30")), "class-unknown")
    assert "needs transformers 4.31 or newer" in one.finding.message
    plain = with_config(hf["llama"], kv_heads=hf["llama"].config.heads)
    assert not plain.config.grouped_query
    assert "class-unknown" not in said(judge_hf(plain, version("4.28")))
    assert "class-unknown" in said(judge_hf(plain, version("4.27")))


def test_what_old_versions_leave_out_of_a_llama(hf: dict[str, Checkpoint]) -> None:
    other_base = with_config(with_raw(hf["llama"], rope_theta=2e4), rotary_base=2e4)
    biased = with_config(hf["llama"], attention_bias=True)
    for model, old, new in ((other_base, "4.32", "4.33"), (biased, "4.33", "4.34")):
        cases = list(judge_hf(model, version(old)))
        assert said(cases) == {"llama-ignored": "error"}
        assert f"transformers {old} ignores" in cases[0].finding.message
        assert said(judge_hf(model, version(new))) == {}
        assert llama_ignores("llama", model.config, version(old))
        assert llama_ignores("qwen2", model.config, version(old)) == []
    respelled = with_raw(other_base, rope_theta=None)
    assert "rope-spelling" in said(judge_hf(respelled, version("4.57")))
    assert "rope-spelling" not in said(judge_hf(respelled, version("5.0")))
    assert "rope-spelling" not in said(judge_hf(respelled, version("4.32"))), "ignored anyway"


def test_spellings_of_rope() -> None:
    old = {"rotary_pct": 0.5, "rotary_emb_base": 3}
    new = {"rope_parameters": {"partial_rotary_factor": 0.75, "rope_theta": 4}}
    assert rope_as_read(old, False) == rope_as_read(old, True) == (0.5, 3)
    assert rope_as_read(new, False) == (0.25, 10000)
    assert rope_as_read(new, True) == (0.75, 4)
    assert rope_as_read({}, False) == (0.25, 10000)


def test_a_fraction_that_5_0_to_5_4_lose(hf: dict[str, Checkpoint]) -> None:
    keys: dict[str, Any] = {"rotary_pct": 0.5, "rope_parameters": None}
    half = with_config(with_raw(hf["gpt_neox"], **keys), rotary_pct=0.5)
    for name, lost in (("4.57", False), ("5.0", True), ("5.4", True), ("5.5", False)):
        assert ("rotary-pct-lost" in said(judge_hf(half, version(name)))) is lost
        assert "rotary-pct-lost" not in said(judge_hf(hf["gpt_neox"], version(name)))


def test_biases_that_transformers_makes_up(hf: dict[str, Checkpoint]) -> None:
    whole = hf["gpt_neox"]
    bare = with_config(whole, attention_bias=False)
    one = of(judge_hf(with_raw(bare, attention_bias=False), version("4.36")), "biases")
    assert one.finding.remedy == "use transformers 4.37 or newer"
    assert said(judge_hf(with_raw(bare, attention_bias=False), version("4.37"))) == {}
    one = of(judge_hf(bare, version("4.37")), "biases")
    assert "does not say attention_bias: false" in one.finding.message
    assert "gpt_neox.layers.0.attention.dense.bias" in one.prints
    for flag, key in (("mlp_bias", "mlp.dense_h_to_4h.bias"), ("norm_bias", "layernorm.bias")):
        one = of(judge_hf(with_config(whole, **{flag: False}), version("5.5")), "biases")
        assert one.finding.remedy == "add them as zeros"
        assert key in one.prints


def test_dtypes_of_the_config(hf: dict[str, Checkpoint]) -> None:
    whole, both = hf["gpt_neox"], {"dtype": None, "torch_dtype": None}
    new, old = both | {"dtype": "float32"}, both | {"torch_dtype": "float32"}
    code = "dtype-one-spelling"
    assert said(judge_hf(with_raw(whole, **new), version("4.55"))) == {code: "info"}
    assert said(judge_hf(with_raw(whole, **new), version("4.56"))) == {}
    assert said(judge_hf(with_raw(whole, **old), version("4.55"))) == {}
    assert said(judge_hf(with_raw(whole, **both), version("4.55"))) == {}
    wrong = {"config-dtype": "warning"}
    assert said(judge_hf(with_raw(whole, **both | {"dtype": "float16"}), version("4.55"))) == wrong
    assert said(judge_hf(with_raw(whole, **old | {"torch_dtype": "x"}), version("5.5"))) == wrong


def test_names_that_transformers_does_not_find(hf: dict[str, Checkpoint]) -> None:
    wrapped = replace(hf["gpt_neox"], wrappers=("module.", "_orig_mod."))
    one = of(judge_hf(wrapped, version("5.5")), "wrapped-names")
    assert "contain `module.`, `_orig_mod.`, which" in one.finding.message
    cases = list(judge_hf(replace(hf["gpt_neox"], unindexed=True), version("5.5")))
    assert said(cases) == {"no-index": "error"}
    assert cases[0].finding.message.startswith("the folder has 1 shard and no index file")


# --- targets


@pytest.mark.parametrize(
    ("name", "bias", "head"),
    [
        ("4.20", False, False),
        ("4.36.2", False, False),
        ("4.37", True, False),
        ("4.38", True, False),
        ("4.57", True, False),
        ("5.0", True, True),
        ("5.1", True, True),
        ("6.0", True, True),
    ],
)
def test_what_a_version_knows(name: str, bias: bool, head: bool) -> None:
    assert knows(version(name), "hf-attention-bias") is bias
    assert knows(version(name), "hf-stored-head-kept") is head


@pytest.mark.parametrize("name", ["4.36", "4.37"])
def test_a_version_that_would_make_up_biases(name: str, hf: dict[str, Checkpoint]) -> None:
    config = replace(hf["gpt_neox"].config, attention_bias=False)
    refuse_version("llama", hf["llama"].config, version(name))
    if name == "4.37":
        refuse_version("gpt_neox", config, version(name))
        return
    with pytest.raises(Refused, match="attention_bias"):
        refuse_version("gpt_neox", config, version(name))


def test_names_of_targets() -> None:
    assert name_of(version("4.48.3")) == "transformers@4.48.3"
    assert name_of(tree("2024-09")) == "neox@2024-09"
    assert name_of(tree("today")) == "neox@today"
    assert name_of(tree("today", name="/a/tree")) == "neox:/a/tree"


def test_the_oldest_tree() -> None:
    facts = tree("2023-01-01")
    assert (facts.buffer, facts.mlp_names, facts.gqa_order) == ("always", "dense", "interleaved")
    assert (facts.rms_eps, facts.gated_biases, facts.plain_mlp_4h) == ("outside", "none", True)
    assert (facts.rope_tables_fp32, facts.transformer_engine) == (False, False)
    assert facts.args_checked == ARGS


@pytest.mark.parametrize(
    ("day", "plain_4h", "biases", "engine"),
    [
        ("2024-09-05", True, "none", False),
        ("2024-09-07", False, "by activation", False),
        ("2024-11-26", False, "by activation", False),
        ("2024-11-28", False, "optional", False),
        ("2024-12-18", False, "optional", False),
        ("2024-12-20", False, "optional", True),
    ],
)
def test_trees_around_their_changes(day: str, plain_4h: bool, biases: str, engine: bool) -> None:
    facts = tree(day)
    assert (facts.plain_mlp_4h, facts.gated_biases) == (plain_4h, biases)
    assert facts.transformer_engine is engine


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("2024-08", True),
        ("2024-11", False),
        ("2024-11-13", False),
        ("2026-05", True),
        ("2025-05", False),
        ("2025-06", True),
    ],
)
def test_a_month_without_a_change_is_a_time(name: str, right: bool) -> None:
    if right:
        assert tree(name).name == f"neox@{name}"
        return
    with pytest.raises(BridgeError, match=r"(\w{8}) changed checkpoints on .*, or neox@\1 for"):
        tree(name)


@pytest.mark.parametrize("name", ["2024-13", "2024-00", "2025-02-30", "2025-06-31", "2025-12-00"])
def test_what_is_not_in_the_calendar_is_no_time(name: str) -> None:
    with pytest.raises(BridgeError, match="unknown"):
        tree(name)


@pytest.mark.parametrize("era", ERAS, ids=lambda era: str(era.name))
def test_a_tree_of_an_era_is_that_era(era: Any) -> None:
    facts = tree(era.name)
    for field in (
        "mlp_names",
        "inv_freq",
        "inv_freq_key",
        "plain_mlp_4h",
        "gqa_order",
        "rms_eps",
        "gated_biases",
    ):
        assert getattr(facts, field) == getattr(era, field), field
    assert not facts.inv_freq_either
    assert tree(era.name, buffer="either").inv_freq_either


@pytest.mark.parametrize(
    ("names", "buffer", "raw", "era"),
    [
        ("linear", "omit", {}, "today"),
        ("linear", "store", {}, "today"),
        ("dense", "store", {}, "2024-03"),
        ("dense", "omit", {}, "2024-09"),
        ("dense", "store", {"rotary_save_freqs_buffer": True}, "2024-09"),
        ("dense", "omit", {"rotary_save_freqs_buffer": False}, "2024-09"),
    ],
)
def test_the_era_that_fits(names: Any, buffer: Any, raw: Any, era: str, pythia: Checkpoint) -> None:
    assert fitting(names, buffer, raw).name == era
    state = with_state(pythia, mlp_names=names, inv_freq=buffer)
    assert name_of(own_target(replace(state, raw=raw))) == f"neox@{era}"


# --- the command that helps


FOR_2024_03, FOR_2024_09 = {"for": "neox@2024-03"}, {"for": "neox@2024-09"}


@pytest.mark.parametrize(
    ("names", "buffer", "state", "options"),
    [
        (None, None, None, {}),
        ("dense", "store", None, FOR_2024_03),
        ("dense", "omit", None, FOR_2024_09),
        ("dense", None, None, FOR_2024_09),
        ("dense", None, {"inv_freq": "store"}, FOR_2024_03),
        ("linear", None, None, {"for": "today"}),
        ("linear", "omit", None, {"for": "today"}),
        ("linear", "store", None, {"for": "today", "inv-freq": "store"}),
        ("linear", None, {"inv_freq": "store"}, {"for": "today", "inv-freq": "store"}),
        (None, "omit", None, {"inv-freq": "omit"}),
        (None, "store", None, FOR_2024_03),
        (None, "omit", {"mlp_names": "linear"}, {"inv-freq": "omit"}),
        (None, "store", {"mlp_names": "linear"}, {"inv-freq": "store"}),
        (None, "omit", {"mlp_names": "dense"}, FOR_2024_09),
        (None, "store", {"mlp_names": "dense"}, FOR_2024_03),
    ],
)
def test_the_options_of_a_conversion(
    names: Any, buffer: Any, state: Any, options: dict[str, str], pythia: Checkpoint
) -> None:
    checkpoint = None if state is None else with_state(pythia, **state)
    assert convert_options(Expected(names, buffer), checkpoint) == options
    if checkpoint is not None and options == FOR_2024_03:
        flag = with_raw(checkpoint, rotary_save_freqs_buffer=True)
        assert convert_options(Expected(names, buffer), flag) == FOR_2024_09


def test_a_key_that_some_trees_refuse(pythia: Checkpoint, llama: Checkpoint) -> None:
    from neox_bridge.frameworks.keys import neox_keys

    trees = {era.name: neox_keys(era.name) for era in LATER_ERAS}
    everyone = frozenset().union(*trees.values())

    def key(*refusing: str) -> str | None:
        return next(
            (
                k
                for k in sorted(everyone)
                if {n for n in trees if k not in trees[n]} == set(refusing)
            ),
            None,
        )

    def options(name: str | None, checkpoint: Checkpoint | None = None) -> dict[str, str]:
        assert name is not None
        return convert_options(Expected(unknown_key=name), checkpoint)

    assert options("no_such_key") == {}
    assert options(key()) == {}
    assert options(key("2024-03")) == FOR_2024_03
    assert options(key("2024-03", "2024-09")) == {"for": "neox:TREE"}
    assert options(key("today")) == {"for": "today"}
    if both := key("2024-10", "today"):
        assert options(both) == options(both, pythia) == {"for": "today"}
        assert options(both, llama) == {"for": "neox:TREE"}, "the order of its rows differs"
    assert TODAY.name == "today"


@pytest.mark.parametrize(
    ("refusing", "options", "grouped"),
    [
        ((), {}, {}),
        (("2024-03",), FOR_2024_03, FOR_2024_03),
        (("2024-10",), {"for": "neox@2024-10"}, {"for": "neox@2024-10"}),
        (("today",), {"for": "today"}, {"for": "today"}),
        (("2024-10", "today"), {"for": "today"}, {"for": "neox:TREE"}),
        (("2024-03", "2024-09"), {"for": "neox:TREE"}, {"for": "neox:TREE"}),
        (("2024-03", "today"), {"for": "neox:TREE"}, {"for": "neox:TREE"}),
        (("2024-09", "2024-10", "today"), {"for": "neox:TREE"}, {"for": "neox:TREE"}),
        (("2024-09", "2024-10"), {"for": "neox:TREE"}, {"for": "neox:TREE"}),
        (("2024-03", "2024-09", "2024-10", "today"), {}, {}),
    ],
)
def test_which_tree_refused_a_key(
    refusing: tuple[str, ...],
    options: dict[str, str],
    grouped: dict[str, str],
    pythia: Checkpoint,
    llama: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def known_keys(era: Any) -> frozenset[str]:
        return frozenset({"other"} if era.name in refusing else {"other", "key"})

    monkeypatch.setattr("neox_bridge.doctor.advice.known_keys", known_keys)
    expected = Expected(unknown_key="key")
    assert convert_options(expected, None) == convert_options(expected, pythia) == options
    assert convert_options(expected, llama) == grouped


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "TypeError: NeoXArgs.__init__() got an unexpected keyword argument 'k'",
            Expected(unknown_key="k"),
        ),
        ("neox_arguments/x.py\ngot an unexpected keyword argument 'k'", Expected(unknown_key="k")),
        ("Other() got an unexpected keyword argument 'k'", Expected()),
        ("NeoXArgs did something else", Expected()),
        (
            'Missing key(s) in state_dict: "attention.rotary_emb.inv_freq". ',
            Expected(buffer="store"),
        ),
        (
            'Unexpected key(s) in state_dict: "attention.rotary_emb.inv_freq". ',
            Expected(buffer="omit"),
        ),
        ('Missing key(s) in state_dict: "mlp.dense_h_to_4h.bias". ', Expected("dense")),
        ('Missing key(s) in state_dict: "mlp.w3.weight". ', Expected("dense")),
        ('Unexpected key(s) in state_dict: "mlp.dense_4h_to_h.bias". ', Expected("linear")),
        ('Missing key(s) in state_dict: "norm.bias". ', Expected()),
    ],
)
def test_what_a_message_tells_of_its_tree(text: str, expected: Expected) -> None:
    assert expected_by(read_message(text)) == expected
    assert bool(expected) is (expected != Expected())


# --- what is said of a checkpoint


def test_unknown_keys_of_a_config(hf: dict[str, Checkpoint]) -> None:
    keys = (UnknownKey("hf", "a_scale", 3, "model"), UnknownKey("hf", "b", 4, "none"))
    cases = judge(replace(hf["gpt_neox"], unknown_keys=keys), version("5.5")).cases
    assert of(cases, "unknown-key").finding.severity == "warning"
    assert "a_scale: 3" in of(cases, "unknown-key").finding.message
    assert of(cases, "unknown-keys").finding.severity == "info"
    assert "b: 4" in of(cases, "unknown-keys").finding.message
    harmless = judge(replace(hf["gpt_neox"], unknown_keys=keys[1:]), version("5.5")).cases
    assert "unknown-key" not in said(harmless)


@pytest.mark.parametrize(("finetune", "severity"), [(True, None), (False, "error"), (None, "info")])
def test_resuming_without_states(finetune: Any, severity: Any, pythia: Checkpoint) -> None:
    cases = judge(with_raw(pythia, finetune=finetune), tree("today")).cases
    assert said(cases).get("no-optimizer-states") == severity


def test_who_wrote_it(pythia: Checkpoint, hf: dict[str, Checkpoint]) -> None:
    form = "in the form of GPT-NeoX since 2024-11 (linear names, inv_freq not stored)"
    assert pythia.neox is not None
    assert written_by(pythia) == f"{words_of(pythia.neox.writer)}, {form}"
    assert f"DeepSpeed {pythia.neox.ds_version} (ds_version" in written_by(pythia)
    anonymous = with_state(pythia, writer=UNKNOWN, inv_freq="store")
    assert written_by(anonymous) == (
        "a tool that left no name, in the form of GPT-NeoX since 2024-11 (linear names, inv_freq "
        "stored)"
    )
    ours = replace(pythia, record={"written_by": "neox-bridge 1", "source": {"name": "x"}})
    assert written_by(ours) == f"neox-bridge 1 from x, {form}"
    assert written_by(replace(pythia, record={"written_by": "y", "source": 3})) == f"y, {form}"
    bridge = with_state(pythia, writer=writer_of({"ds_version": "neox-bridge 1"}))
    assert written_by(bridge) == f"neox-bridge 1 (ds_version), {form}"
    folder = replace(hf["gpt_neox"], record={})
    named = with_raw(folder, transformers_version="4.30")
    assert written_by(named) == "transformers 4.30 (config.json)"
    unnamed = with_raw(folder, transformers_version=None)
    assert written_by(unnamed) == "a tool that left no name"
    torch = replace(named, files=("a.bin",))
    assert written_by(torch) == "transformers 4.30 (config.json), torch (pytorch_model*.bin)"


@pytest.mark.parametrize(("by", "warns"), [(0, False), (-1, False), (1, True)])
def test_a_tokenizer_that_is_larger_than_the_model(
    by: int, warns: bool, hf: dict[str, Checkpoint]
) -> None:
    model = replace(hf["gpt_neox"], tokenizer_size=hf["gpt_neox"].config.dims["vocab"] + by)
    cases = said(judge(model, version("5.5")).cases)
    assert ("tokenizer-larger" in cases) is warns
    assert "no-tokenizer" not in cases
    assert "no-tokenizer" in said(judge(replace(model, tokenizer_size=None), version("5.5")).cases)


def test_the_other_kind(pythia: Checkpoint, hf: dict[str, Checkpoint]) -> None:
    for checkpoint, target, prints in (
        (pythia, version("5.5"), "OSError"),
        (hf["gpt_neox"], tree("today"), "Unable to find latest file"),
    ):
        found = judge(checkpoint, target)
        one = of(found.cases, "other-kind")
        assert found.answer == "fails"
        assert one.prints.startswith(prints)
        assert one.finding.remedy == convert_command(checkpoint, target)
    bare = with_config(pythia, attention_bias=False)
    found = judge(bare, version("4.36"))
    assert of(found.cases, "other-kind").finding.remedy == ""
    assert "transformers 4.37 added attention_bias" in of(found.cases, "refused").finding.message


def test_files_of_two_layouts_are_behind_a_failure(tmp_path: Path) -> None:
    import shutil

    assert cannot_open(str(tmp_path / "missing")) is None
    hf_folder = tmp_path / "hf"
    hf_folder.mkdir()
    (hf_folder / "config.json").write_text("{}")
    assert cannot_open(str(hf_folder)) is None
    root = tmp_path / "neox"
    shutil.copytree(FIXTURES / "pythia_fp32_pp1_tp2" / "checkpoints", root)
    assert cannot_open(str(root)) is None
    (step,) = root.glob("global_step*")
    rank = next(step.glob("mp_rank_00*"))
    shutil.copy(rank, step / "mp_rank_07_model_states.pt")
    one = cannot_open(str(root))
    assert one is not None
    assert one.fails


# --- verdicts, and the commands in them


def test_the_first_message_that_is_printed_counts() -> None:
    info, warning = case("a", "info", "A"), case("b", "warning", "B")
    silent, loud = case("c", "error", "C"), case("d", "error", "D", prints="d!")
    assert (verdict("t", []).answer, verdict("t", [info]).answer) == ("loads", "loads")
    assert verdict("t", [info, warning]).answer == "loads with warnings"
    assert (verdict("t", [warning]).message, verdict("t", [warning]).target) == ("", "t")
    assert (
        verdict("t", [warning, silent, loud, case("e", "error", "E", prints="e!")]).message == "d!"
    )
    assert verdict("t", [silent]).message == "(nothing) C"
    assert verdict("t", [info, silent]).answer == "fails"
    assert Case(Finding("x", "error", "")).fails
    assert not Case(Finding("x", "warning", "")).fails


def test_commands(pythia: Checkpoint, hf: dict[str, Checkpoint]) -> None:
    there = replace(pythia, path="/a b/")
    assert fix_command(there, None) == "neox-bridge doctor '/a b/' --fix '/a b-fixed'"
    assert fix_command(there, tree("today"), "--x").endswith(
        " --for neox@today --fix '/a b-fixed' --x"
    )
    assert convert_command(there, version("5.5")) == (
        "neox-bridge convert '/a b/' '/a b-hf' --for transformers@5.5"
    )
    folder = replace(hf["gpt_neox"], path="m/")
    assert convert_command(folder, tree("today")) == (
        "neox-bridge convert m/ m-neox --for neox@today"
    )


# --- detectors


def one_of(kind: str = "neox", **raw: Any) -> Any:
    state = SimpleNamespace(layout="ranks", tp=1, optimizer=())
    config = SimpleNamespace(dims={"ffn": 16}, hidden=4, attention_bias=True, mlp_bias=True)
    return SimpleNamespace(
        kind=kind, raw=raw, config=config, neox=state if kind == "neox" else None
    )


def test_detectors() -> None:
    for change in (keys("adds_keys"), keys("removes_keys")):
        assert touches(change, one_of(a=None))
        assert not touches(change, one_of(b=1))
        assert not touches(change, one_of("hf", a=1))
    assert detectors.on("a")(one_of(a=1))
    assert not detectors.on("a")(one_of(a=0))
    assert detectors.is_gated(one_of(activation="swiglu"))
    assert detectors.is_gated(one_of(mlp_type="llama"))
    assert not detectors.is_gated(one_of(activation="gelu"))
    assert detectors.is_te(one_of(te_mha=True))
    assert not detectors.is_te(one_of(te_mha=False))
    assert detectors.is_grouped(one_of(num_kv_heads=2, num_attention_heads=4))
    assert not detectors.is_grouped(one_of(num_kv_heads=4, num_attention_heads=4))
    assert not detectors.is_grouped(one_of(num_attention_heads=4))
    wide = one_of(activation="gelu")
    assert not detectors.is_wide(wide)
    wide.config.dims = {"ffn": 17}
    assert detectors.is_wide(wide)
    wide.raw["activation"] = "geglu"
    assert not detectors.is_wide(wide)
    assert detectors.one_stage_ranks(one_of(pipe_parallel_size=1))
    assert not detectors.one_stage_ranks(one_of(pipe_parallel_size=0))
    ranks = one_of(attention_bias=True)
    assert not detectors.sums(ranks)
    ranks.neox.tp = 2
    assert detectors.sums(ranks)
    ranks.config.attention_bias = False
    assert detectors.sums(ranks)
    ranks.config.mlp_bias = False
    assert not detectors.sums(ranks)
    assert detectors.hf("llama", lambda _: True)(one_of("hf", model_type="llama"))
    assert not detectors.hf("llama", lambda _: True)(one_of("hf", model_type="other"))
    assert detectors.hf("", lambda _: True)(one_of("hf", model_type="other"))
    assert not detectors.hf("", lambda _: True)(one_of("neox"))
    assert not detectors.hf("", lambda _: False)(one_of("hf"))


def test_runs_in_bfloat16() -> None:
    assert detectors.stores_bf16(one_of(bf16={}))
    assert detectors.stores_bf16(one_of(precision="bfloat16"))
    assert not detectors.stores_bf16(one_of(precision="fp16"))
    assert not detectors.stores_bf16(one_of("hf", bf16={}))
    run = one_of(precision="fp16")
    run.neox.optimizer = ("zero_pp_rank_0", "bf16_zero_pp_rank_0")
    assert detectors.stores_bf16(run)


def keys(field: str, name: str = "a") -> Change:
    return Change("a-key", Commit("0" * 40, 1, "2024-01-01"), **{field: (name,)})


def test_facts_of_keys() -> None:
    facts = tree("today", keys=frozenset({"a"}))
    assert has_change(facts, keys("adds_keys"))
    assert not has_change(facts, keys("adds_keys", "b"))
    assert has_change(facts, keys("removes_keys", "b"))
    assert not has_change(facts, keys("removes_keys"))
    assert keys("adds_keys").in_error == ("unexpected keyword argument 'a'",)


def test_buffers_that_are_stored(hf: dict[str, Checkpoint], tmp_path: Path) -> None:
    import shutil

    import numpy as np
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(hf["gpt_neox"].path, folder)
    (folder / "neox_bridge.json").unlink()
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    key = "gpt_neox.layers.0.attention.rotary_emb.inv_freq"
    dim = hf["gpt_neox"].config.rotary_dim
    for factor, recompute in ((1.0, False), (1.5, True)):
        exact = 1.0 / 10000.0 ** (np.arange(0, dim, 2, dtype=np.float32) / dim)
        save_file({**tensors, key: (exact * factor).astype(np.float32)}, shard, {"format": "pt"})
        opened = open_checkpoint(str(folder))
        for name, read in (("4.34", True), ("4.35", False)):
            one = of(judge_hf(opened, version(name)), "inv-freq-stored")
            assert ("--recompute" in one.finding.remedy) is recompute
            assert ("4.34 reads it" in one.finding.message) is read
            assert one.finding.severity == ("warning" if read and recompute else "info")
    assert isinstance(next(iter(opened.tensors.values())).pieces[0].source, TensorRef)
