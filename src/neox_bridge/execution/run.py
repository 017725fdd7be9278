"""Executes a plan: every file created, every tensor written, all flushed, one rename."""

import os
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial

from neox_bridge.errors import BridgeError
from neox_bridge.execution.context import Context, Stopped
from neox_bridge.execution.movers import move, write
from neox_bridge.execution.result import Result
from neox_bridge.execution.staging import check_target, flush, flush_folders, staged
from neox_bridge.execution.transform import blocks, replica
from neox_bridge.findings import Finding
from neox_bridge.planning.coverage import check_plan
from neox_bridge.planning.pieces import OutputFile, OutputTensor, Plan, byte_range

Seen = dict[str, tuple[int, int]]


def execute(
    plan: Plan,
    target: str,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Result:
    """Write what the plan says into the folder ``target``, whole or not at all.

    workers: threads. progress: called, one thread at a time, with the bytes just written.
    Raises BridgeError where the target exists, there is no space, or a source is damaged or
    changes; then and on KeyboardInterrupt nothing is left behind and nothing was replaced.
    """
    begin = time.perf_counter()
    check_plan(plan)
    sources = _sources(plan)
    check_target(target, sources, plan.size, overwrite)
    seen = {path: _identity(path) for path in sources}
    context = Context(progress)
    with staged(target) as folder:
        for file in plan.files:
            _create(folder, file)
        _run(plan, folder, workers or min(4, os.cpu_count() or 1), context)
        flush_folders(folder)
        for path, identity in seen.items():
            if _identity(path) != identity:
                raise BridgeError(
                    f"{path} changed while it was read. Convert again when nothing writes to it."
                )
    return Result(
        target,
        len(plan.files),
        plan.size,
        context.copied,
        context.transformed,
        time.perf_counter() - begin,
        tuple(_findings(context)),
    )


def _sources(plan: Plan) -> list[str]:
    found = {file.copy_of for file in plan.files if file.copy_of is not None}
    for file in plan.files:
        for tensor in file.tensors:
            found |= {piece.source.file for piece in tensor.pieces if piece.source is not None}
    return sorted(found)


def _identity(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise BridgeError(f"{path} is gone. Convert again when nothing changes it.") from None
    return status.st_size, status.st_mtime_ns


def _create(folder: str, file: OutputFile) -> None:
    """The file at its size, with its literal bytes."""
    path = os.path.join(folder, file.path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        os.ftruncate(fd, file.size)
        for offset, data in file.literals:
            write(fd, data, offset)
    finally:
        os.close(fd)


def _run(plan: Plan, folder: str, workers: int, context: Context) -> None:
    """Largest first, so that no thread is left with a large one at the end."""
    for file in plan.files:
        context.wrote(sum(len(data) for _, data in file.literals), changed=False)
    tasks: list[tuple[int, Callable[[], None]]] = []
    for file in plan.files:
        path = os.path.join(folder, file.path)
        if file.copy_of is not None:
            tasks.append((file.size, partial(_copy, file, path, context)))
        tasks += [(t.nbytes, partial(_tensor, t, path, context)) for t in file.tensors]
    tasks.sort(key=lambda task: -task[0])
    with ThreadPoolExecutor(workers) as pool:
        _all(pool, [task for _, task in tasks], context)
        paths = [os.path.join(folder, file.path) for file in plan.files]
        _all(pool, [partial(flush, path) for path in paths], context)


def _all(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], None]], context: Context) -> None:
    """Run all; the first failure, or Ctrl-C here, stops the others soon."""
    futures = [pool.submit(task) for task in tasks]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        failed = [f for f in futures if f.done() and not f.cancelled() and f.exception()]
        if failed or any(not future.done() for future in futures):
            context.stop.set()
            for future in futures:
                future.cancel()
            wait(futures)
    errors = [f.exception() for f in futures if not f.cancelled() and f.exception()]
    for error in sorted(errors, key=lambda e: isinstance(e, Stopped)):
        if error is not None:
            raise error


def _copy(file: OutputFile, path: str, context: Context) -> None:
    assert file.copy_of is not None
    fd = os.open(path, os.O_WRONLY)
    try:
        move(file.copy_of, 0, fd, 0, file.size, context, None)
    finally:
        os.close(fd)


def _tensor(tensor: OutputTensor, path: str, context: Context) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        crc = _write(tensor, fd, context)
        if crc is not None:
            for place in tensor.crc_at:
                write(fd, crc.to_bytes(4, "little"), place)
    finally:
        os.close(fd)


def _write(tensor: OutputTensor, fd: int, context: Context) -> int | None:
    """The tensor's bytes at its place; their CRC-32, or None where the kernel moved them."""
    if tensor.inline is not None:
        write(fd, tensor.inline, tensor.offset)
        context.wrote(len(tensor.inline), changed=False)
        return zlib.crc32(tensor.inline)
    if tensor.reduce != "none" and (only := replica(tensor)) is not None:
        tensor = replace(tensor, pieces=(only,), reduce="none")
    runs = _runs(tensor)
    crc: int | None = 0
    if runs is not None:
        for source, start, to, size in runs:
            crc = move(source, start, fd, tensor.offset + to, size, context, crc)
        return crc
    offset = tensor.offset
    for block in blocks(tensor, context):
        context.check()
        data = block.reshape(-1).view("u1").data
        write(fd, data, offset)
        crc = zlib.crc32(data, crc or 0)
        context.wrote(len(data), changed=True)
        offset += len(data)
    return crc


def _runs(tensor: OutputTensor) -> list[tuple[str, int, int, int]] | None:
    """(file, its offset, offset in the tensor, bytes) of a tensor that is runs of source bytes."""
    made = tensor.random is not None or tensor.divisor != 1
    if made or tensor.reduce != "none" or not tensor.pieces:
        return None
    runs = []
    for piece in tensor.pieces:
        span = byte_range(piece, tensor.shape)
        if piece.source is None or piece.source.dtype != tensor.dtype or span is None:
            return None
        runs.append((piece.source.file, *span))
    return sorted(runs, key=lambda run: run[2])


def _findings(context: Context) -> Iterable[Finding]:
    if context.overflows:
        name, _ = min(context.overflows)
        total = sum(count for _, count in context.overflows)
        yield Finding(
            "cast-overflow",
            "warning",
            f"{total} finite values of {len(context.overflows)} tensors became infinite in the "
            f"cast, the first in {name}",
            "choose --dtype bfloat16 or float32",
        )
    if context.deviations:
        name, file, largest = max(context.deviations, key=lambda d: (d[2], d[0]))
        yield Finding(
            "replicas-differ",
            "warning",
            f"{len(context.deviations)} tensors differ between tensor-parallel ranks, by "
            f"{largest:.6g} at most from their mean ({name}, {file}); the mean is written",
            "GPT-NeoX's ranks drift apart a little in long runs; check a larger difference",
        )
