"""An output head that a checkpoint stores although its config ties the head to the embeddings.

transformers 5 uses both matrices if they differ (modeling_utils.py, tie_weights). transformers 4
replaces the head with the embeddings. One folder is then two models. The head is dropped if it
equals the embeddings. Otherwise the user decides.
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
    """How the stored head compares to the embeddings; None if there is no such head.

    Only rows that both have count, without the padding of this tool.
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

    Raises ChoiceNeeded if the head differs from the embeddings and ``choice`` is None,
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
    """Raise UsageError if there is no head to decide about."""
    if checkpoint.tied_head is not None and not checkpoint.config.reward:
        return
    if checkpoint.config.reward:
        why = f"{checkpoint.path} is a reward model, which has no output head"
    elif checkpoint.config.tied_embeddings:
        why = (
            f"{checkpoint.path} ties the head to the embeddings, and its files contain no "
            "separate head"
        )
    else:
        key = {"hf": "tie_word_embeddings: false", "neox": "no_weight_tying: true"}
        why = f"{checkpoint.path} is untied ({key[checkpoint.kind]}), so its head is kept anyway"
    raise UsageError(["head"], why, "Leave `head=` out.")


def as_stored(checkpoint: Checkpoint) -> Checkpoint:
    """The model of all stored matrices: untied if the stored head differs."""
    if checkpoint.tied_head is None:
        return checkpoint
    if head_relation(checkpoint) == "differs":
        return with_head(checkpoint)
    return without_head(checkpoint)


def drop_equal_head(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without a stored head that equals the embeddings; else unchanged."""
    return without_head(checkpoint) if head_relation(checkpoint) == "equal" else checkpoint


def head_as_in(source: Checkpoint, target: Checkpoint) -> Checkpoint:
    """The source as the model that a conversion made of it. The head of the target is decided.

    A tied target whose record has no choice must contain a head that differs.
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
    why = ("left out because of `head=tie`") if findings else "identical to the tied embeddings"
    dropped = Dropped(checkpoint.architecture.head, why)
    return replace(
        checkpoint,
        dropped=(*checkpoint.dropped, dropped),
        findings=(*checkpoint.findings, *findings),
        tied_head=None,
    )


def head_findings(checkpoint: Checkpoint, most_bytes: int | None = None) -> list[Finding]:
    """The findings about a stored head before the user decides."""
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
                f"{key}, but the files also contain {name}. Its first rows equal the embeddings. "
                "A conversion compares all of them",
            )
        ]
    return []


def _check_sizes(checkpoint: Checkpoint, head: Whole) -> None:
    embeddings = checkpoint.tensors[checkpoint.architecture.embeddings]
    if head.shape != embeddings.shape:
        raise UsageError(
            ["head"],
            f"{checkpoint.architecture.head} has the shape {list(head.shape)} and the embeddings "
            f"have {list(embeddings.shape)}, so no model can use both",
            "Use `head=tie`.",
        )


def ambiguity(checkpoint: Checkpoint) -> tuple[str, str]:
    """The two models that a stored head makes of a checkpoint, and what to do."""
    name, other = checkpoint.architecture.head, checkpoint.architecture.embeddings
    computed = (
        "transformers 5 uses both matrices, and transformers 4 uses only the embeddings. These "
        "are two different models."
    )
    if checkpoint.kind == "neox":
        computed = (
            "GPT-NeoX uses only the embeddings with this yml. If the run was trained with "
            "no_weight_tying: true, the yml is wrong."
        )
    elif checkpoint.form is not None:
        computed = (
            f"{checkpoint.form.name} loads both into one matrix, the head last. What it computes "
            "is neither the tied nor the untied model."
        )
    return (
        f"{_key(checkpoint)}, but the files also contain {name}, whose values differ from "
        f"{other}. {computed}",
        "convert with `head=keep` for the untied model or with `head=tie` for the tied model",
    )


def _key(checkpoint: Checkpoint) -> str:
    if checkpoint.kind == "neox":
        return "the yml sets no_weight_tying: false, which is the default"
    if checkpoint.form is not None:
        return "config.json ties the embeddings (tie_embeddings)"
    if "tie_word_embeddings" in checkpoint.raw:
        return "config.json sets tie_word_embeddings: true"
    return "config.json ties the embeddings"


def _kept(checkpoint: Checkpoint) -> Finding:
    name = checkpoint.architecture.head
    return Finding(
        "head-kept",
        "info",
        f"{_key(checkpoint)}, and {name} differs from the embeddings. Because of `head=keep`, "
        "the result is an untied model with both",
    )


def _left_out(checkpoint: Checkpoint) -> Finding:
    name = checkpoint.architecture.head
    which = "the model that transformers 4 computes, not the one that transformers 5 computes"
    if checkpoint.kind == "neox":
        which = "the model that GPT-NeoX computes with this yml"
    elif checkpoint.form is not None:
        which = "a tied model"
    return Finding(
        "head-left-out",
        "warning",
        f"{name} differs from the embeddings and is left out because of `head=tie`. The result "
        f"is {which}",
        "`head=keep` writes both",
    )
