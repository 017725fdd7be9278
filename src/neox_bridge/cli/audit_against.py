"""``neox-bridge audit --against``: two runs, step by step."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from neox_bridge.cli.output import print_json, print_line, tell_findings
from neox_bridge.cli.progress import progress_bar
from neox_bridge.wording import plural

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from neox_bridge.cli.options import Output
    from neox_bridge.verification.against import Comparison, StepRow
    from neox_bridge.verification.runs import TrainingRun


def audit_against(
    runs: Sequence[TrainingRun],
    twins: Sequence[TrainingRun],
    steps: str,
    configs: Sequence[str],
    *,
    cache: str | None,
    workers: int | None,
    output: Output,
) -> None:
    """Compare runs with their counterparts and print the result; exit code 3 where they differ.

    steps: of the counterparts, as ``--steps`` chose those of ``runs``.
    """
    from neox_bridge.errors import BridgeError
    from neox_bridge.layouts.open import check_configs_used
    from neox_bridge.verification.against import compare_runs, settings_faults
    from neox_bridge.verification.run_pairs import open_pair, pair_runs
    from neox_bridge.verification.step_choice import within

    chosen = pair_runs(runs, [within(run, steps) for run in twins])
    pairs = [open_pair(*pair, configs) for pair in chosen]
    opened = (step.checkpoint for pair in pairs for both in pair.both for step in both)
    check_configs_used(configs, *(one for one in opened if one is not None))
    with progress_bar(sum(pair.size for pair in pairs), "comparing", output.quiet) as progress:
        comparisons = [
            compare_runs(pair, cache=cache, workers=workers, progress=progress) for pair in pairs
        ]
    if not any(comparison.compared + comparison.count("unreadable") for comparison in comparisons):
        names = ", ".join(comparison.source for comparison in comparisons)
        raise BridgeError(
            f"No step of {names} has a counterpart in {', '.join(run.name for run in twins)}, so "
            "nothing was compared. Are these runs of the same model?"
        )
    if output.as_json:
        print_json(_json(comparisons))
    elif not output.quiet:
        for comparison in comparisons:
            _print(comparison)
    for comparison in comparisons:
        tell_findings(settings_faults(comparison), output.quiet or output.as_json)
    if not all(comparison.holds for comparison in comparisons):
        raise click.exceptions.Exit(3)


def _json(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """As ``verification/against.schema.json`` describes it."""
    from neox_bridge.verification.against import SCHEMA_VERSION, faults_of

    return {
        "schema_version": SCHEMA_VERSION,
        "holds": all(comparison.holds for comparison in comparisons),
        "compared": sum(comparison.compared for comparison in comparisons),
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "findings": [asdict(fault) for entry in comparisons for fault in faults_of(entry)],
    }


def _print(comparison: Comparison) -> None:
    from neox_bridge.verification.against import compared_dtypes

    print_line(f"{comparison.source} against {comparison.twin}")
    print_line(f"  {'step':>10}  {'verdict':<15}{'tensors':>8}")
    for row in comparison.rows:
        verdict = "DIFFERS" if row.status == "differs" else row.status
        count = f"{row.tensors:,}" if row.tensors else ""
        words = "; ".join(_words(row, comparison))
        print_line(f"  {row.label:>10}  {verdict:<15}{count:>8}  {words}".rstrip())
    for source, twin in compared_dtypes(comparison.rows):
        print_line(f"  {source} and {twin} were compared after the cast that keeps every value")
    counts = (
        (comparison.count("same"), "the same"),
        (comparison.count("differs"), "with other weights"),
        (comparison.count("unreadable"), "that cannot be read"),
        (comparison.count("no counterpart"), "without a counterpart"),
    )
    summary = ", ".join(f"{count} {words}" for count, words in counts if count)
    print_line(f"{plural(len(comparison.rows), 'step')}: {summary}")


def _words(row: StepRow, comparison: Comparison) -> Iterator[str]:
    from neox_bridge.verification.against import origin_words

    if row.status == "differs":
        yield f"{len(row.differences)} differ"
        if words := origin_words(row, comparison):
            yield words
    elif row.status == "unreadable":
        yield row.reason
    elif row.status == "no counterpart":
        yield f"{comparison.twin if row.side == 'twin' else comparison.source} has no such step"
    if row.saved is not None:
        yield f"its files say that it is step {row.saved}"
