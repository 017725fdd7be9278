"""Whether two checkpoints are steps of one model: what may not differ between them."""

from collections.abc import Mapping
from dataclasses import dataclass

from neox_bridge.architectures.base import ModelConfig


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """A model without its weights, dtype and layout.

    settings: what decides what it computes, and its sizes. rows: of the vocabulary, without the
    padding that this tool added; padded: with all of it.
    """

    settings: Mapping[str, object]
    rows: int
    padded: int


def identity_of(family: str, config: ModelConfig, rows: int) -> ModelIdentity:
    """The identity of a model of these settings."""
    sizes = {f"{name} size": config.dims.get(name) for name in ("hidden", "ffn")}
    settings = {"family": family, **sizes, **config.meaning()}
    return ModelIdentity(settings, rows, config.dims["vocab"])


def differences(old: ModelIdentity, new: ModelIdentity) -> list[str]:
    """In words, what makes them two models; nothing where they can be steps of one.

    Another tensor-parallel size has other rows of padding: only a vocabulary that doesn't fit into
    the other one's rows is another.
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
