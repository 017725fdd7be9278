"""What a model is, as data: its weights, how ranks split them, and its config in neutral words."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from neox_bridge.errors import Refused
from neox_bridge.findings import Finding
from neox_bridge.tensors.fused import Fusion, GqaOrder, Part
from neox_bridge.tensors.geometry import Split

LayerKind = Literal["embed", "block", "norm", "head"]
INV_FREQ = "attention.rotary_emb.inv_freq"  # GPT-NeoX's name of the rotary buffer in a block


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight on both sides.

    place: which of GPT-NeoX's layers holds it: embeddings, a block, the final norm, the head.
    neox: its name within that layer, as today's GPT-NeoX spells it.
    hf: its name in Hugging Face files; ``{i}`` is the block's number.
    split: what tensor parallelism does with it. column, vocab: rows (dimension 0) are spread over
        the ranks. row: columns (dimension 1) are. replicated: every rank holds all of it.
        row_bias: a bias added to a row-parallel output, summed over ranks or replicated,
        depending on the model. fused, gated: Hugging Face's part of one GPT-NeoX tensor, q, k and v
        or up and gate; a row of the table for each part, see tensors/fused.py. zero: GPT-NeoX has
        it and Hugging Face hasn't: written as zeros, and refused where it is anything else; hf is
        then only the name for messages. derived: no weight, computed from the config.
    shape: the names of its dimensions, Hugging Face's side; ``ModelConfig.dims`` has their sizes.
    flag: the field of ``ModelConfig`` that says whether it exists; "" where it always does.
    part: which part of a fused or gated tensor it is.
    old: its name in trees before neox-mlp-names, where it is another; the parts of a gated MLP
        were tensors of their own there.
    also: a name that files may have in place of ``neox``.
    trained: False for a buffer that GPT-NeoX saves; the optimizer has no states of it.
    blocks: the numbers of the blocks that have it; None where all do.
    """

    place: LayerKind
    neox: str
    hf: str
    split: Split
    shape: tuple[str, ...]
    flag: str = ""
    part: Part = ""
    old: str = ""
    also: str = ""
    trained: bool = True
    blocks: frozenset[int] | None = None

    def named(self, old: bool) -> str:
        """Its GPT-NeoX name, in trees before 2024-09 or since then."""
        return self.old if old and self.old else self.neox

    def split_as(self, name: str) -> Split:
        """How ranks share it under one of its names: w1 and w3 were column-parallel each."""
        return "column" if self.split == "gated" and name == self.old else self.split

    @property
    def neox_only(self) -> bool:
        """Whether GPT-NeoX's files hold it and Hugging Face's do not."""
        return self.split in ("derived", "zero")

    @property
    def required(self) -> bool:
        """Whether the files of every model hold it, on both sides."""
        return not self.flag and not self.neox_only

    def is_in(self, config: "ModelConfig") -> bool:
        """Whether a model of this config has it."""
        return not self.flag or bool(getattr(config, self.flag))


# what doesn't change what the model computes, or follows from the way it is written
_NO_MEANING = {"dims", "dtype", "bos_token_id", "eos_token_id", "initializer_range"}
_NO_MEANING |= {"hidden_dropout", "attention_dropout", "idle"}


@dataclass(frozen=True)
class ModelConfig:
    """A model's config in neutral words; sizes are those of the tensors.

    dims: the size of each dimension named in the weights' shapes.
    activation: a name of the architecture's own table.
    kv_heads: None if k and v have as many heads as q.
    window: how many tokens a query sees, itself among them; None if it sees all before it.
    reward: whether it scores a text rather than continue it; see heads.py.
    conv_bias: whether the convolution of a block without attention has a bias.
    idle: fields that the frameworks ask for and this family computes nothing with.
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
    kv_heads: int | None = None
    window: int | None = None
    reward: bool = False
    conv_bias: bool = False
    idle: frozenset[str] = frozenset()

    def meaning(self) -> dict[str, object]:
        """What decides what the model computes: no sizes, dtypes, nor what only trains it."""
        without = _NO_MEANING | self.idle
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in without}

    @property
    def untied(self) -> bool:
        """Whether it has an output layer of its own."""
        return not self.tied_embeddings and not self.reward

    @property
    def head_layer(self) -> int:
        """GPT-NeoX's number of the last layer, the output (megatron/model/gpt2_model.py)."""
        return self.layers + 4

    @property
    def key_value_heads(self) -> int:
        """Heads of k and v: those of q, but for grouped-query attention."""
        return self.kv_heads or self.heads

    @property
    def grouped_query(self) -> bool:
        return self.key_value_heads != self.heads

    def fusion(self, order: GqaOrder, te: frozenset[str] = frozenset()) -> Fusion:
        """How the rows of fused tensors are ordered.

        Raises Refused if query heads can't share k and v evenly.
        """
        heads, kv_heads = self.heads, self.key_value_heads
        head_dim = self.hidden // heads
        if order == "interleaved" and "attention" not in te and head_dim * kv_heads % heads:
            raise Refused(
                f"num_kv_heads: {kv_heads} key-value heads of {head_dim} rows cannot be shared "
                f"by {heads} query heads in the interleaved order. Use `gqa_order=grouped` and a "
                "GPT-NeoX from 2024-11 or later (`era=today`)."
            )
        return Fusion(heads, kv_heads, order, te)

    @property
    def hidden(self) -> int:
        return self.dims["hidden"]

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of a head."""
        return int(self.hidden // self.heads * self.rotary_pct)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something that the target cannot express: the setting's key, and why.

    way_out: what to do instead, which must be true wherever it is shown; "" where nothing helps.
    neox_only: GPT-NeoX can hold it and Hugging Face cannot. Whether this version can write it in
        another layout depends on the checkpoint; see ``way_out_of``.
    """

    key: str
    reason: str
    way_out: str = ""
    neox_only: bool = False


def refusals(
    checks: Iterable[tuple[str, bool, str]], *, way_out: str = "", neox_only: bool = False
) -> list[Refusal]:
    """The refusals of the checks that apply: the setting's key, whether it applies, and why."""
    return [Refusal(key, why, way_out, neox_only) for key, applies, why in checks if applies]


@dataclass(frozen=True, slots=True)
class About:
    """A family for people: what ``neox-bridge families`` and its page say.

    models: which are of it. proof: "fixture", "random", "GPT-NeoX" (page.py). note: what to know.
    """

    models: str
    proof: str = "random"
    note: str = ""


@dataclass(frozen=True, slots=True)
class Form:
    """How another library than transformers has a family's folders.

    Its config.json has words of its own, and pytorch_model.bin is one state dict, in which a tied
    head stands as well.

    name: as ``--format`` has it. library, usage: its name on the Hub, and the lines of Python that
        load a folder.
    names: its own name of a tensor, by Hugging Face's, where it is another.
    lost: keys of transformers' config.json that it has no word for, and that users would miss.
    matches: whether a config.json is in its words. read: these in transformers' words.
    write: its config.json, of the model, of transformers' config.json, of what its own had been
        ({} where there was none), and of how many entries the vocabulary has without padding.
    refuse: what it can't express, of the model and of transformers' config.json.
    """

    name: str
    library: str
    usage: tuple[str, ...]
    names: Mapping[str, str]
    lost: tuple[str, ...]
    matches: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    write: Callable[[ModelConfig, Mapping[str, Any], Mapping[str, Any], int], dict[str, Any]]
    refuse: Callable[[ModelConfig, Mapping[str, Any]], list[Refusal]]


@dataclass(frozen=True, eq=False)
class Architecture:
    """One family of models, used in both directions.

    name: Hugging Face's model_type. hf_class: as config.json names it.
    dropped: Hugging Face names of buffers that are derived, with ``{i}``, and why they go.
    aliases: other names that files use, mapped to ours.
    model_keys: the keys of a GPT-NeoX yml that say which model it is, not how it is trained.
    prefix: what precedes most names in files of the whole model, and isn't there in those of the
        bare one.
    write_neox: the yml's keys for the model; True for a tree before neox-mlp-names.
    era_keys: those of them that mean something else in trees of another time.
    always: flags of ModelConfig whose weights transformers' class always has.
    gated: whether the MLP is gated, so that its width is its own in every era.
    norm: GPT-NeoX's word for its norms.
    findings_hf_source: where config.json contradicts itself or what is known.
    findings_to_neox: where GPT-NeoX computes otherwise, of config.json and the model that is
        written.
    complete: a config.json with what transformers takes for keys that lack, where that matters
        for opening it.
    refuse_shape: what GPT-NeoX can't do with this many tensor-parallel ranks, or in trees of an
        era by its name.
    forms: those of other libraries that are read and written.
    shared: GPT-NeoX's name of a parameter that all blocks of a pipeline stage share; "" for none.
        Its row of the first block is trained.
    one_matrix: whether trees before neox-mlp-names have its gated MLP as one matrix with biases, as
        ParallelMLP has geglu there.
    neox_only: whether transformers has no such class, so that it moves between GPT-NeoX layouts
        only; see neox_only.py.
    """

    name: str
    about: About
    hf_class: str
    prefix: str
    weights: tuple[Weight, ...]
    dropped: Mapping[str, str]
    aliases: Mapping[str, str]
    read_hf: Callable[[Mapping[str, Any], Mapping[str, int], "Presence"], ModelConfig]
    write_hf: Callable[[ModelConfig], dict[str, Any]]
    read_neox: Callable[[Mapping[str, Any], Mapping[str, int], "Presence"], ModelConfig]
    write_neox: Callable[[ModelConfig, bool], dict[str, Any]]
    refuse_hf_source: Callable[[Mapping[str, Any]], list[Refusal]]
    refuse_neox_source: Callable[[Mapping[str, Any]], list[Refusal]]
    matches_neox: Callable[[Mapping[str, Any]], bool]
    model_keys: frozenset[str]
    findings_hf_source: Callable[[Mapping[str, Any], ModelConfig], list[Finding]] = field(
        default=lambda _raw, _config: []
    )
    findings_to_neox: Callable[[Mapping[str, Any], ModelConfig], list[Finding]] = field(
        default=lambda _raw, _config: []
    )
    era_keys: frozenset[str] = frozenset()
    always: tuple[str, ...] = ()
    gated: bool = False
    norm: str = "layernorm"
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = field(default=lambda raw: raw)
    refuse_shape: Callable[[int, str], list[Refusal]] = field(default=lambda _tp, _era: [])
    forms: tuple[Form, ...] = ()
    neox_only: bool = False
    shared: str = ""
    one_matrix: bool = False

    def has_llama_mlp(self, *, old: bool) -> bool:
        """Whether its MLP is a LLaMAParallelMLP, or today's gated one. old: see one_matrix."""
        return self.gated and not (old and self.one_matrix)

    @property
    def has_mlp(self) -> bool:
        return any(weight.neox.startswith("mlp.linear") for weight in self.weights)

    @property
    def embeddings(self) -> str:
        """Hugging Face's name of the input embeddings."""
        return next(weight.hf for weight in self.weights if weight.place == "embed")

    @property
    def head(self) -> str:
        """Hugging Face's name of the output layer."""
        return next(weight.hf for weight in self.weights if weight.place == "head")


def shared_reason(name: str) -> str:
    """Why a parameter that is shared (``Architecture.shared``) depends on the pipeline stages."""
    return f"each pipeline stage of GPT-NeoX trains one {name} for all of its blocks"


@dataclass(frozen=True, slots=True)
class Presence:
    """What the tensors themselves tell: which optional ones are there, and the dtype of most."""

    names: frozenset[str]
    dtype: str
    layers: int

    def has(self, name: str) -> bool:
        return name in self.names
