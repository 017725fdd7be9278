"""The console script ``neox-bridge``: its commands, and what holds for all of them."""

import gc
import signal
import sys
from typing import Annotated

import typer

from neox_bridge.cli import (
    audit,
    batch,
    changes,
    convert,
    doctor,
    export_optimizer,
    families,
    inspect,
    patch,
    report,
    reshard,
    toy,
    verify,
)
from neox_bridge.cli.errors import guarded
from neox_bridge.cli.helping import GroupedCommand
from neox_bridge.cli.printable import protect_stdout

_EPILOG = "`neox-bridge COMMAND --help` explains a command and shows examples."

# rich's help and tracebacks would more than double the time of --help
app = typer.Typer(
    name="neox-bridge",
    help="Moves language-model checkpoints between Hugging Face and GPT-NeoX.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for _command, _short in (
    (convert.convert, "Convert a checkpoint, or change its layout."),
    (batch.batch, "Convert the many checkpoints of a run."),
    (inspect.inspect, "Say what a checkpoint is."),
    (patch.patch, "Let a GPT-NeoX tree load checkpoints with and without inv_freq."),
    (doctor.doctor, "Say what is wrong with a checkpoint and where it loads, and mend it."),
    (changes.changes, "List the changes of both frameworks that break checkpoints."),
    (families.families, "List the families of models that are converted."),
    (verify.verify, "Say whether what was made of a checkpoint is that checkpoint."),
    (verify.diff, "Compare two checkpoints, tensor by tensor."),
    (audit.audit, "Look through the checkpoints of a run or a suite for what is wrong."),
    (reshard.reshard, "Write a run for other ranks, with its optimizer."),
    (export_optimizer.export_optimizer, "Write a run's optimizer states under model names."),
    (report.report, "Make one HTML page of checkpoints and results."),
    (toy.toy, "Write a random checkpoint of a Pythia's shape."),
):
    app.command(_command.__name__.replace("_", "-"), cls=GroupedCommand, short_help=_short)(
        guarded(_command)
    )


def _show_version(wanted: bool) -> None:
    if wanted:
        from neox_bridge import __version__

        print(f"neox-bridge {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; ends the process with one of the documented exit codes."""
    gc.set_threshold(50_000)  # modules and headers are many objects and no garbage
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # a signal that whoever started us wants ignored (nohup) stays ignored
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    protect_stdout()
    # paths may hold bytes that the terminal's encoding doesn't have
    if hasattr(sys.stderr, "reconfigure"):
        sys.stderr.reconfigure(errors="backslashreplace")
    app(prog_name="neox-bridge")
