"""Runs the command line on many folders, each in a process of its own, and says how it ended.

python run_attacks.py MEGABYTES SECONDS < list of argument lists; prints a list of results as JSON:
exit code (negative: the signal that ended it), stdout, stderr. Each process may set aside that many
megabytes beyond what the imports take (RLIMIT_DATA: private writable memory), and take that many
seconds of its processor; one that waits is ended after ten times as long.
"""

import json
import os
import resource
import signal
import sys
import tempfile

import ml_dtypes  # noqa: F401
import numpy as np  # noqa: F401
import yaml  # noqa: F401

from neox_bridge.cli import app
from neox_bridge.execution import execute  # noqa: F401
from neox_bridge.layouts import hf_reader, neox_reader, raw_llama  # noqa: F401 (all at once, here)
from neox_bridge.planning import make  # noqa: F401


def _data() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        found = next(line for line in file if line.startswith("VmData"))
    return int(found.split()[1]) << 10


def _run(arguments: list[str], megabytes: int, seconds: int, streams: tuple[int, int]) -> None:
    os.dup2(streams[0], 1)
    os.dup2(streams[1], 2)
    limit = _data() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    signal.alarm(10 * seconds)
    sys.argv = ["neox-bridge", *arguments]
    app.main()


def _result(arguments: list[str], megabytes: int, seconds: int) -> list[object]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            _run(arguments, megabytes, seconds, (out.fileno(), err.fileno()))
            os._exit(99)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "replace"))
    return [code, *texts]


if __name__ == "__main__":
    todo = json.load(sys.stdin)
    bounds = int(sys.argv[1]), int(sys.argv[2])
    json.dump([_result(arguments, *bounds) for arguments in todo], sys.stdout)
