"""The files of a step that are missing, or left over, according to its other files."""

import os
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from neox_bridge.errors import BridgeError, Refused
from neox_bridge.findings import Finding
from neox_bridge.layouts.checkpoint import NeoxState
from neox_bridge.layouts.file_names import OPTIMIZER, RANK, rank_file, states_file
from neox_bridge.wording import some

_MOST_RANKS = 1 << 30
_SHOWN = 7  # of the files that are missing, of which there may be any number
_COPY_AGAIN = "Copy the checkpoint again."


def told_ranks(meta: Mapping[str, Any], key: str) -> int | None:
    """A number of ranks in an mp_rank file; None if it is missing."""
    value = meta.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if 1 <= value <= _MOST_RANKS else None


def missing_ranks(names: Sequence[str], meta: Mapping[str, Any]) -> tuple[str, ...]:
    """The missing mp_rank files of a step. At most eight are listed.

    DeepSpeed saves one for each model-parallel process, and their number in each of them
    (mp_world_size; runtime/engine.py, _save_checkpoint). If all are missing, the names of the
    optimizer files show how many there were.

    meta: the contents of the first mp_rank file; empty if there is none.
    """
    present = {int(match[1]) for name in names if (match := RANK.fullmatch(name))}
    count = told_ranks(meta, "mp_world_size") or 0
    if not present:
        states = [int(match[3]) for name in names if (match := OPTIMIZER.fullmatch(name))]
        count = max(states, default=-1) + 1
    absent = (number for number in range(count) if number not in present)
    return tuple(map(rank_file, islice(absent, _SHOWN + 1)))


def missing_ranks_finding(folder: str, missing: Sequence[str]) -> Finding:
    """The finding for missing mp_rank files beside complete layers."""
    return Finding(
        "mp-rank-missing",
        "warning",
        f"{folder} is incomplete: {some(list(missing))} missing. The weights are in other files, "
        "so they can be converted, but no run can go on from this folder",
        "copy the checkpoint again",
        subject="mp_rank files",
    )


def refuse_missing_ranks(state: NeoxState) -> None:
    """Raise BridgeError if mp_rank files are missing that a run needs to resume."""
    if state.missing_ranks:
        raise BridgeError(
            f"{state.folder} is incomplete: {some(list(state.missing_ranks))} missing. "
            f"{_COPY_AGAIN}"
        )


def rank_files(
    folder: str, optimizer: Sequence[str], dp: int | None, model_parallel: int
) -> list[list[str]]:
    """The optimizer state files by the number of their mp_rank file, then by rank.

    Args:
        folder: The folder of the files.
        optimizer: Their names.
        dp: The number of data-parallel ranks in the mp_rank files; None if they do not contain it.
        model_parallel: The number of mp_rank files.

    Raises:
        BridgeError: If a file is missing, or left over from another layout.
        Refused: If two files belong to the same rank.
    """
    by_rank: dict[tuple[int, int], str] = {}
    for name in optimizer:
        match = OPTIMIZER.fullmatch(name)
        assert match is not None  # the caller lists names of this form only
        place = int(match[2]), int(match[3])
        if place in by_rank:
            raise Refused(
                f"{folder} contains two optimizer state files of the same rank, "
                f"{by_rank[place]} and {name}. Move the wrong one out of the folder."
            )
        by_rank[place] = name
    most = max(rank for rank, _ in by_rank) + 1
    dp = dp or most
    places = ((rank, number) for rank in range(dp) for number in range(model_parallel))
    absent = (place for place in places if place not in by_rank)
    if missing := list(islice(absent, _SHOWN)):
        prefix = "bf16_" if all(name.startswith("bf16_") for name in by_rank.values()) else ""
        names = [prefix + states_file(*place) for place in missing]
        count = dp * model_parallel - sum(d < dp and n < model_parallel for d, n in by_rank)
        more = f" and {count - len(names)} more" if count > len(names) else ""
        raise BridgeError(
            f"{folder} is incomplete: {', '.join(names)}{more} missing, of {dp} data-parallel "
            f"ranks{' (dp_world_size of the mp_rank files)' if dp > most else ''}. {_COPY_AGAIN}"
        )
    if extra := sorted(
        (n, d, name) for (d, n), name in by_rank.items() if d >= dp or n >= model_parallel
    ):
        names = [name for _, _, name in extra]
        raise BridgeError(
            f"{folder} has optimizer states of more ranks than the {dp} of its mp_rank files: "
            f"{some(names)}. Remove the files of the other layout."
        )
    return [
        [os.path.join(folder, by_rank[rank, number]) for rank in range(dp)]
        for number in range(model_parallel)
    ]
