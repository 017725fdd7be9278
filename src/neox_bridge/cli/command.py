"""Commands made of declared options: ``-h`` is short, ``--help`` long, both in named groups.

rich is not used, because its import takes longer than everything else.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from inspect import cleandoc
from itertools import pairwise
from typing import Any

import click

from neox_bridge.cli.errors import ARGUMENTS, reported
from neox_bridge.cli.usage import as_wrong_usage, wrong
from neox_bridge.cli.values import PathName, type_of
from neox_bridge.option import GROUPS, OTHER, Option, flag_of, options_of
from neox_bridge.wording import plain

HELP_WIDTH = 100


class Argument(click.Argument):
    """An argument with a line in the help. many: whether it takes one word or more."""

    def __init__(
        self, name: str, metavar: str, text: str, *, many: bool = False, **more: Any
    ) -> None:
        more.setdefault("type", PathName())
        super().__init__([name], metavar=metavar, nargs=-1 if many else 1, **more)
        self.help = text

    def make_metavar(self, *_context: click.Context) -> str:
        return self.metavar or ""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        return self.make_metavar(ctx), self.help or ""


class Parameter(click.Option):
    """A declared option as a click option."""

    def __init__(self, name: str, declared: Option, default: Any) -> None:
        flag = isinstance(default, bool)
        silent = flag or default in (None, ()) or "Default:" in declared.text
        flags = declared.flags or (flag_of(name, declared),)
        more = {} if flag or "/" in flags[0] else type_of(declared)
        if not declared.required:
            more["default"] = default
        super().__init__(
            [name, *flags],
            help=declared.text,
            show_default=not silent,
            is_flag=flag or None,
            multiple=isinstance(default, tuple),
            required=declared.required,
            **more,
        )
        self.declared = declared

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Convert as click does, then replace aliases."""
        value = super().type_cast_value(ctx, value)
        return self.declared.aliases.get(value, value) if self.declared.aliases else value


# an argument, a dataclass of options, or a dataclass with the names of some of its options
Part = click.Argument | type | tuple[type, tuple[str, ...]]


def only(group: type, *names: str) -> Part:
    """Only these options of a group; the others keep their defaults."""
    return group, names


class Helped(click.Command):
    """A command with ``-h`` for the common options and ``--help`` for all."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As in click, but usage errors have the form of this program."""
        try:
            return super().parse_args(ctx, args)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            raise as_wrong_usage(error, ctx) from None

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """As in click, with ``-h`` before ``--help``."""
        *declared, full = super().get_params(ctx)
        full.help = "Show all options."
        return [*declared, _SHORT_HELP, full]

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the description; for ``-h`` its first paragraph."""
        text = cleandoc(self.help or "")
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(text.split("\n\n")[0] if is_short(ctx) else text)

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write nothing, because ``format_options`` writes the arguments."""


def _show_short_help(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta[_SHORT] = True
        click.echo(ctx.get_help())
        ctx.exit()


def is_short(ctx: click.Context) -> bool:
    """Whether the help was requested with ``-h``."""
    return _SHORT in ctx.meta


_SHORT = "neox_bridge.short"
_SHORT_HELP = click.Option(
    ["-h"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_short_help,
    help="Show the common options.",
)


class Command(Helped):
    """A command whose function takes its arguments and its groups of options, in order.

    prepare: called with the context before the function, and may change the values in it.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., None],
        parts: Sequence[Part],
        prepare: Callable[[click.Context], None] | None,
    ) -> None:
        super().__init__(
            name,
            params=[parameter for part in parts for parameter in _parameters(part)],
            help=function.__doc__,
            context_settings={"max_content_width": HELP_WIDTH},
        )
        self.function = function
        self.parts = parts
        self.prepare = prepare

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, but do not accept the name of an option as the value of the option before it.

        ``--fix --in-place run`` would otherwise write into a folder named ``--in-place``. A file
        of such a name can be given as ``--fix=--in-place`` or ``./--in-place``.
        """
        options = {
            word: param
            for param in self.get_params(ctx)
            for word in (*param.opts, *param.secondary_opts)
        }
        path = ctx.command_path
        for word, value in pairwise(args):
            if word == "--":
                break
            param = options.get(word)
            takes_value = isinstance(param, click.Option) and not param.is_flag
            if takes_value and word.startswith("-") and value in options:
                raise wrong(word, f"needs a value, and {value} is another option", command=path)
        ctx.meta[ARGUMENTS] = tuple(args)
        ctx.allow_extra_args = True
        extra = super().parse_args(ctx, args)
        if extra and not ctx.resilient_parsing:
            raise wrong(plain(extra[0]), "one argument too many", command=path)
        return extra

    def invoke(self, ctx: click.Context) -> None:
        """Call the function; an exception becomes a message and an exit code."""
        with reported():
            if self.prepare is not None:
                self.prepare(ctx)
            self.function(*(_value(part, ctx.params) for part in self.parts))
            sys.stdout.flush()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the arguments, and the options in their groups; for ``-h``, only common ones."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], **{g: [] for g in GROUPS}}
        for param in self.get_params(ctx):
            words, text = param.get_help_record(ctx) or ("", "")
            group = "Arguments" if isinstance(param, Argument) else OTHER
            if isinstance(param, Parameter):
                group = param.declared.heading
                if is_short(ctx):
                    if not param.declared.common:
                        continue
                    text = text.split(". ")[0].rstrip(".") + "."
            groups[group].append((words, text))
        for group, records in groups.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a pointer to ``--help``."""
        if is_short(ctx):
            count = sum(isinstance(param, Parameter) for param in self.params)
            formatter.write_paragraph()
            formatter.write_text(f"`{ctx.command_path} --help` explains all {count} options.")


def command(
    name: str, *parts: Part, prepare: Callable[[click.Context], None] | None = None
) -> Callable[[Callable[..., None]], Command]:
    """A decorator that makes a command of a function with these arguments and groups of options."""
    return lambda function: Command(name, function, parts, prepare)


def given(*names: str) -> list[str]:
    """Which of these parameters (by default, of all) were given on the command line."""
    context = click.get_current_context()
    return [
        name
        for name in names or context.params
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]


def _parameters(part: Part) -> list[click.Parameter]:
    if isinstance(part, click.Argument):
        return [part]
    group, names = _group_of(part)
    defaults = {entry.name: entry.default for entry in fields(group)}
    declared = options_of(group)
    return [Parameter(name, declared[name], defaults[name]) for name in names]


def _value(part: Part, values: dict[str, Any]) -> Any:
    """The value that is passed to the function of the command for a part."""
    if isinstance(part, click.Argument):
        return values[str(part.name)]
    group, names = _group_of(part)
    return group(**{name: values[name] for name in names})


def _group_of(part: type | tuple[type, tuple[str, ...]]) -> tuple[type, tuple[str, ...]]:
    return part if isinstance(part, tuple) else (part, tuple(options_of(part)))
