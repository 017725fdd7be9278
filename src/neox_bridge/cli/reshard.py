"""``neox-bridge reshard``."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neox_bridge.cli import values
from neox_bridge.cli.errors import writing
from neox_bridge.cli.run_plan import How, Progress, carry_out

if TYPE_CHECKING:
    from neox_bridge.optimizer.states import Optimizer
    from neox_bridge.optimizer.zero_stage import States

_LAYOUT = "Where it continues"


def reshard(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A GPT-NeoX checkpoint with its optimizer states: a folder, a URL, or "
            "ORG/NAME@REVISION of the Hub.",
        ),
    ],
    target: Annotated[str, typer.Argument(metavar="DST", help="The folder to write.")],
    tp: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=_LAYOUT,
            help="Tensor-parallel ranks (model_parallel_size). Default: as in SRC, which is the "
            "default of --pp, --dp and --zero too.",
        ),
    ] = None,
    pp: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            rich_help_panel=_LAYOUT,
            help="Pipeline stages (pipe_parallel_size); 0 is the same as --layout ranks.",
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            **values.one_of("layers", "ranks"),
            rich_help_panel=_LAYOUT,
            help="One file a layer and rank (pipe_parallel_size 1 or more), or one a rank (0).",
        ),
    ] = None,
    dp: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", rich_help_panel=_LAYOUT, help="Data-parallel ranks."),
    ] = None,
    zero: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2,
            metavar="N",
            rich_help_panel=_LAYOUT,
            help="ZeRO's stage; in bfloat16 1 and 2 become each other only.",
        ),
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=_LAYOUT,
            help="Sequences of a rank's forward pass (train_micro_batch_size_per_gpu). Default: at "
            "most what it was. The global batch stays the same.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            **values.one_of("sums", "averages"),
            rich_help_panel=_LAYOUT,
            help="What the pipeline engine of the DeepSpeed that resumes the run does with the "
            "gradients of micro-batches. Default: what the version does that --for requires, or "
            "without --for what the run's own version does.",
        ),
    ] = None,
    source_engine: Annotated[
        str | None,
        typer.Option(
            **values.one_of("sums", "averages"),
            rich_help_panel=_LAYOUT,
            help="What the pipeline engine of the run's own DeepSpeed did. Default: what its "
            "version does (0.16.0 to 0.18.2 sum).",
        ),
    ] = None,
    era: Annotated[
        Any,
        typer.Option(
            "--for",
            **values.era(resumes=True),
            rich_help_panel=_LAYOUT,
            help="The GPT-NeoX in which the run resumes: a source tree, neox@v1.0, neox@2024-03 or "
            "another date or commit, or today. Default: a GPT-NeoX like the one that wrote SRC.",
        ),
    ] = None,
    row_bias: Annotated[
        str | None,
        typer.Option(
            **values.one_of("whole", "split"),
            rich_help_panel=_LAYOUT,
            help="How biases that the ranks add up are written at another --tp: `whole` on rank 0, "
            "which is exact, or `split` into an equal part for each rank. Default: whole.",
        ),
    ] = None,
    universal: Annotated[
        bool,
        typer.Option(
            "--universal",
            help="Write DeepSpeed's universal checkpoint: a file for each state of each parameter. "
            "It loads on any number of data-parallel ranks.",
        ),
    ] = False,
    states: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="A folder that export-optimizer wrote from this run. Its master weights and "
            "moments are used instead of SRC's, and the weights are rounded from these masters.",
        ),
    ] = None,
    step: values.Step = None,
    config: values.Configs = None,
    gqa_order: values.GqaOrder = None,
    ignore_key: values.IgnoreKeys = None,
    dry_run: values.DryRun = False,
    overwrite: values.Overwrite = False,
    max_workers: values.Movers = None,
    no_verify: values.NoVerify = False,
    as_json: values.AsJson = False,
    quiet: values.Quiet = False,
) -> None:
    """Write a GPT-NeoX run for other ranks, or for another GPT-NeoX, to continue training there.

    Moves the weights, fp32 masters, moments, step, loss scaler, schedule and random states.
    Continue with the settings in DST/resume.yml. GPT-NeoX and DeepSpeed are not needed.

    Optimizer states of every DeepSpeed since 2021 are read, also those of EleutherAI's raw Pythia
    checkpoints, which today's GPT-NeoX cannot resume without this.

    \b
    Examples:
      neox-bridge reshard run run-dp4 --dp 4
      neox-bridge reshard run run-tp4 --tp 4 --pp 2
      neox-bridge reshard run run-one --tp 1 --pp 0 --dp 1 --dry-run
      neox-bridge reshard run run --universal
      neox-bridge reshard EleutherAI/neox-ckpt-pythia-160m@step1000 run --dp 8 --for neox@today

    Exit codes: 0 done, 1 error, 2 usage, 3 the result isn't the source, 4 refused (DST can't be
    what was asked), 130 interrupted.
    """
    chosen: dict[str, Any] = {
        "tp": tp,
        "pp": pp,
        "layout": layout,
        "dp": dp,
        "zero": zero,
        "micro_batch": micro_batch,
        "row_bias": row_bias or "whole",
        "universal": universal,
        "ignore_keys": tuple(ignore_key or ()),
        "engine": engine,
        "source_engine": source_engine,
        "era": era,
    }
    with writing(target):
        from neox_bridge.layouts.hub_tokenizer import with_published_tokenizer
        from neox_bridge.layouts.open import open_checkpoint
        from neox_bridge.optimizer.read_files import read_optimizer
        from neox_bridge.optimizer.reshard import plan_reshard, target_states
        from neox_bridge.optimizer.reshard_target import Resharding, check_row_bias
        from neox_bridge.planning.option_checks import check_gqa_order, check_layout
        from neox_bridge.stores.paths import absolute

        check_layout(layout, pp)
        _check_era(era)
        checkpoint = open_checkpoint(
            source,
            step=step,
            configs=config or (),
            gqa_order=gqa_order,  # type: ignore[arg-type]
        )
        check_gqa_order(gqa_order, checkpoint)
        checkpoint = with_published_tokenizer(checkpoint)
        optimizer: Optimizer = read_optimizer(checkpoint)
        given: States | None = None
        if states is not None:
            from neox_bridge.optimizer.read_export import with_export

            checkpoint, given = with_export(checkpoint, optimizer, states)
        if row_bias is not None:
            check_row_bias(checkpoint, optimizer, given, tp=tp, universal=universal)
        made = absolute(target)
        asked = Resharding(**chosen)
        plan = plan_reshard(checkpoint, optimizer, asked, made, given)
        how = How(dry_run, overwrite, max_workers, no_verify, as_json, quiet)

        def check(progress: Progress) -> Callable[[str], None]:
            from neox_bridge.verification.optimizer import checker

            held = target_states(checkpoint, optimizer, asked, given)
            return checker(checkpoint, *held, workers=max_workers, progress=progress)

        carry_out(plan, target, "resharding", how, check)


def _check_era(era: object) -> None:
    """Raise UsageError where --for names what is no GPT-NeoX."""
    from neox_bridge.errors import UsageError
    from neox_bridge.frameworks.eras import Era

    if era is not None and not isinstance(era, Era):
        from neox_bridge.frameworks.targets import name_of

        raise UsageError(
            ["era"],
            f"{name_of(era)} does not resume GPT-NeoX runs",  # type: ignore[arg-type]
            "Name a GPT-NeoX tree or date, such as neox@2024-03 or today.",
        )
