"""Which versions of transformers have a class for a ``model_type``, from ``model_types.json``."""

import json
from functools import cache
from pkgutil import get_data

from neox_bridge.frameworks.facts import TransformersFacts
from neox_bridge.frameworks.targets import version_number

Span = tuple[str, str]


def class_spans(model_type: str) -> list[Span]:
    """The versions with a class, as (first, first without it again); "" if it is still there.

    Only the versions of the file are known. Those between two of them are not.
    """
    return _spans().get(model_type, [])


def lacks_class(model_type: str, facts: TransformersFacts) -> bool:
    """Whether a version is known to have no class for a ``model_type``."""
    wanted = version_number(facts.version)
    newer = [one for one in _changes() if version_number(one) >= wanted]
    older = [one for one in _changes() if version_number(one) <= wanted]
    if not newer:
        return False  # a version after the last known one may have any class
    return not any(_has(model_type, version) for version in {newer[0], *older[-1:]})


def _has(model_type: str, version: str) -> bool:
    number = version_number(version)
    return any(
        version_number(first) <= number and (not end or number < version_number(end))
        for first, end in class_spans(model_type)
    )


@cache
def _changes() -> dict[str, str]:
    data = get_data("neox_bridge.frameworks", "model_types.json")
    assert data is not None
    changes: dict[str, str] = json.loads(data)
    return changes


@cache
def _spans() -> dict[str, list[Span]]:
    spans: dict[str, list[Span]] = {}
    for version, names in _changes().items():
        for name in names.split():
            if name.startswith("-"):
                name = name[1:]
                spans[name][-1] = (spans[name][-1][0], version)
            else:
                spans.setdefault(name, []).append((version, ""))
    return spans
