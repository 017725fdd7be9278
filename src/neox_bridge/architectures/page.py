"""Writes a page: ``python -m neox_bridge.architectures.page docs/reference/families.md``."""

import sys
from dataclasses import dataclass
from pathlib import Path

from neox_bridge.architectures import ARCHITECTURES, CANNOT
from neox_bridge.architectures.base import Architecture
from neox_bridge.frameworks.eras import LATER_ERAS
from neox_bridge.frameworks.suites import SUITES

_HEAD = """# Which models can be converted?

```console
$ neox-bridge families
```

The command prints this table. Between Hugging Face and GPT-NeoX only these families are converted,
and a setting that the other side cannot express is refused ([what is refused](refused.md)). Between
layouts of GPT-NeoX [every model that GPT-NeoX trains](#models-that-only-gpt-neox-has) is converted.
"""
_TAIL = """
Every family is converted in both directions, in both layouts, and for any tensor-parallel size that
divides the heads, the key-value heads and the MLP. Mamba has one rank only. The versions are those
of [`--for`](../how-to/convert.md#convert-for-your-version-of-gpt-neox). Models of the family
`gpt_neox` can be written for `neox@v1.0` too: the files were compared with those of v1.0, which was
not run with them.

## Proof

- *fixture*: checkpoints that GPT-NeoX itself wrote were converted. transformers computes the logits
  that GPT-NeoX had computed.
- *random*: models made by transformers go to GPT-NeoX and back as the same bits, and a reference
  implementation of GPT-NeoX's forward pass computes transformers' logits from the ranks. For Mamba
  this holds for the bits only: neither the reference nor `verify --logits` covers it.
- *GPT-NeoX*: the real GPT-NeoX of each of these versions loads what was written, strictly, and
  computes the same logits, except for the epsilon of RMSNorm before 2025-05-09.

## Mamba

Mamba was tested **without mamba_ssm's kernels**, which need a GPU. In the fixture and in the real
GPT-NeoX a plain torch stand-in replaced `selective_scan_ref`, without fusions.

Checkpoints of `mamba_ssm` itself are read too, and `--format mamba_ssm` writes them: its names, its
`config.json`, one `pytorch_model.bin`. What that format has no place for (ids of tokens, heads,
positions) stays in `neox_bridge.json`, for the way back. Proof: a stand-in with the same names,
shapes and arithmetic loads what was written, strictly, and computes GPT-NeoX's logits to 1e-5. So
did mamba_ssm's own code (2.3.2), with its references in place of its kernels.

## Reward models and Transformer Engine

Every family except Mamba is also converted as

- a reward model: `train_impl: rm` in GPT-NeoX, `...ForSequenceClassification` with one label in
  transformers. Models with more labels are refused, because GPT-NeoX's head scores with one number.
  Versions: 2024-10 and today. Proof: transformers and the real GPT-NeoX compute the same rewards
  from checkpoints that either wrote.
- a model with Transformer Engine's modules, `te_mha` and `te_layernorm_mlp`, except for `olmo`,
  `stablelm` and families with learned positions. `--te` writes them,
  and they are read by their names. `_extra_state` is left out and listed. Version: today. What
  these modules do not compute is refused: the exact gelu, silu or mish in a plain MLP, a gated
  gelu, a sliding window, tied norms, and `gpt_j_residual` with more than one rank, whose sum
  GPT-NeoX then takes twice. Proof, **without Transformer Engine**, which needs a GPU: the real
  GPT-NeoX loads what was written strictly, around a stand-in whose names, states, row orders and
  arithmetic follow Transformer Engine's source (1.12, which GPT-NeoX requires), and computes
  transformers' logits to 1e-5. What it then saves comes back as the same bits. `reshard` takes runs
  with both modules to other ranks and ZeRO stages, but not to universal checkpoints or to
  GPT-NeoX's own modules, because weight decay applies to other parameters there.
"""

# features of a model, their settings, and the kind of proof; the mixes are those of tests/neox
_NEOX_ONLY = (
    ("RMSNorm or norms without parameters with a plain MLP, scalenorm", "norm", "GPT-NeoX"),
    ("LayerNorm with a gated MLP that has biases", "activation", "GPT-NeoX"),
    ("every activation, plain or gated", "activation, mlp_type", "GPT-NeoX"),
    (
        "parallel residual with a gated MLP, partial rotary with RMSNorm",
        "gpt_j_residual, rotary_pct",
        "GPT-NeoX",
    ),
    ("grouped queries with any MLP", "num_kv_heads", "GPT-NeoX"),
    ("learned positions in parallel blocks or with RMSNorm", "pos_emb", "GPT-NeoX"),
    ("sinusoidal and relative positions, ALiBi", "pos_emb", "GPT-NeoX"),
    ("norms on q and k", "use_qk_layernorm", "GPT-NeoX"),
    ("sparse attention, muP", "attention_config, use_mup", "files"),
    ("mixture of experts", "moe_num_experts", "files"),
    ("RWKV blocks, alone or with attention", "attention_config", "files"),
    ("Mamba or gMLP blocks with attention", "attention_config", "files"),
)
_NEOX_ONLY_HEAD = """
## Models that only GPT-NeoX has

transformers has no class for many models that GPT-NeoX trains. They move between layouts of
GPT-NeoX and between its versions: `convert --to neox`, `reshard`, `export-optimizer`, `verify`,
`diff`, `inspect`, `audit` and `doctor --for` work for them. The rules are those by which GPT-NeoX
splits its own layers over tensor-parallel ranks. A tensor that no rule covers is refused by name.

| model | keys | proof |
|---|---|---|
"""
_NEOX_ONLY_TAIL = """
*GPT-NeoX*: the real GPT-NeoX wrote such a checkpoint (46 mixes in trees of four dates, on 1 to 4
ranks). It loads each converted layout strictly and computes the same logits, to 2e-6 of the
largest (`make test-neox`). *files*: each shard is compared with one that a test cuts by hand. Those
blocks need CUDA kernels, which were not run.

Some models depend on the number of tensor-parallel ranks, so they keep it: norms on q and k with
`norm: layernorm` or `scalenorm`, Mamba blocks, gMLP blocks. Relative positions are one parameter of
all blocks of a pipeline stage. If the stages have trained different ones, the number of stages
stays; with the optimizer states it always stays.
"""

_EXAMINED = """
GPT-NeoX has the parts of these, but this version does not convert them. Their classes in
transformers 5.24 were compared with the source of GPT-NeoX:
"""
# the work that a conversion of each would need
NOT_YET = {
    "falcon": "biases of zeros would be added; ALiBi is rounded to bfloat16 and scaled there",
    "mpt": "biases of zeros would be added to layers and norms; ALiBi",
}

_HUB = "https://huggingface.co"
_SUITES = """
## Published suites

EleutherAI publishes the files that its trainer wrote, with the optimizer states
([how to use them](../how-to/pythia.md)). `neox-bridge families` lists these repositories too.
Others in the same format work as well. Each step is a branch `stepN`. The number of steps is that
of the model card. If it is empty, look at the branches of the repository.
"""
_NEXT = "\nNext: [what is refused](refused.md)."


@dataclass(frozen=True, slots=True)
class FamilyRow:
    """A family as shown to users: its models, eras, proof and limitations."""

    family: str
    hf_class: str
    models: str
    eras: str
    proof: str
    note: str


def _eras(architecture: Architecture) -> str:
    """The eras whose trees support the family with one tensor-parallel rank."""
    return ", ".join(era.name for era in LATER_ERAS if not architecture.refuse_shape(1, era.name))


def rows() -> list[FamilyRow]:
    """The families that are converted, in the order in which they are matched."""
    return [
        FamilyRow(a.name, a.hf_class, a.about.models, _eras(a), a.about.proof, a.about.note)
        for a in ARCHITECTURES
    ]


def page() -> str:
    """The text of the page, generated from the tables."""
    lines = [
        _HEAD,
        "| family | class | models | versions | proof | notes |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{row.family}` | `{row.hf_class}` | {row.models} | {row.eras} | {row.proof} | "
        f"{row.note} |"
        for row in rows()
    ]
    lines.append(_TAIL + _NEOX_ONLY_HEAD.rstrip("\n"))
    lines += [
        f"| {model} | {', '.join(f'`{key}`' for key in keys.split(', '))} | {proof} |"
        for model, keys, proof in _NEOX_ONLY
    ]
    lines += [_NEOX_ONLY_TAIL, "## Not convertible", "", "No GPT-NeoX can run these:", ""]
    lines += [f"- `{name}`: {reason}" for name, reason in CANNOT.items()]
    lines += [_EXAMINED, *(f"- `{name}`: {what}" for name, what in NOT_YET.items())]
    lines += [_SUITES, "| GPT-NeoX checkpoints | steps | the same models for transformers |"]
    lines.append("|---|---|---|")
    for suite in SUITES:
        twin = f"[{suite.twin}]({_HUB}/{suite.twin})" if suite.twin else "not known"
        count = suite.checkpoints or ""
        lines.append(f"| [{suite.repo}]({_HUB}/{suite.repo}) | {count} | {twin} |")
    return "\n".join([*lines, _NEXT]) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
