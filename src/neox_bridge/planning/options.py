"""What a user asks of a conversion, as data."""

from dataclasses import dataclass, fields
from os.path import basename
from typing import Literal

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
    """None means: as the source has it, where it is a GPT-NeoX checkpoint, else the default.

    to: the kind to write; by default the other one than the source's.
    Some apply to targets of one kind only: see ``SIDES``.
    pp: pipeline stages; 0 is the same as the layout "ranks".
    vocab_multiple: make_vocab_size_divisible_by.
    vocab_rows: "keep" leaves out padding that a conversion added, "all" nothing; "tokenizer" cuts
        the rows that no entry of the tokenizer has; a number keeps as many of the first rows.
    shard_size: bytes of a Hugging Face shard at most, unless one tensor is larger.
    shards: "clone" puts into each Hugging Face shard what can share blocks with the source's files.
    tokenizer: a folder with tokenizer files, or a tokenizer.json.
    gqa_order: how the GPT-NeoX side has the rows of grouped-query attention: the source where it is
        one (the target's order is then its era's), else the target.
    te: Transformer Engine's names, for GPT-NeoX targets.
    format: whose form a Hugging Face target has: "transformers", or another library's by the name
        that its ``Form`` has. It makes the target Hugging Face's.
    optimizer: "fresh" adds one to a GPT-NeoX target, so that a run goes on without ``finetune``.
    dp: the data-parallel ranks that it is for.
    ignore_keys: unknown settings of the source that do not stop the conversion, by their names.
    iteration: the step of a GPT-NeoX target, in place of the source's.
    head: for a tied source whose files hold an output head that differs from the embeddings:
        "keep" writes an untied model with both, "tie" leaves the head out.
    """

    to: Kind | None = None
    dtype: DTypeChoice = "keep"
    tp: int | None = None
    pp: int | None = None
    layout: LayoutName | None = None
    inv_freq: InvFreq | None = None
    mlp_names: MlpNames | None = None
    era: Era | None = None
    row_bias: RowBias = "whole"
    vocab_multiple: int | None = None
    vocab_rows: VocabRows = "keep"
    shard_size: int = SHARD_SIZE
    shards: Shards = "size"
    tokenizer: str | None = None
    gqa_order: GqaOrder | None = None
    te: bool | None = None
    format: str | None = None
    optimizer: Literal["none", "fresh"] = "none"
    dp: int = 1
    iteration: int | None = None
    head: HeadChoice | None = None
    ignore_keys: tuple[str, ...] = ()

    def asked(self) -> dict[str, object]:
        """What isn't the default, in plain words, without paths of the machine."""
        chosen = {
            field.name: value
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
        }
        if self.era is not None:
            chosen["era"] = self.era.name
        if self.tokenizer is not None:
            chosen["tokenizer"] = basename(self.tokenizer.rstrip("/"))
        return chosen


# the options that apply to targets of one kind only
SIDES: dict[str, Kind] = {
    "tp": "neox",
    "pp": "neox",
    "layout": "neox",
    "inv_freq": "neox",
    "mlp_names": "neox",
    "era": "neox",
    "row_bias": "neox",
    "vocab_multiple": "neox",
    "te": "neox",
    "optimizer": "neox",
    "dp": "neox",
    "iteration": "neox",
    "shard_size": "hf",
    "shards": "hf",
    "format": "hf",
}
