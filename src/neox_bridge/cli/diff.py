"""``neox-bridge diff``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import click

from neox_bridge.cli.command import Argument, command, only
from neox_bridge.cli.inspect_stored import BY_NAMES
from neox_bridge.cli.options import Execution, Output, Source
from neox_bridge.cli.output import print_json, print_line, tell_findings
from neox_bridge.cli.progress import progress_bar
from neox_bridge.errors import UsageError
from neox_bridge.option import inherited, option
from neox_bridge.wording import plural

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from neox_bridge.layouts.checkpoint import Checkpoint
    from neox_bridge.layouts.stored_model import StoredModel
    from neox_bridge.verification.compare import Difference


_MOST_NAMES = 6  # of tensors that only one side has, each on a line of its own


@dataclass(frozen=True, slots=True)
class DiffOptions:
    """Options for what is compared and printed."""

    tensor: str = option(
        "*",
        "Only tensors whose names match this pattern, such as '*.bias'.",
        common=True,
        metavar="GLOB",
    )
    optimizer: bool = option(
        False, "Also compare the optimizer states, as 'exp_avg: NAME'.", common=True
    )
    stat: bool = option(False, "Print only how many tensors differ.", common=True)
    every: bool = option(
        False,
        "Print a line for every tensor that differs. By default, tensors that differ in the same "
        "dtypes share a line, and so do many that only one side has, by their names.",
        "--all",
    )
    plot: str | None = option(None, "Plot the relative differences per block.", value="picture")
    max_workers: int | None = inherited(Execution, "max_workers")


@command(
    "diff",
    Argument("first", "A", "A checkpoint in any format, or any Hugging Face repository."),
    Argument("second", "B", "Another checkpoint."),
    DiffOptions,
    only(Source, "configs", "gqa_order"),
    Output,
)
def diff(first: str, second: str, options: DiffOptions, reading: Source, output: Output) -> None:
    """Compare two checkpoints tensor by tensor, in any formats and layouts.

    The largest relative difference comes first. Tensor names are those of Hugging Face. Hugging
    Face repositories of any family are compared by name, shape, dtype and bits.

    \b
    Examples:
      neox-bridge diff run/global_step1000 run/global_step2000 --tensor '*layernorm*'
      neox-bridge diff pythia-410m pythia-neox --stat --plot differences.svg

    Exit codes: 0 equal, 3 different, 1 error, 4 not comparable.
    """
    from neox_bridge.conversion import diff_sides, diff_tensors
    from neox_bridge.layouts.open import check_configs_used
    from neox_bridge.planning.option_checks import check_gqa_order, check_optimizer

    if options.stat and options.every:
        reason = "--stat prints no tensors, and --all prints every tensor"
        raise UsageError(["stat", "all"], reason, "Leave one of them out.")
    if options.plot is not None:
        from neox_bridge.verification.drawing import check_plot

        check_plot(options.plot)
    a, b = (reading.open_any(path) for path in (first, second))
    check_configs_used(reading.configs, a, b)
    check_gqa_order(reading.gqa_order, a, b)
    check_optimizer(options.optimizer, a, b)
    a, b = diff_sides(a, b, optimizer=options.optimizer)
    with progress_bar(a.size + b.size, "comparing", output.quiet) as progress:
        result = diff_tensors(a, b, progress, pattern=options.tensor, workers=options.max_workers)
    differences = result.tensors
    if options.plot:
        from neox_bridge.verification.differences_figure import differences_figure
        from neox_bridge.verification.drawing import save

        save(differences_figure(differences), options.plot)
    apart = [difference for difference in differences if difference.kind != "equal"]
    if output.as_json:
        print_json(replace(result, first=first, second=second).to_json())
    elif not output.quiet:
        _tell_reading(a, b, output)
        for line in () if options.stat else _lines(apart, every=options.every):
            print_line(line)
        equal = len(differences) - len(apart)
        print_line(f"{plural(len(differences), 'tensor')}: {equal} equal, {len(apart)} different")
    if apart:
        raise click.exceptions.Exit(3)


def _tell_reading(
    first: Checkpoint | StoredModel, second: Checkpoint | StoredModel, output: Output
) -> None:
    """Print what is worth knowing about how both sides were read."""
    from neox_bridge.layouts.stored_model import StoredModel
    from neox_bridge.layouts.unknown_keys import undecided

    if isinstance(first, StoredModel) or isinstance(second, StoredModel):
        print_line(BY_NAMES)
        return
    # diff compares only tensors, so these findings do not change the verdict
    findings = (replace(f, severity="warning") for f in undecided(first, second))
    tell_findings(findings, output.quiet)


def _lines(differences: Sequence[Difference], *, every: bool) -> Iterator[str]:
    """Lines for differences, largest relative one first.

    A cast of many tensors is one line, and so are many names of one side that differ in numbers.
    """
    from neox_bridge.layouts.stored_model import pattern_of
    from neox_bridge.verification.compare import ONE_SIDED

    sides = [difference for difference in differences if difference.kind in ONE_SIDED]
    groups: dict[tuple[str, ...], list[Difference]] = {}
    for difference in differences:
        key: tuple[str, ...] = (difference.name,)
        if every:
            pass
        elif difference.kind in ("dtype", "values") and difference.detail:
            key = ()
        elif difference.kind in ONE_SIDED and len(sides) > _MOST_NAMES:
            key = (pattern_of(difference.name),)
        groups.setdefault((difference.kind, difference.detail, *key), []).append(difference)
    for group in groups.values():
        yield _line(group)


def _line(group: Sequence[Difference]) -> str:
    """One line for tensors that differ in the same way."""
    from neox_bridge.layouts.stored_model import pattern_of
    from neox_bridge.verification.compare import ONE_SIDED
    from neox_bridge.verification.verify import describe

    first = group[0]
    line = describe(first)
    if len(group) > 1 and first.kind in ONE_SIDED:
        line = f"{pattern_of(first.name)}: {plural(len(group), 'tensor')} {ONE_SIDED[first.kind]}"
    elif len(group) > 1:
        line = f"{plural(len(group), 'tensor')}: {first.detail}"
    if first.kind == "dtype":
        return f"{line}, equal after casting the first"
    if first.kind == "values" and first.detail and first.differing:
        of = f", {first.name}" if len(group) > 1 else ""
        return f"{line}, values differ by {first.relative:.2g} at most (relative{of})"
    return line
