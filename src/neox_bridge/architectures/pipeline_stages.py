"""Computes which layers of GPT-NeoX DeepSpeed puts into each pipeline stage.

Source: deepspeed 0.16 runtime/pipe/module.py (_partition_layers, _find_layer_type),
runtime/utils.py (partition_uniform, partition_balanced); GPT-NeoX megatron/model/gpt2_model.py
(GPT2ModelPipe.init_specs). Its two functions before and after the blocks count as layers, and their
names also contain "transformer".
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any

from neox_bridge.architectures.base import Architecture, ModelConfig
from neox_bridge.architectures.rows import table_rows
from neox_bridge.errors import Refused
from neox_bridge.tensors.pieces import Shape

_CLASSES = {
    "mixer": "ParallelMambaResidualLayerPipe",
    "att": "RWKVResidualLayerPipe",
    "sgu": "GMLPBlock",
}
DEFAULT = "type:transformer|mlp"  # pipe_partition_method of megatron/neox_arguments/neox_args.py


def stages_of(
    architecture: Architecture,
    config: ModelConfig,
    settings: Mapping[str, Any],
    stages: int,
    shapes: Callable[[], Iterable[tuple[int, Shape]]],
) -> list[range]:
    """The layers of each stage; all layers in one without stages.

    Args:
        settings: The yml of the run.
        shapes: The shapes of a rank's parameters, by layer and name.
    """
    if stages < 2:
        return [range(config.head_layer + 1)]
    elements: Counter[int] = Counter()
    for layer, shape in shapes():
        elements[layer] += prod(shape)
    return stage_bounds(
        str(settings.get("pipe_partition_method") or DEFAULT),
        _block_classes(architecture, config.layers),
        stages,
        elements,
        tied=config.tied_embeddings,
    )


def with_owners(architecture: Architecture, layers: int, stages: Iterable[range]) -> Architecture:
    """The architecture in which the first block of each stage trains what its blocks share.

    torch lists a shared parameter once, under its first name, so only that one has optimizer
    states. layers: the number of blocks. stages: the layers of each stage.
    """
    if not architecture.shared:
        return architecture
    weights = list(architecture.weights)
    rows = [weight for weight in weights if weight.neox == architecture.shared]
    holders = sorted(
        b for row in rows for b in (range(layers) if row.blocks is None else row.blocks)
    )
    firsts = (next((b for b in holders if b + 2 in stage), None) for stage in stages)
    owners = frozenset(block for block in firsts if block is not None)
    place = weights.index(rows[0])
    weights = [weight for weight in weights if weight not in rows]
    weights[place:place] = [
        replace(rows[0], trained=trained, blocks=blocks)
        for trained, blocks in ((True, owners), (False, frozenset(holders) - owners))
        if blocks
    ]
    return replace(architecture, weights=tuple(weights))


def owners_of(architecture: Architecture) -> frozenset[int]:
    """The blocks that train a parameter that others share. Empty if there is none."""
    rows = (weight for weight in architecture.weights if weight.neox == architecture.shared)
    return frozenset(block for row in rows if row.trained for block in row.blocks or ())


def _block_classes(architecture: Architecture, layers: int) -> list[str]:
    """Identify the class of each block by a tensor that only such blocks have."""
    classes = ["ParallelTransformerLayerPipe"] * layers
    for row in table_rows(architecture, layers):
        name = _CLASSES.get(row.weight.neox.partition(".")[0])
        if name is not None and row.weight.place == "block":
            classes[row.block] = name
    return classes


def holds(config: ModelConfig, layers: range, layer: int) -> bool:
    """Whether a stage with these layers holds this layer's parameters. A tied head is layer 0."""
    has_tied_head = config.tied_embeddings and config.head_layer in layers
    return layer in layers or (has_tied_head and layer == 0)


def stage_bounds(
    method: str, blocks: Sequence[str], stages: int, parameters: Mapping[int, int], *, tied: bool
) -> list[range]:
    """The layers of each stage, by GPT-NeoX's numbers.

    Args:
        method: pipe_partition_method of the yml.
        blocks: The class of each block.
        stages: At most the number of layers in GPT-NeoX, which is the number of blocks + 5.
        parameters: The number of elements of a rank in each layer.
        tied: Whether the head is the embeddings.

    Raises:
        Refused: DeepSpeed does not know the method.
    """
    head = "EmbeddingPipe" if tied else "ParallelLinearPipe"
    names = ["EmbeddingPipe", "_pre_transformer_block", *blocks]
    names += ["_post_transformer_block", "NormPipe", head]
    count, chosen = len(names), method.lower()
    if chosen == "uniform":
        bounds = _uniform(count, stages)
    elif chosen == "parameters":
        counts = [parameters.get(number, 0) for number in range(count)]
        bounds = _balanced([*counts[:-1], counts[0]] if tied else counts, stages)
    elif chosen.startswith("type:"):
        pattern = re.compile(chosen.split(":")[1], re.IGNORECASE)
        bounds = _balanced([int(bool(pattern.search(name))) for name in names], stages)
    else:
        raise Refused(
            f"pipe_partition_method: {method} is unknown to DeepSpeed. Use {DEFAULT}, uniform or "
            "parameters."
        )
    # callers refuse more stages than there are layers
    assert all(low < high for low, high in pairwise(bounds))
    return [range(low, high) for low, high in pairwise(bounds)]


def _uniform(items: int, parts: int) -> list[int]:
    if items <= parts:
        return [min(part, items) for part in range(parts + 1)]
    size, more = divmod(items, parts)
    return [part * size + min(part, more) for part in range(parts + 1)]


def _balanced(weights: Sequence[int], parts: int) -> list[int]:
    """The split with the smallest gap between largest and smallest part; on a tie, the last."""
    items, infinite = len(weights), float("inf")
    if items <= parts:
        return _uniform(items, parts)
    sums = [0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    most: dict[tuple[int, int], float] = {(0, 0): 0}
    least: dict[tuple[int, int], float] = {}
    cost: dict[tuple[int, int], float] = {(0, 0): 0}
    cut: dict[tuple[int, int], int] = {}
    for i in range(1, items + 1):
        for j in range(1, min(i, parts) + 1):
            for k in range(i):
                part = sums[i] - sums[k]
                high = max(most.get((k, j - 1), infinite), part)
                low = min(least.get((k, j - 1), infinite), part)
                gap = high - low
                if cost.get((i, j), infinite) >= gap:
                    cost[i, j], most[i, j], least[i, j], cut[i, j] = gap, high, low, k
    bounds = [items]
    for j in range(parts, 0, -1):
        bounds.append(cut.get((bounds[-1], j), 0))
    return bounds[::-1]
