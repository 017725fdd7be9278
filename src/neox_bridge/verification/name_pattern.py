"""Globs of tensor names; one that matches nothing is an error, and names its neighbors."""

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from neox_bridge.errors import UsageError


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that match a glob, in their order.

    Args:
        pattern: A glob such as ``*.bias``; ``*`` matches every name.
        names: Hugging Face names of tensors.

    Raises:
        UsageError: No name matches, so that a comparison would pass for nothing.
    """
    known = list(names)
    chosen = [name for name in known if fnmatchcase(name, pattern)]
    if not chosen and known:
        near = [name for name in known if pattern.strip("*") in name][:1]
        near = near or get_close_matches(pattern, known, 1, 0) or known[:1]
        fix = f"It is a glob of whole names such as {near[0]}."
        if near and pattern.strip("*") and pattern.strip("*") in near[0]:
            fix += f" Use '*{pattern.strip('*')}*'."
        raise UsageError(["tensor"], f"no tensor matches {pattern!r}", fix)
    return chosen
