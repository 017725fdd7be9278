"""What every family shares of a config.json: RoPE in both spellings, and common refusals."""

from collections.abc import Iterable, Mapping
from typing import Any

from neox_bridge.architectures.base import Refusal
from neox_bridge.findings import Finding


def rope_kind(raw: Mapping[str, Any]) -> str:
    """The kind of RoPE scaling in either spelling; "default" is none."""
    ropes = [raw.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    kinds = [str(rope.get("rope_type", rope.get("type", "default"))) for rope in ropes]
    return next((kind for kind in kinds if kind != "default"), "default")


def refuse_hf_common(
    raw: Mapping[str, Any], base: float, base_key: str, activations: Iterable[str]
) -> list[Refusal]:
    """What GPT-NeoX can't express of any family.

    base, base_key: of RoPE. activations: the names of hidden_act that it can, the default first.
    GPT-NeoX's RotaryEmbedding takes a base and a number of dimensions, nothing else
    (megatron/model/positional_embeddings.py); the base is an int (neox_arguments/neox_args.py).
    """
    found = []
    if (name := rope_kind(raw)) != "default":
        found.append(
            Refusal(
                "rope_scaling",
                f"GPT-NeoX has no RoPE scaling, and this model uses {name!r}",
                "add --ignore-key rope_scaling to go on without the scaling, at the model's "
                "original length",
            )
        )
    known = list(activations)
    if raw.get("hidden_act", known[0]) not in known:
        found.append(
            Refusal(
                "hidden_act",
                f"GPT-NeoX has no activation {raw['hidden_act']!r}, only {', '.join(known)}",
            )
        )
    if not base.is_integer():
        found.append(
            Refusal(
                base_key,
                f"GPT-NeoX takes whole numbers only, and this is {base}",
                "round it, if that is close enough for you, in config.json",
            )
        )
    if raw.get("quantization_config"):
        found.append(
            Refusal(
                "quantization_config",
                "GPT-NeoX has no quantized weights",
                "convert the original, unquantized model",
            )
        )
    return found


def stored_biases(raw: Mapping[str, Any], biases: Mapping[str, tuple[bool, bool]]) -> list[Finding]:
    """The findings for biases that the files hold and config.json denies.

    biases: by the key, what transformers takes where it is missing, and whether the files hold
    them. transformers loads such a folder without them, with no more than a warning.
    """
    return [
        Finding(
            "biases-denied",
            "warning",
            f"config.json {f'says {key}: false' if key in raw else f'has no {key}'}, and the files "
            "hold these biases: transformers computes without them, and they are converted",
            f"set {key}: true in config.json if the model was trained with them, or remove them",
        )
        for key, (default, there) in biases.items()
        if there and not raw.get(key, default)
    ]


def whole_number(value: float) -> float | int:
    """10000 rather than 10000.0, as config files have it."""
    return int(value) if float(value).is_integer() else value
