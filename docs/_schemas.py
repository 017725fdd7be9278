"""The JSON schemas of all documents that ``--json`` prints, from typed declarations.

A document is a ``TypedDict``, or a dataclass that is printed as it is. ``schemas`` writes a JSON
schema (draft 2020-12) of each. Descriptions come from the ``Attributes`` of the docstrings.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from neox_bridge.architectures.page import FamilyRow
from neox_bridge.batches.row import BatchRow
from neox_bridge.doctor.compare import Row
from neox_bridge.documents import SCHEMA_VERSION
from neox_bridge.findings import Finding
from neox_bridge.formats.pickle_security import Use
from neox_bridge.frameworks.suites import Suite
from neox_bridge.frameworks.unknown_keys import UnknownKey
from neox_bridge.hub.preview import PublishPreview
from neox_bridge.hub.publish import Published
from neox_bridge.layouts.carried_names import LeftFile
from neox_bridge.layouts.stored_model import Pattern
from neox_bridge.patch.places import Change
from neox_bridge.planning.casts import Cast
from neox_bridge.tensors.fused import GqaOrder
from neox_bridge.verification.compare import Difference
from neox_bridge.verification.logits import Cause, LoadChange, NonFinite
from neox_bridge.verification.runs import Fault
from neox_bridge.verification.sealed import FileChange
from neox_bridge.verification.statistics import Statistics

PACKAGE = Path(__file__).parents[1] / "src" / "neox_bridge"
Kind = Literal["hf", "neox"]
ReadBy = Literal["family", "names"]
Severity = Literal["info", "warning", "error"]


class Head(TypedDict):
    """What every document begins with.

    Attributes:
        schema_version: Grows when a key is renamed, removed or changes its meaning.
    """

    schema_version: int


class ShownFinding(TypedDict):
    """Something worth knowing.

    Attributes:
        code: A stable name for this kind of finding.
        message: What it is, as a sentence.
        remedy: What to do about it; may be empty.
    """

    code: str
    severity: Severity
    message: str
    remedy: str


class NameAndReason(TypedDict):
    """Something of the source that is not in the target, and why."""

    name: str
    reason: str


class Blank(TypedDict):
    """What the user has to fill in."""

    file: str
    key: str


class Remarks(TypedDict):
    """What a plan says beside its files.

    Attributes:
        carried: Small text files that are copied from beside the source's model.
    """

    dropped: list[NameAndReason]
    findings: list[ShownFinding]
    blanks: list[Blank]
    notes: list[str]
    carried: list[str]
    not_carried: list[LeftFile]


class _Side(TypedDict):
    kind: Kind


class Side(_Side, total=False):
    """A source or a target: what it is, and where.

    Attributes:
        path: As the user named it.
        tensor_parallel: Ranks that share each layer.
        pipeline_stages: 0 for the layout ranks.
    """

    path: str
    name: str
    revision: str
    format: str
    architecture: str
    iteration: int
    step: str
    layout: str
    tensor_parallel: int
    pipeline_stages: int
    data_parallel: int
    zero_stage: int
    optimizer: list[str]
    universal: bool
    mlp_names: str
    inv_freq: str
    transformer_engine: bool
    era: str
    gqa_order: GqaOrder
    dtype: str
    vocab_rows: int
    vocab_multiple: int
    parameters: int


class WrittenBytes(TypedDict):
    """What was written.

    Attributes:
        shared: Bytes that lie in blocks of the source's files (reflink) and take no space.
        copied: Bytes that moved unchanged.
        transformed: Bytes that were computed.
        kept: Bytes of files that a stopped run had finished.
    """

    target: str
    files: int
    size: int
    shared: int
    copied: int
    transformed: int
    kept: int
    seconds: float
    findings: list[Finding]


class Summary(TypedDict):
    """A plan in numbers.

    Attributes:
        peak_memory: An estimate, in bytes.
        dropped: How much was dropped, by reason.
    """

    files: int
    tensors: int
    parameters: int | None
    bytes: int
    bytes_copied: int
    bytes_transformed: int
    bytes_from_plan: int
    peak_memory: int
    dropped: dict[str, int]


class _Conversion(Head, Remarks):
    source: Side
    target: Side
    result: WrittenBytes
    summary: Summary
    casts: list[Cast]
    verified: bool | None


class Conversion(_Conversion, total=False):
    """What `convert`, `reshard`, `export-optimizer` or `toy` wrote.

    Attributes:
        verified: Whether the result was compared with the source; null if there is no source.
        published: What was uploaded, if the target is on the Hub.
    """

    published: Published


class AlreadyPublished(Head):
    """What `convert` says if the branch on the Hub already holds its result."""

    source: Side
    target: Side
    hub: PublishPreview
    published: None


class Batch(Head):
    """What `batch` did.

    Attributes:
        batch: The same as `target`.
        sources: As the user named them.
        target: As the user named it.
        holds: Whether every source could be read and no checkpoint failed.
        findings: What is wrong with the sources.
    """

    batch: str
    sources: list[str]
    target: str
    holds: bool
    findings: list[Fault]
    rows: list[BatchRow]


class BatchPlan(Head):
    """What `batch --dry-run` would do.

    Attributes:
        bytes: What would be written.
        rate: Bytes a second of a sample; null if none was taken.
        seconds: An estimate.
    """

    sources: list[str]
    target: str
    holds: bool
    findings: list[Fault]
    bytes: int
    rate: float | None
    seconds: float | None
    rows: list[BatchRow]


class Refusal(TypedDict):
    """Why the other format cannot express this checkpoint."""

    key: str
    reason: str
    way_out: str


class Quantization(TypedDict):
    """How a model is quantized."""

    method: str
    bits: int | None
    evidence: list[str]
    original: str | None


class Biases(TypedDict):
    """Which modules have biases."""

    attention: bool
    mlp: bool
    norm: bool


class OddWeights(TypedDict):
    """Weights of a dtype that not every conversion takes."""

    castable: bool
    count: int
    reason: str
    way_out: str


class ShownWriter(TypedDict):
    """What wrote a checkpoint; texts are empty if nothing tells."""

    program: str
    version: str
    span: str
    deepspeed: str
    deepspeed_version: str
    evidence: list[str]
    guessed: list[str]
    words: str


class ResumedBy(TypedDict):
    """What can resume optimizer states."""

    deepspeed: str
    data_parallel: int | str
    setting: str | None
    today: bool
    keeps_step: bool


class StatesFacts(TypedDict):
    """What kind of optimizer states the files hold."""

    kind: str
    zero_stage: int
    data_parallel: int
    intervals: list[int]
    deepspeed: str | None
    written_by: str
    resumed_by: ResumedBy
    complete: bool


class NeoxFacts(TypedDict):
    """How a GPT-NeoX checkpoint is laid out."""

    step: str
    iteration: int
    named_step: int | None
    flat: bool
    configs: list[str]
    configs_given: bool
    writer: ShownWriter
    era: str
    era_span: str
    mlp_names: str
    inv_freq: str
    layout: str
    tensor_parallel: int
    pipeline_stages: int
    universal: bool
    zero_stage: int | None
    optimizer: list[str]
    optimizer_states: StatesFacts | None
    deepspeed: str | None


class Shard(TypedDict):
    """Where a part of a tensor lies. offset: in bytes."""

    file: str
    offset: int
    shape: list[int]


class ListedTensor(TypedDict):
    """A tensor and where it is stored."""

    name: str
    dtype: str
    shape: list[int]
    reduce: str
    shards: list[Shard]


class _Inspection(Head):
    kind: Kind
    path: str
    revision: str | None
    read_by: Literal["family"]
    family: str
    format: str | None
    neox: NeoxFacts | None
    parameters: int
    dtype: str
    dtypes: dict[str, int]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab_rows: int
    tokenizer_size: int | None
    tokenizer: list[str]
    max_positions: int
    rotary_dim: int
    rotary_pct: float
    rotary_base: float
    activation: str
    norm_eps: float
    parallel_residual: bool
    tied_norms: bool
    tied_embeddings: bool
    biases: Biases
    files: list[str]
    bytes: int
    written_by: str | None
    has_optimizer: bool
    dropped: list[NameAndReason]
    unknown_keys: list[UnknownKey]
    stored_head: str | None
    findings: list[ShownFinding]
    refusals: list[Refusal]
    quantization: None
    odd_weights: list[OddWeights]


class Inspection(_Inspection, total=False):
    """What `inspect` says of a checkpoint.

    Attributes:
        path: The absolute path, or the URL.
        neox: For a GPT-NeoX checkpoint.
        tensors: With --tensors.
        stats: With --stats.
        optimizer: With --optimizer: what optimizer.json of export-optimizer has.
    """

    tensors: list[ListedTensor]
    stats: list[Statistics]
    optimizer: dict[str, Any]


class StoredShard(TypedDict):
    """Where a tensor is stored. bytes: of all its elements."""

    file: str
    offset: int
    bytes: int
    shape: list[int]


class StoredListedTensor(TypedDict):
    """A tensor as it is stored.

    Attributes:
        dtype: The name in torch, or the name in the file if it cannot be decoded.
        decoded: Whether its values can be read.
    """

    name: str
    dtype: str
    shape: list[int]
    decoded: bool
    shards: list[StoredShard]


class StoredComponent(TypedDict):
    """One set of weight files.

    Attributes:
        name: What its tensors are called after: "" for the main weights.
        tensors: How many it has.
        model: The class of the model, if its config names it.
    """

    name: str
    folder: str
    files: list[str]
    index: str | None
    tensors: int
    bytes: int
    model: str | None


class _Stored(Head):
    kind: Kind
    path: str
    revision: str | None
    read_by: Literal["names"]
    family: str | None
    settings: dict[str, Any]
    parameters: int
    dtypes: dict[str, int]
    tensor_count: int
    components: list[StoredComponent]
    patterns: list[Pattern]
    files: list[str]
    bytes: int
    tokenizer: list[str]
    findings: list[ShownFinding]
    refusals: list[Refusal]
    quantization: Quantization | None


class StoredInspection(_Stored, total=False):
    """What `inspect` says of a model of no known family, or of a quantized one.

    Attributes:
        family: ``model_type`` of its config.json.
        settings: Some keys of its config.json.
        tensors: With --tensors.
        stats: With --stats.
    """

    tensors: list[StoredListedTensor]
    stats: list[Statistics]


class ScannedFile(TypedDict):
    """A file that may hold pickles.

    Attributes:
        absent: Why its contents are not here.
        problem: Why it was not read to its end.
    """

    file: str
    container: str
    pickles: int
    harmless: bool
    problem: str | None
    absent: str | None
    names: list[Use]


class Security(Head):
    """What `inspect --security` found."""

    path: str
    harmless: bool
    files: list[ScannedFile]


class LogitsAgreement(TypedDict):
    """How near the logits of both models are.

    Attributes:
        largest: The largest absolute difference.
        relative: That, divided by the largest logit.
        kl: Mean divergence over the tokens, in nats.
        top1: The share of tokens whose likeliest next token is the same.
        place: The first layer and part that differ; empty if none does.
    """

    agrees: bool
    comparable: bool
    tokens: int
    largest: float
    mean: float
    relative: float
    kl: float
    top1: float
    place: str
    apart: float
    causes: list[Cause]
    explained: bool
    non_finite: NonFinite | None
    load_changes: list[LoadChange]


class _Verification(Head):
    source: str
    target: str
    tensors: int
    size: int
    differences: list[Difference]
    findings: list[Finding]
    casts: list[Cast]
    overflows: dict[str, int]
    read_by: ReadBy
    verdict: str
    holds: bool


class Verification(_Verification, total=False):
    """What `verify SRC DST` found.

    Attributes:
        source: SRC as the user named it.
        target: DST as the user named it.
        tensors: How many tensors the target has.
        size: Bytes of the target's tensors.
        differences: Differences, without the declared changes of a conversion.
        overflows: Finite values that became infinite in a cast, by tensor.
        read_by: Whether both were read with the knowledge of a family, or by names as stored.
        holds: Whether the target equals the source.
        logits: With --logits.
        recorded: With --tokens that have logits.
    """

    logits: LogitsAgreement
    recorded: LogitsAgreement


class Seal(Head):
    """What `verify PATH` found: whether an output is as it was written.

    Attributes:
        source: PATH as the user named it.
        record: The file with the hashes.
        unhashed: Files whose size alone is known.
    """

    source: str
    target: None
    record: str
    files: int
    size: int
    unhashed: int
    changes: list[FileChange]
    holds: bool


class Diff(Head):
    """What `diff` found.

    Attributes:
        first: A as the user named it.
        second: B as the user named it.
        read_by: Whether both were read with the knowledge of a family, or by names as stored.
        tensors: Every tensor of either, largest relative difference first.
    """

    first: str
    second: str
    read_by: ReadBy
    equal: bool
    tensors: list[Difference]


class AuditedTensor(TypedDict):
    """A tensor of a step.

    Attributes:
        norm: Null if its values cannot be decoded.
        bad: How many values are not finite.
    """

    hash: str
    norm: float | None
    shape: list[int]
    bad: int


class AuditedState(TypedDict):
    """An optimizer state of a step."""

    hash: str
    norm: float
    bad: int


class AuditedOptimizer(TypedDict):
    """The optimizer states of a step."""

    updates: list[int]
    states: dict[str, AuditedState]


class _AuditedStep(TypedDict):
    run: str
    step: int | None
    label: str
    path: str
    kind: Kind
    read_by: ReadBy
    tensor_parallel: int
    dtype: str
    bytes: int
    hash: str
    norm: float
    read: int
    verdict: str
    tensors: dict[str, AuditedTensor]


class AuditedStep(_AuditedStep, total=False):
    """A step of a run.

    Attributes:
        step: Null if nothing tells its number.
        read_by: Whether a family or only the names in the files say which tensors there are.
        read: How many tensors were read; the others were in the cache.
        optimizer: With --optimizer.
    """

    optimizer: AuditedOptimizer


class AuditFinding(TypedDict):
    """What is wrong, in which run, at which steps, in which tensors."""

    code: str
    severity: Severity
    message: str
    remedy: str
    run: str
    steps: list[str]
    tensors: list[str]


class Audit(Head):
    """What `audit` found.

    Attributes:
        sources: As the user named them.
        holds: Whether nothing is wrong.
    """

    sources: list[str]
    holds: bool
    findings: list[AuditFinding]
    steps: list[AuditedStep]


class DiagnosedFinding(ShownFinding):
    """A finding of doctor.

    Attributes:
        prints: What the framework prints; null if nothing.
        silent: Whether the checkpoint loads without a message, as another model.
        command: The remedy, if it is a command that runs as it is.
        missing: Tensors that the framework expects and the checkpoint does not have.
        unexpected: Tensors that the checkpoint has and the framework does not expect.
        wrong: Tensors and settings that differ, with both values.
        layers: In how many layers; 0 if unknown.
        where: The file and line of the framework's source that decides it.
        why: The cause; empty if the message is the cause.
        others: Other ways to fix it.
        more: Links.
    """

    prints: str | None
    silent: bool
    command: str
    missing: list[str]
    unexpected: list[str]
    wrong: list[str]
    layers: int
    where: str
    why: str
    others: list[str]
    more: list[str]


class _Judgement(TypedDict):
    target: str
    framework: str
    verdict: str
    message: str | None


class Judgement(_Judgement, total=False):
    """Whether one framework loads the checkpoint."""

    findings: list[DiagnosedFinding]


class _Diagnosed(TypedDict):
    path: str
    kind: Kind
    read_by: ReadBy
    loads: bool
    findings: list[DiagnosedFinding]
    verdicts: list[Judgement]


class Diagnosed(_Diagnosed, total=False):
    """What `doctor` says of one checkpoint.

    Attributes:
        read_by: Whether the knowledge of a family was used, or only names, shapes and settings.
    """

    comparison: list[Row]


class _Diagnosis(Head):
    paths: list[str]


class Diagnosis(_Diagnosis, total=False):
    """What `doctor` found, and what it wrote.

    Attributes:
        paths: As the user named them.
        error: With --error: the causes that were recognized.
        advice: With --error: the keys, the steps that fix it, and which of them are commands.
        fixed: With --fix or --in-place; null if there was nothing to fix.
    """

    checkpoints: list[Diagnosed]
    error: list[dict[str, Any]]
    advice: dict[str, Any]
    fixed: dict[str, Any] | None


class PatchedFile(TypedDict):
    """A source file that was changed, or would be."""

    path: str
    changes: list[Change]
    diff: str


class Patch(Head):
    """What `patch` did, or would do. written: whether files were changed."""

    tree: str
    action: Literal["patch", "revert"]
    written: bool
    files: list[PatchedFile]


class ListedChange(TypedDict):
    """A change of a framework. loud: whether it ends in an error. proposed: not merged."""

    id: str
    framework: str
    commit: str | None
    pull: str | None
    date: str
    version: str | None
    families: list[str]
    title: str
    symptom: str
    proposed: bool
    loud: bool
    remedy: str
    link: str


class Changes(Head):
    """What `changes` lists. path: the checkpoint of --for."""

    path: str | None
    changes: list[ListedChange]


class Families(Head):
    """What `families` lists. refused: families that GPT-NeoX cannot run, and why."""

    families: list[FamilyRow]
    refused: dict[str, str]
    suites: list[Suite]


class ReportSection(TypedDict):
    """A section of the page."""

    kind: str
    title: str
    state: str
    words: str


class Report(Head):
    """What `report` wrote.

    Attributes:
        path: The page.
        paths: What it shows, as the user named it.
        source: --source.
    """

    path: str
    paths: list[str]
    source: str | None
    state: str
    words: str
    sections: list[ReportSection]


# name of the schema: the commands that print the document, and its declaration
DOCUMENTS: dict[str, tuple[str, type]] = {
    "conversion": (
        "`convert`, `reshard`, `export-optimizer`, `toy`: what was written",
        Conversion,
    ),
    "published": ("`convert` to the Hub if the branch already holds the result", AlreadyPublished),
    "batch": ("`batch`: what became of each checkpoint", Batch),
    "batch-plan": ("`batch --dry-run`", BatchPlan),
    "inspect": ("`inspect`", Inspection),
    "inspect-stored": ("`inspect` of a model of any other family", StoredInspection),
    "inspect-security": ("`inspect --security`", Security),
    "verify": ("`verify SRC DST`", Verification),
    "verify-record": ("`verify PATH`", Seal),
    "diff": ("`diff`", Diff),
    "audit": ("`audit`", Audit),
    "doctor": ("`doctor`", Diagnosis),
    "patch": ("`patch`", Patch),
    "changes": ("`changes`", Changes),
    "families": ("`families`", Families),
    "report": ("`report`", Report),
}
# schemas that stand in the package: the same, and the file
WRITTEN = {
    "plan": (
        "`--dry-run` of `convert`, `reshard` and `export-optimizer`: every output file, tensor and "
        "byte range",
        PACKAGE / "planning" / "plan.schema.json",
    ),
    "against": (
        "`audit --against`: the verdict for each step, and every tensor that differs",
        PACKAGE / "verification" / "against.schema.json",
    ),
}


def schemas() -> dict[str, dict[str, Any]]:
    """Every schema by its name."""
    written = {name: json.loads(path.read_text("utf-8")) for name, (_, path) in WRITTEN.items()}
    return written | {name: _schema(name, kind) for name, (_, kind) in DOCUMENTS.items()}


def table() -> str:
    """The table of all documents and their schemas, for the page."""
    texts = {name: text for name, (text, _) in (*WRITTEN.items(), *DOCUMENTS.items())}
    rows = [
        f"| {text} | [{name}.schema.json]({name}.schema.json) |" for name, text in texts.items()
    ]
    return "\n".join(["| document of | schema |", "|---|---|", *rows])


def _schema(name: str, kind: type) -> dict[str, Any]:
    definitions: dict[str, Any] = {}
    reference = _reference(kind, definitions)["$ref"]
    body = definitions.pop(reference.rpartition("/")[2])
    body["properties"]["schema_version"] = {
        **body["properties"]["schema_version"],
        "const": SCHEMA_VERSION,
        "description": _attributes(Head)["schema_version"],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:neox-bridge:{name}.schema.json",
        "title": f"neox-bridge {name}",
        **body,
        "$defs": definitions,
    }


def _reference(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    """A reference to the schema of a class, which is added to the definitions."""
    if kind.__name__ not in definitions:
        body = definitions[kind.__name__] = {}
        hints = get_type_hints(kind)
        names = [entry.name for entry in fields(kind)] if is_dataclass(kind) else list(hints)
        texts = _attributes(kind)
        required = names if is_dataclass(kind) else sorted(kind.__required_keys__)  # type: ignore[attr-defined]
        body |= {
            "type": "object",
            "description": _summary(kind),
            "required": [name for name in names if name in required],
            "properties": {
                name: _typed(hints[name], definitions)
                | ({"description": texts[name]} if name in texts else {})
                for name in names
            },
        }
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _typed(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, UnionType):
        return {"anyOf": [_typed(one, definitions) for one in arguments]}
    if origin is list or (origin is tuple and arguments[1:] == (...,)) or origin is Sequence:
        return {"type": "array", "items": _typed(arguments[0], definitions)}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _typed(arguments[1], definitions)}
    if hint is float:
        return _number(definitions)
    if is_dataclass(hint) or is_typeddict(hint):
        return _reference(hint, definitions)
    names = {str: "string", int: "integer", bool: "boolean", NoneType: "null", None: "null"}
    return {"type": names[hint]}


def _number(definitions: dict[str, Any]) -> dict[str, Any]:
    definitions["Number"] = {
        "description": "null for NaN",
        "anyOf": [{"type": ["number", "null"]}, {"enum": ["Infinity", "-Infinity"]}],
    }
    return {"$ref": "#/$defs/Number"}


def _summary(kind: type) -> str:
    return (kind.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")


def _attributes(kind: type) -> dict[str, str]:
    """What the docstring of a class says of each field."""
    section = (kind.__doc__ or "").partition("Attributes:\n")[2]
    texts = re.findall(r"^ {8}(\w+): (.+(?:\n {12,}.+)*)", section, re.M)
    return {name: " ".join(text.split()) for name, text in texts}
