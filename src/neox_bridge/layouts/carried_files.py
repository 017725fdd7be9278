"""Where the small text files lie that travel with a model; ``carried_names`` has their names.

In a GPT-NeoX run they lie in the folder ``huggingface``, beside ``latest``. They belong to every
step that GPT-NeoX saves there later, and it leaves them alone: it reads ``latest`` and the folder
that it names, and deletes ``global_step*`` only (megatron/checkpointing.py, load_checkpoint and
delete_old_checkpoints).
"""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.formats.file_kinds import HEAD_BYTES, is_stand_in
from neox_bridge.layouts.carried_names import (
    FOLDER,
    MOST_BYTES,
    CarriedFiles,
    LeftFile,
    LeftReason,
    is_carried,
    is_code,
    is_legal,
)
from neox_bridge.layouts.linked_files import brought_along
from neox_bridge.layouts.record_file import written_above
from neox_bridge.layouts.text_files import list_folder, read_bytes
from neox_bridge.stores.paths import is_local, isdir, isfile, size


def carried_beside(folder: str, known: Collection[str]) -> CarriedFiles:
    """The files beside the model in a Hugging Face folder, or its URL.

    known: the names of the files that the model itself consists of.
    Raises BridgeError for a link that leads out of the folder.
    """
    return _sorted_out(folder, folder, list_folder(folder), known)


def carried_in_run(root: str, raw: Mapping[str, Any], *, flat: bool) -> CarriedFiles:
    """The files that travel with a GPT-NeoX checkpoint.

    They come from the folder ``huggingface`` of the run. If GPT-NeoX saves into another folder than
    the one that was converted, they come from there, as its yml names that one in ``load`` and
    ``vocab_file``; only files that a record there names are taken.
    Licenses and notices beside ``latest``, or beside flat files, belong to the model as well. In
    the source tree of GPT-NeoX they do not, since it has a license of its own.

    root: of the run. raw: its settings. flat: whether the checkpoint's files lie in it.
    """
    carried = CarriedFiles()
    if isdir(folder := os.path.join(root, FOLDER)):
        carried = _sorted_out(folder, root, list_folder(folder))
    elif not flat and (home := _converted_run(root, raw)):
        inside = [name for name in written_names(home) if isfile(os.path.join(home, FOLDER, name))]
        carried = _sorted_out(os.path.join(home, FOLDER), home, inside)
    taken = {name.lower() for name in carried.names}
    names: Sequence[str] = ()
    with suppress(BridgeError):  # whoever names a step may not be allowed to list the folder above
        names = list_folder(root)
    legal = (
        ()
        if "megatron" in names
        else [name for name in names if is_legal(name) and name.lower() not in taken]
    )
    more = _sorted_out(root, root, legal)
    return CarriedFiles((*carried.paths, *more.paths), (*carried.left, *more.left))


def left_of(names: Iterable[str], carried: CarriedFiles, known: Collection[str]) -> CarriedFiles:
    """The same files, where the source has these names, and not all of them are on this machine."""
    here = {*carried.names} | {file.name for file in carried.left}
    tops = dict.fromkeys(top + slash for top, slash, _ in (name.partition("/") for name in names))
    more = (LeftFile(top, _reason(top)) for top in tops if top not in here and _counts(top, known))
    left = sorted((*carried.left, *more), key=lambda file: file.name)
    return CarriedFiles(carried.paths, tuple(left))


def written_names(root: str) -> list[str]:
    """The names in a run's ``huggingface`` that a conversion wrote, by the records of its steps."""
    prefix = f"{FOLDER}/"
    paths = (path[len(prefix) :] for path in written_above(root) if path.startswith(prefix))
    return sorted(name for name in paths if "/" not in name)


def _converted_run(root: str, raw: Mapping[str, Any]) -> str:
    """The run that training started from, or whose tokenizer it uses; "" without such files."""
    if not is_local(root):
        return ""  # nothing of this machine belongs to a URL
    started = raw.get("load")
    homes = [started] if isinstance(started, str) else []
    tokenizer = raw.get("vocab_file")
    if isinstance(tokenizer, str) and os.path.basename(os.path.dirname(tokenizer)) == "tokenizer":
        homes.append(os.path.dirname(os.path.dirname(tokenizer)))
    folders = (home for home in homes if os.path.isabs(home) and home != root)
    return next((home for home in folders if isdir(os.path.join(home, FOLDER))), "")


def _sorted_out(
    folder: str, root: str, names: Sequence[str], known: Collection[str] = ()
) -> CarriedFiles:
    """Which files of a folder travel. root: of the checkpoint, out of which no link may lead."""
    paths: list[str] = []
    left: list[LeftFile] = []
    for name in names:
        path = os.path.join(folder, name)
        if not _counts(name, known):
            continue
        if is_carried(name) and brought_along(path, root) and isfile(path):
            if size(path) > MOST_BYTES:
                left.append(LeftFile(name, "too large"))
            elif not _is_text(path):
                left.append(LeftFile(name, "not text"))
            else:
                paths.append(path)
        else:
            name += "/" if isdir(path) else ""
            left.append(LeftFile(name, _reason(name)))
    return CarriedFiles(tuple(paths), tuple(left))


def _counts(name: str, known: Collection[str]) -> bool:
    """Whether somebody would miss a file: not what git, the Hub and other programs leave."""
    return name not in known and not name.startswith((".", "__pycache__"))


def _reason(name: str) -> LeftReason:
    return "code" if is_code(name) else "not on the list"


def _is_text(path: str) -> bool:
    data = read_bytes(path, MOST_BYTES)
    if b"\0" in data or is_stand_in(path, data[:HEAD_BYTES]):
        return False
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
