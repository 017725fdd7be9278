"""Writes docs/families.md: ``python -m neox_bridge.architectures.page docs/families.md``."""

import sys
from dataclasses import dataclass
from pathlib import Path

from neox_bridge.architectures import ARCHITECTURES, CANNOT
from neox_bridge.architectures.base import Architecture
from neox_bridge.frameworks.eras import LATER_ERAS
from neox_bridge.frameworks.suites import SUITES

_HEAD = """# Which models can be converted?

`neox-bridge families` prints this table. A model of another family is refused, and so is a setting
that the other side can't express ([what is refused](refused.md)).

This page is generated: `python -m neox_bridge.architectures.page docs/families.md`.
"""
_TAIL = """
Directions: both, for every family, in both layouts and for any tensor-parallel size that divides
the heads, the key-value heads and the MLP; Mamba has one rank only. Eras: those of `--for`. Models
of the family `gpt_neox` can be written for `neox@v1.0` too: the files were compared with those of
v1.0, which was not run with them.

Proof:

- *fixture*: checkpoints that GPT-NeoX itself wrote, converted; transformers computes the logits
  that GPT-NeoX had computed (`tests/test_fixtures.py`, `tests/architectures/test_families.py`).
- *random*: models made by transformers go to GPT-NeoX and back as the same bits, and a reference of
  GPT-NeoX's forward computes transformers' logits from the ranks (`tests/test_roundtrip.py`,
  `tests/architectures/test_families.py`). Of Mamba the bits alone: the reference doesn't cover it,
  and neither does `verify --logits`.
- *GPT-NeoX*: the real one, of each of its eras, loads what was written, strictly, and computes the
  same logits, but for RMSNorm's epsilon before 2025-05-09 (`tests/neox`).

Mamba, fixture and real GPT-NeoX, **without mamba_ssm's kernels**, which want a GPU: around a plain
torch stand-in for its `selective_scan_ref`, and without fusions
(`tests/architectures/test_mamba.py`, `tests/neox`). Checkpoints of `mamba_ssm` itself are read as
well, and `--format mamba_ssm` writes them: its names, its `config.json`, one `pytorch_model.bin`.
What it has no words for (ids of tokens, heads, positions) stays in `neox_bridge.json`, for the way
back. Proof: a stand-in with its names, shapes and arithmetic loads what was written, strictly, and
computes GPT-NeoX's logits to 1e-5; so did its own code (2.3.2), with its references in place of its
kernels (`tests/architectures/test_mamba_ssm.py`).

Every family but Mamba also as

- a reward model: `train_impl: rm` there, `...ForSequenceClassification` with one label here. Models
  with more labels are refused: GPT-NeoX's head scores with one number. Eras: 2024-10 and today.
  Proof: transformers and the real GPT-NeoX compute the same rewards, of checkpoints that either
  wrote (`tests/architectures/test_heads.py`, `tests/neox`).
- one with Transformer Engine's modules, `te_mha` and `te_layernorm_mlp`: `--te` writes them, and
  they are read by their names; `_extra_state` is left out, by name. Era: today. Refused is what
  they don't compute: the exact gelu, silu or mish in a plain MLP, a gated gelu, a sliding window,
  tied norms, and `gpt_j_residual` with more than one rank, whose sum GPT-NeoX then takes twice.
  Proof: **without Transformer Engine**, which wants a GPU. The real GPT-NeoX loads what was written
  strictly, around a stand-in whose names, states, row orders and arithmetic follow Transformer
  Engine's source (1.12, which GPT-NeoX asks for), and computes transformers' logits to 1e-5; what
  it then saves comes back as the same bits (`tests/neox`,
  `tests/layouts/test_transformer_engine.py`).
"""


_HUB = "https://huggingface.co"
_SUITES = """
## Published suites

EleutherAI publishes the files that its trainer wrote, with the optimizer states:
[how to use them](pythia.md). `neox-bridge families` lists these repositories too; others of the
same form work as well. Each step is a branch `stepN`. The number of steps is that of the model
card; where it is empty, look at the branches of the repository.
"""


@dataclass(frozen=True, slots=True)
class FamilyRow:
    """A family for people: models that are of it, eras, how it is proved, what to know."""

    family: str
    hf_class: str
    models: str
    eras: str
    proof: str
    note: str


def _eras(architecture: Architecture) -> str:
    """Those whose trees can hold the family at all."""
    return ", ".join(era.name for era in LATER_ERAS if not architecture.refuse_shape(1, era.name))


def rows() -> list[FamilyRow]:
    """The families that are converted, in the order in which they are tried."""
    return [
        FamilyRow(a.name, a.hf_class, a.about.models, _eras(a), a.about.proof, a.about.note)
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
    lines += [_SUITES, "| GPT-NeoX checkpoints | steps | the same models for transformers |"]
    lines.append("|---|---|---|")
    for suite in SUITES:
        twin = f"[{suite.twin}]({_HUB}/{suite.twin})" if suite.twin else "not known"
        count = suite.checkpoints or ""
        lines.append(f"| [{suite.repo}]({_HUB}/{suite.repo}) | {count} | {twin} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
