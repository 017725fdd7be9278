"""Comparing two folders, file by file."""

import filecmp
from pathlib import Path


def same_tree(first: Path, second: Path, but: tuple[str, ...] = ()) -> None:
    names = [
        sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        for root in (first, second)
    ]
    assert names[0] == names[1]
    for name in names[0]:
        if not name.endswith(but or ("\0",)):
            assert filecmp.cmp(first / name, second / name, shallow=False), name
