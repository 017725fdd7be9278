"""Puts GPT-NeoX's ranks together: the shards of each weight as one tensor.

The tensors are checked against the family's table of weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from neox_bridge.architectures.base import Architecture, ModelConfig, Presence, Weight
from neox_bridge.architectures.neox_config import number
from neox_bridge.architectures.rows import Row, model_rows, rows_by_name, table_rows
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.findings import Dropped
from neox_bridge.frameworks.change import Change
from neox_bridge.frameworks.changes import proposal_with
from neox_bridge.frameworks.eras import TODAY
from neox_bridge.layouts.checkpoint import refuse_all
from neox_bridge.layouts.derived_values import InvFreqMismatch, check_inv_freq
from neox_bridge.layouts.sizes import check_heads, dtype_of_most, solve_dims
from neox_bridge.tensors.fused import Fusion, GqaOrder, gather_part
from neox_bridge.tensors.geometry import gather, whole_shape
from neox_bridge.tensors.pieces import Whole
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.wording import some

RankTensors = Mapping[int, Mapping[str, TensorRef]]
Assembled = tuple[ModelConfig, dict[str, Whole], list[Dropped], InvFreqMismatch | None]


def assemble(
    architecture: Architecture,
    ranks: Sequence[RankTensors],
    raw: Mapping[str, Any],
    layers: int,
    folder: str,
    order: GqaOrder,
    te: frozenset[str] = frozenset(),
) -> Assembled:
    """Put the tensors of all ranks together.

    Args:
        architecture: The family.
        ranks: The tensors of each tensor-parallel rank, by layer and name.
        raw: The merged yml.
        layers: The number of blocks.
        folder: The folder that messages name.
        order: The order of the rows of grouped-query attention.
        te: See ``fused.Fusion``.

    Returns:
        The config, the tensors by Hugging Face name, what is dropped, and a stored inv_freq that
        does not match the config.

    Raises:
        BridgeError: Tensors are missing, unknown or contradict each other.
        Refused: An unknown tensor belongs to something that the family does not have, or to a
            change of GPT-NeoX that is not merged.
    """
    tp = len(ranks)
    # The ways out are not for a source: its number of ranks is given, and `tp` is the target's.
    unreadable = architecture.refuse_shape(tp, TODAY.name)
    refuse_all((replace(r, way_out="", neox_only=True) for r in unreadable), folder)
    shards: dict[str, list[TensorRef]] = {}
    names: dict[str, str] = {}
    stored: dict[str, TensorRef] = {}
    left = {(rank, n, key) for rank in range(tp) for n, t in ranks[rank].items() for key in t}
    shapes, presence_names = {}, set()
    fusion = _fusion(raw)
    splits = {}
    table = table_rows(architecture, layers)
    for row in table:
        weight, number, name = row.weight, row.layer, row.hf
        key = _key_of(ranks[0].get(number, {}), weight)
        if key is None:
            continue
        refs = []
        for rank in range(tp):
            ref = ranks[rank].get(number, {}).get(key)
            if ref is None:
                raise BridgeError(f"{folder}: layer {number} of rank {rank} is missing {key}.")
            first = ranks[0][number][key]
            if (ref.dtype, ref.shape) != (first.dtype, first.shape):
                raise BridgeError(
                    f"{folder}: {key} of layer {number} is {ref.dtype} {list(ref.shape)} on rank "
                    f"{rank} and {first.dtype} {list(first.shape)} on rank 0. The files belong "
                    "to different checkpoints. Copy the checkpoint again."
                )
            refs.append(ref)
            left.discard((rank, number, key))
        if weight.split == "zero":
            continue  # neox_reader checks that they are zeros
        if weight.split == "derived":
            stored[f"layer {number}: {key}"] = refs[0]
            continue
        shards[name], names[name] = refs, f"layer {number}: {key}"
        splits[name] = weight.split_as(key)
        presence_names.add(weight.neox if row.block == 0 else name)
        shape = refs[0].shape
        if len(shape) == len(weight.shape):
            if splits[name] in ("fused", "gated"):
                shape = (fusion.part_rows(weight.part, shape[0]) * tp, *shape[1:])
            else:
                shape = whole_shape(splits[name], shape, tp)
        label = f"{names[name]} ({weight.part})" if weight.part else names[name]
        shapes[label] = (weight, shape)
    if left:
        for _, n, key in sorted(left):
            if change := proposal_with(tensor=key):
                raise unmerged(folder, f"layer {n}: {key}", change)
        refuse_all(architecture.refuse_neox_source(raw), folder)
        strange = sorted(f"layer {n}: {key}" for _, n, key in left)
        raise BridgeError(
            f"{folder} contains tensors that no {architecture.name} model has: {some(strange)}. "
            "A conversion would lose them, so it is refused."
        )
    dims = solve_dims(shapes, folder)
    dtype = dtype_of_most(refs[0] for refs in shards.values())
    if missing := [row for row in table if row.weight.required and row.hf not in shards]:
        raise _missing(folder, missing)
    presence = Presence(frozenset(presence_names), dtype, layers)
    try:
        config = architecture.read_neox({**raw, "num_layers": layers}, dims, presence)
    except BridgeError as error:  # which names the key, but not the folder
        raise type(error)(f"{folder}: {error}") from None
    wanted = model_rows(architecture, config)
    if missing := [row for row in wanted if row.hf not in shards]:
        raise _missing(folder, missing)
    # neox_reader takes a stored head out of a tied model
    stored_head = {architecture.head} if config.tied_embeddings and not config.reward else set()
    if extra := set(shards) - {row.hf for row in wanted} - stored_head:
        raise BridgeError(
            f"{folder}: these tensors do not belong to the model that the others describe: "
            f"{some(sorted(names[name] for name in extra))}. The files may be of different "
            "checkpoints. Copy the checkpoint again."
        )
    if dims.get("qkv", 3 * config.hidden) != 3 * config.hidden:
        refuse_all(architecture.refuse_neox_source(raw), folder)
    check_heads(config, dims, f"{folder}/configs: num_attention_heads")
    if (rows_of_q := dims.get("q", config.hidden)) != config.hidden:
        raise BridgeError(
            f"{folder}: the heads of query_key_value are {rows_of_q // config.heads} wide, but "
            f"hidden_size / num_attention_heads is {config.hidden // config.heads}. The yml "
            "belongs to another model."
        )
    fusion = config.fusion(order, te)
    rows = rows_by_name(architecture, layers)
    tensors = {
        name: gather_part(fusion, rows[name].weight.part, refs)
        if splits[name] in ("fused", "gated")
        else gather(splits[name], refs, config.parallel_residual)
        for name, refs in shards.items()
    }
    dropped = [
        Dropped(name, "not learned: computed from rotary_emb_base", "inv_freq") for name in stored
    ]
    return config, tensors, dropped, check_inv_freq(config, stored)


def naming_proposal(error: BridgeError, raw: Mapping[str, Any], folder: str) -> BridgeError:
    """The error of ``assemble``; if the yml has a key of a change that is not merged, its name."""
    for key in raw if not isinstance(error, Refused) else ():
        change = proposal_with(key=key)
        if change is not None and not change.is_as_before(raw):
            return unmerged(folder, f"{key}: {raw[key]} ({error})", change)
    return error


def unmerged(folder: str, shown: str, change: Change) -> Refused:
    """The error for a checkpoint of a tree with a change that is not merged."""
    return Refused(
        f"{folder} was written by a GPT-NeoX with {change.pull}, which is proposed and not merged: "
        f"{shown}. {change.pull} would change this: {change.title}. The proposal does not say "
        f"enough to convert such a model. Load it in the tree that wrote it; {change.link}"
    )


def _missing(folder: str, rows: Iterable[Row]) -> BridgeError:
    names = [f"layer {row.layer}: {row.weight.neox}" for row in rows]
    return BridgeError(f"{folder}: tensors are missing: {some(names)}. Copy the checkpoint again.")


def _key_of(tensors: Mapping[str, TensorRef], weight: Weight) -> str | None:
    """The name of a weight in a layer; None if the layer does not contain it."""
    return next((key for key in (weight.neox, weight.old, weight.also) if key in tensors), None)


def _fusion(raw: Mapping[str, Any]) -> Fusion:
    """The order of fused rows, complete enough to count the rows of each part."""
    heads = number("num_attention_heads", raw.get("num_attention_heads") or 1, int)
    return Fusion(heads, number("num_kv_heads", raw.get("num_kv_heads") or heads, int), "grouped")
