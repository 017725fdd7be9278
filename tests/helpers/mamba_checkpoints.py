"""Mamba checkpoints: the genuine one, configs that transformers allows, and edits."""

import json
from pathlib import Path
from typing import Any

import yaml
from common import (
    neox_config,
    step_of,
)

GENUINE = Path(__file__).parents[1] / "data" / "mamba" / "checkpoints"  # the real GPT-NeoX's
# the last: an inner width of three times the hidden size
CASES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False, "use_conv_bias": False},
    {"expand": 3, "layer_norm_epsilon": 1e-6, "hidden_size": 48},
]


def edit(path: Path, **changes: Any) -> None:
    """Keys of a config.json, or of a folder's merged yml, set or with None removed."""
    if path.is_file():
        told = json.loads(path.read_text())
    else:
        told = neox_config(path)
        for file in (step_of(path) / "configs").iterdir():
            file.unlink()
        path = step_of(path) / "configs" / "all.yml"
    told = {key: value for key, value in {**told, **changes}.items() if value is not None}
    path.write_text(json.dumps(told) if path.suffix == ".json" else yaml.safe_dump(told))
