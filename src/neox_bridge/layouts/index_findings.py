"""Compares the index of sharded weights with what the shards contain."""

from collections.abc import Iterable, Iterator, Mapping

from neox_bridge.findings import Finding
from neox_bridge.layouts.weight_sets import WeightSet
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.wording import some

_GET_AGAIN = "download the index and the shards again, from one revision"


def index_ignored(single: str) -> Finding:
    """The finding about an index beside a single file of the same weights.

    transformers prefers the file (modeling_utils.py).
    """
    return Finding(
        "index-ignored",
        "warning",
        f"{single}.index.json and {single} are both in the folder. Like transformers, "
        f"neox-bridge reads {single} and ignores the shards that the index names",
        f"remove whichever is out of date: {single}, or the index and its shards",
    )


def index_findings(
    weights: WeightSet,
    refs: Mapping[str, TensorRef],
    homes: Mapping[str, str],
    twice: Mapping[str, str],
    *,
    complete: bool = True,
) -> Iterator[Finding]:
    """What an index says and its files do not confirm.

    Args:
        weights: The index and its shards.
        refs: The tensor of each name that is read.
        homes: The shard that contains it.
        twice: The names of tensors that another shard contains as well, and that shard.
        complete: Whether ``refs`` has everything in the shards, so that the bytes can be compared.
    """
    if weights.unnamed:
        yield Finding(
            "shard-not-in-index",
            "warning",
            f"{weights.index} does not name {some(list(weights.unnamed))}, which is not read",
            f"remove what is out of date, or {_GET_AGAIN}",
        )
    if elsewhere := sorted(
        key for key, file in homes.items() if weights.weight_map.get(key, file) != file
    ):
        places = [f"{key} (in {homes[key]})" for key in elsewhere]
        yield Finding(
            "index-wrong-shard",
            "warning",
            f"{weights.index} names another shard for {some(places)}",
            _GET_AGAIN,
        )
    if extra := sorted(set(refs) - set(weights.weight_map)):
        places = [f"{key} ({homes[key]})" for key in extra]
        yield Finding(
            "not-in-index",
            "warning",
            f"{weights.index} does not name {some(places)}, which its shards contain",
            _GET_AGAIN,
        )
    if twice:
        places = [f"{key} ({file})" for key, file in sorted(twice.items())]
        yield Finding(
            "second-copy",
            "warning",
            f"second copies of tensors are in shards that {weights.index} does not name for "
            f"them: {some(places)}",
            _GET_AGAIN,
        )
    if not complete or weights.total_size is None:
        return
    size = sum(ref.nbytes for ref in refs.values())
    if weights.total_size != size and weights.total_size not in _other_sizes(refs.values()):
        yield Finding(
            "wrong-total-size",
            "warning",
            f"{weights.index}: metadata.total_size is {weights.total_size:,}, but the tensors "
            f"have {size:,} bytes",
            _GET_AGAIN,
        )


def _other_sizes(refs: Iterable[TensorRef]) -> Iterator[int]:
    """What transformers has written as the size of such tensors, other than their bytes.

    It counts tensors that share their storage once. Its older versions count a bool, as in the
    masks of old models, as an eighth of a byte (modeling_utils.dtype_byte_size).
    """
    every = list(refs)
    once = {(ref.file, ref.offset, ref.dtype, ref.shape): ref for ref in every}
    for counted in (every, list(once.values())):
        size = sum(ref.nbytes for ref in counted)
        bools = sum(ref.nbytes for ref in counted if ref.dtype == "bool")
        yield size
        yield size - bools + bools // 8
