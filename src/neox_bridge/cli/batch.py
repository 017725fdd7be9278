"""``neox-bridge batch``."""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import click

from neox_bridge.cli.batch_file import read_batch_file
from neox_bridge.cli.command import Argument, command, given, only
from neox_bridge.cli.conversion import conversion_of
from neox_bridge.cli.options import Details, Execution, Source, Upload
from neox_bridge.cli.output import print_json, say, tell_findings
from neox_bridge.cli.publish import check_upload
from neox_bridge.cli.usage import wrong
from neox_bridge.errors import UsageError
from neox_bridge.option import CHECKPOINTS, RUN, inherited, option
from neox_bridge.planning.options import Options
from neox_bridge.wording import plain

if TYPE_CHECKING:
    from collections.abc import Callable

    from neox_bridge.batches.dry_run import DryRun
    from neox_bridge.batches.items import Item
    from neox_bridge.batches.row import BatchResult, BatchRow
    from neox_bridge.batches.run import Batch
    from neox_bridge.execution.executors import Pool
    from neox_bridge.findings import Finding

    FindItems = Callable[[], tuple[list[Item], list[Finding]]]


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """Which checkpoints a batch converts, and how they share the machine."""

    steps: str = option(
        "all",
        "Steps to convert: a list (0,1000,2000), ranges (1000-5000 or 0-143000:1000), last or all.",
        group=CHECKPOINTS,
        common=True,
        metavar="LIST",
    )
    watch: bool = option(
        False,
        "Wait for new steps of the run and convert them, until Ctrl-C.",
        group=CHECKPOINTS,
        common=True,
    )
    interval: float = option(
        30.0,
        "Seconds between checks for new steps with --watch.",
        group=CHECKPOINTS,
        minimum=0.1,
        metavar="S",
    )
    retries: int = option(2, "How often to retry a checkpoint that failed.", group=RUN, minimum=0)
    recheck: bool = option(
        False,
        "Hash all files that are already converted. By default, only sizes are compared, and "
        "hashes of files that were modified later.",
        group=RUN,
    )
    norms: bool = option(
        False, "Compute L2 norms of the written tensors, for `neox-bridge report`.", group=RUN
    )
    executor: Literal["local", "ray"] = option(
        "local",
        "Where to run: processes on this machine, or a Ray cluster (extra [ray]).",
        group=RUN,
        choices=("local", "ray"),
    )
    address: str = option("auto", "Address of the Ray cluster.", group=RUN, metavar="ADDRESS")
    max_workers: int | None = inherited(
        Execution, "max_workers", text="Number of worker processes.", common=True
    )
    log: str | None = option(
        None,
        "Append one line of JSON per event to this file. Use - for stdout.",
        group=RUN,
        value="path",
        metavar="FILE",
    )


@command(
    "batch",
    Argument(
        "paths",
        "SRC... DST",
        "One or more sources, then the target. A source is a run (a GPT-NeoX root folder, a "
        "folder of step1000, step2000, …, or a Hub model with a branch per step), a single "
        "checkpoint or a URL. The target is a folder, in which each checkpoint gets a subfolder, "
        "or hf://ORG/NAME, where each gets a branch. Or one FILE.yml that contains all of it.",
        many=True,
        required=True,
    ),
    BatchOptions,
    Options,
    Details,
    only(Source, "configs"),
    Upload,
    only(Execution, "as_json", "quiet", "dry_run", "overwrite", "no_verify"),
    prepare=read_batch_file,
)
def batch(
    paths: tuple[str, ...],
    choice: BatchOptions,
    options: Options,
    details: Details,
    reading: Source,
    upload: Upload,
    execution: Execution,
) -> None:
    """Convert many checkpoints. Those that are already converted and still intact are skipped.

    Each checkpoint is written to DST/stepN (DST/RUN/stepN for several runs) atomically, and
    verified. A checkpoint that fails is retried, and the others continue. Run the same command
    again to continue after an interruption.

    \b
    Examples:
      neox-bridge batch checkpoints/ converted/ --steps 0-143000:1000
      neox-bridge batch run-a run-b converted/ --dtype float16 --dry-run
      neox-bridge batch EleutherAI/neox-ckpt-pythia-160m converted/ --steps 0-143000:1000
      neox-bridge batch suite.yml --max-workers 8

    Exit codes: 0 all done, 1 some failed or a source is missing, 2 usage error, 130 interrupted.
    """
    from neox_bridge.batches.items import check_first, check_places, find_items
    from neox_bridge.batches.on_hub import hub_model
    from neox_bridge.batches.row import BatchResult
    from neox_bridge.batches.run import Batch

    *sources, target = paths
    _check_applies(choice, details, upload, target)
    if not sources:
        raise wrong("SRC... DST", "one of them is missing", "Give at least one SRC, and DST.")
    conversion = conversion_of(options, details)

    def find() -> tuple[list[Item], list[Finding]]:
        return find_items(
            sources,
            choice.steps,
            configs=reading.configs,
            gqa_order=options.gqa_order,
            masters=conversion.masters,
        )

    settings = Batch(
        target,
        conversion.options,
        overwrite=execution.overwrite,
        verify=not execution.no_verify,
        retries=choice.retries,
        every_crc=details.crc,
        hash_name=conversion.hash_name,
        every_hash=choice.recheck,
        norms=choice.norms,
        version=conversion.version,
        hub=hub_model(target, upload.work, private=upload.private, create_pr=upload.create_pr),
    )
    later = choice.watch and not execution.dry_run
    items, faults = ([], []) if later else find()
    check_places(sources, target, settings.hub)
    _tell_faults(faults, execution.quiet or execution.as_json)
    check_first(items, conversion.options, conversion.given)
    if execution.dry_run:
        from neox_bridge.batches.dry_run import dry_run

        preview = dry_run(items, settings)
        preview = replace(preview, sources=tuple(sources), findings=tuple(faults))
        _print_dry_run(preview, execution.as_json)
        return
    with closing(_pool(choice)) as pool:
        convert = partial(_all, settings=settings, pool=pool, log=choice.log, quiet=execution.quiet)
        rows = _watch(find, choice.interval, convert) if choice.watch else convert(items)
    _end(BatchResult(target, tuple(rows), tuple(faults), tuple(sources)), execution)


def _check_applies(choice: BatchOptions, details: Details, upload: Upload, target: str) -> None:
    """Raise UsageError for options that would be ignored or that contradict each other."""
    from neox_bridge.stores.folder import is_hub
    from neox_bridge.verification.step_choice import check_steps

    check_steps(choice.steps)
    if given("interval") and not choice.watch:
        raise UsageError(["interval"], "only for --watch", "Add --watch, or leave it out.")
    if given("address") and choice.executor != "ray":
        raise UsageError(["address"], "only for --executor ray", "Add it, or leave this out.")
    check_upload(upload, target)
    if not is_hub(target):  # files for the Hub are written to a local disk first
        from neox_bridge.execution.execute import check_options

        check_options(target, every_crc=details.crc)


def _tell_faults(faults: list[Finding], quiet: bool) -> None:
    """Print the findings about the sources."""
    errors = [fault for fault in faults if fault.severity == "error"]
    tell_findings(errors if quiet else faults, quiet=False)


def _all(
    items: list[Item], settings: Batch, pool: Pool, log: str | None, quiet: bool
) -> list[BatchRow]:
    from neox_bridge.batches.run import run_batch
    from neox_bridge.cli.batch_view import view

    rows: list[BatchRow] = []
    with view(len(items), log, quiet) as tell:
        try:
            rows.extend(run_batch(items, replace(settings, tell=tell), pool))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{len(rows)} of {len(items)} done. Run the same command again to continue"
            ) from None
    order = {item.name: number for number, item in enumerate(items)}
    return sorted(rows, key=lambda row: order[row.name])


def _watch(
    find: FindItems, interval: float, convert: Callable[[list[Item]], list[BatchRow]]
) -> list[BatchRow]:
    """Convert new steps until Ctrl-C. Checkpoints that failed are retried in the next round."""
    from neox_bridge.batches.watch import rounds

    rows: dict[str, BatchRow] = {}
    try:
        for items in rounds(lambda: find()[0], interval, threading.Event()):
            new = [i for i in items if i.name not in rows or rows[i.name].status == "failed"]
            rows |= {row.name: row for row in (convert(new) if new else ())}
    except KeyboardInterrupt as error:
        if str(error):  # interrupted during a round
            raise
    return list(rows.values())


def _pool(choice: BatchOptions) -> Pool:
    workers = choice.max_workers
    if choice.executor == "ray":
        from neox_bridge.execution.ray_cluster import RayCluster

        return RayCluster(choice.address, workers, lambda words: click.echo(plain(words), err=True))
    from neox_bridge.execution.executors import Processes, default_slots

    return Processes(workers or default_slots())


def _print_dry_run(preview: DryRun, as_json: bool) -> None:
    from neox_bridge.cli.batch_view import print_dry_run, tell_warnings

    if as_json:
        print_json(preview.to_json())
    else:
        tell_warnings(preview.rows)
        print_dry_run(preview)
    if not preview.holds:
        raise click.exceptions.Exit(1)


def _end(result: BatchResult, execution: Execution) -> None:
    from neox_bridge.cli.batch_view import print_rows, tell_warnings

    if execution.as_json:
        print_json(result.to_json())
    elif not execution.quiet:
        tell_warnings(result.rows)
        print_rows(result.rows)
    for row in result.rows:
        if row.error:
            say("error", f"{row.name}: {row.error}")
    if not result.holds:
        raise click.exceptions.Exit(1)
