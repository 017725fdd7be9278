"""Mamba in mamba_ssm's own form: it loads there, is the same model, and comes back as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_edits import tokenizer
from click.testing import CliRunner
from common import (
    HELPERS,
    assert_same,
    convert,
    fixture,
    hf_logits,
    hf_tensors,
    make_hf,
    neox_config,
    neox_ranks,
    plan_of,
)
from jsonschema import Draft202012Validator
from mamba_checkpoints import CASES, GENUINE, edit
from mamba_ssm_model import load, save
from schemas import plan_schema

from neox_bridge.api import open_checkpoint
from neox_bridge.architectures import ARCHITECTURES
from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.planning.plan import Plan
from neox_bridge.planning.report import to_json
from neox_bridge.verification.diff import diff
from neox_bridge.verification.verify import verify

WEIGHTS = "pytorch_model.bin"
TINY = {"d_model": 40, "n_layer": 2, "pad_vocab_size_multiple": 4}
# a state size and a convolution that GPT-NeoX hasn't
ODD: dict[str, Any] = {"state_size": 8, "conv_kernel": 3, "time_step_rank": 5, "vocab_size": 304}


def to_ssm(source: Path, target: Path, **options: Any) -> Plan:
    return convert(source, target, format="mamba_ssm", **options)


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / WEIGHTS, weights_only=True)


def test_of_gpt_neox_it_loads_and_computes_the_same(tmp_path: Path) -> None:
    plan = to_ssm(GENUINE, tmp_path / "ssm")
    assert [finding.code for finding in plan.findings] == ["tokenizer-missing"]
    assert list(plan.dropped) == []
    files = {path.name for path in (tmp_path / "ssm").iterdir()}
    assert files == {WEIGHTS, "config.json", "neox_bridge.json", "README.md"}
    with np.load(GENUINE.parent / "logits.npz") as file:
        tokens, logits = torch.from_numpy(file["tokens"]), torch.from_numpy(file["logits"])
    assert float((load(tmp_path / "ssm")(tokens) - logits).abs().max()) <= 1e-5
    assert told(tmp_path / "ssm") == {
        "d_model": 32,
        "n_layer": 2,
        "vocab_size": 300,
        "ssm_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": False,  # as GPT-NeoX adds
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
    }
    card = (tmp_path / "ssm" / "README.md").read_text()
    assert "library_name: mamba-ssm\n" in card
    assert "MambaLMHeadModel.from_pretrained" in card


def test_a_tied_head_is_there_and_takes_no_room(tmp_path: Path) -> None:
    to_ssm(GENUINE, tmp_path / "ssm")
    found = stored(tmp_path / "ssm")
    assert list(found) == list(load(tmp_path / "ssm").state_dict())
    ends = {found[f"{name}.weight"].data_ptr() for name in ("backbone.embedding", "lm_head")}
    assert len(ends) == 1
    held = sum(t.nbytes for name, t in found.items() if name != "lm_head.weight")
    assert (
        held < (tmp_path / "ssm" / WEIGHTS).stat().st_size < held + found["lm_head.weight"].nbytes
    )


@pytest.mark.parametrize("record", [True, False])
def test_back_in_gpt_neox_it_is_the_same_bits(record: bool, tmp_path: Path) -> None:
    to_ssm(GENUINE, tmp_path / "ssm")
    if not record:
        (tmp_path / "ssm" / "neox_bridge.json").unlink()
    assert verify(open_checkpoint(str(GENUINE)), open_checkpoint(str(tmp_path / "ssm"))).holds
    convert(tmp_path / "ssm", tmp_path / "neox", vocab_multiple=1)
    for a, b in zip(neox_ranks(GENUINE), neox_ranks(tmp_path / "neox"), strict=True):
        assert_same(a, b)
    was, now = neox_config(GENUINE), neox_config(tmp_path / "neox")
    # which mean nothing to a Mamba, so that mamba_ssm has no words for them
    idle = ("num_attention_heads", "max_position_embeddings")
    assert [now[key] for key in idle] == ([was[key] for key in idle] if record else [1, 2048])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [*CASES[:2], {"expand": 3, "hidden_size": 48}, ODD])
def test_of_transformers_and_back(
    config: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    hf = make_hf(tmp_path / "hf", dtype, family="mamba", **config)
    plan = to_ssm(hf, tmp_path / "ssm")
    assert list(plan.findings) == []
    assert {d.name for d in plan.dropped} >= {"config.json: bos_token_id"}
    model = load(tmp_path / "ssm")
    assert {tensor.dtype for tensor in stored(tmp_path / "ssm").values()} == {dtype}
    convert(tmp_path / "ssm", tmp_path / "back", format="transformers")
    assert_same(hf_tensors(hf), hf_tensors(tmp_path / "back"))
    again, original = told(tmp_path / "back"), told(hf)
    assert {key: again.get(key) for key in original} == original
    assert "mamba_ssm" not in again
    generation = "generation_config.json"
    assert (tmp_path / "back" / generation).read_bytes() == json_bytes(hf / generation)
    tokens = torch.arange(20)[None]
    if dtype == torch.float32:
        want = hf_logits(tmp_path / "back", tokens)
        assert float((model(tokens) - want).abs().max()) <= 1e-5


def json_bytes(path: Path) -> bytes:
    return (json.dumps(json.loads(path.read_text()), indent=2, sort_keys=True) + "\n").encode()


@pytest.mark.parametrize("between", ["neox", "hf"])
def test_its_own_words_come_back(between: str, tmp_path: Path) -> None:
    words: dict[str, Any] = {**TINY, "vocab_size": 299, "ssm_cfg": {"d_state": 16, "dt_min": 0.01}}
    own = save(tmp_path / "own", **words, fused_add_norm=False, tie_embeddings=False)
    if between == "neox":
        convert(own, tmp_path / "between")
    else:
        to_ssm(own, tmp_path / "between")
    to_ssm(tmp_path / "between", tmp_path / "again")
    assert told(tmp_path / "again") == told(own)
    assert_same(stored(tmp_path / "again"), stored(own))
    convert(tmp_path / "between", tmp_path / "hf", to="hf")
    assert not {"mamba_ssm", "ssm_cfg", "d_model"} & set(told(tmp_path / "hf"))
    tokens = torch.arange(20)[None]
    assert float((hf_logits(tmp_path / "hf", tokens) - load(own)(tokens)).abs().max()) <= 1e-5


def test_words_that_no_longer_fit_are_not_repeated(tmp_path: Path) -> None:
    own = save(tmp_path / "own", **TINY, vocab_size=299)
    to_ssm(own, tmp_path / "cut", tokenizer=str(tokenizer(own / "t.json")), vocab_rows="tokenizer")
    assert told(tmp_path / "cut") == {
        **told(own),
        "vocab_size": 290,
        "pad_vocab_size_multiple": 1,
    }
    load(tmp_path / "cut")


@pytest.mark.parametrize(
    ("rows", "entries", "multiple"),
    [(304, None, 8), (300, None, 1), (304, 290, 16), (300, 290, 12), (304, 304, 8), (304, 400, 8)],
)
def test_entries_and_the_multiple_make_all_rows(
    rows: int, entries: int | None, multiple: int, tmp_path: Path
) -> None:
    hf = make_hf(tmp_path / "hf", family="mamba", vocab_size=rows)
    if entries is not None:
        tokenizer(hf / "tokenizer.json", entries)
    to_ssm(hf, tmp_path / "ssm")
    said = told(tmp_path / "ssm")
    found = (said["vocab_size"], said["pad_vocab_size_multiple"])
    assert found == (min(rows, entries or rows), multiple)
    assert load(tmp_path / "ssm").lm_head.weight.shape[0] == rows


@pytest.mark.parametrize(
    ("config", "key"),
    [({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"), ({"hidden_act": "relu"}, "hidden_act")],
)
def test_what_it_has_not(config: dict[str, Any], key: str, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="mamba", **config)
    with pytest.raises(Refused, match=rf"{key}.*`format=transformers`"):
        plan_of(hf, tmp_path / "ssm", format="mamba_ssm")


def test_what_no_target_can_be(tmp_path: Path) -> None:
    with pytest.raises(
        Refused, match=r"gpt_neox cannot be written in this format\. Valid values: transformers\."
    ):
        plan_of(fixture("pythia_fp32_pp0_tp1"), tmp_path / "ssm", format="mamba_ssm")
    with pytest.raises(Refused, match=r"Valid values: transformers, mamba_ssm\."):
        plan_of(GENUINE, tmp_path / "ssm", format="mamba")
    with pytest.raises(BridgeError, match="only for Hugging Face targets"):
        plan_of(GENUINE, tmp_path / "ssm", to="neox", format="mamba_ssm")
    with pytest.raises(BridgeError, match="reads only one file"):
        plan_of(GENUINE, tmp_path / "ssm", format="mamba_ssm", shard_size=1000)
    convert(GENUINE, tmp_path / "neox", to="neox")
    edit(tmp_path / "neox", rms_norm_epsilon=1e-6)
    with pytest.raises(Refused, match="rms_norm_epsilon"):
        plan_of(tmp_path / "neox", tmp_path / "ssm", format="mamba_ssm")


@pytest.mark.slow
def test_the_other_commands_know_it(tmp_path: Path) -> None:
    ssm = tmp_path / "ssm"

    def say(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, list(words))
        return done.exit_code, done.output

    code, said = say("convert", str(GENUINE), str(ssm), "--format", "mamba_ssm")
    assert (code, "mamba_ssm format, pytorch_model.bin" in said) == (0, True)
    assert {d.kind for d in diff(open_checkpoint(str(GENUINE)), open_checkpoint(str(ssm)))} == {
        "equal"
    }
    assert say("verify", str(GENUINE), str(ssm))[0] == 0
    assert "kind        Hugging Face, mamba_ssm format" in say("inspect", str(ssm))[1]
    code, said = say("doctor", str(ssm), "--for", "transformers")
    assert (code, "mamba_ssm's, which transformers does not read" in said) == (4, True)
    assert say("doctor", str(ssm), "--fix", str(tmp_path / "fixed"))[0] == 0
    assert say("doctor", str(tmp_path / "fixed"), "--for", "transformers")[0] == 0
    code, said = say("verify", str(GENUINE), str(ssm), "--logits")
    assert (code, "format is not supported" in said) == (1, True)
    fixed = str(tmp_path / "fixed")
    code, said = say("verify", fixed, fixed, "--logits")
    assert (code, "MambaForCausalLM is not supported" in said) == (1, True)
    words = ["--format", "mamba_ssm", "--for", "transformers@5.0"]
    assert say("convert", str(GENUINE), str(tmp_path / "no"), *words)[0] == 2


def test_a_weight_that_differs_is_seen(tmp_path: Path) -> None:
    to_ssm(GENUINE, tmp_path / "ssm")
    found = stored(tmp_path / "ssm")
    found["backbone.layers.1.mixer.D"][3] += 1
    torch.save(found, tmp_path / "ssm" / WEIGHTS)
    seen = verify(open_checkpoint(str(GENUINE)), open_checkpoint(str(tmp_path / "ssm")))
    assert [d.name for d in seen.differences] == ["backbone.layers.1.mixer.D"]


def test_plans_of_and_to_it_follow_the_schema(tmp_path: Path) -> None:
    plan = to_ssm(GENUINE, tmp_path / "ssm")
    again = plan_of(tmp_path / "ssm", tmp_path / "neox")
    for found in (plan, again):
        Draft202012Validator(plan_schema()).validate(to_json(found, 0))
    assert (plan.target["format"], again.source["format"]) == ("mamba_ssm", "mamba_ssm")


def test_the_option_names_every_form() -> None:
    names = [form.name for architecture in ARCHITECTURES for form in architecture.forms]
    said = CliRunner().invoke(app, ["convert", "--help"]).output
    assert names == ["mamba_ssm"]
    assert "|".join(["transformers", *names]) in said


def test_a_record_of_another_model_is_not_asked(tmp_path: Path) -> None:
    to_ssm(GENUINE, tmp_path / "ssm")
    record = tmp_path / "ssm" / "neox_bridge.json"
    kept = json.loads(record.read_text())
    kept["config"]["model_type"] = "llama"
    record.write_text(json.dumps(kept))
    assert open_checkpoint(str(tmp_path / "ssm")).config.heads == 1


@pytest.mark.skipif("MAMBA_SSM" not in os.environ, reason="MAMBA_SSM names no tree of mamba_ssm")
@pytest.mark.parametrize("config", [None, *CASES[:2], {"expand": 3, "hidden_size": 48}, ODD])
def test_the_real_one_loads_it_strictly(config: dict[str, Any] | None, tmp_path: Path) -> None:
    """MAMBA_SSM: folders for Python's path that hold mamba_ssm, triton and einops."""
    source = GENUINE
    if config is not None:
        source = make_hf(tmp_path / "hf", family="mamba", **config)
    to_ssm(source, tmp_path / "ssm")
    script, given = (
        HELPERS / "mamba_ssm_real.py",
        GENUINE.parent / "logits.npz",
    )
    command = [sys.executable, script, tmp_path / "ssm", given, tmp_path / "logits.npz"]
    path = {**os.environ, "PYTHONPATH": os.environ["MAMBA_SSM"]}
    subprocess.run([str(word) for word in command], check=True, env=path)
    with np.load(given) as file, np.load(tmp_path / "logits.npz") as found:
        tokens, want = torch.from_numpy(file["tokens"]), torch.from_numpy(file["logits"])
        logits = torch.from_numpy(found["logits"])
    want = want if config is None else hf_logits(source, tokens)
    assert float((logits - want).abs().max()) <= 1e-5
