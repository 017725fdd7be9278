"""Hypotheses why logits differ: common mistakes in how weights are interpreted.

Each hypothesis changes settings of the reference. If the two sides then agree, it is the cause.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from neox_bridge.frameworks.changes import since
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.rank_biases import drifted_biases
from neox_bridge.verification.forward_passes import neox_settings
from neox_bridge.wording import plural

# settings, with GPT-NeoX's defaults (megatron/neox_arguments/neox_args.py), and their names
_SETTINGS: dict[str, tuple[object, str]] = {
    "rotary_pct": (1.0, "rotary fraction"),
    "rotary_emb_base": (10000, "rotary base"),
    "layernorm_epsilon": (1e-5, "epsilon"),
    "rms_norm_epsilon": (1e-8, "epsilon"),
    "gpt_j_residual": (False, "residual"),
    "gpt_j_tied": (False, "norms per block"),
    "activation": ("gelu", "activation"),
    "bias_gelu_fusion": (False, "gelu kind"),
    "sliding_window_width": (None, "sliding window"),
}
_BIASES = {
    "first": "the other side adds only the bias of the first rank",
    "sum": "the other side adds the biases of all ranks, but each rank already has the whole bias",
    "twice": "the other side adds twice the bias",
    "half": "the other side adds half the bias",
}


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """Another interpretation of the same weights.

    Attributes:
        cause: What is wrong, in one or two words.
        settings: The changed settings of the reference.
        text: The explanation, for display.
        inherent: Whether no conversion can remove it, because the other framework cannot do
            otherwise.
    """

    cause: str
    settings: Mapping[str, Any]
    text: str
    inherent: bool = False


def hypotheses(neox: Checkpoint, other: Checkpoint) -> list[Hypothesis]:
    """Possible causes of a difference from a GPT-NeoX checkpoint, most likely first."""
    candidates = [*_by_config(neox, other), *_by_era(neox), *_by_order(neox), *_by_habit(neox)]
    unique: dict[str, Hypothesis] = {}
    for hypothesis in candidates:
        unique.setdefault(repr(sorted(hypothesis.settings.items())), hypothesis)
    return list(unique.values())


def _by_config(neox: Checkpoint, other: Checkpoint) -> Iterator[Hypothesis]:
    """Differences between the two configs."""
    old = neox.neox is not None and neox.neox.mlp_names == "dense"
    written = neox.architecture.write_neox(neox.config, old)
    other_written = neox.architecture.write_neox(other.config, old)
    activations_differ = False
    for key, (default, name) in _SETTINGS.items():
        ours, value = written.get(key, default), other_written.get(key, default)
        if ours == value or (key == "bias_gelu_fusion" and activations_differ):
            continue
        settings = {key: value}
        if key == "activation":
            activations_differ = True
            settings["bias_gelu_fusion"] = other_written.get("bias_gelu_fusion", False)
        if key == "gpt_j_residual":
            settings |= _residual(bool(value))
        text = f"{key}: {ours} in GPT-NeoX, {value} on the other side"
        yield Hypothesis(name, settings, text)


def _residual(parallel: bool) -> dict[str, Any]:
    """The other kind of residual; biases keep their meaning (see tensors/geometry.gather)."""
    return {"gpt_j_residual": parallel, "row_biases": "first" if parallel else "sum"}


def _by_era(neox: Checkpoint) -> Iterator[Hypothesis]:
    """Behavior that changed between GPT-NeoX versions."""
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
    """Rows and shards that were confused with others of the same shape."""
    config, state = neox.config, neox.neox_state
    if config.grouped_query and "attention" not in state.te:
        other = "interleaved" if state.gqa_order == "grouped" else "grouped"
        yield Hypothesis(
            "grouped-query order",
            {"gqa_order": other},
            f"the rows of q, k and v are read as {state.gqa_order}, but the other side has them "
            f"as {other}; use `gqa_order={other}`",
        )
    if neox.architecture.gated:
        yield Hypothesis(
            "swapped gate",
            {"gate": "second" if "mlp" in state.te else "first"},
            "the gate and up weights are swapped on one of the two sides",
        )
    if config.attention_bias or config.mlp_bias:
        if drifted := drifted_biases(neox):
            setting = "sequence_parallel: true let" if drifted.sequence_parallel else "the run let"
            yield Hypothesis(
                "biases that differ between ranks",
                {"row_biases": "mean"},
                f"{setting} the ranks drift apart in {plural(drifted.count, 'bias')}, by "
                f"{drifted.largest:.6g} at most ({drifted.name}); the other side has their mean, "
                "and no single model can equal this checkpoint",
            )
        for kind, meaning in _BIASES.items():
            times = state.tp if kind in ("first", "sum") else 2
            if times > 1:
                counted = "bias counted twice" if times == 2 else f"bias counted {times} times"
                text = f"attention.dense.bias and the second bias of the MLP: {meaning}"
                yield Hypothesis(counted, {"row_biases": kind}, text)


def _by_habit(neox: Checkpoint) -> Iterator[Hypothesis]:
    """Defaults that frameworks use if they do not understand a config."""
    settings = neox_settings(neox)
    if (settings.get("activation") or "gelu") == "gelu":
        fused = bool(settings.get("bias_gelu_fusion"))
        kinds = ("erf", "tanh")
        text = f"GPT-NeoX computes the {kinds[fused]} gelu, the other side the {kinds[not fused]}"
        yield Hypothesis("gelu kind", {"bias_gelu_fusion": not fused}, f"{text} one")
    for share in (0.25, 1.0, 0.5):
        if share != neox.config.rotary_pct:
            rotated = f"GPT-NeoX rotates {neox.config.rotary_pct:g} of each head"
            text = f"{rotated}, the other side {share:g}"
            yield Hypothesis("rotary fraction", {"rotary_pct": share}, text)
    if neox.config.rotary_base != 10000:
        text = f"the base is {neox.config.rotary_base:g} in GPT-NeoX, 10000 on the other side"
        yield Hypothesis("rotary base", {"rotary_emb_base": 10000}, text)
    rms = settings.get("norm") == "rmsnorm"
    key = "rms_norm_epsilon" if rms else "layernorm_epsilon"
    for epsilon in (1e-5, 1e-6, 1e-8, 1e-12):
        if epsilon != neox.config.norm_eps:
            text = f"the norms' epsilon is {neox.config.norm_eps:g} in GPT-NeoX, {epsilon:g} beside"
            yield Hypothesis("epsilon", {key: epsilon}, text)
    parallel = bool(settings.get("gpt_j_residual"))
    ways = ("sequentially", "in parallel")
    text = f"attention and MLP run {ways[parallel]} in GPT-NeoX, {ways[not parallel]} on the other"
    yield Hypothesis("residual", _residual(not parallel), f"{text} side")
