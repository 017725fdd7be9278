"""The branches and tags of a Hub model, and the steps in their names."""

from dataclasses import dataclass
from typing import Literal

from neox_bridge.stores.hub_api import explained, hub_api
from neox_bridge.stores.step_names import step_of
from neox_bridge.wording import natural


@dataclass(frozen=True, slots=True)
class Revision:
    """A branch or tag.

    commit: 40 hexadecimal digits. step: of a name like ``step1000``; None for ``main``.
    """

    name: str
    kind: Literal["branch", "tag"]
    commit: str
    step: int | None


def revisions(repo: str) -> tuple[Revision, ...]:
    """All branches and tags of ``org/name``, sorted by step, those without one first; one request.

    Raises BridgeError if there is no such repository or the Hub does not answer.
    """
    api = hub_api(f"The revisions of {repo} are on the Hub")
    with explained(repo):
        refs = api.list_repo_refs(repo)
    named = [
        *(Revision(r.name, "branch", r.target_commit, step_of(r.name)) for r in refs.branches),
        *(Revision(r.name, "tag", r.target_commit, step_of(r.name)) for r in refs.tags),
    ]
    return tuple(sorted(named, key=lambda r: (-1 if r.step is None else r.step, natural(r.name))))
