"""Computes the number of rows of the embeddings, which GPT-NeoX pads.

At start, GPT-NeoX computes ``ceil(V / (m * TP)) * m * TP`` from the tokenizer size V, the setting
make_vocab_size_divisible_by m and the tensor-parallel size (megatron/tokenizer/tokenizer.py,
_vocab_size_with_padding). It refuses a checkpoint whose args have another number.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neox_bridge.architectures.neox_config import round_up
from neox_bridge.errors import Refused

FIRST_MULTIPLE = 128  # GPT-NeoX's default
_DOUBLED = tuple(FIRST_MULTIPLE << n for n in range(1, 16))
_SMALLER = (64, 32, 16, 8)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The vocabulary of a target.

    Attributes:
        rows: The rows that are kept from the source.
        padded: The rows of the target.
        multiple: make_vocab_size_divisible_by.
        size: The number of tokenizer entries that was assumed; None if unknown.
    """

    rows: int
    padded: int
    multiple: int
    size: int | None


def padded_size(size: int, multiple: int, tp: int) -> int:
    """The rows that GPT-NeoX computes for a tokenizer with ``size`` entries."""
    return round_up(size, multiple * tp)


def padding_multiple(*settings: Mapping[str, Any]) -> int:
    """make_vocab_size_divisible_by of the first settings that contain it."""
    values = (one.get("make_vocab_size_divisible_by") for one in settings)
    return int(next(filter(None, values), FIRST_MULTIPLE))


def fit(rows: int, size: int, tp: int, multiple: int | None, *, known: bool = True) -> Vocabulary:
    """Choose a multiple with which GPT-NeoX computes as many rows as the model has.

    The candidates are 128, then 128 doubled or, if the tokenizer size is known, halved several
    times, then the multiple of which one step holds all rows. If tp does not divide the rows, none
    fits. Then 128 is doubled until there is room for every row.

    Args:
        rows: The rows that the target must keep.
        size: The entries of the tokenizer, or the best guess.
        tp: The tensor-parallel ranks.
        multiple: The multiple that the user chose.
        known: Whether ``size`` is known.

    Raises:
        Refused: The chosen multiple would leave rows out.
    """
    usual = (FIRST_MULTIPLE, *_DOUBLED, *_SMALLER) if known else (FIRST_MULTIPLE,)
    exact = (*usual, max(1, rows // tp))
    keeping = (m for m in exact if padded_size(size, m, tp) == rows)
    chosen = multiple or next(keeping, FIRST_MULTIPLE)
    while padded_size(size, chosen, tp) < rows:
        if multiple is not None:
            raise Refused(
                f"`vocab_multiple={multiple}`: GPT-NeoX would use "
                f"{padded_size(size, multiple, tp)} rows for {size} entries at TP {tp}, but the "
                f"source has {rows}. Leave the option out, or cut the rows without a tokenizer "
                "entry with `vocab_rows=tokenizer`."
            )
        chosen *= 2
    return Vocabulary(rows, padded_size(size, chosen, tp), chosen, size)


def keep(rows: int, multiple: int, tp: int, new_tp: int) -> Vocabulary:
    """The vocabulary for a GPT-NeoX source with an unknown tokenizer, correct for any size of it.

    If the new TP divides the step m * TP, the step stays, so GPT-NeoX computes the same rows as
    before. Otherwise one step holds all rows.
    """
    step = multiple * tp
    if step % new_tp == 0 and rows % step == 0:
        return Vocabulary(rows, rows, step // new_tp, None)
    padded = round_up(rows, new_tp)
    return Vocabulary(rows, padded, padded // new_tp, None)
