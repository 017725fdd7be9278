"""Ends what a local Ray started when the process that started it is gone, also by SIGKILL.

Ray's own processes end with their parent, but two agents of its raylet stay. A small process waits
at a pipe whose other end only the guarded process holds. When that is closed, it kills what has the
guarded process's mark in its environment: children of any depth inherit that, and nobody else.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from uuid import uuid4

_MARK = "NEOX_BRIDGE_RAY"
_ROUNDS, _PAUSE_SECONDS = 20, 0.5  # what is being started meanwhile has its mark a little later
_guarded: list[int] = []  # the pipe's end, open as long as this process lives


def guard() -> None:
    """Have the processes that this one starts from now on ended with it. Linux only."""
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
        start_new_session=True,  # Ctrl-C in a terminal goes to a whole group
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
    """Wait for the end of the guarded process, then end what it left."""
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
