"""The options of ``convert`` and ``batch``, with the checks that need no checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from neox_bridge.cli.command import given
from neox_bridge.errors import UsageError

if TYPE_CHECKING:
    from neox_bridge.cli.options import Details
    from neox_bridge.frameworks.facts import TransformersFacts
    from neox_bridge.layouts.record_file import HashName
    from neox_bridge.planning.options import Options

_LEAVE_OUT = "Leave one of them out."
_HASHES: dict[str, HashName | None] = {"xxh3": "xxh3_128", "sha256": "sha256", "none": None}


@dataclass(frozen=True)
class Conversion:
    """The requested conversion.

    Attributes:
        version: The transformers version of ``--for``, if any.
        given: Names of the options on the command line.
    """

    options: Options
    details: Details
    version: TransformersFacts | None
    given: frozenset[str]

    @property
    def masters(self) -> bool:
        """Whether the optimizer's master weights are read."""
        return self.details.weights == "masters"

    @property
    def hash_name(self) -> HashName | None:
        """The hash of every file."""
        return _HASHES[self.details.hash_name or "xxh3"]


def conversion_of(options: Options, details: Details) -> Conversion:
    """The requested conversion. Raises UsageError for options that contradict each other."""
    version: Any = options.era if hasattr(options.era, "version") else None
    names = frozenset(given())
    if version is not None:
        if options.to == "neox":
            raise UsageError(["era"], "transformers does not read a GPT-NeoX target", _LEAVE_OUT)
        if options.format not in (None, "transformers"):
            reason = f"transformers does not read --format {options.format}"
            raise UsageError(["era"], reason, _LEAVE_OUT)
        options = replace(options, to="hf", era=None)
        names -= {"era"}
    if details.weights == "masters" and options.to == "neox":
        raise UsageError(
            ["weights"],
            "master weights are only for Hugging Face targets",
            "To write them into another GPT-NeoX layout, use reshard.",
        )
    return Conversion(options, details, version, names)
