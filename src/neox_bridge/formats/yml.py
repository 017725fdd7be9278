"""Reads, merges and writes yml files as GPT-NeoX does."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

from neox_bridge.errors import BridgeError
from neox_bridge.findings import Finding
from neox_bridge.formats.file_kinds import refuse_misplaced
from neox_bridge.stores.paths import open_file

if TYPE_CHECKING:
    import yaml

_MOST_BYTES = 1 << 20
_MOST_EVENTS = 40_000  # of the parser: one for a value, two for a list or a mapping
_DEPTH = 32
_WIDE = 10**9  # characters, so that values stay on one line
_DIGITS = 40  # of a number
_NUMBER = re.compile(r"[-+]?(0x[0-9a-fA-F_]+|[0-9_:.]+)")


@dataclass(frozen=True, slots=True)
class DuplicateKey:
    """A key in two yml files of a run, or twice in one file in two spellings.

    Attributes:
        key: The key with underscores.
        first: The name of the first file.
        second: The name of the second file, whose value counts.
        values: Both values.
        refused: Whether GPT-NeoX refuses it. It looks for the second key as it is spelled among the
            keys with underscores (megatron/neox_arguments/arguments.py, from_ymls), so a key with a
            ``-`` replaces the first one silently.
    """

    key: str
    first: str
    second: str
    values: tuple[Any, Any]
    refused: bool


def read_yml(path: str) -> dict[str, Any]:
    """The keys of a yml, with underscores. Raises BridgeError, with the line, if it is damaged."""
    return {key.replace("-", "_"): value for key, value in _read_spelled(path).items()}


def _read_spelled(path: str) -> dict[str, Any]:
    with open_file(path) as file:
        return parse_yml(file.read(_MOST_BYTES + 1), path)


def parse_yml(raw: bytes, path: str) -> dict[str, Any]:
    """The keys of a yml in its own spelling. path: for messages.

    Refuses tags, because only plain values are read, aliases, because they can become huge, and
    files that are deeper or longer than any config.
    """
    import yaml

    if len(raw) > _MOST_BYTES:
        raise BridgeError(
            f"{path} is larger than {_MOST_BYTES >> 20} MiB, so it cannot be a config file."
        )
    refuse_misplaced(path, raw)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text = raw.decode("utf-8")
        if (problem := _problem(text, loader)) is not None:
            raise BridgeError(f"{path} {problem}.")
        value = yaml.load(text, Loader=loader)  # the safe loader
    except UnicodeDecodeError:
        raise BridgeError(f"{path} is not a text file.") from None
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        what = getattr(error, "problem", None) or str(error)
        raise BridgeError(
            f"{path}{line}: not valid YAML ({what[:120]}). Correct the file. GPT-NeoX cannot "
            "read it either."
        ) from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BridgeError(f"{path} is not a YAML file of keys and values.")
    plain: dict[str, Any] = _plain(value, path)
    return plain


def _problem(text: str, loader: Any) -> str | None:
    """The first part of a text that no config has. It is found before any value is built."""
    import yaml

    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=loader)):
        if count > _MOST_EVENTS:
            return "contains more values than any config file"
        if isinstance(event, yaml.AliasEvent):
            return "uses aliases (*name), which no GPT-NeoX config needs"
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent) and _is_long_number(event):
            return f"contains a number of {len(event.value):,} characters"
        if depth > _DEPTH:
            return "is nested more deeply than any config file"
    return None


def _is_long_number(event: "yaml.ScalarEvent") -> bool:
    """Whether yaml would read a text as a number that is too long, also in base 60."""
    return len(event.value) > _DIGITS and _NUMBER.fullmatch(event.value) is not None


def _plain(value: Any, path: str) -> Any:
    """A value of the kinds of JSON, with a text for a date. Its keys are printable.

    Raises BridgeError for bytes, sets and pairs, also as keys.
    """
    if isinstance(value, dict):
        return {_key(key, path): _plain(entry, path) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry, path) for entry in value]
    if isinstance(value, date):
        return value.isoformat()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise BridgeError(
        f"{path} contains a value of the type {type(value).__name__}. A config contains only "
        "plain values."
    )


def _key(key: object, path: str) -> str:
    text = str(_plain(key, path)) if not isinstance(key, dict | list) else ""
    if not text.isprintable() or not 0 < len(text) <= 200:
        raise BridgeError(
            f"{path} has the key {text[:60]!r}, which cannot be the name of a setting."
        )
    return text


def merge_ymls(paths: Sequence[str]) -> tuple[dict[str, Any], list[DuplicateKey]]:
    """Merge yml files in the order of their names. Also returns the keys that are in two files."""
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    duplicates = []
    for path in sorted(paths, key=os.path.basename):
        name = os.path.basename(path)
        for spelled, value in _read_spelled(path).items():
            key = spelled.replace("-", "_")
            if key in merged:
                values = (merged[key], value)
                duplicates.append(DuplicateKey(key, origin[key], name, values, spelled == key))
            merged[key], origin[key] = value, name
    return merged, duplicates


def duplicate_finding(duplicate: DuplicateKey) -> Finding:
    """The finding for a key in two files."""
    old, new = duplicate.values
    where = f"in {duplicate.first} and {duplicate.second}"
    if duplicate.first == duplicate.second:
        where = f"twice in {duplicate.first}, spelled with - and with _"
    same = "to the same value"
    if old != new:
        same = f"to {_shown(old)} and to {_shown(new)}; the second value is used"
    does = "rejects duplicate keys" if duplicate.refused else "silently uses the second value"
    return Finding(
        "yml-key-twice",
        "warning",
        f"{duplicate.key} is set {where}, {same}",
        f"remove one of them: GPT-NeoX {does}",
        subject="duplicate keys",
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def dump_yml(sections: Sequence[tuple[str, Mapping[str, Any]]]) -> bytes:
    """A yml of sections. Each has a comment, and each key has one line."""
    parts = []
    for comment, values in sections:
        lines = [f"# {line}\n" for line in comment.splitlines()]
        parts.append("".join(lines) + "".join(_line(*item) for item in values.items()))
    return "\n".join(parts).encode()


def _line(key: str, value: object) -> str:
    import yaml

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    if isinstance(value, dict | list):
        flow = yaml.dump(value, None, dumper, sort_keys=False, default_flow_style=True, width=_WIDE)
        return f"{key}: {flow}"
    line: str = yaml.dump({key: value}, None, dumper, default_flow_style=False, width=_WIDE)
    return line
