"""Logits of tiny GPT-NeoX models beside each other and beside recorded ones."""

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_edits import tokenizer
from tiny import convert, tensors, write_hf
from torch import Tensor

from neox_bridge.api import open_checkpoint
from neox_bridge.errors import BridgeError
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.verification import causes as guessing
from neox_bridge.verification import logits as comparing
from neox_bridge.verification.causes import Hypothesis, hypotheses
from neox_bridge.verification.forward_passes import forward_pass
from neox_bridge.verification.logits import (
    LAYER,
    Agreement,
    Cause,
    NonFinite,
    compare_logits,
    compare_recorded,
)
from neox_bridge.verification.reference import Stage
from neox_bridge.verification.tokens import read_tokens

TOKENS = torch.tensor([[1, 5, 3, 7], [2, 2, 9, 0]])


def neox(home: Path, name: str, changed: Any = None, tp: int = 1, **settings: Any) -> Checkpoint:
    """A tiny model as GPT-NeoX has it; settings go into its yml afterwards."""
    hf = write_hf(home / f"{name}-hf", changed=changed)
    root = convert(hf, home / name, tp=tp)
    (path,) = root.glob("global_step*/configs/*.yml")
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**config, **settings}))
    return open_checkpoint(str(root))


def logits_of(checkpoint: Checkpoint) -> Tensor:
    *_, last = forward_pass(checkpoint, TOKENS, "cpu")({})
    return last.output


# --- numbers


def test_agreement_is_measured_over_tokens_and_rows() -> None:
    a = torch.tensor([[0.0, 1.0, -4.0], [2.0, 1.0, 0.0]])
    b = torch.tensor([[0.0, 1.0, -4.0], [1.0, 2.0, 0.0]])
    p, q = a[1].double().softmax(0), b[1].double().softmax(0)
    kl = float((p * (p.log() - q.log())).sum()) / 2
    found = comparing.measure(a, b)
    assert (found.tokens, found.largest, found.relative, found.top1) == (2, 1.0, 0.25, 0.5)
    assert found.mean == pytest.approx(2 / 6)
    assert found.kl == pytest.approx(kl, rel=1e-12)
    assert kl > 0.1
    assert comparing.measure(a, a) == Agreement(2, 0.0, 0.0, 0.0, 0.0, 1.0)


def test_tokens_that_are_not_finite_are_left_out() -> None:
    a = torch.tensor([[0.0, math.nan], [2.0, 1.0]])
    b = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert comparing.measure(a, b).tokens == comparing.measure(b, a).tokens == 1
    assert comparing.measure(a, b).largest == 1.0
    nothing = Agreement(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert comparing.measure(a[:1], b[:1]) == nothing
    zero = torch.zeros(1, 2)
    assert comparing.measure(zero, zero).relative == 0.0
    assert comparing.measure(zero, zero + 1e-9).relative == 1.0


def test_two_parts_are_apart_by_the_larger_of_both() -> None:
    a, b = torch.tensor([1.0, 4.0]), torch.tensor([1.0, 5.0])
    assert comparing.apart(a, b) == comparing.apart(b, a) == pytest.approx(0.2)
    assert comparing.apart(a, a) == 0.0
    assert comparing.apart(a, b[:1]) == math.inf
    assert comparing.apart(torch.zeros(2), torch.zeros(2)) == 0.0
    odd = torch.tensor([math.inf, 5.0])
    assert comparing.apart(odd, b) == comparing.apart(b, odd) == math.inf
    assert comparing.apart(odd, torch.tensor([math.nan, 5.0])) == 0.0
    assert comparing.apart(odd[:1], odd[:1]) == 0.0


@pytest.mark.parametrize(
    ("place", "explained", "inherent", "odd", "agrees"),
    [
        ("", False, (), None, True),
        ("layer 0", False, (), None, False),
        ("layer 0", True, (True, True), None, True),
        ("layer 0", True, (True, False), None, False),
        ("layer 0", False, (True,), None, False),
        ("", False, (), True, False),
        ("", False, (), False, False),
    ],
)
def test_what_agrees(
    place: str, explained: bool, inherent: tuple[bool, ...], odd: bool | None, agrees: bool
) -> None:
    causes = tuple(Cause("c", "t", one) for one in inherent)
    non_finite = None if odd is None else NonFinite(1, 1, 1, odd)
    found = Agreement(1, 0.0, 0.0, 0.0, 0.0, 1.0, place, 1.0, causes, explained, non_finite)
    assert found.agrees == agrees
    assert found.comparable == (odd is not True)


# --- where two sides part


def stages(*outputs: Tensor, parts: Mapping[int, Tensor] | None = None, sent: Any = None) -> Any:
    """A side whose stages have these outputs, and which keeps what it is sent."""

    def run(settings: Mapping[str, Any]) -> Iterator[Stage]:
        scale = settings.get("scale", 1.0)
        for number, output in enumerate(outputs):
            inner = {"mlp": parts[number]} if parts and number in parts else {}
            got = yield Stage(f"layer {number}", output * scale, inner)
            if sent is not None:
                sent.append(got)

    return run


ONE, TWO = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 3.0]]])


@pytest.mark.parametrize(("factor", "parts_there"), [(1 - 1e-3, False), (1 + 1e-3, True)])
def test_sides_part_beyond_the_rounding_of_a_layer(factor: float, parts_there: bool) -> None:
    base = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    near = base * (1 - LAYER * factor)
    place = comparing._part([stages(base), stages(near)], {}, 0)
    assert (place is not None) == parts_there


def test_the_first_part_that_differs_is_named_with_its_number() -> None:
    sides = [stages(ONE, ONE, ONE), stages(ONE, ONE, TWO)]
    place = comparing._part(sides, {}, 0)
    assert place is not None
    assert (place.number, place.name) == (3, "layer 2")
    assert place.apart == pytest.approx(1 / 3)
    inside = [stages(ONE, ONE, parts={1: ONE}), stages(ONE, TWO, parts={1: TWO})]
    place = comparing._part(inside, {}, 0)
    assert place is not None
    assert (place.number, place.name) == (2, "layer 1, mlp")
    assert comparing._part([stages(ONE), stages(ONE)], {}, 0) is None


@pytest.mark.parametrize("on", [0, 1])
def test_settings_are_those_of_one_side(on: int) -> None:
    sides = [stages(ONE), stages(ONE * 2)]
    settings = {"scale": 2.0 if on == 0 else 0.5}
    assert comparing._part(sides, settings, on) is None
    assert comparing._part(sides, settings, 1 - on) is not None


def test_the_second_side_goes_on_from_what_the_first_computed() -> None:
    kept: list[Any] = []
    near = ONE * (1 + 1e-6)
    assert comparing._part([stages(ONE, ONE), stages(near, near, sent=kept)], {}, 0) is None
    assert torch.equal(kept[0], ONE)
    kept.clear()
    bad = torch.tensor([[[math.nan, 1.0]]])
    sides = [stages(ONE, ONE, bad), stages(ONE, near, bad, sent=kept)]
    assert comparing._first_non_finite(sides, same_places=True) == "layer 2"
    assert [torch.equal(one, ONE) for one in kept] == [True, True]


def test_the_first_part_that_is_not_finite_on_one_side() -> None:
    bad = torch.tensor([[[math.nan, 1.0]]])
    other = torch.tensor([[[1.0, math.inf]]])

    def first(a: Any, b: Any, same: bool) -> str:
        return comparing._first_non_finite([a, b], same)

    assert first(stages(ONE, bad), stages(ONE, ONE), False) == "layer 1"
    assert first(stages(ONE, ONE), stages(ONE, bad), False) == "layer 1"
    assert first(stages(bad, bad, ONE), stages(bad, other, ONE), False) == "layer 1"
    assert first(stages(bad, ONE), stages(bad, ONE), False) == "logits"
    assert first(stages(bad, ONE), stages(bad, ONE), True) == "layer 0"
    inner = stages(ONE, parts={0: bad}), stages(ONE, parts={0: ONE})
    assert first(*inner, False) == "layer 0, mlp"
    longer = torch.ones(1, 2, 2)
    wide = stages(ONE, parts={0: longer}), stages(ONE, parts={0: torch.ones(1, 1, 2)})
    assert first(*wide, False) == first(wide[1], wide[0], False) == "layer 0, mlp"


def test_rows_that_both_logits_have_are_compared() -> None:
    padded = torch.tensor([[[1.0, 2.0, 9.0]]])
    assert comparing._part([stages(ONE), stages(padded)], {}, 0) is None
    assert comparing._part([stages(padded), stages(ONE)], {}, 0) is None


# --- which causes


def guess(name: str, inherent: bool = False) -> Hypothesis:
    return Hypothesis(name, {name: True}, f"text of {name}", inherent)


def explain(
    monkeypatch: Any, answers: Mapping[frozenset[str], Any], *names: str
) -> tuple[list[str], Any]:
    """What is chosen where the sides part as ``answers`` say under each set of settings."""

    def part(_sides: Any, settings: Any, on: int) -> Any:
        assert on == 0
        answer = answers[frozenset(settings)]
        if isinstance(answer, Exception):
            raise answer
        return comparing._Parting(answer[0], f"part {answer[0]}", answer[1]) if answer else None

    monkeypatch.setattr(comparing, "_part", part)
    monkeypatch.setattr(comparing, "hypotheses", lambda *_: [guess(name) for name in names])
    first: Any = replace_kind("neox")
    left = comparing._Parting(3, "start", 0.5)
    chosen, rest = comparing._explain(first, replace_kind("hf"), [], left)
    return [one.cause for one in chosen], rest and (rest.number, rest.apart)


def replace_kind(kind: str) -> Any:
    class Kind:
        pass

    found: Any = Kind()
    found.kind = kind
    return found


A, B, AB = frozenset("a"), frozenset("b"), frozenset("ab")


def test_the_cause_under_which_the_sides_agree_is_chosen(monkeypatch: Any) -> None:
    assert explain(monkeypatch, {A: (9, 0.1), B: None}, "a", "b") == (["b"], None)
    assert explain(monkeypatch, {A: BridgeError("no"), B: None}, "a", "b") == (["b"], None)
    assert explain(monkeypatch, {A: None, B: None}, "a", "b") == (["a"], None)


def test_a_cause_that_goes_further_is_chosen_first(monkeypatch: Any) -> None:
    found = explain(monkeypatch, {A: (5, 0.1), B: (4, 0.9), AB: None}, "a", "b")
    assert found == (["a", "b"], None)


@pytest.mark.parametrize(
    ("apart", "chosen"), [(0.25, ["a"]), (0.2500001, []), (0.1, ["a"]), (0.5, [])]
)
def test_at_the_same_place_half_as_far_is_nearer(
    apart: float, chosen: list[str], monkeypatch: Any
) -> None:
    """A second try under both changes nothing, and so ends it."""
    found, left = explain(monkeypatch, {A: (3, apart)}, "a")
    assert found == chosen
    assert left == ((3, apart) if chosen else (3, 0.5))


def test_further_on_counts_however_far_apart(monkeypatch: Any) -> None:
    found, left = explain(monkeypatch, {A: (4, 9.0)}, "a")
    assert (found, left) == (["a"], (4, 9.0))


def test_two_models_without_gpt_neox_have_no_causes() -> None:
    place = comparing._Parting(1, "x", 1.0)
    hf = replace_kind("hf")
    assert comparing._explain(hf, hf, [], place) == ([], place)


# --- models


def test_the_same_model_on_other_ranks_agrees(tmp_path: Path) -> None:
    one, two = neox(tmp_path, "one"), neox(tmp_path, "two", tp=2)
    found = compare_logits(one, two, TOKENS)
    assert (found.agrees, found.place, found.causes, found.tokens) == (True, "", (), 8)
    assert found.relative <= 1e-5
    assert found.top1 == 1.0


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"rotary_pct": 1.0}, "rotary fraction"),
        ({"gpt_j_residual": False}, "residual"),
        ({"layernorm_epsilon": 0.5}, "epsilon"),
        ({"activation": "relu"}, "activation"),
    ],
)
def test_a_setting_that_differs_is_the_cause(
    settings: dict[str, Any], cause: str, swapped: bool, tmp_path: Path
) -> None:
    pair = [neox(tmp_path, "one"), neox(tmp_path, "two", **settings)]
    found = compare_logits(*(reversed(pair) if swapped else pair), TOKENS)
    assert not found.agrees
    assert found.explained
    assert [one.cause for one in found.causes] == [cause]
    assert found.place.startswith("layer 0")
    assert found.apart > LAYER


def test_another_weight_has_a_place_and_no_cause(tmp_path: Path) -> None:
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    one = neox(tmp_path, "one")
    two = neox(tmp_path, "two", changed={name: -tensors()[name]})
    found = compare_logits(one, two, TOKENS)
    assert (found.agrees, found.explained, found.place) == (False, False, "layer 0, mlp")


def test_recorded_logits_are_those_of_the_model(tmp_path: Path) -> None:
    model = neox(tmp_path, "one")
    own = logits_of(model)
    found = compare_recorded(model, TOKENS, own)
    assert (found.agrees, found.tokens, found.largest) == (True, 8, 0.0)
    padded = torch.cat((own, torch.full_like(own[..., :1], 9.0)), -1)
    assert compare_recorded(model, TOKENS, padded).largest == 0.0
    cut = compare_recorded(model, TOKENS, own[..., :5])
    assert (cut.agrees, cut.largest) == (True, 0.0)
    for wrong in (own[0], own[:, :3], own[:1]):
        with pytest.raises(BridgeError, match="the recorded logits have the shape"):
            compare_recorded(model, TOKENS, wrong)


@pytest.mark.parametrize(
    ("dtype", "error", "agrees"),
    [
        ("float32", 0.9e-5, True),
        ("float32", 1.1e-5, False),
        ("float16", 0.019, True),
        ("float16", 0.021, False),
    ],
)
def test_recorded_logits_may_be_rounded_as_the_models_dtype_is(
    dtype: str, error: float, agrees: bool, tmp_path: Path
) -> None:
    model = neox(tmp_path, "one")
    own = logits_of(model)
    model = replace(model, config=replace(model.config, dtype=dtype))
    flat = own.flatten()
    at = int(flat.abs().argmax())
    other = flat.clone()
    other[at - 1] += error * float(flat[at].abs())
    found = compare_recorded(model, TOKENS, other.reshape(own.shape))
    assert found.agrees == agrees
    assert found.place == ("" if agrees else "the recorded logits")
    assert found.apart == (0.0 if agrees else found.relative)


def test_the_meaning_that_computes_recorded_logits_is_named(tmp_path: Path) -> None:
    other = logits_of(neox(tmp_path, "other", gpt_j_residual=False))
    found = compare_recorded(neox(tmp_path, "one"), TOKENS, other)
    assert (found.agrees, found.explained) == (False, True)
    assert [cause.cause for cause in found.causes] == ["residual"]
    unknown = compare_recorded(neox(tmp_path, "two"), TOKENS, -other)
    assert (unknown.causes, unknown.explained, unknown.agrees) == ((), False, False)


def test_logits_that_are_not_finite_are_no_agreement(tmp_path: Path) -> None:
    name = "gpt_neox.layers.0.mlp.dense_4h_to_h.bias"
    nan = tensors()[name].copy()
    nan[3] = math.nan
    one, two = neox(tmp_path, "one"), neox(tmp_path, "two", changed={name: nan})
    found = compare_logits(one, two, TOKENS)
    assert (found.agrees, found.comparable, found.place) == (False, True, "layer 0, mlp")
    assert found.non_finite is not None
    assert (found.non_finite.tensor, found.non_finite.tensor_second) == (name, 1)
    same = compare_logits(two, two, TOKENS)
    assert (same.agrees, same.comparable, same.place) == (False, False, "layer 0, mlp")
    kept = compare_recorded(one, TOKENS, logits_of(two))
    assert (kept.agrees, kept.comparable, kept.place) == (False, True, "the recorded logits")


# --- hypotheses


def texts(found: list[Hypothesis]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(one.cause, one.settings) for one in found]


def test_hypotheses_of_a_model(tmp_path: Path) -> None:
    model = neox(tmp_path, "one")
    found = texts(hypotheses(model, model))
    for expected in (
        ("bias counted twice", {"row_biases": "twice"}),
        ("bias counted twice", {"row_biases": "half"}),
        ("gelu kind", {"bias_gelu_fusion": True}),
        ("rotary fraction", {"rotary_pct": 0.25}),
        ("rotary fraction", {"rotary_pct": 1.0}),
        ("epsilon", {"layernorm_epsilon": 1e-6}),
        ("epsilon", {"layernorm_epsilon": 1e-8}),
        ("epsilon", {"layernorm_epsilon": 1e-12}),
        ("residual", {"gpt_j_residual": False, "row_biases": "sum"}),
    ):
        assert expected in found
    assert [cause for cause, _ in found].count("epsilon") == 3
    assert [cause for cause, _ in found].count("rotary fraction") == 2
    names = {cause for cause, _ in found}
    assert not names & {"epsilon form", "rounded rotary tables", "swapped gate", "rotary base"}
    based = neox(tmp_path, "two", rotary_emb_base=500)
    assert ("rotary base", {"rotary_emb_base": 10000}) in texts(hypotheses(based, based))


@pytest.mark.parametrize(("tp", "times"), [(2, "twice"), (4, "4 times")])
def test_biases_of_several_ranks(tp: int, times: str, tmp_path: Path) -> None:
    model = neox(tmp_path, "one", tp=2)
    assert model.neox is not None
    model = replace(model, neox=replace(model.neox, tp=tp))
    found = {
        str(h.settings["row_biases"]): (h.cause, h.text)
        for h in guessing._by_order(model)
        if "row_biases" in h.settings
    }
    assert {kind: cause for kind, (cause, _) in found.items()} == {
        "first": f"bias counted {times}",
        "sum": f"bias counted {times}",
        "twice": "bias counted twice",
        "half": "bias counted twice",
    }
    assert found["first"][1] == (
        "attention.dense.bias and the second bias of the MLP: the other side adds only the bias "
        "of the first rank"
    )


@pytest.mark.parametrize(
    ("norm", "key"), [("layernorm", "layernorm_epsilon"), ("rmsnorm", "rms_norm_epsilon")]
)
def test_the_epsilon_is_that_of_the_norm(
    norm: str, key: str, tmp_path: Path, monkeypatch: Any
) -> None:
    model = neox(tmp_path, "one")
    monkeypatch.setattr(guessing, "neox_settings", lambda _: {"norm": norm, "rms_eps": "inside"})
    found = [h.settings for h in guessing._by_habit(model) if h.cause == "epsilon"]
    assert found == [{key: epsilon} for epsilon in (1e-6, 1e-8, 1e-12)]
    eras = [(h.cause, h.settings, h.inherent) for h in guessing._by_era(model)]
    form = [("epsilon form", {"rms_eps": "outside"}, True)]
    assert eras == (form if norm == "rmsnorm" else [])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rotary_tables_may_be_rounded_in_16_bits(dtype: str, tmp_path: Path) -> None:
    model = neox(tmp_path, "one")
    model = replace(model, config=replace(model.config, dtype=dtype))
    found = [(h.cause, h.settings) for h in guessing._by_era(model)]
    expected = [("rounded rotary tables", {"rope_tables": dtype})]
    assert found == (expected if dtype != "float32" else [])


def test_a_config_that_says_something_else_comes_first(tmp_path: Path) -> None:
    one, two = neox(tmp_path, "one"), neox(tmp_path, "two", layernorm_epsilon=1e-3)
    first = hypotheses(one, two)[0]
    assert (first.cause, first.settings) == ("epsilon", {"layernorm_epsilon": 1e-3})
    assert first.text == "layernorm_epsilon: 1e-05 in GPT-NeoX, 0.001 on the other side"
    assert "0.001 in GPT-NeoX, 1e-05 on" in hypotheses(two, one)[0].text


# --- what cannot be computed


@pytest.mark.parametrize("config", [{"id2label": {"a": "b"}}, {"torch_dtype": "floaty"}])
def test_a_config_that_transformers_cannot_read(config: dict[str, Any], tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", **config)
    with pytest.raises(
        BridgeError, match=r"transformers cannot read config\.json: .*Correct config"
    ):
        logits_of(open_checkpoint(str(hf)))


@pytest.mark.parametrize("package", ["transformers", "tokenizers"])
def test_packages_that_are_missing(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(write_hf(tmp_path / "hf")))
    words = tokenizer(tmp_path / "tokenizer.json")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BridgeError, match=rf"{package}.* is missing\. Install it: .*verify"):
        if package == "transformers":
            logits_of(checkpoint)
        read_tokens("some words", (replace(checkpoint, tokenizer=(str(words),)),))
