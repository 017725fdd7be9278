"""What is computed from settings, without a checkpoint: scales, keys, sizes, other ranks."""

from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
from model_configs import config

from neox_bridge.architectures import ARCHITECTURES
from neox_bridge.architectures.rows import model_rows
from neox_bridge.errors import Refused, UsageError
from neox_bridge.formats.pickle_writer import TensorSlot
from neox_bridge.formats.pickles import Global, Record
from neox_bridge.frameworks.check_keys import unknown_in_config
from neox_bridge.frameworks.deepspeed import pipeline_accumulation
from neox_bridge.frameworks.eras import ERAS, TODAY, era_named, known_keys
from neox_bridge.frameworks.unknown_keys import UnknownKey, effect_of, is_off, neighbour_of
from neox_bridge.layouts.universal_folder import MASTER
from neox_bridge.layouts.unknown_keys import ignored_findings, listed, undecided, warned
from neox_bridge.layouts.window import effective_window
from neox_bridge.optimizer.gradient_scale import (
    Rescaling,
    Side,
    change_of_scale,
    gradient_findings,
    kept_accumulation,
    rescaling,
)
from neox_bridge.optimizer.mp_rank import Sources, buffer_names, mp_rank, parameter_name, with_slots
from neox_bridge.optimizer.states import Group, Optimizer
from neox_bridge.planning.common import with_vocabulary_rows
from neox_bridge.planning.neox_yml import START, settings, start_yml, step_yml
from neox_bridge.planning.option_checks import check_gqa_order, check_layout, check_optimizer
from neox_bridge.planning.vocabulary import fit, keep, padded_size, padding_multiple
from neox_bridge.tensors.pieces import OutputTensor
from neox_bridge.tensors.tensor_ref import TensorRef

# --- the scale of gradients


def optimizer(*keys: str, **group: Any) -> Optimizer:
    groups = (Group(group, {}),)
    return Optimizer("zero", 1, 1, (MASTER, *keys), groups, {}, {}, {}, (), (), {})


def changes(**fields: Any) -> Rescaling:
    given: dict[str, Any] = {
        "factor": Fraction(2),
        "powers": {"exp_avg": 1, "exp_avg_sq": 2},
        "decays": False,
        "has_eps": True,
        "half": False,
    }
    return Rescaling(**{**given, **fields})


@pytest.mark.parametrize(
    ("side", "scale"),
    [
        (Side("sums", True, 1, 1), 1),
        (Side("sums", True, 1, 4), 4),
        (Side("sums", True, 3, 4), 4),
        (Side("sums", False, 1, 4), 1),
        (Side("averages", True, 2, 4), 1),
        (Side("once a stage", True, 1, 4), 1),
        (Side("once a stage", True, 2, 4), None),
        (Side("once a stage", True, 2, 1), 1),
        (Side("once a stage", False, 2, 4), 1),
    ],
)
def test_how_large_gradients_are(side: Side, scale: int | None) -> None:
    assert side.scale == scale


def test_the_accumulation_that_keeps_the_scale() -> None:
    four = Side("sums", True, 1, 4)
    assert kept_accumulation(four, Side("sums", True, 1, 2)) == 4
    assert kept_accumulation(four, Side("once a stage", True, 2, 2)) == 1
    assert kept_accumulation(four, Side("once a stage", True, 1, 2)) is None
    assert kept_accumulation(four, Side("averages", True, 1, 2)) is None
    assert kept_accumulation(four, Side("sums", False, 1, 2)) is None
    assert kept_accumulation(Side("once a stage", True, 2, 8), Side("sums", True, 1, 2)) == 8


def test_only_the_same_side_has_the_same_unknown_scale() -> None:
    unknown = Side("once a stage", True, 2, 4)
    assert change_of_scale(unknown, unknown, "") == 1
    assert change_of_scale(Side("sums", True, 1, 4), Side("sums", True, 1, 2), "") == Fraction(1, 2)
    for one, other in ((unknown, replace(unknown, stages=4)), (Side("sums", True, 1, 4), unknown)):
        for pair in ((one, other), (other, one)):
            with pytest.raises(Refused):
                change_of_scale(*pair, "")


@pytest.mark.parametrize(
    ("factor", "exact", "loss_scale"),
    [(2, True, 2.0), (Fraction(1, 4), True, 0.25), (3, False, 4.0), (Fraction(2, 3), False, 1.0)],
)
def test_a_power_of_two_is_exact(factor: Any, exact: bool, loss_scale: float) -> None:
    change = changes(factor=Fraction(factor))
    assert (change.exact, change.loss_scale) == (exact, loss_scale)


@pytest.mark.parametrize(
    ("value", "scaled"),
    [
        (1.0, 3.0),
        (2, 6),
        ("1e-08", 3e-8),
        ("2.5E+2", 750.0),
        ("1.0", 3.0),
        ("auto", "auto"),
        (True, True),
        (None, None),
    ],
)
def test_a_number_is_scaled_and_nothing_else(value: Any, scaled: Any) -> None:
    result = changes(factor=Fraction(3)).times(value)
    assert result == (pytest.approx(scaled) if isinstance(scaled, float) else scaled)
    assert type(result) is type(scaled)


def test_a_whole_number_stays_one_where_it_is_one() -> None:
    half = changes(factor=Fraction(1, 2))
    assert (half.times(4), type(half.times(4))) == (2, int)
    assert (half.times(3), type(half.times(3))) == (1.5, float)
    assert type(half.times(4.0)) is float


def test_the_yml_of_a_scaled_run() -> None:
    raw = {"gradient_clipping": 0.5, "optimizer": {"type": "Adam", "params": {"lr": 1.0}}}
    assert changes().yml(raw) == {
        "gradient_clipping": 1.0,
        "optimizer": {"type": "Adam", "params": {"lr": 1.0, "eps": 2e-8}},
    }
    assert changes().yml({}) == {
        "gradient_clipping": 2.0,
        "optimizer": {"params": {"eps": 2e-8}},
    }
    assert changes(has_eps=False).yml(raw) == {"gradient_clipping": 1.0}
    assert changes(has_eps=False, decays=True).yml({}) == {
        "gradient_clipping": 2.0,
        "weight_decay": 0.2,
    }
    decays = changes(decays=True).yml({"optimizer": {"params": {"weight_decay": 1, "eps": "1e-8"}}})
    assert decays["optimizer"]["params"] == {"weight_decay": 2, "eps": 2e-8}


@pytest.mark.parametrize(
    ("half", "block", "divided"),
    [
        (True, {"loss_scale": 512, "enabled": True}, {"loss_scale": 256, "enabled": True}),
        (True, {"loss_scale": 0}, None),  # dynamic
        (True, {"enabled": True}, None),
        (True, None, None),
        (True, True, None),
        (False, {"loss_scale": 512}, None),
    ],
)
def test_a_static_loss_scale_is_divided(half: bool, block: Any, divided: Any) -> None:
    raw = {} if block is None else {"fp16": block}
    assert changes(half=half).yml(raw).get("fp16") == divided
    assert changes(half=half).ds_config(raw).get("fp16") == (divided or block)


def test_deepspeeds_own_settings_are_scaled() -> None:
    told = {
        "gradient_clipping": 1.0,
        "optimizer": {"type": "Adam", "params": {"eps": 1e-8, "lr": 0.5, "weight_decay": 0.1}},
        "steps": 3,
    }
    changed = changes().ds_config(told)
    assert changed == {
        "gradient_clipping": 2.0,
        "optimizer": {"type": "Adam", "params": {"eps": 2e-8, "lr": 0.5, "weight_decay": 0.1}},
        "steps": 3,
    }
    assert changes().ds_config({"steps": 3}) == {"steps": 3}
    assert changes().ds_config({"optimizer": {"type": "Adam"}}) == {"optimizer": {"type": "Adam"}}


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("wrapper", ["fp16", "zero"])
def test_the_optimizers_head_is_scaled(half: bool, wrapper: Any) -> None:
    scaler = Record(Global("m", "Scaler"), state={"cur_scale": 64.0, "min_scale": 48.0, "other": 1})
    head = {"clip_grad": 1.0, "cur_scale": 64.0, "min_loss_scale": 8.0, "loss_scaler": scaler}
    given = replace(optimizer(eps=1e-8, weight_decay=0.5), wrapper=wrapper, head=head)
    done = changes(half=half).optimizer(given)
    assert done.head["clip_grad"] == 2.0
    assert done.head["cur_scale"] == (32.0 if half and wrapper == "fp16" else 64.0)
    assert done.head["loss_scaler"].state == {
        "cur_scale": 48.0 if half else 64.0,
        "min_scale": 48.0,
        "other": 1,
    }
    assert scaler.state["cur_scale"] == 64.0, "the source stays as it is"
    assert done.groups[0].settings == {"eps": 2e-8, "weight_decay": 0.5}
    coupled = changes(decays=True, has_eps=False).optimizer(given)
    assert coupled.groups[0].settings == {"eps": 1e-8, "weight_decay": 1.0}


@pytest.mark.parametrize(
    ("name", "keys", "powers"),
    [
        ("Adam", ("exp_avg", "exp_avg_sq"), {"exp_avg": 1, "exp_avg_sq": 2}),
        (None, ("exp_avg",), {"exp_avg": 1}),
        ("cpu_adam", ("exp_avg", "max_exp_avg_sq"), {"exp_avg": 1, "max_exp_avg_sq": 2}),
        ("Lion", ("exp_avg",), {"exp_avg": 1}),
        ("Lion", ("exp_avg", "exp_avg_sq"), None),
        ("Adam", ("exp_avg", "a_state"), None),
        ("Adam", ("exp_avg", "z_state"), None),
        ("SGD", (), None),
    ],
)
def test_which_optimizers_go_on(name: Any, keys: tuple[str, ...], powers: Any) -> None:
    raw = {"optimizer": {"type": name}} if name else {}
    if powers is None:
        with pytest.raises(Refused, match="WAY OUT"):
            rescaling(optimizer(*keys), raw, Fraction(2), "float16", "WAY OUT")
        return
    done = rescaling(optimizer(*keys), raw, Fraction(2), "float16", "")
    assert done == Rescaling(Fraction(2), powers, False, name != "Lion", True)
    assert not rescaling(optimizer(*keys), raw, Fraction(2), "bfloat16", "").half
    with pytest.raises(Refused, match="use_bnb_optimizer"):
        rescaling(optimizer(*keys), {**raw, "use_bnb_optimizer": True}, Fraction(2), "float16", "")


@pytest.mark.parametrize(
    ("name", "group", "params", "raw", "decays"),
    [
        ("Adam", {"weight_decay": 0.1}, {}, {}, False),
        ("Adam", {"weight_decay": 0.1}, {"adam_w_mode": False}, {}, True),
        ("Adam", {"weight_decay": 0.1}, {"adamw_mode": False}, {}, True),
        ("Adam", {"weight_decay": 0.1}, {"adam_w_mode": True, "adamw_mode": True}, {}, False),
        ("Adam", {"weight_decay": 0.0}, {"adam_w_mode": False}, {}, False),
        ("Adam", {"weight_decay": 0.1, "decoupled_weight_decay": False}, {}, {}, True),
        ("Adam", {"weight_decay": 0.1, "decoupled_weight_decay": True}, {}, {}, False),
        ("Adam", {"weight_decay": 0.1}, {}, {"use_mup": True}, True),
        ("Lion", {"weight_decay": 0.1}, {"adam_w_mode": False}, {"use_mup": True}, False),
    ],
)
def test_where_weight_decay_is_a_part_of_the_gradient(
    name: str, group: Any, params: Any, raw: Any, decays: bool
) -> None:
    told = {**raw, "optimizer": {"type": name, "params": params}}
    assert rescaling(optimizer(**group), told, Fraction(2), "float32", "").decays is decays


def test_what_is_said_of_a_scale() -> None:
    before, after = Side("sums", True, 1, 2), Side("averages", True, 1, 3)
    one = replace(before, accumulation=1)
    assert list(gradient_findings("0.16.5", one, one, None, {})) == []
    assert list(gradient_findings("1", replace(before, pipeline=False), one, None, {})) == []
    (kept,) = gradient_findings("0.16.5", before, after, None, {})
    assert (kept.code, kept.severity) == ("gradient-scale", "info")
    assert "gradient_accumulation_steps 2 -> 3" in kept.message
    assert "(DeepSpeed 0.16.5) sums micro-batches' gradients" in kept.message
    assert "the one that resumes it averages micro-batches' gradients" in kept.message
    assert "`engine=sums`;" in kept.remedy
    (kept,) = gradient_findings(None, after, before, None, {})
    assert "an unknown DeepSpeed version" in kept.message
    assert "`engine=averages`;" in kept.remedy
    change = changes(factor=Fraction(3), decays=True, half=True)
    yml = change.yml({"weight_decay": 0.5})
    scaled, loss, decay = gradient_findings("0.16.5", before, after, change, yml)
    assert (scaled.severity, loss.severity, decay.severity) == ("warning", "info", "warning")
    assert "the gradients are 3 x what they were" in scaled.message
    assert "exp_avg x 3, exp_avg_sq x 9 (rounded" in scaled.message
    keys = (
        "gradient_clipping: 3.0, optimizer.params.eps: 3.0000000000000004e-08, weight_decay: 1.5."
    )
    assert keys in scaled.message
    assert "divided by 4 " in loss.message
    assert "weight_decay x 3 " in decay.message
    change = changes(has_eps=False)
    (scaled,) = gradient_findings("0.16.5", before, after, change, change.yml({}))
    assert "rounded" not in scaled.message
    assert "has gradient_clipping: 2.0. Resume with" in scaled.message


@pytest.mark.parametrize(
    ("version", "kind"),
    [
        ("0.0.0", "averages"),
        ("0.15.999", "averages"),
        ("0.16.0", "sums"),
        ("0.18.2", "sums"),
        ("0.18.3", "once a stage"),
        ("0.19.2", "once a stage"),
        ("0.19.3", "averages"),
        ("v0.16.5", None),
        ("0.16", None),
        ("", None),
    ],
)
def test_both_sides_of_a_change_of_deepspeed(version: str, kind: str | None) -> None:
    assert pipeline_accumulation(version) == kind


# --- unknown keys


KNOWN = ("hidden_size", "num_layers", "rotary_pct", "seed", "attention_dropout", "log_interval")


@pytest.mark.parametrize(
    ("name", "neighbour", "slip"),
    [
        ("rotary_pct", "rotary_pct", True),
        ("Rotary-Pct", "rotary_pct", True),
        ("pct_rotary", "rotary_pct", True),
        ("rotarypct", "rotary_pct", True),
        ("rotray_pct", "rotary_pct", True),  # two letters swapped are one slip
        ("rotary_pc", "rotary_pct", True),
        ("rotary_pctt", "rotary_pct", True),
        ("rotary_xct", "rotary_pct", True),
        ("ratory_pct", "rotary_pct", True),  # two letters
        ("rytory_pxt", "", False),  # three
        ("otary_pcts", "rotary_pct", True),
        ("rotary_pctxyz", "rotary_pct", False),  # like it, and no slip
        ("sede", "seed", True),
        ("seedd", "seed", True),
        ("sed", "seed", True),
        ("sd", "", False),  # two slips in a short name
        ("xyzabc", "", False),
    ],
)
def test_how_near_a_misspelling_is(name: str, neighbour: str, slip: bool) -> None:
    for known in (KNOWN, KNOWN[::-1]):
        assert neighbour_of(name, known) == (neighbour, slip)


def test_of_several_neighbours_the_nearest_is_named() -> None:
    assert neighbour_of("num_layer", ("num_payers", "num_layers")) == ("num_layers", True)
    assert neighbour_of("hidden_siz", ("hidden_sizes", "hidden_size")) == ("hidden_size", True)


@pytest.mark.parametrize(
    ("name", "value", "off"),
    [
        ("x_scale", 1.0, True),
        ("x_scale", 1.5, False),
        ("x_scale", "1", True),
        ("x_scale", 0, False),
        ("logit_cap", 0, True),
        ("logit_cap", 1, False),
        ("logit_cap", "0.0", True),
        ("softcaps_of", 0, True),
        ("window", -1, True),
        ("x_scale", -1, False),
        ("any", None, True),
        ("any", "none", True),
        ("any", " Off ", True),
        ("any", "on", False),
        ("any", False, True),
        ("any", True, False),
        ("is_causal", True, True),
        ("is_causal", False, False),
        ("x_scale", [1, 1.0], True),
        ("x_scale", [1, 2], False),
        ("layer_kinds", ["full_attention", None], True),
        ("layer_kinds", ["full_attention", "sliding"], False),
        ("block", {}, True),
        ("block", {"enabled": False, "scale": 3}, True),
        ("block", {"enabled": True, "scale": 3}, False),
        ("rope", {"type": "default", "factor": 4.0}, True),
        ("rope", {"rope_type": "default", "rope_theta": 1e6}, False),
        ("rope", {"type": "linear", "factor": 1.0}, True),
        ("rope", {"type": "linear", "factor": 2.0}, False),
        ("rope", {"type": "yarn", "factor": 1.0}, False),
        ("rope", {"type": "linear"}, False),
        ("block", {"scale": 1.0, "cap": 0}, True),
        ("block", {"scale": 1.0, "cap": 5}, False),
        ("a.x_scale", 1.0, True),
        ("x_scale.a", 1.0, False),
    ],
)
def test_values_that_turn_a_setting_off(name: str, value: Any, off: bool) -> None:
    assert is_off(name, value) is off


@pytest.mark.parametrize(
    ("name", "effect"),
    [("fork_attention_scale", "model"), ("optimizer.attention", "model"), ("wandb_group", "none")],
)
def test_the_effect_of_a_dotted_name(name: str, effect: str) -> None:
    assert effect_of(name, 3) == effect


def unknown(name: str, effect: Any, value: Any = 1, **more: Any) -> UnknownKey:
    return UnknownKey("neox", name, value, effect, **more)


@pytest.mark.parametrize(("length", "cut"), [(58, False), (59, True)])
def test_a_long_value_is_cut(length: int, cut: bool) -> None:
    shown = unknown("x", "model", "v" * length).shown
    assert shown == ("x: '" + ("v" * 56 + "..." if cut else "v" * length + "'"))


def test_keys_are_warned_of_or_listed() -> None:
    keys = [unknown("bad", "model"), unknown("off", "off"), unknown("none", "none", file="a.yml")]
    assert [finding.code for finding in warned(keys)] == ["unknown-key"]
    assert "bad: 1" in warned(keys)[0].message
    (finding,) = listed(keys)
    assert "bad" not in finding.message
    assert finding.message == "a.yml has keys that GPT-NeoX does not know: off: 1, none: 1"
    assert listed(keys[:1]) == []
    assert warned(keys[1:]) == []


def test_ignored_keys_are_carried_or_left_out() -> None:
    assert ignored_findings([], carried=True) == []
    (carried,), (lost,) = (ignored_findings(["b", "a"], carried=each) for each in (True, False))
    assert carried.message.startswith("a, b: ignored (`ignore_keys=`), and written unchanged")
    assert lost.message.startswith("a, b: ignored (`ignore_keys=`), and left out")


def side(kind: str, *keys: UnknownKey, ignored: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(kind=kind, path=kind, unknown_keys=keys, ignored_keys=frozenset(ignored))


def test_where_an_unknown_key_leaves_a_comparison_open() -> None:
    bad, off = unknown("bad", "model"), unknown("off", "off")

    def codes(one: Any, other: Any) -> list[str]:
        return [f"{finding.code} {finding.severity}" for finding in undecided(one, other)]

    error = "unknown-key error"
    assert codes(side("neox", bad, off), side("neox", bad)) == []
    assert codes(side("neox", bad), side("neox")) == [error]
    assert codes(side("neox"), side("neox", bad)) == [error]
    other_value = unknown("bad", "model", 2)
    assert codes(side("neox", bad), side("neox", other_value)) == [error, error]
    assert codes(side("neox", bad), side("hf", bad)) == [error, error]
    ignored = side("hf", ignored=("bad",))
    assert codes(side("neox", bad), ignored) == ["ignored-keys warning"]
    assert codes(side("neox", off), side("hf")) == []


@pytest.mark.parametrize(
    ("key", "value", "effect"),
    [
        ("head_dim", 16, "off"),
        ("head_dim", 17, "model"),
        ("head_dim", 15, "model"),
        ("num_key_value_heads", 4, "off"),
        ("num_key_value_heads", 5, "model"),
        ("num_key_value_heads", 2, "model"),
        ("num_key_value_heads", 16, "model"),
    ],
)
def test_a_key_that_repeats_what_follows_from_others(key: str, value: Any, effect: str) -> None:
    raw = {"hidden_size": 64, "num_attention_heads": 4, key: value}
    (found,) = [k for k in unknown_in_config(raw, "gpt_neox", frozenset()) if k.name == key]
    assert found.effect == effect
    for lost in ("hidden_size", "num_attention_heads"):
        without = {k: v for k, v in raw.items() if k != lost}
        (found,) = [k for k in unknown_in_config(without, "gpt_neox", frozenset()) if k.name == key]
        assert found.effect == "model"


# --- vocabulary


@pytest.mark.parametrize(
    ("rows", "multiple", "tp", "new", "padded", "divisible"),
    [
        (512, 128, 2, 1, 512, 256),
        (512, 128, 2, 2, 512, 128),
        (512, 128, 1, 4, 512, 32),
        (512, 128, 1, 3, 513, 171),  # 3 does not divide 128: one step holds all rows
        (500, 128, 1, 2, 500, 250),  # rows are no multiple of the step
        (501, 128, 1, 2, 502, 251),
        (64, 128, 1, 2, 64, 32),  # fewer rows than the step
    ],
)
def test_rows_of_an_unknown_tokenizer(
    rows: int, multiple: int, tp: int, new: int, padded: int, divisible: int
) -> None:
    vocabulary = keep(rows, multiple, tp, new)
    assert (vocabulary.rows, vocabulary.size) == (rows, None)
    assert (vocabulary.padded, vocabulary.multiple) == (padded, divisible)
    assert padded % (divisible * new) == 0


def test_rows_of_a_known_tokenizer() -> None:
    assert padded_size(50277, 128, 2) == 50432
    assert padded_size(256, 128, 2) == 256
    assert padded_size(257, 128, 2) == 512
    assert fit(256, 250, 2, None).multiple == 128
    assert fit(257, 250, 2, None).multiple == 256
    assert fit(257, 257, 2, None) == fit(512, 257, 2, None).__class__(257, 512, 128, 257)
    assert fit(256, 250, 2, 128).padded == 256
    with pytest.raises(Refused, match="256 rows for 250 entries at TP 2, but the source has 257"):
        fit(257, 250, 2, 128)
    assert padding_multiple({}, {"make_vocab_size_divisible_by": 64}) == 64
    assert padding_multiple({"make_vocab_size_divisible_by": 32}, {"x": 1}) == 32
    assert padding_multiple({}) == 128


def test_only_rows_of_the_vocabulary_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neox_bridge.planning.common.with_rows", lambda whole, rows: (whole, rows))
    for architecture in ARCHITECTURES:
        flags = {weight.flag: True for weight in architecture.weights if weight.flag}
        config: Any = SimpleNamespace(layers=2, dims={"vocab": 5}, **flags)
        rows = model_rows(architecture, config)
        assert {row.weight.split for row in rows} > {"vocab"}
        wholes: Any = {row.hf: "whole" for row in rows}
        cut: Any = with_vocabulary_rows(architecture, config, wholes)
        for row in rows:
            assert cut[row.hf] == (("whole", 5) if row.weight.split == "vocab" else "whole")
        assert cut == with_vocabulary_rows(architecture, config, wholes, 5)


# --- the files of other ranks


def test_the_nearest_stage_and_rank() -> None:
    metas = [{"at": (stage, rank)} for stage in range(2) for rank in range(3)]
    sources = Sources(metas, 3, {"g": b"x"})
    for stage, rank, at in ((0, 0, (0, 0)), (1, 2, (1, 2)), (5, 1, (1, 1)), (0, 3, (0, 0))):
        assert sources.of(stage, rank) == {"at": at}
    assert sources.derived(5) == (3, 4)
    assert sources.derived(3) == ()
    assert Sources(metas, 3, {}).derived(5) == ()


def test_tensors_of_a_value_become_slots() -> None:
    one, two = TensorRef("f", 0, "float32", (2,)), TensorRef("f", 8, "int64", ())
    record = Record(Global("m", "n"), state={"t": two})
    kept = Record(Global("m", "n"), state=(two,))
    tensors: list[OutputTensor] = []
    value = with_slots({"a": [one, 3], "b": (two, "x"), "r": record, "k": kept}, "top", tensors)
    assert value["a"] == [TensorSlot("top.a.0"), 3]
    assert value["b"] == (TensorSlot("top.b.0"), "x")
    assert value["r"].state == {"t": TensorSlot("top.r.t")}
    assert value["k"] is kept
    assert [(t.name, t.dtype, t.shape) for t in tensors] == [
        ("top.a.0", "float32", (2,)),
        ("top.b.0", "int64", ()),
        ("top.r.t", "int64", ()),
    ]


def test_new_values_replace_the_sources() -> None:
    sources = Sources([{"a": 1, "b": 2, "universal_checkpoint_info": None}], 1, {})
    assert mp_rank(sources, 0, 0, {"b": 3}) == ({"a": 1, "b": 3}, [])
    value, _ = mp_rank(sources, 0, 0, {"universal_checkpoint_info": {"v": 1}})
    assert value["universal_checkpoint_info"] == {"v": 1}


def test_names_of_buffers_and_parameters() -> None:
    metas = [{"buffer_names": ["10.b", "2.a", "x"]}, {"buffer_names": ["sequential.3.c"]}, {}]
    assert buffer_names(metas, range(2, 11), "p.") == ["p.2.a", "p.3.c", "p.10.b"]
    assert buffer_names(metas, range(3, 10), "") == ["3.c"]
    assert parameter_name((0, "w"), layout="layers", tied=True) == "tied_modules.embed.w"
    assert parameter_name((0, "w"), layout="layers", tied=False) == "0.w"
    assert parameter_name((2, "w"), layout="layers", tied=True) == "2.w"
    assert parameter_name((0, "w"), layout="ranks", tied=True) == "sequential.0.w"


# --- options


@pytest.mark.parametrize(
    ("layout", "pp", "wrong"),
    [
        ("layers", 0, True), ("layers", 1, False), ("layers", None, False), ("ranks", 0, False),
        ("ranks", None, False), ("ranks", 1, True), ("ranks", 2, True), (None, 0, False),
    ],
)  # fmt: skip
def test_a_layout_and_its_stages(layout: Any, pp: Any, wrong: bool) -> None:
    if not wrong:
        check_layout(layout, pp)
        return
    with pytest.raises(UsageError) as raised:
        check_layout(layout, pp)
    assert list(raised.value.parameters) == ["layout", "pp"]


def checkpoint(*, neox: bool, grouped: bool = False) -> Any:
    return SimpleNamespace(
        kind="neox" if neox else "hf",
        neox=SimpleNamespace() if neox else None,
        path="the/path",
        config=SimpleNamespace(grouped_query=grouped),
    )


def test_options_of_optimizers_and_orders() -> None:
    neox, hf = checkpoint(neox=True), checkpoint(neox=False)
    check_optimizer(True, neox, neox)
    check_optimizer(False, hf)
    for pair in ((neox, hf), (hf, neox), (hf,)):
        with pytest.raises(UsageError, match="the/path is a Hugging Face model"):
            check_optimizer(True, *pair)
    grouped, grouped_hf = checkpoint(neox=True, grouped=True), checkpoint(neox=False, grouped=True)
    check_gqa_order(None, neox)
    check_gqa_order("grouped", hf, grouped)
    with pytest.raises(UsageError, match="no grouped-query attention"):
        check_gqa_order("grouped", neox, hf)
    with pytest.raises(UsageError, match="this is a Hugging Face model"):
        check_gqa_order("grouped", grouped_hf)


# --- the yml


LAYOUT = {"pipe_parallel_size": 1, "model_parallel_size": 2, "make_vocab_size_divisible_by": 64}
MODEL = {
    "num_layers": 1,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
}
GPT_NEOX = next(each for each in ARCHITECTURES if each.name == "gpt_neox")


def written(raw: dict[str, Any] | None = None, **more: Any) -> Any:
    given: dict[str, Any] = {"same_model": True, "same_dtype": True, "old_names": False}
    model = replace(config(), dims={"hidden": 128, "ffn": 512, "vocab": 256}, dtype="bfloat16")
    era, inv_freq = more.pop("era", TODAY), more.pop("inv_freq", "omit")
    return settings(GPT_NEOX, model, era, inv_freq, LAYOUT, raw or {}, **{**given, **more})


def test_a_start_from_nothing() -> None:
    found = written(same_model=False)
    assert found.precision == {"precision": "bfloat16"}
    assert found.layout == LAYOUT
    assert found.model["seq_length"] == 32
    training = found.training
    assert training == START
    assert set(training) <= known_keys(TODAY)
    assert training["lr_decay_iters"] == training["train_iters"]
    assert training["min_lr"] == pytest.approx(training["optimizer"]["params"]["lr"] / 10)
    assert training["zero_optimization"]["stage"] == 1
    assert written({"train_iters": 7}, same_model=False).training["train_iters"] == 7
    assert found.unknown == ()


def test_the_runs_keys_are_kept_and_what_is_of_another_machine_is_not() -> None:
    raw = {
        **MODEL,
        "seq_length": 16,
        "precision": "fp16",
        "fp16": {"enabled": True},
        "train_iters": 7,
        "gas": 3,
        "clip_grad": 0.5,
        "wandb_group": "g",
        "train_data_paths": ["x"],
        "hostfile": "h",
        "save": "s",
        "vocab_file": "v",
        "make_vocab_size_divisible_by": 1,
        "fork_key": 1,
        "rope_scaling": {"factor": 2},
    }
    found = written(raw, carried={"rope_scaling": {"factor": 2}})
    assert found.model == {**MODEL, "seq_length": 16}
    assert found.layout == LAYOUT
    assert found.precision == {"precision": "fp16", "fp16": {"enabled": True}}
    training = found.training
    assert training["train_iters"] == 7
    # GPT-NeoX computes gas and clip_grad from these
    assert (training["gradient_accumulation_steps"], training["gradient_clipping"]) == (1, 1.0)
    lost = {"gas", "clip_grad", "wandb_group", "train_data_paths", "hostfile", "save", "vocab_file"}
    assert not lost & set(training)
    assert found.unknown == ("fork_key",)
    assert found.carried == {"rope_scaling": {"factor": 2}}
    assert written(raw, same_dtype=False).precision == {"precision": "bfloat16"}
    other = written(raw, same_model=False)
    assert other.model["rotary_pct"] == 0.25
    assert other.model["seq_length"] == 16


@pytest.mark.parametrize("era", ERAS, ids=lambda era: str(era.name))
def test_which_eras_have_a_key_for_the_buffer(era: Any) -> None:
    stores = written(era=era, inv_freq="store").layout
    expected = {"rotary_save_freqs_buffer": True} if era.inv_freq_key else {}
    assert stores == {**LAYOUT, **expected}
    assert written(era=era).layout == LAYOUT
    assert era_named(era.name) is era


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("file", ["tokenizer/t.json", None])
def test_what_the_start_says(fresh: bool, file: str | None) -> None:
    import yaml

    name, data, blanks = start_yml(written(dict(MODEL)), "/root", file, fresh=fresh)
    text, keys = data.decode(), yaml.safe_load(data)
    assert name == ("resume.yml" if fresh else "finetune.yml")
    assert f"train.py {name}\n" in text
    assert blanks == (("data_path",) if file else ("data_path", "vocab_file"))
    assert f"Fill in: {', '.join(blanks)} " in text
    assert ("a new optimizer, and the schedule at its step" in text) is fresh
    assert ("no optimizer states" in text) is not fresh
    assert (keys["load"], keys["finetune"]) == ("/root", not fresh)
    assert keys["save"] == ("/root" if fresh else "/root/finetuned")
    assert keys["vocab_file"] == (f"/root/{file}" if file else None)
    assert keys["tokenizer_type"] == "HFTokenizer"
    inner = yaml.safe_load(step_yml(written(dict(MODEL))))
    assert {k: v for k, v in keys.items() if k in inner} == inner
    assert set(keys) - set(inner) == {"data_path", "load", "save", "finetune", "vocab_file"}


# --- the window


@pytest.mark.parametrize(
    ("width", "longest", "matters"),
    [(14, 16, True), (15, 16, False), (16, 16, False), (3, None, True), (None, 16, False)],
)
def test_a_window_that_is_shorter_than_the_longest_text(
    width: Any, longest: Any, matters: bool
) -> None:
    raw = {"sliding_window_width": width, "max_position_embeddings": longest, "num_layers": 2}
    found = effective_window(raw, "ranks")
    assert ([finding.code for finding in found.findings] == ["window-not-used"]) is matters
    assert ("sliding_window_width" in found.raw) is not matters
    assert effective_window(raw, "layers").raw == raw
