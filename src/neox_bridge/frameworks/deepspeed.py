"""What DeepSpeed's engines do, by version: how gradients are accumulated, how ZeRO saves states."""

import re
from dataclasses import dataclass
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


def release_of(version: object) -> tuple[int, int, int] | None:
    """The release in a version such as "0.12.4+02e2ebf"; None for what is no version."""
    text = version if isinstance(version, str) else ""
    match = re.match(r"(\d{1,6})\.(\d{1,6})\.(\d{1,6})", text)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def pipeline_accumulation(version: str | None) -> PipelineAccumulation | None:
    """What the pipeline engine of a DeepSpeed version does; None for what is no version."""
    number = release_of(version)
    if number is None:
        return None
    return next(kind for since, kind, _ in reversed(_PIPELINE) if number >= since)


NO_VERSION = "AssertionError: Empty ds_version in checkpoint, not clear how to proceed"

# commits of EleutherAI/DeeperSpeed that GPT-NeoX's requirements/requirements.txt names, and the
# version in their version.txt
DEEPERSPEED_VERSIONS = {
    "eb7f5cff36678625d23db8a8fe78b4a93e5d2c75": "0.3.15",
    "b9260436e7da3e297fc6bedfd27d9e69fbba6f5c": "0.9.3",
    "02e2ebf7dee6aaab3d89094ed470a4609763c742": "0.12.4",
    "91d1c55ba037b5ada99ae14884dff87a4dc5b9ea": "0.16.5",
}


StatesForm = Literal["sub-partitions", "partitions"]
"""How ZeRO stages 1 and 2 cut a flat group of parameters over data-parallel ranks.

"sub-partitions": the group is cut into communication intervals, and each of them over the ranks, so
that a rank has one part of every interval. "partitions": each rank has one part of the group.
"""
StatesKind = Literal["elastic", "rigid"]
"""Whether the parts are stored without their padding, for other numbers of ranks.

"elastic": without padding, and without the optimizer's ``param_groups`` and their step. "rigid":
as they lie in memory.
"""


@dataclass(frozen=True, slots=True)
class ZeroGeneration:
    """The versions of DeepSpeed that save ZeRO's states in one form.

    masters: the key of the fp32 weights in ``optimizer_state_dict``.
    releases: the versions, for people. change: the commit that began it, "" for the first.
    """

    form: StatesForm
    masters: str
    since: tuple[int, int, int]
    releases: str
    change: str


# Of stage 1. Stage 2 has saved elastic "partitions" from its beginning (0.3.0) to 0.5.9.
# DeepSpeed 0.3.17 to 0.5.9 can still save "sub-partitions": zero_optimization.legacy_stage1.
ZERO_GENERATIONS = (
    ZeroGeneration(
        "sub-partitions",
        "local_sub_partitions_of_fp32_groups",
        (0, 0, 0),
        "DeepSpeed up to 0.3.16 and DeeperSpeed 0.3.15",
        "",
    ),
    ZeroGeneration(
        "partitions",
        "single_partition_of_fp32_groups",
        (0, 3, 17),
        "DeepSpeed 0.3.17 to 0.5.9, and older versions at stage 2",
        "DeepSpeed#1042, cfa63f5d, 2021-05-19",
    ),
    ZeroGeneration(
        "partitions",
        "single_partition_of_fp32_groups",
        (0, 5, 10),
        "DeepSpeed 0.5.10 and later",
        "DeepSpeed#1525, 3293cf72, 2022-01-14",
    ),
)
SUB_PARTITIONS, LEAN_PARTITIONS, PARTITIONS = ZERO_GENERATIONS
# Stage 3 cuts each parameter over the ranks, and has saved that in one form. The list param_shapes
# in the model files, without which nothing tells the parameters apart, is of 0.5.4.
STAGE_3 = ZeroGeneration(
    "partitions", "fp32_flat_groups", (0, 5, 4), "DeepSpeed 0.5.4 and later", ""
)


# DeepSpeed made one step of the optimizer on zero gradients when it started, until this release
# (18179807f, #5104, 2024-02-10), so that Adam's step is one more than the steps of training.
_WITHOUT_INITIAL_STEP = (0, 13, 2)


def makes_initial_step(version: str) -> bool:
    """Whether ZeRO of a DeepSpeed version makes a step before training; "" is before 0.3.17."""
    return (release_of(version) or (0, 0, 0)) < _WITHOUT_INITIAL_STEP


# The parameters of a flat group were dealt out to the data-parallel ranks in turn, from ee4deabd
# (#1067, 2021-05-15, stage 2) on, which stage 1 became four days later, until 4d420df5 (#1256,
# 2021-07-28), since which only zero_optimization.round_robin_gradients asks for that.
_DEALT_OUT = ((0, 3, 17), (0, 4, 4))


def deals_out_parameters(version: str) -> bool:
    """Whether a DeepSpeed version always has a flat group's parameters in round-robin order."""
    first, until = _DEALT_OUT
    return first <= (release_of(version) or (0, 0, 0)) < until


@dataclass(frozen=True, slots=True)
class Resumption:
    """Which versions of DeepSpeed resume from states, and how.

    releases: the versions, for people. any_dp: whether they do so at any number of data-parallel
    ranks; otherwise only at the number that saved the states. setting: what their yml needs below
    ``zero_optimization``, "" for nothing. keeps_step: whether Adam's step goes on; otherwise it
    begins anew at 1. refusal: what the versions that today's GPT-NeoX requires print instead of
    resuming, "" where they resume.
    """

    releases: str
    any_dp: bool
    setting: str
    keeps_step: bool
    refusal: str


def resumption(
    generation: ZeroGeneration, kind: StatesKind, version: str, *, has_step: bool
) -> Resumption:
    """What resumes states of a form.

    The loaders: runtime/zero/stage1.py of 0.3.16 (run with GPT-NeoX v1.0), stage2.py of 0.5.8, and
    stage_1_and_2.py of 0.8.3 and 0.16.5 (_load_legacy_checkpoint; its refusal of states without
    ``ds_version`` was run, that of elastic states without a step was read).

    version: ``ds_version`` of the states, "" for none. has_step: whether elastic states hold Adam's
        step, as those of 0.11 and later do.
    """
    refusal = "" if version else NO_VERSION
    if generation is SUB_PARTITIONS:
        rigid = kind == "rigid"
        setting = "elastic_checkpoint: false" if rigid else ""
        return Resumption(generation.releases, not rigid, setting, rigid, NO_VERSION)
    if kind == "rigid":
        return Resumption(generation.releases, False, "", True, refusal)
    if not has_step:
        refusal = refusal or "KeyError: 'base_optimizer_state_step'"
    if generation is LEAN_PARTITIONS:
        return Resumption(generation.releases, True, "", False, refusal)
    return Resumption(generation.releases, True, "elastic_checkpoint: true", has_step, refusal)
