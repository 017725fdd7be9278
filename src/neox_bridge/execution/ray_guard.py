"""Ends the processes of a local Ray when the process that started it is gone, even by SIGKILL.

Ray's own processes end with their parent, but two agents of its raylet do not. A small process
waits at a pipe whose other end only the guarded process holds. When that end is closed, it kills
all processes that have the mark of the guarded process in their environment. Only its descendants
inherit the mark.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from uuid import uuid4

_MARK = "NEOX_BRIDGE_RAY"
_ROUNDS, _PAUSE_SECONDS = 20, 0.5  # a process that is just starting gets its mark slightly later
_guarded: list[int] = []  # the end of the pipe, open as long as this process lives


def guard() -> None:
    """End all processes that this process starts from now on together with it. Linux only."""
    if _guarded or not os.path.isdir("/proc/self/fd"):
        return
    wait_at, keep_open = os.pipe()
    mark = uuid4().hex
    command = [sys.executable, "-I", os.path.abspath(__file__), str(wait_at), mark]
    nowhere = subprocess.DEVNULL
    subprocess.Popen(
        command,
        pass_fds=[wait_at],
        stdin=nowhere,
        stdout=nowhere,
        stderr=nowhere,
        cwd="/",
        start_new_session=True,  # Ctrl-C in a terminal goes to the whole process group
    )
    os.close(wait_at)
    _guarded.append(keep_open)
    os.environ[_MARK] = mark


def marked(mark: str) -> list[int]:
    """The processes that have a mark in their environment."""
    wanted = f"{_MARK}={mark}".encode()
    pids = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if wanted in file.read().split(b"\0"):
                    pids.append(int(name))
    return pids


def main(wait_at: int, mark: str) -> None:
    """Wait for the end of the guarded process, then end the processes that it left."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.read(wait_at, 1)
    quiet = 0
    for _ in range(_ROUNDS):
        left = marked(mark)
        quiet = 0 if left else quiet + 1
        if quiet > 2:
            return
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_PAUSE_SECONDS)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
