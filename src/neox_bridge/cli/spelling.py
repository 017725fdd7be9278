"""Turns parameters in library messages, such as `tp=3`, into command-line options."""

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
