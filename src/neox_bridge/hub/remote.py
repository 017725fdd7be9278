"""Reads the state of a Hub branch: its commit, its files, and the plan that wrote them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from neox_bridge.errors import BridgeError
from neox_bridge.layouts.checkpoint import RECORD
from neox_bridge.layouts.seal import is_whole
from neox_bridge.layouts.text_files import LARGE_BYTES, read_bytes
from neox_bridge.planning.plan import Plan
from neox_bridge.planning.report import plan_hash
from neox_bridge.stores.hub_api import explained, hub_api, is_missing_repo
from neox_bridge.stores.hub_names import MAIN

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile


@dataclass(frozen=True, slots=True)
class Remote:
    """The state of a branch on the Hub.

    Attributes:
        exists: Whether the repository exists.
        commit: The commit of the branch; None if there is no branch.
        files: huggingface_hub's ``RepoFile`` by path.
    """

    exists: bool
    commit: str | None = None
    files: Mapping[str, "RepoFile"] = field(default_factory=dict)


def look(repo: str, branch: str) -> Remote:
    """Get the state of a branch, in two requests. Raises BridgeError if the Hub does not answer."""
    api = hub_api(f"hf://{repo} is on the Hub")
    with explained(repo):
        try:
            refs = api.list_repo_refs(repo)
        except Exception as error:
            if is_missing_repo(error):
                return Remote(False)
            raise
        commit = next((ref.target_commit for ref in refs.branches if ref.name == branch), None)
        if commit is None:
            return Remote(True)
        return Remote(True, commit, files_at(api, repo, commit))


def files_at(api: Any, repo: str, revision: str) -> dict[str, "RepoFile"]:
    """All files of a revision by path. Raises huggingface_hub's errors."""
    items = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {item.path: item for item in items if hasattr(item, "blob_id")}  # without folders


def first_commit(api: Any, repo: str) -> str:
    """The first commit of a repository. Raises huggingface_hub's errors."""
    return str(api.list_repo_commits(repo, revision=MAIN)[-1].commit_id)


def is_untouched(api: Any, repo: str, branch: str, remote: Remote) -> bool:
    """Whether a branch is still at the commit that it was created from.

    Raises huggingface_hub's errors.
    """
    return branch != MAIN and remote.commit == first_commit(api, repo)


def check_private(repo: str, private: bool) -> bool:
    """Whether a repository is private.

    Raises BridgeError if it is public and ``private`` is set, or if the Hub does not answer.
    """
    api = hub_api(f"hf://{repo} is on the Hub")
    with explained(repo):
        is_private = bool(api.model_info(repo).private)
    if private and not is_private:
        raise BridgeError(
            f"hf://{repo} already exists and is public. Make it private on its settings page, "
            "choose another repository, or leave out `private=True`."
        )
    return is_private


def published_record(repo: str, branch: str, path: str = RECORD) -> bytes | None:
    """The ``neox_bridge.json`` of a branch, unchanged; two requests.

    path: of the record in the repository; a GPT-NeoX step's is ``global_stepN/neox_bridge.json``.
    None if the repository, the branch or the record does not exist. Raises BridgeError if the Hub
    does not answer.
    """
    api = hub_api(f"hf://{repo} is on the Hub")
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    with TemporaryDirectory(prefix="neox-bridge-") as folder, explained(repo):
        try:
            file = api.hf_hub_download(repo, path, revision=branch, local_dir=folder)
        except Exception as error:
            # if the Hub does not answer, the library reports that the entry is not in its cache
            unanswered = isinstance(error, LocalEntryNotFoundError)
            missing = isinstance(error, (EntryNotFoundError, RevisionNotFoundError))
            if is_missing_repo(error) or (missing and not unanswered):
                return None
            raise
        return read_bytes(file, LARGE_BYTES)


def published_plan(repo: str, branch: str, path: str = RECORD) -> str | None:
    """The hash of the plan that wrote the files of a branch; see ``published_record``.

    Also None if the record was changed.
    """
    record = published_record(repo, branch, path)
    return None if record is None else plan_in(record)


def is_published(plan: Plan, repo: str, branch: str) -> bool:
    """Whether a branch contains the output of this plan, according to its record.

    A plan contains the paths of its sources and the places in them. So only the same sources in the
    same place (for a model of the Hub: the same commit in the same cache) have the same plan.
    Raises BridgeError if the Hub does not answer.
    """
    return published_plan(repo, branch, record_path(plan)) == plan_hash(plan)


def record_path(plan: Plan) -> str:
    """The path of ``neox_bridge.json`` in the target of a plan."""
    return next(file.path for file in plan.files if file.seals)


def plan_in(record: bytes) -> str | None:
    """The hash of the plan of a record; None if the record was changed."""
    if not is_whole(record):
        return None
    try:
        return str(json.loads(record)["written"]["plan"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
