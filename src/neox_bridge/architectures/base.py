"""Models as data: weights, how ranks split them, and configs independent of either framework."""

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

    Attributes:
        place: The layer of GPT-NeoX that contains it: embeddings, a block, the final norm or the
            head.
        neox: Its name in that layer in today's GPT-NeoX.
        hf: Its name in Hugging Face files; ``{i}`` is the number of the block.
        split: How tensor parallelism splits it.
            column, vocab: its rows (dimension 0) over the ranks. row: its columns (dimension 1).
            replicated: not at all. row_bias: a bias of a row-parallel output, which the model sums
            over the ranks or replicates. fused, gated: Hugging Face's part of one GPT-NeoX tensor
            (q, k and v, or up and gate), with a row of the table for each part; see
            tensors/fused.py. zero: only GPT-NeoX has it; it is written as zeros, other values are
            refused, and ``hf`` is only a name for messages. derived: it is not a weight but follows
            from the config.
        shape: The names of its dimensions in Hugging Face files. ``ModelConfig.dims`` has their
            sizes.
        flag: The field of ``ModelConfig`` that says whether it exists; "" if it always does.
        part: The part of a fused or gated tensor.
        old: Its name in trees before neox-mlp-names, if that is another. The parts of a gated MLP
            were separate tensors there.
        also: Another name that files may have instead of ``neox``.
        trained: False for a buffer that GPT-NeoX saves. It has no optimizer states.
        blocks: The numbers of the blocks that have it; None for all.
        transposed: Whether the tensor of Hugging Face files that contains it has its dimensions in
            reverse order (Conv1D).
        first_row: The row of the tensor of Hugging Face files that is the first one here. The rows
            above it are the last ones here.
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
    transposed: bool = False
    first_row: int = 0

    def named(self, old: bool) -> str:
        """Its name in GPT-NeoX. old: whether in trees before 2024-09."""
        return self.old if old and self.old else self.neox

    def split_as(self, name: str) -> Split:
        """How ranks split the tensor of one of its names: w1 and w3 are column-parallel."""
        return "column" if self.split == "gated" and name == self.old else self.split

    @property
    def neox_only(self) -> bool:
        """Whether only the files of GPT-NeoX contain it."""
        return self.split in ("derived", "zero")

    @property
    def required(self) -> bool:
        """Whether the files of every model contain it, on both sides."""
        return not self.flag and not self.neox_only

    def is_in(self, config: "ModelConfig") -> bool:
        """Whether a model with this config has it."""
        return not self.flag or bool(getattr(config, self.flag))


# fields that do not change what the model computes, or that depend on the layout
_NO_MEANING = {"dims", "dtype", "bos_token_id", "eos_token_id", "initializer_range"}
_NO_MEANING |= {"hidden_dropout", "attention_dropout", "idle"}


@dataclass(frozen=True)
class ModelConfig:
    """The config of a model, independent of either framework, with the sizes of its tensors.

    Attributes:
        dims: The size of each dimension that the shapes of the weights name.
        activation: A name in the table of the architecture.
        kv_heads: The heads of k and v; None if there are as many as of q.
        window: How many tokens a query sees, including itself; None if it sees all before it.
        reward: Whether the model scores texts; see heads.py.
        conv_bias: Whether the convolution of a block without attention has a bias.
        idle: Fields that the frameworks require and that this family does not use.
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
        """The fields that decide what the model computes, without sizes, dtypes and training."""
        without = _NO_MEANING | self.idle
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in without}

    @property
    def untied(self) -> bool:
        """Whether it has an output layer that is separate from the embeddings."""
        return not self.tied_embeddings and not self.reward

    @property
    def head_layer(self) -> int:
        """The number of the output layer in GPT-NeoX (megatron/model/gpt2_model.py)."""
        return self.layers + 4

    @property
    def key_value_heads(self) -> int:
        """The heads of k and v."""
        return self.kv_heads or self.heads

    @property
    def grouped_query(self) -> bool:
        return self.key_value_heads != self.heads

    def fusion(self, order: GqaOrder, te: frozenset[str] = frozenset()) -> Fusion:
        """The order of the rows of fused tensors.

        Raises Refused if the query heads cannot share k and v evenly.
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
        """The number of rotated dimensions of a head."""
        return int(self.hidden // self.heads * self.rotary_pct)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something that the target does not support.

    Attributes:
        key: The key of the setting.
        reason: Why it is not supported.
        way_out: What to do instead, which must be valid wherever it is shown; "" if nothing helps.
        neox_only: Whether GPT-NeoX supports it and Hugging Face does not. Whether it can be written
            in another layout depends on the checkpoint; see ``way_out_of``.
    """

    key: str
    reason: str
    way_out: str = ""
    neox_only: bool = False


def refusals(
    checks: Iterable[tuple[str, bool, str]], *, way_out: str = "", neox_only: bool = False
) -> list[Refusal]:
    """The refusals of the checks that apply. A check: a key, whether it applies, and the reason."""
    return [Refusal(key, why, way_out, neox_only) for key, applies, why in checks if applies]


@dataclass(frozen=True, slots=True)
class About:
    """The description of a family in ``neox-bridge families`` and on its page.

    Attributes:
        models: The models of the family.
        proof: "fixture", "random" or "GPT-NeoX"; see page.py.
        note: What users should know.
    """

    models: str
    proof: str = "random"
    note: str = ""


@dataclass(frozen=True, slots=True)
class Form:
    """The format of another library than transformers for folders of a family.

    Its config.json has other keys, and its pytorch_model.bin is one state dict that also contains a
    tied head.

    Attributes:
        name: The value of ``--format``.
        library: The name of the library on the Hub.
        usage: The lines of Python that load a folder.
        names: Its names of tensors by their names in transformers, if they differ.
        lost: Keys of transformers' config.json that it does not have and that users would miss.
        matches: Whether a config.json is in this format.
        read: Converts its config.json to the keys of transformers.
        write: Returns its config.json, from the config of the model, transformers' config.json, the
            original config.json in this format ({} if there is none), and the number of vocabulary
            entries without padding.
        refuse: Returns what it does not support, from the config of the model and transformers'
            config.json.
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


def _heads(raw: Mapping[str, Any]) -> tuple[int, int]:
    heads = int(raw.get("num_attention_heads") or 1)
    return heads, int(raw.get("num_key_value_heads") or heads)


@dataclass(frozen=True, eq=False)
class Architecture:
    """One family of models, used in both directions.

    Attributes:
        name: The model_type of Hugging Face.
        hf_class: The class that config.json names.
        prefix: The start of most names in files of the whole model; those of the bare model do not
            have it.
        weights: The table of weights.
        dropped: Derived buffers by Hugging Face name, with ``{i}``, and why they are left out.
        aliases: The names in the table, by the other names that files use.
        write_neox: Returns the keys of the yml for the model; True for trees before neox-mlp-names.
        model_keys: The keys of a GPT-NeoX yml that describe the model and not its training.
        era_keys: The keys of them that have another meaning in trees of another time.
        always: Flags of ModelConfig whose weights the class of transformers always has.
        gated: Whether the MLP is gated, so that its width is a setting in every era.
        norm: The name of its norms in GPT-NeoX.
        findings_hf_source: Returns where config.json contradicts itself or known facts.
        findings_to_neox: Returns where GPT-NeoX computes something else, from config.json and the
            config of the written model.
        complete: Adds the defaults of transformers to a config.json if opening it depends on them.
        refuse_shape: Returns what GPT-NeoX does not support with this many tensor-parallel ranks,
            or in trees of an era.
        forms: The formats of other libraries.
        shared: GPT-NeoX's name of a parameter that all blocks of a pipeline stage share; "" if
            there is none; see pipeline_stages.with_owners.
        one_matrix: Whether trees before neox-mlp-names have its gated MLP as one matrix with
            biases, as ParallelMLP has geglu there.
        joined: The tensors of Hugging Face files that contain the rows of several weights: the
            names of these weights, in order, by the name of the tensor.
        joined_by_heads: Whether q, k and v of as many heads each are joined head by head, and not
            one behind the other.
        paired: The weights and biases of q and k if Hugging Face rotates neighboring pairs of a
            head's dimensions. GPT-NeoX rotates its two halves.
        hf_keys: The keys of its config.json, by their usual names, if they differ.
        hf_heads: Returns the numbers of query heads and of key-value heads from config.json, by
            which the rows of ``joined`` tensors are split.
        neox_only: Whether transformers has no such class, so that the model can only move between
            layouts of GPT-NeoX; see neox_only.py.
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
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    joined_by_heads: bool = False
    paired: frozenset[str] = frozenset()
    neox_only: bool = False
    shared: str = ""
    one_matrix: bool = False
    hf_keys: Mapping[str, str] = field(default_factory=dict)
    hf_heads: Callable[[Mapping[str, Any]], tuple[int, int]] = field(default=_heads)

    def has_llama_mlp(self, *, old: bool) -> bool:
        """Whether its MLP is a LLaMAParallelMLP, or today's gated one. old: see one_matrix."""
        return self.gated and not (old and self.one_matrix)

    def joined_name(self, name: str) -> str:
        """The name of the tensor of Hugging Face files that contains a weight."""
        return next((joined for joined, parts in self.joined.items() if name in parts), name)

    @property
    def has_rotary_buffer(self) -> bool:
        """Whether GPT-NeoX may store the rotary buffer in its blocks."""
        return any(weight.split == "derived" for weight in self.weights)

    @property
    def has_mlp(self) -> bool:
        return any(weight.neox.startswith("mlp.linear") for weight in self.weights)

    @property
    def embeddings(self) -> str:
        """The Hugging Face name of the input embeddings."""
        return next(weight.hf for weight in self.weights if weight.place == "embed")

    @property
    def head(self) -> str:
        """The Hugging Face name of the output layer."""
        return next(weight.hf for weight in self.weights if weight.place == "head")


def shared_reason(name: str) -> str:
    """Why a parameter that is shared (``Architecture.shared``) depends on the pipeline stages."""
    return f"each pipeline stage of GPT-NeoX trains one {name} for all of its blocks"


@dataclass(frozen=True, slots=True)
class Presence:
    """What the tensors show: which optional ones exist, and the most frequent dtype."""

    names: frozenset[str]
    dtype: str
    layers: int

    def has(self, name: str) -> bool:
        return name in self.names
