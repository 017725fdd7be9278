"""``neox-bridge audit``, of runs alone and with --against."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from neox_bridge.cli.command import Argument, command, given, only
from neox_bridge.cli.inspect_stored import BY_NAMES
from neox_bridge.cli.options import Execution, Output, Source
from neox_bridge.cli.output import print_json, print_line, tell_findings
from neox_bridge.cli.progress import progress_bar
from neox_bridge.documents import document
from neox_bridge.errors import BridgeError, UsageError
from neox_bridge.option import inherited, option
from neox_bridge.wording import KINDS, human, plain, plural, verb

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from neox_bridge.verification.against import Comparison, StepRow
    from neox_bridge.verification.audit import Audit
    from neox_bridge.verification.runs import TrainingRun
    from neox_bridge.verification.steps import Step


@dataclass(frozen=True, slots=True)
class AuditOptions:
    """What the audit checks, and where."""

    against: str | None = option(
        None,
        "Compare each step with the same step of this run, which should have the same weights. A "
        "folder or a Hub model (ORG/NAME), in either format.",
        common=True,
        value="path",
        metavar="TWIN",
    )
    steps: str = option(
        "all",
        "Steps to read: a list (0,1000), ranges (5000-9000 or 10000-143000:1000), last or all.",
        common=True,
        metavar="LIST",
    )
    same_init: bool = option(
        False, "Report runs of the same shape whose initial weights (step 0) differ.", common=True
    )
    optimizer: bool = option(False, "Also audit the optimizer states, if there are any.")
    blobs: bool = option(
        False,
        "Also read every file of a model in the Hugging Face cache, to compare it with the hash in "
        "its name.",
    )
    cache: str | None = option(
        None,
        "The folder for cached hashes, so that unchanged files are not read again. Default: "
        "neox-bridge/audit in the user's cache folder.",
        value="path",
        metavar="DIR|none",
    )
    plot: str | None = option(
        None, "Plot the norms over the steps (extra [plot]).", common=True, value="picture"
    )
    max_workers: int | None = inherited(
        Execution, "max_workers", text="Number of worker threads. Default: 2."
    )


@command(
    "audit",
    Argument(
        "folders",
        "DIR...",
        "A run (a GPT-NeoX root folder, a folder of step1000, step2000, …, or a Hub model with a "
        "branch per step), or a folder of several runs.",
        many=True,
        required=True,
    ),
    AuditOptions,
    only(Source, "configs"),
    Output,
)
def audit(folders: tuple[str, ...], options: AuditOptions, reading: Source, output: Output) -> None:
    """Check every checkpoint of a run, or of a suite of runs, for faults.

    Finds identical steps, weights that belong to another step (down to one rank's shard of one
    layer), runs whose initial weights should be equal but differ or should differ but are equal,
    norms that jump, NaN, changed configs and tokenizers, indexes that their shards contradict, and
    steps that are missing, incomplete or from another model. Format, layout and tensor parallelism
    may change from step to step. DIR is not modified.

    Hugging Face checkpoints may be of any family. Those of a family that neox-bridge does not know
    are compared by the names in their files.

    With --against, each step is compared with the same step of another run instead. If the weights
    differ, the audit says at which other step they are. Different dtypes are compared after a
    lossless cast. Hub models are read in ranges over plain HTTP.

    \b
    Examples:
      neox-bridge audit checkpoints/
      neox-bridge audit suite/ --plot norms.svg
      neox-bridge audit EleutherAI/neox-ckpt-pythia-160m --against EleutherAI/pythia-160m

    Exit codes: 0 nothing is wrong, 3 warnings or errors were found (with --against: weights differ
    or cannot be read), 1 there is nothing to audit.
    """
    from neox_bridge.layouts.open import check_configs_used
    from neox_bridge.verification.audit import audit as look
    from neox_bridge.verification.audit_blobs import blob_bytes
    from neox_bridge.verification.hash_cache import default_folder
    from neox_bridge.verification.opened import open_places
    from neox_bridge.verification.runs import known_runs
    from neox_bridge.verification.step_choice import check_ranges, with_steps

    named = given("same_init", "optimizer", "blobs", "plot")
    if options.against is not None and named:
        raise UsageError(
            named, "cannot be combined with --against", "Leave it out, or audit the run alone."
        )
    if options.plot is not None:
        from neox_bridge.verification.drawing import check_plot

        check_plot(options.plot)
    runs, faults = known_runs(folders)
    check_ranges(options.steps, runs)
    runs = [with_steps(run, options.steps) for run in runs]
    cache = None if options.cache == "none" else options.cache or default_folder()
    if options.against is not None:
        twins, _ = known_runs([options.against])
        _audit_against(folders, runs, twins, options, reading.configs, cache, output)
        return
    opened = open_places(runs, reading.configs)
    checkpoints = [place.checkpoint for place in opened if place.checkpoint is not None]
    check_configs_used(reading.configs, *checkpoints)
    size = sum(place.size + (place.states if options.optimizer else 0) for place in opened)
    size += blob_bytes(opened) if options.blobs else 0
    with progress_bar(size, "reading", output.quiet) as progress:
        result = look(
            opened,
            faults=faults,
            same_init=options.same_init,
            optimizer=options.optimizer,
            blobs=options.blobs,
            cache=cache,
            workers=options.max_workers,
            progress=progress,
        )
    result = replace(result, sources=folders)
    document = result.to_json() if options.plot or output.as_json else {}
    if options.plot:
        _plot(document, options.plot)
    if output.as_json:
        print_json(document)
    elif not output.quiet:
        _print(result)
    tell_findings(result.faults, output.quiet or output.as_json)
    if not result.holds:
        raise click.exceptions.Exit(3)


def _print(result: Audit) -> None:
    from neox_bridge.verification.audit import verdict

    run = None
    width = max([26, *(len(_format(step)) for step in result.steps)]) + 2
    for step in result.steps:
        if step.run != run:
            run = step.run
            print_line(run)
            print_line(
                f"  {'step':>10}  {'format':<{width}}{'bytes':>9}  tensors   read        norm"
            )
        print_line(
            f"  {step.label:>10}  {_format(step):<{width}}{human(step.size):>9}  "
            f"{len(step.tensors):>7,}  {step.read:>5,}  {step.norm:>10.5g}  "
            f"{verdict(step, result.faults)}"
        )
    runs = len({step.run for step in result.steps})
    counts = [sum(f.severity == word for f in result.faults) for word in ("error", "warning")]
    print_line(
        f"{plural(len(result.steps), 'step')} of {plural(runs, 'run')}: "
        f"{plural(counts[0], 'error')}, {plural(counts[1], 'warning')}"
    )


def _format(step: Step) -> str:
    """The format of a step, how it was read if not by a family, and its dtype."""
    words = [KINDS[step.kind]]
    words += [f"TP {step.tp}"] if step.kind == "neox" else []
    words += ["by names"] if step.read_by == "names" else []
    return ", ".join([*words, plain(step.dtype)])


def _plot(document: dict[str, Any], path: str) -> None:
    """Plot the norms of tensors with findings, or else of each kind of weight, or of each run."""
    from neox_bridge.verification.drawing import save
    from neox_bridge.verification.lines_figure import lines_figure
    from neox_bridge.verification.norm_lines import marks, run_lines, suspects, tensor_lines

    steps = [step for step in document["steps"] if step["step"] is not None]
    runs = list(dict.fromkeys(step["run"] for step in steps))
    several = len(runs) > 1
    lines = run_lines(steps) if several else tensor_lines(steps, suspects(document["findings"]))
    title = f"Norms of {runs[0]}" if len(runs) == 1 else "Norms of the runs"
    marked = marks(document["findings"])
    labels = {"x_label": "step", "y_label": "L2 norm"}
    save(lines_figure(title, lines, **labels, log=True, marks=marked), path)


def _audit_against(
    folders: Sequence[str],
    runs: Sequence[TrainingRun],
    twins: Sequence[TrainingRun],
    options: AuditOptions,
    configs: Sequence[str],
    cache: str | None,
    output: Output,
) -> None:
    """Compare runs with their counterparts and print the result; exit code 3 where they differ."""
    from neox_bridge.layouts.open import check_configs_used
    from neox_bridge.verification.against import compare_runs, settings_faults
    from neox_bridge.verification.run_pairs import open_pair, pair_runs
    from neox_bridge.verification.step_choice import within

    chosen = pair_runs(runs, [within(run, options.steps) for run in twins])
    pairs = [open_pair(*pair, configs) for pair in chosen]
    opened = (step.checkpoint for pair in pairs for both in pair.both for step in both)
    check_configs_used(configs, *(one for one in opened if one is not None))
    with progress_bar(sum(pair.size for pair in pairs), "comparing", output.quiet) as progress:
        comparisons = [
            compare_runs(pair, cache=cache, workers=options.max_workers, progress=progress)
            for pair in pairs
        ]
    if not any(comparison.compared + comparison.count("unreadable") for comparison in comparisons):
        names = ", ".join(comparison.source for comparison in comparisons)
        raise BridgeError(
            f"No step of {names} has a counterpart in {', '.join(run.name for run in twins)}, so "
            "nothing was compared. Check that these are runs of the same model."
        )
    if output.as_json:
        print_json(_comparisons_json(folders, options.against, comparisons))
    elif not output.quiet:
        for comparison in comparisons:
            _print_comparison(comparison)
    for comparison in comparisons:
        tell_findings(settings_faults(comparison), output.quiet or output.as_json)
    if not all(comparison.holds for comparison in comparisons):
        raise click.exceptions.Exit(3)


def _comparisons_json(
    folders: Sequence[str], twin: str | None, comparisons: Sequence[Comparison]
) -> dict[str, Any]:
    """The document that ``verification/against.schema.json`` describes."""
    from neox_bridge.verification.against import faults_of

    return document(
        sources=folders,
        twin=twin,
        holds=all(comparison.holds for comparison in comparisons),
        compared=sum(comparison.compared for comparison in comparisons),
        comparisons=comparisons,
        findings=[fault for entry in comparisons for fault in faults_of(entry)],
    )


def _print_comparison(comparison: Comparison) -> None:
    from neox_bridge.verification.against import compared_dtypes

    print_line(f"{comparison.source} against {comparison.twin}")
    print_line(f"  {'step':>10}  {'verdict':<15}{'tensors':>8}")
    for row in comparison.rows:
        verdict = "DIFFERS" if row.status == "differs" else row.status
        count = f"{row.tensors:,}" if row.tensors else ""
        words = "; ".join(_words(row, comparison))
        print_line(f"  {row.label:>10}  {verdict:<15}{count:>8}  {words}".rstrip())
    if any(row.read_by == "names" for row in comparison.rows):
        print_line(f"  {BY_NAMES}")
    for source, twin in compared_dtypes(comparison.rows):
        print_line(f"  {source} and {twin} were compared after a lossless cast")
    counts = (
        (comparison.count("same"), "equal"),
        (comparison.count("differs"), "different"),
        (comparison.count("unreadable"), "unreadable"),
        (comparison.count("no counterpart"), "without a counterpart"),
    )
    summary = ", ".join(f"{count} {words}" for count, words in counts if count)
    print_line(f"{plural(len(comparison.rows), 'step')}: {summary}")


def _words(row: StepRow, comparison: Comparison) -> Iterator[str]:
    from neox_bridge.verification.against import origin_words

    if row.status == "differs":
        yield f"{len(row.differences)} {verb(len(row.differences), 'differ')}"
        if words := origin_words(row, comparison):
            yield words
    elif row.status == "unreadable":
        yield row.reason
    elif row.status == "no counterpart":
        yield f"{comparison.twin if row.side == 'twin' else comparison.source} has no such step"
    if row.saved is not None:
        yield f"its files say that this is step {row.saved}"
