"""Changes of transformers. Each was found by a comparison of the sources of released versions.

The date is that of the release. If no pull request is named, the link leads to the source of the
first version that has the change.
"""

from neox_bridge.frameworks.change import Change, Described, Release
from neox_bridge.frameworks.detectors import HALF, hf


def _holds(c: Described, *endings: str) -> bool:
    """Whether the files contain tensors that are not weights, with such names."""
    return any(drop.name.endswith(endings) for drop in c.dropped)


def _rope(c: Described) -> dict[str, object]:
    return dict(c.raw.get("rope_parameters") or {})


def _loses_pct(c: Described) -> bool:
    """Whether 5.0 to 5.4 would read another fraction than this config has, or wrote it."""
    factor = _rope(c).get("partial_rotary_factor")
    if factor is None or "rotary_pct" in c.raw:
        return False
    writer = str(c.raw.get("transformers_version", ""))
    return factor != 0.25 or writer.startswith(("5.0.", "5.1.", "5.2.", "5.3.", "5.4."))


def _one_spelling(c: Described) -> bool:
    """Whether config.json has only the old spelling of RoPE, or only the new one."""
    old = {"rotary_pct", "rotary_emb_base", "rope_theta"} & set(c.raw)
    return bool(old) != ("rope_parameters" in c.raw)


_LLAMA = ("llama", "mistral", "qwen2", "olmo", "stablelm", "phi3", "starcoder2", "glm")

TRANSFORMERS: tuple[Change, ...] = (
    Change(
        "hf-lm-head",
        Release("5.14.0", 47198),
        ("gpt_neox",),
        "the output layer of GPTNeoXForCausalLM is lm_head in memory; files still say embed_out, "
        "and both names are read. Before, only embed_out was read",
        "4.x and 5.0 to 5.13: “Some weights … newly initialized: ['embed_out.weight']” if a file "
        "says lm_head; state dicts from memory have the other name",
        "neox-bridge convert reads both names and writes embed_out.weight, which every version "
        "reads",
        in_checkpoint=hf("gpt_neox", lambda c: not c.config.tied_embeddings),
        in_error=(
            r"newly initialized: \[[^\]]*'embed_out\.weight'",
            r"not used when initializing GPTNeoX\w+: [\[{][^\]}]*'lm_head\.weight'",
            r"^(?:lm_head|embed_out)\.weight\s*\|\s*(?:MISSING|UNEXPECTED)",
            r"key\(s\) in state_dict: [^\n]*\"(?:lm_head|embed_out)\.weight\"",
        ),
    ),
    Change(
        "hf-rotary-pct-kept",
        Release("5.5.0", 44985),
        ("gpt_neox",),
        "rope_parameters.partial_rotary_factor is read; 5.0 to 5.4 overwrite it with rotary_pct, "
        "or with 0.25 if that is missing, on every load and so on every save",
        "a model with another fraction than 0.25 generates nonsense after save and load",
        "write both spellings, as neox-bridge convert does, or set rotary_pct in config.json",
        loud=False,
        in_checkpoint=hf("gpt_neox", _loses_pct),
    ),
    Change(
        "hf-rope-parameters",
        Release("5.0.0", 39847),
        ("gpt_neox", *_LLAMA),
        "config.json has RoPE in rope_parameters {rope_theta, partial_rotary_factor, "
        "rope_type}; 4.x knows only rotary_pct, rotary_emb_base, rope_theta, rope_scaling",
        "4.x silently reads a config.json of 5.x with the base 10000 and, for gpt_neox, the "
        "fraction 0.25",
        "write both spellings, as neox-bridge convert does: every version reads them",
        loud=False,
        in_checkpoint=hf("", _one_spelling),
    ),
    Change(
        "hf-dtype-auto",
        Release("5.0.0", 42805),
        ("gpt_neox", *_LLAMA),
        "from_pretrained loads in the dtype that the checkpoint has; before, in float32",
        "half the memory, rounded logits, and training in half precision by default",
        "pass dtype=torch.float32 to from_pretrained for the old behavior",
        loud=False,
        in_checkpoint=hf("", lambda c: c.config.dtype in HALF),
    ),
    Change(
        "hf-no-bin",
        Release("5.0.0", 42734),
        ("gpt_neox", *_LLAMA),
        "save_pretrained writes only safetensors, in shards of up to 50 GB (before: 5 GB)",
        "safe_serialization=False is silently ignored; tools that need pytorch_model.bin find none",
        "read safetensors, as neox-bridge does. --shard-size 5GB writes shards as 4.x does",
        loud=False,
        in_checkpoint=hf("", lambda c: any(file.endswith(".bin") for file in c.files)),
    ),
    Change(
        "hf-dtype-key",
        Release("4.56.0", 39782),
        ("gpt_neox", *_LLAMA),
        "config.json says dtype; before, torch_dtype. Since then both are read; older versions "
        "know only torch_dtype",
        "older versions with torch_dtype='auto' take the dtype of the first weight instead",
        "write both keys, as neox-bridge convert does",
        loud=False,
        in_checkpoint=hf("", lambda c: "dtype" in c.raw and "torch_dtype" not in c.raw),
    ),
    Change(
        "hf-qwen2-layer-types",
        Release("4.53.0", file="models/qwen2/configuration_qwen2.py"),
        ("qwen2",),
        "config.json lists layer_types (full or sliding attention) for every layer; before, it had "
        "use_sliding_window and max_window_layers",
        "older versions ignore layer_types",
        "keep use_sliding_window and max_window_layers in config.json too",
        loud=False,
        in_checkpoint=hf("qwen2", lambda c: "layer_types" in c.raw),
    ),
    Change(
        "hf-torch-load",
        Release("4.52.0", 37785),
        ("gpt_neox", *_LLAMA),
        "weights in .bin files are read only with torch 2.6 and newer (CVE-2025-32434)",
        "ValueError: Due to a serious vulnerability issue in `torch.load` …",
        "convert it to safetensors, without torch: neox-bridge convert CHECKPOINT NEW --to hf",
        in_checkpoint=hf("", lambda c: any(file.endswith(".bin") for file in c.files)),
        in_error=(r"Due to a serious vulnerability issue in `torch\.load`",),
    ),
    Change(
        "hf-phi3-partial-rotary",
        Release("4.49.0", 35947),
        ("phi3",),
        "partial_rotary_factor in config.json is read: only this part of each head is rotated",
        "older versions rotate whole heads, or fail because the sizes of tensors do not match",
        "load it with transformers 4.49 or newer",
        loud=False,
        in_checkpoint=hf(
            "phi3",
            lambda c: (
                c.raw.get("partial_rotary_factor", _rope(c).get("partial_rotary_factor", 1.0)) != 1
            ),
        ),
    ),
    Change(
        "hf-llama-head-dim",
        Release("4.45.0", file="models/llama/configuration_llama.py"),
        ("llama",),
        "head_dim in config.json is read; before, it was hidden_size / num_attention_heads",
        "older versions: size mismatch for self_attn.q_proj.weight",
        "load it with transformers 4.45 or newer",
        in_checkpoint=hf("llama", lambda c: c.raw.get("head_dim") is not None),
        in_error=(r"size mismatch for model\.layers\.\d+\.self_attn\.[qkvo]_proj\.weight",),
    ),
    Change(
        "hf-mistral-head-dim",
        Release("4.43.0", file="models/mistral/configuration_mistral.py"),
        ("mistral",),
        "head_dim in config.json is read; before, it was hidden_size / num_attention_heads",
        "older versions: size mismatch for self_attn.q_proj.weight",
        "load it with transformers 4.43 or newer",
        in_checkpoint=hf("mistral", lambda c: c.raw.get("head_dim") is not None),
        in_error=(r"size mismatch for model\.layers\.\d+\.self_attn\.[qkvo]_proj\.weight",),
    ),
    Change(
        "hf-llama3-rope",
        Release("4.43.0", file="modeling_rope_utils.py"),
        ("llama",),
        "the RoPE scaling of Llama 3.1 is supported: rope_type: llama3, with four parameters",
        "older versions: ValueError: `rope_scaling` must be a dictionary with two fields",
        "load it with transformers 4.43 or newer; GPT-NeoX has no RoPE scaling",
        in_checkpoint=hf(
            "llama",
            lambda c: (
                "llama3"
                in (_rope(c).get("rope_type"), (c.raw.get("rope_scaling") or {}).get("rope_type"))
            ),
        ),
        in_error=(r"`rope_scaling` must be a dictionary with (?:with )?two fields",),
    ),
    Change(
        "hf-llama-mlp-bias",
        Release("4.41.0", file="models/llama/configuration_llama.py"),
        ("llama",),
        "the new key mlp_bias in config.json adds biases to the MLP",
        "older versions ignore mlp.gate_proj.bias and the other biases, with a warning",
        "load it with transformers 4.41 or newer",
        in_checkpoint=hf("llama", lambda c: bool(c.raw.get("mlp_bias"))),
        in_error=(r"not used when initializing Llama\w+: [^\n]*mlp\.(?:gate|up|down)_proj\.bias",),
    ),
    Change(
        "hf-llama-rope-fp32",
        Release("4.38.2", 29285, date="2024-03-01"),
        ("llama",),
        "RoPE's angles are computed in fp32 also under autocast; before, bfloat16 rounded them",
        "logits in bfloat16 differ between versions, more at later positions",
        "compare in float32",
        loud=False,
        in_checkpoint=hf("llama", lambda c: c.config.dtype == "bfloat16"),
    ),
    Change(
        "hf-attention-bias",
        Release("4.37.0", 28126),
        ("gpt_neox",),
        "gpt_neox supports attention_bias: false; before, attention always had biases",
        "older versions: “Some weights … newly initialized: […attention.query_key_value.bias…]”: "
        "random biases",
        "load it with transformers 4.37 or newer, with attention_bias: false in config.json, "
        "which neox-bridge convert writes",
        in_checkpoint=hf("gpt_neox", lambda c: not c.config.attention_bias),
        in_error=(
            r"newly initialized: \[[^\]]*gpt_neox\.layers\.\d+\.attention\.query_key_value\.bias",
            r"^gpt_neox\.layers\.\S*(?: \S+)*attention\.query_key_value\.bias\s*\|\s*MISSING",
        ),
    ),
    Change(
        "hf-neox-inv-freq",
        Release("4.35.0", 25830, sha="253f9a3f"),
        ("gpt_neox",),
        "gpt_neox no longer stores attention.rotary_emb.inv_freq: the buffer became non-persistent",
        "a converted Pythia does not contain the key that older GPT-NeoX trees expect: Missing "
        'key(s) in state_dict: "attention.rotary_emb.inv_freq"',
        "neox-bridge convert CHECKPOINT NEW --to neox --for neox@2024-03 for a GPT-NeoX before "
        "2024-03-04; the values are recomputed from rotary_emb_base",
        in_checkpoint=hf("gpt_neox", lambda c: _holds(c, "rotary_emb.inv_freq")),
        in_error=(
            r"not used when initializing GPTNeoX\w+: [^\n]*rotary_emb\.inv_freq",
            r"newly initialized: \[[^\]]*gpt_neox\S*rotary_emb\.inv_freq",
        ),
    ),
    Change(
        "hf-neox-rope-rounded",
        Release("4.35.0", 25830, sha="253f9a3f"),
        ("gpt_neox",),
        "the sines and cosines of RoPE in gpt_neox are rounded to the model's dtype; before, they "
        "stayed in fp32",
        "logits in half precision differ slightly between versions",
        "compare in float32",
        loud=False,
        in_checkpoint=hf("gpt_neox", lambda c: c.config.dtype in HALF),
    ),
    Change(
        "hf-safetensors-default",
        Release("4.35.0", file="modeling_utils.py"),
        ("gpt_neox", *_LLAMA),
        "save_pretrained writes model.safetensors; before, pytorch_model.bin",
        "tools that need pytorch_model.bin: OSError … does not appear to have a file named "
        "pytorch_model.bin",
        "read safetensors (transformers 4.30 and newer always do)",
        in_checkpoint=hf("", lambda c: any(file.endswith(".safetensors") for file in c.files)),
        in_error=(r"does not appear to have a file named pytorch_model\.bin",),
    ),
    Change(
        "hf-llama-attention-bias",
        Release("4.34.0", file="models/llama/configuration_llama.py"),
        ("llama",),
        "the new key attention_bias in config.json adds biases to attention",
        "older versions ignore self_attn.q_proj.bias and the other biases, with a warning",
        "load it with transformers 4.34 or newer",
        in_checkpoint=hf("llama", lambda c: bool(c.raw.get("attention_bias"))),
        in_error=(r"not used when initializing Llama\w+: [^\n]*self_attn\.[qkvo]_proj\.bias",),
    ),
    Change(
        "hf-llama-rope-theta",
        Release("4.33.0", 25740),
        ("llama",),
        "rope_theta in config.json is read; before, the base was always 10000",
        "older versions: a Code Llama or a Llama 3 generates nonsense",
        "load it with transformers 4.33 or newer",
        loud=False,
        in_checkpoint=hf(
            "llama",
            lambda c: c.raw.get("rope_theta", _rope(c).get("rope_theta", 10000)) != 10000,
        ),
    ),
    Change(
        "hf-llama-inv-freq",
        Release("4.32.0", 24998, sha="95f96b45"),
        ("llama",),
        "llama no longer stores self_attn.rotary_emb.inv_freq: the buffer became non-persistent",
        "converters and trees that expect the key: Missing key(s) in state_dict: "
        '"…rotary_emb.inv_freq"',
        "neox-bridge drops it if it is stored, and recomputes it if a target expects it",
        in_checkpoint=hf("llama", lambda c: _holds(c, "rotary_emb.inv_freq")),
        in_error=(
            r"(?:not used when initializing Llama|newly initialized: )[^\n]*"
            r"self_attn\.rotary_emb\.inv_freq",
        ),
    ),
    Change(
        "hf-masks",
        Release("4.31.0", file="models/gpt_neox/modeling_gpt_neox.py"),
        ("gpt_neox",),
        "gpt_neox no longer stores its causal masks, attention.bias and attention.masked_bias",
        'strict loads: Unexpected key(s) in state_dict: "gpt_neox.layers.0.attention.bias", '
        '"gpt_neox.layers.0.attention.masked_bias"',
        "neox-bridge convert CHECKPOINT NEW --to hf drops them; they are not learned",
        in_checkpoint=hf(
            "gpt_neox", lambda c: _holds(c, "attention.bias", "attention.masked_bias")
        ),
        in_error=(r"attention\.masked_bias\b", r"layers\.\d+\.attention\.bias\b"),
    ),
    Change(
        "hf-rope-scaling",
        Release("4.31.0", file="models/gpt_neox/configuration_gpt_neox.py"),
        ("gpt_neox", "llama"),
        "rope_scaling in config.json (linear, dynamic) is read; before, it was ignored",
        "older versions generate nonsense beyond the original length",
        "load it with transformers 4.31 or newer; GPT-NeoX has no RoPE scaling",
        loud=False,
        in_checkpoint=hf("", lambda c: bool(c.raw.get("rope_scaling"))),
    ),
    Change(
        "hf-llama-grouped",
        Release("4.31.0", file="models/llama/configuration_llama.py"),
        ("llama",),
        "the new key num_key_value_heads in config.json turns on grouped-query attention",
        "older versions: size mismatch for self_attn.k_proj.weight",
        "load it with transformers 4.31 or newer",
        in_checkpoint=hf(
            "llama",
            lambda c: (
                c.raw.get("num_key_value_heads") not in (None, c.raw.get("num_attention_heads"))
            ),
        ),
        in_error=(r"size mismatch for model\.layers\.\d+\.self_attn\.[kv]_proj\.weight",),
    ),
    Change(
        "hf-parallel-residual",
        Release("4.23.0", file="models/gpt_neox/configuration_gpt_neox.py"),
        ("gpt_neox",),
        "use_parallel_residual: false is read; before, every block was parallel",
        "older versions: a model with sequential residuals generates nonsense",
        "load it with transformers 4.23 or newer",
        loud=False,
        in_checkpoint=hf("gpt_neox", lambda c: not c.config.parallel_residual),
    ),
    # A tied config, and another head in the files (modeling_utils.py, tie_weights).
    Change("hf-stored-head-kept", Release("5.0.0"), ("gpt_neox", *_LLAMA)),
)
# The first version that has each class.
CLASS_SINCE = {
    "gpt_bigcode": "4.28",
    "gpt2": "4.0",
    "opt": "4.19",
    "gpt_neox": "4.20",
    "llama": "4.28",
    "mistral": "4.34",
    "qwen2": "4.37",
    "mamba": "4.39",
    "olmo": "4.40",
    "stablelm": "4.38",
    "phi3": "4.41",
    "starcoder2": "4.39",
    "glm": "4.46",
}
