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
    """The keys of CONFIG_MAPPING_NAMES in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for name in filter(_SOURCES.fullmatch, archive.namelist()):
            for node in ast.walk(ast.parse(archive.read(name))):
                if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    if any(
                        getattr(target, "id", "") == "CONFIG_MAPPING_NAMES" for target in targets
                    ):
                        yield from _first_of_pairs(node.value)


def _first_of_pairs(value: ast.expr) -> Iterator[str]:
    for pair in ast.walk(value):
        if isinstance(pair, ast.Tuple) and len(pair.elts) == 2:
            first = pair.elts[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


if __name__ == "__main__":
    main(sys.argv[1:])
