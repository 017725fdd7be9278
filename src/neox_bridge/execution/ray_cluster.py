"""A pool of the CPUs of a Ray cluster, that outlives the loss of workers and nodes.

Calls wait here, in order, and go to a node when it has a CPU free: never more than ``slots`` are
with Ray, what waits can be cancelled, and a node that joins or dies changes nothing for it. One
thread does all of that; others only put something into its queue.
"""

import contextlib
import os
import pickle
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Container
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from neox_bridge.errors import BridgeError
from neox_bridge.execution.executors import LOSSES
from neox_bridge.execution.placement import Places, View, asked, choose, places_of, unseen
from neox_bridge.execution.ray_connect import (
    Node,
    connect,
    difference,
    living,
    ray_module,
    said,
    there,
)
from neox_bridge.execution.ray_node import asker, listed, look, packed, perform

_T = TypeVar("_T")
_LISTEN = 1.0  # seconds after which it is looked which nodes there are
_PATIENCE = 60.0  # seconds that calls wait for a node where there is none
_LOOK = 200  # waiting calls that are looked at for one that a free node can do


def _nobody(_: str) -> None:
    """For who wants no words."""


@dataclass(eq=False)
class _Call:
    """losses: workers that were lost with it. sent, settled: whether its future is beyond that."""

    data: bytes
    places: Places
    folders: frozenset[str]
    future: "Future[Any]" = field(default_factory=Future)
    losses: int = 0
    sent: bool = False
    settled: bool = False


@dataclass
class _Member:
    """A node as it is known here. code: whether it has this code; None until it answers.

    running: calls. views: of the folders that calls need now. asked: folders, and asking: its
    code, until it answers.
    """

    node: Node
    code: bool | None = None
    asking: bool = False
    faults: int = 0
    running: int = 0
    views: dict[str, View] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)


class RayCluster:
    """A ``Pool``. stopped: as there. slots: changes as nodes come and go."""

    def __init__(
        self,
        address: str = "auto",
        workers: int | None = None,
        tell: Callable[[str], None] = _nobody,
    ) -> None:
        """Join or start a cluster; see ``connect`` for the address and what is raised.

        workers: calls at a time; as many as the cluster has CPUs where it is None. tell: hears, in
        words, of nodes that are lost or left out.
        """
        self._ray = ray_module()
        self._own, same = connect(address, workers)
        self._workers, self._tell = workers, tell
        self.stopped = threading.Event()
        self.slots = 1
        self._events: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._open: set[_Call] = set()
        self._waiting: deque[_Call] = deque()
        self._members: dict[str, _Member] = {}
        self._gone: set[str] = set()  # nodes that are left out for good
        self._needed: Counter[str] = Counter()  # calls by the folders that they need
        self._running = 0
        self._alone_since: float | None = None
        self._looked = 0.0
        self._closing = False
        self._failed: BridgeError | None = None  # what all calls end with from now on
        self._lock = threading.Lock()  # of that
        self._folder = os.path.abspath(os.curdir)
        self._ask, self._mine = asker(), asker()()
        self._tasks = {call: self._ray.remote(call) for call in (self._ask, look, perform)}
        self._meet(same)
        self._thread = threading.Thread(target=self._serve, name="ray-cluster", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[..., _T], /, *args: Any) -> "Future[_T]":
        """Have a call made on a node that sees what it needs, again where that is lost."""
        places = places_of(call, args)
        made = _Call(packed(call, args), places, frozenset(places.all_folders()))
        made.future.add_done_callback(lambda _: self._events.put(partial(self._begin, made)))
        with self._lock:
            if self._failed is not None:
                raise self._failed
            self._events.put(partial(self._add, made))
        return made.future

    def close(self) -> None:
        """Leave the cluster when what runs is done, or end it where it was started here."""
        self._closing = True
        self._events.put(lambda: None)
        self._thread.join()
        if self._own:
            self._ray.shutdown()

    # all that follows is the thread's

    def _serve(self) -> None:
        try:
            while not (self._closing and not self._running):
                self._hear()
                if time.monotonic() - self._looked > _LISTEN:
                    self._meet()
                self._dispatch()
            self._fail(BridgeError("The pool was closed."))
        except Exception as error:  # Ray raises many kinds where its head is gone
            self._fail(BridgeError(f"The Ray cluster is lost: {said(error)}. {_AGAIN}"))

    def _hear(self) -> None:
        """Wait for an event, and take all that are there before one look at what waits."""
        with contextlib.suppress(Empty):
            self._events.get(timeout=_LISTEN)()
            while True:
                self._events.get_nowait()()

    def _fail(self, error: BridgeError) -> None:
        with self._lock:
            self._failed = error
        while not self._events.empty():
            self._events.get()()
        for call in list(self._open):
            self._finish(call, error=error)

    def _meet(self, same: Container[str] = ()) -> None:
        """Ask Ray which nodes there are. same: those that are known to have this code."""
        nodes = {node.id: node for node in living(self._ray) if node.id not in self._gone}
        for name in self._members.keys() - nodes.keys():
            self._drop(name, "was lost; what it did is done again")
        for name in nodes.keys() - self._members.keys():
            self._members[name] = _Member(nodes[name], name in same or None)
        self._looked = time.monotonic()
        for member in self._members.values():
            if member.code is None:
                self._ask_code(member)
        self._count()

    def _count(self) -> None:
        cpus = sum(member.node.cpus for member in self._members.values() if member.code)
        self.slots = max(1, min(cpus, self._workers or cpus))
        self._alone_since = None if cpus else (self._alone_since or time.monotonic())

    def _drop(self, name: str, words: str) -> None:
        self._gone.add(name)
        if (member := self._members.pop(name, None)) is not None:
            self._tell(f"Ray: node {member.node.name} {words}")
            self._count()

    def _add(self, call: _Call) -> None:
        self._open.add(call)
        self._needed.update(call.folders)
        self._waiting.append(call)

    def _begin(self, call: _Call) -> bool:
        """Whether somebody still wants it: from now on it can't be cancelled.

        Those who wait for a future that its owner cancelled are told by this.
        """
        if not call.sent and not call.settled:
            call.sent = call.future.set_running_or_notify_cancel()
            if not call.sent:
                call.settled = True
                self._release(call)
        return not call.settled

    def _release(self, call: _Call) -> None:
        """What nodes see is forgotten when no call needs it: it is asked anew for the next."""
        self._open.discard(call)
        self._needed.subtract(call.folders)
        for folder in call.folders:
            if not self._needed[folder]:
                del self._needed[folder]
                for member in self._members.values():
                    member.views.pop(folder, None)

    def _finish(self, call: _Call, result: Any = None, error: BaseException | None = None) -> None:
        if not self._begin(call):
            return
        call.settled = True
        self._release(call)
        if error is not None:
            call.future.set_exception(error)
        else:
            call.future.set_result(result)

    def _dispatch(self) -> None:
        if self._alone_since is not None and time.monotonic() - self._alone_since > _PATIENCE:
            lone = BridgeError(f"The Ray cluster has no node left that can be used. {_AGAIN}")
            while self._waiting:
                self._finish(self._waiting.popleft(), error=lone)
        kept: list[_Call] = []
        unknown: set[frozenset[str]] = set()
        looks = 0
        while self._waiting and looks < _LOOK and self._running < self.slots:
            call = self._waiting.popleft()
            if call.settled:
                continue
            if call.folders not in unknown:
                looks += 1
                if self._start(call, unknown):
                    continue
            kept.append(call)
        self._waiting.extendleft(reversed(kept))

    def _start(self, call: _Call, unknown: set[frozenset[str]]) -> bool:
        """Send a call to a node. False where none is free that sees all.

        unknown: gets the call's folders where no node has said yet what it sees of them.
        """
        known = {}
        waiting = False
        for name, member in self._members.items():
            if member.code:
                if new := asked(call.folders, member.views, member.asked):
                    self._ask_views(member, new)
                if call.folders <= member.views.keys():
                    known[name] = member
            waiting |= name not in known and member.code is not False
        if not known:
            unknown.add(call.folders)
            return False
        views = {name: member.views for name, member in known.items()}
        free = {name: member.node.cpus - member.running for name, member in known.items()}
        chosen = choose(call.places, views, free)
        if chosen is None:
            lacking = {name: unseen(call.places, seen) for name, seen in views.items()}
            if not waiting and all(lacking.values()):
                self._finish(call, error=self._blind(lacking))
                return True
            return False
        if not self._begin(call):
            return True
        member = known[chosen]
        member.running += 1
        self._running += 1
        task = (call.data, self._folder)
        self._task(member, 1, perform, task, partial(self._ended, call, member))
        return True

    def _task(
        self, member: _Member, cpus: int, call: Any, args: tuple[Any, ...], then: Any
    ) -> None:
        """A task of Ray's on a node; ``then`` is called with its future, in this thread."""
        options = there(member.node, cpus)
        ref = self._tasks[call].options(**options).remote(*args)
        ref.future().add_done_callback(lambda inner: self._events.put(partial(then, inner)))

    def _ended(self, call: _Call, member: _Member, inner: "Future[bytes]") -> None:
        member.running -= 1
        self._running -= 1
        error = inner.exception()
        if error is None:
            good, found = pickle.loads(inner.result())
            self._finish(call, *((found, None) if good else (None, found)))
            return
        kinds = self._ray.exceptions
        if isinstance(error, kinds.RayTaskError):  # of this code itself: it can't be read there
            self._finish(call, error=BridgeError(f"{member.node.name}: {said(error)}"))
            return
        if isinstance(error, (kinds.NodeDiedError, kinds.TaskUnschedulableError)):
            self._drop(member.node.id, "was lost; what it did is done again")
        else:
            call.losses += 1
        if call.losses >= LOSSES or self._closing or self.stopped.is_set():
            self._finish(call, error=_lost(member.node.name, call.losses, error))
        else:
            self._waiting.appendleft(call)

    def _ask_code(self, member: _Member) -> None:
        if not member.asking:
            member.asking = True
            self._task(member, 0, self._ask, (), partial(self._told_code, member))

    def _told_code(self, member: _Member, inner: "Future[Any]") -> None:
        member.asking = False
        if self._answered(member, inner):
            words = difference(inner.result(), self._mine)
            member.code = not words
            self._count()
            if words:
                self._tell(f"Ray: node {member.node.name} {words}; it is left out")

    def _ask_views(self, member: _Member, folders: list[str]) -> None:
        wanted = {}
        for folder in folders:
            with contextlib.suppress(OSError):
                wanted[folder] = listed(folder)
        member.asked.update(folders)
        told = partial(self._told_views, member, folders)
        self._task(member, 0, look, (wanted,), told)

    def _told_views(self, member: _Member, folders: list[str], inner: "Future[Any]") -> None:
        member.asked.difference_update(folders)
        if self._answered(member, inner):
            # one that is gone here too isn't the node's fault: the call says so itself
            gone = {folder: View(frozenset()) for folder in folders}
            member.views |= {f: v for f, v in (gone | inner.result()).items() if self._needed[f]}

    def _answered(self, member: _Member, inner: "Future[Any]") -> bool:
        """Whether a node answered; one that can't, again and again, is left out."""
        error = inner.exception()
        if error is None:
            return True
        member.faults += 1
        if member.faults >= LOSSES or isinstance(error, self._ray.exceptions.NodeDiedError):
            self._drop(member.node.id, f"is left out: {said(error)}")
        return False

    def _blind(self, lacking: dict[str, list[str]]) -> BridgeError:
        told = []
        for name, paths in sorted(lacking.items(), key=lambda item: len(item[1]))[:3]:
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            told.append(f"node {self._members[name].node.name} doesn't see {paths[0]}{more}")
        return BridgeError(
            f"No node of the Ray cluster sees all that is needed: {'; '.join(told)}. Put source "
            "and target on disks that the nodes share, or copy the source to the same path with "
            "its times (rsync -a)."
        )


_AGAIN = "What is finished stays, and the same command goes on."


def _lost(node: str, losses: int, error: BaseException) -> BridgeError:
    times = f"{losses} times" if losses > 1 else "once"
    return BridgeError(
        f"A worker of Ray that wrote files was lost {times}, the last on node {node}: "
        f"{said(error)} Is memory short? Choose fewer with --max-workers. {_AGAIN}"
    )
