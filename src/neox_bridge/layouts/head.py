"""An output head that a checkpoint stores although its config ties the head to the embeddings.

transformers 5 computes with both matrices where they differ (modeling_utils.py, tie_weights), 4.x
replaces the head by the embeddings: one folder, two models. So the head is dropped where it equals
the embeddings, and else only if the user says so.
"""

from collections.abc import Sequence
from dataclasses import replace

from neox_bridge.errors import ChoiceNeeded, UsageError
from neox_bridge.findings import Dropped, Finding
from neox_bridge.layouts.checkpoint import Checkpoint, HeadChoice
from neox_bridge.layouts.same_values import Relation, relation
from neox_bridge.tensors.geometry import with_rows
from neox_bridge.tensors.pieces import Whole

_UNTIED = {"hf": {"tie_word_embeddings": False}, "neox": {"no_weight_tying": True}}


def head_relation(checkpoint: Checkpoint, most_bytes: int | None = None) -> Relation | None:
    """How the stored head stands to the embeddings; None where there is no such head.

    Only the rows that both have and that are no padding of this tool's count.
    most_bytes: see ``same_values.relation``.
    """
    head = checkpoint.tied_head
    if head is None:
        return None
    embeddings = checkpoint.tensors[checkpoint.architecture.embeddings]
    if head.shape[1:] != embeddings.shape[1:] or not head.shape:
        return "differs"
    rows = min(head.shape[0], embeddings.shape[0], checkpoint.vocab_rows)
    return relation(with_rows(head, rows), with_rows(embeddings, rows), most_bytes)


def decide_head(checkpoint: Checkpoint, choice: HeadChoice | None) -> Checkpoint:
    """The checkpoint as one model: with the stored head, or tied.

    Raises ChoiceNeeded where the head differs from the embeddings and ``choice`` is None,
    UsageError where the choice does not apply to this checkpoint.
    """
    if checkpoint.tied_head is None:
        tied = checkpoint.config.tied_embeddings
        if choice == ("keep" if tied else "tie"):
            check_head(checkpoint)
        return checkpoint
    differs = head_relation(checkpoint) == "differs"
    if choice == "keep":
        check_head(checkpoint)
        _check_sizes(checkpoint, checkpoint.tied_head)
        return with_head(checkpoint, [_kept(checkpoint)] if differs else [])
    if not differs:
        return without_head(checkpoint)
    if choice == "tie":
        return replace(without_head(checkpoint, [_left_out(checkpoint)]), head_choice="tie")
    raise ChoiceNeeded(
        f"{checkpoint.path}: {ambiguity(checkpoint)[0]}",
        "head",
        {
            "keep": "writes an untied model with both (tie_word_embeddings: false, "
            "no_weight_tying: true)",
            "tie": f"leaves out {checkpoint.architecture.head}",
        },
        checkpoint.path,
        checkpoint.kind,
    )


def check_head(checkpoint: Checkpoint) -> None:
    """Raise UsageError where a checkpoint has no head about which anybody could decide."""
    if checkpoint.tied_head is not None and not checkpoint.config.reward:
        return
    if checkpoint.config.reward:
        why = f"{checkpoint.path} is a reward model, which has no output head"
    elif checkpoint.config.tied_embeddings:
        why = f"{checkpoint.path} is tied, and its files hold no head besides the embeddings"
    else:
        key = {"hf": "tie_word_embeddings: false", "neox": "no_weight_tying: true"}
        why = f"{checkpoint.path} is untied ({key[checkpoint.kind]}), so its head is kept anyway"
    raise UsageError(["head"], why, "Leave `head=` out.")


def as_stored(checkpoint: Checkpoint) -> Checkpoint:
    """The model of every matrix that the files hold: untied where the stored head differs."""
    if checkpoint.tied_head is None:
        return checkpoint
    if head_relation(checkpoint) == "differs":
        return with_head(checkpoint)
    return without_head(checkpoint)


def drop_equal_head(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without a stored head that equals the embeddings; as it is with another."""
    return without_head(checkpoint) if head_relation(checkpoint) == "equal" else checkpoint


def head_as_in(source: Checkpoint, target: Checkpoint) -> Checkpoint:
    """The source as the model that a conversion made of it; the target's head is decided.

    A tied target made without a choice (its record has none) has to hold a head that differs.
    """
    if source.tied_head is None:
        return source
    if not target.config.tied_embeddings:
        return with_head(source)
    if head_relation(source) != "differs":
        return without_head(source)
    if target.record.get("head") == "tie":
        return without_head(source, [_left_out(source)])
    return with_head(source)


def with_head(checkpoint: Checkpoint, findings: Sequence[Finding] = ()) -> Checkpoint:
    """The untied model."""
    head = checkpoint.tied_head
    assert head is not None
    return replace(
        checkpoint,
        tensors={**checkpoint.tensors, checkpoint.architecture.head: head},
        config=replace(checkpoint.config, tied_embeddings=False),
        raw={**checkpoint.raw, **_UNTIED[checkpoint.kind]},
        findings=(*checkpoint.findings, *findings),
        tied_head=None,
        head_choice="keep",
    )


def without_head(checkpoint: Checkpoint, findings: Sequence[Finding] = ()) -> Checkpoint:
    """The tied model."""
    why = "left out as `head=tie` says" if findings else "it equals the embeddings, which are tied"
    dropped = Dropped(checkpoint.architecture.head, why)
    return replace(
        checkpoint,
        dropped=(*checkpoint.dropped, dropped),
        findings=(*checkpoint.findings, *findings),
        tied_head=None,
    )


def head_findings(checkpoint: Checkpoint, most_bytes: int | None = None) -> list[Finding]:
    """What to say of a stored head before anybody has decided."""
    relation = head_relation(checkpoint, most_bytes)
    if relation == "differs":
        message, remedy = ambiguity(checkpoint)
        return [Finding("head-differs", "warning", message, remedy, subject="stored head")]
    if relation == "unknown":
        name, key = checkpoint.architecture.head, _key(checkpoint)
        return [
            Finding(
                "head-not-compared",
                "info",
                f"{key}, and the files hold {name} too. Its first rows equal the embeddings; "
                "converting compares all of them",
            )
        ]
    return []


def _check_sizes(checkpoint: Checkpoint, head: Whole) -> None:
    embeddings = checkpoint.tensors[checkpoint.architecture.embeddings]
    if head.shape != embeddings.shape:
        raise UsageError(
            ["head"],
            f"{checkpoint.architecture.head} has the shape {list(head.shape)} and the embeddings "
            f"have {list(embeddings.shape)}, so no model has both",
            "Use `head=tie`.",
        )


def ambiguity(checkpoint: Checkpoint) -> tuple[str, str]:
    """Which two models a stored head that differs makes of a checkpoint, and what to do."""
    name, other = checkpoint.architecture.head, checkpoint.architecture.embeddings
    computed = (
        "transformers 5 computes with both matrices, 4.x with the embeddings alone: these are two "
        "models."
    )
    if checkpoint.kind == "neox":
        computed = (
            "GPT-NeoX computes with the embeddings alone under this yml. The yml is wrong if the "
            "run was trained with no_weight_tying: true."
        )
    elif checkpoint.form is not None:
        computed = (
            f"{checkpoint.form.name} loads both into one matrix, the head last: what it computes "
            "is neither the tied model of the embeddings nor the untied one."
        )
    return (
        f"{_key(checkpoint)}, and the files hold {name} with other values than {other}. {computed}",
        "convert with `head=keep` for the untied model, or with `head=tie` for the tied one",
    )


def _key(checkpoint: Checkpoint) -> str:
    if checkpoint.kind == "neox":
        return "the yml says no_weight_tying: false (or nothing, which means false)"
    if checkpoint.form is not None:
        return "config.json ties the embeddings (tie_embeddings)"
    if "tie_word_embeddings" in checkpoint.raw:
        return "config.json says tie_word_embeddings: true"
    return "config.json ties the embeddings"


def _kept(checkpoint: Checkpoint) -> Finding:
    name = checkpoint.architecture.head
    return Finding(
        "head-kept",
        "info",
        f"{_key(checkpoint)}, and {name} differs from the embeddings: as `head=keep` says, the "
        "result is an untied model with both",
    )


def _left_out(checkpoint: Checkpoint) -> Finding:
    name = checkpoint.architecture.head
    which = "the model that transformers 4.x computes, not the one that transformers 5 does"
    if checkpoint.kind == "neox":
        which = "the model that GPT-NeoX computes under this yml"
    elif checkpoint.form is not None:
        which = "a tied model"
    return Finding(
        "head-left-out",
        "warning",
        f"{name} differs from the embeddings and is left out, as `head=tie` says: the result is "
        f"{which}",
        "`head=keep` writes both",
    )
