"""Reads the keys and shapes in pasted output of GPT-NeoX, DeepSpeed, torch and transformers.

The known forms are torch's ``Module.load_state_dict`` (also through DeepSpeed), the two warnings of
transformers 4 (``_load_pretrained_model``), and the table of transformers 5
(``utils/loading_report.py``).
"""

import re
from dataclasses import dataclass, field
from typing import Literal

from neox_bridge.findings import Command

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
# The prefixes of torchrun and transformers 5.
_PREFIX = re.compile(r"^\[(?:rank\d+|default\d+|transformers)\]:? ?", re.M)
_STATE_DICT = re.compile(r"(Missing|Unexpected) key\(s\) in state_dict: ([^\n]*)")
_MODULE = re.compile(r"Error\(s\) in loading state_dict for (\w+)")
_UNUSED = re.compile(r"were not used when initializing (\w+): [\[{]([^\]}]*)")
_NEW = re.compile(
    r"Some weights of (\w+) were not initialized[^\[{]*newly initialized: [\[{]([^\]}]*)"
)
_REPORT = re.compile(r"(\w+) LOAD REPORT")
_ROW = re.compile(r"^(\S.*?)\s*\|\s*(MISSING|UNEXPECTED|MISMATCH)\b[^|\n]*\|([^\n]*)", re.M)
_SIZES = re.compile(
    r"size mismatch for (\S+): copying a param with shape (?:torch\.Size\()?[\[(]([\d, ]*)[\])]\)? "
    r"from checkpoint, the shape in current model is (?:torch\.Size\()?[\[(]([\d, ]*)[\])]"
)
_BOTH = re.compile(r"ckpt: torch\.Size\(\[([\d, ]*)\]\) vs model: ?torch\.Size\(\[([\d, ]*)\]\)")
_QUOTED = re.compile(r"[\"']([\w.]+)[\"']")
_HF_CLASS = re.compile(r"(GPTNeoX|Llama|Mistral|Qwen2)(For|Model)\w*")
_HF_NAME = re.compile(r"(gpt_neox|model)\.|(lm_head|embed_out)\.")

Older = Literal["checkpoint", "framework", ""]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One cause that was recognized.

    In commands and texts, CHECKPOINT, NEW and TREE stand for the user's paths.

    Attributes:
        code: The id of a known change, or a separate code if there is no such change.
        cause: Why it happens, in full sentences.
        remedy: A ``Command``, or the setting to change in the yml or in config.json.
        keys: The tensors or keys in the message, unchanged.
        needs: (option, value) pairs of the conversion that fixes it.
        older: The side that is older; "" if neither is, or if that is unknown.
        by_convert: Whether a conversion for the right tree fixes it.
        resumes: Whether the fix must keep optimizer states, so that ``reshard`` writes it.
        settings: Keys of the yml that must be as when the checkpoint was saved. Setting them is the
            remedy if there is no other, and another way otherwise.
        tp_change: Rows of one rank in the checkpoint and in the model, if only the number of
            tensor-parallel ranks differs.
        others: Other ways.
        others_with_states: Other ways that need a checkpoint with optimizer states.
        more: Links.
    """

    code: str
    cause: str
    remedy: str
    keys: tuple[str, ...] = ()
    needs: tuple[tuple[str, str], ...] = ()
    older: Older = ""
    by_convert: bool = False
    resumes: bool = False
    settings: tuple[str, ...] = ()
    tp_change: tuple[int, int] | None = None
    others: tuple[str, ...] = ()
    others_with_states: tuple[str, ...] = ()
    more: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sizes:
    """A tensor whose shape in the files differs from that in the model."""

    key: str
    stored: tuple[int, ...]
    wanted: tuple[int, ...]


@dataclass(slots=True)
class Message:
    """The parsed content of a pasted output.

    Attributes:
        text: The output without colors and prefixes.
        modules: The classes that were being loaded.
        missing: The missing keys, unchanged.
        unexpected: The unexpected keys, unchanged.
        sizes: Tensors with another shape.
    """

    text: str
    modules: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    sizes: list[Sizes] = field(default_factory=list)

    @property
    def keys(self) -> tuple[list[str], list[str]]:
        """The missing keys and the unexpected keys."""
        return self.missing, self.unexpected

    @property
    def by_transformers(self) -> bool:
        """Whether a model of transformers was being loaded, by its class or its keys."""
        if any(_HF_CLASS.match(name) for name in self.modules):
            return True
        keys = [*self.missing, *self.unexpected, *(size.key for size in self.sizes)]
        return bool(keys) and all(_HF_NAME.match(key) for key in keys)


def read_message(text: str) -> Message:
    """The keys and shapes of any mixture of the known forms."""
    text = _PREFIX.sub("", _ANSI.sub("", text.replace("\r\n", "\n").replace("\r", "\n")))
    message = Message(text, _MODULE.findall(text) + _REPORT.findall(text))
    keys = {"missing": message.missing, "unexpected": message.unexpected}
    for kind, listed in _STATE_DICT.findall(text):
        keys[kind.lower()] += _QUOTED.findall(listed)
    for kind, pattern in (("missing", _NEW), ("unexpected", _UNUSED)):
        for module, listed in pattern.findall(text):
            message.modules.append(module)
            keys[kind] += _QUOTED.findall(listed)
    for key, status, rest in _ROW.findall(text):
        if status != "MISMATCH":
            keys[status.lower()].append(key)
        elif sizes := _BOTH.search(rest):
            message.sizes.append(Sizes(key, _shape(sizes[1]), _shape(sizes[2])))
    for key, stored, wanted in _SIZES.findall(text):
        message.sizes.append(Sizes(key, _shape(stored), _shape(wanted)))
    return message


CONVERT = "neox-bridge convert CHECKPOINT NEW --to neox"
FIX = Command("neox-bridge doctor CHECKPOINT --fix NEW")
EXPORT = Command("neox-bridge convert CHECKPOINT NEW --to hf")
PATCH = Command("neox-bridge patch TREE   # lets the tree load both kinds")
PATCH_SCRIPTS = Command("neox-bridge patch TREE --scripts   # lets the scripts call neox-bridge")
OTHER_TP = Command(f"{CONVERT} --tp N   # N: the run's model_parallel_size")


def short(keys: list[str], ending: str) -> tuple[str, ...]:
    """The keys that end with a regular expression."""
    return tuple(key for key in keys if re.search(rf"(?:^|\.){ending}$", key))


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.replace(" ", "").split(",") if size)
