"""Usage errors: one line on stderr and exit code 2, whether click or this package raises them.

``error: WORD: what is wrong. What to do.``
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, NoReturn

import click

from neox_bridge.cli.output import say
from neox_bridge.cli.spelling import as_options
from neox_bridge.wording import plain

EXIT_CODE = 2


class WrongUsage(click.ClickException):
    """A usage error in the common form."""

    exit_code = EXIT_CODE

    def show(self, _file: Any = None) -> None:
        """Print the message like other errors."""
        say("error", self.message)


def wrong(word: str, reason: str, fix: str = "", *, command: str = "") -> WrongUsage:
    """An error about a word of the command line, with the fix or else a pointer to the usage."""
    return WrongUsage(f"{word}: {reason}. {fix or hint(command)}")


def hint(command: str = "") -> str:
    """A pointer to the usage. command: by default, the running one."""
    context = click.get_current_context(silent=True)
    path = command or (context.command_path if context is not None else "neox-bridge")
    return f"Try '{path} --help'."


def did_you_mean(word: str, possible: Iterable[str]) -> str:
    """A sentence with similar words; "" if there are none."""
    *others, last = get_close_matches(word, list(possible)) or [""]
    return f"Did you mean {', '.join(others)}{' or ' if others else ''}{last}?" if last else ""


def as_wrong_usage(error: click.UsageError, context: click.Context) -> WrongUsage:
    """An error of click in the common form of usage errors."""
    path = context.command_path
    if isinstance(error, click.NoSuchOption):
        fix = did_you_mean(error.option_name, error.possibilities or ())
        return wrong(plain(error.option_name), "no such option", fix, command=path)
    if isinstance(error, click.BadOptionUsage):
        params = context.command.get_params(context)
        param = next((one for one in params if error.option_name in one.opts), None)
        takes_none = isinstance(param, click.Option) and param.is_flag
        reason = "takes no value" if takes_none else "needs a value"
        return wrong(plain(error.option_name), reason, command=path)
    if isinstance(error, click.MissingParameter):
        return wrong(_name(error), "missing", command=path)
    if isinstance(error, click.BadParameter):
        name, text = _name(error), plain(as_options(error.message))
        text += "" if text.endswith((".", "?")) else "."
        return WrongUsage(text if text.startswith(f"{name} ") else f"{name}: {text}")
    return WrongUsage(f"{plain(error.format_message()).rstrip('.')}. {hint(path)}")


def no_such_command(word: str, commands: Iterable[str]) -> NoReturn:
    """Raise the error for an unknown command."""
    fix = did_you_mean(word, commands)
    raise wrong(plain(word), "no such command", fix, command="neox-bridge")


def _name(error: click.BadParameter) -> str:
    """The option, or the name of the argument in the help."""
    param = error.param
    if isinstance(param, click.Option):
        return max(param.opts, key=len)
    return str(error.param_hint or (param.make_metavar(error.ctx) if param and error.ctx else ""))
