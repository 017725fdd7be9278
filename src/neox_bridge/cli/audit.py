"""``neox-bridge audit``."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from neox_bridge.cli import plotting, values
from neox_bridge.cli.asked import given
from neox_bridge.cli.output import print_json, print_line, tell_findings
from neox_bridge.cli.progress import progress_bar
from neox_bridge.errors import UsageError
from neox_bridge.wording import KINDS, human, plural

if TYPE_CHECKING:
    from neox_bridge.verification.audit import Audit
    from neox_bridge.verification.runs import Fault
    from neox_bridge.verification.steps import Step


def audit(
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR...",
            help="A run (a GPT-NeoX root, a folder of step1000, step2000, …, or ORG/NAME of the "
            "Hub with a branch for each step), or a parent of several.",
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="TWIN",
            help="Compare each step with the same step of this run, which should hold the same "
            "weights: a folder or ORG/NAME of the Hub, of either kind.",
        ),
    ] = None,
    steps: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Steps to read: 1000,5000-9000,10000-143000:1000,last or all.",
        ),
    ] = "all",
    same_init: Annotated[
        bool,
        typer.Option("--same-init", help="Runs of the same shapes must have the same step 0."),
    ] = False,
    optimizer: Annotated[
        bool,
        typer.Option("--optimizer", help="Audit the optimizer states too, if there are any."),
    ] = False,
    config: values.Configs = None,
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

    With --against, the runs are compared with another one instead: whether each step holds the
    same weights, and if not, at which other step they are. Dtypes that differ are compared after
    the cast that keeps every value. Models of the Hub are read by ranges, over plain HTTP.

    \b
    Examples:
      neox-bridge audit checkpoints/
      neox-bridge audit suite/ --plot norms.svg
      neox-bridge audit EleutherAI/neox-ckpt-pythia-160m --against EleutherAI/pythia-160m

    Exit codes: 0 nothing is wrong, 3 there are warnings or errors (with --against: weights differ
    or cannot be read), 1 there is nothing to audit.
    """
    from neox_bridge.layouts.open import check_configs_used
    from neox_bridge.verification.audit import audit as look
    from neox_bridge.verification.audit import open_places
    from neox_bridge.verification.hash_cache import default_folder
    from neox_bridge.verification.runs import known_runs
    from neox_bridge.verification.step_choice import check_ranges, with_steps

    named = given(same_init=same_init, optimizer=optimizer, plot=plot)
    if against is not None and named:
        raise UsageError(named, "not with --against", "Leave it out, or audit the run alone.")
    plotting.prepare(plot)
    runs, faults = known_runs(folders)
    check_ranges(steps, runs)
    runs = [with_steps(run, steps) for run in runs]
    folder = None if cache == "none" else cache or default_folder()
    if against is not None:
        from neox_bridge.cli.audit_against import audit_against

        audit_against(
            runs,
            known_runs([against])[0],
            steps,
            config or (),
            cache=folder,
            workers=max_workers,
            as_json=as_json,
            quiet=quiet,
        )
        return
    opened = open_places(runs, config or ())
    checkpoints = [one.checkpoint for one in opened if one.checkpoint is not None]
    check_configs_used(config or (), *checkpoints)
    size = sum(one.size + (one.states if optimizer else 0) for one in opened)
    with progress_bar(size, "reading", quiet) as progress:
        found = look(
            opened,
            faults=faults,
            same_init=same_init,
            optimizer=optimizer,
            cache=folder,
            workers=max_workers,
            progress=progress,
        )
    told = _json(found) if plot or as_json else {}
    if plot:
        _plot(told, plot)
    if as_json:
        print_json(told)
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
            print_line(run)
            print_line(f"  {'step':>10}  {'what':<28}{'bytes':>9}  tensors   read        norm")
        what = f"{KINDS[step.kind]}, TP {step.tp}" if step.kind == "neox" else KINDS[step.kind]
        print_line(
            f"  {step.label:>10}  {f'{what}, {step.dtype}':<28}{human(step.size):>9}  "
            f"{len(step.tensors):>7,}  {step.read:>5,}  {step.norm:>10.5g}  "
            f"{verdict(step, found.faults)}"
        )
    runs = len({step.run for step in found.steps})
    counts = [sum(f.severity == word for f in found.faults) for word in ("error", "warning")]
    print_line(
        f"{plural(len(found.steps), 'step')} of {plural(runs, 'run')}: "
        f"{plural(counts[0], 'error')}, {plural(counts[1], 'warning')}"
    )


def _finding(fault: "Fault") -> dict[str, Any]:
    """A fault as JSON. ``subject`` only decides which findings are shown, so it is left out."""
    from dataclasses import asdict

    return {key: value for key, value in asdict(fault).items() if key != "subject"}


def _json(found: "Audit") -> dict[str, Any]:
    from neox_bridge.verification.audit import verdict

    return {
        "schema_version": 1,
        "holds": found.holds,
        "findings": [_finding(fault) for fault in found.faults],
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
                **({"optimizer": _states(step)} if step.states else {}),
                "verdict": verdict(step, found.faults),
                "tensors": {
                    name: {"hash": p.hash, "norm": p.norm, "shape": list(p.shape), "bad": p.bad}
                    for name, p in step.tensors.items()
                },
            }
            for step in found.steps
        ],
    }


def _states(step: "Step") -> dict[str, Any]:
    return {
        "updates": list(step.updates),
        "states": {
            name: {"hash": p.hash, "norm": p.norm, "bad": p.bad} for name, p in step.states.items()
        },
    }


def _plot(told: dict[str, Any], path: str) -> None:
    """Of one run, the tensors with findings or else the kinds of weights; of several, the runs."""
    from neox_bridge.verification.norm_lines import marks, run_lines, suspects, tensor_lines
    from neox_bridge.verification.plots import plot_lines

    steps = [step for step in told["steps"] if step["step"] is not None]
    runs = list(dict.fromkeys(step["run"] for step in steps))
    several = len(runs) > 1
    lines = run_lines(steps) if several else tensor_lines(steps, suspects(told["findings"]))
    title = f"Norms of {runs[0]}" if len(runs) == 1 else "Norms of the runs"
    shown = marks(told["findings"])
    plot_lines(title, lines, path, x_label="step", y_label="L2 norm", log=True, marks=shown)
