"""GPT-NeoX's yml files: read as it reads them, several merged, and written."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.findings import Finding

_MOST = 4 << 20


def read_yml(path: str) -> dict[str, Any]:
    """One yml's keys, with underscores. Raises BridgeError, with the line, for a broken one.

    Tags are refused: only plain values are read. Aliases are too, since they can blow up.
    """
    import yaml

    if not os.path.isfile(path):
        raise BridgeError(f"{path} is missing.")
    if os.path.getsize(path) > _MOST:
        raise BridgeError(f"{path} is larger than {_MOST >> 20} MiB: that isn't a config.")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=loader)):
            raise BridgeError(f"{path} has aliases (*name), which no GPT-NeoX config needs.")
        value = yaml.load(text, Loader=loader)  # the safe loader
    except UnicodeDecodeError:
        raise BridgeError(f"{path} isn't a text file.") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        what = getattr(error, "problem", None) or str(error)[:120]
        raise BridgeError(
            f"{path}{line}: not valid yml ({what}). Correct it; GPT-NeoX can't read it either."
        ) from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BridgeError(f"{path} isn't a yml of keys and values.")
    return {str(key).replace("-", "_"): entry for key, entry in value.items()}


def merge_ymls(paths: Sequence[str]) -> tuple[dict[str, Any], list[Finding]]:
    """Several yml files as one, in the order of their names; a key in two of them is a finding."""
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    findings = []
    for path in sorted(paths, key=os.path.basename):
        name = os.path.basename(path)
        for key, value in read_yml(path).items():
            if key in merged:
                same = (
                    "with the same value"
                    if merged[key] == value
                    else (f"as {merged[key]!r} and {value!r}; the latter is taken")
                )
                findings.append(
                    Finding(
                        "yml-key-twice",
                        "warning",
                        f"{key} stands in {origin[key]} and {name}, {same}",
                        "GPT-NeoX refuses a key that stands in two files: remove one",
                    )
                )
            merged[key], origin[key] = value, name
    return merged, findings


def dump_yml(sections: Sequence[tuple[str, Mapping[str, Any]]]) -> bytes:
    """A yml of sections, each under its comment, one line a key."""
    parts = []
    for comment, values in sections:
        lines = [f"# {line}\n" for line in comment.splitlines()]
        parts.append("".join(lines) + "".join(_line(*item) for item in values.items()))
    return "\n".join(parts).encode()


def _line(key: str, value: object) -> str:
    import yaml

    if isinstance(value, dict | list):
        flow = yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=10**9)
        return f"{key}: {flow}"
    return yaml.safe_dump({key: value}, default_flow_style=False, width=10**9)
