"""``neox-bridge export-optimizer``."""

from collections.abc import Callable
from typing import Annotated

import typer

from neox_bridge.cli import values
from neox_bridge.cli.errors import writing
from neox_bridge.cli.run_plan import How, Progress, carry_out


def export_optimizer(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A GPT-NeoX checkpoint with its optimizer states: a folder, a URL, or "
            "ORG/NAME@REVISION of the Hub.",
        ),
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
      neox-bridge export-optimizer EleutherAI/neox-ckpt-pythia-160m@step1000 moments

    Exit codes: 0 done, 1 error, 2 usage, 3 the result isn't the source, 4 refused, 130 interrupted.
    """
    with writing(target):
        from neox_bridge.layouts.open import open_checkpoint
        from neox_bridge.optimizer.read_files import read_optimizer
        from neox_bridge.optimizer.write_export import plan_export
        from neox_bridge.planning.option_checks import check_gqa_order

        checkpoint = open_checkpoint(
            source,
            step=step,
            configs=config or (),
            gqa_order=gqa_order,  # type: ignore[arg-type]
        )
        check_gqa_order(gqa_order, checkpoint)
        optimizer = read_optimizer(checkpoint)
        plan = plan_export(checkpoint, optimizer)
        how = How(dry_run, overwrite, max_workers, no_verify, as_json, quiet)

        def check(progress: Progress) -> Callable[[str], None]:
            from neox_bridge.verification.optimizer import export_checker

            return export_checker(checkpoint, optimizer, workers=max_workers, progress=progress)

        carry_out(plan, target, "exporting", how, check)
