"""Which GPT-NeoX tree printed a message, as far as its keys, its frames and the checkpoint tell."""

import re
from dataclasses import dataclass

from neox_bridge.doctor.messages import Message, short
from neox_bridge.frameworks.eras import FLAG, LATER_ERAS, TODAY, InvFreq, MlpNames, known_keys
from neox_bridge.frameworks.source_tree import looks_like_tree
from neox_bridge.layouts.checkpoint import Checkpoint

_FRAME = re.compile(r'File "(/[^"\n]+?)/(?:megatron/|train\.py|generate\.py|deepy\.py)')
_DENSE = r"mlp\.(?:dense_h_to_4h|dense_4h_to_h|w[123])\.\w+"
# where several trees print the same: the user has to name it
ANY_TREE = "neox:TREE"


@dataclass(frozen=True, slots=True)
class Expected:
    """What a tree expects of a checkpoint, None where the message does not tell.

    names: of the MLP. buffer: whether its state dict has inv_freq. unknown_key: a yml key that it
    refuses.
    """

    names: MlpNames | None = None
    buffer: InvFreq | None = None
    unknown_key: str | None = None

    def __bool__(self) -> bool:
        return any((self.names, self.buffer, self.unknown_key))


def expected_by(message: Message) -> Expected:
    """What the tree that printed a message expects."""
    if message.by_transformers:
        return Expected()
    missing, unexpected = message.keys
    names: MlpNames | None = None
    if short(missing, _DENSE):
        names = "dense"
    elif short(unexpected, _DENSE):
        names = "linear"
    buffer: InvFreq | None = None
    if short(missing, r"rotary_emb\.inv_freq"):
        buffer = "store"
    elif short(unexpected, r"rotary_emb\.inv_freq"):
        buffer = "omit"
    key = None
    if "NeoXArgs" in message.text or "neox_arguments" in message.text:
        match = re.search(r"got an unexpected keyword argument '(\w+)'", message.text)
        key = match[1] if match else None
    return Expected(names, buffer, key)


def tree_in(text: str) -> str | None:
    """The source tree whose frames stand in a traceback, where it lies on this machine."""
    paths = dict.fromkeys(_FRAME.findall(text))
    return next((path for path in paths if looks_like_tree(path)), None)


def convert_options(expected: Expected, checkpoint: Checkpoint | None) -> dict[str, str]:
    """The options of ``convert`` whose result such a tree loads; empty where none is known to help.

    A tree with the old names that stores the buffer is one before 2024-03-04; one from then to
    2024-09 stores it only where its yml says rotary_save_freqs_buffer, which changes no file.
    """
    state = checkpoint.neox if checkpoint is not None else None
    names, buffer = expected.names, expected.buffer
    if key := expected.unknown_key:
        refusing = [era for era in LATER_ERAS if key not in known_keys(era)]
        if len(refusing) == len(LATER_ERAS) or not refusing:
            return {}  # of a fork, or of no tree at all
        newest = refusing[-1]
        grouped = checkpoint is not None and checkpoint.config.grouped_query
        alike = newest is TODAY and refusing[0].mlp_names == "linear" and not grouped
        spelled = "today" if newest is TODAY else f"neox@{newest.name}"
        return {"for": spelled if len(refusing) == 1 or alike else ANY_TREE}
    if names is None and buffer is None:
        return {}
    if names is None and state is not None and state.mlp_names == "linear":
        return {"inv-freq": buffer or state.inv_freq}  # keeps the rest, also the order of rows
    if names is None and buffer == "omit" and state is None:
        return {"inv-freq": "omit"}  # keeps the names, whichever they are
    names = names or "dense"
    if names == "dense" and checkpoint is not None and FLAG in checkpoint.raw:
        return {"for": "neox@2024-09"}  # the tree took the yml with that key
    buffer = buffer or (state.inv_freq if state is not None else "omit")
    if names == "dense":
        return {"for": "neox@2024-03" if buffer == "store" else "neox@2024-09"}
    return {"for": "today"} if buffer == "omit" else {"for": "today", "inv-freq": "store"}
