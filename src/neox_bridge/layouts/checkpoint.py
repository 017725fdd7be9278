"""An opened source of either kind: its tensors as wholes, its config, what it says of itself."""

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

    name: what both are called in the model. read: the one that ``Checkpoint.tensors`` has. other:
        the second one. read_as, other_as: their names in the files.
    """

    name: str
    read: TensorRef
    other: TensorRef
    read_as: str
    other_as: str


@dataclass(frozen=True, slots=True)
class NeoxState:
    """How a GPT-NeoX checkpoint is laid out, and what else it holds.

    root: the run's folder, where ``latest``, the tokenizer and other steps lie; the step's own
        folder where the files lie flat in it and nothing above it is the checkpoint's.
    folder: the one with the files: an absolute path, or a URL.
    step: the name of that folder below the root; of flat files the one that outputs give it,
        ``global_stepN``.
    iteration: the number of the step, of ``iteration`` in the mp_rank files, else of the name.
    named_step: the number that the folder's name or the Hub's revision tells; None where neither
        tells one. Where it differs from ``iteration``, the name or the files are another step's.
    configs: the yml files that its settings were read from, as absolute paths or URLs.
    configs_given: whether the user named them, so that another command needs them again.
    writer: the program that wrote it, as far as its files tell.
    args: what GPT-NeoX compares at load.
    optimizer: the names of the files of optimizer states, in the order of their ranks.
    gqa_order: in which order q, k and v are read; it matters for grouped-query attention only.
    ranks: the tensors as they are stored: by tensor-parallel rank, by GPT-NeoX's number of the
        layer, by their names in it.
    gqa_order_known: whether the files, the record or the user tell that order.
    rms_eps: whether its GPT-NeoX adds RMSNorm's epsilon "inside" the root or "outside".
    duplicate_keys: those that stand in two of its yml files.
    te: which modules of its blocks were Transformer Engine's, "attention" or "mlp".
    universal: whether it is DeepSpeed's universal checkpoint; ``ranks`` are then of its masters,
        one where they lie there whole.
    dp: data-parallel ranks of the run, as the mp_rank files tell it; None where they do not.
    missing_ranks: the mp_rank files that are missing; see ``missing_files.missing_ranks``.
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

    @property
    def flat(self) -> bool:
        """Whether the files lie in the root itself, as the Hub's raw checkpoints have them."""
        return self.root == self.folder


@dataclass(frozen=True)
class Checkpoint:
    """A source, ready to be described or planned from; no tensor has been read.

    tensors: by Hugging Face name. raw: config.json, or the merged yml with underscore keys.
    refusals: what the other kind can't express of it.
    record: what ``neox_bridge.json`` in it says, for sources that this tool wrote.
    tokenizer: absolute paths of tokenizer files that came with it.
    tokenizer_size: entries of the tokenizer, where one was found.
    missing_tokenizer: the path of the tokenizer as a run's yml names it, where that file is not
        there; see ``run_tokenizer.with_tokenizer``.
    hub_repo: ``org/name`` where the user named a repository of the Hub; "" for a folder.
    inv_freq_mismatch: where a stored inv_freq is not what the config gives.
    unknown_keys: settings that no known version of the framework has.
    ignored_keys: those of them that a user said do not matter, now or when this tool wrote it.
    form: the other library's in which a Hugging Face folder is; None for transformers'.
    tied_head: an output head that the files hold although the config ties it to the embeddings,
        until ``head.decide_head`` compares the two. It isn't among ``tensors``.
    head_choice: what the user chose where that head differs from the embeddings.
    copies: tensors that the files hold twice; ``tensors`` has the first of each.
    wrappers: what stands in the files' names of tensors and is no part of the model, such as
        ``_orig_mod.``.
    unindexed: whether a Hugging Face folder has shards without their index file.
    original_rows: the rows of the vocabulary before GPT-NeoX padded it, as the yml of a run tells
        that has trained the padding since.
    from_masters: whether ``tensors`` are the optimizer's fp32 masters and not the stored weights.
    source: what the caller named: a path, a URL, or a model of the Hub.
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
    from_masters: bool = False
    source: str = ""

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Its weights, each with its name on both sides, in the order of GPT-NeoX's layers."""
        return model_rows(self.architecture, self.config)

    @property
    def table(self) -> tuple[Row, ...]:
        """Every row of the family's table, also of weights and buffers that it does not have."""
        return table_rows(self.architecture, self.config.layers)

    @property
    def by_name(self) -> Mapping[str, Row]:
        """The rows of ``table`` by their Hugging Face names."""
        return rows_by_name(self.architecture, self.config.layers)

    @property
    def neox_state(self) -> NeoxState:
        """``neox`` of what is known to be a GPT-NeoX checkpoint."""
        assert self.neox is not None
        return self.neox

    @property
    def has_optimizer(self) -> bool:
        """Whether it holds optimizer states, in files of their own or beside the weights."""
        return any(drop.kind == "optimizer" for drop in self.dropped)

    @property
    def size(self) -> int:
        """Bytes of the model's tensors, each counted once."""
        return sum(whole.nbytes for whole in self.tensors.values())

    @property
    def unpadded_rows(self) -> int:
        """The rows that the model had before GPT-NeoX padded them, as far as that is recorded."""
        return min(self.vocab_rows, self.original_rows or self.vocab_rows)

    @property
    def vocab_rows(self) -> int:
        """The vocabulary's rows, without the padding that this tool added as zeros."""
        rows = self.config.dims["vocab"]
        return min(rows, int(self.record.get("vocab_size") or rows))


def config_options(checkpoint: Checkpoint) -> list[str]:
    """The options of a command that opens this checkpoint again with the ymls that a user named."""
    state = checkpoint.neox
    given = state.configs if state is not None and state.configs_given else ()
    return [word for path in given for word in ("--config", path)]


def new_folder(path: str, ending: str) -> str:
    """The path of a new folder for what a command makes of the checkpoint at a path.

    It lies beside the checkpoint; for one in a store it is a name in the current folder.
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
        raise Refused(f"{path} can't be converted. {' '.join(lines)}")


def way_out_of(refusal: Refusal, relayout: str) -> str:
    """What to do instead of what was refused; "" where nothing helps.

    relayout: the command that writes this very checkpoint in another GPT-NeoX layout; "" where
        this version cannot.
    """
    if refusal.way_out or not refusal.neox_only:
        return refusal.way_out
    if relayout:
        return f"keep it in GPT-NeoX; {relayout} writes it in another layout"
    return "keep it in GPT-NeoX; this version cannot write it in another layout either"
