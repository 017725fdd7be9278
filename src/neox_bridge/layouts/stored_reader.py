"""Reads the weights of any model as they are stored: names, shapes, dtypes and places."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.findings import Finding
from neox_bridge.formats.safetensors import Entry, read_entries
from neox_bridge.layouts.folder_kinds import unfinished_download
from neox_bridge.layouts.index_findings import index_findings, index_ignored
from neox_bridge.layouts.linked_files import brought_along
from neox_bridge.layouts.quantized import (
    Quantization,
    QuantizedFolder,
    quantization_of,
    quantized_class,
)
from neox_bridge.layouts.stored_model import Component, StoredModel, StoredTensor, patterns
from neox_bridge.layouts.tensor_names import check_names, state_dict_of, tensors_of
from neox_bridge.layouts.text_files import list_folder, read_json
from neox_bridge.layouts.tokenizer import tokenizer_files
from neox_bridge.layouts.weight_sets import WeightSet, weight_sets
from neox_bridge.stores.paths import absolute, ahead, isdir
from neox_bridge.stores.step_names import NUMBERED
from neox_bridge.tensors.dtypes import BY_SAFETENSORS, FLOATING
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.wording import some

CONFIGS = ("config.json", "adapter_config.json", "model_index.json", "modules.json")
# endings of files, which need not be asked whether they are folders
_FILES = (".bin", ".gguf", ".jinja", ".json", ".md", ".model", ".py", ".safetensors", ".txt")
_DEPTH = 2  # levels of folders below the repository that may contain components
_UNDECODED = ("complex64", "complex128")  # they are two numbers each


def open_stored(path: str, reason: str, revision: str = "") -> StoredModel | None:
    """Read what every weight file of a folder describes; None if there are no weights.

    Args:
        path: A folder, or its URL.
        reason: Why no family is used, as a sentence.
        revision: ``org/name@revision`` of a model of the Hub, or "".

    Raises:
        BridgeError: A file is damaged, or missing although an index names it.
    """
    path = absolute(path)
    left: list[str] = []
    places = list(_places(path, left))
    pickled = all(one.pickled for _, _, one in places)
    singles = {(folder, one.files[0]) for folder, _, one in places if not one.index}
    components: list[Component] = []
    findings: list[Finding] = []
    named: set[str] = set()
    classes: dict[str, str] = {}
    for folder, below, weights in places:
        if weights.pickled and not pickled:
            left += [f"{below}/{file}" if below else file for file in weights.files]
            continue
        if weights.index and (folder, weights.name) in singles:
            findings.append(index_ignored(weights.name))
            continue
        name = below
        if name in named:  # a further set in the same folder
            name = os.path.join(below, weights.name)
        named.add(name)
        component, quantized = read_component(folder, name, weights)
        components.append(component)
        findings += component.findings
        classes |= {component.full_name(key): kind for key, kind in quantized.items()}
    if not components:
        return None
    if left:
        findings.append(
            Finding(
                "left-out",
                "info",
                f"not read: {some(left)}, pickles beside safetensors, or other steps",
                "name a folder to see what it contains",
            )
        )
    model = StoredModel(
        path=path,
        components=tuple(components),
        raw=components[0].config,
        reason=reason,
        findings=tuple(findings),
        tokenizer=tokenizer_files(path),
        revision=revision,
    )
    return replace(model, quantization=quantization_as_stored(model, classes))


def _places(path: str, left: list[str]) -> Iterator[tuple[str, str, WeightSet]]:
    """Every set of weights, with its folder and the path of that folder below the repository."""
    for folder, below, names in weight_folders(path, left):
        for one in weight_sets(folder, names):
            yield folder, below, one


def weight_folders(
    path: str, left: list[str] | None = None
) -> Iterator[tuple[str, str, Sequence[str]]]:
    """The folders of a repository that may contain weights.

    left: gets the folders of other steps, which do not count.

    Yields:
        The folder, its path below the repository, and the names in it.
    """
    yield from _folders(path, "", 0, [] if left is None else left)


def _folders(
    folder: str, below: str, depth: int, left: list[str]
) -> Iterator[tuple[str, str, Sequence[str]]]:
    names = list_folder(folder)
    yield folder, below, names
    if depth == _DEPTH:
        return
    for name in names:
        inner = os.path.join(folder, name)
        if name.startswith((".", "__")) or name.endswith(_FILES) or not isdir(inner):
            continue
        if os.path.islink(inner) and _contains(os.path.realpath(inner), os.path.realpath(folder)):
            continue  # the link leads back to a folder that is already listed
        if NUMBERED.fullmatch(name):
            left.append(os.path.join(below, name))
        else:
            yield from _folders(inner, os.path.join(below, name), depth + 1, left)


def _contains(folder: str, inner: str) -> bool:
    return os.path.commonpath((folder, inner)) == folder


def read_component(
    folder: str, name: str, weights: WeightSet
) -> tuple[Component, Mapping[str, str]]:
    """Read what a set of weights contains, and the classes of its quantized tensors.

    A tensor in two files is read from the one that the index names. Raises BridgeError if files or
    tensors are missing, or if two files contain a tensor and no index decides.
    """
    if weights.absent:
        listed = f"{weights.index} names" if weights.index else "the names of the others tell"
        what = f"{len(weights.absent)} shards are missing" if len(weights.absent) > 1 else ""
        first = os.path.join(folder, weights.absent[0])
        raise BridgeError(
            f"{first} is missing, although {listed} it{f' ({what})' if what else ''}. "
            f"{unfinished_download(folder) or 'Download it.'}"
        )
    classes: dict[str, str] = {}
    merged = MergedFiles(weights)
    files = [os.path.join(folder, file) for file in weights.files]
    for file, path in zip(weights.files, ahead(files), strict=True):
        stored, quantized = read_file(path)
        classes |= quantized
        merged.add(file, stored)
        for key, (home, _) in merged.clashes.items():
            raise BridgeError(
                f"{path} contains {key}, and so does {home}. No index tells which one is valid. "
                "Remove the file that does not belong to the model."
            )
    tensors = merged.tensors
    missing = sorted(set(weights.weight_map) - set(tensors) - set(classes))
    if missing:
        absent = os.path.join(folder, weights.weight_map[missing[0]])
        raise BridgeError(
            f"{absent} does not contain {some(missing)}, although {weights.index} says so. "
            f"{unfinished_download(folder) or 'Download the files again.'}"
        )
    others = sorted(name for name, kind in classes.items() if not kind)
    findings = [
        *_findings(weights, merged, complete=not classes),
        *_no_tensors(weights, others),
    ]
    classes = {name: kind for name, kind in classes.items() if kind}
    return (
        Component(
            name,
            folder,
            tuple(files),
            tensors,
            os.path.join(folder, weights.index) if weights.index else "",
            weights.total_size,
            _config(folder),
            tuple(findings),
        ),
        classes,
    )


class MergedFiles:
    """The tensors of the files of one set. One in two files is taken from the file in the index.

    Attributes:
        tensors: The tensors by name.
        homes: The file that each is taken from.
        twice: The other file of each tensor that is in two.
        clashes: The first and the last file of tensors that are in two, if no index decides.
    """

    def __init__(self, weights: WeightSet) -> None:
        self._weight_map = weights.weight_map
        self.tensors: dict[str, StoredTensor] = {}
        self.homes: dict[str, str] = {}
        self.twice: dict[str, str] = {}
        self.clashes: dict[str, tuple[str, str]] = {}

    def add(self, file: str, stored: Mapping[str, StoredTensor]) -> None:
        """Add the tensors of the next file."""
        for key, tensor in stored.items():
            wanted, home = self._weight_map.get(key), self.homes.get(key)
            if home is not None:
                self.twice[key] = file if home == wanted else home
                if wanted is None:
                    self.clashes[key] = (home, file)
                if file != wanted:
                    continue
            self.tensors[key], self.homes[key] = tensor, file


def read_file(path: str) -> tuple[dict[str, StoredTensor], Mapping[str, str]]:
    """The tensors of a weight file by name, and its other objects.

    Those are the classes of quantized tensors by name, and "" for what is no tensor.

    Raises BridgeError, which names the file, if it is damaged.
    """
    if path.endswith(".safetensors"):
        entries = read_entries(path)
        check_names(entries, path)
        return {name: _stored(path, entry) for name, entry in entries.items()}, {}
    from neox_bridge.formats.torch_file import read_torch

    value = state_dict_of(read_torch(path), path)
    tensors = tensors_of(value, path)
    others = {
        str(key): quantized_class(entry) for key, entry in value.items() if key not in tensors
    }
    return {
        name: StoredTensor(ref.dtype, ref.shape, ref, ref.dtype not in _UNDECODED)
        for name, ref in tensors.items()
    }, others


def of_quantized(folder: QuantizedFolder, reason: str) -> StoredModel:
    """The weights of a quantized checkpoint, whose files another reader has read."""
    tensors = {
        name: StoredTensor(ref.dtype, ref.shape, ref) for name, ref in folder.tensors.items()
    }
    component = Component("", folder.path, folder.files, tensors, config=folder.config)
    return StoredModel(
        path=folder.path,
        components=(component,),
        raw=folder.config,
        reason=reason,
        quantization=folder.quantization,
        kind=folder.kind,
    )


def _stored(path: str, entry: Entry) -> StoredTensor:
    dtype = BY_SAFETENSORS.get(entry.dtype)
    if dtype is not None and dtype.name not in _UNDECODED:
        ref = TensorRef(path, entry.offset, dtype.name, entry.shape)
        return StoredTensor(dtype.name, entry.shape, ref)
    label = entry.dtype if dtype is None else dtype.name
    ref = TensorRef(path, entry.offset, "uint8", (entry.nbytes,))
    return StoredTensor(label, entry.shape, ref, decoded=False)


def _config(folder: str) -> Mapping[str, Any]:
    """The config in the folder of a component; {} if there is none."""
    for name in CONFIGS[:2]:
        path = os.path.join(folder, name)
        if brought_along(path, folder):
            return read_json(path)
    return {}


def _findings(weights: WeightSet, merged: MergedFiles, *, complete: bool) -> Iterator[Finding]:
    """What is odd about the files of a set."""
    if weights.index:
        refs = {name: tensor.ref for name, tensor in merged.tensors.items()}
        yield from index_findings(weights, refs, merged.homes, merged.twice, complete=complete)
    elif len(weights.files) > 1:
        yield Finding(
            "no-index",
            "warning",
            f"the index file of {len(weights.files)} shards ({weights.name}) is missing. "
            "transformers would not load them",
            subject="missing index",
        )


def _no_tensors(weights: WeightSet, names: list[str]) -> Iterator[Finding]:
    """The finding about pickled objects that are not tensors."""
    if names:
        yield Finding(
            "not-tensors",
            "warning",
            f"{weights.name} contains objects that are not tensors, which are not read: "
            f"{some(names)}",
            "save the weights as safetensors, which contain tensors only",
        )


def quantization_as_stored(model: StoredModel, classes: Mapping[str, str]) -> Quantization | None:
    """How the weights are quantized. Weights are told from other tensors by their names.

    One tensor of each pattern is looked at, since there may be a hundred thousand.
    """
    refs = {one.example: TensorRef("", 0, one.dtype, one.shape) for one in patterns(model)}
    if not classes and all(ref.dtype in FLOATING for ref in refs.values()):
        return None  # a name alone proves nothing of a model of unknown family
    weights = frozenset(name for name in refs if name.endswith(".weight"))
    return quantization_of(model.path, model.raw, refs, weights, classes)
