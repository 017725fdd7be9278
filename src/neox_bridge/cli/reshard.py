"""``neox-bridge reshard``."""

from __future__ import annotations

from dataclasses import dataclass

from neox_bridge.cli.command import command, given, only
from neox_bridge.cli.errors import writing
from neox_bridge.cli.execution import run_plan
from neox_bridge.cli.export_optimizer import FOLDER, RUN_WITH_STATES
from neox_bridge.cli.options import Execution, Source
from neox_bridge.optimizer.options import Resharding
from neox_bridge.option import RESUME, option


@dataclass(frozen=True, slots=True)
class States:
    """Where the optimizer states come from."""

    path: str | None = option(
        None,
        "A folder that export-optimizer wrote from this run. Its master weights and moments "
        "replace those of SRC, and the weights are rounded from these master weights.",
        "--states",
        group=RESUME,
        value="path",
    )


@command(
    "reshard",
    RUN_WITH_STATES,
    FOLDER,
    Resharding,
    States,
    only(Source, "step", "configs", "gqa_order"),
    Execution,
)
def reshard(
    source: str,
    target: str,
    resharding: Resharding,
    states: States,
    reading: Source,
    execution: Execution,
) -> None:
    """Move a GPT-NeoX run to other ranks or another GPT-NeoX version, to resume it there.

    Converts the weights, fp32 master weights, Adam moments, step, loss scaler, schedule and random
    states. Resume with the settings in DST/resume.yml. GPT-NeoX and DeepSpeed are not needed.

    Reads optimizer states of every DeepSpeed version since 2021. This includes EleutherAI's raw
    Pythia checkpoints, which today's GPT-NeoX cannot resume as they are.

    \b
    Examples:
      neox-bridge reshard run run-dp4 --dp 4
      neox-bridge reshard run run-tp4 --tp 4 --pp 2
      neox-bridge reshard run run-one --tp 1 --pp 0 --dp 1 --dry-run
      neox-bridge reshard run run --universal
      neox-bridge reshard EleutherAI/neox-ckpt-pythia-160m@step1000 run --dp 8 --for neox@today

    Exit codes: 0 done, 1 error, 2 usage error, 3 the result differs from the source, 4 refused (the
    run cannot be written in this layout), 130 interrupted.
    """
    with writing(target):
        from neox_bridge.conversion import plan_resharding
        from neox_bridge.planning.option_checks import check_gqa_order, check_layout

        check_layout(resharding.layout, resharding.pp)
        _check_era(resharding.era)
        checkpoint = reading.open(source)
        check_gqa_order(reading.gqa_order, checkpoint)
        plan, checker = plan_resharding(
            checkpoint,
            resharding,
            target,
            export=states.path,
            given=given("row_bias"),
            workers=execution.max_workers,
        )
        run_plan(plan, source, target, execution, checker)


def _check_era(era: object) -> None:
    """Raise UsageError if --for does not name a GPT-NeoX."""
    from neox_bridge.errors import UsageError
    from neox_bridge.frameworks.eras import Era

    if era is not None and not isinstance(era, Era):
        from neox_bridge.frameworks.targets import name_of

        raise UsageError(
            ["era"],
            f"{name_of(era)} does not resume GPT-NeoX runs",  # type: ignore[arg-type]
            "Name a GPT-NeoX tree or date, such as neox@2024-03 or today.",
        )
