"""What a message advises to install fits the way in which neox-bridge was installed."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from neox_bridge import extras
from neox_bridge.extras import Installation, command_for, installation

ROOT = Path(__file__).parents[1]
PYTHON = "/env/bin/python"
CLONE = ROOT.as_uri()
COMMIT = "0123456789abcdef"
REPOSITORY = f"git+https://example.org/neox-bridge@{COMMIT}"
PLACE = f"neox-bridge[report] @ {REPOSITORY}"
COMMANDS = [
    (Installation("pip", PYTHON), "pip install 'neox-bridge[report]'"),
    (Installation("pip", PYTHON, False), f"{PYTHON} -m pip install 'neox-bridge[report]'"),
    (Installation("pip", PYTHON, url=CLONE), f"pip install 'neox-bridge[report] @ {CLONE}'"),
    (Installation("pip", PYTHON, url=REPOSITORY), f"pip install '{PLACE}'"),
    (
        Installation("pip", PYTHON, url=CLONE, is_editable=True),
        f"pip install --editable '{ROOT}[report]'",
    ),
    (
        Installation("uv pip", PYTHON, False, REPOSITORY),
        f"uv pip install --python {PYTHON} '{PLACE}'",
    ),
    (Installation("uv tool", PYTHON, url=REPOSITORY), f"uv tool install '{PLACE}'"),
    (
        Installation("uv tool", PYTHON, url=REPOSITORY, extras=("hub", "plot")),
        f"uv tool install 'neox-bridge[hub,report] @ {REPOSITORY}'",
    ),
    (
        Installation("uv tool", PYTHON, url=CLONE, is_editable=True, extras=("hub",)),
        f"uv tool install --editable '{ROOT}[hub,report]'",
    ),
    (Installation("pipx", PYTHON, url=REPOSITORY), f"pipx install --force '{PLACE}'"),
    (
        Installation("pip", PYTHON, is_known=False),
        "in a clone of neox-bridge: pip install '.[report]'",
    ),
    (
        Installation("pip", PYTHON, url="file:///no/such/folder"),
        "in a clone of neox-bridge: pip install '.[report]'",
    ),
    (
        Installation("pipx", PYTHON, url="file:///no/such/folder"),
        "in a clone of neox-bridge: pipx install --force '.[report]'",
    ),
]


@pytest.mark.parametrize(("here", "command"), COMMANDS)
def test_the_command_for_each_way(here: Installation, command: str) -> None:
    assert command_for(here, "report") == command


@pytest.mark.parametrize(
    ("here", "command"),
    [
        (Installation("pip", PYTHON, url=CLONE), "pip install paramiko"),
        (Installation("pipx", PYTHON, url=CLONE), "pipx inject neox-bridge paramiko"),
        (
            Installation("uv tool", PYTHON, url=REPOSITORY, extras=("hub",)),
            f"uv tool install --with paramiko 'neox-bridge[hub] @ {REPOSITORY}'",
        ),
    ],
)
def test_another_package(here: Installation, command: str) -> None:
    assert command_for(here, package="paramiko") == command


class Distribution:
    """What importlib.metadata knows of neox-bridge."""

    requires = ('a; extra == "hub"', 'b>1; extra == "hub"', 'a ; extra=="plot"', "c")

    def __init__(self, origin: Any) -> None:
        self.origin = origin

    def read_text(self, name: str) -> str | None:
        return json.dumps(self.origin) if name == "direct_url.json" and self.origin else None


FOLDER = {"url": "file:///clone", "dir_info": {}}
EDITABLE = {"url": "file:///clone", "dir_info": {"editable": True}}
CHECKOUT = {
    "url": "https://example.org/neox-bridge",
    "vcs_info": {"vcs": "git", "commit_id": COMMIT, "requested_revision": "main"},
}


@pytest.mark.parametrize(
    ("origin", "url", "is_editable"),
    [
        (None, "", False),
        (FOLDER, "file:///clone", False),
        (EDITABLE, "file:///clone", True),
        (CHECKOUT, REPOSITORY, False),
    ],
)
@pytest.mark.parametrize(
    ("mark", "installer"),
    [("uv-receipt.toml", "uv tool"), ("pipx_metadata.json", "pipx"), ("", "pip")],
)
def test_it_is_read_from_the_environment(
    origin: Any,
    url: str,
    is_editable: bool,
    mark: str,
    installer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def distribution(name: str) -> Any:
        if name == "b":
            raise PackageNotFoundError(name)
        return Distribution(origin)

    monkeypatch.setattr("importlib.metadata.distribution", distribution)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    if mark:
        (tmp_path / mark).write_text("")
    here = installation()
    assert (here.installer, here.url, here.is_editable) == (installer, url, is_editable)
    assert here.extras == ("plot",), "of [hub] a package is missing"


def test_the_way_of_these_tests() -> None:
    """Whatever it is: the package is installed here, with the packages of some extras."""
    here = installation()
    assert here.is_known
    assert {"hub", "report"} <= set(here.extras)


def test_a_package_that_only_pythonpath_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def distribution(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", distribution)
    assert extras.install_command("hub").startswith("in a clone of neox-bridge: ")


def test_nothing_says_that_the_package_is_on_an_index() -> None:
    """Commands in texts are for a clone, or come from ``install_command``."""
    index = re.compile(r"(pip|pipx|uv tool) install (--?\w+ )*['\"]?neox-bridge\b(?!.* @ )")
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    for path in [*pages, *ROOT.rglob("docs/**/*.md"), *ROOT.rglob("src/**/*.py")]:
        assert not index.search(path.read_text(encoding="utf-8")), path
    assert index.search("pip install 'neox-bridge[hub]'")


def run(command: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        shlex.split(command), env=environment, cwd="/", capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("install", ["uv tool install", "pipx install"])
def test_the_printed_command_works(install: str, tmp_path: Path) -> None:
    """A tool without the extra says what to install; that command is run, and the next step is on.

    The extra that it was installed with stays.
    """
    bins = tmp_path / "bin"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.defpath}"}
    environment |= {"UV_TOOL_DIR": str(tmp_path / "tools"), "UV_TOOL_BIN_DIR": str(bins)}
    environment |= {"PIPX_HOME": str(tmp_path / "pipx"), "PIPX_BIN_DIR": str(bins)}
    done = run(f"{install} --python {sys.executable} '{ROOT}[patch]'", environment)
    assert done.returncode == 0, done.stderr
    report = f"{bins}/neox-bridge report /no-such-folder -o {tmp_path}/page.html"
    done = run(report, environment)
    message, _, command = done.stderr.strip().partition(" Install it: ")
    assert message == "error: jinja2 is missing, which reports need."
    assert f"neox-bridge[patch,report] @ {CLONE}" in command
    assert command.startswith(install)
    done = run(command, environment)
    assert done.returncode == 0, done.stderr
    assert run(report, environment).stderr == "error: /no-such-folder: no such folder.\n"
    done = run(f"{bins}/neox-bridge patch /no-such-folder", environment)
    assert "Install it" not in done.stderr
