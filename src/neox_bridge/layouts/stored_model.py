"""A repository of weights as it is stored, for models of no known family.

Names, shapes, dtypes and bytes are known without a family. That is enough to show, compare and
audit them, but not to convert them.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

from neox_bridge.architectures.rows import Row
from neox_bridge.findings import Finding
from neox_bridge.layouts.checkpoint import Kind
from neox_bridge.layouts.quantized import Quantization
from neox_bridge.tensors.pieces import Whole, whole_of
from neox_bridge.tensors.tensor_ref import TensorRef

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


def pattern_of(name: str) -> str:
    """The name of a tensor with ``#`` for each number between dots."""
    return _NUMBER.sub("#", name)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a file describes it.

    Attributes:
        dtype: The name in torch. If this version cannot decode it, the name in the file.
        shape: The shape, in elements.
        ref: Its place. If the dtype cannot be decoded, all its bytes as a vector of uint8.
        decoded: Whether the values can be read.
    """

    dtype: str
    shape: tuple[int, ...]
    ref: TensorRef
    decoded: bool = True

    @property
    def elements(self) -> int:
        """The number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Component:
    """One set of weight files, such as the shards of an index.

    Attributes:
        name: What its tensors are called after: "" for the main weights of the repository, a
            folder below it, or a file.
        folder: The folder of its files: an absolute path, or a URL.
        files: The files with its tensors.
        tensors: The tensors by the names in the files.
        index: The index file; "" if there is none.
        total_size: ``metadata.total_size`` of the index, or None.
        config: The config.json (or adapter_config.json) in the folder.
        findings: What is odd about its files.
    """

    name: str
    folder: str
    files: tuple[str, ...]
    tensors: Mapping[str, StoredTensor]
    index: str = ""
    total_size: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    def full_name(self, name: str) -> str:
        """The name of a tensor in the repository."""
        return f"{self.name}/{name}" if self.name else name

    @cached_property
    def patterns(self) -> "tuple[Pattern, ...]":
        """The tensors as patterns of their names in the repository."""
        counts: dict[tuple[str, str, tuple[int, ...]], tuple[str, int, int]] = {}
        for name, tensor in self.tensors.items():
            full = self.full_name(name)
            key = (pattern_of(full), tensor.dtype, tensor.shape)
            first, count, nbytes = counts.get(key, (full, 0, 0))
            counts[key] = (first, count + 1, nbytes + tensor.ref.nbytes)
        return tuple(Pattern(*key, *totals) for key, totals in counts.items())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.ref.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class StoredModel:
    """All weights of a repository, as they are stored. No tensor has been read.

    It has the attributes of ``Checkpoint`` that need no family.

    Attributes:
        path: The folder, or its URL.
        components: The sets of weight files. The main weights come first.
        raw: The config.json of the main weights, or {}.
        reason: Why its family is not used, as a sentence.
        quantization: How the weights are quantized, if they are.
        tokenizer: Absolute paths of its tokenizer files.
        casts: The dtypes in which some tensors are read instead of those that are stored.
    """

    path: str
    components: tuple[Component, ...]
    raw: Mapping[str, Any]
    reason: str
    findings: tuple[Finding, ...] = ()
    quantization: Quantization | None = None
    tokenizer: tuple[str, ...] = ()
    revision: str = ""
    hub_repo: str = ""
    source: str = ""
    kind: Kind = "hf"
    casts: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def stored(self) -> Mapping[str, StoredTensor]:
        """Every tensor, with the name of its component before its own."""
        return dict(self._named())

    def _named(self) -> Iterator[tuple[str, StoredTensor]]:
        for component in self.components:
            for name, tensor in component.tensors.items():
                yield component.full_name(name), tensor

    @cached_property
    def tensors(self) -> Mapping[str, Whole]:
        """Every tensor to read. Those that cannot be decoded are vectors of bytes."""
        wholes = {name: whole_of(tensor.ref) for name, tensor in self.stored.items()}
        casts = {n: replace(wholes[n], dtype=dtype) for n, dtype in self.casts.items()}
        return wholes | casts

    @property
    def index_findings(self) -> tuple[Finding, ...]:
        """Those of ``findings`` about which files there are and what their index names."""
        return tuple(finding for part in self.components for finding in part.findings)

    @property
    def files(self) -> tuple[str, ...]:
        """All weight files."""
        return tuple(file for component in self.components for file in component.files)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(component.nbytes for component in self.components)

    @property
    def by_name(self) -> Mapping[str, Row]:
        """The rows of a family: none."""
        return {}

    @property
    def has_optimizer(self) -> bool:
        """Whether it has optimizer states that a family could read: no."""
        return False

    @property
    def neox(self) -> None:
        """The layout in GPT-NeoX: none."""
        return None

    @property
    def family(self) -> str | None:
        """``model_type`` of the config, or None."""
        family = self.raw.get("model_type")
        return family if isinstance(family, str) and family.isprintable() else None


def dtype_of_most_elements(model: StoredModel) -> str:
    """The dtype of most elements; "" if there are none."""
    return next((dtype for dtype, _ in elements_by_stored_dtype(model).most_common(1)), "")


def elements_by_stored_dtype(model: StoredModel) -> Counter[str]:
    """The number of elements of each dtype."""
    elements: Counter[str] = Counter()
    for tensor in model.stored.values():
        elements[tensor.dtype] += tensor.elements
    return elements


@dataclass(frozen=True, slots=True)
class Pattern:
    """Tensors whose names differ only in numbers, and that have one shape and dtype.

    Attributes:
        name: The name with ``#`` for each number.
        example: The name of the first one.
        count: How many tensors.
        nbytes: The bytes of all of them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    example: str
    count: int
    nbytes: int


def patterns(model: StoredModel) -> tuple[Pattern, ...]:
    """The tensors as patterns, in the order in which they are stored."""
    return tuple(pattern for component in model.components for pattern in component.patterns)
