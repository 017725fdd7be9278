"""What a user asks of ``reshard``, as data, and how the command line spells and explains it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from neox_bridge.option import RESUME, inherited, option
from neox_bridge.planning.options import Options, RowBias

if TYPE_CHECKING:
    from neox_bridge.frameworks.eras import Era
    from neox_bridge.layouts.checkpoint import LayoutName
    from neox_bridge.optimizer.gradient_scale import Engine


@dataclass(frozen=True, slots=True)
class Resharding:
    """How a run continues. ``None`` means: as in the source.

    Each field is declared here only, like those of ``Options``.
    """

    tp: int | None = inherited(
        Options,
        "tp",
        text="Tensor-parallel ranks (model_parallel_size). Default: as in SRC, which is the "
        "default of --pp, --dp and --zero too.",
        group=RESUME,
    )
    pp: int | None = inherited(Options, "pp", group=RESUME)
    layout: LayoutName | None = inherited(Options, "layout", group=RESUME)
    dp: int | None = option(None, "Data-parallel ranks.", group=RESUME, common=True, minimum=1)
    zero: int | None = option(
        None,
        "ZeRO's stage. In bfloat16, 1 and 2 can only become each other.",
        group=RESUME,
        common=True,
        minimum=0,
        maximum=2,
    )
    micro_batch: int | None = option(
        None,
        "Sequences of a rank's forward pass (train_micro_batch_size_per_gpu). Default: at most "
        "what it was. The global batch stays the same.",
        group=RESUME,
        minimum=1,
    )
    engine: Engine | None = option(
        None,
        "What the pipeline engine of the DeepSpeed that resumes the run does with the gradients of "
        "micro-batches. Default: what the version does that --for requires, or without --for what "
        "the run's own version does.",
        group=RESUME,
        choices=("sums", "averages"),
    )
    source_engine: Engine | None = option(
        None,
        "What the pipeline engine of the run's own DeepSpeed did. Default: what its version does "
        "(0.16.0 to 0.18.2 sum).",
        group=RESUME,
        choices=("sums", "averages"),
    )
    era: Era | None = inherited(
        Options,
        "era",
        text="The GPT-NeoX in which the run resumes. A source tree, neox@v1.0, neox@2024-03 or "
        "another date or commit, or today. Default: a GPT-NeoX like the one that wrote SRC.",
        group=RESUME,
        metavar="neox:TREE|neox@DATE|today",
    )
    row_bias: RowBias = inherited(
        Options,
        "row_bias",
        "whole",
        text="How biases that the ranks add up are written at another --tp. `whole` on rank 0, "
        "which is exact, or `split` into an equal part for each rank.",
        group=RESUME,
    )
    universal: bool = option(
        False,
        "Write DeepSpeed's universal checkpoint. It has a file for each state of each parameter "
        "and loads on any number of data-parallel ranks.",
        group=RESUME,
    )
    ignore_keys: tuple[str, ...] = inherited(Options, "ignore_keys", ())
