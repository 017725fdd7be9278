"""The model families, one declarative file each, used in both directions."""

from collections.abc import Mapping
from typing import Any

from neox_bridge.architectures.base import Architecture, Form
from neox_bridge.architectures.glm import ARCHITECTURE as GLM
from neox_bridge.architectures.gpt2 import ARCHITECTURE as GPT2
from neox_bridge.architectures.gpt_bigcode import ARCHITECTURE as GPT_BIGCODE
from neox_bridge.architectures.gpt_neox import ARCHITECTURE as GPT_NEOX
from neox_bridge.architectures.llama import ARCHITECTURE as LLAMA
from neox_bridge.architectures.mamba import ARCHITECTURE as MAMBA
from neox_bridge.architectures.mistral import ARCHITECTURE as MISTRAL
from neox_bridge.architectures.olmo import ARCHITECTURE as OLMO
from neox_bridge.architectures.opt import ARCHITECTURE as OPT
from neox_bridge.architectures.phi3 import ARCHITECTURE as PHI3
from neox_bridge.architectures.qwen2 import ARCHITECTURE as QWEN2
from neox_bridge.architectures.stablelm import ARCHITECTURE as STABLELM
from neox_bridge.architectures.starcoder2 import ARCHITECTURE as STARCODER2
from neox_bridge.errors import Refused

# Mamba first: its blocks ignore the MLP settings that identify the other families
ARCHITECTURES: tuple[Architecture, ...] = (
    MAMBA,
    GPT2,
    GPT_BIGCODE,
    GPT_NEOX,
    LLAMA,
    MISTRAL,
    QWEN2,
    OLMO,
    STABLELM,
    PHI3,
    STARCODER2,
    GLM,
    OPT,
)
_HEAD_BIAS = "its output layer has biases, which that of GPT-NeoX does not have"
_SCALED = (
    "it multiplies its embeddings by a factor, but not its output layer, which is tied to them"
)
# families that today's GPT-NeoX cannot run, and why (megatron/model/transformer.py); compared with
# transformers 5.24 (models/*/modeling_*.py)
CANNOT = {
    "qwen3": "it has separate norms for q and k, but use_qk_layernorm of GPT-NeoX is one norm for "
    "both (#1424 proposes separate ones, and #1436 a head_dim; neither is merged)",
    "olmo2": "its norms follow attention and MLP, and it has separate norms for q and k "
    "(discussed in #1408 and proposed in #1424; neither is merged)",
    "phi": _HEAD_BIAS,
    "gptj": _HEAD_BIAS,
    "codegen": _HEAD_BIAS,
    "cohere": "it multiplies its logits by logit_scale",
    "persimmon": "its activation is the square of relu, and it has separate norms for q and k",
    "nemotron": "its activation is the square of relu, and its norms add 1 to their weights",
    "bloom": "it normalizes its word embeddings",
    "biogpt": _SCALED,
    "xglm": _SCALED,
    "gemma": _SCALED,
    "gpt_neo": "it does not scale the attention scores, and some of its layers have a window",
}

_NAME_CHARACTERS = 80  # of a model_type that an error shows


def form_of(config: Mapping[str, Any]) -> Form | None:
    """The library whose format a config.json has; None for transformers."""
    forms = (form for architecture in ARCHITECTURES for form in architecture.forms)
    return next((form for form in forms if form.matches(config)), None)


def complete(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Convert a config.json to the keys of transformers.

    The original of another library is kept in it, under the name of the form.
    """
    form = form_of(config)
    if form is not None:
        config = {**form.read(config), form.name: dict(config)}
    for architecture in ARCHITECTURES:
        config = architecture.complete(config)
    return config


def for_hf(config: Mapping[str, Any]) -> Architecture:
    """The family of a config.json. Raises Refused for an unknown one."""
    for architecture in ARCHITECTURES:
        if config.get("model_type") == architecture.name:
            return architecture
    if reason := CANNOT.get(str(config.get("model_type"))):
        raise Refused(
            f"config.json: model_type {config['model_type']!r}: GPT-NeoX cannot represent this "
            f"model: {reason}. It cannot be converted."
        )
    known = ", ".join(a.name for a in ARCHITECTURES)
    if config.get("model_type") is None:
        raise Refused(
            "model_type is missing from config.json, so the family of the model is unknown. Add "
            f"it: this version converts {known}."
        )
    name = repr(config["model_type"])[:_NAME_CHARACTERS]
    raise Refused(
        f"config.json: model_type {name} is not supported. This version converts {known}."
    )


def for_neox(
    config: Mapping[str, Any], record: Mapping[str, Any] | None = None
) -> Architecture | None:
    """The family of a merged yml; None if transformers has no class for its settings.

    It is the first that has all settings, or the first whose norm, MLP and biases these are.

    record: the contents of neox_bridge.json. It distinguishes families that have the same settings
    in GPT-NeoX.
    """
    was = ((record or {}).get("config") or {}).get("model_type")
    by_record = sorted(ARCHITECTURES, key=lambda a: a.name != was)
    matching = [family for family in by_record if family.matches_neox(config)]
    exact = (family for family in matching if not family.refuse_neox_source(config))
    return next(exact, matching[0] if matching else None)
