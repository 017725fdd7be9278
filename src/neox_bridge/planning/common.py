"""Shared by both planners: casts, vocabulary rows, small files, the tokenizer, biases."""

import os
from collections.abc import Mapping
from dataclasses import replace

from neox_bridge.architectures.base import Architecture, ModelConfig
from neox_bridge.architectures.rows import model_rows
from neox_bridge.errors import UsageError
from neox_bridge.findings import Dropped
from neox_bridge.layouts.carried_names import GENERATION, MOST_BYTES
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.rank_biases import drifted_biases, row_bias_names
from neox_bridge.layouts.text_files import dump_json, read_bytes
from neox_bridge.layouts.tokenizer import Tokenizer
from neox_bridge.planning.options import DTypeChoice, Options
from neox_bridge.planning.plan import Plan
from neox_bridge.stores.paths import size
from neox_bridge.tensors.dtypes import FLOAT8, FLOATING
from neox_bridge.tensors.geometry import with_rows
from neox_bridge.tensors.pieces import OutputFile, Whole


def cast(whole: Whole, dtype: DTypeChoice) -> Whole:
    """Cast a tensor to another floating dtype. Integers are not changed."""
    if dtype == "keep" or whole.dtype not in (*FLOATING, *FLOAT8):
        return whole
    return replace(whole, dtype=dtype)


def with_vocabulary_rows(
    architecture: Architecture,
    config: ModelConfig,
    wholes: Mapping[str, Whole],
    count: int | None = None,
) -> dict[str, Whole]:
    """Give the weights of a model another number of vocabulary rows. Added rows are zeros.

    Tensors that the config does not have are left out, and so are buffers that ``wholes`` does not
    have.

    Args:
        architecture: The family of the model.
        config: The settings of the model.
        wholes: The weights by Hugging Face name.
        count: The number of rows; by default that of the config.
    """
    rows = config.dims["vocab"] if count is None else count
    return {
        row.hf: with_rows(wholes[row.hf], rows) if row.weight.split == "vocab" else wholes[row.hf]
        for row in model_rows(architecture, config)
        if row.weight.trained or row.hf in wholes
    }


def cut_rows(
    rows: int, end: int, options: Options, tokenizer: Tokenizer
) -> tuple[int, list[Dropped]]:
    """The rows that ``--vocab-rows`` keeps of ``rows``, and what is dropped of those up to ``end``.

    Raises UsageError for more rows than the source has.
    """
    size = tokenizer.size
    if isinstance(options.vocab_rows, int):
        if not 0 < options.vocab_rows <= end:
            raise UsageError(
                ["vocab_rows"],
                f"the source has {end} rows, so {options.vocab_rows} of them cannot be kept",
                f"Use 1 to {end}.",
            )
        if options.vocab_rows == end:
            return end, []
        why = f"cut by `vocab_rows={options.vocab_rows}`"
        return options.vocab_rows, [
            Dropped(f"vocabulary rows {options.vocab_rows} to {end - 1}", why)
        ]
    if options.vocab_rows != "tokenizer" or size is None or size >= rows:
        return rows, []
    why = "the tokenizer has no entries for them (`vocab_rows=tokenizer`)"
    return size, [Dropped(f"vocabulary rows {size} to {end - 1}", why)]


def text_file(path: str, data: bytes, *, seals: bool = False) -> OutputFile:
    """A small file whose bytes are in the plan."""
    return OutputFile(path, len(data), ((0, data),), seals=seals)


def tokenizer_outputs(tokenizer: Tokenizer, folder: str = "") -> list[OutputFile]:
    """The files of the tokenizer in ``folder`` (with a slash)."""
    copies = [OutputFile(folder + n, size, copy_of=p) for n, p, size in tokenizer.files]
    return copies + [text_file(folder + name, data) for name, data in tokenizer.generated]


def carried_outputs(checkpoint: Checkpoint, folder: str = "") -> list[OutputFile]:
    """The small text files of the source, such as its license, in ``folder`` (with a slash).

    A generation_config.json that can be restored from the record byte for byte is left out.
    """
    paths = checkpoint.carried.paths
    written = dump_json(dict(checkpoint.generation))
    return [
        OutputFile(folder + os.path.basename(path), size(path), copy_of=path)
        for path in paths
        if os.path.basename(path) != GENERATION or read_bytes(path, MOST_BYTES) != written
    ]


def with_drifted_biases(plan: Plan, checkpoint: Checkpoint) -> Plan:
    """The plan with a warning if it writes the mean of biases that differ between ranks.

    A GPT-NeoX target with the same number of tensor-parallel ranks keeps the biases of every rank.
    """
    state = checkpoint.neox
    if state is None or plan.target.get("tensor_parallel") == state.tp:
        return plan
    drifted = drifted_biases(checkpoint)
    if drifted is None:
        return plan
    return replace(
        plan,
        findings=(*plan.findings, drifted.finding()),
        known_deviations=row_bias_names(checkpoint.architecture),
    )
