"""Which files of a folder are weights, and which of them belong together.

The order of preference is that of transformers (modeling_utils.py): one safetensors file, shards of
safetensors with an index, then the same as pickles.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from neox_bridge.errors import BridgeError
from neox_bridge.layouts.linked_files import check_own
from neox_bridge.layouts.text_files import LARGE_BYTES, read_json

_PREFERRED = ("model", "pytorch_model", "diffusion_pytorch_model", "adapter_model")
_INDEX = re.compile(r"(.+)\.(safetensors|bin)\.index(\.\w+)?\.json")
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.(safetensors|bin)")
_PICKLE = re.compile(r".+\.(bin|pt|pth|ckpt)")
# what transformers' Trainer, accelerate and DeepSpeed save beside weights
_NO_WEIGHTS = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|random_states|training_args|trainer_state).*"
    r"|.*(model_states|optim_states)\.pt"
)


@dataclass(frozen=True, slots=True)
class WeightSet:
    """Files that together are one set of weights.

    Attributes:
        name: The name of its single file or of its index, or what its shards have in common.
        files: The names of its files.
        index: The name of the index; "" if there is none.
        weight_map: The file of each tensor according to the index.
        total_size: ``metadata.total_size`` of the index, or None.
        absent: Names of files that belong to it but are not in the folder.
        unnamed: Names of files that are named like its shards, but that its index does not name.
    """

    name: str
    files: tuple[str, ...]
    index: str = ""
    weight_map: Mapping[str, str] = field(default_factory=dict)
    total_size: int | None = None
    absent: tuple[str, ...] = ()
    unnamed: tuple[str, ...] = ()

    @property
    def pickled(self) -> bool:
        """Whether its files are pickles of torch."""
        return not self.files[0].endswith(".safetensors")


def weight_sets(folder: str, names: Sequence[str]) -> tuple[WeightSet, ...]:
    """The sets of weights in a folder, the one that transformers would load first.

    names: of the files in the folder. Raises BridgeError for a damaged index.
    """
    sets = [read_index(folder, name, names) for name in names if is_index(name)]
    return tuple(sorted([*sets, *loose_sets(sets, names)], key=by_preference))


def loose_sets(indexed: Sequence[WeightSet], names: Sequence[str]) -> Iterator[WeightSet]:
    """The sets of files that no index names. names: of the files in the folder."""
    taken = {file for one in indexed for file in (*one.files, *one.unnamed)}
    loose = [name for name in names if name not in taken and is_weights_file(name)]
    groups: dict[str, list[str]] = {}
    for name in loose:
        shard = _SHARD.fullmatch(name)
        groups.setdefault(f"{shard[1]}.{shard[4]} of {shard[3]}" if shard else name, []).append(
            name
        )
    yield from map(_loose, groups.values())


def is_index(name: str) -> bool:
    """Whether a file of this name is the index of shards."""
    return bool(_INDEX.fullmatch(name))


def is_shard(name: str) -> bool:
    """Whether a file of this name is a shard, such as model-00001-of-00002.safetensors."""
    return bool(_SHARD.fullmatch(name))


def is_weights_file(name: str) -> bool:
    """Whether a file of this name contains weights."""
    if name.endswith(".safetensors"):
        return True
    return bool(_PICKLE.fullmatch(name)) and not _NO_WEIGHTS.fullmatch(name)


def by_preference(one: WeightSet) -> tuple[bool, int, bool, str]:
    """The key that sorts the sets of a folder: transformers loads the first one.

    A variant, such as model.fp16.safetensors, is loaded only if its name is given.
    """
    stem, _, ending = one.name.partition(".")
    place = _PREFERRED.index(stem) if stem in _PREFERRED else len(_PREFERRED)
    is_variant = ending not in ("safetensors", "bin")
    return one.pickled, place + is_variant * (len(_PREFERRED) + 1), bool(one.index), one.name


def read_index(folder: str, index: str, names: Sequence[str]) -> WeightSet:
    """The set of weights that an index file describes.

    names: of the files in the folder. Raises BridgeError if the index is damaged.
    """
    path = os.path.join(folder, index)
    check_own(path, folder)
    content = read_json(path, LARGE_BYTES, depth=None)
    weight_map = content.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise BridgeError(
            f"{path} is damaged: its weight_map from tensors to files is missing. Download it "
            "again."
        )
    files = tuple(sorted(set(weight_map.values())))
    for name in files:
        if os.path.basename(name) != name or name in ("", ".", ".."):
            raise BridgeError(
                f"{path} names {name!r}, which is not a file in the same folder. The index is "
                "damaged or malicious. Get it again from its source."
            )
    metadata = content.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    name, there = index.removesuffix(".index.json"), set(names)
    return WeightSet(
        name,
        files,
        index,
        weight_map,
        int(total) if isinstance(total, int | float) and math.isfinite(total) else None,
        tuple(file for file in files if file not in there),
        tuple(file for file in names if file not in files and _set_of(file) == name),
    )


def _set_of(file: str) -> str:
    """What the shards of a set have in common: ``model.safetensors``; "" for other files."""
    shard = _SHARD.fullmatch(file)
    return f"{shard[1]}.{shard[4]}" if shard else ""


def _loose(files: Sequence[str]) -> WeightSet:
    """A single file, or shards without an index."""
    shard = _SHARD.fullmatch(files[0])
    if shard is None:
        return WeightSet(files[0], tuple(files))
    return WeightSet(f"{shard[1]}.{shard[4]}", tuple(files), absent=tuple(_absent(files)))


def _absent(files: Sequence[str]) -> Iterator[str]:
    """The shards that the numbers in the names of the others tell."""
    shard = _SHARD.fullmatch(files[0])
    assert shard is not None
    width, count = len(shard[2]), int(shard[3])
    there = {int(match[2]) for name in files if (match := _SHARD.fullmatch(name))}
    first = 0 if 0 in there else 1
    for number in range(first, min(count, len(files) + 100) + first):
        if number not in there:
            yield f"{shard[1]}-{number:0{width}}-of-{shard[3]}.{shard[4]}"
