"""Tiny real models of families that neox-bridge does not convert, made by transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "intermediate_size": 64}
_HEAD = {"head_dim": 8}
_LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
    **{"v_head_dim": 8, "num_key_value_heads": 4},
}
_EXPERTS = {
    **{"moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_routed_experts": 4},
    **{"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}
# the config's class, the model's class and the settings of each family
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {**_GROUPED, **_LATENT, **_EXPERTS},
    ),
    "glm4_moe": ("Glm4MoeConfig", "Glm4MoeForCausalLM", {**_GROUPED, **_HEAD, **_EXPERTS}),
    "ernie4_5": ("Ernie4_5Config", "Ernie4_5ForCausalLM", {**_GROUPED, **_HEAD}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeForCausalLM",
        {**_GROUPED, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED, **_HEAD}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**_GROUPED, **_HEAD, "num_experts": 4, "moe_intermediate_size": 16},
    ),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_GROUPED, **_HEAD}),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_GROUPED, **_HEAD}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _GROUPED),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_GROUPED, "num_local_experts": 4}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mamba2": (
        "Mamba2Config",
        "Mamba2ForCausalLM",
        {
            **{"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8},
            **{"state_size": 8, "n_groups": 1, "vocab_size": 96},
        },
    ),
    "phi": ("PhiConfig", "PhiForCausalLM", {**_SMALL, "intermediate_size": 64}),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 96},
    ),
    "bert": ("BertConfig", "BertModel", {**_SMALL, "intermediate_size": 64}),
}


def make(family: str, folder: Path, seed: int = 0, **save: Any) -> Path:
    """Write a tiny model with random weights. save: options of ``save_pretrained``."""
    config_class, model_class, settings = FAMILIES[family]
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, config_class)(**{**settings, **ids})
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config)
    model.save_pretrained(folder, **save)
    return folder


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a folder with one safetensors file."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
