"""Pools that run units of work: local processes, which survive the loss of some of them.

A pool may run a call twice, so calls must be idempotent.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, Future
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from neox_bridge.errors import BridgeError

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

_T = TypeVar("_T")
_PRELOAD = (  # modules that nearly every call needs, imported once for all processes
    *("xxhash", "yaml"),  # numpy is imported only where it is used
    *("neox_bridge.execution.units", "neox_bridge.execution.output"),
    "neox_bridge.verification.verify",
    *("neox_bridge.layouts.hf_reader", "neox_bridge.layouts.neox_reader"),
    "neox_bridge.formats.torch_file",
)
LOSSES = 3  # how often a call may lose its process


class Pool(Protocol):
    """Runs calls for all checkpoints of a batch.

    slots: how many calls run at the same time. stopped: set when all waiting callers must stop.
    """

    stopped: threading.Event

    @property
    def slots(self) -> int: ...

    def submit(self, call: Callable[..., _T], /, *args: Any) -> "Future[_T]": ...

    def close(self) -> None: ...


class Processes:
    """Processes of this machine, started when they are needed.

    If one process is killed (by the OOM killer, for example), ``concurrent.futures`` ends all of
    them. They are restarted, and the calls that were running are repeated.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._pool = self._start()

    def submit(self, call: Callable[..., _T], /, *args: Any) -> "Future[_T]":
        """Submit a picklable call, which is repeated if its process is lost."""
        future: _Call[_T] = _Call()
        self._try(future, 0, call, args)
        return future

    def close(self) -> None:
        """Wait for running calls, then end the processes."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> "ProcessPoolExecutor":
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        from importlib import import_module

        # fork is faster, but it copies locks that threads hold at that moment, and loses the
        # threads of obstore, which Python does not know about
        has_threads = threading.active_count() > 1 or "obstore" in sys.modules
        if sys.platform == "linux" and not has_threads:
            for name in _PRELOAD:
                import_module(name)
            pool = ProcessPoolExecutor(self.slots, multiprocessing.get_context("fork"), _prepare)
            pool.submit(_nothing)
            return pool
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOAD))
        # the fork server keeps the environment of the first pool
        pool = ProcessPoolExecutor(self.slots, context, _prepare, (dict(os.environ),))
        # starts the processes while this process reads and plans
        threading.Thread(target=pool.submit, args=(_nothing,)).start()
        return pool

    def _try(
        self, outer: "_Call[_T]", losses: int, call: Callable[..., _T], args: tuple[Any, ...]
    ) -> None:
        with self._lock:
            try:
                outer.inner = self._pool.submit(call, *args)
            except BrokenExecutor:
                self._pool = self._start()
                outer.inner = self._pool.submit(call, *args)

        def done(inner: "Future[_T]") -> None:
            if inner.cancelled():
                Future.cancel(outer)
                outer.set_running_or_notify_cancel()
                return
            error = inner.exception()
            if isinstance(error, BrokenExecutor) and losses + 1 < LOSSES:
                again = (outer, losses + 1, call, args)
                threading.Thread(target=self._try, args=again).start()
            elif isinstance(error, BrokenExecutor):
                outer.set_exception(_lost(losses + 1))
            elif error is not None:
                outer.set_exception(error)
            else:
                outer.set_result(inner.result())

        outer.inner.add_done_callback(done)


class _Call(Future[_T], Generic[_T]):
    """The future of a call that may be repeated. inner: the future of the current attempt."""

    inner: "Future[_T]"

    def cancel(self) -> bool:
        """Cancel only if the call has not started, so that callers wait for a running call."""
        return self.inner.cancel()


def _lost(times: int) -> BridgeError:
    return BridgeError(
        f"A worker process was killed {times} times, perhaps because memory ran out. Use fewer "
        "`workers=`. Finished files are kept: run the same command again to continue."
    )


def _prepare(environment: Mapping[str, str] | None = None) -> None:
    """Set up a process: the parent handles Ctrl-C, and the process ends with the parent."""
    import signal

    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _nothing() -> None:
    """Do nothing: the first call of each pool, which starts the processes."""


def _end_with_parent() -> None:
    from multiprocessing import connection, parent_process

    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def default_slots() -> int:
    """Default number of processes: one more than cores, because one waits for the disk."""
    return 1 + min(16, os.cpu_count() or 1)
