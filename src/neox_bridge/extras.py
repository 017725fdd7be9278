"""The command that installs an optional package, for the way in which neox-bridge was installed.

uv marks the environments of its tools by ``uv-receipt.toml``, and pipx by ``pipx_metadata.json``.
Every installer writes down where a package came from if it was not an index (``direct_url.json``,
PEP 610).
"""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from neox_bridge.errors import BridgeError

NAME = "neox-bridge"
Installer = Literal["pip", "uv pip", "uv tool", "pipx"]


@dataclass(frozen=True, slots=True)
class Installation:
    """How this package came into the environment that runs it.

    Attributes:
        installer: What manages the environment.
        executable: The Python of the environment.
        is_active: Whether the ``pip`` that a shell finds is the environment's.
        url: What was installed: of a folder, a file or a repository; "" for an index.
        is_editable: Whether the environment uses the folder itself.
        is_known: Whether the environment knows the package: it does not if only PYTHONPATH does.
        extras: Those that are installed already. uv and pipx make an environment anew, so that
            their command must name them again.
    """

    installer: Installer
    executable: str
    is_active: bool = True
    url: str = ""
    is_editable: bool = False
    is_known: bool = True
    extras: tuple[str, ...] = ()


def install_command(extra: str = "", package: str = "") -> str:
    """The command that adds an extra of this package, or another package, to this environment."""
    return command_for(installation(), extra, package)


def missing(what: str, extra: str) -> BridgeError:
    """The error for a package of an extra that is not installed. what: which it is, and why."""
    return BridgeError(f"{what}. Install it: {install_command(extra)}")


def command_for(here: Installation, extra: str = "", package: str = "") -> str:
    """``install_command`` for an installation."""
    if not here.is_known or _is_gone(here.url):
        install = f"{here.installer} install" + (" --force" if here.installer == "pipx" else "")
        if package:
            return f"{install} {shlex.quote(package)}"
        return f"in a clone of {NAME}: {install} '.[{extra}]'"
    if here.installer == "pipx" and package:
        return f"pipx inject {NAME} {shlex.quote(package)}"
    if here.installer in ("pip", "uv pip"):
        what = shlex.quote(package) if package else _requirement(here, (extra,))
        return f"{_pip(here)} {what}"
    names = {*here.extras, *([extra] if extra else [])}
    what = _requirement(here, sorted(names - ({"plot"} if "report" in names else set())))
    if here.installer == "pipx":
        return f"pipx install --force {what}"
    return f"uv tool install {f'--with {shlex.quote(package)} ' if package else ''}{what}"


def installation() -> Installation:
    """How this package was installed here."""
    from importlib.metadata import PackageNotFoundError, distribution

    executable, prefix = sys.executable, sys.prefix
    pip = shutil.which("pip")
    is_active = pip is not None and os.path.dirname(pip) == os.path.dirname(executable)
    installer = _installer(prefix)
    try:
        package = distribution(NAME)
    except PackageNotFoundError:
        return Installation(installer, executable, is_active, is_known=False)
    try:
        origin = json.loads(package.read_text("direct_url.json") or "{}")
    except ValueError:
        origin = {}
    url, is_editable = _origin(origin)
    extras = tuple(sorted(_installed_extras(package.requires or ())))
    return Installation(installer, executable, is_active, url, is_editable, True, extras)


def _installer(prefix: str) -> Installer:
    if os.path.isfile(os.path.join(prefix, "uv-receipt.toml")):
        return "uv tool"
    if os.path.isfile(os.path.join(prefix, "pipx_metadata.json")):
        return "pipx"
    from importlib.util import find_spec

    return "pip" if find_spec("pip") is not None else "uv pip"  # which makes environments without


def _origin(direct_url: Mapping[str, Any]) -> tuple[str, bool]:
    """What was installed, as a requirement names it, and whether the folder itself is used."""
    url = str(direct_url.get("url") or "")
    if repository := direct_url.get("vcs_info"):
        return f"{repository.get('vcs')}+{url}@{repository.get('commit_id')}", False
    folder = direct_url.get("dir_info") or {}
    return url, bool(folder.get("editable"))


def _installed_extras(requirements: "list[str] | tuple[()]") -> set[str]:
    """The extras all of whose packages are installed."""
    from importlib.metadata import PackageNotFoundError, distribution

    packages: dict[str, list[str]] = {}
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra\s*==\s*[\"']([\w.-]+)[\"']", requirement)
        if name and extra:
            packages.setdefault(extra[1], []).append(name[0])

    def is_installed(name: str) -> bool:
        try:
            return distribution(name) is not None
        except PackageNotFoundError:
            return False

    return {extra for extra, names in packages.items() if all(map(is_installed, names))}


def _requirement(here: Installation, extras: "tuple[str, ...] | list[str]") -> str:
    """The package with extras, and the option that installs its folder in place, for a shell."""
    names = f"[{','.join(extras)}]" if extras else ""
    if here.is_editable:
        return f"--editable {shlex.quote(_path(here.url) + names)}"
    return shlex.quote(f"{NAME}{names}" + (f" @ {here.url}" if here.url else ""))


def _pip(here: Installation) -> str:
    if here.installer == "uv pip":
        return f"uv pip install --python {shlex.quote(here.executable)}"
    return "pip install" if here.is_active else f"{shlex.quote(here.executable)} -m pip install"


def _path(url: str) -> str:
    return unquote(urlsplit(url).path)


def _is_gone(url: str) -> bool:
    """Whether a folder or file of this machine was installed that is no longer there."""
    return url.startswith("file:") and not os.path.exists(_path(url))
