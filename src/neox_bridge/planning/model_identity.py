"""Decides whether two checkpoints can be steps of one model."""

from collections.abc import Mapping
from dataclasses import dataclass

from neox_bridge.architectures.base import ModelConfig


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """The properties of a model that do not depend on its weights, dtype and layout.

    Attributes:
        settings: Its sizes, and the settings that change what it computes.
        rows: The rows of the vocabulary without the padding that neox-bridge added.
        padded: The rows with all padding.
    """

    settings: Mapping[str, object]
    rows: int
    padded: int


def identity_of(family: str, config: ModelConfig, rows: int) -> ModelIdentity:
    """The identity of a model. rows: see ``ModelIdentity``."""
    sizes = {f"{name} size": config.dims.get(name) for name in ("hidden", "ffn")}
    settings = {"family": family, **sizes, **config.meaning()}
    return ModelIdentity(settings, rows, config.dims["vocab"])


def differences(old: ModelIdentity, new: ModelIdentity) -> list[str]:
    """The differences, in words, if two checkpoints are different models; empty otherwise.

    The padding depends on the tensor-parallel size. The vocabularies are different only if one of
    them does not fit into the rows of the other.
    """
    keys = sorted({*old.settings, *new.settings})
    lines = [
        f"{key}: {old.settings.get(key)} there, {new.settings.get(key)} here"
        for key in keys
        if old.settings.get(key) != new.settings.get(key)
    ]
    if max(old.rows, new.rows) > min(old.padded, new.padded):
        lines.append(f"vocabulary rows: {old.rows} there, {new.rows} here")
    return lines
