"""What every command does that has a plan: print it; or execute it, compare, say what came out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neox_bridge.cli.output import print_json, print_plan, print_result, tell, tell_findings
from neox_bridge.cli.progress import progress_bar

if TYPE_CHECKING:
    from neox_bridge.execution.result import Result
    from neox_bridge.planning.plan import Plan

Progress = Callable[[int], None] | None


@dataclass(frozen=True, slots=True)
class How:
    """The options that all of them have."""

    dry_run: bool
    overwrite: bool
    max_workers: int | None
    no_verify: bool
    as_json: bool
    quiet: bool


def carry_out(
    plan: "Plan",
    target: str,
    doing: str,
    how: How,
    checker: Callable[[Progress], Callable[[str], None]],
    **options: Any,
) -> None:
    """Print the plan for --dry-run; else execute it, and print the result.

    doing: the word of the progress bar. checker: makes ``execute``'s ``check``. options: more of
    ``execute``'s. Raises what that raises.
    """
    if how.dry_run:
        from neox_bridge.execution.execute import check_options

        check_options(target, every_crc=options.get("every_crc", False))
        if how.as_json:
            from neox_bridge.execution.memory import peak_memory
            from neox_bridge.planning.report import to_json

            print_json(to_json(plan, peak_memory(plan, target, how.max_workers)))
        else:
            print_plan(plan, target, how.max_workers)
        return
    result = perform(plan, target, doing, how, checker, **options)
    print_result(plan, result, target, how.as_json, how.quiet, verified=not how.no_verify)


def perform(
    plan: "Plan",
    target: str,
    doing: str,
    how: How,
    checker: Callable[[Progress], Callable[[str], None]],
    **options: Any,
) -> "Result":
    """Execute a plan, and say on stderr what was noticed. Arguments: see ``carry_out``."""
    from neox_bridge.execution.execute import execute

    tell(plan, how.quiet)
    total = plan.size if how.no_verify else 2 * plan.size
    with progress_bar(total, doing, how.quiet) as progress:
        result = execute(
            plan,
            target,
            overwrite=how.overwrite,
            workers=how.max_workers,
            progress=progress,
            check=None if how.no_verify else checker(progress),
            **options,
        )
    tell_findings(result.findings, how.quiet)
    return result
