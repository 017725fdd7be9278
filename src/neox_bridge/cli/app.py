"""The console script ``neox-bridge`` and its commands."""

import signal
import sys
from importlib import import_module
from typing import Any

import click

from neox_bridge.cli.command import HELP_WIDTH, Helped, is_short
from neox_bridge.cli.output import say
from neox_bridge.cli.streams import protect_streams, stdout_failure
from neox_bridge.cli.usage import no_such_command
from neox_bridge.cli.values import Word

# each command is in the module of its name
COMMANDS = {
    "convert": "Convert a checkpoint, or change its layout.",
    "batch": "Convert all checkpoints of a run.",
    "inspect": "Show what a checkpoint contains.",
    "patch": "Patch a GPT-NeoX source tree to load checkpoints with and without inv_freq.",
    "doctor": "Diagnose why a checkpoint does not load, and fix it.",
    "changes": "List changes in GPT-NeoX and transformers that break checkpoints.",
    "families": "List the model families that can be converted.",
    "verify": "Check that a converted checkpoint equals its source.",
    "diff": "Compare two checkpoints, tensor by tensor.",
    "audit": "Check every checkpoint of a run or a suite for faults.",
    "reshard": "Move a training run to another number of ranks, optimizer included.",
    "export-optimizer": "Export a run's optimizer states under Hugging Face names.",
    "report": "Create an HTML report of checkpoints and results.",
    "toy": "Write a random checkpoint in the shape of a Pythia model.",
}
SHELLS = ("bash", "zsh", "fish")
_EPILOG = """
`neox-bridge COMMAND --help` explains a command and all of its options, with examples.
`neox-bridge COMMAND -h` shows the common options.

\b
Exit codes of all commands:
  0    done
  1    error
  2    usage error
  3    differences were found
  4    refused, or the checkpoint will not load
  130  interrupted

\b
Shell completion:
  eval "$(neox-bridge --completion bash)"     in ~/.bashrc
  eval "$(neox-bridge --completion zsh)"      in ~/.zshrc
  neox-bridge --completion fish | source      in ~/.config/fish/config.fish
"""


class App(Helped, click.Group):
    """All commands. Only the module of the command that runs is imported."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As in click, but ``help COMMAND`` means ``COMMAND --help``, as in other programs."""
        if args[:1] == ["help"] and not ctx.resilient_parsing:
            args = [*args[1:], "--help"]
        return super().parse_args(ctx, args)

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(import_module(f"neox_bridge.cli.{name}"), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As in click, but an unknown command raises a usage error in the form of this program."""
        if args[0] not in COMMANDS and not ctx.resilient_parsing:
            no_such_command(args[0], COMMANDS)
        return super().resolve_command(ctx, args)

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if not is_short(ctx):
            super().format_epilog(ctx, formatter)
            return
        formatter.write_paragraph()
        formatter.write_text("`neox-bridge COMMAND -h` shows the common options of a command.")


def _show_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from neox_bridge.version import __version__

        click.echo(f"neox-bridge {__version__}")
        ctx.exit()


def _print_completion(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    if value is None or ctx.resilient_parsing:
        return
    from click.shell_completion import get_completion_class

    kind = get_completion_class(value)
    assert kind is not None
    if value == "bash":  # otherwise bash splits neox@2024-03 into three words
        click.echo("COMP_WORDBREAKS=${COMP_WORDBREAKS//@/}")
    click.echo(kind(ctx.command, {}, "neox-bridge", "_NEOX_BRIDGE_COMPLETE").source())
    ctx.exit()


def _eager(*words: str, **more: Any) -> click.Option:
    return click.Option(words, is_eager=True, expose_value=False, **more)


app = App(
    "neox-bridge",
    params=[
        _eager("--version", is_flag=True, callback=_show_version, help="Print the version."),
        _eager(
            "--completion",
            type=Word(SHELLS),
            metavar="|".join(SHELLS),
            callback=_print_completion,
            help="Print the completion script for this shell.",
        ),
    ],
    help="Converts language-model checkpoints between Hugging Face and GPT-NeoX.",
    epilog=_EPILOG,
    no_args_is_help=True,
    context_settings={"max_content_width": HELP_WIDTH},
)


def main() -> None:
    """Run the command line; ends the process with one of the documented exit codes."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # a signal that the parent process ignores (nohup) stays ignored
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    protect_streams()
    try:
        app(prog_name="neox-bridge")
    except SystemExit as end:
        if problem := stdout_failure():
            say(
                "error",
                f"cannot write to stdout: {problem}. Files that were already written are kept.",
            )
            sys.exit(end.code or 1)
        raise
