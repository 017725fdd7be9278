"""How DeepSpeed's engines accumulate gradients, by version."""

import re
from typing import Literal

PipelineAccumulation = Literal["sums", "averages", "once a stage"]
"""What the pipeline engine (pipe_parallel_size >= 1) does with the micro-batches of a step.

"sums": the gradient is the sum over the micro-batches. "averages": it is their mean, as it always
is without the pipeline engine. "once a stage": it is divided once in each stage that it passes, so
that only the last stage's gradient is the mean.
"""

# Releases of DeepSpeed, from the one on that is named. EleutherAI's DeeperSpeed has the same
# version numbers: 0.9.3 and 0.12.4 average, 0.16.5 sums (runtime/engine.py, `backward` and
# `_backward_prologue`). 0.16.5 was run with GPT-NeoX.
_PIPELINE: tuple[tuple[tuple[int, int, int], PipelineAccumulation, str], ...] = (
    ((0, 0, 0), "averages", ""),
    ((0, 16, 0), "sums", "DeepSpeed#6675, reported as DeepSpeed#7773"),
    ((0, 18, 3), "once a stage", "DeepSpeed#7665, reported as DeepSpeed#8152"),
    ((0, 19, 3), "averages", "DeepSpeed#8154"),
)


def pipeline_accumulation(version: str | None) -> PipelineAccumulation | None:
    """What the pipeline engine of a DeepSpeed version does; None for what is no version.

    Args:
        version: as ``ds_version`` of a checkpoint has it, such as "0.16.5" or "0.12.4+02e2ebf".
    """
    match = re.match(r"(\d{1,6})\.(\d{1,6})\.(\d{1,6})", version or "")
    if match is None:
        return None
    number = (int(match[1]), int(match[2]), int(match[3]))
    return next(kind for since, kind, _ in reversed(_PIPELINE) if number >= since)
