"""``convert``'s options, also where another command has them too."""

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import typer

if TYPE_CHECKING:
    from neox_bridge.execution.digests import HashName
    from neox_bridge.planning.options import Options

_Command = TypeVar("_Command", bound=Callable[..., None])
_LEAVE_OUT = "Leave one of them out."
_HASHES: dict[str, "HashName | None"] = {"xxh3": "xxh3_128", "sha256": "sha256", "none": None}


@dataclass(frozen=True)
class Asked:
    """What the user asked for.

    version: of transformers, of which --for spoke. masters: whether --weights said so.
    given: the options that the user named, by their names in Python.
    """

    options: "Options"
    version: Any
    masters: bool
    every_crc: bool
    hash_name: "HashName | None"
    hash_shared: bool
    verify: bool
    given: frozenset[str] = frozenset()


def asked_of(given: dict[str, Any]) -> Asked:
    """What was asked, from ``convert``'s arguments by their names.

    Raises a usage error for options that don't go together.
    """
    from neox_bridge.errors import UsageError
    from neox_bridge.planning.options import Options

    to, era, form = given["to"], given["era"], given["form"]
    version = era if era is not None and hasattr(era, "version") else None
    own = {field.name for field in fields(Options)}
    chosen = {key: value for key, value in given.items() if key in own}
    chosen |= {"format": form, "dp": given["dp"] or 1}
    chosen |= {"ignore_keys": tuple(given["ignore_key"] or ())}
    if version is not None:
        if to == "neox":
            raise UsageError(["era"], "transformers does not read a GPT-NeoX target", _LEAVE_OUT)
        if form not in (None, "transformers"):
            raise UsageError(["era"], f"transformers does not read --format {form}", _LEAVE_OUT)
        chosen |= {"to": "hf", "era": None}
    masters = given["weights"] == "masters"
    if masters and (chosen["to"] or "hf") == "neox":
        raise UsageError(
            ["weights"],
            "masters are only for Hugging Face targets",
            "To write them into another GPT-NeoX layout, use reshard.",
        )
    named = given.get("explicit") or explicit(given["ctx"])
    hash_name, verify = given["hash_name"], not given["no_verify"]
    return Asked(
        options=Options(**chosen),
        version=version,
        masters=masters,
        every_crc=given["crc"],
        hash_name=_HASHES[hash_name or "xxh3"],
        hash_shared=hash_name is not None or verify,
        verify=verify,
        given=frozenset(
            {"form": "format"}.get(name, name) for name in named if name != "era" or version is None
        ),
    )


def given(**options: object) -> list[str]:
    """The names of those options that the user gave: neither None, False nor empty."""
    return [
        name
        for name, value in options.items()
        if value is not None and value is not False and value != []
    ]


def explicit(ctx: typer.Context) -> frozenset[str]:
    """The options that stand on the command line."""
    return frozenset(
        name
        for name in ctx.params
        if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"
    )


def taking(
    command: Callable[..., None], without: Collection[str]
) -> Callable[[_Command], _Command]:
    """A decorator: the options of another command behind a command's own, as its keywords."""

    def more(own: _Command) -> _Command:
        signature = inspect.signature(own)
        mine = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        known = {p.name for p in mine} | set(without)
        theirs = [
            p for name, p in inspect.signature(command).parameters.items() if name not in known
        ]
        ordered = sorted([*mine, *theirs], key=lambda p: p.default is not p.empty)
        own.__signature__ = signature.replace(parameters=ordered)  # type: ignore[attr-defined]
        own.__annotations__ = {p.name: p.annotation for p in ordered} | {"return": None}
        return own

    return more
