"""Phi-3 and Phi-4: ``Phi3ForCausalLM``, Llama with its matrices joined.

One matrix is q, k and v, and another gate and up. It can have a sliding window, as in ``mistral``,
and rotate a part of each head, as in ``stablelm``.
"""

from dataclasses import replace

from neox_bridge.architectures.base import About, ModelConfig
from neox_bridge.architectures.hf_config import embedding_dropout
from neox_bridge.architectures.llama_like import Family, architecture
from neox_bridge.architectures.llama_weights import GATE_UP, LAYER

_ATTENTION = f"{LAYER}self_attn."


def _write(config: ModelConfig) -> dict[str, object]:
    return {
        "sliding_window": config.window,
        "resid_pdrop": config.hidden_dropout,
        "original_max_position_embeddings": config.max_positions,
        # the class has 32000, and fails if the vocabulary is smaller
        "pad_token_id": None,
    }


_FAMILY = architecture(
    Family(
        "phi3",
        "Phi3ForCausalLM",
        About(
            "Phi-3 mini and medium, Phi-4",
            "fixture, random, GPT-NeoX",
            "`diff` and others name the parts of qkv_proj and gate_up_proj as in a Llama; longrope "
            "(Phi-3 128k, Phi-4-mini) is refused",
        ),
        ids=(1, 32000),
        head_dim=False,
        rotary_pct=1.0,
        window=True,
        max_positions=4096,
        defaults={"rms_norm_eps": 1e-5},
        dropout="resid_pdrop",
        joined={
            f"{_ATTENTION}qkv_proj.weight": tuple(f"{_ATTENTION}{p}_proj.weight" for p in "qkv"),
            **GATE_UP,
        },
        write=_write,
    )
)
ARCHITECTURE = replace(
    _FAMILY, findings_to_neox=lambda raw, _config: embedding_dropout(raw, "phi3", "resid_pdrop")
)
