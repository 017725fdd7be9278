"""GPT-NeoX's ranks put together: each weight's shards as one tensor, checked against the table."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from neox_bridge.architectures.base import Architecture, ModelConfig, Presence, Weight
from neox_bridge.architectures.neox_config import number
from neox_bridge.architectures.rows import model_rows, rows_by_name, table_rows
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.findings import Dropped
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
    """The config, the wholes of the ranks' tensors, what is dropped, and a wrong inv_freq.

    ranks: by tensor-parallel rank. raw: the merged yml. folder: for messages.
    order: of the rows of grouped-query attention. te: see ``fused.Fusion``.
    Raises BridgeError for tensors that are missing, unknown or contradict each other, Refused
    where an unknown one belongs to something that the family doesn't have.
    """
    tp = len(ranks)
    # the ranks are what they are: --tp changes the target, and this is the source
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
            continue  # neox_reader has seen that they are
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
        refuse_all(architecture.refuse_neox_source(raw), folder)
        strange = sorted(f"layer {n}: {key}" for _, n, key in left)
        raise BridgeError(
            f"{folder} contains tensors that no {architecture.name} model has: {some(strange)}. "
            "A conversion would lose them, so it is refused."
        )
    dims = solve_dims(shapes, folder)
    dtype = dtype_of_most(refs[0] for refs in shards.values())
    missing = [
        f"layer {row.layer}: {row.weight.neox}"
        for row in table
        if row.weight.required and row.hf not in shards
    ]
    if missing:
        raise BridgeError(f"{folder}: tensors are missing: {some(missing)}. Copy it again.")
    presence = Presence(frozenset(presence_names), dtype, layers)
    try:
        config = architecture.read_neox({**raw, "num_layers": layers}, dims, presence)
    except Refused:
        raise
    except BridgeError as error:  # names the key, and this the place
        raise BridgeError(f"{folder}: {error}") from None
    want = {row.hf for row in model_rows(architecture, config)}
    if absent := sorted(want - set(shards)):
        raise BridgeError(
            f"{folder}: tensors are missing. Their Hugging Face names are: {some(absent)}."
        )
    stored_head = {architecture.head} if config.tied_embeddings and not config.reward else set()
    if extra := sorted(set(shards) - want - stored_head):  # neox_reader takes the head out
        raise BridgeError(
            f"{folder}: these tensors contradict the yml: {some(extra)}. Correct the yml."
        )
    if dims.get("qkv", 3 * config.hidden) != 3 * config.hidden:
        refuse_all(architecture.refuse_neox_source(raw), folder)
    check_heads(config, dims, f"{folder}/configs: num_attention_heads")
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


def _key_of(tensors: Mapping[str, TensorRef], weight: Weight) -> str | None:
    """How a layer spells a weight: as today's trees do, as those before 2024-09, or otherwise."""
    return next((key for key in (weight.neox, weight.old, weight.also) if key in tensors), None)


def _fusion(raw: Mapping[str, Any]) -> Fusion:
    """Enough of the row maps to tell how many rows are of which part."""
    heads = number("num_attention_heads", raw.get("num_attention_heads") or 1, int)
    return Fusion(heads, number("num_kv_heads", raw.get("num_kv_heads") or heads, int), "grouped")
