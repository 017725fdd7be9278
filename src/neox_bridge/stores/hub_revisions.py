"""The branches and tags of a model of the Hub, and the steps that they are named by."""

from dataclasses import dataclass
from typing import Literal

from neox_bridge.stores.hub_api import explained, hub_api
from neox_bridge.stores.step_names import step_of
from neox_bridge.wording import natural


@dataclass(frozen=True, slots=True)
class Revision:
    """commit: 40 hexadecimal digits. step: of a name like ``step1000``; None for ``main``."""

    name: str
    kind: Literal["branch", "tag"]
    commit: str
    step: int | None


def revisions(repo: str) -> tuple[Revision, ...]:
    """All branches and tags of ``org/name``, by step, those without one first; one request.

    Raises BridgeError where there is no such repository, or the Hub can't be asked.
    """
    api = hub_api(f"The revisions of {repo} are on the Hub")
    with explained(repo):
        refs = api.list_repo_refs(repo)
    kinds: tuple[tuple[Literal["branch", "tag"], list[object]], ...] = (
        ("branch", refs.branches),
        ("tag", refs.tags),
    )
    named = [
        Revision(ref.name, kind, ref.target_commit, step_of(ref.name))  # type: ignore[attr-defined]
        for kind, listed in kinds
        for ref in listed
    ]
    return tuple(sorted(named, key=_order))


def _order(revision: Revision) -> tuple[int, list[tuple[int, str]], str]:
    return -1 if revision.step is None else revision.step, natural(revision.name), revision.kind
