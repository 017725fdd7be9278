"""What goes wrong, as one exception with the exit code that the command line gives it."""

from collections.abc import Callable, Mapping, Sequence


class BridgeError(Exception):
    """Something a user can mend: says what was wrong, in which file or key, and what to do now."""

    exit_code = 1


class UsageError(BridgeError):
    """Options that do not apply here, or that contradict each other. Nothing was written.

    Attributes:
        parameters: The options, by their names in Python, such as ``shard_size``.
        reason: Why they do not apply.
        fix: What to do instead, as a full sentence; may be empty.
    """

    exit_code = 2

    def __init__(self, parameters: Sequence[str], reason: str, fix: str = "") -> None:
        super().__init__(parameters, reason, fix)  # so that it can be pickled
        self.parameters = tuple(parameters)
        self.reason = reason
        self.fix = fix

    def __str__(self) -> str:
        return self.spelled(str)

    def spelled(self, spelling: Callable[[str], str]) -> str:
        """The message, with each parameter as ``spelling`` writes it."""
        names = ", ".join(map(spelling, self.parameters))
        return f"{names}: {self.reason}.{f' {self.fix}' if self.fix else ''}"


class Unreachable(BridgeError):
    """A store doesn't answer, or not as it should: what is finished waits for the next try."""


class Unverified(BridgeError):
    """What was written isn't what the source says: a fault of a disk, of memory or of this tool."""

    exit_code = 3


class Refused(BridgeError):
    """The target can't express the source, or a layout doesn't fit: nothing was written."""

    exit_code = 4


class ChoiceNeeded(Refused):
    """The source can be read as two models, and only the user knows which one is meant.

    Attributes:
        reason: What is ambiguous, with file and key, as full sentences.
        option: The option that decides, as the command line spells it, such as ``--head``.
        effects: What each of its values does.
        source: The path of the checkpoint.
        kind: The kind of the checkpoint, "hf" or "neox".
    """

    def __init__(
        self, reason: str, option: str, effects: Mapping[str, str], source: str, kind: str
    ) -> None:
        super().__init__(reason, option, effects, source, kind)  # so that it can be pickled
        self.reason = reason
        self.option = option
        self.effects = dict(effects)
        self.source = source
        self.kind = kind

    def __str__(self) -> str:
        ways = (f"{self.option} {value} {effect}" for value, effect in self.effects.items())
        return f"{self.reason} {'; '.join(ways)}."
