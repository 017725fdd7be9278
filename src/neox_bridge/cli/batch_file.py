"""Reads a yml that describes a batch. Options on the command line take precedence."""

from collections.abc import Iterator
from typing import Any

import click

from neox_bridge.errors import BridgeError


def read_batch_file(ctx: click.Context) -> None:
    """Replace the one path FILE.yml by its ``sources`` and ``target``, and take its options.

    Raises BridgeError for a key that is not an option.
    """
    paths = ctx.params["paths"]
    if len(paths) != 1 or not paths[0].endswith((".yml", ".yaml")):
        return
    # a separate context, so that values are parsed as on the command line, with the same usage
    # errors
    words = list(_words(ctx, paths[0]))
    file = ctx.command.make_context(ctx.info_name, words, parent=ctx.parent)
    on_line = click.core.ParameterSource.COMMANDLINE
    for name, value in file.params.items():
        if name == "paths" or ctx.get_parameter_source(name) is not on_line:
            ctx.params[name] = value
            ctx.set_parameter_source(name, file.get_parameter_source(name) or on_line)


def _words(ctx: click.Context, path: str) -> Iterator[str]:
    from neox_bridge.formats.yml import read_yml

    settings = read_yml(path)
    options = {
        word.lstrip("-"): param
        for param in ctx.command.params
        for word in param.opts
        if word.startswith("--")
    }
    sources = settings.pop("sources", None) or settings.pop("source", None)
    target = settings.pop("target", None)
    if not sources or not isinstance(target, str):
        raise BridgeError(
            f"{path}: `sources` (a list of paths) and `target` (a path) are required."
        )
    for key, value in settings.items():
        name = str(key).replace("_", "-")
        if name not in options:
            raise BridgeError(
                f"{path}: unknown option {key}. Known options: {', '.join(sorted(options))}."
            )
        yield from _option(options[name], name, value, path)
    yield "--"
    yield from map(str, [sources] if isinstance(sources, str) else sources)
    yield target


def _option(param: click.Parameter, name: str, value: Any, path: str) -> Iterator[str]:
    if isinstance(param, click.Option) and param.is_flag:
        if not isinstance(value, bool):
            raise BridgeError(f"{path}: {name} must be true or false, not {value!r}.")
        yield from [f"--{name}"] if value else param.secondary_opts
    elif isinstance(value, list) and not param.multiple:
        yield from (f"--{name}", ",".join(map(str, value)))
    elif isinstance(value, list):
        for entry in value:
            yield from (f"--{name}", str(entry))
    elif value is not None:
        yield from (f"--{name}", str(value))
