"""Places of a GPT-NeoX source that store computed buffers, and their changes."""

from dataclasses import dataclass

BUFFERS = ("inv_freq", "slopes")
HOME = "megatron/model/positional_embeddings.py"
SCRIPTS_FOLDER = "tools/ckpts"
TRAIN_SCRIPTS = ("train.py", "deepy.py", "eval.py", "generate.py")
KEPT = ".neox-bridge.orig"  # the folder of a tree that has the original files
HOOK = "_neox_bridge_load"
MARK = "# neox-bridge"


@dataclass(frozen=True, slots=True)
class Place:
    """A line that stores a buffer. unknown: why its form is unknown, or "".

    persistent: the code of that argument, nothing where there is none.
    hooked: the class has the load hook of this patch already.
    """

    path: str
    line: int
    owner: str
    buffer: str
    persistent: str = ""
    hooked: bool = False
    unknown: str = ""

    def __str__(self) -> str:
        what = f"{self.path}:{self.line} ({self.owner}: {self.buffer})"
        return f"{what}: {self.unknown}" if self.unknown else what


@dataclass(frozen=True, slots=True)
class Change:
    """One change to a file: the line of the old text that it belongs to, and what it is."""

    line: int
    what: str


def changes_for(places: list[Place]) -> list[Change]:
    """What ``edits.edited`` does at these places."""
    changes, hooked = [], set()
    for place in places:
        if not place.persistent:
            what = f"{place.owner}: {place.buffer} no longer stored (persistent=False)"
            changes.append(Change(place.line, what))
        if place.owner not in hooked:
            hooked.add(place.owner)
            stays = f" (persistent={place.persistent} stays)" if place.persistent else ""
            what = f"{place.owner}: loads with and without {place.buffer}{stays}"
            changes.append(Change(place.line, what))
    return changes
