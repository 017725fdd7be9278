"""Times, memory and disk of everything, beside cp and others' programs, in one run.

    bench.py [--quick] [--shapes pythia-410m pythia-1.4b] [--runs 5] [--mount xfs] ...

Writes docs/explanation/benchmarks.md and its figure; with --quick, which tries all of it on small
shapes, into --folder. What can't be measured here is skipped, and the page says what is missing.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

import batches
import cases
import comparing
import costs
import inside_neox
import published
import resharding
import zero3
from measure import Failed, rounds
from page import Results, Table, page, show
from places import MAKE, Place, Skipped, mounted, ordinary
from sources import NAMED, make

from neox_bridge.architectures.shapes import PYTHIA
from neox_bridge.errors import BridgeError

DOCS = Path(__file__).parents[1] / "docs"
BLOCKS = 80  # of the tall checkpoint of tiny tensors
LARGE, FEW = 2_000_000_000, 3  # of checkpoints of more bytes, so many rounds are enough


def main() -> None:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed program has its byte code
    signal.signal(signal.SIGTERM, _ended)  # so that what is mounted gets unmounted
    options = _options()
    work: Path = options.folder / "work"
    if any(os.path.ismount(work / kind) for kind in MAKE):
        sys.exit(
            f"{work} has a file system mounted in it, left by a run that was killed: umount it"
        )
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        results = _measure(options, work)
    except Failed as error:
        sys.exit(f"error: {error}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _publish(results, options.page or DOCS / "explanation" / "benchmarks.md")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, two rounds")
    parser.add_argument("--shapes", nargs="+", choices=PYTHIA, help="of the conversions")
    parser.add_argument("--runs", type=int, help="rounds")
    parser.add_argument(
        "--mount", nargs="*", choices=MAKE, default=["xfs"], help="file systems to mount"
    )
    parser.add_argument("--sharing", nargs="*", choices=PYTHIA, help="large shapes, there only")
    parser.add_argument("--memory", nargs="*", choices=PYTHIA, help="shapes for memory alone")
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="where to work")
    parser.add_argument("--page", type=Path, help="where to write; docs/explanation/benchmarks.md")
    options = parser.parse_args()
    if options.quick:
        options.page = options.page or options.folder / "benchmarks.md"
    shapes, memory = ["pythia-410m", "pythia-1.4b"], ["pythia-410m", "pythia-2.8b", "pythia-12b"]
    quick = (["pythia-70m"], 2, ["pythia-70m", "pythia-410m"], ["pythia-410m"])
    default = quick if options.quick else (shapes, 5, memory, ["pythia-6.9b"])
    for name, value in zip(("shapes", "runs", "memory", "sharing"), default, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def _measure(options: argparse.Namespace, work: Path) -> Results:
    runs: int = options.runs
    skipped: list[str] = []
    tables = []
    place = ordinary(work)
    _say("starting")
    starts = costs.starts(work, max(runs, 5))
    compared: tuple[str, tuple[Any, ...]] = ("", ())
    for shape in options.shapes:
        _say(f"{shape}, {place.name}: its checkpoints")
        here = replace(place, folder=work / shape)
        first = shape == options.shapes[0]
        make(here.folder, shape, [name for name in NAMED if first or name != "neox-bf16"])
        tables.append(_table(shape, here, runs, skipped, lambda _: True))
        if first:
            _say(f"{shape}: verify and diff")
            rows = comparing.comparisons(here, shape, runs)
            show(rows, rows[0])
            compared = (shape, tuple(rows))
        shutil.rmtree(here.folder)
    for kind in options.mount:
        tables += _mounted(kind, work, options.shapes, runs, skipped, attrgetter("short"))
    shared = [
        table
        for kind in options.mount
        for table in _mounted(kind, work, options.sharing, runs, skipped, attrgetter("large"))
    ]
    _say("resharding")
    run = "pythia-70m" if options.quick else "pythia-160m"
    resharded = resharding.reshardings(place, run, runs)
    show(resharded, resharded[0])
    _say("ZeRO stage 3")
    gathered = zero3.gatherings(place, run, runs, skipped)
    show(gathered, gathered[0])
    _say("inside GPT-NeoX")
    inside = inside_neox.inside(
        work, "pythia-70m" if options.quick else "pythia-410m", runs, skipped
    )
    _say("raw Pythia branches")
    planned = published.plans(work, "160m" if options.quick else "12b")
    taken = tuple(published.taken(work))
    _say("memory")
    memories, without = costs.memories(work, options.memory)
    # what makes many files is last: see ``measure.discard``
    _say("tiny tensors in 32 ranks")
    tiny = costs.tiny_costs(work, min(runs, 3), 20 if options.quick else BLOCKS)
    _say("batches")
    small, large = ("pythia-70m", "pythia-410m" if options.quick else "pythia-1.4b")
    many = batches.batches(work, min(runs, FEW), small, large)
    show(many, many[0])
    return Results(
        f'make bench ARGS="{shlex.join(sys.argv[1:])}"' if sys.argv[1:] else "make bench",
        tuple(tables),
        tuple(shared),
        compared,
        (run, tuple(resharded)),
        (run, tuple(gathered)),
        inside,
        tuple(starts),
        tuple(tiny),
        tuple(memories),
        tuple(many),
        tuple(planned),
        taken,
        tuple(dict.fromkeys([*skipped, *without])),
    )


def _mounted(
    kind: str,
    work: Path,
    shapes: Sequence[str],
    runs: int,
    skipped: list[str],
    wanted: Callable[[cases.Case], bool],
) -> list[Table]:
    tables = []
    for shape in shapes:
        # a source and a copy; others take a part, or none where their blocks are shared
        with contextlib.ExitStack() as stack:
            try:
                there = stack.enter_context(mounted(kind, work, 4 * _bytes(shape) + (1 << 30)))
            except Skipped as missing:
                skipped.append(str(missing))
                break
            _say(f"{shape}, {there.name}: its checkpoints")
            needed = {case.source for case in cases.CASES if wanted(case)}
            make(there.folder, shape, [name for name in NAMED if name in needed])
            tables.append(_table(shape, there, runs, skipped, wanted))
    return tables


def _table(
    shape: str,
    place: Place,
    runs: int,
    skipped: list[str],
    wanted: Callable[[cases.Case], bool],
) -> Table:
    """The conversions in a place that has its checkpoints, and on an ordinary one others' too."""
    size = sum(path.stat().st_size for path in (place.folder / "hf").rglob("*") if path.is_file())
    runs = min(runs, FEW) if size > LARGE else runs
    jobs = cases.jobs(place.folder, wanted)
    if not place.alone:
        others, missing = cases.others(place.folder)
        jobs += others
        skipped += missing
    _say(f"{shape}, {place.name}: {len(jobs)} commands, {runs} rounds")
    rows, failed = rounds(jobs, cases.copies(place.folder), runs, place)
    skipped += failed
    show(rows, rows[1])
    return Table(shape, place.name, size, tuple(rows))


def _bytes(shape: str) -> int:
    """About so many has a checkpoint in fp16."""
    it = PYTHIA[shape]
    return 2 * (12 * it.layers * it.hidden**2 + 2 * it.rows * it.hidden)


def _publish(results: Results, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    picture = target.with_suffix(".svg")
    try:
        from figure import draw

        draw(_largest(results.tables), picture)
        target.write_text(page(results, picture.name))
    except BridgeError as error:
        results = replace(results, skipped=(*results.skipped, f"the figure: {error}"))
        target.write_text(page(results, None))
    print(f"wrote {target}")


def _largest(tables: Sequence[Table]) -> list[Table]:
    """Of each place the last table, which is that of the last shape."""
    return list({table.place: table for table in tables}.values())


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def _ended(*_: object) -> NoReturn:
    sys.exit("ended")


if __name__ == "__main__":
    main()
