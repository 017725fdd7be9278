"""Runs tasks in threads. Small tasks are grouped; the first failure stops all."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial

from neox_bridge.execution.context import Context, Stopped

Task = tuple[int, Callable[[], None]]  # the bytes that a task writes, and the function to call
_BATCH_BYTES = 1 << 20  # total bytes of tasks that a thread runs as one group
_BATCH_TASKS = 64


@dataclass
class _Last:
    """Calls ``then`` after the last of ``left`` tasks, in the thread that ran it."""

    left: int
    then: Callable[[], None]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, task: Callable[[], None]) -> None:
        task()
        with self.lock:
            self.left -= 1
            last = not self.left
        if last:
            self.then()


def followed(tasks: Iterable[Task], then: Callable[[], None]) -> list[Task]:
    """Wrap tasks so that the last one to end calls ``then``; only ``then`` if there are none."""
    listed = list(tasks)
    last = _Last(len(listed), then)
    return [(size, partial(last.run, task)) for size, task in listed] or [(0, then)]


def run_all(tasks: Iterable[Task], workers: int, context: Context) -> None:
    """Run all tasks, roughly in order. The first failure, or Ctrl-C, stops the others."""
    futures: list[Future[None]] = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            for batch in _batches(tasks):
                futures.append(pool.submit(batch))  # noqa: PERF401, Ctrl-C needs those so far
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            if any(not future.done() for future in futures):
                context.stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
    errors = [f.exception() for f in futures if not f.cancelled()]
    for error in sorted(filter(None, errors), key=lambda e: isinstance(e, Stopped)):
        raise error


def _batches(tasks: Iterable[Task]) -> Iterator[Callable[[], None]]:
    """Group small tasks, because passing one to a thread costs more than running it."""
    batch: list[Callable[[], None]] = []
    total = 0
    for size, task in tasks:
        batch.append(task)
        total += size
        if total >= _BATCH_BYTES or len(batch) == _BATCH_TASKS:
            yield partial(_each, batch)
            batch, total = [], 0
    yield partial(_each, batch)


def _each(tasks: Iterable[Callable[[], None]]) -> None:
    for task in tasks:
        task()
