"""Decides whether a version of transformers loads a Hugging Face repository of any family.

Only files and settings are judged, not what the model computes. The rules are those of the classes
that all families share: configuration_utils.py, modeling_rope_utils.py, tokenization_utils_base.py
and models/auto of transformers 4.30 to 5.24.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from neox_bridge.doctor.repository import Repository
from neox_bridge.doctor.repository_settings import rope_groups, shown
from neox_bridge.doctor.verdict import Case, Verdict, case, failure, verdict
from neox_bridge.findings import Details, Finding
from neox_bridge.frameworks.change import RELEASED
from neox_bridge.frameworks.changes import change_named
from neox_bridge.frameworks.facts import TransformersFacts
from neox_bridge.frameworks.model_types import class_spans, lacks_class
from neox_bridge.frameworks.targets import Target, knows, name_of, version_number, words_for

_NAMES_TYPE = (4, 42)  # versions from then on print the model type that they do not know
_TOKENIZERS_BACKEND = "TokenizersBackend"  # the class that 5.0 writes for every fast tokenizer
_EXTRA_TOKENS_BY_NAME = ((4, 48), (5, 0))  # the versions that need a dict of extra_special_tokens


def judge_repository(
    repository: Repository, findings: Iterable[Finding], target: Target
) -> Verdict:
    """Whether a target loads the repository. findings: those that do not depend on the target."""
    cases = [Case(finding) for finding in (*repository.damage, *findings)]
    if isinstance(target, TransformersFacts):
        own = [*_not_converted(repository), *_by_version(repository, target)]
    else:
        own = [_no_neox(repository)]
    own = [_written_by(repository), *own]
    result = verdict(name_of(target), [*own, *cases], words_for(target))
    if not any(one.prints for one in result.cases if one.fails):
        result = replace(result, message="")  # what the version prints is not known
    return result


def _written_by(repository: Repository) -> Case:
    version = repository.model.raw.get("transformers_version")
    tool = f"transformers {shown(version)} (config.json)" if version else "a tool that left no name"
    return case("written-by", "info", f"written by {tool}")


def _not_converted(repository: Repository) -> Iterator[Case]:
    """Why no family is used."""
    path, reason = repository.model.path, repository.model.reason
    if reason:
        name = os.path.basename(path)
        if reason.startswith(f"{name} "):  # the first word of a sentence gets a capital letter
            reason = path + reason.removeprefix(name)
        yield case(
            "not-converted",
            "info",
            "neox-bridge cannot convert this repository",
            details=Details(why=reason),
        )


def _no_neox(repository: Repository) -> Case:
    """GPT-NeoX reads its own files only, and these cannot be converted."""
    path = repository.model.path
    return failure(
        "other-kind",
        "GPT-NeoX cannot load this Hugging Face repository, and it cannot be converted",
        "use a model of one of the families that neox-bridge families lists",
        f"Unable to find latest file at {path}/latest, if trying to load latest checkpoint please "
        "ensure this file exists or pass an explicit checkpoint tag when loading a checkpoint.",
        details=Details(why=repository.model.reason or "Its files are damaged or missing"),
    )


def _by_version(repository: Repository, facts: TransformersFacts) -> Iterator[Case]:
    raw = repository.model.raw
    yield from _class(repository, facts)
    yield from _writer(raw, facts)
    yield from _spellings(raw, facts)
    yield from _tokenizer(repository.settings.get("tokenizer_config.json", {}), facts)
    files = repository.model.files
    if files and all(file.endswith(".bin") for file in files) and knows(facts, "hf-torch-load"):
        yield _by_change(
            "hf-torch-load",
            "info",
            f"the weights are pickles, which transformers {facts.version} reads only with torch "
            "2.6 or newer",
        )


def _class(repository: Repository, facts: TransformersFacts) -> Iterator[Case]:
    """Whether the version has a class for the model."""
    raw = repository.model.raw
    model_type, code = raw.get("model_type"), raw.get("auto_map")
    if not isinstance(model_type, str):
        return
    lacks = lacks_class(model_type, facts)
    if code and lacks:
        yield case(
            "remote-code",
            "warning",
            f"transformers {facts.version} has no class for model_type {shown(model_type)}: it "
            "loads the model only with trust_remote_code=True",
            "read the code in the repository before you run it",
            details=Details(
                wrong=_code(code),
                why="auto_map in config.json names code that transformers downloads and runs. "
                "neox-bridge never does",
            ),
        )
    elif code:
        yield case(
            "remote-code",
            "info",
            f"config.json has auto_map ({', '.join(_code(code))}), custom code that transformers "
            "runs only with trust_remote_code=True",
        )
    elif lacks:
        spans = class_spans(model_type)
        since = f"transformers {spans[-1][0]}" if spans else ""
        prints = f"KeyError: {model_type!r}"
        if version_number(facts.version) >= _NAMES_TYPE:
            prints = (
                "ValueError: The checkpoint you are trying to load has model type "
                f"`{model_type}` but Transformers does not recognize this architecture."
            )
        why = f"{since} has one" if since else "No known version of transformers has one"
        yield failure(
            "class-unknown",
            f"transformers {facts.version} has no class for model_type {shown(model_type)}",
            f"use {since} or newer" if since else "check model_type in config.json",
            prints,
            details=Details(wrong=(f"model_type: {shown(model_type)}",), why=why),
        )


def _code(code: object) -> tuple[str, ...]:
    values = code.values() if isinstance(code, Mapping) else ()
    return tuple(shown(value) for value in values)


def _writer(raw: Mapping[str, Any], facts: TransformersFacts) -> Iterator[Case]:
    """A config.json of a newer version than the one that reads it."""
    version = raw.get("transformers_version")
    if not isinstance(version, str) or not re.match(r"\d+\.\d+", version):
        return
    newest = list(RELEASED)[-1]
    unknown = version_number(version) > version_number(newest)
    if version_number(version) > version_number(facts.version):
        text = (
            f"config.json was written by transformers {shown(version)}, and {facts.version} is "
            "older"
        )
        if unknown:
            text += f". The newest version that neox-bridge knows is {newest}"
        yield case(
            "written-by-newer",
            "warning" if unknown else "info",
            text,
            f"use transformers {shown(version)} or newer if the model computes nonsense",
            details=Details(
                wrong=(f"transformers_version: {shown(version)}",),
                why="A version ignores keys that it does not know, without a message",
            ),
        )


def _spellings(raw: Mapping[str, Any], facts: TransformersFacts) -> Iterator[Case]:
    """Settings that only newer versions read, or only older ones."""
    if "dtype" in raw and "torch_dtype" not in raw and not knows(facts, "hf-dtype-key"):
        yield _by_change(
            "hf-dtype-key",
            "info",
            f"config.json says dtype, which transformers {facts.version} does not read: it takes "
            "the dtype of the tensors",
            "add torch_dtype with the same value to config.json",
            ("config.json: torch_dtype",),
        )
    groups = rope_groups(raw)
    ours = {key: value for one in groups for key, value in one.items()}
    means = ours.get("rope_type", "default") != "default" or ours.get("rope_theta") is not None
    if groups and means and not facts.rope_parameters:
        absent = [key for key in ("rope_theta",) if key in ours and key not in raw]
        if ours.get("rope_type", "default") != "default" and not raw.get("rope_scaling"):
            absent.append("rope_scaling")
        if absent:
            yield _by_change(
                "hf-rope-parameters",
                "warning",
                f"config.json has only rope_parameters, which transformers {facts.version} does "
                "not read: it computes with the rotary settings that its class has by default",
                f"add {' and '.join(absent)} with the same values to config.json, or use 5.0 or "
                "newer",
                tuple(f"config.json: {key}" for key in absent),
            )
    scaling = raw.get("rope_scaling")
    old_form = isinstance(scaling, Mapping) and "type" in scaling and len(scaling) == 2
    if isinstance(scaling, Mapping) and not old_form and not knows(facts, "hf-llama3-rope"):
        yield _by_change(
            "hf-llama3-rope",
            "warning",
            "rope_scaling in config.json is not a dictionary of type and factor, which is all that "
            f"transformers {facts.version} accepts: most classes stop with a ValueError",
            "use transformers 4.43 or newer",
            ("rope_scaling: type",) if "type" not in scaling else (),
        )


def _tokenizer(config: Mapping[str, Any], facts: TransformersFacts) -> Iterator[Case]:
    """A tokenizer_config.json that a version cannot read."""
    number = version_number(facts.version)
    if config.get("tokenizer_class") == _TOKENIZERS_BACKEND and number < (5, 0):
        yield case(
            "tokenizer-class",
            "warning",
            f"tokenizer_config.json says tokenizer_class: {_TOKENIZERS_BACKEND}, which "
            f"transformers {facts.version} does not know",
            "set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json. Every "
            "version reads it",
            f"ValueError: Tokenizer class {_TOKENIZERS_BACKEND} does not exist or is not currently "
            "imported.",
            details=Details(
                wrong=(f"tokenizer_class: {_TOKENIZERS_BACKEND}",),
                why="transformers 5.0 and newer write this class, and older versions do not have "
                "it",
            ),
        )
    first, end = _EXTRA_TOKENS_BY_NAME
    if isinstance(config.get("extra_special_tokens"), list) and first <= number < end:
        yield case(
            "tokenizer-extra-tokens",
            "warning",
            "extra_special_tokens in tokenizer_config.json is a list, and transformers "
            f"{facts.version} needs a dictionary",
            "rename the key to additional_special_tokens, which every version reads as a list",
            "AttributeError: 'list' object has no attribute 'keys'",
            details=Details(
                wrong=("tokenizer_config.json: extra_special_tokens",),
                why="transformers 5.0 and newer write a list. Versions from 4.48 to 4.57 read "
                "names and tokens from it",
            ),
        )


def _by_change(
    name: str, severity: Any, message: str, remedy: str = "", missing: tuple[str, ...] = ()
) -> Case:
    """A case that a change of transformers explains."""
    change = change_named(name)
    details = Details(missing=missing, why=change.title, more=(change.link,))
    return case(name.removeprefix("hf-"), severity, message, remedy, details=details)
