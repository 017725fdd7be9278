"""Whether the facts of a GPT-NeoX tree show a change of the list."""

from neox_bridge.frameworks.change import Change
from neox_bridge.frameworks.eras import MERGED, facts_after
from neox_bridge.frameworks.facts import TreeFacts


def has_change(tree: TreeFacts, change: Change) -> bool | None:
    """Whether a GPT-NeoX tree has a change; None where its source does not tell."""
    if facts := change.sets.keys() - {"deepspeed"}:
        earlier = MERGED[: MERGED.index(change)]
        return all(
            getattr(tree, fact)
            not in {facts_after(earlier[:count])[fact] for count in range(len(earlier) + 1)}
            for fact in facts
        )
    if change.adds_keys or change.removes_keys:
        return tree.keys.issuperset(change.adds_keys) and tree.keys.isdisjoint(change.removes_keys)
    return None
