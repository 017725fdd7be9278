"""Derives the sizes of a model from its tensors, and checks them against the config."""

from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod

from neox_bridge.architectures.base import ModelConfig, Weight
from neox_bridge.errors import BridgeError
from neox_bridge.tensors.dtypes import FLOATING
from neox_bridge.tensors.pieces import Shape, Whole
from neox_bridge.tensors.tensor_ref import TensorRef


def solve_dims(shapes: Mapping[str, tuple[Weight, Shape]], path: str) -> dict[str, int]:
    """The size of each named dimension, from the whole shapes of the tensors.

    Raises BridgeError with both names if two tensors contradict each other.
    """
    dims: dict[str, tuple[int, str]] = {}
    for name, (weight, shape) in shapes.items():
        if len(shape) != len(weight.shape):
            raise BridgeError(
                f"{path}: {name} has the shape {list(shape)}; {len(weight.shape)} dimensions are "
                "expected. The file is damaged or belongs to another model."
            )
        for dim, size in zip(weight.shape, shape, strict=True):
            known, witness = dims.setdefault(dim, (size, name))
            if known != size:
                raise BridgeError(
                    f"{path}: {name} has the shape {list(shape)}, which contradicts {witness}: "
                    f"its {dim} size is {size} here and {known} there. One of the files is "
                    "damaged or belongs to another model. Copy or download it again."
                )
    return {dim: size for dim, (size, _) in dims.items()}


def elements_by_dtype(refs: Iterable[TensorRef | Whole]) -> Counter[str]:
    """The number of elements of each dtype."""
    elements: Counter[str] = Counter()
    for ref in refs:
        elements[ref.dtype] += prod(ref.shape)
    return elements


def dtype_of_most(refs: Iterable[TensorRef | Whole]) -> str:
    """The floating dtype of most elements."""
    count = elements_by_dtype(ref for ref in refs if ref.dtype in FLOATING)
    return count.most_common(1)[0][0] if count else "float32"


def check_heads(config: ModelConfig, dims: Mapping[str, int], where: str) -> None:
    """Raise BridgeError unless the heads and the rows of q, k and v fit the hidden size."""
    if config.heads < 1 or config.hidden % config.heads:
        raise BridgeError(
            f"{where}: {config.heads} does not divide the hidden size {config.hidden}. The "
            "config belongs to another model."
        )
    if "q" in dims:
        _check_kv_heads(config, dims, where.replace("num_attention_heads", "the key-value heads"))
    elif dims.get("qkv", 3 * config.hidden) != 3 * config.hidden:
        raise BridgeError(
            f"attention.query_key_value has {dims['qkv']} rows, but 3 x the hidden size "
            f"{config.hidden} is {3 * config.hidden}. This family does not have grouped-query "
            "attention. The config belongs to another model."
        )


def _check_kv_heads(config: ModelConfig, dims: Mapping[str, int], where: str) -> None:
    heads, kv_heads = config.heads, config.key_value_heads
    if dims["q"] % heads or heads % kv_heads:
        raise BridgeError(
            f"{where} (num_key_value_heads, num_kv_heads): {kv_heads} does not match {heads} "
            f"heads and {dims['q']} rows of q. The config belongs to another model."
        )
    if dims["kv"] != dims["q"] // heads * kv_heads:
        raise BridgeError(
            f"{where} (num_key_value_heads, num_kv_heads): {kv_heads} of {dims['q'] // heads} "
            f"rows each do not match the {dims['kv']} rows of k and v. The config belongs to "
            "another model."
        )
