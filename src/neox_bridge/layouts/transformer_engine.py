"""GPT-NeoX's Transformer Engine modules: their names and settings, and today's own, either way.

With ``te_mha`` and ``te_layernorm_mlp`` the attention and the MLP of a block are NVIDIA's modules
(GPT-NeoX megatron/model/transformer_engine.py; TransformerEngine 1.12, module/layernorm_mlp.py and
attention.py). They hold the same weights under other names; the MLP's holds the norm before it
too. A checkpoint is translated as it is opened, so that nothing behind this file knows of them but
the row maps of tensors/fused.py.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from neox_bridge.architectures.neox_config import number
from neox_bridge.errors import Refused
from neox_bridge.findings import Dropped, Finding
from neox_bridge.frameworks.detectors import GATED
from neox_bridge.layouts.derived_values import is_zero
from neox_bridge.layouts.universal_folder import Parameter, parameter
from neox_bridge.tensors.tensor_ref import TensorRef

Module = Literal["attention", "mlp"]
BOTH: frozenset[Module] = frozenset({"attention", "mlp"})
STATE = "_extra_state"
# the modules whose state_dict has an _extra_state, which a strict load wants
STATES = ("attention.qkv", "attention.core_attention", "attention.proj", "mlp")
KEYS = ("te_mha", "te_fp8_mha", "te_layernorm_mlp", "te_columnparallel", "te_rowparallel")
# today's names and Transformer Engine's
_NAMES: tuple[tuple[str, str, Module], ...] = (
    ("attention.query_key_value.", "attention.qkv.", "attention"),
    ("attention.dense.", "attention.proj.", "attention"),
    ("attention.rotary_emb.", "attention.rotary_embeddings.", "attention"),
    ("mlp.linear1.", "mlp.fc1_", "mlp"),
    ("mlp.linear2.", "mlp.fc2_", "mlp"),
    ("post_attention_layernorm.", "mlp.layer_norm_", "mlp"),
)
# biases that its modules always have, and the yml's key for those that GPT-NeoX's own may lack
BIASES: dict[Module, tuple[str, tuple[str, ...]]] = {
    "attention": (
        "use_bias_in_attn_linear",
        ("attention.query_key_value.bias", "attention.dense.bias"),
    ),
    "mlp": ("use_bias_in_mlp", ("mlp.linear1.bias", "mlp.linear2.bias")),
}
_WRAPPED = re.compile(r"(.*norm)\.norm\.(weight|bias)")  # te_layernorm, te_rmsnorm

Ranks = Sequence[Mapping[int, Mapping[str, TensorRef]]]


@dataclass(frozen=True)
class Plain:
    """A checkpoint in GPT-NeoX's own words: by rank and layer its tensors, and the yml.

    modules: which of its modules were Transformer Engine's.
    """

    ranks: Ranks
    raw: Mapping[str, Any]
    modules: frozenset[Module] = frozenset()
    dropped: tuple[Dropped, ...] = ()
    findings: tuple[Finding, ...] = field(default=())


def te_name(name: str) -> str:
    """Transformer Engine's name of one of GPT-NeoX's, or the name itself."""
    for plain, te, _ in _NAMES:
        if name.startswith(plain):
            # RMSNorm's scale is a weight there
            return te + name.removeprefix(plain).replace("scale", "weight")
    return name


def plain_name(name: str) -> tuple[str, Module | None]:
    """GPT-NeoX's own name, and which module of Transformer Engine's has the other one."""
    for plain, te, module in _NAMES:
        if name.startswith(te):
            return plain + name.removeprefix(te), module
    match = _WRAPPED.fullmatch(name)
    return (f"{match[1]}.{match[2]}" if match else name), None


def plain_parameter(name: str, path: str) -> Parameter:
    """``universal_folder.parameter`` with GPT-NeoX's own name."""
    layer, short = parameter(name, path)
    return layer, plain_name(short)[0]


def stored_name(name: str, modules: Collection[str]) -> str:
    """The name in a checkpoint with these modules of Transformer Engine. name: GPT-NeoX's own."""
    renamed = te_name(name)
    return renamed if plain_name(renamed)[1] in modules else name


def to_plain(
    ranks: Ranks,
    raw: Mapping[str, Any],
    folder: str,
    stored_as: Callable[[TensorRef], Iterable[TensorRef]],
) -> Plain:
    """A checkpoint as GPT-NeoX's own modules would have saved the same model.

    The names tell which modules were Transformer Engine's, never the yml; its KEYS stay there for
    what judges it, and no target takes them over. Raises Refused if GPT-NeoX computes something
    with them that its own modules don't.

    stored_as: the tensors that can be read in place of one of ``ranks``.
    """
    te_modules = {
        m for rank in ranks for t in rank.values() for key in t if (m := plain_name(key)[1])
    }
    modules = frozenset(te_modules)
    _refuse(raw, modules, len(ranks), folder)
    dropped: list[Dropped] = []
    renamed: list[dict[int, dict[str, TensorRef]]] = []
    for number_, rank in enumerate(ranks):
        layers = {}
        for layer, tensors in rank.items():
            unused = _unused(tensors)
            layers[layer] = {plain_name(k)[0]: t for k, t in tensors.items() if k not in unused}
            if number_ == 0:
                why = "unused: mlp.layer_norm_* replaces it (GPT-NeoX before #1355)"
                dropped += [Dropped(f"layer {layer}: {name}", why) for name in unused]
        renamed.append(layers)
    settings = dict(raw)
    norm = settings.get("norm")
    if norm in ("te_layernorm", "te_rmsnorm"):
        settings["norm"] = norm.removeprefix("te_")
    for module in sorted(modules):
        key, names = BIASES[module]
        if settings.get(key) is False and not _drop_zeros(renamed, names, dropped, stored_as):
            settings[key] = True
    findings: tuple[Finding, ...] = ()
    if "mlp" in modules:
        settings |= _mlp_settings(settings)
        eps_key = epsilon_key(settings.get("norm"))
        eps = number(eps_key, settings.get(eps_key, fixed_epsilon(settings.get("norm"))), float)
        findings = tuple(epsilon(eps, settings.get("norm")))
    return Plain(renamed, settings, modules, tuple(dropped), findings)


def _refuse(raw: Mapping[str, Any], modules: Collection[str], tp: int, folder: str) -> None:
    if (modules or raw.get("te_rowparallel")) and raw.get("gpt_j_residual") and tp > 1:
        raise Refused(f"{folder}: gpt_j_residual: {SUMS_TWICE} It cannot be converted.")
    if "mlp" in modules and raw.get("activation") == "geglu":
        raise Refused(
            f"{folder}: activation: Transformer Engine computes geglu with tanh, which neither "
            "the MLPs of GPT-NeoX nor those of transformers' Llama compute. It cannot be "
            "converted."
        )


SUMS_TWICE = (
    "with more than one tensor-parallel rank, the modules of Transformer Engine sum over the "
    "ranks, and GPT-NeoX then sums the result again. The output of a block is too large by a "
    "factor of the number of ranks, and no other program computes this model."
)


def _unused(tensors: Mapping[str, TensorRef]) -> list[str]:
    """Norms that trees before #1355 made, stored and never used."""
    if "mlp.layer_norm_weight" not in tensors:
        return []
    return [name for name in tensors if name.startswith("post_attention_layernorm.")]


def _drop_zeros(
    ranks: Sequence[dict[int, dict[str, TensorRef]]],
    names: Collection[str],
    dropped: list[Dropped],
    stored_as: Callable[[TensorRef], Iterable[TensorRef]],
) -> bool:
    """Take out biases that the yml denies; False, and they stay, where one isn't zero."""
    held = [(layer, t) for rank in ranks for layer, t in rank.items() if set(names) & set(t)]
    biases = (t[name] for _, t in held for name in names if name in t)
    if not all(is_zero(part) for bias in biases for part in stored_as(bias)):
        return False
    why = "all zeros: Transformer Engine always stores it, but the yml turns it off"
    for layer, tensors in held:
        for name in names:
            if tensors.pop(name, None) is not None:
                entry = Dropped(f"layer {layer}: {te_name(name)}", why)
                dropped += [entry] if entry not in dropped else []
    return True


def _mlp_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What LayerNormMLP computes: tanh-gelu always; its norm is never that of the attention."""
    settings: dict[str, Any] = {"gpt_j_tied": False} if raw.get("gpt_j_tied") else {}
    if (raw.get("activation") or "gelu") == "gelu":
        settings["bias_gelu_fusion"] = True
    if raw.get("activation") in GATED and raw.get("mlp_type"):
        settings["mlp_type"] = "regular"
    return settings


def epsilon_key(norm: object) -> str:
    """The yml's key of a norm's epsilon."""
    return "rms_norm_epsilon" if norm == "rmsnorm" else "layernorm_epsilon"


def fixed_epsilon(norm: object) -> float:
    """What TELayerNormMLP takes, whatever the yml says."""
    return 1e-8 if norm == "rmsnorm" else 1e-5


def epsilon(eps: float, norm: object) -> list[Finding]:
    """A finding where the two norms of a block don't have the same epsilon."""
    fixed = fixed_epsilon(norm)
    if eps == fixed:
        return []
    return [
        Finding(
            "te-epsilon",
            "warning",
            f"te_layernorm_mlp ignores {epsilon_key(norm)}: the norm before the MLP uses the "
            f"epsilon {fixed:g}, and the others use {eps:g}. The logits differ slightly from "
            "those of a model with one epsilon",
        )
    ]
