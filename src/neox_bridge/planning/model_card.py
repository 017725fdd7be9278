"""The README.md of a Hugging Face folder: what it is, where it comes from, how to use it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from neox_bridge.architectures.base import Form
from neox_bridge.findings import Dropped
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.planning.record import source_summary
from neox_bridge.version import __version__
from neox_bridge.wording import markdown


def model_card(
    checkpoint: Checkpoint,
    summary: Mapping[str, Any],
    dropped: Sequence[Dropped],
    form: Form | None = None,
) -> bytes:
    """Markdown with the front matter that the Hub reads."""
    config = checkpoint.config
    source = source_summary(checkpoint)
    name = source["name"]
    where = "GPT-NeoX" if checkpoint.kind == "neox" else "Hugging Face"
    auto = f"AutoModelFor{'SequenceClassification' if config.reward else 'CausalLM'}"
    model = f'model = {auto}.from_pretrained(".")  # this folder'
    usage = form.usage if form else (f"from transformers import {auto}", "", model)
    rows = "\n".join(
        f"| {key.replace('_', ' ')} | {markdown(str(value))} |" for key, value in source.items()
    )
    lines = [
        "---",
        f"library_name: {form.library if form else 'transformers'}",
        f"pipeline_tag: {'text-classification' if config.reward else 'text-generation'}",
        f"tags: [{checkpoint.architecture.name}, neox-bridge]",
        "---",
        f"# {markdown(name)}",
        "",
        f"{summary['parameters']:,} parameters in {summary['dtype']}: {config.layers} layers, "
        f"hidden size {config.hidden}, {config.heads} heads, {summary['vocab_rows']:,} rows of "
        "vocabulary.",
        "",
        "```python",
        *usage,
        "```",
        "",
        "## Provenance",
        "",
        f"Converted by neox-bridge {__version__} from a {where} checkpoint, bit for bit"
        f"{'' if summary['dtype'] == config.dtype else ' before a cast'}.",
        "",
        "| source | |",
        "|---|---|",
        rows,
        "",
    ]
    if dropped:
        reasons = Counter(drop.reason for drop in dropped).items()
        left_out = (f"- {markdown(reason)} ({count})" for reason, count in reasons)
        lines += ["Left out:", "", *left_out, ""]
    return "\n".join(lines).encode()
