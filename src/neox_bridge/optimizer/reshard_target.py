"""Resolves the options of ``reshard`` against the model and the batch."""

import os
from dataclasses import dataclass, replace

from neox_bridge.architectures.base import ModelConfig, shared_reason
from neox_bridge.errors import Refused, UsageError
from neox_bridge.findings import Finding
from neox_bridge.frameworks.deepspeed import pipeline_accumulation
from neox_bridge.layouts.checkpoint import Checkpoint, refuse_all
from neox_bridge.layouts.universal_folder import MASTER
from neox_bridge.layouts.untrusted import whole
from neox_bridge.optimizer.global_batch import Batch, batch_of, spread
from neox_bridge.optimizer.gradient_scale import (
    Rescaling,
    Side,
    change_of_scale,
    gradient_findings,
    kept_accumulation,
    rescaling,
)
from neox_bridge.optimizer.options import Resharding
from neox_bridge.optimizer.states import Optimizer, States, states
from neox_bridge.planning.common import with_vocabulary_rows
from neox_bridge.planning.era_checks import EraSettings, check_era, era_settings, lost_in_era
from neox_bridge.planning.neox_files import NeoxModel, RankLayout, stage_layers
from neox_bridge.planning.options import Options
from neox_bridge.planning.to_neox import target_layout
from neox_bridge.planning.vocabulary import Vocabulary, keep, padding_multiple


@dataclass(frozen=True)
class Target:
    """The resolved target.

    Attributes:
        config: The model config, with the vocabulary rows of the target.
        step: The folder of the step.
        source: The batch of the source.
        rescaling: How the optimizer continues with gradients of another scale; None if the scale is
            the same.
        settings: The run's yml for the GPT-NeoX versions of the target.
        findings: The findings about its gradients.
    """

    layout: RankLayout
    config: ModelConfig
    vocabulary: Vocabulary
    dp: int
    zero: int
    batch: Batch
    bounds: tuple[range, ...]
    step: str
    universal: bool
    source: Batch
    rescaling: Rescaling | None
    settings: EraSettings
    findings: tuple[Finding, ...]

    @property
    def prefix(self) -> str:
        """The prefix of the layer number in DeepSpeed's names."""
        return "" if self.layout.name == "layers" else "sequential."


def choose_target(
    checkpoint: Checkpoint, optimizer: Optimizer, resharding: Resharding, version: str | None
) -> Target:
    """Resolve the target. Raises Refused if the model or DeepSpeed does not support it.

    Args:
        optimizer: The optimizer in the format of the target.
        version: The DeepSpeed that wrote the source.
    """
    state, raw = checkpoint.neox_state, checkpoint.raw
    options = Options(
        to="neox",
        tp=resharding.tp,
        pp=resharding.pp,
        layout=resharding.layout,
        row_bias=resharding.row_bias,
        era=resharding.era,
    )
    layout, era = target_layout(checkpoint, options)
    if resharding.era is not None:
        check_era(checkpoint, layout, era, options)
        refuse_all(lost_in_era(checkpoint, era), checkpoint.path)
    _check_te(checkpoint, layout, universal=resharding.universal)
    settings = era_settings(checkpoint, layout, resharding.era)
    rows = checkpoint.config.dims["vocab"]
    if state.universal:  # it may not contain the rows of padding, which are restored as zeros
        folder = state.folder
        rows = max(rows, whole(state.args, "padded_vocab_size", folder) or 0)
    vocabulary = keep(rows, padding_multiple(state.args, raw), state.tp, layout.tp)
    config = replace(checkpoint.config, dims={**checkpoint.config.dims, "vocab": vocabulary.padded})
    dp = resharding.dp or optimizer.dp
    zero = optimizer.stage if resharding.zero is None else resharding.zero
    if zero >= 2 and layout.name == "layers":
        raise Refused(
            f"DeepSpeed does not support ZeRO stage {zero} with pipe_parallel_size 1 or more. Use "
            "`zero=1`, or `pp=0`."
        )
    if zero == 2:
        _check_stage_2(layout)
    if zero == 3:
        _check_stage_3(layout)
    _check_names(checkpoint, universal=resharding.universal)
    if zero in (0, 3) and resharding.universal:
        raise Refused(
            "`universal=True`: DeepSpeed loads universal checkpoints only at ZeRO stages 1 and 2. "
            "Use `zero=1`."
        )
    ds_config = optimizer.metas[0].get("ds_config") or {}
    mp_rank = os.path.join(state.folder, "mp_rank_00_model_states.pt")
    source = batch_of(ds_config, raw, optimizer.dp, mp_rank)
    before, after = _sides(resharding, version, checkpoint, layout, source)
    accumulation = kept_accumulation(before, after)
    batch = spread(source, dp, resharding.micro_batch, accumulation)
    after = replace(after, accumulation=batch.accumulation)
    way_out = _way_out(batch.total // dp, accumulation)
    factor = change_of_scale(before, after, way_out)
    rescaled, scaled_settings = None, {}
    if factor != 1:
        rescaled = rescaling(optimizer, raw, factor, checkpoint.config.dtype, way_out)
        scaled_settings = rescaled.yml(settings.raw)
    findings = gradient_findings(version, before, after, rescaled, scaled_settings)
    wholes = with_vocabulary_rows(checkpoint.architecture, config, checkpoint.tensors)
    bounds = tuple(stage_layers(NeoxModel(checkpoint.architecture, config, wholes, layout), raw))
    step = f"global_step{state.iteration}{'_universal' if resharding.universal else ''}"
    return Target(
        layout, config, vocabulary, dp, zero, batch, bounds, step, resharding.universal, source,
        rescaled, settings, tuple(findings),
    )  # fmt: skip


def _check_stage_2(layout: RankLayout) -> None:
    """Raise Refused if no GPT-NeoX with the target's tensor names trains such a run at stage 2."""
    if layout.tp > 1 and not layout.old_names:
        raise Refused(
            "GPT-NeoX since 2024-09 exits at ZeRO stage 2 with more than one tensor-parallel rank "
            "(megatron/training.py, get_model; #1275). Use `zero=1`, or `tp=1`."
        )


def _check_names(checkpoint: Checkpoint, *, universal: bool) -> None:
    """Raise Refused if a tensor that the reader needs would have no name in the target."""
    architecture = checkpoint.architecture
    if architecture.shared and universal:
        raise Refused(
            f"`universal=True`: {shared_reason(architecture.shared)}, and such files contain it "
            "once, which is not supported. Leave the option out."
        )
    buffers = {weight.neox for weight in architecture.weights if not weight.trained}
    if universal and buffers:
        raise Refused(
            f"`universal=True`: a universal checkpoint has no buffers, but the model needs "
            f"{', '.join(sorted(buffers))}. Leave the option out."
        )


def _check_te(checkpoint: Checkpoint, layout: RankLayout, *, universal: bool) -> None:
    """Raise Refused if the optimizer of a run with Transformer Engine would be another one."""
    if not checkpoint.neox_state.te:
        return
    if not layout.te:
        raise Refused(
            f"{checkpoint.path}: the run used modules of Transformer Engine, and GPT-NeoX applies "
            "weight decay to other parameters of them. Only runs with both te_mha and "
            "te_layernorm_mlp can be resharded, for `era=today`. Convert only the weights."
        )
    if universal:
        raise Refused(
            "`universal=True`: not supported for modules of Transformer Engine. Leave it out."
        )


def _check_stage_3(layout: RankLayout) -> None:
    """Raise Refused if no GPT-NeoX trains such a run at stage 3."""
    if layout.predates_deepspeed_06:
        raise Refused("GPT-NeoX v1.0 does not support ZeRO stage 3. Use `zero=1`.")
    # versions before zero.Init, which partitions over all ranks, stored the buffer
    if layout.tp > 1 and not (layout.old_names and layout.inv_freq == "store"):
        raise Refused(
            "GPT-NeoX since 2024-03-19 does not train at ZeRO stage 3 with more than one "
            "tensor-parallel rank (megatron/training.py, get_model; #1190 and #1275). Use "
            "`zero=1`, or `tp=1`."
        )


def check_row_bias(
    checkpoint: Checkpoint,
    optimizer: Optimizer,
    given: States | None,
    *,
    tp: int | None,
    universal: bool,
) -> None:
    """Raise UsageError if ``row_bias`` has no effect.

    Args:
        given: States that replace those of the source.
        tp: The tensor-parallel size of the target; by default that of the source.
    """
    ranks = tp or checkpoint.neox_state.tp
    names = [row.hf for row in checkpoint.rows if row.weight.split == "row_bias"]
    if not (checkpoint.config.parallel_residual and names):
        raise UsageError(
            ["row_bias"],
            "this model has no biases that the ranks sum (only runs with gpt_j_residual do)",
            "Leave it out.",
        )
    if universal:
        raise UsageError(
            ["row_bias", "universal"],
            "a universal checkpoint always stores each rank's part",
            "Leave row_bias out.",
        )
    if ranks == 1:
        raise UsageError(
            ["row_bias"], "with one tensor-parallel rank, that rank holds the sum", "Leave it out."
        )
    masters = (given or states(checkpoint, optimizer)).get(MASTER, {})
    places = (checkpoint.tensors, masters)
    wholes = [tensors[name] for tensors in places for name in names if name in tensors]
    if all(ranks in (len(whole.shards), len(whole.parts)) for whole in wholes):
        raise UsageError(
            ["row_bias"],
            f"the number of tensor-parallel ranks stays {ranks}, so each rank keeps the biases "
            "that it trained",
            "Leave it out, or choose another tensor-parallel size.",
        )


def _sides(
    resharding: Resharding,
    version: str | None,
    checkpoint: Checkpoint,
    layout: RankLayout,
    batch: Batch,
) -> tuple[Side, Side]:
    """The gradient scale facts of the source, and of the target with the batch of the source."""
    state = checkpoint.neox_state
    known = pipeline_accumulation(version)
    # since 2025-03, GPT-NeoX requires DeeperSpeed 0.16.5, which sums
    before = resharding.source_engine or known or resharding.engine or "sums"
    resumes = (
        pipeline_accumulation(resharding.era.deepspeed) if resharding.era is not None else known
    )
    after = resharding.engine or resumes or before
    pipeline, stages = state.layout == "layers", max(1, state.pp)
    return (
        Side(before, pipeline, stages if pipeline else 1, batch.accumulation),
        Side(after, layout.name == "layers", layout.stages, batch.accumulation),
    )


def _way_out(share: int, accumulation: int | None) -> str:
    """The advice on how the gradients keep their scale. share: sequences per rank and step."""
    if accumulation and share % accumulation == 0:
        return (
            f"`micro_batch={share // accumulation}` keeps gradient_accumulation_steps "
            f"{accumulation}, which needs no scaling."
        )
    return "Keep `pp=` and `dp=` as they are."
