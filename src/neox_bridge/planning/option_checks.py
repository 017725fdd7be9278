"""Raises usage errors for options that do not apply to a conversion or contradict each other.

Ignoring an option would mislead the user, who would assume that it had an effect.
"""

import os
from collections.abc import Collection, Iterable

from neox_bridge.errors import UsageError
from neox_bridge.layouts.checkpoint import Checkpoint, Kind
from neox_bridge.layouts.head import check_head
from neox_bridge.layouts.stored_model import StoredModel
from neox_bridge.option import options_of
from neox_bridge.planning.options import SIDES, Options, check_minimum
from neox_bridge.stores.folder import is_hub
from neox_bridge.stores.paths import absolute, isdir, plain, real

_NAMES: dict[Kind, str] = {"hf": "Hugging Face", "neox": "GPT-NeoX"}


def kind_of(checkpoint: Checkpoint, options: Options) -> Kind:
    """The kind of the target."""
    other: Kind = "hf" if checkpoint.kind == "neox" or options.format else "neox"
    return options.to or other


def check_outside(sources: Iterable[str], place: str, parameter: str = "target") -> None:
    """Raise UsageError if the output folder is inside a source, after following symbolic links.

    A conversion would change the folder that it reads. To add a step to a run, the target is the
    folder of the run itself.

    sources: as the user named them. parameter: the parameter with the output folder.
    """
    inside = real(absolute(plain(place)))
    for source in sources:
        if not source or is_hub(source):
            continue
        home = real(absolute(plain(source)))
        if inside.startswith(os.path.join(home, "")) and isdir(home):
            reason = f"{_resolved(place, inside)} is inside the source {_resolved(source, home)}"
            raise UsageError([parameter], reason, "Choose a folder outside of the source.")


def _resolved(path: str, real_path: str) -> str:
    """The path as given, and the path that it resolves to if that differs."""
    return path if absolute(plain(path)) == real_path else f"{path} ({real_path})"


def check_options(checkpoint: Checkpoint, options: Options, given: Collection[str] = ()) -> None:
    """Raise UsageError for options that would be ignored, and for numbers out of range.

    given: options that the user set, even to the default.
    """
    for name, declared in options_of(Options).items():
        check_minimum(name, declared, getattr(options, name))
    kind = kind_of(checkpoint, options)
    chosen = [name for name in SIDES if name in options.non_default() or name in given]
    if wrong := [name for name in chosen if SIDES[name] != kind]:
        other = _NAMES[SIDES[wrong[0]]]
        raise UsageError(
            wrong,
            f"only for {other} targets, but this target is for {_NAMES[kind]}",
            f"Use `to={SIDES[wrong[0]]}` for a {other} target, or leave "
            f"{'it' if len(wrong) == 1 else 'them'} out.",
        )
    if options.gqa_order is not None and {kind, checkpoint.kind} == {"hf"}:
        raise UsageError(
            ["gqa_order"],
            "it describes the row order in GPT-NeoX files, but neither side is GPT-NeoX",
            "Leave it out.",
        )
    # only if the user named one model: a batch may contain models with and without it
    if "gqa_order" in given and not checkpoint.config.grouped_query:
        raise _no_grouped_query()
    if "dp" in chosen and options.optimizer != "fresh":
        raise UsageError(
            ["dp"],
            "only for the optimizer that `optimizer=fresh` writes",
            "Add `optimizer=fresh`. To change the ranks of a run with its optimizer, use reshard.",
        )
    if "crc" in given and kind == "hf" and options.format in (None, "transformers"):
        raise UsageError(
            ["crc"], "only .pt files have checksums, not safetensors files", "Leave it out."
        )
    if "head" in given and options.head is not None:
        check_head(checkpoint)
    check_layout(options.layout, options.pp)
    if "inv_freq" in given and not _has_rotary_buffer(checkpoint):
        raise UsageError(["inv_freq"], "this model has no rotary embeddings", "Leave it out.")


def check_gqa_order(order: str | None, *checkpoints: Checkpoint | StoredModel) -> None:
    """Raise UsageError if an order is given and none of the checkpoints can have one."""
    families = [one for one in checkpoints if not isinstance(one, StoredModel)]
    if order is None or any(c.neox is not None and c.config.grouped_query for c in families):
        return
    if families and not any(c.config.grouped_query for c in families):
        raise _no_grouped_query()
    raise UsageError(
        ["gqa_order"],
        "it describes the row order in GPT-NeoX files, but this is a Hugging Face model",
        "Leave it out.",
    )


def check_optimizer(wanted: bool, *checkpoints: Checkpoint | StoredModel) -> None:
    """Raise UsageError if optimizer states are requested where none can be read."""
    for checkpoint in checkpoints if wanted else ():
        if checkpoint.neox is not None:
            continue
        reason = (
            f"only GPT-NeoX checkpoints contain optimizer states, but {checkpoint.path} is a "
            "Hugging Face model"
        )
        if checkpoint.kind == "neox":
            reason = (
                f"the weights of {checkpoint.path} are quantized, so its optimizer states cannot "
                "be read"
            )
        raise UsageError(["optimizer"], reason, "Leave it out.")


def check_layout(layout: str | None, pp: int | None) -> None:
    """Raise UsageError if the layout contradicts the number of pipeline stages."""
    if layout == "layers" and pp == 0:
        raise UsageError(
            ["layout", "pp"],
            "pipe_parallel_size 0 is the layout `ranks`",
            "Use `pp=1` or more for the layout `layers`.",
        )
    if layout == "ranks" and pp:
        raise UsageError(
            ["layout", "pp"],
            f"GPT-NeoX writes the layout `ranks` with pipe_parallel_size 0, not {pp}",
            "Leave one of them out.",
        )


def _no_grouped_query() -> UsageError:
    return UsageError(["gqa_order"], "this model has no grouped-query attention", "Leave it out.")


def _has_rotary_buffer(checkpoint: Checkpoint) -> bool:
    if checkpoint.kind == "neox" and checkpoint.raw.get("pos_emb") != "rotary":
        return False
    return checkpoint.architecture.has_rotary_buffer
