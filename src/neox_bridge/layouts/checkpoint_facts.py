"""A checkpoint as plain data: the facts that are known without reading a tensor."""

from dataclasses import asdict
from typing import Any

from neox_bridge.documents import SCHEMA_VERSION
from neox_bridge.findings import finding_json
from neox_bridge.frameworks.eras import fitting
from neox_bridge.frameworks.writers import words_of
from neox_bridge.layouts.checkpoint import Checkpoint, NeoxState
from neox_bridge.layouts.sizes import elements_by_dtype
from neox_bridge.stores.paths import size

_CONFIG_FACTS = (
    *("max_positions", "rotary_dim", "rotary_pct", "rotary_base", "activation", "norm_eps"),
    *("parallel_residual", "tied_norms", "tied_embeddings"),
)


def facts_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The facts of a checkpoint, under the names of ``inspect --json``."""
    config, state = checkpoint.config, checkpoint.neox
    dtypes = elements_by_dtype(checkpoint.tensors.values())
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": checkpoint.kind,
        "path": checkpoint.path,
        "revision": checkpoint.revision or None,
        "read_by": "family",
        "family": checkpoint.architecture.name,
        "format": checkpoint.form.name if checkpoint.form else None,
        "neox": None if state is None else _neox_facts(checkpoint, state),
        "parameters": dtypes.total(),
        "dtype": config.dtype,
        "dtypes": dict(dtypes.most_common()),
        "layers": config.layers,
        "hidden": config.hidden,
        "heads": config.heads,
        "kv_heads": config.key_value_heads,
        "ffn": config.dims["ffn"],
        "vocab_rows": config.dims["vocab"],
        "tokenizer_size": checkpoint.tokenizer_size,
        "tokenizer": list(checkpoint.tokenizer),
        **{name: getattr(config, name) for name in _CONFIG_FACTS},
        "biases": {
            "attention": config.attention_bias,
            "mlp": config.mlp_bias,
            "norm": config.norm_bias,
        },
        "files": list(checkpoint.files),
        "bytes": sum(size(file) for file in checkpoint.files),
        "written_by": checkpoint.record.get("written_by"),
        "has_optimizer": checkpoint.has_optimizer,
        "dropped": [{"name": d.name, "reason": d.reason} for d in checkpoint.dropped],
        "unknown_keys": [asdict(key) for key in checkpoint.unknown_keys],
        "findings": [finding_json(finding) for finding in checkpoint.findings],
        "refusals": [
            {"key": refusal.key, "reason": refusal.reason, "way_out": refusal.way_out}
            for refusal in checkpoint.refusals
        ],
    }


def _neox_facts(checkpoint: Checkpoint, state: NeoxState) -> dict[str, Any]:
    era = fitting(state.mlp_names, state.inv_freq, checkpoint.raw)
    return {
        "step": state.step,
        "iteration": state.iteration,
        "named_step": state.named_step,
        "flat": state.flat,
        "configs": list(state.configs),
        "configs_given": state.configs_given,
        "writer": {
            **asdict(state.writer),
            "guessed": sorted(state.writer.guessed),
            "words": words_of(state.writer),
        },
        "era": era.name,
        "era_span": era.until,
        "mlp_names": state.mlp_names,
        "inv_freq": state.inv_freq,
        "layout": state.layout,
        "tensor_parallel": state.tp,
        "pipeline_stages": state.pp,
        "universal": state.universal,
        "zero_stage": 3 if state.is_zero3 else None,
        "optimizer": list(state.optimizer),
        "deepspeed": state.ds_version or None,
    }
