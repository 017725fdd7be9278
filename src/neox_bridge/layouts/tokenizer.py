"""Tokenizer files: found, measured, and where the other side looks for them."""

import os
from collections.abc import Sequence

from neox_bridge.errors import BridgeError
from neox_bridge.layouts.text_files import read_json

NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def tokenizer_files(folder: str) -> tuple[str, ...]:
    """The tokenizer files that lie in a folder."""
    paths = (os.path.join(folder, name) for name in NAMES)
    return tuple(path for path in paths if os.path.isfile(path))


def tokenizer_at(path: str) -> tuple[str, ...]:
    """The tokenizer files of ``--tokenizer PATH``, a folder or a tokenizer.json of any name."""
    if os.path.isdir(path):
        found = tokenizer_files(path)
        if not any(os.path.basename(file) == "tokenizer.json" for file in found):
            raise BridgeError(f"--tokenizer {path}: no tokenizer.json in this folder.")
        return found
    if not os.path.isfile(path):
        raise BridgeError(f"--tokenizer {path}: no such file or folder.")
    if "model" not in read_json(path):
        raise BridgeError(f"--tokenizer {path}: not a tokenizer.json (it has no model).")
    return (path,)


def main_file(files: Sequence[str]) -> str | None:
    """The file that says everything: tokenizer.json, or the only file given."""
    for file in files:
        if os.path.basename(file) == "tokenizer.json":
            return file
    jsons = [file for file in files if os.path.basename(file) not in NAMES]
    return jsons[0] if jsons else None


def tokenizer_size(files: Sequence[str]) -> int | None:
    """How many entries a tokenizer has, added ones too: what GPT-NeoX pads (get_vocab_size())."""
    file = main_file(files)
    if file is None:
        return None
    data = read_json(file)
    try:
        vocab = data["model"]["vocab"]
        names = {entry[0] for entry in vocab} if isinstance(vocab, list) else set(vocab)
        names |= {token["content"] for token in data.get("added_tokens") or ()}
    except (KeyError, TypeError, IndexError):
        raise BridgeError(f"{file} isn't a tokenizer.json: no vocabulary in it.") from None
    return len(names)
