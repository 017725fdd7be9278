"""The console script ``neox-bridge``: its commands, and what holds for all of them."""

import signal
import sys
from importlib import import_module
from typing import Annotated

import typer

from neox_bridge.cli.errors import guarded
from neox_bridge.cli.helping import GroupedCommand
from neox_bridge.cli.output import say
from neox_bridge.cli.streams import protect_streams, stdout_failure

_EPILOG = "`neox-bridge COMMAND --help` explains a command and shows examples."
# each with its module in cli/, where that has another name
_COMMANDS = (
    ("convert", "", "Convert a checkpoint, or change its layout."),
    ("batch", "", "Convert the many checkpoints of a run."),
    ("inspect", "", "Say what a checkpoint is."),
    ("patch", "", "Let a GPT-NeoX tree load checkpoints with and without inv_freq."),
    ("doctor", "", "Say what is wrong with a checkpoint and where it loads, and mend it."),
    ("changes", "", "List the changes of both frameworks that break checkpoints."),
    ("families", "", "List the families of models that are converted."),
    ("verify", "", "Say whether what was made of a checkpoint is that checkpoint."),
    ("diff", "verify", "Compare two checkpoints, tensor by tensor."),
    ("audit", "", "Look through the checkpoints of a run or a suite for what is wrong."),
    ("reshard", "", "Write a run for other ranks, with its optimizer."),
    ("export-optimizer", "", "Write a run's optimizer states under model names."),
    ("report", "", "Make one HTML page of checkpoints and results."),
    ("toy", "", "Write a random checkpoint of a Pythia's shape."),
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from neox_bridge.version import __version__

        print(f"neox-bridge {__version__}")
        raise typer.Exit


def _common(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


def build(only: str | None = None) -> typer.Typer:
    """All commands, or the one that is wanted, which takes half the time of all to set up."""
    # rich's help and tracebacks would more than double the time of --help
    made = typer.Typer(
        name="neox-bridge",
        help="Moves language-model checkpoints between Hugging Face and GPT-NeoX.",
        epilog=_EPILOG,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    made.callback()(_common)
    for name, module, short in _COMMANDS:
        if only in (None, name):
            home = import_module(f"neox_bridge.cli.{module or name.replace('-', '_')}")
            command = guarded(getattr(home, name.replace("-", "_")))
            made.command(name, cls=GroupedCommand, short_help=short)(command)
    return made


def __getattr__(name: str) -> typer.Typer:
    """``app``: all commands, for who runs them in a process of theirs."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()["app"] = made = build()
    return made


def main() -> None:
    """Run the command line; ends the process with one of the documented exit codes."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # a signal that whoever started us wants ignored (nohup) stays ignored
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    protect_streams()
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    known = any(first == name for name, _, _ in _COMMANDS)
    try:
        build(first if known else None)(prog_name="neox-bridge")
    except SystemExit as end:
        if problem := stdout_failure():
            say("error", f"stdout can't be written: {problem}. Files that were written stay.")
            sys.exit(end.code or 1)
        raise
