"""Changes to checkpoints: keys of their settings, and a tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def tokenizer(path: Path, entries: int = 290) -> Path:
    """A tokenizer.json of words t1, t2, …, whose first entry ends a text."""
    vocabulary = {"<|endoftext|>": 0, **{f"t{i}": i for i in range(1, entries)}}
    added = {"id": 0, "content": "<|endoftext|>", "special": True, "normalized": False}
    added |= {"single_word": False, "lstrip": False, "rstrip": False}
    value: dict[str, Any] = dict.fromkeys(("truncation", "padding", "normalizer", "decoder"))
    value |= {"version": "1.0", "post_processor": None, "added_tokens": [added]}
    value["pre_tokenizer"] = {"type": "Whitespace"}
    value["model"] = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<|endoftext|>"}
    path.write_text(json.dumps(value))
    return path


def edit_yml(**changes: Any) -> Callable[[Path], None]:
    """Change keys where they stand; yml files are refused a key that stands in two."""

    def edit(step: Path) -> None:
        left = dict(changes)
        for path in sorted((step / "configs").glob("*.yml")):
            loaded = yaml.safe_load(path.read_text())
            for key in loaded:
                if key.replace("-", "_") in left:
                    loaded[key] = left.pop(key.replace("-", "_"))
            path.write_text(json.dumps(loaded))
        (step / "configs" / "zz.yml").write_text(json.dumps(left))

    return edit


def set_keys(step: Path, **settings: Any) -> None:
    """Add keys that no yml of the step has yet."""
    name = "_".join(settings)
    (step / "configs" / f"zz_{name}.yml").write_text(json.dumps(settings))
