"""Writes docs/families.md: ``python -m neox_bridge.architectures.page docs/families.md``."""

import sys
from dataclasses import dataclass
from pathlib import Path

from neox_bridge.architectures import ARCHITECTURES, CANNOT
from neox_bridge.layouts.eras import ERAS

_HEAD = """# Which models can be converted?

`neox-bridge families` prints this table. A model of another family is refused, and so is a setting
that the other side can't express ([what is refused](refused.md)).

This page is generated: `python -m neox_bridge.architectures.page docs/families.md`.
"""
_TAIL = """
Directions: both, for every family, in both layouts and for any tensor-parallel size that divides
the heads, the key-value heads and the MLP. Eras: those of `--for`.

Proof:

- *fixture*: checkpoints that GPT-NeoX itself wrote, converted; transformers computes the logits
  that GPT-NeoX had computed (`tests/test_fixtures.py`, `tests/test_families.py`).
- *random*: models made by transformers go to GPT-NeoX and back as the same bits, and a reference of
  GPT-NeoX's forward computes transformers' logits from the ranks (`tests/test_roundtrip.py`,
  `tests/test_families.py`).
- *GPT-NeoX*: the real one, of all four eras, loads what was written, strictly, and computes the
  same logits, but for RMSNorm's epsilon before 4c9f1081 (`tests/neox`).
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A family for people: models that are of it, eras, how it is proved, what to know."""

    family: str
    hf_class: str
    models: str
    eras: str
    proof: str
    note: str


_ALL = ", ".join(era.name for era in ERAS)


def rows() -> list[Row]:
    """The families that are converted, in the order in which they are tried."""
    return [
        Row(a.name, a.hf_class, a.about.models, _ALL, a.about.proof, a.about.note)
        for a in ARCHITECTURES
    ]


def page() -> str:
    """The page, from the tables alone."""
    lines = [
        _HEAD,
        "| family | class | models | eras | proof | to know |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{row.family}` | `{row.hf_class}` | {row.models} | {row.eras} | {row.proof} | "
        f"{row.note} |"
        for row in rows()
    ]
    lines += [_TAIL, "Not convertible, since no GPT-NeoX can run them:", ""]
    lines += [f"- `{name}`: {reason}" for name, reason in CANNOT.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
