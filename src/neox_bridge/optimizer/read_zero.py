"""Reads optimizer states of ZeRO stages 1 and 2, in every format that DeepSpeed has used.

Besides the current format, these are the formats of DeeperSpeed 0.3.15 (GPT-NeoX until v1.0), of
DeepSpeed 0.3.17 to 0.5.9, and of later versions with zero_optimization.elastic_checkpoint: true.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from neox_bridge.errors import BridgeError, Refused
from neox_bridge.findings import Finding
from neox_bridge.formats.pickles import Record
from neox_bridge.frameworks.deepspeed import deals_out_parameters
from neox_bridge.frameworks.writers import SHAPES
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.file_names import rank_file
from neox_bridge.layouts.transformer_engine import plain_parameter
from neox_bridge.layouts.universal_folder import Parameter
from neox_bridge.layouts.untrusted import mapping, text, unexpected
from neox_bridge.optimizer.derived_settings import DerivedSettings, derived_settings
from neox_bridge.optimizer.flat_groups import flat_group
from neox_bridge.optimizer.parameter_order import Groups, OrderSource, dealt_out, parameter_order
from neox_bridge.optimizer.rank_states import RankStates, rank_states, zero_stage
from neox_bridge.optimizer.read_files import check_weights, generators, optimizer_states, same_group
from neox_bridge.optimizer.spot_checks import check_padding, master_findings
from neox_bridge.optimizer.states import Group, Optimizer, SavedForm
from neox_bridge.stores.paths import ahead
from neox_bridge.tensors.flat import Flat, wholes_of
from neox_bridge.tensors.pieces import Whole
from neox_bridge.wording import plural


def _read_ranks(paths: Sequence[str]) -> list[tuple[str, Mapping[str, Any]]]:
    """Read the files of all data-parallel ranks of one model-parallel rank, with their paths.

    Each file repeats the names and shapes of all parameters after the states. Reading them takes
    twenty times as long as reading the states, so if nothing else follows, they are read only from
    the first file.
    """
    started = ahead(paths)
    first = next(started)
    values = [(first, optimizer_states(first))]
    brief = set(values[0][1]) == {"optimizer_state_dict", SHAPES}
    until = SHAPES if brief else None
    return values + [(path, optimizer_states(path, until)) for path in started]


def read_zero(
    checkpoint: Checkpoint,
    folder: str,
    metas: tuple[Mapping[str, Any], ...],
    files: Sequence[Sequence[str]],
) -> Optimizer:
    """Read the states of every parameter.

    Args:
        metas: The contents of the mp_rank files by number.
        files: The files of optimizer states by that number, then by data-parallel rank.

    Raises:
        BridgeError: For files that are not of this model or of one save.
        Refused: For states of a kind that cannot be read.
    """
    state = checkpoint.neox_state
    members: dict[Parameter, int] = {}
    shards: dict[tuple[int, Parameter], dict[str, Whole]] = {}
    groups: dict[str, Group] = {}
    keys: list[str] = []
    first: RankStates | None = None
    stage = 1
    source: OrderSource = "groups"
    derivation: DerivedSettings | None = None
    for number, (meta, paths) in enumerate(zip(metas, files, strict=True)):
        meta_path = f"{folder}/{rank_file(number)}"
        values = _read_ranks(paths)
        ranks = [rank_states(value, len(paths), path) for path, value in values]
        if first is None:
            stage = zero_stage(values[0][1], checkpoint.raw, paths[0])
        first = first or ranks[0]
        for states in ranks:
            _check_same_form(first, ranks[0], states)
        recorded = [(paths[0], values[0][1]), (meta_path, meta)]
        _refuse_round_robin(checkpoint.raw, recorded)
        count = len(ranks[0].parts)
        order, source = parameter_order(checkpoint, number, recorded, count, paths[0])
        if first.is_current and source != "groups":
            # DeepSpeed 0.5.4 to 0.5.10 stored param_shapes with the states (dd0c8fa7, 135a6256)
            raise Refused(
                f"{paths[0]} and {rank_file(number)} beside it contain no list param_shapes, so "
                "the flat partitions cannot be split into parameters. DeepSpeed has saved this "
                "list since 0.5.4 (2021). Copy the checkpoint again."
            )
        settings = ranks[0].settings
        if settings is None:
            version = text(first.head, "ds_version")
            derivation = derivation or derived_settings(
                checkpoint.raw, meta, first.scalars, folder, meta_path, version
            )
            settings = derivation.groups
        if _is_dealt_out(first):
            order = tuple(dealt_out(group, len(paths)) for group in order)
        _check_names(order, paths[0])
        for index, shapes in enumerate(order):
            # a pipeline stage may have no parameter of a group
            label = str(settings[index].get("name", index))
            parts, padding = flat_group(ranks, index, shapes)
            if first.is_current:
                cut = Flat(shapes, len(paths))
                for rank, (path, value) in enumerate(values):
                    _check_mappings(value, index, cut, rank, path)
            else:
                for refs in padding.values():
                    check_padding(refs, f"{first.generation.masters}[{index}]")
            for states in ranks:
                rank_settings = (states.settings or settings)[index]
                group = Group(rank_settings, states.scalars[index])
                same_group(groups.setdefault(label, group), group, states.path)
            keys += [key for key in parts if key not in keys]
            for key, refs in parts.items():
                for name, tensor in wholes_of(shapes, refs).items():
                    place = plain_parameter(name, paths[0])
                    # tied embeddings are in the first and the last stage, and DeepSpeed keeps them
                    # equal
                    shards.setdefault((number % state.tp, place), {}).setdefault(key, tensor)
                    members[place] = list(groups).index(label)
    assert first is not None
    optimizer = Optimizer(
        wrapper="zero" if "zero_stage" in first.head or not first.is_current else "bf16",
        stage=stage,
        dp=len(files[0]),
        keys=tuple(keys),
        groups=tuple(groups.values()),
        members=members,
        shards=shards,
        head={**first.head, "outer": first.outer},
        metas=metas,
        files=tuple(path for paths in files for path in paths),
        generators=generators(metas[0]),
        form=SavedForm(first.kind, first.generation, len(files[0]), tuple(map(len, first.parts))),
        derived=derivation.derived if derivation is not None else (),
        derived_findings=derivation.findings if derivation is not None else (),
    )
    check_weights(checkpoint, optimizer, folder)
    if first.is_current:
        return optimizer
    findings = [*master_findings(checkpoint, optimizer)]
    if source == "weights":
        findings.append(_order_finding(first.path))
    return replace(optimizer, findings=tuple(findings))


def _is_dealt_out(states: RankStates) -> bool:
    """Whether the parameters of a group are in round-robin order, which param_shapes omits."""
    older = states.generation.form == "partitions" and not states.is_current
    return older and deals_out_parameters(text(states.head, "ds_version"))


def _check_same_form(first: RankStates, begin: RankStates, other: RankStates) -> None:
    """Raise BridgeError if the files of two ranks cannot be from one save.

    begin: the file of the first data-parallel rank on the same model-parallel rank.
    """
    same = (first.kind, first.generation) == (other.kind, other.generation)
    if not same or len(begin.parts) != len(other.parts):
        raise BridgeError(
            f"{other.path} holds {other.kind} states of {plural(len(other.parts), 'group')} "
            f"({other.generation.masters}), and {first.path} {first.kind} states of "
            f"{plural(len(first.parts), 'group')} ({first.generation.masters}). They are from "
            "different saves. Copy the checkpoint again."
        )


def _check_mappings(value: Mapping[str, Any], index: int, flat: Flat, rank: int, path: str) -> None:
    """Check the recorded positions of parameters in a partition."""
    mappings = value["optimizer_state_dict"].get("param_slice_mappings")
    if not isinstance(mappings, list) or index >= len(mappings):
        return
    if not isinstance(mappings[index], dict):
        raise unexpected(path, f"param_slice_mappings[{index}]", mappings[index], "a mapping")
    theirs = {
        name: (entry.state.get("start"), entry.state.get("numel"))
        for name, entry in mappings[index].items()
        if isinstance(entry, Record) and isinstance(entry.state, dict)
    }
    ours = {part.name: (part.start, part.numel) for part in flat.fragments(rank)}
    if theirs != ours:
        name = next(n for n in [*theirs, *ours] if theirs.get(n) != ours.get(n))
        raise BridgeError(
            f"{path}: its param_slice_mappings put {name} at {theirs.get(name)}, but by "
            f"param_shapes it is at {ours.get(name)} (start, elements). They may be from "
            "different saves. Copy the checkpoint again."
        )


def _check_names(order: Groups, path: str) -> None:
    """Raise BridgeError if two names refer to one parameter."""
    seen: dict[Parameter, str] = {}
    for name in (name for group in order for name in group):
        first = seen.setdefault(plain_parameter(name, path), name)
        if first != name:
            raise BridgeError(
                f"{path}: param_shapes lists one parameter under two names, {first[:80]} and "
                f"{name[:80]}. The file is damaged or malicious. Download or copy it again."
            )


def _refuse_round_robin(
    raw: Mapping[str, Any], recorded: Sequence[tuple[str, Mapping[str, Any]]]
) -> None:
    """Raise Refused if DeepSpeed shuffled the parameters of a group over its partitions."""
    configs = [(file, mapping(values, "ds_config", file)) for file, values in recorded]
    for file, config in (*configs, ("the yml", raw)):
        if mapping(config, "zero_optimization", file).get("round_robin_gradients"):
            raise Refused(
                f"{recorded[0][0]}: zero_optimization.round_robin_gradients was on, which "
                "shuffles parameters across partitions. Resume the run without it and save again."
            )


def _order_finding(path: str) -> Finding:
    return Finding(
        "parameter-order-derived",
        "warning",
        f"{path} and the other files do not list the parameters (param_shapes, which DeepSpeed "
        "saves since 0.3.14). They are taken in the order of the weight files, and their number of "
        "elements matches",
    )
