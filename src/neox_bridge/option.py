"""How an option is declared: once, as plain data beside the field that it sets.

The command line, batch files and their JSON schema, the names of options in errors, and the check
that an option applies to a target all derive from this declaration.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

Side = Literal["hf", "neox"]

# the headings of --help, in this order
OPTIONS = "Options"
CHECKPOINTS = "Which checkpoints"
WRITTEN = "What is written"
HUGGING_FACE = "Hugging Face targets"
GPT_NEOX = "GPT-NeoX targets"
FIX = "Fixes"
RESUME = "How the run continues"
SOURCE = "Source"
HUB = "Targets on the Hub"
RUN = "How it runs"
PRINTED = "Output"
OTHER = "Other options"
GROUPS = (
    OPTIONS,
    CHECKPOINTS,
    WRITTEN,
    HUGGING_FACE,
    GPT_NEOX,
    RESUME,
    FIX,
    SOURCE,
    HUB,
    RUN,
    PRINTED,
    OTHER,
)
_GROUPS_OF: dict[Side | None, str] = {"hf": HUGGING_FACE, "neox": GPT_NEOX, None: OPTIONS}


@dataclass(frozen=True, slots=True)
class Option:
    """An option, as data.

    Attributes:
        text: What the option does. ``-h`` shows the first sentence, ``--help`` all of it and the
            default,
            unless the text itself names the default.
        flags: How the command line spells it. Default: the field's name.
        group: The heading in ``--help``. Default: that of ``side``.
        common: Whether ``-h`` shows it.
        side: The only kind of target that it applies to; None for both.
        choices: The allowed words. ``aliases`` maps other spellings to them.
        minimum: The smallest allowed number. An option with a minimum takes a number.
        maximum: The largest allowed number.
        value: What it takes, where that is neither a flag, a choice, a number nor any text: a key
            of ``TYPES`` in ``cli/values.py``.
        required: Whether the option is required.
        metavar: The name of its value in ``--help``.
    """

    text: str
    flags: tuple[str, ...] = ()
    group: str = ""
    common: bool = False
    side: Side | None = None
    choices: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    minimum: float | None = None
    maximum: float | None = None
    value: str = ""
    required: bool = False
    metavar: str = ""

    @property
    def heading(self) -> str:
        """The heading in ``--help``."""
        return self.group or _GROUPS_OF[self.side]


def option(default: Any, text: str, *flags: str, **facts: Any) -> Any:
    """A field of a dataclass that is an option. facts: see ``Option``."""
    return field(default=default, metadata={"option": Option(text, flags, **facts)})


def inherited(declaring: type, name: str, default: Any = None, /, **facts: Any) -> Any:
    """A field that is declared as an option of another dataclass, apart from ``facts``."""
    declared = options_of(declaring)[name]
    known = {key: getattr(declared, key) for key in Option.__dataclass_fields__}
    return field(default=default, metadata={"option": Option(**(known | facts))})


def options_of(group: type) -> dict[str, Option]:
    """The options of a dataclass by the names of their fields."""
    return {entry.name: entry.metadata["option"] for entry in fields(group)}


def flag_of(name: str, declared: Option) -> str:
    """The option as the command line spells it, such as ``--shard-size``."""
    return declared.flags[0].split("/")[0] if declared.flags else f"--{name.replace('_', '-')}"
