"""Models of the Hugging Face Hub, through huggingface_hub and its cache (extra ``[hub]``)."""

import glob
import os
import shlex
from collections.abc import Sequence

from neox_bridge.errors import BridgeError
from neox_bridge.layouts.hub_cache import snapshot_of
from neox_bridge.layouts.tokenizer import NAMES
from neox_bridge.stores.hub_api import explanation, first_line, hub_api, status_of

_SMALL = ["config.json", "generation_config.json", "neox_bridge.json", *NAMES]


def download(repo: str, revision: str | None, texts: Sequence[str] = ()) -> str:
    """The folder of a model in the cache, downloaded if it is missing.

    texts: the names of small files that are downloaded too.

    huggingface_hub honors HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT. Raises
    BridgeError if the library is missing or the download fails.
    """
    api = hub_api(f"{repo} isn't a folder here, and is taken from the Hub")
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fetch(patterns: list[str]) -> str:
        try:
            return str(api.snapshot_download(repo, revision=revision, allow_patterns=patterns))
        except LocalEntryNotFoundError as error:
            if error.__cause__ is not None and status_of(error) is not None:
                raise BridgeError(explanation(error.__cause__, repo)) from None
            raise BridgeError(
                f"{_named(repo, revision)} is not in the cache, and the Hub cannot be reached "
                f"({first_line(error)}). Check the network connection and try again."
            ) from None
        except Exception as error:  # the library raises many kinds of exceptions
            raise BridgeError(explanation(error, repo)) from None

    small = [*_SMALL, *texts]
    folder = fetch([*small, "*.safetensors", "*.safetensors.index.json"])
    if not glob.glob(os.path.join(folder, "*.safetensors")):
        folder = fetch([*small, "pytorch_model*.bin", "pytorch_model.bin.index.json"])
    return folder


def cached_snapshot(repo: str, revision: str | None) -> str:
    """The folder of a revision in huggingface_hub's cache, even if some files are missing.

    Raises BridgeError if the cache has no such revision.
    """
    root = cached_repo(repo, revision)
    try:
        return snapshot_of(root, revision)
    except BridgeError as error:
        way = _way_online(repo, revision)
        raise BridgeError(f"{_named(repo, revision)} is not in the cache: {error} {way}") from None


def cached_repo(repo: str, revision: str | None = None) -> str:
    """The folder of a repository in huggingface_hub's cache, with ``refs`` and ``snapshots``.

    Raises BridgeError if the cache has none. revision: only used in the message.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    root = os.path.join(HF_HUB_CACHE, f"models--{repo.replace('/', '--')}")
    if not os.path.isdir(os.path.join(root, "snapshots")):
        raise BridgeError(
            f"{_named(repo, revision)} is not in the cache ({HF_HUB_CACHE}). "
            f"{_way_online(repo, revision)}"
        )
    return root


def _way_online(repo: str, revision: str | None) -> str:
    return (
        "HF_HUB_OFFLINE is set, so the Hub is not asked. Unset it, or run where there is a "
        f"network: {shlex.join(['hf', 'download', repo, *_options(revision)])}"
    )


def _named(repo: str, revision: str | None) -> str:
    return f"{repo}@{revision}" if revision else repo


def _options(revision: str | None) -> list[str]:
    return ["--revision", revision] if revision else []
