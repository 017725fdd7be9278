"""An opened checkpoint of either kind: its tensors, its config, and other facts about it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from neox_bridge.architectures.base import Architecture, Form, ModelConfig, Refusal
from neox_bridge.architectures.rows import Row, model_rows, rows_by_name, table_rows
from neox_bridge.errors import Refused
from neox_bridge.findings import Dropped, Finding
from neox_bridge.formats.yml import DuplicateKey
from neox_bridge.frameworks.eras import InvFreq, MlpNames
from neox_bridge.frameworks.unknown_keys import UnknownKey
from neox_bridge.frameworks.writers import UNKNOWN, Writer
from neox_bridge.layouts.carried_names import CarriedFiles
from neox_bridge.layouts.derived_values import InvFreqMismatch
from neox_bridge.stores.paths import is_local
from neox_bridge.tensors.fused import GqaOrder
from neox_bridge.tensors.pieces import Whole
from neox_bridge.tensors.tensor_ref import TensorRef

Kind = Literal["hf", "neox"]
LayoutName = Literal["layers", "ranks"]
HeadChoice = Literal["keep", "tie"]
RECORD = "neox_bridge.json"


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor that is stored twice.

    Attributes:
        name: The name of both in the model.
        read: The copy in ``Checkpoint.tensors``.
        other: The other copy.
        read_as: The name of ``read`` in its file.
        other_as: The name of ``other`` in its file.
    """

    name: str
    read: TensorRef
    other: TensorRef
    read_as: str
    other_as: str


@dataclass(frozen=True, slots=True)
class NeoxState:
    """The layout of a GPT-NeoX checkpoint, and what else it contains.

    Attributes:
        root: The folder of the run, with ``latest``, the tokenizer and other steps. It is the
            folder of the step if the files are not in a run.
        folder: The folder with the files: an absolute path, or a URL.
        step: The name of that folder below the root. For flat files, the name in outputs:
            ``global_stepN``.
        iteration: The number of the step: ``iteration`` in the mp_rank files, else from the name.
        named_step: The number in the name of the folder or of the Hub's revision, or None. If it
            differs from ``iteration``, the name or the files belong to another step.
        configs: The yml files with its settings, as absolute paths or URLs.
        configs_given: Whether the user named them, so that later commands need them again.
        writer: The program that wrote the checkpoint, as far as its files show.
        args: The settings that GPT-NeoX compares when it loads.
        optimizer: The names of the optimizer state files, ordered by rank.
        gqa_order: The order in which q, k and v are read. Only grouped-query attention needs it.
        ranks: The tensors as stored: by tensor-parallel rank, layer number and name.
        gqa_order_known: Whether the files, the record or the user give that order.
        rms_eps: Whether its GPT-NeoX adds the epsilon of RMSNorm "inside" or "outside" the root.
        duplicate_keys: Keys that are set in two of its yml files.
        te: The modules of its blocks that were Transformer Engine's, "attention" or "mlp".
        universal: Whether it is a universal checkpoint of DeepSpeed. ``ranks`` then refers to its
            masters, with one rank if they are stored whole.
        dp: The data-parallel ranks according to the mp_rank files, or None.
        parts: The bytes of the tensors in ``ranks`` that ZeRO stage 3 keeps in parts.
        stored_wholes: The model's tensors as wholes of ``ranks``, if there are such parts.
        missing_ranks: The missing mp_rank files; see ``missing_files.missing_ranks``.
    """

    root: str
    folder: str
    step: str
    layout: LayoutName
    tp: int
    pp: int
    mlp_names: MlpNames
    inv_freq: InvFreq
    iteration: int
    args: Mapping[str, Any]
    ds_version: str
    optimizer: tuple[str, ...]
    named_step: int | None = None
    configs: tuple[str, ...] = ()
    configs_given: bool = False
    writer: Writer = UNKNOWN
    gqa_order: GqaOrder = "grouped"
    ranks: tuple[Mapping[int, Mapping[str, TensorRef]], ...] = ()
    te: frozenset[str] = frozenset()
    universal: bool = False
    gqa_order_known: bool = True
    rms_eps: Literal["inside", "outside"] = "inside"
    duplicate_keys: tuple[DuplicateKey, ...] = ()
    dp: int | None = None
    missing_ranks: tuple[str, ...] = ()
    parts: Mapping[TensorRef, Whole] = field(default_factory=dict)
    stored_wholes: Mapping[str, Whole] = field(default_factory=dict)

    @property
    def is_zero3(self) -> bool:
        """Whether it is of ZeRO stage 3, whose weights are in the optimizer state files."""
        return bool(self.parts)

    @property
    def flat(self) -> bool:
        """Whether the files are in the root itself, as in the raw checkpoints on the Hub."""
        return self.root == self.folder


@dataclass(frozen=True)
class Checkpoint:
    """A source, ready to be described or planned from. No tensor has been read.

    Attributes:
        tensors: The tensors by Hugging Face name.
        raw: config.json, or the merged yml with underscores in its keys.
        refusals: What the other kind cannot represent.
        record: The contents of its ``neox_bridge.json``, if this tool wrote it.
        tokenizer: Absolute paths of its tokenizer files.
        tokenizer_size: The number of entries of the tokenizer, if there is one.
        missing_tokenizer: The tokenizer path in the yml of a run, if that file is missing; see
            ``run_tokenizer.with_tokenizer``.
        hub_repo: ``org/name`` if the user named a repository on the Hub; "" for a folder.
        inv_freq_mismatch: A stored inv_freq that does not match the config.
        unknown_keys: Settings that no known version of the framework has.
        ignored_keys: Those of them that the user ignores, now or when this tool wrote it.
        form: The other library whose format a Hugging Face folder has; None for transformers.
        tied_head: An output head in the files although the config ties it to the embeddings, until
            ``head.decide_head`` compares the two. It is not in ``tensors``.
        head_choice: The choice of the user if that head differs from the embeddings.
        copies: Tensors that the files contain twice. ``tensors`` has the first of each.
        wrappers: Parts of the tensor names that do not belong to the model, such as ``_orig_mod.``.
        unindexed: Whether a Hugging Face folder has shards without their index file.
        index_findings: Those of ``findings`` about the index file and what it names.
        original_rows: The vocabulary rows before GPT-NeoX padded them, according to the yml of a
            run that has trained the padding since.
        carried: The license, the model card and other small texts beside the model.
        from_masters: Whether ``tensors`` are the fp32 master weights of the optimizer.
        source: What the caller named: a path, a URL, or a model on the Hub.
    """

    kind: Kind
    path: str
    architecture: Architecture
    config: ModelConfig
    raw: Mapping[str, Any]
    tensors: Mapping[str, Whole]
    files: tuple[str, ...]
    refusals: tuple[Refusal, ...] = ()
    dropped: tuple[Dropped, ...] = ()
    findings: tuple[Finding, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    neox: NeoxState | None = None
    tokenizer: tuple[str, ...] = ()
    tokenizer_size: int | None = None
    missing_tokenizer: str = ""
    hub_repo: str = ""
    generation: Mapping[str, Any] = field(default_factory=dict)
    revision: str = ""
    form: Form | None = None
    tied_head: Whole | None = None
    head_choice: HeadChoice | None = None
    copies: tuple[Copy, ...] = ()
    unknown_keys: tuple[UnknownKey, ...] = ()
    ignored_keys: frozenset[str] = frozenset()
    inv_freq_mismatch: InvFreqMismatch | None = None
    wrappers: tuple[str, ...] = ()
    original_rows: int | None = None
    unindexed: bool = False
    index_findings: tuple[Finding, ...] = ()
    from_masters: bool = False
    source: str = ""
    carried: CarriedFiles = field(default_factory=CarriedFiles)

    def to_json(self) -> dict[str, Any]:
        """The document of ``inspect --json``, without the keys for which tensors are read."""
        from neox_bridge.layouts.checkpoint_facts import facts_of

        return facts_of(self)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The weights of the model with both names, in the layer order of GPT-NeoX."""
        return model_rows(self.architecture, self.config)

    @property
    def table(self) -> tuple[Row, ...]:
        """All rows of the table of the family, including weights that this model does not have."""
        return table_rows(self.architecture, self.config.layers)

    @property
    def by_name(self) -> Mapping[str, Row]:
        """The rows of ``table`` by their Hugging Face names."""
        return rows_by_name(self.architecture, self.config.layers)

    @cached_property
    def trained(self) -> Mapping[str, Whole]:
        """The tensors that have optimizer states: all except buffers."""
        buffers = {row.hf for row in self.table if not row.weight.trained}
        return {name: whole for name, whole in self.tensors.items() if name not in buffers}

    @property
    def neox_state(self) -> NeoxState:
        """``neox`` of a checkpoint that is known to be a GPT-NeoX checkpoint."""
        assert self.neox is not None
        return self.neox

    @property
    def has_optimizer(self) -> bool:
        """Whether it has optimizer states, in separate files or in those of the weights."""
        return any(drop.kind == "optimizer" for drop in self.dropped)

    @property
    def size(self) -> int:
        """Bytes of the model's tensors, each counted once."""
        return sum(whole.nbytes for whole in self.tensors.values())

    @property
    def unpadded_rows(self) -> int:
        """The vocabulary rows before GPT-NeoX padded them, as far as that is recorded."""
        return min(self.vocab_rows, self.original_rows or self.vocab_rows)

    @property
    def vocab_rows(self) -> int:
        """The vocabulary rows without the zero padding that this tool added."""
        rows = self.config.dims["vocab"]
        return min(rows, int(self.record.get("vocab_size") or rows))


def config_options(checkpoint: Checkpoint) -> list[str]:
    """The options that make a command read the yml files that the user named."""
    state = checkpoint.neox
    given = state.configs if state is not None and state.configs_given else ()
    return [word for path in given for word in ("--config", path)]


def new_folder(path: str, ending: str) -> str:
    """The path of a new folder for the output of a command.

    It is beside the checkpoint. For a checkpoint in a store it is a name in the current folder.
    """
    path = path.rstrip("/")
    if not is_local(path):
        path = path.rpartition("/")[2].replace("@", "-").replace("%2F", "-")
    return f"{path}-{ending}"


def refuse_all(refusals: Iterable[Refusal], path: str, relayout: str = "") -> None:
    """Raise Refused with every reason, if there is one.

    relayout: see ``way_out_of``.
    """
    lines = []
    for refusal in refusals:
        end = "" if refusal.reason.endswith("?") else "."
        line = f"{refusal.key}: {refusal.reason}{end}"
        if way_out := way_out_of(refusal, relayout):
            line += f" Way out: {way_out}."
        lines.append(line)
    if lines:
        raise Refused(f"{path} cannot be converted. {' '.join(lines)}")


def way_out_of(refusal: Refusal, relayout: str) -> str:
    """What to do instead of what was refused; "" if nothing helps.

    relayout: the command that writes this checkpoint in another GPT-NeoX layout; "" if this version
        cannot.
    """
    if refusal.way_out or not refusal.neox_only:
        return refusal.way_out
    if relayout:
        return f"keep it in GPT-NeoX; {relayout} writes it in another layout"
    return "keep it in GPT-NeoX; this version cannot write it in another layout either"
