"""Targets with the modules of Transformer Engine (``te_mha`` and ``te_layernorm_mlp``).

Sources: GPT-NeoX megatron/model/transformer_engine.py (TELayerNormMLP, TEMultiheadAttention), and
those in layouts/transformer_engine.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from neox_bridge.errors import Refused, UsageError
from neox_bridge.findings import Finding
from neox_bridge.frameworks.changes import since
from neox_bridge.frameworks.eras import Era, known_keys
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.transformer_engine import (
    BIASES,
    STATE,
    STATES,
    SUMS_TWICE,
    epsilon,
    te_name,
)
from neox_bridge.planning.options import Options
from neox_bridge.tensors.geometry import constant
from neox_bridge.tensors.pieces import OutputTensor

# activations that the MLPs of both GPT-NeoX and Transformer Engine have: for gated MLPs (True) and
# for others
_SAME = {True: ("silu",), False: ("gelu_tanh", "relu")}


def check_target(checkpoint: Checkpoint, tp: int, era: Era, options: Options) -> list[Finding]:
    """Check such a target and return its findings.

    Args:
        checkpoint: The source.
        tp: The tensor-parallel ranks of the target.
        era: The GPT-NeoX of the target.
        options: The options of the conversion.

    Raises:
        Refused: The modules cannot compute the model. The message has every reason.
        UsageError: An option does not apply.
    """
    if options.gqa_order is not None:
        raise UsageError(
            ["gqa_order"], "Transformer Engine has only one order of these rows", "Leave it out."
        )
    architecture, config = checkpoint.architecture, checkpoint.config
    known = _SAME[architecture.gated]
    what = {"gelu": "the exact gelu"}.get(config.activation, config.activation)
    raw: Mapping[str, Any] = checkpoint.raw if checkpoint.kind == "neox" else {}
    positions = str(raw.get("pos_emb") or "learned")
    if checkpoint.kind == "hf" and architecture.has_rotary_buffer:
        positions = "rotary"
    checks: tuple[tuple[bool, str], ...] = (
        (
            "te_mha" not in known_keys(era) or options.mlp_names == "dense",
            "GPT-NeoX has supported the modules of Transformer Engine since "
            f"{since('neox-transformer-engine')}. Use `era=today` without `mlp_names=`",
        ),
        (tp > 1 and config.parallel_residual, f"gpt_j_residual: {SUMS_TWICE} Use `tp=1`"),
        (
            config.activation not in known,
            f"activation: the MLP of Transformer Engine does not support {what}, only "
            f"{', '.join(known)}. If the model was trained with the tanh form, as Pythia was, set "
            'hidden_act: "gelu_fast" in config.json',
        ),
        (
            config.window is not None,
            "sliding_window_width: GPT-NeoX passes it to Transformer Engine as a number, but "
            "Transformer Engine expects a pair. Leave out `te=True`",
        ),
        (
            config.tied_norms,
            "gpt_j_tied: the MLP of Transformer Engine has a separate norm. Leave out `te=True`",
        ),
        (
            architecture.gated and architecture.norm == "layernorm",
            "norm: layernorm with a gated MLP was not tested with Transformer Engine. Leave out "
            "`te=True`",
        ),
        (
            architecture.norm != "rmsnorm" and not config.norm_bias,
            "the norms have no biases, but LayerNorm of Transformer Engine has. Leave out "
            "`te=True`",
        ),
        (
            positions != "rotary",
            f"pos_emb: te_mha of GPT-NeoX fails with {positions} positions, because it has no "
            "rope_emb then (megatron/model/transformer_engine.py). Leave out `te=True`",
        ),
        (bool(raw.get("use_mup")), "te_mha does not support use_mup. Leave out `te=True`"),
        (
            bool(raw.get("use_qk_layernorm")),
            "te_mha does not support use_qk_layernorm. Leave out `te=True`",
        ),
    )
    if reasons := [why for hit, why in checks if hit]:
        raise Refused(
            "`te=True`: this model cannot be written with Transformer Engine. "
            f"{'. '.join(reasons)}."
        )
    return epsilon(config.norm_eps, architecture.norm)


def lacking_biases(tensors: Sequence[OutputTensor], dtype: str) -> Iterator[OutputTensor]:
    """Biases of -0.0 that the two modules require and that the tensors of a file do not contain."""
    sizes = {tensor.name: tensor.shape[0] for tensor in tensors}
    for prefix in _blocks(tensors):
        for _, names in BIASES.values():
            for name in map(te_name, names):
                size = sizes[f"{prefix}{name.removesuffix('bias')}weight"]
                if f"{prefix}{name}" not in sizes:
                    yield OutputTensor(
                        f"{prefix}{name}", dtype, (size,), (constant((size,), -0.0),)
                    )


def states(tensors: Sequence[OutputTensor]) -> list[str]:
    """The names of the states of the modules, which a strict load requires.

    Their value can be None, which is ignored (TransformerEngine 1.12 module/base.py,
    set_extra_state).
    """
    return [f"{p}{module}.{STATE}" for p in _blocks(tensors) for module in STATES]


def _blocks(tensors: Sequence[OutputTensor]) -> list[str]:
    """The prefix of the tensor names of each block in a file."""
    key = te_name("attention.query_key_value.weight")
    return [t.name.removesuffix(key) for t in tensors if t.name.endswith(key)]
