"""Prints a plan, or executes it, verifies it and prints the result."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from neox_bridge.cli.options import Execution
from neox_bridge.cli.output import print_json, print_plan, print_result, tell, tell_findings
from neox_bridge.cli.progress import shown_phases
from neox_bridge.progress import Count

if TYPE_CHECKING:
    from neox_bridge.execution.result import Result
    from neox_bridge.planning.plan import Plan

Checker = Callable[[Count | None], Callable[[str], None]]


def run_plan(
    plan: "Plan",
    source: str,
    target: str,
    execution: Execution,
    checker: Checker,
    **options: Any,
) -> None:
    """Print the plan for --dry-run; else execute it, and print the result.

    Args:
        source: The source as the user named it.
        checker: Creates the ``check`` argument of ``execute``.
        options: Other arguments of ``execute``.
    """
    from neox_bridge.planning.option_checks import check_outside

    check_outside([source], target)
    if execution.dry_run:
        from neox_bridge.execution.execute import check_options

        check_options(target, every_crc=options.get("every_crc", False))
        if execution.as_json:
            from neox_bridge.execution.memory import peak_memory
            from neox_bridge.planning.report import to_json

            memory = peak_memory(plan, target, execution.max_workers)
            print_json(to_json(plan, memory, source, target))
        else:
            print_plan(plan, target, execution.max_workers)
        return
    result = perform(plan, target, execution, checker, **options)
    print_result(plan, replace(result, source=source), target, execution)


def perform(
    plan: "Plan",
    target: str,
    execution: Execution,
    checker: Checker,
    **options: Any,
) -> "Result":
    """Execute a plan, and print findings on stderr. Arguments: see ``run_plan``."""
    from neox_bridge.execution.execute import execute

    tell(plan, execution.quiet)
    with shown_phases(execution.quiet) as phases:
        count, begin = (None, None) if phases is None else (phases.count, phases.begin)
        result = execute(
            plan,
            target,
            overwrite=execution.overwrite,
            workers=execution.max_workers,
            progress=count,
            phase=begin,
            check=None if execution.no_verify else checker(count),
            **options,
        )
    tell_findings(result.findings, execution.quiet)
    return result
