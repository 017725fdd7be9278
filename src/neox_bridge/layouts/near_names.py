"""What a path that does not exist may be a misspelling of."""

import os
from contextlib import suppress
from difflib import get_close_matches
from itertools import islice

from neox_bridge.errors import BridgeError, Unreachable
from neox_bridge.frameworks.suites import OWNER, full_id, nearest

_LEAST_SIMILAR = 0.75  # as difflib measures it: 1 for equal names
_MOST_NAMES = 10_000  # of a folder that are compared


def nearest_path(path: str) -> str:
    """The existing local folder that is nearest to one that does not exist; "" if none is near.

    Names are compared where the path and the folders part. What comes after that must exist.
    """
    above, name = os.path.split(path.rstrip("/"))
    below: list[str] = []
    while above and not os.path.isdir(above):
        below.insert(0, name)
        above, name = os.path.split(above)
    if not name:
        return ""
    with suppress(OSError), os.scandir(above or ".") as entries:
        names = [entry.name for entry in islice(entries, _MOST_NAMES)]
        for match in get_close_matches(name, names, cutoff=_LEAST_SIMILAR):
            near = os.path.join(above, match, *below)
            if os.path.isdir(near):
                return near
    return ""


def suggestions(source: str) -> str:
    """Sentences with the nearest path, and the known model of that name; "" if there is none."""
    name, at, revision = source.partition("@")
    model = "" if "/" in name else full_id(name) or nearest(name)
    near = nearest_path(source)
    sentences = [f"Did you mean {near}?"] if near else []
    sentences += [f"On the Hub: {model}{at}{revision}."] if model else []
    return " ".join(sentences)


def check_not_local(source: str) -> None:
    """Raise BridgeError if ``org/name`` is rather a path with an error than a model of the Hub.

    So it is if the folder ``org`` exists, and either has a folder whose name is near or has files,
    which the local copies of an organization's models do not have beside them.
    """
    org, _, name = source.partition("/")
    if "@" in name or org == OWNER or not os.path.isdir(org):
        return
    near = nearest_path(source)
    has_files = False
    with suppress(OSError), os.scandir(org) as entries:  # it may not be readable
        has_files = any(entry.is_file() for entry in islice(entries, _MOST_NAMES))
    if near or has_files:
        advice = f" Did you mean {near}?" if near else ""
        raise BridgeError(
            f"{source}: no such folder.{advice} The Hub was not asked, because the folder {org} "
            f"exists. For a model of the Hub, write hf://{source}"
        )


def not_local_either(error: BridgeError, source: str, hint: str = "") -> BridgeError:
    """The error of a name that the Hub was asked for because there is no such folder.

    Errors of other classes than BridgeError and Unreachable are returned unchanged.

    Args:
        error: The error of the Hub.
        source: The name, as the user wrote it.
        hint: A sentence for the case that the Hub did not answer.
    """
    if type(error) not in (BridgeError, Unreachable):
        return error
    there = f"There is no local folder {source} either. {suggestions(source)}".rstrip()
    more = f" {hint}" if hint and isinstance(error, Unreachable) else ""
    return type(error)(f"{error} {there}{more}")
