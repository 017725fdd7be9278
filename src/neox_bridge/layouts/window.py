"""Which attention window GPT-NeoX computes with; it depends on the layout, not on the yml alone.

With pipe_parallel_size 1 or more, megatron/training.py (get_batch_pipe) builds the causal mask with
sliding_window_width. With 0, get_batch_sequential builds it without: only flash-attn, which gets
the width from model/transformer.py (flash_attention), still has a window. This holds in the trees
of 2024-03, 2024-09, 2024-10 and 2026-05.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from neox_bridge.architectures.base import Refusal
from neox_bridge.architectures.neox_config import attention_kinds, number
from neox_bridge.errors import Refused
from neox_bridge.findings import Finding
from neox_bridge.layouts.checkpoint import Checkpoint, LayoutName

WIDTH = "sliding_window_width"
_WITHOUT_MASK = {"mamba", "rwkv"}  # these blocks do not attend
_WHY = (
    "with pipe_parallel_size: 0 GPT-NeoX builds the mask of its own attention without the window "
    "(megatron/training.py, get_batch_sequential)"
)


@dataclass(frozen=True, slots=True)
class EffectiveWindow:
    """A run's settings as GPT-NeoX computes with them in its layout.

    raw: the merged yml, without sliding_window_width where it has no effect.
    findings: that it has none. refusals: what a Hugging Face model cannot express of it.
    """

    raw: Mapping[str, Any]
    findings: tuple[Finding, ...] = ()
    refusals: tuple[Refusal, ...] = ()


def windowed_layers(raw: Mapping[str, Any], layout: LayoutName) -> Literal["all", "some", "none"]:
    """How many of the attention layers would use a sliding_window_width in this layout."""
    kinds = (attention_kinds(raw) or {"global"}) - _WITHOUT_MASK
    with_window = kinds if layout == "layers" else kinds & {"flash"}
    if not with_window:
        return "none"
    return "all" if with_window == kinds else "some"


def effective_window(raw: Mapping[str, Any], layout: LayoutName) -> EffectiveWindow:
    """What the yml's sliding_window_width means for a checkpoint in this layout."""
    width, used = raw.get(WIDTH), windowed_layers(raw, layout)
    if used == "all" or not _narrows(raw):
        return EffectiveWindow(raw)
    if used == "some":
        reason = (
            f"{_WHY}: the layers with flash attention use {WIDTH}: {width}, and the other layers "
            "attend to all previous tokens"
        )
        return EffectiveWindow(raw, refusals=(Refusal(WIDTH, reason, neox_only=True),))
    ignored = Finding(
        "window-not-used",
        "warning",
        f"{WIDTH}: {width} has no effect in this checkpoint: {_WHY}. It is read as a model "
        "without a window, and so is everything written from it",
        "if the model should have a window, train with pipe_parallel_size: 1 or with flash "
        "attention",
    )
    return EffectiveWindow({k: v for k, v in raw.items() if k != WIDTH}, (ignored,))


def check_window(checkpoint: Checkpoint, layout: LayoutName, yml: Mapping[str, Any]) -> None:
    """Raise Refused if a GPT-NeoX target of this layout would have another window.

    yml: the settings that the target gets from the source's run, for its attention_config.
    """
    used, config = windowed_layers(yml, layout), checkpoint.config
    if checkpoint.neox is not None:
        if not _narrows(yml) or used == windowed_layers(yml, checkpoint.neox.layout):
            return
        if checkpoint.neox.layout == "ranks":
            raise Refused(
                f"{WIDTH}: {yml[WIDTH]}: {_WHY}. In this checkpoint only the layers with flash "
                "attention have a window. With pipe_parallel_size 1 or more all layers would "
                "have one. Keep `layout=ranks`."
            )
        raise Refused(
            f"{WIDTH}: {yml[WIDTH]}: {_WHY}. The target would be another model. Use "
            "`layout=layers`. Or, if flash-attn is installed, which keeps the window, first set "
            f'attention_config: [[["flash"], {config.layers}]] in the yml of the source.'
        )
    if config.window is not None and config.window < config.max_positions and used != "all":
        raise Refused(
            f"sliding_window: {config.window}: {_WHY}. The target would be another model. Use "
            f"`layout=layers`. Or, if no text is longer than {config.window} tokens, set "
            "sliding_window: null in config.json."
        )


def _narrows(raw: Mapping[str, Any]) -> bool:
    """Whether the width is smaller than the longest text, so that it matters at all.

    GPT-NeoX does not count the token itself (megatron/utils.py, get_attn_mask).
    """
    width = raw.get(WIDTH)
    if width is None:
        return False
    longest = raw.get("max_position_embeddings")
    return longest is None or number(WIDTH, width, int) + 1 < number(
        "max_position_embeddings", longest, int
    )
