"""What a GPT-NeoX tree or a transformers version expects of a checkpoint, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from neox_bridge.frameworks.eras import Era


@dataclass(frozen=True, slots=True)
class TreeFacts(Era):
    """One GPT-NeoX source tree: an era of its own, named by its path or as "neox@2024-03".

    Attributes:
        args_checked: Keys of a checkpoint's args that are compared at load.
        places: Where each fact stands in the source, "file:line", for messages.
    """

    keys: frozenset[str] = frozenset()
    args_checked: tuple[str, ...] = ()
    places: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class TransformersFacts:
    """A version of transformers. ``targets.knows`` tells whether it has other changes.

    Attributes:
        version: Such as "4.48.3".
        persistent_inv_freq: Whether the buffer of gpt_neox is in the state dict. A file without it
            loads too, with a warning at most.
        rope_parameters: Whether config.json's new spelling is read.
        loses_rotary_pct: Whether saves lose any fraction other than 0.25.
    """

    version: str
    persistent_inv_freq: bool
    rope_parameters: bool
    loses_rotary_pct: bool
