"""Messages that GPT-NeoX, DeepSpeed, torch and transformers really print are recognised.

``data/messages`` holds them as they were printed by GPT-NeoX of 2024-03, 2024-09 and 2026-05,
DeepSpeed 0.16.5, torch 2.13 and transformers 4.48 and 5.24, with other paths.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from neox_bridge.cli.app import app
from neox_bridge.doctor.advice import advise
from neox_bridge.doctor.explain import Diagnosis, recognise
from neox_bridge.doctor.messages import read_message
from neox_bridge.frameworks.changes import CHANGES

MESSAGES = Path(__file__).parents[1] / "data" / "messages"
CONVERT = "neox-bridge convert CHECKPOINT NEW --to neox"
INV = "attention.rotary_emb.inv_freq"
# file: code, older side, a part of the remedy, the first key
EXPECTED: dict[str, tuple[str, str, str, str]] = {
    "neox_missing_inv_freq": ("neox-inv-freq", "framework", f"{CONVERT} --for neox@2024-03", INV),
    "neox_missing_inv_freq_pp0": (
        *("neox-inv-freq", "framework", "neox-bridge patch TREE", f"sequential.2.{INV}"),
    ),
    "neox_unexpected_inv_freq": ("neox-inv-freq", "checkpoint", f"{CONVERT} --inv-freq omit", INV),
    "neox_unexpected_inv_freq_pp0": (
        *("neox-inv-freq", "checkpoint", "rotary_save_freqs_buffer: true", f"sequential.2.{INV}"),
    ),
    "neox_unknown_flag": (
        *("neox-inv-freq", "framework", f"{CONVERT} --for neox@2024-03"),
        "rotary_save_freqs_buffer",
    ),
    "neox_dense_names_in_new_tree": (
        *("neox-mlp-names", "checkpoint", f"{CONVERT} --for today"),
        "mlp.dense_h_to_4h.weight",
    ),
    "neox_linear_names_in_old_tree": (
        *("neox-mlp-names", "framework", f"{CONVERT} --for neox@2024-09"),
        "mlp.dense_h_to_4h.weight",
    ),
    "neox_w123_in_new_tree": (
        "neox-gated-mlp",
        "checkpoint",
        f"{CONVERT} --for today",
        "mlp.w1.weight",
    ),
    "neox_gated_in_old_tree": (
        *("neox-gated-mlp", "framework", f"{CONVERT} --for neox@2024-09", "mlp.w1.weight"),
    ),
    "neox_rms_norm": ("norm-kind", "", "norm: layernorm", "input_layernorm.scale"),
    "neox_no_bias": (
        *("bias-keys", "", "use_bias_in_attn_linear: true", "attention.query_key_value.bias"),
    ),
    "neox_gqa": ("query-key-value-rows", "", "num_kv_heads", "attention.query_key_value.weight"),
    "neox_swiglu": ("mlp-width", "", "activation", "mlp.linear1.weight"),
    "neox_padded_vocab": (
        *("vocabulary-rows", "", f"{CONVERT} --vocab-multiple 512", "word_embeddings.weight"),
    ),
    "neox_args_positions": (
        *("checkpoint-args", "", "max_position_embeddings: 32", "max_position_embeddings"),
    ),
    "neox_mp_world_size": ("mp-world-size", "", CONVERT, "mp_world_size"),
    "neox_tp2_files_at_tp1": ("tensor-parallel", "", "--tp N", "attention.dense.weight"),
    "neox_zero_dp": (
        "zero-world-size",
        "",
        "neox-bridge reshard CHECKPOINT NEW --dp ",
        "dp_world_size",
    ),
    "neox_no_finetune": ("no-optimizer-states", "", "finetune: true", "lr_scheduler"),
    "neox_wrong_layout_pp0": ("layout", "", f"{CONVERT} --layout ranks", "module"),
    "neox_ranks_at_pp1": ("layout", "", f"{CONVERT} --layout layers", "module"),
    "neox_unknown_key": ("neox-mlp-type", "checkpoint", f"{CONVERT} --for today", "mlp_type"),
    "neox_duplicate_key": ("duplicate-key", "", "remove hidden_size", "hidden_size"),
    "torch_weights_only_deepspeed": (
        *("torch-weights-only", "checkpoint", "neox-bridge convert CHECKPOINT NEW --to hf"),
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    ),
    "torch_weights_only_numpy": (
        *("torch-weights-only", "checkpoint", "weights_only=False"),
        "numpy.core.multiarray._reconstruct",
    ),
    "torch_no_deepspeed": ("pickled-class", "", "--to hf", "deepspeed"),
    "hf_lm_head_4_48": ("hf-lm-head", "framework", "embed_out.weight", "embed_out.weight"),
    "hf_no_head_4_48": ("no-output-layer", "", "tie_word_embeddings: true", "embed_out.weight"),
    "hf_no_head_5_24": ("no-output-layer", "", "tie_word_embeddings: true", "lm_head.weight"),
    "hf_vocab_4_48": ("vocabulary-rows", "", "vocab_size: 300", "gpt_neox.embed_in.weight"),
    "hf_vocab_5_24": ("vocabulary-rows", "", "vocab_size: 300", "gpt_neox.embed_in.weight"),
    "hf_mlp_width_4_48": (
        *("mlp-width", "", "intermediate_size: 192"),
        "gpt_neox.layers.0.mlp.dense_h_to_4h.weight",
    ),
    "hf_mlp_width_5_24": (
        *("mlp-width", "", "intermediate_size: 192"),
        "gpt_neox.layers.{0, 1}.mlp.dense_h_to_4h.weight",
    ),
    "hf_neox_names_4_48": (
        *("neox-names-in-hf", "", "neox-bridge convert CHECKPOINT NEW --to hf"),
        "gpt_neox.layers.0.mlp.linear2.weight",
    ),
    "hf_neox_names_5_24": (
        *("neox-names-in-hf", "", "neox-bridge convert CHECKPOINT NEW --to hf"),
        "gpt_neox.layers.{0, 1}.mlp.linear2.bias",
    ),
    "hf_no_attn_bias_4_48": (
        *("hf-attention-bias", "framework", "attention_bias: false"),
        "gpt_neox.layers.0.attention.dense.bias",
    ),
    "hf_no_attn_bias_5_24": (
        *("hf-attention-bias", "framework", "attention_bias: false"),
        "gpt_neox.layers.{0, 1}.attention.query_key_value.bias",
    ),
}
# messages whose form was read in the source: code, older side, text
OTHERS = {
    "masks": (
        *("hf-masks", "checkpoint"),
        "RuntimeError: Error(s) in loading state_dict for GPTNeoXForCausalLM:\n"
        '\tUnexpected key(s) in state_dict: "gpt_neox.layers.0.attention.bias", '
        '"gpt_neox.layers.0.attention.masked_bias". ',
    ),
    "hf stored inv_freq": (
        *("hf-neox-inv-freq", "checkpoint"),
        "Some weights of the model checkpoint at x were not used when initializing "
        "GPTNeoXForCausalLM: ['gpt_neox.layers.0.attention.rotary_emb.inv_freq']",
    ),
    "llama inv_freq": (
        *("hf-llama-inv-freq", "checkpoint"),
        "Some weights of the model checkpoint at x were not used when initializing "
        "LlamaForCausalLM: ['model.layers.0.self_attn.rotary_emb.inv_freq']",
    ),
    "transformer engine": (
        *("neox-transformer-engine", ""),
        "RuntimeError: Error(s) in loading state_dict for ParallelTransformerLayerPipe:\n"
        '\tMissing key(s) in state_dict: "attention.qkv.weight", "attention.qkv._extra_state". \n'
        '\tUnexpected key(s) in state_dict: "attention.query_key_value.weight". ',
    ),
    "scale in files": (
        *("norm-kind", ""),
        '\tMissing key(s) in state_dict: "norm.weight", "norm.bias". \n'
        '\tUnexpected key(s) in state_dict: "norm.scale". ',
    ),
    "torch.load": (
        *("hf-torch-load", ""),
        "ValueError: Due to a serious vulnerability issue in `torch.load`, even with "
        "`weights_only=True`, we now require users to upgrade torch to at least v2.6",
    ),
    "padded_vocab_size": (
        *("checkpoint-args", ""),
        "AssertionError: padded_vocab_size value from checkpoint (50688) is not equal to the "
        "currently set argument value (50304).",
    ),
    "a key of the future": (
        *("unknown-yml-key", ""),
        "TypeError: NeoXArgs.__init__() got an unexpected keyword argument 'hyperdrive'",
    ),
    "a key of another tree": (
        *("neox-moe-keys", "checkpoint"),
        "TypeError: NeoXArgs.__init__() got an unexpected keyword argument 'moe_type'",
    ),
    "a key of a newer tree": (
        *("unknown-yml-key", "framework"),
        "TypeError: NeoXArgs.__init__() got an unexpected keyword argument 'te_mha'",
    ),
    "torchrun's prefix": (
        *("neox-inv-freq", "framework"),
        "[rank0]: RuntimeError: Error(s) in loading state_dict for ParallelTransformerLayerPipe:\n"
        '[rank0]: \tMissing key(s) in state_dict: "attention.rotary_emb.inv_freq". ',
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_real_messages(name: str) -> None:
    advice = advise((MESSAGES / f"{name}.txt").read_text(encoding="utf-8"))
    assert advice is not None
    code, older, remedy, key = EXPECTED[name]
    assert [(d.code, d.older) for d in advice.causes] == [(code, older)]
    (diagnosis,) = advice.causes
    assert advice.fix == diagnosis.remedy
    assert any(remedy in text for text in (advice.fix, *advice.others))
    assert diagnosis.keys[0] == key


def test_every_kept_message_is_expected() -> None:
    assert sorted(EXPECTED) == sorted(path.stem for path in MESSAGES.glob("*.txt"))


@pytest.mark.parametrize("name", OTHERS)
def test_other_messages(name: str) -> None:
    code, older, text = OTHERS[name]
    assert [(d.code, d.older) for d in recognise(text)] == [(code, older)]


def test_both_sides_of_one_message_are_told() -> None:
    """inv_freq and the names of the MLP at once: two things to do."""
    text = (
        "RuntimeError: Error(s) in loading state_dict for ParallelTransformerLayerPipe:\n"
        '\tMissing key(s) in state_dict: "mlp.linear1.weight". \n'
        '\tUnexpected key(s) in state_dict: "attention.rotary_emb.inv_freq", '
        '"mlp.dense_h_to_4h.weight". '
    )
    codes = [(d.code, d.older) for d in recognise(text)]
    assert codes == [("neox-inv-freq", "checkpoint"), ("neox-mlp-names", "checkpoint")]


@pytest.mark.parametrize("name", EXPECTED)
def test_terminals_and_launchers_change_nothing(name: str) -> None:
    """Colours, carriage returns, torchrun's prefix, other output around it."""
    text = (MESSAGES / f"{name}.txt").read_text(encoding="utf-8")
    plain = recognise(text)
    lines = [f"\x1b[31m{line}\x1b[0m" for line in text.splitlines()]
    assert recognise("loading\r\n" + "\r\n".join(lines) + "\r\ndone") == plain
    assert recognise("".join(f"[rank3]: {line}\n" for line in text.splitlines())) == plain
    assert recognise(text + "\n" + text)[0].code == plain[0].code


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Traceback (most recent call last):\nValueError: something else",
        "  File \"a.py\", line 1\nTypeError: 'NoneType' object is not subscriptable",  # another's
        "TypeError: f() got an unexpected keyword argument 'x'",
        "ModuleNotFoundError: No module named 'deepspeed'",
        "torch.OutOfMemoryError: CUDA out of memory.",
        'Missing key(s) in state_dict: "conv.weight". ',
        "KeyError: 'modules'",
        "\x00\xff | MISSING |",
        "| MISSING " * 2000,
        "newly initialized: [" * 2000,
        "size mismatch for " * 2000,
    ],
)
def test_what_is_not_known_gives_nothing(text: str) -> None:
    assert recognise(text) == []


def test_codes_are_ids_of_changes_or_their_own() -> None:
    """No code of its own looks like the id of a change that doesn't exist."""
    ids = {change.id for change in CHANGES}
    own = {code for code, *_ in (*EXPECTED.values(), *OTHERS.values())} - ids
    assert all(not code.startswith("hf-") for code in own)
    assert own & {"layout", "vocabulary-rows"}
    assert "neox-names-in-hf" in own


def test_every_named_option_exists() -> None:
    """The commands in the remedies are those of this command line."""
    texts = []
    for name in EXPECTED:
        advice = advise((MESSAGES / f"{name}.txt").read_text())
        assert advice is not None
        texts += [advice.fix, *advice.others]
    texts += [change.remedy for change in CHANGES]
    help_text = "".join(
        CliRunner().invoke(app, [command, "--help"]).stdout
        for command in ("convert", "reshard", "doctor")
    )
    for text in texts:
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text):
            assert option in help_text, (option, text)
        for command in re.findall(r"neox-bridge ([a-z]+) ", text):
            if command not in ("converts", "reads", "drops", "refuses", "does"):
                assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command


def test_shapes_are_read() -> None:
    message = read_message((MESSAGES / "neox_padded_vocab.txt").read_text())
    (size,) = message.sizes
    assert (size.key, size.stored, size.wanted) == ("word_embeddings.weight", (384, 48), (512, 48))
    assert not message.by_transformers


def test_fewer_rows_than_stored_cut_the_vocabulary() -> None:
    text = (MESSAGES / "neox_padded_vocab.txt").read_text()
    text = text.replace("[384, 48]", "[640, 48]")
    advice = advise(text)
    assert advice is not None
    assert "--vocab-multiple 512 --vocab-rows tokenizer" in advice.fix


def test_the_doctor_uses_it(tmp_path: Path) -> None:
    path = MESSAGES / "neox_missing_inv_freq.txt"
    done: Any = CliRunner().invoke(app, ["doctor", "--error", str(path), "--json"])
    assert "neox-inv-freq" in json.dumps(json.loads(done.stdout))


def test_a_diagnosis_is_plain_data() -> None:
    from dataclasses import asdict

    diagnosis = Diagnosis("code", "cause", "remedy", ("key",))
    assert json.loads(json.dumps(asdict(diagnosis)))["keys"] == ["key"]
