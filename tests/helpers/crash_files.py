"""Kills patch, patch --revert and report at every call that changes the disk; a program.

crash_files.py FOLDER CASE: prints the number of points, or fails.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from crash_run import forked, tree
from stand_in_trees import write_tree

from neox_bridge.patch.patcher import KEPT, apply, plan_patch, revert
from neox_bridge.report.read import write_page

PAGE = '<meta name="generator" content="neox-bridge 1">'


def patch(place: Path) -> None:
    apply(plan_patch(place / "tree"))


def take_out(place: Path) -> None:
    revert(place / "tree")


def report(place: Path) -> None:
    write_page(str(place / "page.html"), f"{PAGE} new", overwrite=True)


CASES: dict[str, Callable[[Path], None]] = {"patch": patch, "revert": take_out, "report": report}


def prepared(folder: Path, case: str) -> Path:
    place = folder / "place"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    if case == "report":
        (place / "page.html").write_text(f"{PAGE} old")
    else:
        write_tree("today", place / "tree")
    if case == "revert":
        patch(place)
    return place


def child(case: str, place: Path, point: int | None) -> int:
    """A case in a child process: see ``forked``."""
    return forked(lambda: CASES[case](place), point)


def main(folder: Path, case: str) -> int:
    place = prepared(folder, case)
    before = tree(place)
    points = child(case, place, None)
    after = tree(place)
    assert after != before
    for point in range(points):
        place = prepared(folder, case)
        assert child(case, place, point) == -1, point
        left = tree(place)
        for name, digest in left.items():  # each file is whole: the old one or the new one
            if not Path(name).name.startswith(".") and KEPT not in name:
                assert digest in (before.get(name), after.get(name)), (point, name)
        CASES[case](place)
        assert tree(place) == after, (point, set(tree(place)) ^ set(after))
    return points


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), sys.argv[2]))
