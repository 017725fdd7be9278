"""``neox-bridge audit --against``: two runs, step by step."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer

from neox_bridge.cli.output import print_json, print_line, tell_findings
from neox_bridge.cli.progress import progress_bar
from neox_bridge.wording import plural

if TYPE_CHECKING:
    from neox_bridge.verification.against import Comparison, StepRow
    from neox_bridge.verification.runs import Run


def audit_against(
    runs: "Sequence[Run]",
    twins: "Sequence[Run]",
    steps: str,
    configs: Sequence[str],
    *,
    cache: str | None,
    workers: int | None,
    as_json: bool,
    quiet: bool,
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
    with progress_bar(sum(pair.size for pair in pairs), "comparing", quiet) as progress:
        found = [
            compare_runs(pair, cache=cache, workers=workers, progress=progress) for pair in pairs
        ]
    if not any(comparison.compared + comparison.count("unreadable") for comparison in found):
        names = ", ".join(comparison.source for comparison in found)
        raise BridgeError(
            f"No step of {names} has a counterpart in {', '.join(run.name for run in twins)}, so "
            "nothing was compared. Are these runs of the same model?"
        )
    if as_json:
        print_json(_json(found))
    elif not quiet:
        for comparison in found:
            _print(comparison)
    for comparison in found:
        tell_findings(settings_faults(comparison), quiet or as_json)
    if not all(comparison.holds for comparison in found):
        raise typer.Exit(3)


def _json(found: "Sequence[Comparison]") -> dict[str, Any]:
    """As ``verification/against.schema.json`` describes it."""
    from dataclasses import asdict

    from neox_bridge.verification.against import SCHEMA_VERSION, faults_of

    return {
        "schema_version": SCHEMA_VERSION,
        "holds": all(comparison.holds for comparison in found),
        "compared": sum(comparison.compared for comparison in found),
        "comparisons": [asdict(comparison) for comparison in found],
        "findings": [asdict(fault) for one in found for fault in faults_of(one)],
    }


def _print(found: "Comparison") -> None:
    from neox_bridge.verification.against import compared_dtypes

    print_line(f"{found.source} against {found.twin}")
    print_line(f"  {'step':>10}  {'verdict':<15}{'tensors':>8}")
    for row in found.rows:
        verdict = "DIFFERS" if row.status == "differs" else row.status
        count = f"{row.tensors:,}" if row.tensors else ""
        words = "; ".join(_words(row, found))
        print_line(f"  {row.label:>10}  {verdict:<15}{count:>8}  {words}".rstrip())
    for source, twin in compared_dtypes(found.rows):
        print_line(f"  {source} and {twin} were compared after the cast that keeps every value")
    counts = (
        (found.count("same"), "the same"),
        (found.count("differs"), "with other weights"),
        (found.count("unreadable"), "that cannot be read"),
        (found.count("no counterpart"), "without a counterpart"),
    )
    said = ", ".join(f"{count} {words}" for count, words in counts if count)
    print_line(f"{plural(len(found.rows), 'step')}: {said}")


def _words(row: "StepRow", found: "Comparison") -> Iterator[str]:
    from neox_bridge.verification.against import origin_words

    if row.status == "differs":
        yield f"{len(row.differences)} differ"
        if words := origin_words(row, found):
            yield words
    elif row.status == "unreadable":
        yield row.reason
    elif row.status == "no counterpart":
        yield f"{found.twin if row.side == 'twin' else found.source} has no such step"
    if row.saved is not None:
        yield f"its files say that it is step {row.saved}"
