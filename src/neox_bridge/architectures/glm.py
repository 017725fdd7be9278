"""GLM-4 9B and GLM-Edge: ``GlmForCausalLM``, Llama that rotates neighboring pairs of dimensions.

Its attention biases are those of q, k and v, as in ``qwen2``, and gate and up are one matrix, as in
``phi3``. A part of each head is rotated.
"""

from collections.abc import Mapping
from typing import Any

from neox_bridge.architectures.base import About, Refusal, refusals
from neox_bridge.architectures.llama_like import Family, architecture, rotary_share
from neox_bridge.architectures.llama_weights import GATE_UP

_HEAD_DIM, _ROTARY_PCT = 128, 0.5


def _refuse(raw: Mapping[str, Any]) -> list[Refusal]:
    rotated = int((raw.get("head_dim") or _HEAD_DIM) * rotary_share(raw, _ROTARY_PCT))
    reason = f"GPT-NeoX rotates an even number of dimensions of a head, but this model {rotated}"
    return refusals([("partial_rotary_factor", rotated % 2 == 1, reason)])


ARCHITECTURE = architecture(
    Family(
        "glm",
        "GlmForCausalLM",
        About(
            "GLM-4 9B (`-hf`), GLM-Edge",
            "random, GPT-NeoX",
            "rows of q and k have another order in GPT-NeoX; attention.dense gets a bias of zeros "
            "where q, k and v have biases; GLM-4-0414 (`glm4`) has more norms",
        ),
        ids=(None, None),
        rotary_pct=_ROTARY_PCT,
        biases="optional qkv",
        max_positions=131072,
        defaults={"head_dim": _HEAD_DIM, "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-7},
        joined=GATE_UP,
        paired=True,
        bias_key=("attention_bias", True),
        # the class has a padding token, and fails if the vocabulary is smaller
        write=lambda config: {"attention_bias": config.attention_bias, "pad_token_id": None},
        refuse=_refuse,
    )
)
