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
    """The parts of a README.md; see ``model_card.card_text``.

    section: the lines about the conversion. cast: the dtype that weights are cast to.
    """

    before: bytes
    section: tuple[str, ...]
    after: bytes
    cast: str | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion writes, before a byte is written.

    Attributes:
        source: A description of the source (see ``plan.schema.json``).
        target: A description of the target.
        blanks: Keys that the user must still fill in, as (file, key).
        options: The options that differ from the default (``Options.non_default``).
        casts: The casts of the source's weights.
        model: The identity of the model of a GPT-NeoX target; None if it is not needed.
        fixed: Keys of a start-up yml whose values must stay as planned.
        known_deviations: Endings of the names of tensors that differ between ranks, as a finding
            already reports.
        card: The parts of README.md of a Hugging Face target.
        carried: The names of small text files that are copied from the folder of the source's
            model.
        left: The files in that folder that are not copied.
        checkpoint: The opened source, to compare the result with; None if the plan has no
            checkpoint as its source. It is neither printed nor part of the plan's hash.
    """

    source: dict[str, object]
    target: dict[str, object]
    files: tuple[OutputFile, ...]
    dropped: tuple[Dropped, ...] = ()
    findings: tuple[Finding, ...] = ()
    blanks: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    options: dict[str, object] = field(default_factory=dict)
    casts: tuple[Cast, ...] = ()
    model: ModelIdentity | None = None
    fixed: tuple[str, ...] = ()
    known_deviations: tuple[str, ...] = ()
    card: ModelCard | None = field(default=None, repr=False)
    carried: tuple[str, ...] = ()
    left: tuple[LeftFile, ...] = ()
    checkpoint: Checkpoint | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The document of ``convert --dry-run --json`` without the target path and the memory."""
        from neox_bridge.planning.report import to_json

        return to_json(self, None, self.checkpoint.source if self.checkpoint is not None else "")

    @property
    def size(self) -> int:
        """Bytes of all output files."""
        return sum(file.size for file in self.files)
