"""What a process started through Ray ends with it, however that ends; no other process does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import neox_bridge
from neox_bridge.execution.ray_guard import marked

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="Linux only")
SCRIPT = """
import os, subprocess, sys, time
from neox_bridge.execution.ray_guard import guard
guard(); guard()
deep = "import subprocess; subprocess.run(['sleep', '600'])"
subprocess.Popen([sys.executable, "-c", deep], start_new_session=True)
print(os.environ["NEOX_BRIDGE_RAY"], flush=True)
time.sleep(int(sys.argv[1]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, None])
def test_what_was_started_ends_with_it(how: signal.Signals | None, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(neox_bridge.__file__).parent.parent)}
    command = [sys.executable, "-c", SCRIPT, "600" if how else "1"]
    guarded = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    other = subprocess.Popen(["sleep", "600"])
    assert guarded.stdout is not None
    mark = guarded.stdout.readline().strip()
    while len(marked(mark)) < 2:  # the child of the child too
        time.sleep(0.05)
    if how:
        guarded.send_signal(how)
    guarded.wait()
    guarded.stdout.close()
    end = time.monotonic() + 60
    while marked(mark) and time.monotonic() < end:
        time.sleep(0.1)
    assert marked(mark) == []
    assert other.poll() is None
    other.kill()
    other.wait()
