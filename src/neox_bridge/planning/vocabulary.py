"""How many rows the embeddings get: GPT-NeoX pads them, and refuses another number than its own.

At start it computes ``ceil(V / (m * TP)) * m * TP`` from the tokenizer's size V, the setting
make_vocab_size_divisible_by m and the tensor-parallel size (megatron/tokenizer/tokenizer.py,
_vocab_size_with_padding), and compares the result with the checkpoint's args.
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
    """rows: kept of the source. padded: rows of the target. multiple: make_vocab_size_divisible_by.

    size: what stands for the tokenizer's number of entries; None if it isn't known.
    """

    rows: int
    padded: int
    multiple: int
    size: int | None


def padded_size(size: int, multiple: int, tp: int) -> int:
    """The rows that GPT-NeoX computes for a tokenizer of ``size`` entries."""
    return round_up(size, multiple * tp)


def told_multiple(*settings: Mapping[str, Any]) -> int:
    """make_vocab_size_divisible_by, from the first of args and yml that says it."""
    values = (one.get("make_vocab_size_divisible_by") for one in settings)
    return int(next(filter(None, values), FIRST_MULTIPLE))


def fit(rows: int, size: int, tp: int, multiple: int | None, *, known: bool = True) -> Vocabulary:
    """A multiple with which GPT-NeoX computes as many rows as the model has.

    128, doubled or, if the tokenizer's size is known, halved as often as needed; else the one whose
    step holds all rows. Where tp does not divide the rows there is none: then 128, doubled as often
    as needed, leaves room for every row.

    multiple: the one to take instead. Raises Refused if it would leave rows out.
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
    """For a GPT-NeoX source whose tokenizer isn't known: right for whatever size it has.

    The step m * TP stays where the new TP divides it, so that GPT-NeoX computes what it did; else
    one step holds all rows.
    """
    step = multiple * tp
    if step % new_tp == 0 and rows % step == 0:
        return Vocabulary(rows, rows, step // new_tp, None)
    padded = round_up(rows, new_tp)
    return Vocabulary(rows, padded, padded // new_tp, None)
