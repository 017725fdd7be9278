"""Compares optimizer states of two checkpoints, and master weights with stored weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from neox_bridge.execution.context import Context
from neox_bridge.findings import Finding
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.open import open_checkpoint
from neox_bridge.layouts.universal_folder import MASTER
from neox_bridge.optimizer.masters import with_masters
from neox_bridge.optimizer.read_export import read_export
from neox_bridge.optimizer.read_files import read_optimizer
from neox_bridge.optimizer.states import (
    STATE_OF,
    Optimizer,
    States,
    states,
    stored_tensors,
    tensor_of,
)
from neox_bridge.tensors.flat import segments
from neox_bridge.tensors.geometry import with_rows
from neox_bridge.tensors.pieces import Whole, whole_of
from neox_bridge.verification.compare import Difference, DifferenceKind, compare, each, zero_beyond
from neox_bridge.verification.verify import describe, divided, mismatch, summary, verify
from neox_bridge.wording import plural, some, verb


def named(checkpoint: Checkpoint, optimizer: Optimizer) -> dict[str, Whole]:
    """The states by combined names: state, colon, tensor."""
    return flattened(states(checkpoint, optimizer))


def flattened(by_state: States) -> dict[str, Whole]:
    """States by combined names."""
    return {
        f"{key}{STATE_OF}{name}": whole
        for key, wholes in by_state.items()
        for name, whole in wholes.items()
    }


def compare_named(
    source: Checkpoint,
    first: Mapping[str, Whole],
    second: Mapping[str, Whole],
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Difference]:
    """The differences between two sets of states in the form of ``named``.

    Additional rows of padding in the second are compared with zeros.
    """
    context = Context(progress)

    def one(name: str) -> Difference:
        if name not in first or name not in second:
            kind: DifferenceKind = "only-first" if name in first else "only-second"
            return Difference(name, kind, prod({**first, **second}[name].shape))
        a, b, weight = first[name], second[name], source.by_name[tensor_of(name)].weight
        rows = min(a.shape[0], b.shape[0])
        if weight.split == "vocab" and a.shape != b.shape:
            if not zero_beyond(b, rows, context):
                detail = f"rows {rows} to {b.shape[0] - 1} are padding, but are not zero"
                return Difference(name, "values", prod(b.shape), detail=detail)
            a, b = with_rows(a, rows), with_rows(b, rows)
        difference = divided(compare(name, a, b, context), weight, b)
        context.wrote(b.nbytes, "copied")
        return difference

    differences = each(sorted({*first, *second}), one, context, workers)
    return [difference for difference in differences if difference.kind != "equal"]


def checker(
    source: Checkpoint,
    optimizer: Optimizer,
    given: States | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Callable[[str], None]:
    """A check for ``execute``: raises Unverified if a finished folder differs from the source.

    given: states that were written instead of those of the source. A universal target has no
    weights except the master weights, which are states.
    """

    def check(folder: str) -> None:
        target = open_checkpoint(folder)
        if target.neox is None or not target.neox.universal:
            weights = verify(source, target, workers=workers, progress=progress)
            if not weights.holds:
                raise mismatch(source, summary(weights))
        written = read_optimizer(target)
        want = named(source, optimizer) if given is None else flattened(given)
        have = named(target, written)
        differences = compare_named(source, want, have, workers=workers, progress=progress)
        _check_none([*differences, *_scalars(optimizer, written)], source)

    return check


def export_checker(
    source: Checkpoint,
    optimizer: Optimizer,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Callable[[str], None]:
    """A check for ``execute``: raises Unverified if exported states differ from the source."""

    def check(folder: str) -> None:
        exported = flattened(read_export(folder, source))
        expected = named(source, optimizer)
        differences = compare_named(source, expected, exported, workers=workers, progress=progress)
        _check_none(differences, source)

    return check


def _check_none(differences: Sequence[Difference], source: Checkpoint) -> None:
    if differences:
        raise mismatch(source, describe(differences[0]))


def fresh_checker(
    source: Checkpoint, first: Callable[[str], None], *, workers: int | None = None
) -> Callable[[str], None]:
    """Run ``first``, then raise Unverified unless masters equal weights and moments are zero."""

    def check(folder: str) -> None:
        first(folder)
        target = open_checkpoint(folder)
        masters = verify(source, with_masters(target), workers=workers)
        if not masters.holds:
            raise mismatch(source, f"its master weights: {summary(masters)}")
        context, states_there = Context(), named(target, read_optimizer(target))
        moments = [name for name in states_there if not name.startswith(MASTER)]

        def zero(name: str) -> bool:
            return all(zero_beyond(part, 0, context) for part in segments(states_there[name]))

        if not all(each(moments, zero, context, workers)):
            raise mismatch(source, "the moments of its new optimizer are not zero")

    return check


def _scalars(source: Optimizer, target: Optimizer) -> Iterator[Difference]:
    # GPT-NeoX has named its groups since 2024; before, their order tells them apart
    source_groups = {group.settings.get("name", n): group for n, group in enumerate(source.groups)}
    for number, group in enumerate(target.groups):
        want = source_groups.get(group.settings.get("name", number))
        if want is None or want.scalars != group.scalars:
            yield Difference(
                "the optimizer's steps", "values", detail=("they differ from the source")
            )
        if want is None or want.settings != group.settings:
            detail = "they differ from the planned ones"
            yield Difference("the optimizer's hyperparameters", "values", detail=detail)


@dataclass(frozen=True, slots=True)
class RoundedMasters:
    """The result of comparing every stored tensor with its master weight.

    Attributes:
        compared: The number of tensors that were compared, of all tensor-parallel ranks.
        differing: The names of those that are not their masters rounded to nearest, such as "layer
            2: attention.dense.weight".
    """

    compared: int
    differing: tuple[str, ...]


def rounded_masters(
    checkpoint: Checkpoint,
    optimizer: Optimizer,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> RoundedMasters | None:
    """Compare every weight with its master, bit for bit after rounding.

    Returns None without masters, and at ZeRO stage 3, which stores no weights besides them.
    """
    state = checkpoint.neox_state
    if state.is_zero3:
        return None
    pairs: dict[str, tuple[Whole, Whole]] = {}
    for (rank, (layer, name)), ref in stored_tensors(checkpoint).items():
        master = optimizer.shards.get((rank, (layer, name)), {}).get(MASTER)
        if master is not None:
            suffix = f" (tensor-parallel rank {rank})" if state.tp > 1 else ""
            pairs[f"layer {layer}: {name}{suffix}"] = (master, whole_of(ref))
    if not pairs:
        return None
    context = Context(progress)

    def differs(name: str) -> bool:
        master, weight = pairs[name]
        difference = compare(name, master, weight, context)  # compare rounds the master
        context.wrote(weight.nbytes, "copied")
        return difference.kind != "equal"

    flags = each(pairs, differs, context, workers)
    return RoundedMasters(
        len(pairs), tuple(name for name, flag in zip(pairs, flags, strict=True) if flag)
    )


def master_findings(result: RoundedMasters, path: str) -> Sequence[Finding]:
    """A warning if weights do not match their master weights."""
    if not result.differing:
        return ()
    return (
        Finding(
            "masters-not-weights",
            "warning",
            f"{path}: {len(result.differing):,} of {plural(result.compared, 'weight')} "
            f"{verb(len(result.differing), 'differ')} from the rounded fp32 master weights of the "
            f"optimizer: {some(list(result.differing), 3)}",
            "copy all files of the step again if they may be from different steps",
            subject="fp32 masters",
        ),
    )
