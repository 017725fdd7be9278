"""What ``--for`` names: a GPT-NeoX source tree, a date of GPT-NeoX, a version of transformers."""

import datetime
import os
import re

from neox_bridge.errors import BridgeError
from neox_bridge.frameworks.change import Change
from neox_bridge.frameworks.changes import change_named
from neox_bridge.frameworks.changes_transformers import CLASS_SINCE
from neox_bridge.frameworks.eras import ERAS, MERGED, changes_of, era_after, facts_after
from neox_bridge.frameworks.facts import TransformersFacts, TreeFacts
from neox_bridge.frameworks.keys import neox_keys
from neox_bridge.frameworks.source_tree import looks_like_tree, read_tree

Target = TreeFacts | TransformersFacts

# A version of transformers for each way in which it reads checkpoints; the newest is the last.
KNOWN_TRANSFORMERS = ("4.30", "4.48", "5.4", "5.24")
# What a shell offers: the versions of GPT-NeoX are the last of each span of its history.
NEOX_NAMES = ("today", *(f"neox@{era.name}" for era in ERAS), "neox:")
TRANSFORMERS_NAMES = (
    "transformers",
    *(f"transformers@{version}" for version in KNOWN_TRANSFORMERS),
)
# What a checkpoint's args hold, the same in all four trees (megatron/checkpointing.py)
ARGS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "max_position_embeddings",
    "make_vocab_size_divisible_by",
    "padded_vocab_size",
    "tokenizer_type",
    "model_parallel_size",
)
_HEX = re.compile(r"[0-9a-f]{7,40}")
_DATE = re.compile(r"\d{4}-\d\d(-\d\d)?")


def target_named(text: str) -> Target:
    """What ``--for TEXT`` names.

    ``neox:TREE`` (a folder), ``neox@2024-03`` or another date or a commit, ``today``,
    ``transformers@4.48``, ``transformers`` (the one installed here). Raises BridgeError.
    """
    if text.startswith("neox:"):
        return read_tree(os.path.expanduser(text.removeprefix("neox:")))
    if text == "transformers" or text.startswith("transformers@"):
        return _transformers(text.removeprefix("transformers").removeprefix("@"))
    if looks_like_tree(text):
        return read_tree(text)
    return _neox(text.removeprefix("neox@"), text)


def _neox(name: str, text: str) -> TreeFacts:
    if any(name == era.name for era in ERAS):
        return _tree(name, changes_of(name))
    if _HEX.fullmatch(name):
        for change in MERGED:
            if change.origin.sha.startswith(name):
                return _tree(name, _until(change.day))
        raise BridgeError(
            f"`era={text}`: this commit is not a known change of checkpoints, so its date is "
            "unknown. Name its date (neox@2024-05-01) or the tree (neox:FOLDER)."
        )
    if days := _days(name):
        first, last = days
        for change in MERGED:
            if not change.sets.keys() - {"deepspeed"} or not first <= change.day <= last:
                continue
            raise BridgeError(
                f"`era={text}`: {change.commit} changed checkpoints on {change.day}. Name a day "
                f"before or after it, or neox@{change.commit} for the tree that has the change."
            )
        return _tree(name, _until(first))
    known = ", ".join(f"neox@{era.name}" for era in ERAS)
    raise BridgeError(
        f"`era={text}`: unknown. Valid values: neox:FOLDER for a source tree, {known}, a date "
        "(neox@2024-05-01), a commit, transformers@VERSION, or transformers for the installed one. "
        "neox@ before a version, a date or a commit may be left out."
    )


def _until(day: str) -> tuple[Change, ...]:
    """The changes up to a day, itself included."""
    return tuple(change for change in MERGED if change.day <= day)


def _tree(name: str, changes: tuple[Change, ...]) -> TreeFacts:
    """The tree with these changes; its keys are those of the last tree of its era."""
    keys = neox_keys(era_after(changes))
    name = f"neox@{name}"
    facts = facts_after(changes)
    return TreeFacts(name, f"like {name}", args_checked=ARGS, keys=keys, **facts)


def _days(text: str) -> tuple[str, str] | None:
    """The first and the last day of a month, or a day twice; None if it is not a date."""
    month = len(text) == len("2024-05")
    first = f"{text}-01" if month else text
    try:
        datetime.date.fromisoformat(first)
    except ValueError:
        return None
    return (first, f"{text}-31" if month else first) if _DATE.fullmatch(text) else None


def _transformers(version: str) -> TransformersFacts:
    """The facts of a version; "" is the installed one."""
    if not version:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as installed

        try:
            version = installed("transformers")
        except PackageNotFoundError:
            raise BridgeError(
                "`era=transformers`: it is not installed here. Name a version: transformers@4.48."
            ) from None
    if re.match(r"\d+\.\d+", version) is None:
        raise BridgeError(f"`era=transformers@{version}`: not a version. Write transformers@4.48.")
    if version_number(version) < version_number(CLASS_SINCE["gpt_neox"]):
        raise BridgeError(
            f"`era=transformers@{version}`: GPTNeoXForCausalLM needs transformers "
            f"{CLASS_SINCE['gpt_neox']} or newer."
        )
    rope_parameters = _has(version, "hf-rope-parameters")
    return TransformersFacts(
        version=version,
        persistent_inv_freq=not _has(version, "hf-neox-inv-freq"),
        rope_parameters=rope_parameters,
        loses_rotary_pct=rope_parameters and not _has(version, "hf-rotary-pct-kept"),
    )


def _has(version: str, change_id: str) -> bool:
    return version_number(version) >= version_number(change_named(change_id).version)


def knows(facts: TransformersFacts, change_id: str) -> bool:
    """Whether a version of transformers has a change."""
    return _has(facts.version, change_id)


def has_class(facts: TransformersFacts, family: str) -> bool:
    """Whether a version of transformers has the class of a family."""
    since = CLASS_SINCE.get(family)
    return since is None or version_number(facts.version) >= version_number(since)


def version_number(version: str) -> tuple[int, int]:
    """(4, 48) of ``4.48.3``, to compare."""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def name_of(target: Target) -> str:
    """How ``--for`` spells a target."""
    if isinstance(target, TransformersFacts):
        return f"transformers@{target.version}"
    return target.name if target.name.startswith("neox@") else f"neox:{target.name}"


def words_for(target: Target) -> str:
    """A target for people, such as "GPT-NeoX 2024-03" or "GPT-NeoX at /home/me/gpt-neox"."""
    if isinstance(target, TransformersFacts):
        return f"transformers {target.version}"
    era = target.name.removeprefix("neox@")
    if era == target.name:
        return f"GPT-NeoX at {era}"
    return "today's GPT-NeoX" if era == "today" else f"GPT-NeoX {era}"
