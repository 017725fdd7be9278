"""Which other model a GPT-NeoX checkpoint's weights could be meant as: what tools get wrong.

Each hypothesis is a change of the reference's settings; the one under which the two sides agree is
the cause.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from neox_bridge.frameworks.changes import since
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.rank_biases import drifted_biases
from neox_bridge.verification.forward_passes import neox_settings

_ABSENT = {
    "rotary_pct": 1.0,
    "rotary_emb_base": 10000,
    "layernorm_epsilon": 1e-5,
    "rms_norm_epsilon": 1e-8,
    "gpt_j_residual": False,
    "gpt_j_tied": False,
    "activation": "gelu",
    "bias_gelu_fusion": False,
    "sliding_window_width": None,
}  # GPT-NeoX's defaults (megatron/neox_arguments/neox_args.py)
_NAMES = {
    "rotary_pct": "rotary fraction",
    "rotary_emb_base": "rotary base",
    "layernorm_epsilon": "epsilon",
    "rms_norm_epsilon": "epsilon",
    "gpt_j_residual": "residual",
    "gpt_j_tied": "norms of a block",
    "activation": "activation",
    "bias_gelu_fusion": "gelu kind",
    "sliding_window_width": "sliding window",
}
_BIASES = {
    "first": "the other side adds the first rank's bias alone",
    "sum": "the other side adds the sum of the ranks' biases, each of which is the whole one",
    "twice": "the other side adds twice the bias",
    "half": "the other side adds half the bias",
}


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """Another meaning of the same weights.

    cause: what is wrong, in one or two words. settings: of the reference. text: what it would mean.
    inherent: the other framework can't do otherwise: no conversion removes it.
    """

    cause: str
    settings: Mapping[str, Any]
    text: str
    inherent: bool = False


def hypotheses(neox: Checkpoint, other: Checkpoint) -> list[Hypothesis]:
    """What may explain that another checkpoint differs from a GPT-NeoX one, likeliest first."""
    candidates = [*_by_config(neox, other), *_by_era(neox), *_by_order(neox), *_by_habit(neox)]
    unique: dict[str, Hypothesis] = {}
    for hypothesis in candidates:
        unique.setdefault(repr(sorted(hypothesis.settings.items())), hypothesis)
    return list(unique.values())


def _by_config(neox: Checkpoint, other: Checkpoint) -> Iterator[Hypothesis]:
    """Where the other's config says something else."""
    old = neox.neox is not None and neox.neox.mlp_names == "dense"
    written = neox.architecture.write_neox(neox.config, old)
    other_written = neox.architecture.write_neox(other.config, old)
    changed = {}
    for key, absent in _ABSENT.items():
        other_value = other_written.get(key, absent)
        if written.get(key, absent) != other_value:
            changed[key] = other_value
    if "activation" in changed:
        changed.pop("bias_gelu_fusion", None)
    for key, value in changed.items():
        text = f"{key}: {written.get(key, _ABSENT[key])} in GPT-NeoX, {value} on the other side"
        settings = {key: value}
        if key == "activation":
            settings["bias_gelu_fusion"] = other_written.get("bias_gelu_fusion", False)
        if key == "gpt_j_residual":
            settings |= _residual(bool(value))
        yield Hypothesis(_NAMES[key], settings, text)


def _residual(parallel: bool) -> dict[str, Any]:
    """The other residual, with the biases meaning what they did (see tensors/geometry.gather)."""
    return {"gpt_j_residual": parallel, "row_biases": "first" if parallel else "sum"}


def _by_era(neox: Checkpoint) -> Iterator[Hypothesis]:
    """What changed with GPT-NeoX's versions, and transformers has one way only."""
    settings = neox_settings(neox)
    if settings.get("norm") == "rmsnorm":
        older = settings["rms_eps"] == "outside"
        ways = ("x / (rms + eps)", "x / sqrt(var + eps)")
        yield Hypothesis(
            "epsilon form",
            {"rms_eps": "inside" if older else "outside"},
            f"RMSNorm is {ways[not older]} in this GPT-NeoX, and {ways[older]} on the other side "
            f"(changed by {since('neox-rms-epsilon')})",
            inherent=True,
        )
    if neox.config.dtype in ("float16", "bfloat16"):
        yield Hypothesis(
            "rounded rotary tables",
            {"rope_tables": neox.config.dtype},
            f"the other side rounds its rotary tables to {neox.config.dtype}, as GPT-NeoX did "
            f"before {since('neox-rope-fp32')}",
            inherent=True,
        )


def _by_order(neox: Checkpoint) -> Iterator[Hypothesis]:
    """Rows and shards taken for others of the same shape."""
    config, state = neox.config, neox.neox
    assert state is not None
    if config.grouped_query and "attention" not in state.te:
        other = "interleaved" if state.gqa_order == "grouped" else "grouped"
        yield Hypothesis(
            "grouped-query order",
            {"gqa_order": other},
            f"the rows of q, k and v are read as {state.gqa_order}, and the other side has them as "
            f"{other}: say --gqa-order {other}",
        )
    if neox.architecture.gated:
        yield Hypothesis(
            "swapped gate",
            {"gate": "second" if "mlp" in state.te else "first"},
            "gate and up are swapped on one of the two sides",
        )
    if config.attention_bias or config.mlp_bias:
        if drifted := drifted_biases(neox):
            setting = "sequence_parallel: true let" if drifted.sequence_parallel else "the run let"
            yield Hypothesis(
                "biases that differ between ranks",
                {"row_biases": "mean"},
                f"{setting} {drifted.count} biases drift apart between the ranks, by "
                f"{drifted.largest:.6g} at most ({drifted.name}); the other side has their mean, "
                "and no single model equals this checkpoint",
            )
        kinds = [kind for kind in _BIASES if state.tp > 1 or kind in ("twice", "half")]
        for kind in kinds:
            times = state.tp if kind in ("first", "sum") else 2
            counted = "bias counted twice" if times == 2 else f"bias counted {times} times"
            yield Hypothesis(
                counted,
                {"row_biases": kind},
                f"attention.dense.bias and the MLP's second: {_BIASES[kind]}",
            )


def _by_habit(neox: Checkpoint) -> Iterator[Hypothesis]:
    """Values that frameworks fall back to when a config isn't understood."""
    settings = neox_settings(neox)
    if (settings.get("activation") or "gelu") == "gelu":
        fused = bool(settings.get("bias_gelu_fusion"))
        kinds = ("erf", "tanh")
        text = f"GPT-NeoX computes the {kinds[fused]} gelu, the other side the {kinds[not fused]}"
        yield Hypothesis("gelu kind", {"bias_gelu_fusion": not fused}, f"{text} one")
    for share in (0.25, 1.0, 0.5):
        if share != neox.config.rotary_pct:
            yield Hypothesis(
                "rotary fraction",
                {"rotary_pct": share},
                f"GPT-NeoX rotates {neox.config.rotary_pct:g} of each head, the other side "
                f"{share:g}",
            )
    if neox.config.rotary_base != 10000:
        yield Hypothesis(
            "rotary base",
            {"rotary_emb_base": 10000},
            f"the base is {neox.config.rotary_base:g} in GPT-NeoX, 10000 on the other side",
        )
    rms = settings.get("norm") == "rmsnorm"
    key = "rms_norm_epsilon" if rms else "layernorm_epsilon"
    for epsilon in (1e-5, 1e-6, 1e-8, 1e-12):
        if epsilon != neox.config.norm_eps:
            text = f"the norms' epsilon is {neox.config.norm_eps:g} in GPT-NeoX, {epsilon:g} beside"
            yield Hypothesis("epsilon", {key: epsilon}, text)
    parallel = bool(settings.get("gpt_j_residual"))
    ways = ("one after the other", "in parallel")
    yield Hypothesis(
        "residual",
        _residual(not parallel),
        f"attention and MLP run {ways[parallel]} in GPT-NeoX, {ways[not parallel]} on the other "
        "side",
    )
