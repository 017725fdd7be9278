"""Brings together in a store what the nodes of a run have saved on disks of their own.

The process of each node uploads its node's files of a step, without optimizer states, and then a
list of them. When the lists of all nodes exist, the process of the first node converts the step
from the store, and removes the files when it is done.

Every save has an id, so that files of two saves of a step never meet. It has a fingerprint of the
files on each node too, so that no node uploads the files of another save under this id.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256

from neox_bridge.errors import BridgeError
from neox_bridge.training.exports import Exports, Save, StepGone

PARTS = ".neox_bridge_nodes"  # the folder of the uploaded files in the target
PATIENCE_SECONDS = 300.0  # without a new file of any node
_POLL_SECONDS = 2.0
_OPTIMIZER = "_optim_states.pt"


def note_save(exports: Exports, iteration: int, save_id: str) -> None:
    """Note that a step is complete on this node, in the journal. For the trainer.

    Raises OSError if the disk is full.
    """
    line = f"saved {iteration} {save_id} {fingerprint(exports, iteration)}\n"
    with open(exports.journal, "a", encoding="ascii") as file:
        file.write(line)


def fingerprint(exports: Exports, iteration: int) -> str:
    """Names, sizes, times and inodes of the files of a step on this node, as a hash."""
    states = [(name, *_state(path)) for name, path in _files(exports, iteration)]
    return sha256(repr(sorted(states)).encode()).hexdigest()[:32]


def _state(path: str) -> tuple[int, int, int]:
    with suppress(OSError):
        state = os.stat(path)
        return state.st_size, state.st_mtime_ns, state.st_ino
    return 0, 0, 0


def _files(exports: Exports, iteration: int) -> Iterator[tuple[str, str]]:
    """The files of a step on this node that are not optimizer states, with their paths."""
    step = exports.step(iteration)
    for folder, _, names in os.walk(step):
        for name in names:
            if not name.endswith(_OPTIMIZER):
                path = os.path.join(folder, name)
                yield os.path.relpath(path, step), path


def with_last_save(exports: Exports, iteration: int) -> Exports:
    """The exports with ``saved`` set to the last save of a step in the journal of this node."""
    saves = [save for number, save in _saves(exports) if number == iteration]
    if not saves:
        raise BridgeError(f"{exports.journal} does not contain step {iteration}.")
    return replace(exports, saved=saves[-1])


def parts_of(exports: Exports, iteration: int) -> str:
    """The step in the store, as the nodes upload it."""
    return f"{exports.target}/{PARTS}/{exports.saved.id}/global_step{iteration}"


def upload_step(exports: Exports, iteration: int) -> str:
    """Upload this node's files of a step, and then the list of them. Returns the URL.

    Raises:
        StepGone: The step was removed or saved again.
        BridgeError: The store cannot be written.
    """
    from neox_bridge.execution.context import Context
    from neox_bridge.execution.object_store import write_object
    from neox_bridge.stores.objects import kind, put_small, remove
    from neox_bridge.tensors.pieces import OutputFile

    parts = parts_of(exports, iteration)
    marker = _marker(parts, exports.node)
    if kind(marker) is not None:  # of a process that was killed after it
        return parts
    sizes: dict[str, int] = {}
    context = Context()
    try:
        _check_same(exports, iteration)
        for name, path in sorted(_files(exports, iteration)):
            sizes[name] = os.path.getsize(path)
            file = OutputFile(name, sizes[name], copy_of=path)
            write_object(file, f"{parts}/{name}", None, context)
        _check_same(exports, iteration)
    except Exception:
        if fingerprint(exports, iteration) != exports.saved.fingerprint:
            remove(f"{parts}/{name}" for name in sizes)
        _check_same(exports, iteration)
        raise
    finally:
        context.files.close()
    put_small(marker, json.dumps(sizes).encode())
    return parts


def collect_step(exports: Exports, iteration: int) -> str:
    """Upload the first node's files of a step, and wait for those of the others. Returns the URL.

    Raises:
        StepGone: The step was removed or saved again.
        BridgeError: Another node uploads nothing, or what it uploaded is not complete.
    """
    from neox_bridge.stores.objects import below, fetch

    parts = upload_step(exports, iteration)
    count, since = 0, time.monotonic()
    markers = [_marker(parts, node) for node in range(exports.nodes)]
    while True:
        objects = below(os.path.dirname(parts))
        missing = [node for node, marker in enumerate(markers) if marker not in objects]
        if not missing:
            break
        _check_same(exports, iteration)
        if len(objects) != count:
            count, since = len(objects), time.monotonic()
        if time.monotonic() - since > PATIENCE_SECONDS:
            raise BridgeError(
                f"node {missing[0]} has not uploaded its files of the step. Read "
                f"{exports.log} on that node."
            )
        time.sleep(_POLL_SECONDS)
    for marker in markers:
        for name, size in json.loads(fetch(marker, 0, objects[marker].size)).items():
            state = objects.get(f"{parts}/{name}")
            if state is None or state.size != size:
                raise BridgeError(f"{parts}/{name} is not the file that a node has uploaded.")
    return parts


def remove_parts(exports: Exports, pending: Iterable[int]) -> None:
    """Remove the uploaded files of all steps but the pending ones. Files of unknown saves stay."""
    from neox_bridge.stores.objects import below, remove

    root = f"{exports.target}/{PARTS}"
    kept = {with_last_save(exports, iteration).saved.id for iteration in pending}
    settled = {save.id for _, save in _saves(exports)} - kept
    remove([url for url in below(root) if url[len(root) + 1 :].split("/")[0] in settled])


def _check_same(exports: Exports, iteration: int) -> None:
    if fingerprint(exports, iteration) != exports.saved.fingerprint:
        raise StepGone("was removed or saved again before it was exported")


def _marker(parts: str, node: int) -> str:
    return f"{os.path.dirname(parts)}/node{node}.json"


def _saves(exports: Exports) -> Iterator[tuple[int, Save]]:
    """The saves in the journal of this node, in order, with their iterations."""
    with open(exports.journal, encoding="ascii", errors="replace") as file:
        for line in file:
            words = line.split()
            if len(words) == 4 and words[0] == "saved":
                yield int(words[1]), Save(words[2], words[3])
