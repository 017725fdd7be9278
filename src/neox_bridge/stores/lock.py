"""A lock on a folder of a store: one run writes into it, and another one is told which.

The lock is an object that is written only where there is none. Its owner renews it, so whoever
wants it too watches it for a while: one that does not change is of a run that was killed, and is
taken over. No clock of another machine is trusted.
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
DEAD_SECONDS = 75.0  # without a change, after which nobody is believed to renew it
_LOOK_SECONDS = 2.0
_SETTLE_SECONDS = 1.0  # in which two that take over the same lock see which of them has it
_LOG = logging.getLogger(__name__)
_ended_here: set[object] = set()  # runs of this process that have ended; their locks may be left


class Lock:
    """A lock that this process has. Attributes: url: its object."""

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
        """Raise BridgeError where another run has taken the lock over."""
        owner = _read(self.url)
        if (owner or {}).get("run") != self.run:
            raise BridgeError(
                f"{self._target} was taken over by {_named(owner)}, because this run did not "
                f"renew its lock for {DEAD_SECONDS:.0f} seconds. Wait until the other run ends."
            )

    def take(self) -> None:
        """Raise BridgeError where a run that is alive has it."""
        while not put_if_absent(self.url, self._data()):
            owner = _read(self.url)
            if owner is None:  # gone meanwhile
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
        """Show that this run is alive, unless the lock is another's by now."""
        with contextlib.suppress(BridgeError):  # the store may be away for a while
            self.check()
            self._renewals += 1
            put_small(self.url, self._data())

    def _data(self) -> bytes:
        return json.dumps({**self._owner, "renewals": self._renewals}).encode()

    def _stays(self, owner: dict[str, object]) -> bool:
        """Whether nobody renews or removes the lock for as long as it takes to be sure."""
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
    """A block in which no other run writes into a folder of a store.

    Raises BridgeError where another run does, and is alive.
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
        with contextlib.suppress(BridgeError):  # one that is left is found to be dead
            lock.check()
            remove([lock.url])


def _read(url: str) -> dict[str, object] | None:
    """What a lock says; None where there is none, nothing where nobody can read it."""
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
    """Whether its run was of this process, or its process of this machine, and has ended."""
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
    """What tells machines and containers apart, in which a process's number means something."""
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
