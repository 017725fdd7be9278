"""Mamba in the format of mamba_ssm (github.com/state-spaces/mamba, e9594ce of 2026-07).

Its config.json has the fields of MambaConfig (models/config_mamba.py). The library refuses others.
ssm_cfg has the arguments of Mamba (modules/mamba_simple.py), which are the same in all blocks. The
epsilon of the norms is the default of create_block (models/mixer_seq_simple.py), and is in no file.
The embeddings have ``vocab_size`` rows, rounded up to a multiple of ``pad_vocab_size_multiple``.
"""

from collections.abc import Mapping
from typing import Any

from neox_bridge.architectures.base import Form, ModelConfig, Refusal
from neox_bridge.architectures.hf_config import whole_number
from neox_bridge.architectures.neox_config import round_up

STATES, CONV = 16, 4  # the defaults of a channel
_EPSILON = 1e-5
_MULTIPLE = 8  # the default for rows
# arguments of Mamba in mamba_ssm, and their keys in transformers
_BLOCK = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "dt_rank": "time_step_rank",
    "expand": "expand",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
}


def dt_rank(hidden: int) -> int:
    """The default rank of dt: a sixteenth of the hidden size, rounded up."""
    return -(-hidden // 16)


def _read(raw: Mapping[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model_type": "mamba",
        "tie_word_embeddings": raw.get("tie_embeddings", True),
        "residual_in_fp32": raw.get("residual_in_fp32", True),
        "rms_norm": raw.get("rms_norm", True),
        "layer_norm_epsilon": _EPSILON,
    }
    for key, name in {"hidden_size": "d_model", "num_hidden_layers": "n_layer"}.items():
        config |= {key: raw[name]} if name in raw else {}
    block = raw["ssm_cfg"] if isinstance(raw["ssm_cfg"], dict) else {}
    config |= {word: block[name] for name, word in _BLOCK.items() if name in block}
    if block.get("layer", "Mamba1") != "Mamba1" or raw.get("attn_layer_idx"):
        config["model_type"] = str(block.get("layer", "mamba with attention")).lower()
    return config


def _write(
    config: ModelConfig, hf_config: Mapping[str, Any], original: Mapping[str, Any], entries: int
) -> dict[str, Any]:
    """The keys that all versions know, and newer ones only if they differ from the default.

    tie_embeddings exists since 1.2.0 (5aa131d), d_intermediate, attn_layer_idx and attn_cfg since
    2.0.0.
    """
    rows = config.dims["vocab"]
    written: dict[str, Any] = {
        "d_model": config.hidden,
        "n_layer": config.layers,
        "ssm_cfg": _block(config),
        "rms_norm": True,
        "residual_in_fp32": bool(hf_config.get("residual_in_fp32", True)),
        "fused_add_norm": True,
    }
    if not config.tied_embeddings:
        written["tie_embeddings"] = False
    vocabulary = {} if _has_rows(original, rows) else _vocabulary(entries, rows)
    tied = {"tie_embeddings": config.tied_embeddings} if "tie_embeddings" in original else {}
    return {**written, **original, **vocabulary, **tied}


def _block(config: ModelConfig) -> dict[str, Any]:
    """The arguments of Mamba that differ from its defaults."""
    dims = config.dims
    usual = {"d_state": STATES, "d_conv": CONV, "dt_rank": dt_rank(config.hidden), "expand": 2}
    sizes = {"d_state": dims["states"], "d_conv": dims["conv"], "dt_rank": dims["dt"]}
    settings: dict[str, Any] = {**sizes, "expand": whole_number(dims["ffn"] / config.hidden)}
    settings = {key: value for key, value in settings.items() if value != usual[key]}
    return settings if config.conv_bias else {**settings, "conv_bias": False}


def _vocabulary(entries: int, rows: int) -> dict[str, int]:
    """The keys by which this many entries get this many rows, with a multiple of 8 if possible."""
    doubled = (_MULTIPLE << n for n in range(32))
    multiple = next(
        n for n in (*doubled, *range(1, rows + 1)) if rows % n == 0 and rows - n < entries
    )
    return {"vocab_size": entries, "pad_vocab_size_multiple": multiple}


def _has_rows(original: Mapping[str, Any], rows: int) -> bool:
    """Whether a config.json describes embeddings with this many rows."""
    size, multiple = original.get("vocab_size"), original.get("pad_vocab_size_multiple", _MULTIPLE)
    if not (isinstance(size, int) and isinstance(multiple, int)) or multiple < 1:
        return False
    return round_up(size, multiple) == rows


def _refuse(config: ModelConfig, hf_config: Mapping[str, Any]) -> list[Refusal]:
    way_out = "write the transformers format (`format=transformers`)"
    refusals = []
    if config.norm_eps != _EPSILON:
        refusals.append(
            Refusal(
                "layer_norm_epsilon (rms_norm_epsilon in GPT-NeoX)",
                f"mamba_ssm supports only {_EPSILON:g}, but this model has {config.norm_eps:g}",
                way_out,
            )
        )
    if hf_config.get("hidden_act", "silu") not in ("silu", "swish"):
        reason = f"mamba_ssm supports only silu, but this model uses {hf_config['hidden_act']!r}"
        refusals.append(Refusal("hidden_act", reason, way_out))
    return refusals


MAMBA_SSM = Form(
    name="mamba_ssm",
    library="mamba-ssm",
    usage=(
        "from mamba_ssm import MambaLMHeadModel",
        "",
        'model = MambaLMHeadModel.from_pretrained(".", device="cuda")  # this folder',
    ),
    names={"backbone.embeddings.weight": "backbone.embedding.weight"},
    lost=("bos_token_id", "eos_token_id", "pad_token_id"),
    matches=lambda raw: "ssm_cfg" in raw and "model_type" not in raw,
    read=_read,
    write=_write,
    refuse=_refuse,
)
