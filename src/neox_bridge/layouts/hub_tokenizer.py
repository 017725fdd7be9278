"""Finds the tokenizer of a published run, whose yml names a path on the training cluster.

The transformers version of the model has it, and EleutherAI/gpt-neox-20b has the file that the yml
of Pythia calls ``20B_tokenizer.json``. Requests are only made for sources on the Hub.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from neox_bridge.errors import BridgeError
from neox_bridge.findings import Finding
from neox_bridge.frameworks.suites import TOKENIZER_REPO, twin_of
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.hub_download import cached_snapshot
from neox_bridge.layouts.hub_source import is_offline, look_up
from neox_bridge.layouts.run_tokenizer import NEOX_20B, base_name, with_tokenizer
from neox_bridge.layouts.tokenizer import MAIN, NAMES, tokenizer_files, tokenizer_size
from neox_bridge.stores.hub_api import explained, hub_api


def with_published_tokenizer(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the tokenizer of its run, if the Hub or the cache has it.

    A finding says where it comes from, or why it is missing. Nothing else depends on it. No request
    is made for local folders or for checkpoints with a tokenizer.
    """
    if not checkpoint.missing_tokenizer or not checkpoint.hub_repo:
        return checkpoint
    reasons = []
    for repo in _repos(checkpoint):
        try:
            files = published_tokenizer(repo)
            _check_size(checkpoint, files, repo)
        except BridgeError as error:
            reasons.append(str(error))
            continue
        message = f"the tokenizer of {repo} is used. The yml names {checkpoint.missing_tokenizer}"
        finding = Finding("tokenizer-from-hub", "info", message)
        named = with_tokenizer(checkpoint, files)
        return replace(named, findings=(*named.findings, finding))
    if not reasons:
        return checkpoint
    message = f"the Hub does not have a tokenizer for this model: {' '.join(reasons)}"
    finding = Finding("tokenizer-not-on-hub", "info", message)
    return replace(checkpoint, findings=(*checkpoint.findings, finding))


@lru_cache(16)
def published_tokenizer(repo: str) -> tuple[str, ...]:
    """The tokenizer files of ``org/name``, in the cache of huggingface_hub.

    Raises BridgeError if it has none or cannot be reached.
    """
    if is_offline():
        folder = cached_snapshot(repo, None)
    else:
        listing = look_up(repo, None)
        names = [name for name in NAMES if name in listing.files]
        if MAIN not in names:
            raise BridgeError(f"{repo} has no {MAIN}.")
        api = hub_api(f"The tokenizer of {repo} is on the Hub")
        with explained(repo):
            places = [
                str(api.hf_hub_download(repo, name, revision=listing.commit)) for name in names
            ]
        folder = os.path.dirname(places[0])
    files = tokenizer_files(folder)
    if not any(os.path.basename(file) == MAIN for file in files):
        raise BridgeError(f"{repo} has no {MAIN} in the cache.")
    return files


def _repos(checkpoint: Checkpoint) -> Iterator[str]:
    """Repositories that may have the tokenizer. The twin for transformers is first."""
    if (twin := twin_of(checkpoint.hub_repo)) is not None:
        yield twin
    if base_name(checkpoint.missing_tokenizer) == NEOX_20B:
        yield TOKENIZER_REPO


def _check_size(checkpoint: Checkpoint, files: tuple[str, ...], repo: str) -> None:
    """Raise BridgeError for a tokenizer with more entries than the model has rows."""
    entries, rows = tokenizer_size(files), checkpoint.config.dims["vocab"]
    if entries is not None and entries > rows:
        raise BridgeError(
            f"the tokenizer of {repo} has {entries:,} entries, and this model has {rows:,} rows."
        )
