"""The options of ``reshard``, as data, with their spelling and help on the command line."""

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
        text="Number of tensor-parallel ranks (model_parallel_size). Default: as in SRC, like "
        "--pp, --dp and --zero.",
        group=RESUME,
    )
    pp: int | None = inherited(Options, "pp", group=RESUME)
    layout: LayoutName | None = inherited(Options, "layout", group=RESUME)
    dp: int | None = option(
        None, "Number of data-parallel ranks.", group=RESUME, common=True, minimum=1
    )
    zero: int | None = option(
        None,
        "ZeRO stage. A bfloat16 run at stage 1, 2 or 3 can only switch between these three.",
        group=RESUME,
        common=True,
        minimum=0,
        maximum=3,
    )
    micro_batch: int | None = option(
        None,
        "Micro-batch size per rank (train_micro_batch_size_per_gpu). Default: at most that of "
        "SRC. The global batch size does not change.",
        group=RESUME,
        minimum=1,
    )
    engine: Engine | None = option(
        None,
        "How the DeepSpeed that resumes the run combines the gradients of micro-batches in its "
        "pipeline engine. Default: as the DeepSpeed that --for requires; without --for, as the "
        "DeepSpeed of SRC.",
        group=RESUME,
        choices=("sums", "averages"),
    )
    source_engine: Engine | None = option(
        None,
        "How the DeepSpeed of SRC combined the gradients of micro-batches. Default: as its "
        "version does (0.16.0 to 0.18.2 sum).",
        group=RESUME,
        choices=("sums", "averages"),
    )
    era: Era | None = inherited(
        Options,
        "era",
        text="The GPT-NeoX that will resume the run. A source tree, a tag, date or commit "
        "(neox@v1.0, neox@2024-03), or today. Default: a GPT-NeoX like the one that wrote SRC.",
        group=RESUME,
        value="neox version",
    )
    row_bias: RowBias = inherited(
        Options,
        "row_bias",
        "whole",
        text="How to store biases that the ranks sum if --tp changes. whole: on rank 0, which is "
        "exact; split: an equal part on each rank.",
        group=RESUME,
    )
    universal: bool = option(
        False,
        "Write a universal checkpoint of DeepSpeed. It has one file per parameter and state, and "
        "loads on any number of data-parallel ranks.",
        group=RESUME,
    )
    ignore_keys: tuple[str, ...] = inherited(Options, "ignore_keys", ())
