"""``neox-bridge audit``."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from neox_bridge.cli import plotting, values
from neox_bridge.cli.output import KINDS, human, plural, print_json, tell_findings
from neox_bridge.cli.progress import progress_bar

if TYPE_CHECKING:
    from neox_bridge.verification.audit import Audit

_LINES = 10  # more would hide each other


def audit(
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR...",
            help="A run (a GPT-NeoX root, or a folder of step1000, step2000, …), or a parent of "
            "several.",
        ),
    ],
    same_init: Annotated[
        bool,
        typer.Option("--same-init", help="Runs of the same shapes must have the same step 0."),
    ] = False,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|none",
            help="Where hashes are kept, so that what hasn't changed isn't read again; by default "
            "neox-bridge/audit in the user's cache folder.",
        ),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option(**plotting.plot_file(), help="Draw the norms over the steps (extra [plot])."),
    ] = None,
    max_workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Threads that read; 2 by default.")
    ] = None,
    as_json: values.AsJson = False,
    quiet: values.Quiet = False,
) -> None:
    """Look through the many checkpoints of a run, or of a suite of runs, for what is wrong.

    Finds steps that are identical, weights that belong to another step (down to one rank's shard
    of one layer), runs whose initial weights differ where they shouldn't or are the same where
    they shouldn't, norms that jump, NaN, steps that are missing, half-written or another model's.
    Layouts, formats and tensor parallelism may differ from step to step. Writes nothing into DIR.

    \b
    Examples:
      neox-bridge audit checkpoints/
      neox-bridge audit suite/ --plot norms.svg

    Exit codes: 0 nothing is wrong, 3 there are warnings or errors, 1 there is nothing to audit.
    """
    from neox_bridge.errors import BridgeError
    from neox_bridge.verification.audit import audit as look
    from neox_bridge.verification.audit import open_places
    from neox_bridge.verification.hash_cache import default_folder
    from neox_bridge.verification.runs import find_runs

    plotting.prepare(plot)
    runs, faults = find_runs(folders)
    if not runs:
        raise BridgeError("; ".join(f"{f.message} ({f.remedy})" for f in faults))
    opened = open_places(runs)
    folder = None if cache == "none" else cache or default_folder()
    with progress_bar(sum(one.size for one in opened), "reading", quiet) as progress:
        found = look(
            opened,
            faults=faults,
            same_init=same_init,
            cache=folder,
            workers=max_workers,
            progress=progress,
        )
    if plot:
        _plot(found, plot)
    if as_json:
        print_json(_json(found))
    elif not quiet:
        _print(found)
    tell_findings(found.faults, quiet or as_json)
    if not found.holds:
        raise typer.Exit(3)


def _print(found: "Audit") -> None:
    from neox_bridge.verification.audit import verdict

    run = None
    for step in found.steps:
        if step.run != run:
            run = step.run
            print(run)
            print(f"  {'step':>10}  {'what':<28}{'bytes':>9}  tensors   read        norm")
        what = f"{KINDS[step.kind]}, TP {step.tp}" if step.kind == "neox" else KINDS[step.kind]
        print(
            f"  {step.label:>10}  {f'{what}, {step.dtype}':<28}{human(step.size):>9}  "
            f"{len(step.tensors):>7,}  {step.read:>5,}  {step.norm:>10.5g}  "
            f"{verdict(step, found.faults)}"
        )
    runs = len({step.run for step in found.steps})
    counts = [sum(f.severity == word for f in found.faults) for word in ("error", "warning")]
    print(
        f"{plural(len(found.steps), 'step')} of {plural(runs, 'run')}: "
        f"{plural(counts[0], 'error')}, {plural(counts[1], 'warning')}"
    )


def _json(found: "Audit") -> dict[str, Any]:
    from dataclasses import asdict

    from neox_bridge.verification.audit import verdict

    return {
        "schema_version": 1,
        "holds": found.holds,
        "findings": [asdict(fault) for fault in found.faults],
        "steps": [
            {
                "run": step.run,
                "step": step.number,
                "label": step.label,
                "path": step.path,
                "kind": step.kind,
                "tensor_parallel": step.tp,
                "dtype": step.dtype,
                "bytes": step.size,
                "hash": step.hash,
                "norm": step.norm,
                "read": step.read,
                "verdict": verdict(step, found.faults),
                "tensors": {
                    name: {"hash": p.hash, "norm": p.norm, "shape": list(p.shape), "bad": p.bad}
                    for name, p in step.tensors.items()
                },
            }
            for step in found.steps
        ],
    }


def _plot(found: "Audit", path: str) -> None:
    """Of one run, the tensors with findings or else the kinds of weights; of several, the runs."""
    from neox_bridge.verification.plots import plot_lines

    steps = [step for step in found.steps if step.number is not None]
    runs = list(dict.fromkeys(step.run for step in steps))
    series: dict[str, list[tuple[float, float]]] = {}
    if len(runs) > 1:
        for step in steps:
            series.setdefault(step.run, []).append((float(step.number or 0), step.norm))
    else:
        wrong = [n for f in found.faults if f.severity != "info" for n in f.tensors]
        names = list(dict.fromkeys(wrong))[:_LINES]
        for step in steps:
            squares: dict[str, float] = {}
            for name, found_print in step.tensors.items():
                if name in names or not names:
                    line = name if names else _kind(name)
                    squares[line] = squares.get(line, 0.0) + found_print.norm**2
            for line, square in squares.items():
                series.setdefault(line, []).append((float(step.number or 0), square**0.5))
    marks = {
        (float(label), f.code)
        for f in found.faults
        if f.severity != "info"
        for label in f.steps
        if label.isdecimal()
    }
    title = f"Norms of {runs[0]}" if len(runs) == 1 else "Norms of the runs"
    plot_lines(
        title, series, path, x_label="step", y_label="L2 norm", log=True, marks=sorted(marks)
    )


def _kind(name: str) -> str:
    """A weight's name without its block."""
    from neox_bridge.verification.drawing import place_of

    return place_of(name)[0]
