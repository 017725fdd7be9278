"""How a command ends: exceptions become one line on stderr and an exit code."""

import errno
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import NoReturn, ParamSpec

import typer

from neox_bridge.cli.helping import typed
from neox_bridge.cli.output import say
from neox_bridge.errors import BridgeError, ChoiceNeeded, SettingsMissing, UsageError

_P = ParamSpec("_P")
INTERRUPTED = 130
DEBUG = "NEOX_BRIDGE_DEBUG"


class Interrupted(Exception):
    """The user stopped a command; says what is on disk now."""


def guarded(command: Callable[_P, None]) -> Callable[_P, None]:
    """The command with its exceptions turned into a message and an exit code."""

    @wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except (typer.Exit, typer.BadParameter):
            raise
        except UsageError as error:
            _fail(error.spelled(flag), error.exit_code)
        except ChoiceNeeded as error:
            _fail(_with_commands(error), error.exit_code)
        except SettingsMissing as error:
            _fail(_with_config(error), error.exit_code)
        except BridgeError as error:
            _fail(str(error), error.exit_code)
        except (Interrupted, KeyboardInterrupt) as error:
            say("interrupted", str(error) or "nothing was written")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # `| head` has seen enough
            raise typer.Exit(1) from None
        except OSError as error:
            _fail(_os_message(error), 1)
        except MemoryError:
            _fail("out of memory. --max-workers 1 needs the least.", 1)
        except Exception as error:
            if os.environ.get(DEBUG):
                raise
            _fail(_bug(error), 1)

    return run


def flag(parameter: str) -> str:
    """The option of the command line that sets a parameter of the library."""
    renamed = {
        **{"era": "for", "hash_name": "hash", "configs": "config", "ignore_keys": "ignore-key"},
        **{"every_crc": "crc", "hash_shared": "hash"},
    }
    return f"--{renamed.get(parameter, parameter).replace('_', '-')}"


@contextmanager
def writing(target: str) -> Iterator[None]:
    """A block that writes ``target``: when it is interrupted, say whether the target is there.

    The executor renames at the end, so that there is only all of it or nothing.
    """
    before = _identity(target)
    try:
        yield
    except KeyboardInterrupt as error:
        if str(error):
            raise Interrupted(str(error)) from None
        if _identity(target) == before:
            raise Interrupted(f"nothing was written to {target}") from None
        raise Interrupted(f"but {target} was already written, all of it") from None


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _fail(message: str, code: int) -> NoReturn:
    say("error", message)
    raise typer.Exit(code) from None


def _with_commands(error: ChoiceNeeded) -> str:
    """The reason, and a command for each choice: the typed one, where it has the option."""
    command = typed.get()
    words = ["convert", error.source, f"{error.source.rstrip('/')}-converted", "--to", error.kind]
    if command is not None and error.option in command.options:
        words = [command.name, *command.arguments]
    ways = [
        f"`{shlex.join(['neox-bridge', *words, error.option, value])}` {effect}"
        for value, effect in error.effects.items()
    ]
    return f"{error.reason} {'; '.join(ways)}."


def _with_config(error: SettingsMissing) -> str:
    """The reason, and the typed command with the option that names the yml, where it has it."""
    command = typed.get()
    if command is None or error.option not in command.options:
        return str(error)
    return error.with_command([command.name, *command.arguments])


def _os_message(error: OSError) -> str:
    text = error.strerror or str(error)
    where = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
    ways = {
        errno.ENOSPC: " Free some space, or choose a target on another file system.",
        errno.EDQUOT: " Free some space, or choose a target on another file system.",
        errno.EACCES: " Check the permissions of the file and its folder.",
        errno.EROFS: " Choose a target that can be written.",
    }
    return f"{where}{text}.{ways.get(error.errno or 0, '')}"


def _bug(error: Exception) -> str:
    trace, place = error.__traceback__, ""
    while trace is not None:
        place = f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return (
        f"this is a bug in neox-bridge: {type(error).__name__}: {error} ({place}). Please report "
        f"it, with what the same command prints when {DEBUG}=1 is set."
    )
