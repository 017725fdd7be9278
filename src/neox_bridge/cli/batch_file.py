"""A batch that a yml describes by the command's options; the command line's go before."""

from collections.abc import Iterator
from typing import Any

import typer

from neox_bridge.errors import BridgeError


def merged(ctx: typer.Context, path: str) -> dict[str, Any]:
    """The command's arguments from ``sources``, ``target`` and options in a file.

    What the command line has goes before. Raises BridgeError, naming the key, for what isn't one.
    """
    words = list(_words(ctx, path))
    # a context of its own: the same parsing, and the same usage errors, as of the command line
    found = ctx.command.make_context(ctx.info_name, words, parent=ctx.parent)
    explicit = {
        name: value
        for name, value in ctx.params.items()
        if name != "paths" and getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    named = {
        name
        for name in found.params
        if getattr(found.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    return {**found.params, **explicit, "explicit": frozenset(named | set(explicit))}


def _words(ctx: typer.Context, path: str) -> Iterator[str]:
    from neox_bridge.formats.yml import read_yml

    told = read_yml(path)
    options = {
        word.lstrip("-"): p for p in ctx.command.params for word in p.opts if word[:2] == "--"
    }
    sources = told.pop("sources", None) or told.pop("source", None)
    target = told.pop("target", None)
    if not sources or not isinstance(target, str):
        raise BridgeError(f"{path}: it needs `sources`, a list of paths, and `target`, a path.")
    for key, value in told.items():
        name = str(key).replace("_", "-")
        if name not in options:
            raise BridgeError(
                f"{path}: {key}: no such option. Known: {', '.join(sorted(options))}."
            )
        yield from _option(name, value, bool(getattr(options[name], "is_flag", False)), path)
    yield "--"
    yield from map(str, [sources] if isinstance(sources, str) else sources)
    yield target


def _option(name: str, value: object, flag: bool, path: str) -> Iterator[str]:
    if flag:
        if not isinstance(value, bool):
            raise BridgeError(f"{path}: {name}: {value!r} isn't true or false.")
        if value:
            yield f"--{name}"
    elif isinstance(value, list) and name == "steps":
        yield from (f"--{name}", ",".join(map(str, value)))
    elif isinstance(value, list):
        for one in value:
            yield from (f"--{name}", str(one))
    elif value is not None:
        yield from (f"--{name}", str(value))
