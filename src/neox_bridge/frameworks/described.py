"""What the detectors of known changes read of an opened checkpoint.

``layouts.checkpoint.Checkpoint`` has all of it; the protocols let this room stay below that one.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from neox_bridge.findings import Dropped


class DescribedConfig(Protocol):
    """The neutral settings of a model; see ``architectures.base.ModelConfig``."""

    @property
    def attention_bias(self) -> bool: ...
    @property
    def dims(self) -> Mapping[str, int]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def hidden(self) -> int: ...
    @property
    def mlp_bias(self) -> bool: ...
    @property
    def parallel_residual(self) -> bool: ...
    @property
    def tied_embeddings(self) -> bool: ...


class DescribedRun(Protocol):
    """The GPT-NeoX side of a checkpoint; see ``layouts.checkpoint.NeoxState``."""

    @property
    def ds_version(self) -> str: ...
    @property
    def layout(self) -> str: ...
    @property
    def optimizer(self) -> Sequence[str]: ...
    @property
    def tp(self) -> int: ...


class Described(Protocol):
    """An opened checkpoint of either kind."""

    @property
    def kind(self) -> Literal["hf", "neox"]: ...
    @property
    def raw(self) -> Mapping[str, Any]: ...
    @property
    def files(self) -> Sequence[str]: ...
    @property
    def dropped(self) -> Sequence[Dropped]: ...
    @property
    def config(self) -> DescribedConfig: ...
    @property
    def neox(self) -> DescribedRun | None: ...
