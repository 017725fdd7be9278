"""Running ``neox-bridge``: in this process, or in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click.testing
from click.testing import CliRunner
from common import HELPERS
from hub_stub import WRITE, Stub

import neox_bridge
from neox_bridge.cli.app import app

RUNNER = CliRunner()


def run(*args: object) -> "click.testing.Result":
    return RUNNER.invoke(app, [str(arg) for arg in args])


Job = list[str]


def run_all(jobs: list[Job], cwd: Path) -> list[tuple[int, str, str]]:
    """Each through ``main`` in a process of its own: exit code, stdout, stderr."""
    script = HELPERS / "run_attacks.py"
    environment = os.environ | {"PYTHONPATH": str(Path(neox_bridge.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, str(script), "4000", "60"],
        input=json.dumps(jobs), capture_output=True, text=True, cwd=cwd, env=environment,
        check=True,
    )  # fmt: skip
    return [(code, out, err) for code, out, err in json.loads(done.stdout)]


class Run:
    """Commands in a folder, with a Hub. environment: what else they see."""

    def __init__(self, hub: Stub, folder: Path) -> None:
        self.folder = folder
        home = str(folder.parent / "home")
        own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE, "HF_HUB_DISABLE_XET": "1"}
        self.environment = {**os.environ, **own, "HF_HOME": home, "HOME": home}
        for name in ("TMPDIR", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
            self.environment.pop(name, None)

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "neox_bridge", *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=pipe, stderr=pipe, text=True
        )

    def __call__(self, *arguments: object, code: int = 0) -> tuple[str, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, err
        assert "Traceback" not in err
        return out, err

    def json(self, *arguments: object) -> Any:
        return json.loads(self(*arguments, "--json", "-q")[0])
