"""``neox-bridge verify`` and ``neox-bridge diff``."""

from typing import Annotated

import typer

from neox_bridge.cli import plotting, values
from neox_bridge.cli.output import human, plural, print_json, tell_findings
from neox_bridge.cli.progress import progress_bar

Workers = Annotated[int | None, typer.Option(min=1, metavar="N", help="Threads that compare.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def verify(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The checkpoint it came from.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="What was made of it.")],
    gqa_order: Annotated[
        str | None,
        typer.Option(
            **values.one_of("grouped", "interleaved"),
            help="The order that `convert` was told, for a GPT-NeoX source that doesn't tell.",
        ),
    ] = None,
    max_workers: Workers = None,
    as_json: AsJson = False,
    quiet: values.Quiet = False,
) -> None:
    """Say whether DST is SRC: every tensor bit by bit, the padding, the ranks, the config.

    Declared changes are no differences: a cast, padding, rows cut to the tokenizer, norms written
    twice, biases spread over ranks. `convert` does this by itself.

    \b
    Example:
      neox-bridge verify pythia-410m pythia-neox

    Exit codes: 0 it is, 3 it isn't, 1 error.
    """
    from dataclasses import asdict

    from neox_bridge.layouts.open import open_checkpoint
    from neox_bridge.verification.verify import describe
    from neox_bridge.verification.verify import verify as compare

    first = open_checkpoint(source, gqa_order=gqa_order)  # type: ignore[arg-type]
    second = open_checkpoint(target)
    with progress_bar(second.size, "verifying", quiet) as progress:
        found = compare(first, second, workers=max_workers, progress=progress)
    if as_json:
        print_json({"holds": found.holds, **asdict(found)})
    elif not quiet:
        tell_findings(found.findings, quiet)
        for difference in found.differences:
            print(describe(difference))
        what = f"{plural(found.tensors, 'tensor')}, {human(found.size)}"
        verdict = "equal, bit by bit" if found.holds else "NOT what the source says"
        print(f"{target}: {what}: {verdict}")
    if not found.holds:
        raise typer.Exit(3)


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A checkpoint of any kind.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    tensor: Annotated[
        str, typer.Option(metavar="GLOB", help="Only tensors of such names, quoted: '*.bias'.")
    ] = "*",
    stat: Annotated[bool, typer.Option("--stat", help="Only how many differ.")] = False,
    plot: Annotated[
        str | None,
        typer.Option(
            **plotting.plot_file(), help="Draw the relative differences, block by block, too."
        ),
    ] = None,
    max_workers: Workers = None,
    as_json: AsJson = False,
    quiet: values.Quiet = False,
) -> None:
    """Compare two checkpoints in the model's own tensors, whatever their kinds and layouts.

    Largest relative difference first. Names are Hugging Face's.

    \b
    Examples:
      neox-bridge diff run/global_step1000 run/global_step2000 --tensor '*layernorm*'
      neox-bridge diff pythia-410m pythia-neox --stat --plot differences.svg

    Exit codes: 0 equal, 3 different, 1 error.
    """
    from dataclasses import asdict

    from neox_bridge.layouts.open import open_checkpoint
    from neox_bridge.verification.diff import diff as compare
    from neox_bridge.verification.verify import describe

    plotting.prepare(plot)
    a, b = open_checkpoint(first), open_checkpoint(second)
    with progress_bar(a.size + b.size, "comparing", quiet) as progress:
        found = compare(a, b, pattern=tensor, workers=max_workers, progress=progress)
    if plot:
        from neox_bridge.verification.plots import plot_differences

        plot_differences(found, plot)
    apart = [difference for difference in found if difference.kind != "equal"]
    if as_json:
        print_json({"equal": not apart, "tensors": [asdict(difference) for difference in found]})
    elif not quiet:
        for difference in () if stat else apart:
            print(describe(difference))
        print(f"{plural(len(found), 'tensor')}: {len(found) - len(apart)} equal, {len(apart)} not")
    if apart:
        raise typer.Exit(3)
