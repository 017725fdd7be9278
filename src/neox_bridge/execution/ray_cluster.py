"""A pool of the CPUs of a Ray cluster that survives the loss of workers and nodes.

Ray runs the calls, and repeats a call if its worker is lost. Ray does not know which node can
access which folder, so calls wait here, in order, until a node that can access their files has a
free CPU. If a node is lost, its calls move to another node. At most ``slots`` calls are submitted
to Ray, waiting calls can be cancelled, and nodes may join or leave at any time. One thread does all
of this; other threads only put events into its queue.
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
from neox_bridge.execution.placement import Places, View, choose, places_of, unrequested, unseen
from neox_bridge.execution.ray_connect import (
    Node,
    connect,
    difference,
    first_words,
    living_nodes,
    on_node,
    ray_module,
)
from neox_bridge.execution.ray_node import asker, listed, look, packed, perform
from neox_bridge.wording import some

_T = TypeVar("_T")
_LISTEN_SECONDS = 1.0  # between two updates of the list of nodes
_PATIENCE_SECONDS = 60.0  # how long calls wait if there is no node
_SCANNED_CALLS = 200  # waiting calls that are considered for a free node
_LOST = "was lost; its work is repeated"
_AGAIN = "Finished files are kept: run the same command again to continue."


class _Call(Future[Any]):
    """A call that waits, runs or has ended. data: the argument of ``perform``."""

    def __init__(self, data: bytes, places: Places) -> None:
        super().__init__()
        self.data, self.places, self.folders = data, places, frozenset(places.all_folders())
        self._lock = threading.Lock()

    def begin(self) -> bool:
        """Start the call unless it was cancelled. It cannot be cancelled afterwards."""
        with self._lock:
            return self.running() or (not self.done() and self.set_running_or_notify_cancel())

    def cancel(self) -> bool:
        """Cancel a waiting call, and wake its callers."""
        with self._lock:
            if not self.done() and super().cancel():
                self.set_running_or_notify_cancel()
            return self.cancelled()


@dataclass(eq=False)
class _Member:
    """A node of the cluster.

    Attributes:
        code: Whether it has the same code as this process; None until it answers.
        running: Its calls.
        views: Its views of the folders that calls need now.
        requested: Folders with a pending request.
    """

    node: Node
    code: bool | None = None
    running: int = 0
    views: dict[str, View] = field(default_factory=dict)
    requested: set[str] = field(default_factory=set)


class RayCluster:
    """A ``Pool``. slots: changes when nodes join or leave."""

    def __init__(
        self,
        address: str = "auto",
        workers: int | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Join or start a cluster. address and exceptions: see ``connect``.

        workers: calls at a time; by default, the number of CPUs in the cluster. tell: called with a
        sentence for each node that is lost or not used.
        """
        self._ray = ray_module()
        self._leaves, same = connect(address, workers)
        self._workers, self._tell = workers, tell
        self.stopped = threading.Event()
        self.slots = 1
        self._events: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._open: set[_Call] = set()
        self._waiting: deque[_Call] = deque()
        self._members: dict[str, _Member] = {}
        self._excluded: set[str] = set()  # ids of nodes that get no more calls
        self._needed: Counter[str] = Counter()  # calls by the folders that they need
        self._running: dict[_Call, Any] = {}  # the objects by which Ray identifies them
        self._alone_since: float | None = None
        self._looked = 0.0
        self._closing = False
        # the exception with which all calls end from now on
        self._failure: BridgeError | None = None
        self._lock = threading.Lock()  # protects that exception
        self._folder = os.path.abspath(os.curdir)
        self._ask = asker()
        self._code = self._ask()
        self._tasks = {call: self._ray.remote(call) for call in (self._ask, look, perform)}
        self._update_nodes(same)
        self._thread = threading.Thread(target=self._serve, name="ray-cluster", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[..., _T], /, *args: Any) -> "Future[_T]":
        """Submit a call to a node that can access its files; repeated if the node is lost."""
        future = _Call(packed(call, args), places_of(call, args))
        future.add_done_callback(lambda _: self._events.put(partial(self._release, future)))
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._events.put(partial(self._add, future))
        return future

    def close(self) -> None:
        """Leave the cluster when running calls are done, or stop it if it was started here."""
        self._closing = True
        self._events.put(lambda: None)
        self._thread.join()
        if self._leaves:
            self._ray.shutdown()

    # everything below runs in the thread

    def _serve(self) -> None:
        try:
            while not (self._closing and not self._running):
                self._handle_events()
                if time.monotonic() - self._looked > _LISTEN_SECONDS:
                    self._update_nodes()
                if self._is_ending():
                    self._cancel_retries()
                self._dispatch()
            self._fail(BridgeError("The pool was closed."))
        except Exception as error:  # Ray raises many kinds of exceptions if its head is gone
            words = f"The Ray cluster is lost: {first_words(error)}. {_AGAIN}"
            self._fail(BridgeError(words))

    def _handle_events(self) -> None:
        """Handle all queued events before looking at waiting calls."""
        with contextlib.suppress(Empty):
            self._events.get(timeout=_LISTEN_SECONDS)()
            while True:
                self._events.get_nowait()()

    def _fail(self, error: BridgeError) -> None:
        with self._lock:
            self._failure = error
        while not self._events.empty():
            self._events.get()()
        for call in list(self._open):
            _end(call, error=error)

    def _is_ending(self) -> bool:
        return self._closing or self.stopped.is_set()

    def _cancel_retries(self) -> None:
        """Running calls finish (see ``perform``); calls that have not started are dropped."""
        for ref in self._running.values():
            self._ray.cancel(ref)

    def _update_nodes(self, same: Container[str] = ()) -> None:
        """Update the list of nodes. same: ids of nodes that are known to have this code."""
        nodes = {n.id: n for n in living_nodes(self._ray) if n.id not in self._excluded}
        for name in self._members.keys() - nodes.keys():
            self._exclude(name, _LOST)
        for name in nodes.keys() - self._members.keys():
            member = self._members[name] = _Member(nodes[name], name in same or None)
            if not member.code:
                self._task(member, 0, self._ask, (), partial(self._code_answered, member))
        self._looked = time.monotonic()
        self._count()

    def _count(self) -> None:
        cpus = sum(member.node.cpus for member in self._members.values() if member.code)
        self.slots = max(1, min(cpus, self._workers or cpus))
        self._alone_since = None if cpus else (self._alone_since or time.monotonic())

    def _exclude(self, name: str, words: str) -> None:
        self._excluded.add(name)
        if (member := self._members.pop(name, None)) is not None:
            self._tell(f"Ray: node {member.node.name} {words}")
            self._count()

    def _add(self, call: _Call) -> None:
        self._open.add(call)
        self._needed.update(call.folders)
        self._waiting.append(call)

    def _release(self, call: _Call) -> None:
        """Forget views of folders that no call needs; the next call asks again."""
        self._open.discard(call)
        self._needed.subtract(call.folders)
        for folder in call.folders:
            if not self._needed[folder]:
                del self._needed[folder]
                for member in self._members.values():
                    member.views.pop(folder, None)

    def _dispatch(self) -> None:
        if self._alone_since and time.monotonic() - self._alone_since > _PATIENCE_SECONDS:
            alone = BridgeError(f"The Ray cluster has no usable node left. {_AGAIN}")
            while self._waiting:
                _end(self._waiting.popleft(), error=alone)
        kept: list[_Call] = []
        unknown: set[frozenset[str]] = set()
        scanned = 0
        while self._waiting and scanned < _SCANNED_CALLS and len(self._running) < self.slots:
            call = self._waiting.popleft()
            if call.done():
                continue
            if call.folders not in unknown:
                scanned += 1
                if self._start(call, unknown):
                    continue
            kept.append(call)
        self._waiting.extendleft(reversed(kept))

    def _start(self, call: _Call, unknown: set[frozenset[str]]) -> bool:
        """Send a call to a node. Returns False if no suitable node is free.

        unknown: collects folders of the call for which no node has reported a view yet.
        """
        for member in self._members.values():
            if member.code:
                self._ask_views(member, unrequested(call.folders, member.views, member.requested))
        known = {
            n: m for n, m in self._members.items() if call.folders <= m.views.keys() and m.code
        }
        if not known:
            unknown.add(call.folders)
            return False
        views = {name: member.views for name, member in known.items()}
        free = {name: member.node.cpus - member.running for name, member in known.items()}
        chosen = choose(call.places, views, free)
        if chosen is None:
            missing = {name: unseen(call.places, seen) for name, seen in views.items()}
            undecided = self._members.keys() - known.keys()
            if all(missing.values()) and all(self._members[n].code is False for n in undecided):
                _end(call, error=self._unseen_error(missing))
                return True
            return False
        if call.begin():
            member = known[chosen]
            member.running += 1
            ended = partial(self._ended, call, member)
            self._running[call] = self._task(member, 1, perform, (call.data, self._folder), ended)
        return True

    def _task(self, member: _Member, cpus: int, call: Any, args: tuple[Any, ...], then: Any) -> Any:
        """Start a Ray task on a node. ``then`` is called with its future, in this thread."""
        ref = self._tasks[call].options(**on_node(member.node, cpus)).remote(*args)
        ref.future().add_done_callback(lambda answer: self._events.put(partial(then, answer)))
        return ref

    def _ended(self, call: _Call, member: _Member, answer: "Future[bytes]") -> None:
        member.running -= 1
        del self._running[call]
        error, kinds = answer.exception(), self._ray.exceptions
        if error is None:
            good, outcome = pickle.loads(answer.result())
            _end(call, **{"result" if good else "error": outcome})
        elif isinstance(error, kinds.RayTaskError):  # the code itself cannot be unpickled there
            message = (
                f"Node {member.node.name} of the Ray cluster cannot run the code of neox-bridge: "
                f"{first_words(error).rstrip('.')}. Install the same Python packages on every node."
            )
            _end(call, error=BridgeError(message))
        elif self._is_ending():
            _end(call, error=BridgeError(f"A call was stopped: {first_words(error)}. {_AGAIN}"))
        elif not isinstance(error, (kinds.NodeDiedError, kinds.TaskUnschedulableError)):
            _end(call, error=_lost_error(member.node.name, error, kinds.OutOfMemoryError))
        else:
            self._exclude(member.node.id, _LOST)
            self._waiting.appendleft(call)

    def _code_answered(self, member: _Member, answer: "Future[Any]") -> None:
        if self._has_answer(member, answer):
            words = difference(answer.result(), self._code)
            member.code = not words
            self._count()
            if words:
                self._tell(f"Ray: node {member.node.name} {words}; it is not used")

    def _ask_views(self, member: _Member, folders: list[str]) -> None:
        if folders:
            wanted = {}
            for folder in folders:
                with contextlib.suppress(OSError):
                    wanted[folder] = listed(folder)
            member.requested.update(folders)
            then = partial(self._views_answered, member, folders)
            self._task(member, 0, look, (wanted,), then)

    def _views_answered(self, member: _Member, folders: list[str], answer: "Future[Any]") -> None:
        member.requested.difference_update(folders)
        if self._has_answer(member, answer):
            # if the file is also missing here, the node is not at fault, and the call reports the
            # error
            gone = dict.fromkeys(folders, View(frozenset()))
            views = {**gone, **answer.result()}
            member.views |= {folder: v for folder, v in views.items() if self._needed[folder]}

    def _has_answer(self, member: _Member, answer: "Future[Any]") -> bool:
        """Whether a node answered. A node that never answers is not used."""
        error = answer.exception()
        if error is not None:
            self._exclude(member.node.id, f"is not used: {first_words(error)}")
        return error is None

    def _unseen_error(self, missing: dict[str, list[str]]) -> BridgeError:
        words = []
        for name, paths in sorted(missing.items(), key=lambda item: len(item[1]))[:3]:
            words.append(f"node {self._members[name].node.name} cannot read {some(paths, 1)}")
        return BridgeError(
            f"No node of the Ray cluster can read all files: {'; '.join(words)}. Put source and "
            "target on a file system that all nodes share, or copy the source to the same path "
            "on each node, with its modification times (rsync -a)."
        )


def _end(call: _Call, result: Any = None, error: BaseException | None = None) -> None:
    if call.begin():
        if error is not None:
            call.set_exception(error)
        else:
            call.set_result(result)


def _lost_error(node: str, error: BaseException, out_of_memory: type) -> BridgeError:
    times = "" if isinstance(error, out_of_memory) else f" {LOSSES} times, the last"
    return BridgeError(
        f"A Ray worker was lost{times} on node {node}: {first_words(error).rstrip('.')}. If "
        f"memory ran out, use fewer `workers=`. {_AGAIN}"
    )
