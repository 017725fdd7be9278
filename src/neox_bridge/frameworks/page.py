"""Writes a page: ``python -m neox_bridge.frameworks.page docs/reference/changes.md``."""

import sys
from pathlib import Path

from neox_bridge.frameworks.change import Change
from neox_bridge.frameworks.changes import CHANGES

_HEAD = """# Changes that break checkpoints

```console
$ neox-bridge changes --for pythia-neox              # those that affect a checkpoint
$ neox-bridge changes --since 4.30 --until 2024-03   # those between two versions or dates
```

These are all known changes of GPT-NeoX and transformers that alter what a checkpoint contains or
means, newest first. A loud change fails or warns. A silent one does not. A proposed change is a
pull request that is not merged: no version of GPT-NeoX has it, but a checkpoint may come from its
branch.

"""
_TAIL = "Next: [what loads in the real GPT-NeoX](loads-in-gpt-neox.md)."


def page() -> str:
    """The page, from CHANGES alone."""
    lines = [_HEAD.rstrip(), "", "| date | where | what | |", "|---|---|---|---|"]
    for change in CHANGES:
        loud = "loud" if change.loud else "silent"
        what = f"[{change.id}](#{change.id})"
        lines.append(f"| {change.date} | {where(change)} | {what} | {loud} |")
    for change in CHANGES:
        lines += ["", f"## {change.id}", "", f"{change.title[0].upper()}{change.title[1:]}."]
        lines += ["", f"- {where(change)}, {change.date}: [{_name(change)}]({change.link})"]
        lines += [f"- Models: {', '.join(change.families)}"]
        lines += [f"- {'Loud' if change.loud else 'Silent'}: {change.symptom}"]
        lines += [f"- What to do: {change.remedy}"]
    lines += ["", _TAIL]
    return "\n".join(lines) + "\n"


def where(change: Change) -> str:
    """The framework, and its version or commit."""
    if change.framework == "transformers":
        return f"transformers {change.version}"
    return f"GPT-NeoX {f'{change.pull} (proposed)' if change.proposed else change.commit}"


def _name(change: Change) -> str:
    return change.pull or change.commit or "source"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
