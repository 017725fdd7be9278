"""Folders of the Hugging Face cache: resolves a path to a snapshot of ``models--ORG--NAME``.

The layout is that of huggingface_hub (file_download.py): ``refs/REVISION`` contains the name of a
folder in ``snapshots``, whose files are links into ``blobs``.
"""

import os
import re
import shlex

from neox_bridge.errors import BridgeError
from neox_bridge.layouts.text_files import list_folder, read_text
from neox_bridge.stores.paths import absolute, isdir, isfile
from neox_bridge.stores.step_names import step_of
from neox_bridge.wording import some

_ROOT = re.compile(r"(models|datasets|spaces)--(.+)")
_REF_BYTES = 256
_MOST_REFS = 10_000
_MAIN = "main"


def is_cache_root(path: str, names: list[str]) -> bool:
    """Whether a folder is that of one repository in the cache."""
    named = _ROOT.fullmatch(os.path.basename(absolute(path))) is not None
    return "snapshots" in names and ("refs" in names or "blobs" in names or named)


def cached_repos(names: list[str]) -> list[str]:
    """The folders of models in the folder of a whole cache."""
    return sorted(name for name in names if name.startswith("models--"))


def snapshot_of(root: str, revision: str | None = None) -> str:
    """The snapshot of a revision, by default of ``main``, otherwise the only one.

    Raises BridgeError with the possible folders if the choice is ambiguous.
    """
    home = os.path.join(root, "snapshots")
    snapshots = [n for n in list_folder(home) if isdir(os.path.join(home, n))]
    kind = _ROOT.fullmatch(os.path.basename(absolute(root)))
    if kind is not None and kind[1] != "models":
        raise BridgeError(f"{root} is a {kind[1][:-1]} in the Hugging Face cache, not a model.")
    if not snapshots:
        raise BridgeError(
            f"{root} is a model in a Hugging Face cache, but its download did not finish: it has "
            f"no snapshot. Download it again: hf download {shlex.quote(repo_of(root))}"
        )
    commit = _commit(root, revision or _MAIN)
    if commit is None and revision is not None:
        commit = next((name for name in snapshots if name.startswith(revision)), None)
    elif commit is None and len(snapshots) == 1:
        commit = snapshots[0]
    if commit in snapshots:
        return os.path.join(home, commit)
    folders = some([os.path.join(home, name) for name in snapshots])
    if commit is not None:
        raise BridgeError(
            f"{root} is a model in a Hugging Face cache, and the snapshot {commit} that its "
            f"refs/{revision or _MAIN} names is missing. Name one of its snapshots: {folders}"
        )
    what = f"has no revision {revision}" if revision else f"has no refs/{_MAIN}"
    raise BridgeError(
        f"{root} is a model in a Hugging Face cache that {what}. Name one of its snapshots: "
        f"{folders}"
    )


def revision_of(folder: str) -> str:
    """``org/name@revision`` of a snapshot folder in a cache; "" for other folders.

    The revision is a branch or tag whose ref names the snapshot, preferably one with a step in its
    name. If there is none, it is the commit.
    """
    home, commit = os.path.split(absolute(folder))
    root, snapshots = os.path.split(home)
    if snapshots != "snapshots" or not _ROOT.fullmatch(os.path.basename(root)):
        return ""
    refs = os.path.join(root, "refs")
    names = list_folder(refs)[:_MOST_REFS] if isdir(refs) else []
    naming = [name for name in names if _commit(root, name) == commit]
    naming.sort(key=lambda name: step_of(name) is None)
    return f"{repo_of(root)}@{next(iter(naming), commit)}"


def repo_of(root: str) -> str:
    """``org/name`` of a folder of the cache; the name of the folder if it has another form."""
    name = os.path.basename(absolute(root))
    match = _ROOT.fullmatch(name)
    return match[2].replace("--", "/", 1) if match else name


def _commit(root: str, revision: str) -> str | None:
    ref = os.path.join(root, "refs", *revision.split("/"))
    if ".." in revision.split("/") or not isfile(ref):
        return None
    return os.path.basename(read_text(ref, _REF_BYTES).strip())
