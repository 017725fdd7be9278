"""``neox-bridge export-optimizer``."""

from typing import Annotated

import typer

from neox_bridge.cli import values
from neox_bridge.cli.errors import writing
from neox_bridge.cli.output import print_json, print_plan, print_result, tell, tell_findings
from neox_bridge.cli.progress import progress_bar


def export_optimizer(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A GPT-NeoX folder with its optimizer states.")
    ],
    target: Annotated[str, typer.Argument(metavar="DST", help="The folder to write.")],
    step: values.Step = None,
    config: values.Configs = None,
    gqa_order: values.GqaOrder = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and write nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DST if it exists.")
    ] = False,
    max_workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Threads that move bytes.")
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Don't read the result back and compare it.")
    ] = False,
    as_json: values.AsJson = False,
    quiet: values.Quiet = False,
) -> None:
    """Write a run's optimizer states under Hugging Face names, for those who study training.

    DST/master.safetensors, exp_avg.safetensors and exp_avg_sq.safetensors hold a tensor for each of
    the model's; DST/optimizer.json the groups, the step, the schedule and the loss scaler. reshard
    --states DST takes them back into a run.

    \b
    Examples:
      neox-bridge export-optimizer run moments
      neox-bridge export-optimizer run moments --step 3000 --dry-run

    Exit codes: 0 done, 1 error, 2 usage, 3 the result isn't the source, 4 refused, 130 interrupted.
    """
    with writing(target):
        from neox_bridge.layouts.open import open_checkpoint
        from neox_bridge.layouts.optimizer_reader import read_optimizer
        from neox_bridge.planning.optimizer_export import plan_export

        checkpoint = open_checkpoint(
            source,
            step=step,
            configs=config or (),
            gqa_order=gqa_order,  # type: ignore[arg-type]
        )
        optimizer = read_optimizer(checkpoint)
        plan = plan_export(checkpoint, optimizer)
        if dry_run:
            if as_json:
                from neox_bridge.planning.report import to_json

                print_json(to_json(plan))
            else:
                print_plan(plan, target)
            return
        from neox_bridge.execution.run import execute

        tell(plan, quiet)
        total = plan.size if no_verify else 2 * plan.size
        with progress_bar(total, "exporting", quiet) as progress:
            check = None
            if not no_verify:
                from neox_bridge.verification.optimizer import export_checker

                check = export_checker(
                    checkpoint, optimizer, workers=max_workers, progress=progress
                )
            result = execute(
                plan,
                target,
                overwrite=overwrite,
                workers=max_workers,
                progress=progress,
                check=check,
            )
    tell_findings(result.findings, quiet)
    print_result(plan, result, target, as_json, quiet, verified=not no_verify)
