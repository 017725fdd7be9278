"""Finds tokenizer files, and describes where the target needs them."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.formats.file_kinds import HEAD_BYTES, refuse_misplaced
from neox_bridge.layouts.linked_files import brought_along
from neox_bridge.layouts.text_files import LARGE_BYTES, read_bytes, read_json
from neox_bridge.stores import paths
from neox_bridge.stores.paths import open_file

MAIN = "tokenizer.json"  # contains the whole tokenizer
PIECES = "tokenizer.model"  # of sentencepiece, or of tiktoken
NAMES = (
    MAIN,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    PIECES,
    "chat_template.jinja",
)
FOLDER = "tokenizer"  # in the root of a GPT-NeoX run that neox-bridge wrote
_MODEL = re.compile(r"[\w-][\w.-]*/[\w.-]+")
END_OF_TEXT = "<|endoftext|>"  # GPT-NeoX's end of a document (megatron/tokenizer/tokenizer.py)


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The files of a tokenizer by their names in the target.

    Attributes:
        files: The name in the target, the absolute path and the bytes of each file.
        generated: The name and the content of each generated file.
        size: The number of entries, including added ones; None if unknown.
        end_of_text: The id of END_OF_TEXT.
        main: The name in the target of the file with the whole tokenizer.
    """

    files: tuple[tuple[str, str, int], ...] = ()
    generated: tuple[tuple[str, bytes], ...] = ()
    size: int | None = None
    end_of_text: int | None = None
    main: str | None = None


def tokenizer_files(folder: str, root: str | None = None) -> tuple[str, ...]:
    """The tokenizer files in a folder, or in the root of the checkpoint (default: the folder).

    They are copied unchanged. Raises BridgeError for what is not a file or leads out of the folder.
    """
    places = [os.path.join(folder, name) for name in NAMES]
    files = tuple(path for path in places if brought_along(path, root or folder))
    for path in files:
        with open_file(path) as file:
            refuse_misplaced(path, file.read(HEAD_BYTES))
    return files


def tokenizer_at(path: str) -> tuple[str, ...]:
    """The tokenizer files of ``--tokenizer PATH``: a folder, or a tokenizer.json of any name.

    ``org/name`` is a model on the Hub if there is no such path.
    """
    path = paths.plain(path)
    if paths.isdir(path):
        files = tokenizer_files(path)
        if not any(os.path.basename(file) == MAIN for file in files):
            raise BridgeError(f"`tokenizer={path}`: this folder contains no tokenizer.json.")
        return files
    if not paths.isfile(path):
        if _MODEL.fullmatch(path):
            from neox_bridge.layouts.hub_tokenizer import published_tokenizer

            return published_tokenizer(path)
        raise BridgeError(f"`tokenizer={path}`: no such file or folder.")
    if "model" not in _read(path):
        raise BridgeError(f"`tokenizer={path}`: not a tokenizer.json (its key model is missing).")
    return (path,)


def main_file(files: Sequence[str]) -> str | None:
    """The file with the whole tokenizer: tokenizer.json, or the only file."""
    for file in files:
        if os.path.basename(file) == MAIN:
            return file
    jsons = [file for file in files if os.path.basename(file) not in NAMES]
    return jsons[0] if jsons else None


def tokenizer_size(files: Sequence[str]) -> int | None:
    """The number of entries, including added ones, which GPT-NeoX pads (get_vocab_size())."""
    return len(_entries(file)) if (file := main_file(files)) else None


def piece_count(files: Sequence[str]) -> int | None:
    """The number of pieces in a sentencepiece model among the files.

    None if there is none, if the file is not complete, or if it is one of tiktoken, which has the
    same name. Tokens in other files are not counted.

    Source: ``repeated SentencePiece pieces = 1`` in sentencepiece's src/sentencepiece_model.proto.
    """
    path = next((file for file in files if os.path.basename(file) == PIECES), None)
    data = b"" if path is None else read_bytes(path, LARGE_BYTES)
    at, count = 0, 0
    while data[at : at + 1] == b"\x0a":  # field 1; the pieces come first
        at, size, shift = at + 1, 0, 0
        for byte in data[at : at + 5]:  # a varint: seven bits per byte, the lowest first
            at, size, shift = at + 1, size | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                break
        at, count = at + size, count + 1
    return count if count and at <= len(data) else None


def describe_tokenizer(files: Sequence[str]) -> Tokenizer:
    """The tokenizer files under the names that both sides use; Tokenizer() if there are none."""
    if not files:
        return Tokenizer()
    main = main_file(files)
    entries = _entries(main) if main else {}
    ends = entries.get(END_OF_TEXT)
    copies = [
        (MAIN if file == main else os.path.basename(file), file, paths.size(file)) for file in files
    ]
    names = {name for name, _, _ in copies}
    generated = []
    if main and "tokenizer_config.json" not in names:
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if ends is not None:
            config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        generated.append(("tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode()))
    count = len(entries) if main else None
    name = MAIN if main else None
    return Tokenizer(tuple(copies), tuple(generated), count, ends, name)


def _read(file: str) -> dict[str, Any]:
    return read_json(file, LARGE_BYTES, depth=None)


def _entries(file: str) -> Mapping[str, int]:
    return tokenizer_entries(_read(file), file)


def tokenizer_entries(content: Mapping[str, Any], file: str) -> Mapping[str, int]:
    """The id of each token of a tokenizer.json. Raises BridgeError if it has no vocabulary."""
    try:
        vocab = content["model"]["vocab"]
        if isinstance(vocab, list):
            vocab = {entry[0]: number for number, entry in enumerate(vocab)}
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
        return {**vocab, **added}
    except (KeyError, TypeError, IndexError, AttributeError):
        raise BridgeError(f"{file} is not a tokenizer.json: it contains no vocabulary.") from None
