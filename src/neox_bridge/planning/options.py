"""The options of a conversion, as data, with their spelling and help on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from os.path import basename
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from neox_bridge.errors import UsageError
from neox_bridge.option import GPT_NEOX, SOURCE, WRITTEN, Option, Side, option, options_of

if TYPE_CHECKING:
    from neox_bridge.frameworks.eras import Era, InvFreq, MlpNames
    from neox_bridge.layouts.checkpoint import HeadChoice, Kind, LayoutName
    from neox_bridge.tensors.fused import GqaOrder

DTypeChoice = Literal["keep", "float32", "float16", "bfloat16"]
RowBias = Literal["whole", "split"]
VocabRows = Literal["keep", "tokenizer", "all"] | int
Shards = Literal["size", "clone"]
SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Options:
    """What a conversion writes.

    Each field is declared here only: its default, what it does, how the command line spells it,
    and the kind of target that it applies to. ``None`` means: as in the source if that is a
    GPT-NeoX checkpoint, otherwise the default.

    Attributes:
        era: The GPT-NeoX that loads the target; on the command line also a version of transformers.
        gqa_order: How the GPT-NeoX side stores the rows of grouped-query attention. With two
            GPT-NeoX sides it describes the source; the era decides for the target.
        tokenizer: A folder with tokenizer files, or a ``tokenizer.json``.
        vocab_rows: ``"keep"`` drops padding that a conversion added, ``"all"`` drops nothing,
            ``"tokenizer"`` drops rows that no entry of the tokenizer has, and a number keeps as
            many of the first rows.
    """

    to: Kind | None = option(
        None,
        "The format to write. Default: the format that SRC does not have. Give neox for a "
        "GPT-NeoX source to change its layout or its GPT-NeoX version.",
        group=WRITTEN,
        common=True,
        choices=("hf", "neox"),
    )
    dtype: DTypeChoice = option(
        "keep",
        "Cast the weights to this dtype. fp32, fp16 and bf16 are accepted too.",
        group=WRITTEN,
        common=True,
        choices=("keep", "float32", "float16", "bfloat16"),
        aliases={"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"},
    )
    tp: int | None = option(
        None,
        "Number of tensor-parallel ranks (model_parallel_size). Default: as in a GPT-NeoX "
        "source, otherwise 1.",
        side="neox",
        common=True,
        minimum=1,
    )
    pp: int | None = option(
        None,
        "Number of pipeline stages (pipe_parallel_size). 0 is the same as --layout ranks. "
        "Default: as in a GPT-NeoX source, otherwise 1.",
        side="neox",
        common=True,
        minimum=0,
    )
    layout: LayoutName | None = option(
        None,
        "How the weights are split into files. layers: one file per layer and rank "
        "(pipe_parallel_size 1 or more); ranks: one file per rank (pipe_parallel_size 0). "
        "Default: as in a GPT-NeoX source, otherwise layers, or ranks for a reward model.",
        side="neox",
        choices=("layers", "ranks"),
    )
    inv_freq: InvFreq | None = option(
        None,
        "Whether to store the rotary buffer inv_freq in the files. Default: as --for needs it; "
        "without --for, as in a GPT-NeoX source, otherwise omit.",
        side="neox",
        choices=("omit", "store"),
    )
    mlp_names: MlpNames | None = option(
        None,
        "Names of the MLP weights. linear: mlp.linear1 (since 2024-09); dense: mlp.dense_h_to_4h, "
        "or w1, w2 and w3 for Llama. Default: as --for needs them; without --for, as in a GPT-NeoX "
        "source, otherwise linear.",
        side="neox",
        choices=("linear", "dense"),
    )
    era: Era | None = option(
        None,
        "The framework that will load the result. A GPT-NeoX source tree, a GPT-NeoX tag, date or "
        "commit (neox@v1.0, neox@2024-03, or only 2024-03), or a transformers version. It decides "
        "the names, buffers and settings. A model that this version does not support is refused. "
        "Default: as in a GPT-NeoX source, otherwise today.",
        "--for",
        side="neox",
        group=WRITTEN,
        common=True,
        value="framework",
    )
    row_bias: RowBias = option(
        "whole",
        "How to store biases that the ranks sum. whole: on rank 0, which is exact; split: an "
        "equal part on each rank.",
        side="neox",
        choices=("whole", "split"),
    )
    vocab_multiple: int | None = option(
        None,
        "make_vocab_size_divisible_by. Default: 128, doubled until every row fits.",
        side="neox",
        minimum=1,
    )
    vocab_rows: VocabRows = option(
        "keep",
        "Rows of the vocabulary to write. keep: all rows except padding that a conversion added; "
        "all: every row; tokenizer: the rows that have an entry in the tokenizer; N: the first N "
        "rows.",
        group=WRITTEN,
        value="rows",
    )
    shard_size: int = option(
        SHARD_SIZE,
        "Maximum size of a safetensors file, such as 500MB, 2GiB or a number of bytes. Default: "
        "5GB.",
        side="hf",
        common=True,
        value="size",
    )
    shards: Shards = option(
        "size",
        "How to distribute tensors over safetensors files. size: by --shard-size; clone: so that "
        "the files share their disk blocks with SRC on XFS and btrfs, which is instant and takes "
        "no extra space.",
        side="hf",
        choices=("size", "clone"),
    )
    tokenizer: str | None = option(
        None,
        "Write this tokenizer instead of the source's. A tokenizer.json, a folder that contains "
        "one, or a Hub model (ORG/NAME).",
        group=WRITTEN,
        common=True,
        value="path",
    )
    gqa_order: GqaOrder | None = option(
        None,
        "Row order of grouped-query attention in the GPT-NeoX checkpoint. grouped since 2024-11, "
        "interleaved before; the files do not say which. If both SRC and DST are GPT-NeoX, it "
        "describes SRC.",
        group=GPT_NEOX,
        choices=("grouped", "interleaved"),
    )
    te: bool | None = option(
        None,
        "Use the weight names of Transformer Engine (te_mha, te_layernorm_mlp). Default: as in "
        "SRC.",
        "--te/--no-te",
        side="neox",
    )
    format: str | None = option(
        None,
        "The library that will load the result. mamba_ssm is for Mamba models only. Default: "
        "transformers.",
        side="hf",
        choices=("transformers", "mamba_ssm"),
    )
    optimizer: Literal["none", "fresh"] = option(
        "none",
        "Optimizer states to write. fresh: master weights that equal the weights, and zero "
        "moments, so that training can continue from a step without finetune.",
        side="neox",
        choices=("none", "fresh"),
    )
    dp: int = option(
        1,
        "Number of data-parallel ranks for --optimizer fresh.",
        side="neox",
        minimum=1,
    )
    iteration: int | None = option(
        None,
        "The training step that DST is saved as. Default: the source's step, otherwise 0.",
        side="neox",
        minimum=0,
    )
    head: HeadChoice | None = option(
        None,
        "What to do if SRC is tied but its files contain an output head that differs from the "
        "embeddings. keep: write both, untied; tie: leave the head out.",
        group=SOURCE,
        choices=("keep", "tie"),
    )
    ignore_keys: tuple[str, ...] = option(
        (),
        "Ignore this unknown key in the source's settings. By default, an unknown key that could "
        "change the model stops the conversion. May be repeated.",
        "--ignore-key",
        group=SOURCE,
        metavar="NAME",
    )

    def non_default(self) -> dict[str, object]:
        """The options that differ from the default, as plain data, without local paths."""
        chosen = {
            entry.name: value
            for entry in fields(self)
            if (value := getattr(self, entry.name)) != entry.default
        }
        if self.era is not None:
            chosen["era"] = self.era.name
        if self.tokenizer is not None:
            chosen["tokenizer"] = basename(self.tokenizer.rstrip("/"))
        return chosen


# the options that apply to one kind of target only
SIDES: dict[str, Side] = {
    name: declared.side for name, declared in options_of(Options).items() if declared.side
}


_Chosen = TypeVar("_Chosen")


def with_choices(options: _Chosen, choices: Mapping[str, Any]) -> _Chosen:
    """Replace some options, given by name and with the values that a user writes.

    Aliases and version names are accepted, such as ``dtype="bf16"`` and ``era="neox@2024-03"``.

    Raises:
        TypeError: There is no such field.
        UsageError: The value is not valid for the field.
    """
    declared = options_of(type(options))
    values = {}
    for name, value in choices.items():
        if name not in declared:
            raise TypeError(f"there is no option {name!r}; there are: {', '.join(declared)}")
        values[name] = _value(name, declared[name], value)
    return replace(options, **values)  # type: ignore[type-var]


def _value(name: str, declared: Option, value: Any) -> Any:
    if isinstance(value, str):
        value = declared.aliases.get(value, value)
        if declared.value in ("framework", "neox version"):
            from neox_bridge.frameworks.eras import era_named

            return era_named(value)
    if declared.choices and value is not None and value not in declared.choices:
        raise UsageError([name], f"{value!r} is not one of {', '.join(declared.choices)}")
    check_minimum(name, declared, value)
    return value


def check_minimum(name: str, declared: Option, value: object) -> None:
    """Raise UsageError if an option with a minimum is not a number or is too small."""
    if declared.minimum is None or value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError([name], f"must be a number, not {value!r}")
    if not value >= declared.minimum:  # also true for NaN
        raise UsageError([name], f"must be {declared.minimum} or more, not {value!r}")
