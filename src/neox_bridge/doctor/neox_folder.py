"""Finds defects in the files of a GPT-NeoX folder: files of two layouts."""

import os
import re
import shlex
from collections.abc import Iterator

from neox_bridge.doctor.verdict import Case, failure
from neox_bridge.findings import Command
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.stores.paths import listdir
from neox_bridge.wording import plural

_RANK = re.compile(r"mp_rank_\d+_model_states\.pt")


def stray_cases(folder: str) -> Iterator[Case]:
    """The case of mp_rank files that are left over from another layout, or missing."""
    names, sizes = _rank_files(folder)
    saved_by = next((size for size in sizes.values() if size), None)
    if saved_by is None or all(size in (None, len(names)) for size in sizes.values()):
        return
    strays = stray_ranks(folder)
    wrong = next(s for s in sizes.values() if s is not None and s != len(names))
    left = f"{', '.join(strays)} left over from another layout" if strays else "some are missing"
    remedy = "copy the checkpoint again, into an empty folder"
    if strays:
        remedy = Command(shlex.join(["rm", *(os.path.join(folder, name) for name in strays)]))
    yield failure(
        "mp-rank-files",
        f"{folder} has {plural(len(names), 'mp_rank file')}, which were saved by {wrong} "
        f"processes: {left}. DeepSpeed counts them before it loads anything",
        remedy,
        f"AssertionError: checkpoint count {len(names)} is different from saved mp_world_size "
        f"{wrong}",
        subject="mp_rank files",
    )


def stray_ranks(folder: str) -> tuple[str, ...]:
    """The mp_rank files that do not belong to the one complete set, if there is one.

    A set is complete if files 0 to W-1 all say mp_world_size W.
    """
    names, sizes = _rank_files(folder)
    for count in {size for size in sizes.values() if size}:
        if all(sizes[name] == count for name in names[:count]) and len(names) >= count:
            return tuple(names[count:])
    return ()


def _rank_files(folder: str) -> tuple[list[str], dict[str, int | None]]:
    names = sorted(name for name in listdir(folder) if _RANK.fullmatch(name))
    sizes: dict[str, int | None] = {}
    for name in names:
        value = read_torch(os.path.join(folder, name))
        world_size = value.get("mp_world_size") if isinstance(value, dict) else None
        sizes[name] = int(world_size) if isinstance(world_size, int) else None
    return names, sizes
