"""The exceptions of the package, each with the exit code of the command line."""

from collections.abc import Callable, Mapping, Sequence


class BridgeError(Exception):
    """Something that a user can fix. The message says what is wrong, where, and what to do now.

    Attributes:
        exit_code: The exit code that the command line ends with.
    """

    exit_code = 1


class UsageError(BridgeError):
    """Options that do not apply, or that contradict each other. Nothing was written.

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
        """The message. ``spelling`` turns each parameter into the word to show, such as a flag."""
        names = ", ".join(map(spelling, self.parameters))
        return f"{names}: {self.reason}.{f' {self.fix}' if self.fix else ''}"


class Unreachable(BridgeError):
    """A store or the Hub does not answer, or answers with an error.

    Finished files are kept. The same call continues from there.
    """


class Unverified(BridgeError):
    """The output does not match the source.

    The disk, the memory or this tool is faulty. Do not use the output.
    """

    exit_code = 3


class TargetUnusable(BridgeError):
    """The target cannot be written as it is. A retry does not help."""


class DiskFull(BridgeError):
    """The disk does not have enough free space.

    Attributes:
        reason: What does not fit where, as a full sentence.
        advice: What to do, as full sentences.
        needed: How many bytes must be free for another attempt.
    """

    def __init__(self, reason: str, advice: str, needed: int) -> None:
        super().__init__(reason, advice, needed)  # so that it can be pickled
        self.reason = reason
        self.advice = advice
        self.needed = needed

    def __str__(self) -> str:
        return f"{self.reason} {self.advice}"


class NotOfFamily(BridgeError):
    """The files can be read, but they are not a whole model of a family that is converted.

    Examples are a model without its output head, a classifier, and an unmerged adapter.
    """


class SettingsMissing(BridgeError):
    """The yml files of a GPT-NeoX checkpoint are missing.

    Attributes:
        folder: The folder with the checkpoint's files.
        parameter: The parameter that names them, by its name in Python.
        nearby: The path of a GPT-NeoX yml in a folder above, which may belong to it; may be empty.
        others: Names of yml files beside the checkpoint that belong to other programs.
    """

    parameter = "configs"

    def __init__(self, folder: str, nearby: str = "", others: Sequence[str] = ()) -> None:
        super().__init__(folder, nearby, others)  # so that it can be pickled
        self.folder = folder
        self.nearby = nearby
        self.others = tuple(others)

    @property
    def reason(self) -> str:
        """What is missing and why it matters, as full sentences."""
        others = f" ({', '.join(self.others)}: settings of other programs)" if self.others else ""
        return (
            f"{self.folder} has no GPT-NeoX yml, neither in configs/ nor beside its "
            f"files{others}. Without it, the number of heads, the norms and the rotary settings "
            "are unknown."
        )

    def __str__(self) -> str:
        return self.with_way_out(f"`{self.parameter}={self.nearby or 'RUN.yml'}`")

    def with_way_out(self, way_out: str) -> str:
        """The message. ``way_out`` is the parameter or the command that names the yml."""
        if self.nearby:
            return f"{self.reason} If {self.nearby} belongs to this run, use it: {way_out}"
        return f"{self.reason} Name the yml that the run was started with: {way_out}"


class Refused(BridgeError):
    """The target cannot represent the source, or the layout does not fit. Nothing was written."""

    exit_code = 4


class ChoiceNeeded(Refused):
    """The source can be read as two models. Only the user knows which one is meant.

    Attributes:
        reason: What is ambiguous, with file and key, as full sentences.
        parameter: The parameter that decides, by its name in Python, such as ``head``.
        effects: What each of its values does.
        source: The path of the checkpoint.
        kind: The kind of the checkpoint, "hf" or "neox".
    """

    def __init__(
        self, reason: str, parameter: str, effects: Mapping[str, str], source: str, kind: str
    ) -> None:
        super().__init__(reason, parameter, effects, source, kind)  # so that it can be pickled
        self.reason = reason
        self.parameter = parameter
        self.effects = dict(effects)
        self.source = source
        self.kind = kind

    def __str__(self) -> str:
        ways = (f"`{self.parameter}={value}` {effect}" for value, effect in self.effects.items())
        return f"{self.reason} {'; '.join(ways)}."
