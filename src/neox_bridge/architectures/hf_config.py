"""What all families share of config.json: RoPE in both spellings, and common refusals."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from neox_bridge.architectures.base import Architecture, ModelConfig, Presence, Refusal
from neox_bridge.architectures.heads import SCORE
from neox_bridge.architectures.neox_config import Keys, number
from neox_bridge.findings import Finding

# the dimensions that config.json states, by their usual keys
_SIZES = {"hidden_size": "hidden", "intermediate_size": "ffn", "vocab_size": "vocab"}


def hf_sizes(architecture: Architecture, config: ModelConfig) -> dict[str, tuple[str, int]]:
    """The dimensions that config.json states and their sizes there, by their keys in this family.

    Learned positions may have more rows than config.json says.
    """
    sizes = {key: (dim, config.dims[dim]) for key, dim in _SIZES.items()}
    if "positions" in config.dims:
        sizes["max_position_embeddings"] = ("positions", config.max_positions)
    return {architecture.hf_keys.get(key, key): size for key, size in sizes.items()}


def rope_kind(raw: Mapping[str, Any]) -> str:
    """The kind of RoPE scaling in either spelling. "default" means none."""
    ropes = [raw.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    kinds = [str(rope.get("rope_type", rope.get("type", "default"))) for rope in ropes]
    return next((kind for kind in kinds if kind != "default"), "default")


def refuse_hf_common(
    raw: Mapping[str, Any],
    base: float,
    base_key: str,
    activations: Iterable[str],
    act_key: str = "hidden_act",
) -> list[Refusal]:
    """Refuse what GPT-NeoX does not support in any family.

    RotaryEmbedding of GPT-NeoX has only a base and a number of dimensions
    (megatron/model/positional_embeddings.py), and the base is an int (neox_arguments/neox_args.py).

    base, base_key: of RoPE. activations: the supported values of ``act_key``, the default first.
    """
    scaling, activation, known = rope_kind(raw), raw.get(act_key), list(activations)
    checks = (
        (
            scaling != "default",
            "rope_scaling",
            f"GPT-NeoX does not support RoPE scaling, but this model uses {scaling!r}",
            "to convert without the scaling, at the original length of the model, add "
            "`ignore_keys=rope_scaling`",
        ),
        (
            raw.get(act_key, known[0]) not in known,
            act_key,
            f"GPT-NeoX does not support the activation {activation!r}, only {', '.join(known)}",
            "",
        ),
        (
            not base.is_integer(),
            base_key,
            f"GPT-NeoX accepts only whole numbers, but this is {base}",
            "if that is close enough for you, round it in config.json",
        ),
        *(
            (
                bool(raw.get(key)),
                key,
                "GPT-NeoX does not support quantized weights",
                "convert the original, unquantized model",
            )
            for key in ("quantization_config", "compression_config")
        ),
    )
    return [Refusal(key, why, way_out) for applies, key, why, way_out in checks if applies]


def hf_fields(
    raw: Mapping[str, Any],
    dims: Mapping[str, int],
    presence: Presence,
    ids: tuple[int | None, int | None],
) -> dict[str, Any]:
    """The fields of ``ModelConfig`` that all families with attention read alike from config.json.

    ids: the defaults of bos_token_id and eos_token_id.
    """
    return {
        "dims": dict(dims),
        "tied_embeddings": bool(raw.get("tie_word_embeddings")) and not presence.has(SCORE),
        "reward": presence.has(SCORE),
        "dtype": presence.dtype,
        "bos_token_id": raw.get("bos_token_id", ids[0]),
        "eos_token_id": raw.get("eos_token_id", ids[1]),
        "initializer_range": raw.get("initializer_range", 0.02),
    }


def hf_settings(
    keys: Keys, config: ModelConfig, names: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """The keys of config.json that all families have.

    keys: the table of the family. A row with the key "" is not in config.json. names: see
    ``Architecture.hf_keys``.
    """
    return {
        **{hf_key: getattr(config, name) for name, _, hf_key, *_ in keys if hf_key},
        **{names.get(key, key): config.dims[dim] for key, dim in _SIZES.items()},
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "use_cache": True,
        "torch_dtype": config.dtype,
        "dtype": config.dtype,
    }


def embedding_dropout(
    raw: Mapping[str, Any], name: str, key: str, default: float = 0.0
) -> list[Finding]:
    """The finding for a dropout that the class of transformers does not apply to the embeddings.

    GPT-NeoX uses hidden_dropout for them too (megatron/model/word_embeddings.py). name: the family.
    default: of ``key``.
    """
    value = number(key, default if raw.get(key) is None else raw[key], float)
    if not value:
        return []
    says = f"config.json sets {key}: {value:g}"
    if key not in raw:
        says = f"config.json does not set {key}, which is {value:g} by default"
    return [
        Finding(
            "embedding-dropout",
            "warning",
            f"{says}. {name} in transformers does not apply it to the embeddings, but GPT-NeoX "
            f"does. The yml sets hidden_dropout: {value:g}",
            "if you train the model further with another dropout, change hidden_dropout",
        )
    ]


def stored_biases(raw: Mapping[str, Any], biases: Mapping[str, tuple[bool, bool]]) -> list[Finding]:
    """The findings for biases in the files that contradict config.json.

    biases: by the key, what transformers takes where it is missing, and whether the files hold
    them. transformers loads such a folder without them, with no more than a warning.
    """
    return [
        Finding(
            "biases-denied",
            "warning",
            f"config.json {f'says {key}: false' if key in raw else f'has no {key}'}, but the "
            "files contain these biases. transformers ignores them. They are converted",
            f"if the model was trained with them, set {key}: true in config.json. Otherwise "
            "remove them",
        )
        for key, (default, there) in biases.items()
        if there and not raw.get(key, default)
    ]


def whole_number(value: float) -> float | int:
    """A whole number as an int, as config files write it."""
    return int(value) if float(value).is_integer() else value
