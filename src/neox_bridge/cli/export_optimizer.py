"""``neox-bridge export-optimizer``."""

from collections.abc import Callable

from neox_bridge.cli.command import Argument, command, only
from neox_bridge.cli.errors import writing
from neox_bridge.cli.execution import run_plan
from neox_bridge.cli.options import Execution, Source
from neox_bridge.progress import Count

RUN_WITH_STATES = Argument(
    "source",
    "SRC",
    "A GPT-NeoX checkpoint with optimizer states: a folder, a URL or a Hub model "
    "(ORG/NAME@REVISION).",
)
FOLDER = Argument("target", "DST", "The folder to write to.")


@command(
    "export-optimizer",
    RUN_WITH_STATES,
    FOLDER,
    only(Source, "step", "configs", "gqa_order"),
    Execution,
)
def export_optimizer(source: str, target: str, reading: Source, execution: Execution) -> None:
    """Export a run's optimizer states under Hugging Face names, to study training.

    master.safetensors, exp_avg.safetensors and exp_avg_sq.safetensors in DST contain one tensor per
    model tensor. optimizer.json contains the parameter groups, step, schedule and loss scaler.
    `reshard --states DST` puts them back into a run.

    \b
    Examples:
      neox-bridge export-optimizer run moments
      neox-bridge export-optimizer run moments --step 3000 --dry-run
      neox-bridge export-optimizer EleutherAI/neox-ckpt-pythia-160m@step1000 moments

    Exit codes: 0 done, 1 error, 2 usage error, 3 the result differs from the source, 4 refused, 130
    interrupted.
    """
    with writing(target):
        from neox_bridge.conversion import with_source_findings
        from neox_bridge.optimizer.read_files import read_optimizer
        from neox_bridge.optimizer.write_export import plan_export
        from neox_bridge.planning.option_checks import check_gqa_order

        checkpoint = reading.open(source)
        check_gqa_order(reading.gqa_order, checkpoint)
        optimizer = read_optimizer(checkpoint)
        plan = with_source_findings(plan_export(checkpoint, optimizer), checkpoint)

        def checker(progress: Count | None) -> Callable[[str], None]:
            from neox_bridge.verification.optimizer import export_checker

            workers = execution.max_workers
            return export_checker(checkpoint, optimizer, workers=workers, progress=progress)

        run_plan(plan, source, target, execution, checker)
