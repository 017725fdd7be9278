"""Turns exceptions into one line on stderr and an exit code."""

import errno
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

from neox_bridge.cli.output import say
from neox_bridge.cli.spelling import flag
from neox_bridge.cli.usage import hint
from neox_bridge.errors import BridgeError, ChoiceNeeded, SettingsMissing, UsageError

INTERRUPTED = 130
ARGUMENTS = "neox_bridge.arguments"  # the key in a context's ``meta`` for the typed words
DEBUG = "NEOX_BRIDGE_DEBUG"


class Interrupted(Exception):
    """The user interrupted a command. The message says what is on disk."""


@contextmanager
def reported() -> Iterator[None]:
    """A block, or a function, whose exceptions become a message and an exit code."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit):
        raise
    except BridgeError as error:
        _fail(message_of(error), error.exit_code)
    except (Interrupted, KeyboardInterrupt) as error:
        say("interrupted", str(error) or "nothing was written")
        raise click.exceptions.Exit(INTERRUPTED) from None
    except BrokenPipeError:  # the reader, such as `| head`, closed the pipe
        raise click.exceptions.Exit(1) from None
    except OSError as error:
        _fail(_os_message(error), 1)
    except MemoryError:
        _fail("out of memory. Use --max-workers 1, which needs the least memory.", 1)
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        _fail(_bug(error), 1)


def message_of(error: Exception) -> str:
    """The message of an error with command-line options for parameters, and commands as fixes."""
    if isinstance(error, UsageError):
        return f"{error.spelled(flag)}{'' if error.fix else f' {hint()}'}"
    if isinstance(error, ChoiceNeeded):
        return _with_commands(error)
    if isinstance(error, SettingsMissing):
        return _with_config(error)
    return str(error)


@contextmanager
def writing(target: str) -> Iterator[None]:
    """A block that writes ``target``. On an interrupt, it reports whether the target was written.

    The executor renames at the end, so the target is either complete or absent.
    """
    before = _identity(target)
    try:
        yield
    except KeyboardInterrupt as error:
        if str(error):
            raise Interrupted(str(error)) from None
        if _identity(target) == before:
            raise Interrupted(f"nothing was written to {target}") from None
        raise Interrupted(f"after {target} was completely written") from None


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _fail(message: str, code: int) -> NoReturn:
    say("error", message)
    raise click.exceptions.Exit(code) from None


def _with_commands(error: ChoiceNeeded) -> str:
    """The reason, and one command per choice: the typed command, if it has the option."""
    option = flag(error.parameter)
    words = _typed_words(option)
    if words is None:
        target = f"{error.source.rstrip('/')}-converted"
        words = ["convert", error.source, target, "--to", error.kind]
    ways = [
        f"`{shlex.join(['neox-bridge', *words, option, value])}` {effect}"
        for value, effect in error.effects.items()
    ]
    return f"{error.reason} {'; '.join(ways)}."


def _with_config(error: SettingsMissing) -> str:
    """The reason, and the typed command or ``inspect``, with the option that names the yml."""
    option = flag(error.parameter)
    words = _typed_words(option) or ["inspect", error.folder]
    command = ["neox-bridge", *words, option, error.nearby or "RUN.yml"]
    return error.with_way_out(shlex.join(command))


def _typed_words(option: str) -> list[str] | None:
    """The command and arguments that were typed; None if the command does not have the option."""
    context = click.get_current_context(silent=True)
    if context is None or not any(option in param.opts for param in context.command.params):
        return None
    return [str(context.info_name), *context.meta[ARGUMENTS]]


def _os_message(error: OSError) -> str:
    text = error.strerror or str(error)
    where = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
    ways = {
        errno.ENOSPC: " Free some space, or choose a target on another file system.",
        errno.EDQUOT: " Free some space, or choose a target on another file system.",
        errno.EACCES: " Check the permissions of the file and its folder.",
        errno.EROFS: " Choose a writable target.",
    }
    return f"{where}{text}.{ways.get(error.errno or 0, '')}"


def _bug(error: Exception) -> str:
    trace, place = error.__traceback__, ""
    while trace is not None:
        place = f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return (
        f"this is a bug in neox-bridge: {type(error).__name__}: {error} ({place}). Please report "
        f"it with the output of the same command with {DEBUG}=1 set."
    )
