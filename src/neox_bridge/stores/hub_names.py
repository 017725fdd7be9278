"""Names of places on the Hub: ``hf://org/name@branch``."""

import re
from dataclasses import dataclass

from neox_bridge.errors import BridgeError
from neox_bridge.stores.folder import HUB, is_hub

_MODEL = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
MAIN = "main"


@dataclass(frozen=True, slots=True)
class HubTarget:
    """A branch of a model repository. repo: ``org/name``."""

    repo: str
    branch: str = MAIN

    def __str__(self) -> str:
        return f"hf://{self.repo}@{self.branch}"

    @property
    def folder_name(self) -> str:
        """The name of the local folder in which its files are written."""
        return f"{self.repo}@{self.branch}".replace("/", "--")


def reader_folder(repo: str) -> str:
    """The folder in the yml of a GPT-NeoX target on the Hub, which is the downloaded copy."""
    return f"/path/to/{repo.split('/')[1]}"


def model_id(text: str) -> tuple[str, str] | None:
    """Parse ``org/name@revision`` into ``org/name`` and the revision, which may be ""."""
    match = _MODEL.fullmatch(text)
    return (match[1], match[2] or "") if match else None


def hub_target(text: str) -> HubTarget:
    """Parse ``hf://org/name`` or ``hf://org/name@branch``. Raises BridgeError for other forms."""
    match = model_id(text.removeprefix(HUB)) if is_hub(text) else None
    if match is None:
        raise BridgeError(f"{text} is not a Hub URL. Use hf://ORG/NAME or hf://ORG/NAME@BRANCH.")
    return HubTarget(match[0], match[1] or MAIN)
