"""What all families share of the yml: numbers that yaml reads as text, and common refusals."""

import re
from collections.abc import Callable, Collection, Mapping
from math import isfinite
from typing import Any, TypeVar

from neox_bridge.architectures.base import Presence, Refusal, refusals
from neox_bridge.architectures.heads import RM_LINEAR
from neox_bridge.errors import BridgeError

Number = TypeVar("Number", int, float)
# field of ModelConfig, its type, key and default in Hugging Face, key and default in GPT-NeoX
Keys = tuple[tuple[str, Callable[[Any], Any], str, Any, str, Any], ...]
# of all families with attention
SIZE_KEYS: Keys = (
    ("layers", int, "num_hidden_layers", None, "num_layers", None),
    ("heads", int, "num_attention_heads", None, "num_attention_heads", None),
    ("max_positions", int, "max_position_embeddings", 2048, "max_position_embeddings", None),
)
# values that the trees of these eras do not know, although they know the keys
_MISSING: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("norm", "non_parametric_layernorm"): ("v1.0", "2024-03", "2024-09", "2024-10"),  # #1338
    ("attention_config", "mamba"): ("v1.0", "2024-03"),  # #1157
    ("attention_config", "rwkv"): ("v1.0", "2024-03"),  # #1198
    ("activation", "silu"): ("v1.0",),
}


def number(key: str, value: Any, kind: Callable[[Any], Number]) -> Number:
    """A value as an int or a float. It may be a text, because yaml reads 1e-5 as one.

    Raises BridgeError, which names the key, for NaN, infinity, and an int that is not whole.
    """
    try:
        result = kind(value)
        if not isfinite(result) or (kind is int and result != float(value)):
            raise ValueError
        return result
    except (TypeError, ValueError, OverflowError):
        shown = str(value)[:60]
        raise BridgeError(f"{key}: {shown!r} is not a number. Correct it in the config.") from None


def read_keys(keys: Keys, raw: Mapping[str, Any], hf: bool) -> dict[str, Any]:
    """The fields of a table from a config.json or a yml. Raises BridgeError for a missing key."""
    values: dict[str, Any] = {}
    for name, kind, hf_key, hf_default, neox_key, neox_default in keys:
        key, default = (hf_key, hf_default) if hf else (neox_key, neox_default)
        value = default if raw.get(key) is None else raw[key]
        if value is None:
            where = "config.json" if hf else "the yml"
            raise BridgeError(
                f"{where} is missing {key}, which cannot be derived from the tensors. Add it."
            )
        values[name] = number(key, value, kind)
    return values


def neox_fields(
    raw: Mapping[str, Any], dims: Mapping[str, int], presence: Presence
) -> dict[str, Any]:
    """The fields of ``ModelConfig`` that all families with attention read alike from a yml."""
    return {
        "dims": dict(dims),
        "rotary_pct": number("rotary_pct", raw.get("rotary_pct", 1.0), float),
        "rotary_base": number("rotary_emb_base", raw.get("rotary_emb_base", 10000), float),
        "tied_embeddings": not raw.get("no_weight_tying", False),
        "reward": presence.has(RM_LINEAR),
        "dtype": presence.dtype,
        "window": window_of(raw),
    }


def round_up(size: int, step: int) -> int:
    """The smallest multiple of ``step`` that is at least ``size``."""
    return -(-size // step) * step


def attention_kinds(raw: Mapping[str, Any]) -> set[str]:
    """The attention types that a yml names, in any of its nested spellings."""
    return set(re.findall(r"[a-z_]+", str(raw.get("attention_config") or ""))) - {"all"}


def window_of(raw: Mapping[str, Any]) -> int | None:
    """How many tokens a query sees, itself included; None if it sees all before it.

    GPT-NeoX's sliding_window_width does not count the query itself (megatron/utils.py,
    get_attn_mask; flash-attn's window_size), transformers' sliding_window does
    (masking_utils.py, sliding_window_overlay).
    """
    width = raw.get("sliding_window_width")
    return None if width is None else number("sliding_window_width", width, int) + 1


def refuse_era(words: Mapping[str, Collection[str]], era: str) -> list[Refusal]:
    """Refuse values that the trees of an era do not know. words: values by the key of the yml."""
    checks = [
        (f"{key}: {value}", era in eras, f"GPT-NeoX of {era} does not have it")
        for (key, value), eras in _MISSING.items()
        if value in words.get(key, ())
    ]
    return refusals(checks, way_out="use `era=today`")


def refuse_common(raw: Mapping[str, Any], window: bool = False) -> list[Refusal]:
    """Refuse settings of GPT-NeoX that no causal language model of transformers has.

    num_unique_layers is not one of them: no tree from v1.0 to today uses it except in checks.

    window: whether the family has a sliding window in transformers.
    """
    checks: tuple[tuple[str, bool, str], ...] = (
        (
            "moe_num_experts",
            int(raw.get("moe_num_experts") or 1) > 1 or int(raw.get("num_experts") or 1) > 1,
            "this family does not support mixture-of-experts layers",
        ),
        (
            "soft_prompt_tuning",
            bool((raw.get("soft_prompt_tuning") or {}).get("enabled", False)),
            "transformers does not support soft prompts inside the model",
        ),
        (
            "use_qk_layernorm",
            bool(raw.get("use_qk_layernorm")),
            "this family does not support norms on q and k in transformers",
        ),
        ("use_mup", bool(raw.get("use_mup")), "muP scales the logits and the attention"),
        (
            "sliding_window_width",
            raw.get("sliding_window_width") is not None and not window,
            "this family does not support a sliding window in transformers",
        ),
    )
    return refusals(checks, neox_only=True)
