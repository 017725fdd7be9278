"""Two hosts on this machine: a network namespace and a mount namespace each, joined by a bridge.

A process of a host has its own loopback, its own address, and its own disk at the path that all
hosts use for it. Everything else on the disk is shared. Needs root and iproute2.
"""

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_numbers = itertools.count()
# what the processes of a host run: the first words are the disk and where it is mounted
_MOUNTED = 'mount --bind /dev/null /etc/resolv.conf && mount --bind "$0" "$1" && shift && exec "$@"'


@dataclass(frozen=True)
class Host:
    """namespace: of its network. disk: the folder whose content it sees at ``local``."""

    namespace: str
    address: str
    disk: Path
    local: Path

    def start(
        self, command: Sequence[str], env: Mapping[str, str], **options: Any
    ) -> "subprocess.Popen[str]":
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "sh", "-c", _MOUNTED]
        return subprocess.Popen(
            [*inside, str(self.disk), str(self.local), *command],
            env={**os.environ, **env},
            text=True,
            **options,
        )


@dataclass(frozen=True)
class Hosts:
    """address: of this process, which the hosts reach too."""

    address: str
    hosts: tuple[Host, Host]

    def __getitem__(self, number: int) -> Host:
        return self.hosts[number]

    def train(
        self, command: Sequence[str], ranks: int = 1, **env: str
    ) -> "list[subprocess.CompletedProcess[str]]":
        """Run a distributed program, with this many ranks on each host. In the order of ranks."""
        world = {"WORLD_SIZE": str(2 * ranks), "MASTER_ADDR": self[0].address}
        world |= {"MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "eth0", **env}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running = [
            host.start(
                command,
                {**world, "RANK": str(number * ranks + local), "LOCAL_RANK": str(local)},
                **pipes,
            )
            for number, host in enumerate(self.hosts)
            for local in range(ranks)
        ]
        done = []
        try:
            for process in running:
                out, errors = process.communicate(timeout=600)
                done.append(subprocess.CompletedProcess(command, process.returncode, out, errors))
        finally:
            for process in running:
                process.kill()
        return done


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Two hosts whose own disks are at ``folder / "local"``. Skips the test without root."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("namespaces for two hosts need root and iproute2")
    name = f"nb{os.getpid() % 100_000}x{next(_numbers)}"
    net = f"198.18.{os.getpid() % 250 + 1}"  # a range for benchmarks, which no network routes
    bridge, hosts = f"{name}br", []
    (folder / "local").mkdir()
    try:
        _ip("link", "add", bridge, "type", "bridge")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    try:
        _ip("addr", "add", f"{net}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number in (1, 2):
            disk, local = folder / f"disk-{number}", folder / "local"
            host = Host(f"{name}h{number}", f"{net}.{number}", disk, local)
            host.disk.mkdir()
            _ip("netns", "add", host.namespace)
            hosts.append(host)
            _ip(
                *("link", "add", f"{name}v{number}", "type", "veth"),
                *("peer", "name", "eth0", "netns", host.namespace),
            )
            _ip("link", "set", f"{name}v{number}", "master", bridge, "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host.namespace, "link", "set", device, "up")
        yield Hosts(f"{net}.254", (hosts[0], hosts[1]))
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.namespace], check=False)
        subprocess.run(["ip", "link", "del", bridge], check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
