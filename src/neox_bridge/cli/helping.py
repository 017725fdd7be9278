"""Commands with help in named groups, without rich (which takes longer than all the rest)."""

from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from typer import BadParameter
from typer.core import TyperCommand

from neox_bridge.wording import plain


@dataclass(frozen=True, slots=True)
class Typed:
    """The command that runs: its name, what was typed after it, and the options that it has."""

    name: str
    arguments: tuple[str, ...]
    options: frozenset[str]


typed: ContextVar[Typed | None] = ContextVar("typed", default=None)


class GroupedCommand(TyperCommand):
    """A command whose help shows its options by ``rich_help_panel``, in the order of the code."""

    def make_context(self, *args: Any, **more: Any) -> Any:
        """As click's; a word of the user's that its message quotes can't forge a line."""
        try:
            return super().make_context(*args, **more)
        except BadParameter as error:
            text = plain(error.message)
            raise BadParameter(text, error.ctx, error.param, error.param_hint) from None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, but do not take an option's name for the value of the option before it.

        ``--fix --in-place run`` would otherwise write into a folder named ``--in-place``. A file
        of such a name can be given as ``--fix=--in-place`` or ``./--in-place``. What was typed is
        remembered, for messages that repeat the command.
        """
        options = {
            word: param for param in self.params for word in (*param.opts, *param.secondary_opts)
        }
        options |= dict.fromkeys(ctx.help_option_names)
        for word, value in pairwise(args):
            if word == "--":
                break
            param = options.get(word)
            takes_value = param is not None and not getattr(param, "is_flag", False)
            if takes_value and word.startswith("-") and value in options:
                ctx.fail(f"Option {word!r} needs a value, and {value!r} is another option.")
        typed.set(Typed(str(ctx.info_name), tuple(args), frozenset(options)))
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and groups of options; typer's own does so with rich only."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                argument = param.param_type_name == "argument"
                other = "Arguments" if argument else "Other options"
                group = getattr(param, "rich_help_panel", None) or other
                groups.setdefault(group, []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)
