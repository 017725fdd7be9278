"""``neox-bridge batch``."""

import threading
from collections.abc import Iterable
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neox_bridge.cli import values
from neox_bridge.cli.asked import Asked, asked_of, explicit, taking
from neox_bridge.cli.convert import convert
from neox_bridge.cli.output import print_json, say, tell_findings
from neox_bridge.cli.publish import Upload
from neox_bridge.errors import UsageError
from neox_bridge.wording import plain

if TYPE_CHECKING:
    from neox_bridge.batch.items import Item
    from neox_bridge.batch.on_hub import HubModel
    from neox_bridge.batch.row import Row
    from neox_bridge.batch.run import Batch
    from neox_bridge.execution.executors import Pool
    from neox_bridge.findings import Finding

_WHICH = "Which checkpoints"
_CONVERTS_OWN = ("source", "target", "revision", "step")


@taking(convert, without=_CONVERTS_OWN)
def batch(
    ctx: typer.Context,
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC... DST",
            help="Runs (a GPT-NeoX root, a folder of step1000, step2000, …, ORG/NAME of the Hub "
            "with a branch for each step), single checkpoints, or URLs; then the folder to write, "
            "with a folder for each, or hf://ORG/NAME for a branch each. Or a FILE.yml that says "
            "all of it.",
        ),
    ],
    steps: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            rich_help_panel=_WHICH,
            help="0,1000,2000; ranges 1000-5000 or 0-143000:1000; last; all.",
        ),
    ] = "all",
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            rich_help_panel=_WHICH,
            help="Go on with new steps as the run's `latest` moves, until Ctrl-C.",
        ),
    ] = False,
    interval: Annotated[
        float,
        typer.Option(
            min=0.1, metavar="S", rich_help_panel=_WHICH, help="Seconds between two looks."
        ),
    ] = 30.0,
    retries: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", rich_help_panel=values.RUN, help="Of a checkpoint that failed."
        ),
    ] = 2,
    recheck: Annotated[
        bool,
        typer.Option(
            "--recheck",
            rich_help_panel=values.RUN,
            help="Read all of what is done already; else sizes are compared, and hashes of files "
            "that were touched.",
        ),
    ] = False,
    norms: Annotated[
        bool,
        typer.Option(
            "--norms",
            rich_help_panel=values.RUN,
            help="L2 norms of the result's tensors, for the page of `report`.",
        ),
    ] = False,
    executor: Annotated[
        str,
        typer.Option(
            **values.one_of("local", "ray"),
            rich_help_panel=values.RUN,
            help="Processes of this machine, or a Ray cluster (extra [ray]).",
        ),
    ] = "local",
    address: Annotated[
        str,
        typer.Option(metavar="ADDRESS", rich_help_panel=values.RUN, help="Of the Ray cluster."),
    ] = "auto",
    max_workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", rich_help_panel=values.RUN, help="Processes that write."),
    ] = None,
    log: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=values.RUN,
            help="Add a line of JSON for each thing that happens.",
        ),
    ] = None,
    **given: Any,
) -> None:
    """Convert many checkpoints. Those that are already converted and still whole are skipped.

    Each goes into DST/stepN (DST/RUN/stepN if there are several runs), whole or not at all, and is
    verified. If one fails, it is tried again, and the others continue. Run the same command again
    to continue after an interruption.

    \b
    Examples:
      neox-bridge batch checkpoints/ converted/ --steps 0-143000:1000
      neox-bridge batch run-a run-b converted/ --dtype float16 --dry-run
      neox-bridge batch EleutherAI/neox-ckpt-pythia-160m converted/ --steps 0-143000:1000
      neox-bridge batch suite.yml --max-workers 8

    Exit codes: 0 all are done, 1 some failed or a source is missing, 2 usage, 130 interrupted.
    """
    own: dict[str, Any] = {**locals(), **given}
    if len(paths) == 1 and paths[0].endswith((".yml", ".yaml")):
        from neox_bridge.cli.batch_file import merged

        own = merged(ctx, paths[0])
    _check_applies(own, own.get("explicit") or explicit(ctx))
    *sources, target = own["paths"]
    if not sources:
        raise typer.BadParameter("Name at least one SRC, and DST.", param_hint="SRC... DST")
    _run(sources, target, own, asked_of(own))


def _check_applies(own: dict[str, Any], given: frozenset[str]) -> None:
    """Raise UsageError for options of a batch that would be ignored, or that make no sense."""
    from neox_bridge.verification.step_choice import check_steps

    check_steps(own["steps"])
    if "interval" in given and not own["watch"]:
        raise UsageError(["interval"], "only for --watch", "Add --watch, or leave it out.")
    if "address" in given and own["executor"] != "ray":
        raise UsageError(["address"], "only for --executor ray", "Add it, or leave this out.")
    Upload(own["private"], own["create_pr"], own["work"]).check(own["paths"][-1])
    if not own["paths"][-1].startswith("hf://"):  # for which files are written on a disk first
        from neox_bridge.execution.execute import check_options

        check_options(own["paths"][-1], every_crc=own["crc"])


def _check_first(items: "list[Item]", asked: Asked) -> None:
    """Raise UsageError where the options do not apply to the first checkpoint of a run.

    What else is wrong with it is for its row.
    """
    for item in {item.run: item for item in reversed(items)}.values():
        _check_item(item, asked)


def _check_item(item: "Item", asked: Asked) -> None:
    from neox_bridge.errors import BridgeError
    from neox_bridge.planning.option_checks import check_options

    try:
        check_options(item.source.open(), asked.options, asked.given)
    except UsageError:
        raise
    except (BridgeError, OSError):
        return


def _run(sources: list[str], target: str, own: dict[str, Any], asked: Asked) -> None:
    from neox_bridge.batch.items import find_items
    from neox_bridge.batch.run import Batch, default_ahead

    def find() -> "tuple[list[Item], list[Finding]]":
        return find_items(
            sources,
            own["steps"],
            configs=own["config"] or (),
            gqa_order=own["gqa_order"],
            masters=asked.masters,
        )

    quiet = own["quiet"] or own["as_json"]
    hub = _hub(target, own)
    _check_library(target, hub is not None)
    settings = Batch(
        target,
        asked.options,
        overwrite=own["overwrite"],
        verify=asked.verify,
        retries=own["retries"],
        every_crc=asked.every_crc,
        hash_name=asked.hash_name,
        every_hash=own["recheck"],
        norms=own["norms"],
        version=asked.version,
        hub=hub,
    )
    if own["dry_run"]:
        items, faults = find()
        is_lost = _tell_faults(faults, quiet)
        _check_first(items, asked)
        _dry_run(items, settings, own["as_json"], is_lost)
        return
    items, faults = ([], []) if own["watch"] else find()
    is_lost = _tell_faults(faults, quiet)
    _check_first(items, asked)
    with closing(_pool(own["executor"], own["address"], own["max_workers"])) as pool:
        from dataclasses import replace

        settings = replace(settings, ahead=default_ahead(pool.slots))
        if own["watch"]:
            rows = _watch(find, own["interval"], settings, pool, own)
        else:
            rows = _all(items, settings, pool, own)
    _end(rows, target, own, is_lost)


def _tell_faults(faults: "list[Finding]", quiet: bool) -> bool:
    """Say what is wrong with the sources; whether one of them is missing or cannot be read."""
    errors = [fault for fault in faults if fault.severity == "error"]
    tell_findings(errors if quiet else faults, quiet=False)
    return bool(errors)


def _check_library(target: str, on_hub: bool) -> None:
    """Raise BridgeError, once and not for each checkpoint, where what a target needs is missing."""
    from neox_bridge.stores.paths import is_url

    if on_hub:
        from neox_bridge.stores.hub_api import hub_api

        hub_api(f"{target} is on the Hub")
    elif is_url(target):
        from neox_bridge.stores.objects import filesystem

        filesystem(target)


def _hub(target: str, own: dict[str, Any]) -> "HubModel | None":
    """The model whose branches a batch writes, where its target is one."""
    if not target.startswith("hf://"):
        return None
    from neox_bridge.batch.on_hub import HubModel
    from neox_bridge.cli.publish import work_base
    from neox_bridge.stores.hub_names import hub_target

    if "@" in target:
        raise typer.BadParameter(f"{target}: a batch writes a branch for each step; leave it out.")
    repo = hub_target(target).repo
    return HubModel(repo, work_base(own["work"]), own["private"], own["create_pr"])


def _all(items: "list[Item]", settings: "Batch", pool: "Pool", own: dict[str, Any]) -> "list[Row]":
    from dataclasses import replace

    from neox_bridge.batch.run import run_batch
    from neox_bridge.cli.batch_view import view

    rows: list[Row] = []
    with view(len(items), own["log"], own["quiet"]) as tell:
        try:
            rows.extend(run_batch(items, replace(settings, tell=tell), pool))
        except KeyboardInterrupt:
            left = len(items) - len(rows)
            raise KeyboardInterrupt(
                f"{len(rows)} of {len(items)} checkpoints are settled, {left} aren't: the same "
                "command goes on with them"
            ) from None
    order = {item.name: number for number, item in enumerate(items)}
    return sorted(rows, key=lambda row: order[row.name])


def _watch(
    find: Any, interval: float, settings: "Batch", pool: "Pool", own: dict[str, Any]
) -> "list[Row]":
    """Rounds until Ctrl-C, which is how a watch ends; what failed is tried in the next round."""
    from neox_bridge.batch.watch import rounds

    rows: dict[str, Row] = {}
    try:
        for items in rounds(lambda: find()[0], interval, threading.Event()):
            new = [i for i in items if i.name not in rows or rows[i.name].status == "failed"]
            rows |= {row.name: row for row in (_all(new, settings, pool, own) if new else ())}
    except KeyboardInterrupt as error:
        if str(error):  # in the middle of one
            raise
    return list(rows.values())


def _pool(executor: str, address: str, workers: int | None) -> "Pool":
    if executor == "ray":
        from neox_bridge.execution.ray_cluster import RayCluster

        return RayCluster(address, workers, lambda words: typer.echo(plain(words), err=True))
    from neox_bridge.execution.executors import Processes, default_slots

    return Processes(workers or default_slots())


def _dry_run(items: "Iterable[Item]", settings: "Batch", as_json: bool, is_lost: bool) -> None:
    from neox_bridge.batch.dry_run import dry_run
    from neox_bridge.cli.batch_view import print_dry_run, tell_warnings

    found = dry_run(items, settings)
    if not as_json:
        tell_warnings(found.rows)
    if as_json:
        print_json(found.told())
    else:
        print_dry_run(found)
    if is_lost or any(row.status == "failed" for row in found.rows):
        raise typer.Exit(1)


def _end(rows: "list[Row]", target: str, own: dict[str, Any], is_lost: bool) -> None:
    from neox_bridge.cli.batch_view import document, print_rows, tell_warnings

    if own["as_json"]:
        print_json(document(rows, target))
    elif not own["quiet"]:
        tell_warnings(rows)
        print_rows(rows)
    for row in rows:
        if row.error:
            say("error", f"{row.name}: {row.error}")
    if is_lost or any(row.status == "failed" for row in rows):
        raise typer.Exit(1)
