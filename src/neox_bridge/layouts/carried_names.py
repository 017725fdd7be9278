"""Which small text files travel with a model: its license, its notices, its model card.

The names are a fixed list. Whoever passes a model on must pass these files on with it, and nothing
that a program could run is ever among them.
"""

import os
import re
from dataclasses import dataclass
from typing import Literal

FOLDER = "huggingface"  # in the root of a GPT-NeoX run
CARD = "README.md"
GENERATION = "generation_config.json"
MOST_BYTES = 1 << 20
LEGAL = (
    r"((model_)?licen[sc]es?|notices?|copying|copyright|patents|(acceptable_)?use_policy|terms_of_use|"
    r"third_party_(notices?|licen[sc]es?))([-_][a-z0-9_-]+)?(\.(md|txt|rst))?|copying\.lesser"
)
OTHER = (
    r"(readme|model_card|changelog)\.md|citation\.(cff|bib)|authors(\.(md|txt))?|"
    r"(chat_template|generation_config)\.json"
)
_LEGAL = re.compile(LEGAL, re.IGNORECASE | re.ASCII)
_CARRIED = re.compile(rf"{LEGAL}|{OTHER}", re.IGNORECASE | re.ASCII)
_CODE = re.compile(
    r".*\.(py|pyc|pyi|ipynb|sh|bash|zsh|bat|cmd|ps1|so|dll|dylib|exe|js|ts|jar|whl|c|cc|cpp|cu|cuh|h|"
    r"hpp|rs|go|lua|pl|rb|pkl|pickle|joblib|egg)",
    re.IGNORECASE,
)

LeftReason = Literal["code", "too large", "not text", "not on the list"]


@dataclass(frozen=True, slots=True)
class LeftFile:
    """A file beside the source's model that is not copied. The name of a folder ends in `/`."""

    name: str
    reason: LeftReason


@dataclass(frozen=True, slots=True)
class CarriedFiles:
    """The files of a source beside its model.

    paths: absolute paths or URLs of those that travel. left: those that do not.
    """

    paths: tuple[str, ...] = ()
    left: tuple[LeftFile, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the files that travel."""
        return tuple(map(os.path.basename, self.paths))

    def path_of(self, name: str) -> str | None:
        """The path of the file of this name, if it travels."""
        return next((path for path in self.paths if os.path.basename(path) == name), None)


def is_legal(name: str) -> bool:
    """Whether a file of this name says under which terms a model may be used."""
    return _LEGAL.fullmatch(name) is not None


def is_carried(name: str) -> bool:
    """Whether a file of this name travels with a model."""
    return _CARRIED.fullmatch(name) is not None


def is_code(name: str) -> bool:
    """Whether a program could run a file of this name, or load it as a pickle."""
    return _CODE.fullmatch(name) is not None
