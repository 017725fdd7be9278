"""A lock on a folder of a store, so that only one run writes into it.

The lock is an object that is created only if none exists. Its owner renews it. Another run that
wants the lock watches it for a while: if it does not change, its owner was killed, and the lock is
taken over. Clocks of other machines are not used.
"""

import contextlib
import getpass
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from neox_bridge.errors import BridgeError, Unreachable
from neox_bridge.stores.objects import fetch, look, put_if_absent, put_small, remove
from neox_bridge.stores.store import WORK

NAME = "lock"
RENEWED_SECONDS = 20.0  # between two renewals
DEAD_SECONDS = 75.0  # without a change, after which the lock counts as abandoned
_LOOK_SECONDS = 2.0
# how long two runs that take over the same lock wait to find out which of them has it
_SETTLE_SECONDS = 1.0
_LOG = logging.getLogger(__name__)
_ended_here: set[object] = set()  # runs of this process that have ended but may have left locks


class Lock:
    """A lock that this process holds. url: its object."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._target = url.removesuffix(f"/{WORK}/{NAME}")
        self._owner = {
            "run": uuid.uuid4().hex,
            "machine": _machine(),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "user": _user(),
            "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        self._renewals = 0

    @property
    def run(self) -> object:
        return self._owner["run"]

    def check(self) -> None:
        """Raise BridgeError if another run took over the lock."""
        owner = _read(self.url)
        if (owner or {}).get("run") != self.run:
            raise BridgeError(
                f"{self._target} was taken over by {_named(owner)}, because this run did not "
                f"renew its lock for {DEAD_SECONDS:.0f} seconds. Wait until the other run ends."
            )

    def take(self) -> None:
        """Take the lock. Raises BridgeError if a running run holds it."""
        while not put_if_absent(self.url, self._data()):
            owner = _read(self.url)
            if owner is None:  # deleted in the meantime
                continue
            if not (_is_dead(owner) or self._stays(owner)):
                raise BridgeError(
                    f"{self._target} is being written by {_named(owner)}. Wait until it ends, or "
                    "choose another target."
                )
            _LOG.warning("%s: taking over from %s, which ended early", self._target, _named(owner))
            remove([self.url])
            if put_if_absent(self.url, self._data()):
                time.sleep(_SETTLE_SECONDS)
                self.check()
                return

    def renew(self) -> None:
        """Renew the lock, unless another run took it over."""
        with contextlib.suppress(BridgeError):  # the store may be temporarily unavailable
            self.check()
            self._renewals += 1
            put_small(self.url, self._data())

    def _data(self) -> bytes:
        return json.dumps({**self._owner, "renewals": self._renewals}).encode()

    def _stays(self, owner: dict[str, object]) -> bool:
        """Whether the lock stays unchanged long enough to count as abandoned."""
        _LOG.warning(
            "%s: waiting up to %.0f seconds to see whether %s is alive",
            self._target,
            DEAD_SECONDS,
            _named(owner),
        )
        end = time.monotonic() + DEAD_SECONDS
        while time.monotonic() < end:
            time.sleep(min(_LOOK_SECONDS, DEAD_SECONDS / 10))
            if _read(self.url) != owner:
                return False
        return True


@contextlib.contextmanager
def locked(folder: str) -> Iterator[Lock]:
    """Lock a folder of a store during the block.

    Raises BridgeError if another running run holds the lock.
    """
    lock = Lock(f"{folder}/{WORK}/{NAME}")
    lock.take()
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEWED_SECONDS):
            lock.renew()

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        ended.set()
        thread.join()
        _ended_here.add(lock.run)
        with contextlib.suppress(BridgeError):  # a leftover lock is detected as abandoned
            lock.check()
            remove([lock.url])


def _read(url: str) -> dict[str, object] | None:
    """The content of a lock; None if there is none, {} if it is unreadable."""
    try:
        owner = json.loads(fetch(url, 0, look(url, again=True).size))
    except Unreachable:
        raise
    except BridgeError:
        return None
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _named(owner: dict[str, object] | None) -> str:
    if not owner:
        return "another run"
    facts = (owner.get(key, "?") for key in ("process", "user", "host", "since"))
    return "another run (process {} of {} on {}, since {})".format(*facts)


def _is_dead(owner: dict[str, object]) -> bool:
    """Whether its run has ended, which is known for runs of this process or machine."""
    if owner.get("run") in _ended_here:
        return True
    process = owner.get("process")
    if owner.get("machine") != _machine() or not isinstance(process, int) or process <= 0:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _machine() -> str:
    """Identifies the machine or container, because process numbers are only valid within one."""
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        facts.append(os.readlink("/proc/self/ns/pid"))
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    return " ".join(facts)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "?"
