"""``verify --logits`` calls right models right, and names what is wrong with wrong ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import FIXTURES, convert, fixture, hf_tensors, make_hf, recorded, step_of
from safetensors.torch import save_file

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError
from neox_bridge.verification import forward_passes
from neox_bridge.verification.logits import Agreement, compare_logits, compare_recorded
from neox_bridge.verification.tokens import read_tokens

ALL = sorted(path.name for path in FIXTURES.iterdir())
OLD_ORDER = "llama_gqa_fp32_2024_10_old_order_tp1"
Change = Callable[[dict[str, torch.Tensor]], None]


def agreement(first: Path, second: Path, **options: Any) -> Agreement:
    a, b = open_checkpoint(str(first), **options), open_checkpoint(str(second))
    return compare_logits(a, b, read_tokens(None, (a, b)).tokens)


def causes(found: Agreement) -> list[str]:
    return [cause.cause for cause in found.causes]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_conversions_compute_the_same(name: str, tmp_path: Path) -> None:
    convert(fixture(name), tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "neox", tp=2, layout="ranks")
    found = agreement(fixture(name), tmp_path / "hf")
    again = agreement(tmp_path / "hf", tmp_path / "neox")
    assert again.relative <= 1e-6
    assert again.agrees
    assert found.agrees
    if name == "llama_fp32_2024_09_w123_tp2":
        assert causes(found) == ["epsilon form"]
        assert found.explained
    else:
        assert found.relative <= 1e-6
        assert not found.place


@pytest.mark.parametrize("name", ALL)
def test_recorded_logits_are_computed(name: str) -> None:
    order = "interleaved" if name == OLD_ORDER else None
    checkpoint = open_checkpoint(str(fixture(name)), gqa_order=order)
    found = compare_recorded(checkpoint, *recorded(name))
    assert found.agrees, found
    assert not found.causes


def test_recorded_logits_decide_the_order_of_grouped_queries() -> None:
    found = compare_recorded(open_checkpoint(str(fixture(OLD_ORDER))), *recorded(OLD_ORDER))
    assert not found.agrees
    assert causes(found) == ["grouped-query order"]
    assert "`gqa_order=interleaved`" in found.causes[0].text


def edit_config(folder: Path, **changed: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changed.items():
        if key in ("partial_rotary_factor", "rope_theta"):
            config["rope_parameters"][key] = value
        config[key] = value
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Change) -> None:
    tensors = hf_tensors(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def scaled_biases(factor: float) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("attention.dense.bias", "dense_4h_to_h.bias")):
                tensors[name] = tensor * factor

    return change


def swap_gate(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("gate_proj.weight")]:
        up = name.replace("gate_proj", "up_proj")
        tensors[name], tensors[up] = tensors[up], tensors[name]


@pytest.mark.parametrize(
    ("name", "change", "config", "cause", "place"),
    [
        (
            "sequential_residual_fp32_tp2",
            scaled_biases(2),
            {},
            "bias counted twice",
            "layer 0, attention",
        ),
        ("pythia_fp32_pp1_tp2", scaled_biases(2), {}, "bias counted twice", "layer 0, attention"),
        (
            "pythia_fp32_fused_gelu_tp1",
            None,
            {"hidden_act": "gelu"},
            "gelu kind",
            "layer 0, mlp",
        ),
        (
            "pythia_fp32_pp1_tp2",
            None,
            {"hidden_act": "gelu_fast"},
            "gelu kind",
            "layer 0, mlp",
        ),
        (
            "pythia_fp32_pp1_tp2",
            None,
            {"rotary_pct": 1.0, "partial_rotary_factor": 1.0},
            "rotary fraction",
            "layer 0, attention",
        ),
        (
            "llama_fp32_tp2",
            None,
            {"rope_theta": 777},
            "rotary base",
            "layer 0, attention",
        ),
        (
            "pythia_fp32_pp1_tp2",
            None,
            {"layer_norm_eps": 1e-3},
            "epsilon",
            "layer 0, attention",
        ),
        ("llama_fp32_tp2", None, {"rms_norm_eps": 1e-3}, "epsilon", "layer 0, attention"),
        ("pythia_fp32_pp1_tp2", None, {"use_parallel_residual": False}, "residual", "layer 0, mlp"),
        ("llama_fp32_tp2", swap_gate, {}, "swapped gate", "layer 0, mlp"),
    ],
)
def test_wrong_models_are_named(
    name: str, change: Change | None, config: dict[str, Any], cause: str, place: str, tmp_path: Path
) -> None:
    convert(fixture(name), tmp_path / "hf")
    edit_config(tmp_path / "hf", **config)
    if change:
        edit_tensors(tmp_path / "hf", change)
    for one, two in ((fixture(name), tmp_path / "hf"), (tmp_path / "hf", fixture(name))):
        found = agreement(one, two)
        assert not found.agrees
        assert causes(found) == [cause], found
        assert found.explained
        assert found.place == place


@pytest.mark.slow
def test_a_wrong_order_of_grouped_queries_is_named(tmp_path: Path) -> None:
    convert(fixture("llama_gqa_fp32_tp2"), tmp_path / "hf")
    source = open_checkpoint(str(fixture("llama_gqa_fp32_tp2")), gqa_order="interleaved")
    target = open_checkpoint(str(tmp_path / "hf"))
    found = compare_logits(source, target, read_tokens(None, (source, target)).tokens)
    assert "grouped-query order" in causes(found)
    assert found.explained
    assert not found.agrees


def test_a_bias_whole_on_every_rank_of_a_parallel_model_is_named(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    convert(hf, tmp_path / "neox", tp=3)
    step = step_of(tmp_path / "neox")
    for path in step.glob("layer_*-model_0[12]*.pt"):
        whole = torch.load(
            str(path).replace("model_01", "model_00").replace("model_02", "model_00")
        )
        tensors = torch.load(path)
        for name in ("attention.dense.bias", "mlp.linear2.bias"):
            if name in tensors:
                tensors[name] = whole[name]
        torch.save(tensors, path)
    found = agreement(hf, tmp_path / "neox")
    assert causes(found) == ["bias counted 3 times"]
    assert found.explained
    assert not found.agrees


def test_two_mistakes_are_both_named(tmp_path: Path) -> None:
    name = "pythia_fp32_fused_gelu_tp1"
    convert(fixture(name), tmp_path / "hf")
    edit_config(tmp_path / "hf", hidden_act="gelu", rotary_pct=1.0, partial_rotary_factor=1.0)
    found = agreement(fixture(name), tmp_path / "hf")
    assert sorted(causes(found)) == ["gelu kind", "rotary fraction"]
    assert found.explained


def test_a_wrong_tensor_has_a_place_and_no_cause(tmp_path: Path) -> None:
    name = "pythia_fp32_pp1_tp2"
    convert(fixture(name), tmp_path / "hf")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"] *= 1.01

    edit_tensors(tmp_path / "hf", change)
    found = agreement(fixture(name), tmp_path / "hf")
    assert found.place == "layer 1, mlp"
    assert not found.explained
    assert not found.agrees


@pytest.mark.parametrize(
    "kind",
    [("gpt_neox", {}), ("llama", {"num_key_value_heads": 2}), ("mistral", {}), ("qwen2", {})],
)
def test_two_models_of_one_kind(kind: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    family, config = kind
    hf = make_hf(tmp_path / "hf", family=family, **config)
    other = make_hf(tmp_path / "other", seed=1, family=family, **config)
    convert(hf, tmp_path / "one")
    convert(hf, tmp_path / "two", tp=2, layout="ranks")
    assert agreement(hf, hf).largest == 0.0
    assert agreement(tmp_path / "one", tmp_path / "two").agrees
    assert agreement(hf, tmp_path / "two").relative <= 1e-6
    found = agreement(hf, other)
    assert found.place == "embeddings"
    assert not found.agrees
    assert 0.0 <= found.top1 < 0.5 < found.relative
    assert found.kl > 0


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = make_hf(tmp_path / "hf", num_hidden_layers=8)
    convert(hf, tmp_path / "neox", tp=2)
    alive: list[torch.Tensor] = []
    most = 0

    def counted(whole: Any, device: str) -> torch.Tensor:
        import weakref

        nonlocal most
        tensor = original(whole, device)
        size = tensor.nbytes
        alive.append(tensor)
        held[id(tensor.untyped_storage())] = size
        weakref.finalize(tensor.untyped_storage(), held.pop, id(tensor.untyped_storage()), None)
        alive.pop()
        most = max(most, sum(held.values()))
        return tensor

    held: dict[int, int] = {}
    original = forward_passes.read
    monkeypatch.setattr(forward_passes, "read", counted)
    assert agreement(hf, tmp_path / "neox").agrees
    tensors = hf_tensors(hf)
    layers = [sum(t.nbytes for n, t in tensors.items() if f"layers.{i}." in n) for i in range(8)]
    ends = max(tensors["embed_out.weight"].nbytes, tensors["gpt_neox.embed_in.weight"].nbytes)
    assert 0 < most <= 2 * max(*layers, ends) + 4096
    assert most < sum(layers) / 2


def test_tokens(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make_hf(tmp_path / "hf")))
    both = (checkpoint, checkpoint)
    made = read_tokens(None, both).tokens
    assert made.shape == (2, 32)
    assert torch.equal(made, read_tokens(None, both).tokens)
    np.save(tmp_path / "a.npy", np.array([1, 2, 3]))
    (tmp_path / "a.json").write_text("[[1, 2], [3, 4]]")
    np.savez(tmp_path / "a.npz", tokens=np.array([[5]]), logits=np.zeros((1, 1, 300), np.float16))
    assert read_tokens(str(tmp_path / "a.npy"), both).tokens.tolist() == [[1, 2, 3]]
    assert read_tokens(str(tmp_path / "a.json"), both).tokens.tolist() == [[1, 2], [3, 4]]
    kept = read_tokens(str(tmp_path / "a.npz"), both)
    assert kept.tokens.tolist() == [[5]]
    assert kept.recorded is not None
    assert kept.recorded.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b"[1, 2, 300]", "1 to 300, but the vocabulary has the ids 0 to 299"),
        ("a.json", b"[-1]", "the ids go from -1 to -1, but the vocabulary has the ids 0 to"),
        ("a.json", b"[]", r"these have \[1, 0\]"),
        ("a.json", b"[[[1]]]", r"these have \[1, 1, 1\]"),
        ("a.json", b"[0.5]", "not integers"),
        ("a.json", b"{", "cannot be read as token ids"),
        ("a.json", b"[[1], [1, 2]]", "cannot be read as token ids"),
        ("a.json", str([1] * 33).encode(), "32 positions"),
        ("a.npy", b"\x80\x04.", "cannot be read as token ids"),
        ("a.npz", b"PK", "cannot be read as token ids"),
        ("a.txt", b"words", "neither checkpoint contains a tokenizer.json"),
    ],
)
def test_tokens_that_cannot_be_used(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make_hf(tmp_path / "hf")))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BridgeError, match=said):
        read_tokens(str(tmp_path / name), (checkpoint,))


def test_text_goes_through_the_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    hf = make_hf(tmp_path / "hf")
    words = Tokenizer(models.WordLevel({"the": 0, "fox": 7, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(hf / "tokenizer.json"))
    checkpoint = open_checkpoint(str(hf))
    assert read_tokens("the fox the", (checkpoint,)).tokens.tolist() == [[0, 7, 0]]
    (tmp_path / "a.txt").write_text("fox fox")
    assert read_tokens(str(tmp_path / "a.txt"), (checkpoint,)).tokens.tolist() == [[7, 7]]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        app([*words], prog_name="neox-bridge")
    return int(end.value.code or 0), capsys.readouterr().out


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "pythia_fp32_fused_gelu_tp1"
    convert(fixture(name), tmp_path / "hf")
    words = ["verify", str(fixture(name)), str(tmp_path / "hf"), "--logits"]
    recording = str(FIXTURES / name / "logits.npz")
    code, out = run(capsys, *words, "--tokens", recording)
    assert code == 0
    assert out.count("the same model") == 2
    code, out = run(capsys, *words, "--json")
    told = json.loads(out)
    assert (code, told["holds"], told["logits"]["agrees"]) == (0, True, True)
    edit_config(tmp_path / "hf", hidden_act="gelu")
    code, out = run(capsys, *words)
    assert code == 3
    assert "ANOTHER MODEL" in out
    assert "first difference: layer 0, mlp" in out
    assert "likely cause: gelu kind: activation" in out or "likely cause: gelu kind" in out
    assert run(capsys, *words[:-1], "--tokens", recording)[0] == 2


def test_missing_tensors_are_said(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    checkpoint = open_checkpoint(str(hf))
    edit_config(hf, num_hidden_layers=3)
    with pytest.raises(BridgeError, match="initialize randomly"):
        compare_logits(checkpoint, checkpoint, torch.zeros(1, 2, dtype=torch.int64))


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_transformer_engine_and_reward_models(family: str, tmp_path: Path) -> None:
    from scorers import make_scorer

    more = {"num_key_value_heads": 2} if family == "llama" else {"hidden_act": "gelu_fast"}
    hf = make_hf(tmp_path / "hf", family=family, **more)
    eps = {"rms_norm_eps": 1e-5} if family == "llama" else {}
    edit_config(hf, **eps)
    convert(hf, tmp_path / "te", te=True)
    assert open_checkpoint(str(tmp_path / "te")).neox.te == {"attention", "mlp"}  # type: ignore[union-attr]
    found = agreement(hf, tmp_path / "te")
    assert found.agrees, found
    assert found.relative <= 1e-6
    scorer = make_scorer(tmp_path / "scorer", family, **more)
    convert(scorer, tmp_path / "rm", tp=2)
    found = agreement(scorer, tmp_path / "rm")
    assert found.agrees
    assert found.relative <= 1e-6
    other = hf_tensors(scorer)
    other["score.weight"] *= 2
    save_file(other, scorer / "model.safetensors", {"format": "pt"})
    assert agreement(scorer, tmp_path / "rm").place == "logits"
