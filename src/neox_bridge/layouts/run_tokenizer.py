"""The tokenizer of a GPT-NeoX run: which file the yml names, and where it is.

Published runs name it by an absolute path on the training cluster, such as
``/fsx/pile/20B_tokenizer.json``. The file may be beside the checkpoint.
"""

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from neox_bridge.findings import Finding, unrepeated
from neox_bridge.frameworks.suites import TOKENIZER_REPO
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.step_folder import StepFolder
from neox_bridge.layouts.tokenizer import FOLDER, MAIN, tokenizer_files, tokenizer_size
from neox_bridge.stores.paths import absolute, is_local, isfile
from neox_bridge.stores.step_names import step_of

NEOX_20B = "20B_tokenizer.json"  # the name that EleutherAI's ymls have for it
_PATH_CHARACTERS = 4096  # of a path


def named_tokenizer(raw: Mapping[str, Any]) -> str:
    """The tokenizer file in the yml of a run, as written there; "" if there is none.

    Only for Hugging Face tokenizers, which are one file.
    """
    kind, name = raw.get("tokenizer_type") or "HFTokenizer", raw.get("vocab_file")
    if not isinstance(name, str) or str(kind).lower() != "hftokenizer":
        return ""
    return name if name.endswith(".json") and len(name) <= _PATH_CHARACTERS else ""


def local_tokenizer(place: StepFolder, raw: Mapping[str, Any]) -> tuple[str, ...]:
    """The tokenizer files beside a checkpoint or at the path in its yml; () if there are none.

    The file named in the yml comes first, then the folder ``tokenizer`` that this tool writes, then
    the ``tokenizer.json`` beside flat files.
    """
    if name := named_tokenizer(raw):
        for path in _places(place, name):
            if isfile(path):
                beside = tokenizer_files(os.path.dirname(absolute(path)))
                return beside if os.path.basename(path) == MAIN else (absolute(path),)
    if files := tokenizer_files(os.path.join(place.root, FOLDER), place.root):
        return files
    beside = tokenizer_files(place.folder) if place.flat else ()
    return beside if any(os.path.basename(path) == MAIN for path in beside) else ()


def with_tokenizer(checkpoint: Checkpoint, files: Sequence[str]) -> Checkpoint:
    """The checkpoint with these tokenizer files, so that none is missing.

    files: absolute paths or URLs. If there are none, the checkpoint stays unchanged.
    """
    if not files:
        return checkpoint
    given = replace(checkpoint, tokenizer=tuple(files), tokenizer_size=tokenizer_size(files))
    return not_missing(given)


def not_missing(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without a missing tokenizer."""
    findings = tuple(unrepeated(checkpoint.findings, (), ["tokenizer"]))
    return replace(checkpoint, missing_tokenizer="", findings=findings)


def missing_finding(checkpoint: Checkpoint) -> Finding | None:
    """The finding for a tokenizer that the yml names but that does not exist."""
    state, name = checkpoint.neox, checkpoint.missing_tokenizer
    if state is None or not name:
        return None
    base = base_name(name)
    if checkpoint.hub_repo:
        where = f"{checkpoint.hub_repo} does not contain"
        remedy = (
            "convert, batch and reshard look for it on the Hub. `tokenizer=PATH` names another one"
        )
    else:
        where = (
            f"is not on this machine, and {state.folder} has no {base}, so the number of padding "
            "rows in the vocabulary is unknown"
        )
        remedy = f"convert with `tokenizer={TOKENIZER_REPO if base == NEOX_20B else 'PATH'}`"
        if is_local(state.root):
            remedy = f"copy {base} into {shlex.quote(state.root)}, or {remedy}"
    message = f"the yml names the tokenizer {name}, which {where}"
    return Finding("tokenizer-missing", "info", message, remedy, subject="tokenizer")


def _places(place: StepFolder, name: str) -> Iterator[str]:
    """Where the file that the yml names may be: at that path, or beside the checkpoint."""
    base = base_name(name)
    folders = [place.root, place.folder]
    if place.flat and step_of(os.path.basename(place.folder)) is not None:
        folders.append(os.path.dirname(place.folder))  # one for all the steps of a run
    named = os.path.join(place.root, name)  # never relative to where we run
    # nothing of this machine, or of another place in the store, belongs to a URL
    if is_local(place.root) or (
        named.startswith(f"{place.root}/") and ".." not in named.split("/")
    ):
        yield named
    if base:
        yield from (os.path.join(folder, base) for folder in dict.fromkeys(folders))


def base_name(name: str) -> str:
    """The last part of a path of any operating system."""
    return re.split(r"[/\\]", name)[-1]
