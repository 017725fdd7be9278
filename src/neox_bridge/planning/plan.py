"""Everything that a conversion writes, as plain data."""

from dataclasses import dataclass, field
from typing import Any

from neox_bridge.findings import Dropped, Finding
from neox_bridge.layouts.carried_names import LeftFile
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.planning.casts import Cast
from neox_bridge.planning.model_identity import ModelIdentity
from neox_bridge.tensors.pieces import OutputFile


@dataclass(frozen=True, slots=True)
class ModelCard:
    """The parts of a README.md: see ``model_card.card_text``.

    section: the lines of the part about the conversion. cast: the dtype that weights are cast to.
    """

    before: bytes
    section: tuple[str, ...]
    after: bytes
    cast: str | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion writes, before a byte is written.

    source, target: what they are, in words and numbers (see ``plan.schema.json``).
    blanks: what the user has still to fill in, as (file, key).
    asked: the options that aren't the default (``Options.asked``).
    casts: the dtypes that the source's weights are cast to.
    model: what tells the model of a GPT-NeoX target from another; None if nobody asks.
    fixed: keys of a start-up yml that must stay as they are in the plan's.
    known_deviations: how the names of tensors end whose ranks differ, as a finding says already.
    card: what README.md of a Hugging Face target is made of.
    carried: the names of small text files that are taken over from beside the source's model.
    left: the files beside it that are not.
    checkpoint: the source as it was opened, to compare the result with; None for a plan that has no
        checkpoint for its source. It is neither printed nor part of the plan's hash.
    """

    source: dict[str, object]
    target: dict[str, object]
    files: tuple[OutputFile, ...]
    dropped: tuple[Dropped, ...] = ()
    findings: tuple[Finding, ...] = ()
    blanks: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    asked: dict[str, object] = field(default_factory=dict)
    casts: tuple[Cast, ...] = ()
    model: ModelIdentity | None = None
    fixed: tuple[str, ...] = ()
    known_deviations: tuple[str, ...] = ()
    card: ModelCard | None = field(default=None, repr=False)
    carried: tuple[str, ...] = ()
    left: tuple[LeftFile, ...] = ()
    checkpoint: Checkpoint | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """As ``convert --dry-run --json``, but for the target's path and the memory."""
        from neox_bridge.planning.report import to_json

        return to_json(self, None, self.checkpoint.source if self.checkpoint is not None else "")

    @property
    def size(self) -> int:
        """Bytes of all output files."""
        return sum(file.size for file in self.files)
