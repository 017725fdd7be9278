"""The families of models, one declarative file each, used in both directions."""

from collections.abc import Mapping
from typing import Any

from neox_bridge.architectures.base import Architecture
from neox_bridge.architectures.gpt_neox import ARCHITECTURE as GPT_NEOX
from neox_bridge.errors import Refused

ARCHITECTURES: tuple[Architecture, ...] = (GPT_NEOX,)


def for_hf(config: Mapping[str, Any]) -> Architecture:
    """The family of a config.json. Raises Refused for one that isn't known."""
    for architecture in ARCHITECTURES:
        if config.get("model_type") == architecture.model_type:
            return architecture
    known = ", ".join(a.model_type for a in ARCHITECTURES)
    raise Refused(
        f"config.json: model_type {config.get('model_type')!r} isn't a family that this version "
        f"converts, only {known}."
    )


def for_neox(config: Mapping[str, Any]) -> Architecture:
    """The family of a merged yml. Raises Refused for one that isn't known."""
    for architecture in ARCHITECTURES:
        if architecture.matches_neox(config):
            return architecture
    raise Refused(
        f"This GPT-NeoX model (norm: {config.get('norm', 'layernorm')}, activation: "
        f"{config.get('activation', 'gelu')}, mlp_type: {config.get('mlp_type', 'regular')}) is of "
        "a family that this version doesn't convert; it converts gpt_neox (layernorm, plain MLP)."
    )
