"""The pages of the documentation, and the commands that they show."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
OMITTED = "..."  # a line that stands for others
SOME = "…"  # some characters of a line


def all_pages() -> list[Path]:
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def console_blocks(page: Path) -> list[str]:
    return re.findall(r"^```console\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(block: str) -> Iterator[tuple[str, list[str]]]:
    """The commands of a block, and the lines that it shows below each."""
    lines = block.splitlines()
    assert lines[0].startswith("$ ")
    while lines:
        command = lines.pop(0).removeprefix("$ ")
        while lines and lines[0].startswith("> "):
            command += "\n" + lines.pop(0).removeprefix("> ")
        shown = []
        while lines and not lines[0].startswith("$ "):
            shown.append(lines.pop(0))
        yield command, [line for line in shown if line != OMITTED]


def prints(output: str, shown: str) -> bool:
    """Whether a line of the output begins as a line of the page does, up to what it leaves out."""
    pattern = ".*".join(map(re.escape, shown.split(SOME)))
    return re.search(rf"^{pattern}$", output, re.M) is not None


class Shell:
    """Runs commands of a page in an empty folder, where the Hub is a stub.

    model: a folder with a small model.
    """

    def __init__(self, folder: Path, hub_url: str, model: Path | None = None) -> None:
        self.model = model
        for name in ("bin", "home", "cwd"):
            (folder / name).mkdir()
        self.cwd = folder / "cwd"
        tool = folder / "bin" / "neox-bridge"
        tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m neox_bridge "$@"\n')
        tool.chmod(0o755)
        places = (str(tool.parent), str(Path(sys.executable).parent), os.environ["PATH"])
        home = str(folder / "home")
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join(places),
            "HF_ENDPOINT": hub_url,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": home,
            "HOME": home,
        }
        for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "XDG_CACHE_HOME"):
            self.environment.pop(name, None)

    def run(self, command: str, places: Mapping[str, str] | None = None, exit_code: int = 0) -> str:
        """What a command prints. places: paths of this machine for paths that a page makes up."""
        for shown, real in (places or {}).items():
            command = command.replace(shown, real)
        done = subprocess.run(
            ["bash", "-e", "-c", command],
            cwd=self.cwd,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == exit_code, f"{command}\n{done.stdout}"
        return done.stdout
