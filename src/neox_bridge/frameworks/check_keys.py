"""Finds unknown keys in a yml, a config.json, and the settings of other libraries."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from neox_bridge.frameworks.keys import (
    MAMBA_SSM,
    MAMBA_SSM_BLOCK,
    META_LLAMA,
    ROPE,
    SOFT_PROMPT,
    UNREAD,
    block_keys,
    is_shipped,
    neox_keys,
    removed_from_neox,
    transformers_keys,
)
from neox_bridge.frameworks.unknown_keys import (
    UnknownKey,
    effect_of,
    is_certain,
    is_off,
    unknown_key,
)

# blocks of the yml with keys of an optimizer, a logger or a tuner that the user chooses
_FREE = frozenset(
    """optimizer scheduler amp autotuning wandb tensorboard csv_monitor comet_others elasticity
    data_efficiency curriculum_learning comms_logger flops_profiler""".split()
)
_OVERWRITTEN = "config_files"  # NeoXArgs.from_ymls replaces it; see layouts/origin.py
# keys of GPT-NeoX that change the model and that neox-bridge does not read
_UNREAD_NEOX = ("compression_training",)
_ROPE_BLOCKS = ("rope_scaling", "rope_parameters")
# the base class of transformers accepts these keys, and the class of the family ignores them
_UNREAD_BY_CLASS = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "mamba": {
        "n_layer": "num_hidden_layers",
        "d_model": "hidden_size",
        "d_inner": "intermediate_size",
    },
    "starcoder2": {"layer_norm_epsilon": "norm_epsilon"},
}
# keys that neox-bridge writes for GPT-NeoX, and that a family without attention ignores
_IDLE = {"mamba": ("num_attention_heads", "max_position_embeddings")}
# settings of other libraries that the class of transformers always has: of mamba_ssm, and of the
# trainer of StarCoder 2, in its published models
_ALWAYS: dict[str, tuple[tuple[str, object], ...]] = {
    "mamba": (("rms_norm", True), ("ssm_cfg", {})),
    "starcoder2": (
        ("attention_softmax_in_fp32", True),
        ("scale_attention_softmax_in_fp32", True),
        ("scale_attn_weights", True),
        ("norm_type", "layer_norm"),
        ("mlp_type", "default"),
    ),
}


def unknown_in_yml(
    raw: Mapping[str, Any], file_of: Callable[[str], str] = lambda _key: ""
) -> tuple[UnknownKey, ...]:
    """The keys of a merged yml that no GPT-NeoX from v1.0 to today accepts.

    file_of: returns the file of a key.
    """
    known = neox_keys()
    unknown = []
    for key, value in raw.items():
        if key not in known and is_shipped(key, value):
            continue
        if key not in known:
            removed = removed_from_neox(key)
            unknown.append(unknown_key("neox", key, value, known, raw, file_of(key), removed))
        elif key in _UNREAD_NEOX:
            if any(map(_is_enabled, _mappings(value))):
                unknown.append(UnknownKey("neox", key, value, "model", "", file_of(key)))
        elif isinstance(value, dict) and key != _OVERWRITTEN:
            inside = SOFT_PROMPT if key == "soft_prompt_tuning" else block_keys()
            for name, item, siblings in _nested(value, key):
                last = name.rpartition(".")[2]
                if last in inside or (key in _FREE and not is_certain(last)):
                    continue
                unknown.append(unknown_key("neox", name, item, inside, siblings, file_of(key)))
    return tuple(unknown)


def unknown_in_config(
    raw: Mapping[str, Any], family: str, forms: frozenset[str]
) -> tuple[UnknownKey, ...]:
    """The keys of a config.json that transformers' class of the family does not know.

    forms: names under which the reader keeps another library's settings.
    """
    known = transformers_keys(family)
    unread = _UNREAD_BY_CLASS.get(family, {})
    rope = raw.get("rope_parameters") or {}
    file = "config.json"
    unknown = []
    for key, value in raw.items():
        if key in forms or (key in known and key not in unread and key not in UNREAD):
            continue
        if key in UNREAD and effect_of(key, value) != "model":
            continue
        if key in _IDLE.get(family, ()) or (key, value) in _ALWAYS.get(family, ()):
            continue
        if key in unread and value in (raw.get(unread[key]), rope.get(key)):
            continue
        one = unknown_key("hf", key, value, known - {key}, raw, file)
        unknown.append(replace(one, effect="off") if _is_derived(key, value, raw) else one)
    for block in _ROPE_BLOCKS:
        unknown += _unknown_in_rope(block, raw.get(block), raw)
    return tuple(unknown)


def unknown_in_mamba_ssm(raw: Mapping[str, Any]) -> tuple[UnknownKey, ...]:
    """The keys of a config.json of mamba_ssm that its classes do not accept."""
    block = raw.get("ssm_cfg")
    inside = block if isinstance(block, dict) else {}
    return (
        *_others_than(MAMBA_SSM, raw, "config.json"),
        *_others_than(MAMBA_SSM_BLOCK, inside, "config.json", "ssm_cfg."),
    )


def unknown_in_params(raw: Mapping[str, Any]) -> tuple[UnknownKey, ...]:
    """The keys of a params.json that Meta's Llama does not have."""
    return tuple(_others_than(META_LLAMA, raw, "params.json"))


def _others_than(
    known: frozenset[str], raw: Mapping[str, Any], file: str, block: str = ""
) -> Iterator[UnknownKey]:
    for key, value in raw.items():
        if key not in known:
            yield unknown_key("hf", f"{block}{key}", value, known, raw, file)


def _unknown_in_rope(block: str, value: Any, raw: Mapping[str, Any]) -> Iterator[UnknownKey]:
    """The keys of a rotary block that its type ignores. "default" ignores all scaling."""
    if not isinstance(value, dict):
        return
    kind = value.get("rope_type", value.get("type"))
    for key, item in value.items():
        scaled = kind not in (None, "default") and key in ROPE
        if scaled or key in ("rope_type", "type", "rope_theta", "partial_rotary_factor"):
            continue
        if key == "original_max_position_embeddings" and item == raw.get("max_position_embeddings"):
            continue
        yield unknown_key("hf", f"{block}.{key}", item, ROPE - {key}, value, "config.json")


def _is_derived(key: str, value: Any, raw: Mapping[str, Any]) -> bool:
    """Whether a key has the value that the class computes from other keys."""
    hidden, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads):
        return False
    return bool({"head_dim": hidden / heads, "num_key_value_heads": heads}.get(key) == value)


def _nested(value: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """The dotted name, the value and the mapping of every key below a block."""
    for key, item in value.items():
        name = f"{above}.{key}"
        yield name, item, value
        if isinstance(item, dict):
            yield from _nested(item, name)


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """All mappings in a value, with the value itself."""
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _mappings(item)


def _is_enabled(block: Mapping[str, Any]) -> bool:
    return "enabled" in block and not is_off("enabled", block["enabled"])
