"""Checks a few values of optimizer states, to detect a wrong order cheaply.

The 16-bit weights must equal the rounded fp32 master weights, because DeepSpeed copies them at the
end of each step. The padding of a flat group must be zero, because its gradients are zero.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from neox_bridge.errors import BridgeError
from neox_bridge.findings import Finding
from neox_bridge.formats.tensor_values import read_box
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.universal_folder import MASTER
from neox_bridge.optimizer.states import Optimizer, Place, stored_tensors
from neox_bridge.stores.paths import is_local, open_file
from neox_bridge.tensors.dtypes import FLOATING, itemsize
from neox_bridge.tensors.pieces import Whole
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.wording import some

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_END_ELEMENTS = 8  # elements at the start of a parameter, and at its end
_PADDING_ELEMENTS = 64  # elements at the start of each run of padding, and at the end of the last


# the location of a weight, and some elements of it and of its master weight
_Pair = tuple[Place, TensorRef, TensorRef]


def master_findings(checkpoint: Checkpoint, optimizer: Optimizer) -> tuple[Finding, ...]:
    """A warning if master weights do not round to the weights, in the checked elements.

    Reads the first and the last elements of every parameter, on local disks only.
    """
    state = checkpoint.neox_state
    pairs = [
        pair
        for place, ref in stored_tensors(checkpoint).items()
        if (whole := optimizer.shards.get(place, {}).get(MASTER)) is not None
        for pair in _pairs(place, ref, whole)
    ]
    differing = sorted(set(_differing(pairs)))
    if not differing:
        return ()
    names = [f"layer {layer}: {name}" for _, (layer, name) in differing]
    why = "its optimizer files are from another step, or the weights were changed after the save"
    if state.iteration == 0:
        why += ", or the run has no warmup, so its first step on zero gradients decayed them"
    return (
        Finding(
            "masters-not-weights",
            "warning",
            f"{state.folder}: the fp32 master weights of the optimizer do not round to the "
            f"weights, in {len(differing):,} of {len({place for place, _, _ in pairs}):,} "
            f"tensors: {some(names, 3)}. Perhaps {why}",
            "copy all files of the step again if they may be from different steps",
            subject="fp32 masters",
        ),
    )


def check_padding(parts: Iterable[TensorRef], key: str) -> None:
    """Raise BridgeError if the padding after the last parameter of a flat group is not zero.

    Args:
        parts: The padding, in the order of the group.
        key: The key of the group's masters, for the error message.
    """
    local = [ref for ref in parts if is_local(ref.file)]
    runs = [_run(ref, 0, min(_PADDING_ELEMENTS, ref.shape[0])) for ref in local]
    for ref in local[-1:]:
        count = min(_PADDING_ELEMENTS, ref.shape[0])
        runs.append(_run(ref, ref.shape[0] - count, count))
    for ref, values in _read(runs):
        if values.any():
            raise BridgeError(
                f"{ref.file}: {key} contains non-zero values after the last parameter of the "
                "group. The files are from another model or save. Copy the checkpoint again."
            )


def _pairs(place: Place, weight: TensorRef, master: Whole) -> Iterator[_Pair]:
    """The first and the last elements of a parameter."""
    sources = [piece.source for piece in master.pieces if piece.source is not None]
    plain = weight.strides is None and weight.dtype in FLOATING
    if not plain or not sources or not is_local(weight.file) or not is_local(sources[0].file):
        return
    first, last = sources[0], sources[-1]
    count = min(_END_ELEMENTS, _elements(first))
    yield place, _run(weight, 0, count), _run(first, 0, count)
    count = min(_END_ELEMENTS, _elements(last))
    ends = [_run(ref, _elements(ref) - count, count) for ref in (weight, last)]
    yield place, ends[0], ends[1]


def _elements(ref: TensorRef) -> int:
    return ref.nbytes // itemsize(ref.dtype)


def _run(ref: TensorRef, low: int, count: int) -> TensorRef:
    return TensorRef(ref.file, ref.offset + low * itemsize(ref.dtype), ref.dtype, (count,))


def _differing(pairs: Sequence[_Pair]) -> Iterator[Place]:
    import numpy as np

    values = dict(_read({ref for _, *refs in pairs for ref in refs}))
    for place, weight_ref, master_ref in pairs:
        weight, master = values[weight_ref], values[master_ref]
        with np.errstate(all="ignore"):
            rounded = master.astype(weight.dtype)
            first, second = weight.astype(np.float64), rounded.astype(np.float64)
        if not np.array_equal(first, second, equal_nan=True):
            yield place


def _read(refs: Iterable[TensorRef]) -> Iterator[tuple[TensorRef, "Array"]]:
    """The values of small tensors, read in file order."""
    by_file: dict[str, list[TensorRef]] = {}
    for ref in sorted(refs, key=lambda ref: (ref.file, ref.offset)):
        by_file.setdefault(ref.file, []).append(ref)
    for path, held in by_file.items():
        with open_file(path) as file:
            for ref in held:
                yield ref, read_box(file, ref, (0,), ref.shape)
