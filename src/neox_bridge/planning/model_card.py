"""Writes README.md of a Hugging Face folder: the model's text and a section on the conversion.

The section is between two markers. Each conversion replaces it and keeps the rest of the file,
except for keys of the front matter that the conversion invalidates.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from neox_bridge.architectures.base import Form
from neox_bridge.errors import BridgeError
from neox_bridge.findings import Dropped, Finding
from neox_bridge.formats.yml import parse_yml
from neox_bridge.layouts.carried_names import CARD, MOST_BYTES
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.text_files import read_bytes
from neox_bridge.planning.common import text_file
from neox_bridge.planning.plan import ModelCard, Plan
from neox_bridge.planning.record import source_summary
from neox_bridge.version import __version__
from neox_bridge.wording import markdown, plural

_BEGIN, _END = b"<!-- neox-bridge -->", b"<!-- /neox-bridge -->"
# the front matter that the Hub reads: YAML between two lines of dashes at the start of the file
_FRONT = re.compile(rb"(---[ \t]*\r?\n)(.*?\r?\n)(---[ \t]*(?:\r?\n|\Z))", re.DOTALL)
_TASKS = ("text-classification", "text-generation")


def model_card(
    checkpoint: Checkpoint,
    summary: Mapping[str, Any],
    dropped: Sequence[Dropped],
    form: Form | None = None,
) -> tuple[ModelCard, list[Finding]]:
    """The card of a Hugging Face target, and the findings about the card of the source."""
    metadata = {
        "library_name": form.library if form else "transformers",
        "pipeline_tag": _TASKS[0 if checkpoint.config.reward else 1],
    }
    section = tuple(_section(checkpoint, summary, dropped, form))
    dtype = str(summary["dtype"])
    cast = dtype if dtype != checkpoint.config.dtype else None
    path = checkpoint.carried.path_of(CARD)
    if path is None:
        return ModelCard(_new_card(checkpoint, metadata), section, b"\n", cast), []
    text, changes = _corrected(read_bytes(path, MOST_BYTES), metadata, checkpoint)
    findings = [_corrections(changes)] if changes else []
    if _trained_on(checkpoint):
        findings.append(_outdated())
    begin = text.rfind(_BEGIN)
    end = text.find(_END, begin)
    if begin < 0 or end < 0:
        blank = b"" if text.endswith(b"\n\n") else b"\n" if text.endswith(b"\n") else b"\n\n"
        return ModelCard(text + blank, section, b"\n", cast), findings
    after = text[end + len(_END) :]
    return ModelCard(text[:begin], section, after, cast), findings


def card_text(card: ModelCard, *, verified: bool = True) -> bytes:
    """The text of README.md. verified: whether the target is compared with its source."""
    how = (
        "After they were written, all tensors were read back and compared with the source, "
        f"{'bit by bit' if card.cast is None else f'value by value after the cast to {card.cast}'}."
        if verified
        else "Nothing. The tensors were not compared with the source."
    )
    lines = (_BEGIN.decode(), *card.section, f"- **Verified:** {how}", _END.decode())
    return card.before + "\n".join(lines).encode() + card.after


def without_verification(plan: Plan) -> Plan:
    """The plan with a model card that does not say that the target was compared with its source."""
    if plan.card is None:
        return plan
    planned = text_file(CARD, card_text(plan.card))
    new = text_file(CARD, card_text(plan.card, verified=False))
    return replace(plan, files=tuple(new if file == planned else file for file in plan.files))


def _new_card(checkpoint: Checkpoint, metadata: Mapping[str, str]) -> bytes:
    lines = [
        "---",
        *(f"{key}: {value}" for key, value in metadata.items()),
        f"tags: [{checkpoint.architecture.name}, neox-bridge]",
        "---",
        f"# {markdown(source_summary(checkpoint)['name'])}",
        "",
        "",
    ]
    return "\n".join(lines).encode()


def _section(
    checkpoint: Checkpoint,
    summary: Mapping[str, Any],
    dropped: Sequence[Dropped],
    form: Form | None,
) -> Iterator[str]:
    config, source = checkpoint.config, source_summary(checkpoint)
    where = "GPT-NeoX" if checkpoint.kind == "neox" else "Hugging Face"
    auto = f"AutoModelFor{'SequenceClassification' if config.reward else 'CausalLM'}"
    model = f'model = {auto}.from_pretrained(".")  # this folder'
    yield "## Conversion"
    yield ""
    yield (
        f"neox-bridge {__version__} converted this model from a {where} checkpoint. It has "
        f"{summary['parameters']:,} parameters in {summary['dtype']}: "
        f"{plural(config.layers, 'layer')}, hidden size {config.hidden}, "
        f"{plural(config.heads, 'head')}, {summary['vocab_rows']:,} rows of vocabulary."
    )
    yield ""
    yield "```python"
    yield from form.usage if form else (f"from transformers import {auto}", "", model)
    yield "```"
    yield ""
    yield "| source | |"
    yield "|---|---|"
    for key, value in source.items():
        yield f"| {key.replace('_', ' ')} | {markdown(str(value))} |"
    yield ""
    if _trained_on(checkpoint):
        yield (
            "- **Trained:** These weights are those of a later step of training in GPT-NeoX. The "
            "rest of this page is about the model that the training started from."
        )
    yield f"- **Merged:** {_merged(checkpoint, dropped)}"
    if summary["dtype"] != config.dtype:
        yield f"- **Cast:** From {config.dtype} to {summary['dtype']}."
    missing = [drop for drop in dropped if drop.kind != "merged"]
    reasons = Counter(drop.reason for drop in missing).items()
    names = [f"{markdown(reason)} ({count})" for reason, count in reasons]
    names += [markdown(file.name) for file in checkpoint.carried.left]
    yield f"- **Dropped:** {'; '.join(names) or 'Nothing'}."


def _merged(checkpoint: Checkpoint, dropped: Sequence[Dropped]) -> str:
    state = checkpoint.neox
    if state is None or state.tp == 1:
        return "Nothing: the source held each tensor in one piece."
    text = f"The parts of {state.tp} tensor-parallel ranks were joined, so each tensor is whole."
    if count := sum(drop.kind == "merged" for drop in dropped):
        text += f" Each rank held a part of {plural(count, 'bias')}, and the parts were added up."
    return text


def _trained_on(checkpoint: Checkpoint) -> bool:
    """Whether GPT-NeoX trained a model that came from Hugging Face and then saved this step.

    The record of a converted step, in either layout, contains the config of its source.
    """
    came_along = checkpoint.kind == "neox" and checkpoint.carried.path_of(CARD) is not None
    return came_along and "config" not in checkpoint.record


def _corrected(
    text: bytes, metadata: Mapping[str, str], checkpoint: Checkpoint
) -> tuple[bytes, list[str]]:
    """Correct the front matter of a card for the target. Also describes the changes."""
    front = _FRONT.match(text)
    values = _parsed(front[2]) if front else None
    if front is None or values is None:
        return text, []
    wanted: dict[str, str | None] = {}
    if values.get("library_name") not in (None, metadata["library_name"]):
        wanted["library_name"] = metadata["library_name"]
    if values.get("pipeline_tag") in _TASKS and values["pipeline_tag"] != metadata["pipeline_tag"]:
        wanted["pipeline_tag"] = metadata["pipeline_tag"]
    if "model-index" in values and _trained_on(checkpoint):
        wanted["model-index"] = None
    body, changes = front[2], []
    for key, value in wanted.items():
        edited = _with_key(body, key, value)
        expected = (
            {**values, key: value} if value else {k: v for k, v in values.items() if k != key}
        )
        if edited is None or _parsed(edited) != expected:
            continue  # the key is spelled in a way that cannot be edited alone
        changes.append(f"{key}: {values[key]} is now {value}" if value else f"{key} is removed")
        body, values = edited, expected
    return front[1] + body + front[3] + text[front.end() :], changes


def _with_key(body: bytes, key: str, value: str | None) -> bytes | None:
    """Set a key of the front matter, or remove it. None if no line has the key."""
    lines, block = body.splitlines(keepends=True), []
    for number, line in enumerate(lines):
        if line.startswith(f"{key}:".encode()):
            block = [number]
        elif block and number == block[-1] + 1 and line[:1] in b" \t-#\r\n":
            block.append(number)
    if not block:
        return None
    ending = b"\r\n" if lines[block[0]].endswith(b"\r\n") else b"\n"
    new = [f"{key}: {value}".encode() + ending] if value else []
    return b"".join([*lines[: block[0]], *new, *lines[block[-1] + 1 :]])


def _parsed(front: bytes) -> dict[str, Any] | None:
    """The values of the front matter; None if a YAML parser cannot read it safely."""
    try:
        return parse_yml(front, CARD)
    except BridgeError:
        return None


def _corrections(changes: Sequence[str]) -> Finding:
    return Finding(
        "card-metadata-changed",
        "info",
        f"the metadata of {CARD} did not fit this conversion: {'; '.join(changes)}",
    )


def _outdated() -> Finding:
    return Finding(
        "card-of-the-source",
        "info",
        f"{CARD} describes the model that the training started from, and a section at its end says "
        "so",
        f"edit {CARD} before you publish the model",
    )
