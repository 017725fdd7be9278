"""Decides whether a checkpoint of the Hub is read there by ranges, or from the cache.

A model for transformers is downloaded by huggingface_hub into its cache, as usual. A revision with
GPT-NeoX files is read by ranges, because most of its bytes are optimizer states, which few commands
need. Ranges are requested over plain HTTP; huggingface_hub uses hf_xet, if installed, for whole
files only. With HF_HUB_OFFLINE both are read from the cache.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote

from neox_bridge.errors import BridgeError, Unreachable, UsageError
from neox_bridge.findings import Finding
from neox_bridge.frameworks.suites import nearest
from neox_bridge.layouts.carried_names import is_carried
from neox_bridge.layouts.file_names import is_model_text, is_step_file
from neox_bridge.layouts.hub_download import cached_snapshot, download
from neox_bridge.stores.hub_api import explanation, hub_api, is_missing_repo, is_network, status_of
from neox_bridge.stores.hub_names import MAIN
from neox_bridge.stores.objects import pin
from neox_bridge.stores.retry import is_passing, steadily
from neox_bridge.stores.step_names import step_of
from neox_bridge.wording import plural, some

_TRIES_UNANSWERED = 3  # before the cache is used instead
_URL = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([^/@]+))?(?:/(.*))?")
_NEAREST_STEPS = 4  # maximum number in an error message


@dataclass(frozen=True, slots=True)
class HubSource:
    """The location of the files.

    Attributes:
        path: A local folder, or ``hf://org/name@revision``.
        revision: ``org/name@revision``, with the current name of the repository.
        files: The files of the revision; ``path`` may contain only some of them.
    """

    path: str
    revision: str
    findings: tuple[Finding, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def repo(self) -> str:
        return self.revision.partition("@")[0]


@dataclass(frozen=True, slots=True)
class Listing:
    """The contents of a revision of a repository.

    repo: ``org/name``, the current name of the repository. commit: 40 hexadecimal digits.
    """

    repo: str
    commit: str
    files: tuple[str, ...]

    @property
    def is_neox(self) -> bool:
        """Whether it contains GPT-NeoX files and no model for transformers."""
        return "config.json" not in self.files and any(
            is_step_file(path.rpartition("/")[2]) for path in self.files
        )


def find_source(repo: str, revision: str | None, *, by_ranges: bool = False) -> HubSource:
    """Where to read ``org/name`` at a revision, by default ``main``.

    by_ranges: do not download a model for transformers that the cache does not have.

    Raises BridgeError with advice if it is missing or gated, has no such branch, or is not in the
    cache while offline.
    """
    name = f"{repo}@{revision or MAIN}"
    if is_offline():
        return HubSource(cached_snapshot(repo, revision), name)
    try:
        listing = look_up(repo, revision)
    except Unreachable:
        try:
            folder = cached_snapshot(repo, revision)
        except BridgeError:
            folder = None
        if folder is None:
            raise
        message = f"the Hub cannot be reached, so the cached copy of {name} is read"
        finding = Finding("read-from-cache", "warning", message, "check the network connection")
        return HubSource(folder, name, (finding,))
    findings = _renamed(repo, listing)
    if listing.is_neox:
        folder = _in_cache(listing, listing.files)
    elif by_ranges:
        folder = _in_cache(listing, _needed(listing.files))
    else:
        _check_holds_model(listing, revision)
        texts = [name for name in listing.files if is_carried(name) or is_model_text(name)]
        folder = download(listing.repo, revision, texts)
    if folder is None:
        return _by_ranges(listing, revision, "", findings)
    return HubSource(folder, f"{listing.repo}@{revision or MAIN}", findings, listing.files)


def find_url_source(url: str, revision: str | None) -> HubSource:
    """``find_source`` for ``hf://org/name[@revision][/folder]``, always read by ranges."""
    match = _URL.fullmatch(url)
    if match is None:
        raise BridgeError(
            f"{url} is not a valid Hub URL. Write hf://ORG/NAME or hf://ORG/NAME@REVISION, with "
            "%2F for a slash in the revision."
        )
    repo, named, below = match[1], match[2], match[3] or ""
    if named and revision is not None:
        raise UsageError(["revision"], f"{url} already names a revision", "Leave it out.")
    revision = unquote(named) if named else revision
    if is_offline():
        folder = cached_snapshot(repo, None if revision == MAIN else revision)
        path = os.path.join(folder, below) if below else folder
        return HubSource(path, f"{repo}@{revision or MAIN}")
    listing = look_up(repo, revision)
    return _by_ranges(listing, revision, below, _renamed(repo, listing))


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE disables requests of huggingface_hub."""
    try:
        from huggingface_hub.constants import HF_HUB_OFFLINE
    except ImportError:
        return False
    return bool(HF_HUB_OFFLINE)


def look_up(repo: str, revision: str | None) -> Listing:
    """List the contents of a revision; one request.

    Raises Unreachable if the Hub does not answer, BridgeError if the repository or revision does
    not exist or is not accessible.
    """
    api = hub_api(f"{repo} is on the Hub")
    from huggingface_hub.errors import RevisionNotFoundError

    tries = 0

    def ask() -> Listing:
        nonlocal tries
        tries += 1
        try:
            info = api.model_info(repo, revision=revision)
        except Exception as error:  # the library raises many kinds of exceptions
            unanswered = status_of(error) is None and is_network(error)
            if is_passing(error) and not (unanswered and tries >= _TRIES_UNANSWERED):
                raise
            if isinstance(error, RevisionNotFoundError):
                raise BridgeError(_no_revision(repo, revision or MAIN)) from None
            words = explanation(error, repo)
            if is_missing_repo(error) or status_of(error) == 401:
                words += f" Did you mean {near}?" if (near := nearest(repo)) else ""
            raise (Unreachable if unanswered else BridgeError)(words) from None
        files = tuple(sorted(str(file.rfilename) for file in info.siblings or ()))
        return Listing(str(info.id), str(info.sha), files)

    return steadily(f"hf://{repo}", "looked up", ask)


def _by_ranges(
    listing: Listing, revision: str | None, below: str, findings: tuple[Finding, ...]
) -> HubSource:
    """The URL to read, pinned to the current commit of the revision."""
    url = f"hf://{listing.repo}" + (f"@{quote(revision, safe='')}" if revision else "")
    pin(url, f"hf://{listing.repo}@{listing.commit}")
    path = f"{url}/{below}" if below else url
    if not below and not any(map(is_step_file, listing.files)):
        _check_holds_model(listing, revision)
    elif below and not any(file.startswith(f"{below}/") for file in listing.files):
        raise BridgeError(
            f"{path}: no such folder in this repository. It contains "
            f"{some(sorted({file.partition('/')[0] for file in listing.files}))}."
        )
    return HubSource(path, f"{listing.repo}@{revision or MAIN}", findings)


def _check_holds_model(listing: Listing, revision: str | None) -> None:
    """Raise BridgeError if a revision has only notes, and others have the steps."""
    names = {path.rpartition("/")[2] for path in listing.files}
    if any(not name.startswith(".") and not name.endswith(".md") for name in names):
        return
    what = f"{listing.repo}@{revision or MAIN} does not contain a checkpoint"
    steps = _steps(listing.repo)
    if not steps:
        raise BridgeError(f"{what}. Check the name and the revision.")
    raise BridgeError(
        f"{what}. It has {plural(len(steps), 'step')} as branches, from {steps[0]} to {steps[-1]}. "
        f"Name one: {listing.repo}@{steps[-1]}"
    )


def _needed(files: Sequence[str]) -> list[str]:
    """The files of a model for transformers that commands read."""
    weights = [path for path in files if path.endswith(".safetensors")]
    weights = weights or [path for path in files if path.endswith(".bin")]
    return weights + [path for path in files if is_model_text(path)]


def _in_cache(listing: Listing, files: Iterable[str]) -> str | None:
    """The snapshot of the listing's commit, if the cache has all of these files."""
    try:
        folder = cached_snapshot(listing.repo, listing.commit)
    except BridgeError:
        return None
    return folder if all(os.path.isfile(os.path.join(folder, path)) for path in files) else None


def _no_revision(repo: str, revision: str) -> str:
    """The message for a revision that does not exist, with the nearest existing steps."""
    steps, wanted = _steps(repo), step_of(revision)
    if not steps or wanted is None:
        advice = f"It has {some(steps)}." if steps else "Check its name."
        return f"{repo} has no branch, tag or commit {revision}. {advice}"
    by_distance = sorted(steps, key=lambda name: abs((step_of(name) or 0) - wanted))
    near = sorted(by_distance[:_NEAREST_STEPS], key=lambda name: step_of(name) or 0)
    return f"{repo} has no {revision}. The nearest of {plural(len(steps), 'step')}: {some(near)}."


def _steps(repo: str) -> list[str]:
    """The names of branches and tags that are steps, in order; empty on failure."""
    from neox_bridge.stores.hub_revisions import revisions

    try:
        return [one.name for one in revisions(repo) if one.step is not None]
    except BridgeError:
        return []


def _renamed(repo: str, listing: Listing) -> tuple[Finding, ...]:
    if listing.repo.lower() == repo.lower():
        return ()
    message = f"{repo} is called {listing.repo} now. The Hub redirects to the new name"
    return (Finding("renamed-repository", "info", message, f"use {listing.repo}"),)
