"""Writes ``neox_bridge.json``: what the target cannot express, so that converting back is exact."""

import re
from collections.abc import Mapping
from typing import Any

from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.version import __version__

FORMAT = 1
# settings with paths, hosts and accounts, which are not written
_PRIVATE = re.compile(
    r"wandb_.*|.*_data_paths?|data_path|.*_dir|.*file|load|save|master_.*|account|comment|"
    r"include|exclude|launcher.*|deepspeed_slurm|s3_.*|user_script|git_hash|.*_path|comet_.*"
)


def hf_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """The record of a Hugging Face target: the source, and the settings of a GPT-NeoX run."""
    record: dict[str, Any] = _base(checkpoint)
    if checkpoint.kind == "neox" and checkpoint.neox is not None:
        record["neox"] = {
            "iteration": checkpoint.neox.iteration,
            "layout": checkpoint.neox.layout,
            "tensor_parallel": checkpoint.neox.tp,
            "pipeline_stages": checkpoint.neox.pp,
            "yml": public_settings(checkpoint.raw),
        }
    elif "neox" in checkpoint.record:
        record["neox"] = checkpoint.record["neox"]
    return record


def neox_record(checkpoint: Checkpoint, rows: int, tokenizer_size: int | None) -> dict[str, Any]:
    """The record in a global_stepN: the vocabulary rows and the Hugging Face configs of the source.

    Args:
        checkpoint: The source.
        rows: The rows of its embeddings.
        tokenizer_size: The number of entries of its tokenizer; None if unknown.
    """
    record = _base(checkpoint)
    record["vocab_size"] = rows
    if tokenizer_size is not None:
        record["tokenizer_size"] = tokenizer_size
    if checkpoint.kind == "hf":
        record["config"] = dict(checkpoint.raw)
        if checkpoint.generation:
            record["generation_config"] = dict(checkpoint.generation)
    else:
        kept = ("config", "generation_config")
        record |= {key: checkpoint.record[key] for key in kept if key in checkpoint.record}
    return record


def source_summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """The origin of a checkpoint, without local paths."""
    summary: dict[str, Any] = {"kind": checkpoint.kind, "name": _name(checkpoint)}
    if checkpoint.revision:
        summary["revision"] = checkpoint.revision
    if checkpoint.form is not None:
        summary["format"] = checkpoint.form.name
    if checkpoint.neox is not None:
        summary["iteration"] = checkpoint.neox.iteration
        summary["layout"] = checkpoint.neox.layout
        summary["tensor_parallel"] = checkpoint.neox.tp
        summary["pipeline_stages"] = checkpoint.neox.pp
    summary["dtype"] = checkpoint.config.dtype
    if checkpoint.from_masters:
        summary["weights"] = "masters"
    return summary


def public_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The merged yml without paths, hosts and accounts."""
    return {key: value for key, value in raw.items() if not _PRIVATE.fullmatch(key)}


def _base(checkpoint: Checkpoint) -> dict[str, Any]:
    ignored = sorted(checkpoint.ignored_keys)
    record: dict[str, Any] = {
        **({"ignored_keys": ignored} if ignored else {}),
        "format": FORMAT,
        "written_by": f"neox-bridge {__version__}",
        "source": source_summary(checkpoint),
    }
    if checkpoint.head_choice is not None:
        record["head"] = checkpoint.head_choice
    return record


def _name(checkpoint: Checkpoint) -> str:
    if checkpoint.revision:
        return checkpoint.revision.split("@")[0]
    if checkpoint.neox is not None:
        root = checkpoint.neox.root.rstrip("/").split("/")[-1]
        return root if checkpoint.neox.flat else f"{root}/{checkpoint.neox.step}"
    return checkpoint.path.rstrip("/").split("/")[-1]
