"""What a model is, as data: its weights, how ranks split them, and its config in neutral words."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Split = Literal["column", "row", "vocab", "replicated", "row_bias", "derived"]
Place = Literal["embed", "block", "norm", "head"]


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight on both sides.

    place: which of GPT-NeoX's layers holds it: embeddings, a block, the final norm, the head.
    neox: its name within that layer, as today's GPT-NeoX spells it.
    hf: its name in Hugging Face files; ``{i}`` is the block's number.
    split: what tensor parallelism does with it. column, vocab: rows (dimension 0) are spread over
        the ranks. row: columns (dimension 1) are. replicated: every rank holds all of it.
        row_bias: a bias added to a row-parallel output, summed over ranks or replicated,
        depending on the model. derived: no weight, computed from the config.
    shape: the names of its dimensions, Hugging Face's side; see ``Dims``.
    flag: the config's field that says whether it exists; "" where it always does.
    """

    place: Place
    neox: str
    hf: str
    split: Split
    shape: tuple[str, ...]
    flag: str = ""


@dataclass(frozen=True)
class ModelConfig:
    """A model's config in neutral words; sizes are those of the tensors.

    dims: the size of each dimension named in the weights' shapes.
    activation: a name of the architecture's own table.
    dropped_from_hf: nothing of it changes the model; see the architecture.
    """

    layers: int
    heads: int
    dims: Mapping[str, int]
    max_positions: int
    norm_eps: float
    rotary_pct: float
    rotary_base: float
    activation: str
    parallel_residual: bool
    tied_norms: bool
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    norm_bias: bool
    dtype: str
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    bos_token_id: int | None = 0
    eos_token_id: int | None = 0
    initializer_range: float = 0.02

    @property
    def hidden(self) -> int:
        return self.dims["hidden"]

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of a head."""
        return int(self.hidden // self.heads * self.rotary_pct)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something that the other side can't express: the key, why, and the way out."""

    key: str
    reason: str
    way_out: str


@dataclass(frozen=True)
class Architecture:
    """One family of models, used in both directions.

    hf_class, model_type: as Hugging Face's config.json names them.
    dropped: Hugging Face names of buffers that are derived, with ``{i}``, and why they go.
    aliases: other names that files use, mapped to ours.
    model_keys: the keys of a GPT-NeoX yml that say which model it is, not how it is trained.
    prefix: what precedes most names in files of the whole model, and isn't there in those of the
        bare one.
    """

    name: str
    hf_class: str
    model_type: str
    prefix: str
    weights: tuple[Weight, ...]
    dropped: Mapping[str, str]
    aliases: Mapping[str, str]
    read_hf: Callable[[Mapping[str, Any], Mapping[str, int], "Presence"], ModelConfig]
    write_hf: Callable[[ModelConfig], dict[str, Any]]
    read_neox: Callable[[Mapping[str, Any], Mapping[str, int], "Presence"], ModelConfig]
    write_neox: Callable[[ModelConfig], dict[str, Any]]
    refuse_hf_source: Callable[[Mapping[str, Any]], list[Refusal]]
    refuse_neox_source: Callable[[Mapping[str, Any]], list[Refusal]]
    matches_neox: Callable[[Mapping[str, Any]], bool]
    model_keys: frozenset[str]
    findings_hf_source: Callable[[Mapping[str, Any], ModelConfig], list[tuple[str, str, str]]] = (
        field(default=lambda _raw, _config: [])
    )


@dataclass(frozen=True, slots=True)
class Presence:
    """What the tensors themselves tell: which optional ones are there, and the dtype of most."""

    names: frozenset[str]
    dtype: str
    layers: int

    def has(self, name: str) -> bool:
        return name in self.names
