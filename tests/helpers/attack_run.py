"""Runs jobs on hostile files, each in a process of its own that is watched and bounded.

    python attack_run.py JOBS.json RESULTS.json

A job: {"do": "read" | "cli", "args": [...], "cwd": folder}. A result: what came of it, the most
memory that it had, the seconds of CPU, and what it did that reading a checkpoint doesn't take.
"""

import importlib
import json
import os
import resource
import signal
import sys
import traceback
from typing import Any

SECONDS = 30  # of CPU, after which a job is killed
ROOM = 1 << 30  # bytes of address space beyond what there is at the start
# events of sys.addaudithook that no reading of a checkpoint has
FORBIDDEN = (
    "os.system os.exec os.fork os.forkpty os.posix_spawn os.spawn os.putenv os.unsetenv "
    "os.kill os.chown os.symlink os.link subprocess. pickle.find_class socket.__new__ "
    "socket.connect socket.bind socket.getaddrinfo socket.sendto ctypes. pty. webbrowser. "
    "urllib. code.__new__ function.__new__ marshal. sys.settrace sys.setprofile "
    "builtins.input signal.pthread_kill syslog. ftplib. http. smtplib. sqlite3."
).split()
CHANGING = "os.mkdir os.rename os.remove os.rmdir os.truncate os.utime os.chmod".split()


def watch(cwd: str, events: list[str]) -> None:
    """Note what a hostile file could want to have done, but writing into ``cwd/out``."""
    inside = os.path.realpath(os.path.join(cwd, "out"))
    staged = os.path.join(os.path.dirname(inside), ".out")  # what becomes it by a rename

    def allowed(path: object, folder: int = -1) -> bool:
        if not isinstance(path, str | bytes):
            return isinstance(path, int)  # a file that is open already
        at = f"/proc/self/fd/{folder}" if folder >= 0 else "."
        full = os.path.realpath(os.path.join(at, os.fsdecode(path)))
        return full == os.devnull or full.startswith((inside, staged))

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if any(event.startswith(name) for name in FORBIDDEN) and not _of_imports(event):
            events.append(f"{event} {args!r}"[:200])
        elif event == "import" and args[0].startswith("canary"):
            events.append(f"{event} {args[0]}")
        elif event in CHANGING and not allowed(args[0], _folder_of(event, args)):
            events.append(f"{event} {args!r}"[:200])
        elif event == "open":
            path, mode, flags = args
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if (writes or (mode and set(mode) & set("wax+"))) and not allowed(path):
                events.append(f"{event} {args!r}"[:200])

    sys.addaudithook(hook)


def _folder_of(event: str, args: tuple[Any, ...]) -> int:
    """The open folder that a path is relative to; -1 where it isn't."""
    place = {"os.mkdir": 2, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.chmod": 2}
    return args[place[event]] if event in place else -1


def _of_imports(event: str) -> bool:
    """Modules that are imported late are read by marshal, from importlib's frame."""
    frame = sys._getframe(2)
    return event.startswith(("marshal.", "code.")) and "importlib" in frame.f_code.co_filename


def run(job: dict[str, Any]) -> dict[str, Any]:
    """What came of a job, from a child that has done it."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        with os.fdopen(send, "w") as out:
            json.dump(_do(job), out)
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as back:
        said = back.read()
    _, status = os.waitpid(child, 0)
    return json.loads(said) if said else {"outcome": "killed", "status": status}


def _do(job: dict[str, Any]) -> dict[str, Any]:
    os.chdir(job["cwd"])
    sys.path.insert(0, job["cwd"])
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        stream.flush()
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    with open("/proc/self/statm") as file:
        there = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (there + ROOM, there + ROOM))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    signal.alarm(4 * SECONDS)
    events: list[str] = []
    watch(job["cwd"], events)
    result: dict[str, Any] = {"said": ""}
    start = os.times()
    try:
        result |= _read(job["args"][0]) if job["do"] == "read" else _cli(job["args"])
    except BaseException as error:
        result |= {"outcome": "crash", "said": "".join(traceback.format_exception(error))[-2000:]}
    end = os.times()
    sys.stdout.flush()
    sys.stderr.flush()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu = end.user - start.user + end.system - start.system
    return result | {"rss": usage.ru_maxrss << 10, "seconds": cpu, "events": events}


def _read(path: str) -> dict[str, Any]:
    from neox_bridge.errors import BridgeError
    from neox_bridge.formats.torch_file import read_torch

    try:
        return {"outcome": "value", "said": type(read_torch(path)).__name__}
    except BridgeError as error:
        return {"outcome": "refused", "said": str(error)}


def _cli(arguments: list[str]) -> dict[str, Any]:
    from neox_bridge.cli.app import main

    sys.argv = ["neox-bridge", *arguments]
    try:
        main()
    except SystemExit as end:
        return {"outcome": "exit", "code": end.code or 0}
    return {"outcome": "exit", "code": 0}


def main() -> None:
    """Import what jobs would import first, so that each starts from the same memory."""
    for name in (
        *("bz2", "lzma", "zipfile", "numpy", "ml_dtypes", "yaml", "neox_bridge.cli.app"),
        *("neox_bridge.formats.pickle_security", "neox_bridge.layouts.security"),
        *("neox_bridge.layouts.open", "neox_bridge.layouts.neox_reader"),
        *("neox_bridge.planning.make", "neox_bridge.execution.execute"),
    ):
        importlib.import_module(name)
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    results = [run(job) for job in jobs]
    with open(sys.argv[2], "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main()
