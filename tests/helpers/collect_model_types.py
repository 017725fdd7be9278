"""Writes ``frameworks/model_types.json``, the values of ``model_type`` that transformers knows.

    python tests/helpers/collect_model_types.py WHEEL... > model_types.json

Each WHEEL is one of transformers, oldest first. Sources are parsed, never imported. A version
lists the types that it added. One that it removed starts with a minus sign.
"""

import ast
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

_SOURCES = re.compile(r"transformers/models/auto/(configuration_auto|auto_mappings)\.py")


def main(wheels: list[str]) -> None:
    """Print the file."""
    before: set[str] = set()
    changes = {}
    for wheel in wheels:
        types = set(model_types(wheel))
        added, removed = sorted(types - before), sorted(before - types)
        version = Path(wheel).name.split("-")[1]
        name = ".".join(version.split(".")[:2])
        changes[name] = " ".join([*added, *(f"-{one}" for one in removed)])
        before = types
    print(json.dumps(changes, indent=1))


def model_types(wheel: str) -> Iterator[str]:
    """The keys of CONFIG_MAPPING_NAMES in a wheel, also those of its ``update``."""
    with zipfile.ZipFile(wheel) as archive:
        for name in filter(_SOURCES.fullmatch, archive.namelist()):
            for node in ast.walk(ast.parse(archive.read(name))):
                if isinstance(node, ast.Assign):
                    names = node.targets
                elif isinstance(node, ast.AnnAssign):
                    names = [node.target]
                elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    names = [node.func.value]
                else:
                    continue
                if any(getattr(one, "id", "") == "CONFIG_MAPPING_NAMES" for one in names):
                    yield from _keys(node)


def _keys(node: ast.AST) -> Iterator[str]:
    """The first of each pair, and the keys of each dictionary."""
    for inner in ast.walk(node):
        firsts = inner.elts[:1] if isinstance(inner, ast.Tuple) and len(inner.elts) == 2 else []
        for first in [*firsts, *(inner.keys if isinstance(inner, ast.Dict) else [])]:
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


if __name__ == "__main__":
    main(sys.argv[1:])
