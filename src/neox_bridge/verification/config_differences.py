"""Compares the configs of two repositories of any family, key by key."""

from collections.abc import Iterator, Mapping
from typing import Any

from neox_bridge.findings import Finding
from neox_bridge.frameworks.unknown_keys import words_of
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.stored_model import StoredModel
from neox_bridge.wording import plain

# keys that name the origin, the training, the way to run or the results to return
_HARMLESS = frozenset(
    """_name_or_path _commit_hash transformers_version torch_dtype dtype use_cache return_dict
    output_attentions output_hidden_states output_router_logits torchscript use_bfloat16
    tokenizer_class task_specific_params finetuning_task problem_type id2label label2id
    _attn_implementation _attn_implementation_autoset attn_implementation chunk_size_feed_forward
    gradient_checkpointing inference_mode output_scores return_dict_in_generate""".split()
)
_HARMLESS_WORDS = frozenset("dropout pdrop initializer init loss".split())
_ABSENT = object()
_CHARACTERS = 60  # of a value in a message


def config_findings(source: StoredModel, target: StoredModel) -> list[Finding]:
    """An error for each key by which the configs of a component make different models."""
    targets = {component.name: component for component in target.components}
    findings: list[Finding] = []
    for component in source.components:
        if (other := targets.get(component.name)) is None:
            continue  # its tensors differ
        where = f"{component.name}: " if component.name else ""
        for key, first, second in _differences(_spelled(component.config), _spelled(other.config)):
            findings.append(_finding(f"{where}{plain(key)}", first, second))
    return findings


def config_values(model: Checkpoint | StoredModel) -> dict[str, str]:
    """The values that may change the model, as text, by key: dotted below blocks."""
    if isinstance(model, Checkpoint):
        return dict(_values(_spelled(model.raw), ""))
    values: dict[str, str] = {}
    for component in model.components:
        above = f"{component.name}: " if component.name else ""
        values |= _values(_spelled(component.config), above)
    return values


def _values(config: Mapping[str, Any], above: str) -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if is_harmless(key):
            continue
        if isinstance(value, dict) and value:
            inside = _spelled(value) if key.endswith("_config") else value
            yield from _values(inside, f"{above}{plain(key)}.")
        else:
            yield f"{above}{plain(key)}", plain(repr(_number(value)))


def _number(value: Any) -> Any:
    """The value; of 10000.0, and of those in a list, the integer, which means the same."""
    if isinstance(value, list):
        return [_number(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _finding(key: str, first: Any, second: Any) -> Finding:
    if first is not _ABSENT and second is not _ABSENT:
        text = f"{key}: the source has {_shown(first)}, the target {_shown(second)}"
        return Finding("config-differs", "error", text, "correct config.json of the target")
    have, lack, value = (
        ("source", "target", first) if second is _ABSENT else ("target", "source", second)
    )
    return Finding(
        "config-differs",
        "error",
        f"{key}: the {have} has {_shown(value)}, and the key is missing in the {lack}, so the "
        "default of the model's class counts there",
        "write the key into both configs",
    )


def _differences(
    first: Mapping[str, Any], second: Mapping[str, Any], above: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Keys whose values differ, dotted below blocks, with both values."""
    for key in sorted({*first, *second}):
        a, b = first.get(key, _ABSENT), second.get(key, _ABSENT)
        if _same(a, b) or is_harmless(key):
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            if key.endswith("_config"):  # of a part of the model, such as text_config
                a, b = _spelled(a), _spelled(b)
            yield from _differences(a, b, f"{above}{key}.")
        else:
            yield f"{above}{key}", a, b


def is_harmless(key: str) -> bool:
    """Whether a key of config.json has no effect on what the model computes."""
    return key in _HARMLESS or not _HARMLESS_WORDS.isdisjoint(words_of(key))


def _spelled(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with RoPE as transformers 5 writes it: in ``rope_parameters``."""
    rope, theta = config.get("rope_scaling"), config.get("rope_theta")
    merged = config.get("rope_parameters")
    if not isinstance(merged, dict | None) or not isinstance(rope, dict | None):
        return config
    if theta is None and rope is None and merged is None:
        return config
    old = dict(rope or {})
    if "type" in old:
        old.setdefault("rope_type", old.pop("type"))
    old |= {} if theta is None else {"rope_theta": theta}
    merged = {"rope_type": "default"} | (merged or {})
    contradict = any(key in merged and not _same(merged[key], old[key]) for key in old)
    if contradict and config.get("rope_parameters") is not None:
        return {**config, "rope_parameters": merged}  # versions of transformers read it differently
    rest = {k: v for k, v in config.items() if k not in ("rope_scaling", "rope_theta")}
    return {**rest, "rope_parameters": merged | old}


def _same(first: Any, second: Any) -> bool:
    """Whether two JSON values are equal; a number and a truth value are not."""
    if isinstance(first, bool) != isinstance(second, bool):
        return False
    return bool(first == second)


def _shown(value: Any) -> str:
    return shortened(plain(repr(value)))


def shortened(text: str) -> str:
    """The start of a value that is long."""
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]}…"
