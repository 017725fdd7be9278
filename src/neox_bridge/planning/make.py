"""The entry point of planning: makes a plan from an opened source and the options of the user."""

import shlex
from collections.abc import Iterator
from dataclasses import replace

from neox_bridge.errors import BridgeError
from neox_bridge.findings import Dropped
from neox_bridge.frameworks.eras import known_keys
from neox_bridge.layouts import unknown_keys
from neox_bridge.layouts.checkpoint import Checkpoint, config_options, refuse_all
from neox_bridge.layouts.copies import check_copies
from neox_bridge.layouts.gqa import with_gqa_order
from neox_bridge.layouts.head import decide_head
from neox_bridge.layouts.tokenizer import describe_tokenizer, tokenizer_at
from neox_bridge.layouts.unknown_keys import ignoring
from neox_bridge.planning.casts import count_casts
from neox_bridge.planning.common import cast, with_drifted_biases
from neox_bridge.planning.neox_files import MakeOptimizer
from neox_bridge.planning.option_checks import check_options, kind_of
from neox_bridge.planning.options import Options
from neox_bridge.planning.plan import Plan
from neox_bridge.planning.record import source_summary
from neox_bridge.planning.weight_dtypes import check_dtypes
from neox_bridge.stores.paths import absolute
from neox_bridge.tensors.fragments import cut_reductions


def make_plan(
    checkpoint: Checkpoint,
    options: Options,
    target: str,
    make_optimizer: MakeOptimizer | None = None,
) -> Plan:
    """Plan everything that a conversion writes, before a byte is written.

    Args:
        checkpoint: The source.
        options: The options of the user.
        target: The path of the target, which the yml of a GPT-NeoX target contains.
        make_optimizer: Makes the optimizer of ``options.optimizer`` "fresh"; see
            ``conversion.plan``.

    Raises:
        Refused: The target cannot express the source. The message has every reason.
        UsageError: An option does not apply.
    """
    kind = kind_of(checkpoint, options)
    check_options(checkpoint, options)
    checkpoint = decide_head(check_copies(checkpoint), options.head)
    casts = check_dtypes(checkpoint, options.dtype)
    checkpoint = ignoring(checkpoint, options.ignore_keys)
    known = known_keys(options.era) if options.era is not None and kind == "neox" else ()
    carried = kind == checkpoint.kind and options.era is None
    refusals = unknown_keys.refusals(checkpoint, options.ignore_keys, known)
    relayout = ""
    if kind != checkpoint.kind and checkpoint.refusals:
        given_up = {unknown_keys.ROPE_SCALING} & set(options.ignore_keys)
        refusals += [r for r in checkpoint.refusals if r.key not in given_up]
        relayout = relayout_command(checkpoint, target)
    refuse_all(refusals, checkpoint.path, relayout)
    if checkpoint.kind == "neox" and options.gqa_order is not None:
        checkpoint = with_gqa_order(checkpoint, options.gqa_order)
    files = tokenizer_at(options.tokenizer) if options.tokenizer else checkpoint.tokenizer
    if files and checkpoint.missing_tokenizer:
        from neox_bridge.layouts.run_tokenizer import not_missing

        checkpoint = not_missing(checkpoint)
    tokenizer = describe_tokenizer(files)
    if tokenizer.size is None:
        tokenizer = replace(tokenizer, size=checkpoint.tokenizer_size)
    if options.vocab_rows == "tokenizer" and tokenizer.size is None:
        raise BridgeError(
            f"`vocab_rows=tokenizer`: {checkpoint.path} comes without a tokenizer. Name one with "
            "`tokenizer=`."
        )
    if kind == "hf":  # the modules of the other direction need not be imported
        from neox_bridge.planning.to_hf import plan_hf

        plan = plan_hf(checkpoint, options, tokenizer)
    else:
        from neox_bridge.planning.to_neox import plan_neox

        plan = plan_neox(checkpoint, options, tokenizer, absolute(target), make_optimizer)
    plan = with_drifted_biases(plan, checkpoint)
    return replace(
        plan,
        files=tuple(map(cut_reductions, plan.files)),
        source=source_summary(checkpoint),
        dropped=(*_left_out(checkpoint, plan), *plan.dropped),
        findings=(
            *checkpoint.findings,
            *unknown_keys.listed(checkpoint.unknown_keys),
            *unknown_keys.ignored_findings(options.ignore_keys, carried),
            *casts,
            *plan.findings,
        ),
        options=options.non_default(),
        carried=checkpoint.carried.names,
        left=checkpoint.carried.left,
        checkpoint=checkpoint,
        casts=count_casts(
            (whole.dtype, cast(whole, options.dtype).dtype) for whole in checkpoint.tensors.values()
        ),
    )


def _left_out(checkpoint: Checkpoint, plan: Plan) -> Iterator[Dropped]:
    """What the reader left out, except an inv_freq that the target stores again."""
    stored = plan.target.get("inv_freq") == "store"
    return (drop for drop in checkpoint.dropped if not (stored and drop.kind == "inv_freq"))


def relayout_command(checkpoint: Checkpoint, target: str) -> str:
    """The command that moves a model that only GPT-NeoX supports to another layout, or "".

    Whether the conversion works depends on the checkpoint. It is planned first, so that a refusal
    does not advise a command that fails. "" if planning fails, and for other checkpoints.
    """
    if checkpoint.neox is None:
        return ""
    ignored = [key.name for key in checkpoint.unknown_keys if key.effect == "model"]
    try:
        make_plan(checkpoint, Options(to="neox", ignore_keys=tuple(ignored)), target)
    except BridgeError:
        return ""
    words = ["neox-bridge", "convert", checkpoint.path, target, "--to", "neox"]
    words += config_options(checkpoint)
    return shlex.join([*words, *(w for key in ignored for w in ("--ignore-key", key))])
