"""Parses values of options, or raises a usage error that names the allowed values."""

import re
from collections.abc import Callable
from typing import Any

import click

from neox_bridge.cli.usage import did_you_mean
from neox_bridge.errors import BridgeError
from neox_bridge.option import Option

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000 ** (n + 1) for n, letter in enumerate("KMGT")}
_UNITS |= {f"{letter}IB": 1024 ** (n + 1) for n, letter in enumerate("KMGT")}
_ROWS = ("all", "tokenizer", "keep")


class PathName(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """A path, which the shell can complete, a URL, or a model on the Hub."""

    name = "path"

    def shell_complete(self, _ctx: Any, _param: Any, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


class Framework(click.ParamType):  # type: ignore[type-arg]
    """A GPT-NeoX tree or version, or a version of transformers."""

    name = "framework"

    def __init__(self, parse: Callable[[str], Any], *, neox_only: bool = False) -> None:
        self.parse, self.neox_only = parse, neox_only

    def convert(self, value: Any, _param: Any, _ctx: Any) -> Any:
        return self.parse(value) if isinstance(value, str) else value

    def shell_complete(self, _ctx: Any, _param: Any, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        from neox_bridge.frameworks.targets import NEOX_NAMES, TRANSFORMERS_NAMES

        names = NEOX_NAMES if self.neox_only else (*NEOX_NAMES, *TRANSFORMERS_NAMES)
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class Word(click.Choice):  # type: ignore[type-arg]
    """One of several words. For others, a usage error lists them, the most similar first."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if value in self.choices:
            return value
        fix = did_you_mean(str(value), self.choices)
        words = f"{value!r} is not one of {', '.join(self.choices)}. {fix}".strip()
        raise click.BadParameter(words, ctx, param)


class Number(click.ParamType):  # type: ignore[type-arg]
    """A number within bounds."""

    name = "number"

    def __init__(self, minimum: float, maximum: float | None) -> None:
        self.minimum, self.maximum = minimum, maximum
        self.is_whole = isinstance(minimum, int)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """The number; raises BadParameter for anything else."""
        if not isinstance(value, str):
            return value
        try:
            number = int(value) if self.is_whole else float(value)
            if self.minimum <= number <= (number if self.maximum is None else self.maximum):
                return number
        except ValueError:
            pass
        kind = "a whole number" if self.is_whole else "a number"
        bounds = f"{self.minimum} or more"
        if self.maximum is not None:
            bounds = f"{self.minimum} to {self.maximum}"
        raise click.BadParameter(f"must be {kind}, {bounds}, not {value!r}", ctx, param)


def type_of(declared: Option) -> dict[str, Any]:
    """The type and the metavar of a declared option: arguments of ``click.Option``."""
    if declared.choices:
        kind: Any = Word([*declared.choices, *declared.aliases])
        return {"type": kind, "metavar": declared.metavar or "|".join(declared.choices)}
    if declared.minimum is not None:
        kind = Number(declared.minimum, declared.maximum)
        return {"type": kind, "metavar": declared.metavar or "N"}
    kind, metavar = TYPES[declared.value]
    return {"type": kind, "metavar": declared.metavar or metavar}


def parse_size(text: str | int) -> int:
    """Parse 5GB (powers of 1000), 5GiB (powers of 1024) or a plain number into bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip(), re.IGNORECASE)
    unit = _UNITS.get(match[2].upper()) if match else None
    count = float(match[1]) * unit if match and unit else 0.0
    if count < 1:
        raise click.BadParameter(
            f"{text!r} is not a size. Give a size such as 5GB, 500MB or 2GiB, or a number of bytes."
        )
    assert match is not None
    return int(match[1]) * (unit or 1) if match[1].isdigit() else int(count)


def _parse_rows(text: str) -> str | int:
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    if text not in _ROWS:
        raise click.BadParameter(
            f"{text!r} is not a number of rows. Give a number, {' or '.join(_ROWS)}."
        )
    return text


def _parse_era(text: str) -> Any:
    from neox_bridge.frameworks.eras import era_named

    try:
        return era_named(text)
    except BridgeError:
        return _parse_target(text)


def _parse_target(text: str) -> Any:
    from neox_bridge.frameworks.targets import target_named

    return _valid(target_named, text)


def _parse_moment(text: str) -> Any:
    from neox_bridge.frameworks.change import parse_moment

    return _valid(parse_moment, text)


def _valid(parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except BridgeError as error:
        raise click.BadParameter(str(error)) from None


def _parse_picture(text: str) -> str:
    from neox_bridge.verification.drawing import SUFFIXES

    if not text.lower().endswith(SUFFIXES):
        raise click.BadParameter(f"{text!r} is neither a .png nor an .svg file.")
    return text


_FRAMEWORK = "neox:TREE|neox@2024-03|today|transformers@4.48"
# type and metavar by the ``value`` of an option
TYPES: dict[str, tuple[Any, str | None]] = {
    "": (str, None),
    "path": (PathName(), "PATH"),
    "size": (parse_size, "SIZE"),
    "rows": (_parse_rows, f"N|{'|'.join(_ROWS)}"),
    "framework": (Framework(_parse_era), _FRAMEWORK),
    "neox version": (Framework(_parse_era, neox_only=True), "neox:TREE|neox@DATE|today"),
    "target": (Framework(_parse_target), _FRAMEWORK),
    "moment": (_parse_moment, "DATE|VERSION"),
    "picture": (_parse_picture, "FILE.png|svg"),
}
