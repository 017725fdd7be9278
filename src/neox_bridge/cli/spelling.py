"""The library speaks of parameters, such as `tp=3`; the command line shows them as its options."""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from neox_bridge.cli.options import FLAGS

if TYPE_CHECKING:
    from neox_bridge.findings import Finding

_PARAMETER = re.compile(r"`([a-z][a-z_]*)=([^`]*)`")
_OTHERS = {
    "target": "DST",
    "every_crc": "--crc",
    "hash_shared": "--hash",
    "workers": "--max-workers",
}
# the keys of JSON documents whose values are sentences
_PROSE = frozenset(
    {"error", "incomplete", "message", "note", "notes", "reason", "remedy", "text", "way_out"}
)


def flag(parameter: str) -> str:
    """The option of the command line that sets a parameter of the library."""
    return _OTHERS.get(parameter) or FLAGS.get(parameter, f"--{parameter.replace('_', '-')}")


def as_options(text: str) -> str:
    """The text with ``--tp 3`` for "`tp=3`", ``--tp`` for "`tp=`", ``--te`` for "`te=True`"."""
    return _PARAMETER.sub(_option, text) if "`" in text else text


def _option(match: re.Match[str]) -> str:
    option = flag(match[1])
    return option if match[2] in ("", "True") else f"{option} {match[2]}"


def findings_as_options(findings: "Iterable[Finding]") -> "tuple[Finding, ...]":
    """The findings with options of the command line in their texts."""
    return tuple(
        replace(one, message=as_options(one.message), remedy=as_options(one.remedy))
        for one in findings
    )


def document_as_options(value: object, prose: bool = False) -> object:
    """A JSON document with options of the command line in its messages; names stay as they are."""
    if isinstance(value, dict):
        return {key: document_as_options(part, key in _PROSE) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [document_as_options(part, prose) for part in value]
    return as_options(value) if prose and isinstance(value, str) else value
