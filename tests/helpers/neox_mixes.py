"""Models of GPT-NeoX that no class of transformers computes, with shards that differ by rank."""

import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_PLAIN = {"use_bias_in_mlp": False, "use_bias_in_attn_linear": False}
_SEQUENTIAL = {"gpt_j_residual": False}


def _gated(activation: str, **settings: Any) -> dict[str, Any]:
    return {"activation": activation, "intermediate_size": 192, **settings}


@dataclass(frozen=True)
class Mix:
    """A model of one tree.

    tree: the date, as in real_neox.ALL_TREES. settings: beside BASE. tp, pp: of the source.
    targets: (tp, pp) of the targets. hf: whether transformers has a class for it after all.
    """

    name: str
    tree: str
    settings: dict[str, Any]
    tp: int = 2
    pp: int = 1
    targets: tuple[tuple[int, int], ...] = ((1, 0), (4, 1))
    hf: bool = False


BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 12,
    "seq_length": 24,
    "max_position_embeddings": 24,
    "pos_emb": "rotary",
    "rotary_pct": 0.5,
    "no_weight_tying": True,
    "gpt_j_residual": True,
    "output_layer_parallelism": "column",
    "make_vocab_size_divisible_by": 24,
    "norm": "layernorm",
    "scaled_upper_triang_masked_softmax_fusion": False,
    "bias_gelu_fusion": False,
    "attention_dropout": 0,
    "hidden_dropout": 0,
    "init_method": "small_init",
    "output_layer_init_method": "wang_init",
    "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.9, 0.95], "eps": 1.0e-8}},
    "precision": "fp32",
    "fp32_allreduce": True,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": 1},
    "data_impl": "mmap",
    "train_iters": 10,
    "lr_decay_iters": 10,
    "checkpoint_factor": 1000,
    "tokenizer_type": "HFTokenizer",
    "checkpoint_activations": False,
}
_RMS = {"norm": "rmsnorm"}
MIXES = (
    Mix("rmsnorm gelu", "today", {**_RMS, **_SEQUENTIAL}),
    Mix("rmsnorm gelu parallel", "today", _RMS, tp=3, targets=((1, 1), (2, 0))),
    Mix("layernorm swiglu", "today", {**_gated("swiglu", **_PLAIN), **_SEQUENTIAL}, hf=True),
    Mix(
        "layernorm geglu biases parallel", "today", _gated("geglu"), pp=0, targets=((1, 1), (4, 0))
    ),
    Mix("scalenorm gelu", "today", {"norm": "scalenorm", **_SEQUENTIAL}, pp=0),
    Mix(
        "non-parametric norm swiglu",
        "today",
        {
            "norm": "non_parametric_layernorm",
            "rotary_pct": 1,
            **_gated("swiglu", **_PLAIN),
            **_SEQUENTIAL,
        },
        hf=True,
    ),
    Mix("learned positions tied", "today", {"pos_emb": "learned", "no_weight_tying": False}),
    Mix("learned positions", "today", {"pos_emb": "learned", **_SEQUENTIAL}, pp=0, hf=True),
    Mix("sinusoidal positions", "today", {"pos_emb": "sinusoidal"}),
    Mix("relative positions", "today", {"pos_emb": "rpe"}),
    Mix("relative positions ranks", "today", {"pos_emb": "rpe", **_SEQUENTIAL}, pp=0),
    Mix("alibi", "today", {"pos_emb": "alibi", **_SEQUENTIAL}),
    Mix("alibi from one rank", "today", {"pos_emb": "alibi"}, tp=1, targets=((2, 0), (3, 1))),
    Mix("no positions", "today", {"pos_emb": "none", **_RMS}),
    Mix("qk rmsnorm", "today", {"use_qk_layernorm": True, **_RMS, **_SEQUENTIAL}),
    Mix("qk layernorm", "today", {"use_qk_layernorm": True}, targets=((2, 0),)),
    Mix(
        "grouped queries plain MLP",
        "today",
        {"num_kv_heads": 4, **_SEQUENTIAL},
        targets=((1, 0), (4, 1)),
    ),
    Mix(
        "grouped queries rmsnorm",
        "today",
        {"num_kv_heads": 6, **_RMS},
        tp=3,
        targets=((1, 0), (2, 1)),
    ),
    Mix("partial rotary swiglu", "today", {**_RMS, **_gated("swiglu", **_PLAIN), **_SEQUENTIAL}),
    Mix("parallel swiglu biases", "today", {**_RMS, **_gated("swiglu")}),
    Mix("relu", "today", {**_RMS, "activation": "relu"}, tp=1, targets=((2, 1), (3, 0))),
    Mix("softsign", "today", {"activation": "softsign", **_SEQUENTIAL}, pp=0),
    Mix("mish", "today", {**_RMS, "activation": "mish"}, tp=4, targets=((3, 0),)),
    Mix("reglu", "today", {"norm": "scalenorm", **_gated("reglu", **_PLAIN)}),
    Mix("glu", "today", {**_gated("glu", **_PLAIN), **_SEQUENTIAL}, hf=True),
    Mix("bilinear", "today", {**_gated("bilinear", **_PLAIN), **_SEQUENTIAL}, tp=1, hf=True),
    Mix("rmsnorm gelu 2024-03", "2024-03", {**_RMS}),
    Mix("geglu 2024-03", "2024-03", {"activation": "geglu", **_SEQUENTIAL}),
    Mix("geglu rmsnorm 2024-03", "2024-03", {"activation": "geglu", **_RMS}, pp=0),
    Mix(
        "geglu Llama 2024-03",
        "2024-03",
        {"activation": "geglu", **_RMS, **_SEQUENTIAL, "rotary_pct": 1},
        hf=True,
    ),
    Mix("relative positions 2024-03", "2024-03", {"pos_emb": "rpe"}, pp=0),
    Mix("learned scalenorm 2024-03", "2024-03", {"pos_emb": "learned", "norm": "scalenorm"}, tp=1),
    Mix("alibi scalenorm 2024-03", "2024-03", {"pos_emb": "alibi", "norm": "scalenorm"}, tp=3),
    Mix(
        "layernorm llama MLP 2024-09",
        "2024-09",
        {
            "mlp_type": "llama",
            "activation": "silu",
            **_SEQUENTIAL,
            "use_bias_in_attn_linear": False,
        },
    ),
    Mix(
        "rmsnorm llama relu 2024-09",
        "2024-09",
        {"mlp_type": "llama", "activation": "relu", **_RMS, **_SEQUENTIAL},
        pp=0,
    ),
    Mix("grouped queries 2024-09", "2024-09", {"num_kv_heads": 6}, targets=((1, 0), (3, 1))),
    Mix(
        "geglu grouped queries 2024-09",
        "2024-09",
        {"num_kv_heads": 6, "activation": "geglu", **_RMS, **_SEQUENTIAL},
        tp=1,
        targets=((2, 0), (3, 1)),
    ),
    Mix(
        "grouped queries 2024-10", "2024-10", {"num_kv_heads": 6, **_RMS}, targets=((1, 0), (3, 1))
    ),
    Mix("qk layernorm 2024-10", "2024-10", {"use_qk_layernorm": True}, targets=((2, 0),)),
    Mix(
        "reglu Llama", "today", {**_RMS, **_SEQUENTIAL, **_gated("reglu"), "rotary_pct": 1}, hf=True
    ),
    Mix("glu Llama", "today", {**_RMS, **_SEQUENTIAL, **_gated("glu"), "rotary_pct": 1}, hf=True),
    Mix(
        "bilinear Llama",
        "today",
        {**_RMS, **_SEQUENTIAL, **_gated("bilinear", **_PLAIN), "rotary_pct": 1},
        hf=True,
    ),
    Mix(
        "grouped queries window StarCoder 2",
        "today",
        {"num_kv_heads": 4, "sliding_window_width": 5, "rotary_pct": 1, **_SEQUENTIAL},
        targets=((1, 1), (4, 1)),
        hf=True,
    ),
    Mix(
        "relu StarCoder 2 2024-03",
        "2024-03",
        {"num_kv_heads": 6, "activation": "relu", "rotary_pct": 1, **_SEQUENTIAL},
        targets=((1, 0), (3, 1)),
        hf=True,
    ),
    Mix(
        "fused gelu StarCoder 2 2024-09",
        "2024-09",
        {"num_kv_heads": 6, "bias_gelu_fusion": True, "rotary_pct": 1, **_SEQUENTIAL},
        targets=((1, 0), (3, 1)),
        hf=True,
    ),
    Mix("parallel swiglu 2024-10", "2024-10", {**_gated("swiglu", **_PLAIN), **_RMS}),
)
# what every tensor-parallel rank holds alike; row biases too where they are not summed
_ALIKE = re.compile(
    r".*((input|post_attention)_layernorm\.|(^|\.)norm\.|_embeddings\.inv_freq|rotary_emb|"
    r"position_embeddings\.weight)"
)
_ROW_BIAS = re.compile(r".*(attention\.dense|mlp\.linear2|mlp\.dense_4h_to_h)\.bias")
_BUFFER = re.compile(r".*(inv_freq|slopes)")


def add_noise(step: Path, *, parallel: bool) -> None:
    """Change every parameter of a checkpoint, so that no two shards and no two rows are alike.

    parallel: whether the run has gpt_j_residual, with which ranks have row biases of their own.
    """
    for path in sorted(step.glob("*model_states.pt")):
        value = torch.load(path, weights_only=False)
        ranked = "mp_rank" in path.name
        module = value.get("module") if ranked else value
        if not isinstance(module, dict):
            continue
        rank = int(re.search(r"(?:mp_rank_|-model_)(\d+)", path.name)[1])
        prefix = "" if ranked else path.name.split("-")[0] + "."
        for name, tensor in module.items():
            if not isinstance(tensor, torch.Tensor) or _BUFFER.match(name):
                continue
            alike = _ALIKE.match(name) or (_ROW_BIAS.match(name) and not parallel)
            # the relative positions are one module, which all layers share
            shared = "attention.rpe.weight" in name
            key = "rpe" if shared else prefix + name
            seed = zlib.crc32(f"{key} {'' if alike else rank}".encode())
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
            tensor.add_(noise.to(tensor.dtype) * 0.05)
        torch.save(value, path)
