"""``neox-bridge toy``."""

from typing import Annotated

import typer

from neox_bridge.cli import values
from neox_bridge.cli.errors import writing
from neox_bridge.cli.output import print_result, tell
from neox_bridge.cli.progress import progress_bar

# those of architectures.shapes.PYTHIA, which isn't imported for --help; a test compares them
NAMES = (
    "pythia-70m",
    "pythia-160m",
    "pythia-410m",
    "pythia-1b",
    "pythia-1.4b",
    "pythia-2.8b",
    "pythia-6.9b",
    "pythia-12b",
)


def toy(
    name: Annotated[
        str,
        typer.Argument(
            parser=values.one_of(*NAMES)["parser"],
            metavar="NAME",
            help=f"Whose shape: {', '.join(NAMES)}.",
        ),
    ],
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The folder to write.")],
    kind: Annotated[
        str, typer.Option("--as", **values.one_of("hf", "neox"), help="The kind to write.")
    ],
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="The same seed gives the same bytes.")
    ] = 0,
    layers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Fewer (or more) blocks, for quick trials."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DIR where it exists.")
    ] = False,
    max_workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Threads that write.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was written as JSON on stdout.")
    ] = False,
    quiet: values.Quiet = False,
) -> None:
    """Write a random fp16 checkpoint of exactly a Pythia's shape, for trials and benchmarks.

    \b
    Examples:
      neox-bridge toy pythia-70m toy-hf --as hf
      neox-bridge toy pythia-410m toy-neox --as neox
    """
    with writing(folder):
        from neox_bridge.execution.execute import execute
        from neox_bridge.toy import plan_toy

        plan = plan_toy(name, folder, "hf" if kind == "hf" else "neox", seed, layers)
        tell(plan, quiet)
        with progress_bar(plan.size, "writing", quiet) as progress:
            result = execute(
                plan, folder, overwrite=overwrite, workers=max_workers, progress=progress
            )
    print_result(plan, result, folder, as_json, quiet)
