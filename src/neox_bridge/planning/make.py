"""One door to planning: what to write, from an opened source and what the user asks for."""

from dataclasses import replace

from neox_bridge.errors import BridgeError
from neox_bridge.layouts.checkpoint import Checkpoint, Kind, refuse_all
from neox_bridge.layouts.gqa import with_gqa_order
from neox_bridge.layouts.tokenizer import describe_tokenizer, tokenizer_at
from neox_bridge.planning.fragments import cut_reductions
from neox_bridge.planning.options import Options
from neox_bridge.planning.pieces import Plan
from neox_bridge.planning.record import source_summary
from neox_bridge.stores.paths import absolute


def make_plan(checkpoint: Checkpoint, options: Options, target: str) -> Plan:
    """Everything that a conversion will write, before a byte is written.

    target: where it goes; the yml of a GPT-NeoX target names it.
    Raises Refused, with every reason, for what the target can't express, BridgeError for options
    that don't go together.
    """
    kind = kind_of(checkpoint, options)
    if kind != checkpoint.kind:
        refuse_all(checkpoint.refusals, checkpoint.path)
    _check_options(kind, options)
    if options.gqa_order is not None and {kind, checkpoint.kind} == {"hf"}:
        raise BridgeError("--gqa-order: it is about GPT-NeoX files, and there are none here.")
    if checkpoint.kind == "neox" and options.gqa_order is not None:
        checkpoint = with_gqa_order(checkpoint, options.gqa_order)
    files = tokenizer_at(options.tokenizer) if options.tokenizer else checkpoint.tokenizer
    tokenizer = describe_tokenizer(files)
    if tokenizer.size is None:
        tokenizer = replace(tokenizer, size=checkpoint.tokenizer_size)
    if options.vocab_rows == "tokenizer" and tokenizer.size is None:
        raise BridgeError(
            f"--vocab-rows tokenizer: {checkpoint.path} comes without a tokenizer. Name one with "
            "--tokenizer."
        )
    if kind == "hf":  # one direction's modules needn't be read for the other
        from neox_bridge.planning.to_hf import plan_hf

        plan = plan_hf(checkpoint, options, tokenizer)
    else:
        from neox_bridge.planning.to_neox import plan_neox

        plan = plan_neox(checkpoint, options, tokenizer, absolute(target))
    return replace(
        plan,
        files=tuple(map(cut_reductions, plan.files)),
        source=source_summary(checkpoint),
        dropped=(*checkpoint.dropped, *plan.dropped),
        findings=(*checkpoint.findings, *plan.findings),
        asked=options.asked(),
    )


def kind_of(checkpoint: Checkpoint, options: Options) -> Kind:
    """The kind that is written."""
    other: Kind = "hf" if checkpoint.kind == "neox" or options.format else "neox"
    return options.to or other


def _check_options(kind: Kind, options: Options) -> None:
    """Options of the other kind of target would be ignored, so they are errors."""
    if kind == "neox":
        if options.shards != "size":
            raise BridgeError(
                "--shards: only for Hugging Face targets, and this one is for GPT-NeoX, whose "
                "files are placed so that blocks can be shared anyway."
            )
        if options.format is not None:
            raise BridgeError(
                f"--format {options.format}: only for Hugging Face targets, and this one is for "
                "GPT-NeoX. Leave it out, or say --to hf."
            )
        return
    given = {
        "--tp": options.tp,
        "--pp": options.pp,
        "--layout": options.layout,
        "--inv-freq": options.inv_freq,
        "--mlp-names": options.mlp_names,
        "--for": options.era,
        "--vocab-multiple": options.vocab_multiple,
        "--te": options.te,
        "--optimizer": None if options.optimizer == "none" else options.optimizer,
        "--iteration": options.iteration,
    }
    if names := [name for name, value in given.items() if value is not None]:
        raise BridgeError(
            f"{', '.join(names)}: only for GPT-NeoX targets, and this one is for Hugging Face. "
            "Say --to neox if you want a GPT-NeoX checkpoint."
        )
