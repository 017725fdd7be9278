"""``neox-bridge toy``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from neox_bridge.cli.command import Argument, command
from neox_bridge.cli.errors import writing
from neox_bridge.cli.options import Execution, Output
from neox_bridge.cli.output import print_result, tell
from neox_bridge.cli.progress import progress_bar
from neox_bridge.cli.values import Word
from neox_bridge.option import WRITTEN, inherited, option

# same names as architectures.shapes.PYTHIA, which is not imported for --help; a test compares them
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


@dataclass(frozen=True, slots=True)
class ToyOptions:
    """Options for the random checkpoint."""

    kind: Literal["hf", "neox"] = option(
        None,
        "The format to write.",
        "--as",
        group=WRITTEN,
        common=True,
        choices=("hf", "neox"),
        required=True,
    )
    seed: int = option(
        0,
        "Seed of the random weights. The same seed gives the same bytes.",
        group=WRITTEN,
        common=True,
        minimum=0,
    )
    layers: int | None = option(
        None, "Number of layers. Default: as in the model.", group=WRITTEN, common=True, minimum=1
    )
    overwrite: bool = inherited(Execution, "overwrite", False, text="Replace DIR if it exists.")
    max_workers: int | None = inherited(Execution, "max_workers")


@command(
    "toy",
    Argument(
        "name",
        "NAME",
        f"The model whose shape is used: {', '.join(NAMES)}.",
        type=Word(NAMES),
    ),
    Argument("folder", "DIR", "The folder to write to."),
    ToyOptions,
    Output,
)
def toy(name: str, folder: str, options: ToyOptions, output: Output) -> None:
    """Write a random fp16 checkpoint in the shape of a Pythia model, for tests and benchmarks.

    The weights are random, and their activations are close to zero. A toy shows whether files are
    converted and load, but not whether a model computes well: `verify --logits` hardly sees
    differences such as gelu against gelu_fast.

    \b
    Examples:
      neox-bridge toy pythia-70m toy-hf --as hf
      neox-bridge toy pythia-410m toy-neox --as neox
    """
    with writing(folder):
        from neox_bridge.execution.execute import execute
        from neox_bridge.toy import plan_toy

        plan = plan_toy(name, folder, options.kind, options.seed, options.layers)
        tell(plan, output.quiet)
        with progress_bar(plan.size, "writing", output.quiet) as progress:
            result = execute(
                plan,
                folder,
                overwrite=options.overwrite,
                workers=options.max_workers,
                progress=progress,
            )
    print_result(plan, replace(result, verified=None), folder, output)
