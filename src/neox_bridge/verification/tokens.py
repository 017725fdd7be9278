"""The tokens for ``verify --logits``: generated, from a file, or from text."""

import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neox_bridge.errors import BridgeError
from neox_bridge.extras import missing
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.tokenizer import main_file

_SHAPE = (2, 64)


@dataclass(frozen=True)
class TokenInput:
    """tokens: int64 [b, s]. recorded: float32 [b, s, v] logits that came with them, or None."""

    tokens: Tensor
    recorded: Tensor | None = None


def read_tokens(given: str | None, checkpoints: tuple[Checkpoint, ...]) -> TokenInput:
    """The tokens of ``--tokens``.

    given: None (random tokens, always the same); a file: .npy, .npz with `tokens` and optionally
    the `logits` that a framework computed from them, .json with a list of numbers, or any text; or
    the text itself, for the tokenizer of one of the checkpoints. Raises BridgeError for unreadable
    files, ids outside the vocabulary, and rows that are too long.
    """
    rows = min(checkpoint.vocab_rows for checkpoint in checkpoints)
    sizes = [c.tokenizer_size for c in checkpoints if c.tokenizer_size is not None]
    return tokens_within(
        given,
        rows=rows,
        positions=min(checkpoint.config.max_positions for checkpoint in checkpoints),
        tokenizers=tuple(checkpoint.tokenizer for checkpoint in checkpoints),
        generated_rows=min([rows, *sizes]),
    )


def tokens_within(
    given: str | None,
    *,
    rows: int,
    positions: int,
    tokenizers: tuple[tuple[str, ...], ...],
    generated_rows: int | None = None,
    special: frozenset[int] = frozenset(),
) -> TokenInput:
    """``read_tokens`` for models with these limits.

    Args:
        given: See ``read_tokens``.
        rows: The number of ids.
        positions: The largest number of tokens in a row.
        tokenizers: The tokenizer files of each model.
        generated_rows: The number of ids in generated tokens, if it is smaller.
        special: Ids that generated tokens do not contain.

    Raises:
        BridgeError: As of ``read_tokens``.
    """
    if given is None:
        shape = (_SHAPE[0], min(_SHAPE[1], positions))
        numbers = np.random.default_rng(0).integers(0, generated_rows or rows, shape)
        ordinary = next((number for number in range(rows) if number not in special), 0)
        numbers[np.isin(numbers, sorted(special))] = ordinary
        return TokenInput(torch.from_numpy(numbers))
    is_file = os.path.isfile(given)
    read = _of_file(given, tokenizers) if is_file else _of_text(given, tokenizers)
    tokens = read.tokens
    if tokens.numel() == 0 or tokens.dim() != 2:
        raise BridgeError(
            f"`tokens=`: token ids have the shape [rows, tokens], but these have "
            f"{list(tokens.shape)}. Give at least one row of at least one token."
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= rows:
        raise BridgeError(
            f"`tokens=`: the ids go from {int(tokens.min())} to {int(tokens.max())}, but the "
            f"vocabulary has the ids 0 to {rows - 1}."
        )
    if tokens.shape[1] > positions:
        raise BridgeError(
            f"`tokens=`: a row has {tokens.shape[1]} tokens, but the model has {positions} "
            "positions. Use shorter rows."
        )
    return read


def _of_file(path: str, tokenizers: tuple[tuple[str, ...], ...]) -> TokenInput:
    kind = os.path.splitext(path)[1]
    try:
        if kind == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                recorded = torch.from_numpy(arrays["logits"]) if "logits" in arrays else None
                return TokenInput(
                    _rows(arrays["tokens"]), None if recorded is None else recorded.float()
                )
        if kind == ".npy":
            return TokenInput(_rows(np.load(path, allow_pickle=False)))
        with open(path, encoding="utf-8") as file:
            text = file.read()
        if kind == ".json":
            return TokenInput(_rows(np.array(json.loads(text))))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BridgeError(f"`tokens={path}`: cannot be read as token ids: {error}.") from None
    return _of_text(text, tokenizers)


def _rows(array: np.ndarray[Any, Any]) -> Tensor:
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"they are {array.dtype}, not integers")
    tokens = torch.from_numpy(array.astype(np.int64))
    return tokens[None] if tokens.dim() == 1 else tokens


def _of_text(text: str, tokenizers: tuple[tuple[str, ...], ...]) -> TokenInput:
    files = [main_file(tokenizer) for tokenizer in tokenizers]
    file = next((file for file in files if file), None)
    if file is None:
        raise BridgeError(
            "`tokens=`: neither checkpoint contains a tokenizer.json to encode this text (and no "
            "file of this name exists). Use a file of token ids."
        )
    try:
        from tokenizers import Tokenizer  # comes with transformers
    except ImportError:
        what = "`tokens=`: a text needs the package tokenizers, which is missing"
        raise missing(what, "verify") from None
    ids = Tokenizer.from_file(file).encode(text).ids
    return TokenInput(torch.tensor([ids], dtype=torch.int64))
