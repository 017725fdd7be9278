"""Watches a training run for new steps, by its ``latest`` file."""

import os
import threading
from collections.abc import Callable, Iterator

from neox_bridge.batches.items import Item
from neox_bridge.errors import BridgeError
from neox_bridge.layouts.text_files import read_text
from neox_bridge.stores.paths import absolute, isfile


def rounds(
    find: Callable[[], list[Item]], interval: float, stopped: threading.Event
) -> Iterator[list[Item]]:
    """Yields the finished checkpoints repeatedly, until ``stopped`` is set.

    A step of a GPT-NeoX run is finished when ``latest`` names it or a later step. interval: seconds
    between two checks.
    """
    while True:
        try:
            items = find()
        except BridgeError:  # nothing exists yet
            items = []
        finished = [item for item in items if is_finished(item)]
        yield finished
        if stopped.wait(interval):
            return


def is_finished(item: Item) -> bool:
    """Whether ``latest`` of a run has reached a step; True for other checkpoints."""
    folder, name = os.path.split(absolute(item.source.path))
    latest = os.path.join(folder, "latest")
    if not name.startswith("global_step") or not isfile(latest):
        return not name.startswith("global_step")
    try:
        tag = read_text(latest).strip()
    except BridgeError:
        return False
    number = tag.removeprefix("global_step")
    return number.isdigit() and item.number is not None and item.number <= int(number)
