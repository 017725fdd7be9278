"""Comparing folders, file by file."""

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


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
