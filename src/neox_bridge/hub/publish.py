"""A folder as one commit of a branch: all of it is there, or nothing.

``upload_folder`` of huggingface_hub 2 makes several commits of a folder where hf_xet is installed,
so that a branch would hold half a checkpoint in between; ``create_commit`` makes one.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha1, sha256
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.hub.changes import Changes, compare
from neox_bridge.hub.remote import (
    Remote,
    RemoteFile,
    check_private,
    files_at,
    first_commit,
    is_untouched,
    look,
)
from neox_bridge.stores.hub_api import bars, explained, hub_api, is_transient, status_of
from neox_bridge.stores.hub_names import MAIN

_BLOCK = 1 << 20
_CONFLICT = 412  # the branch isn't at the commit that ours was made for


@dataclass(frozen=True, slots=True)
class Published:
    """What was done. url: a page with the files, or of the pull request. commit: 40 hex digits.

    changed: whether there is a new commit. uploaded: paths that the commit brought, removed: that
    it took away, kept: how many files were there already. size: bytes of those uploaded.
    """

    repo: str
    branch: str
    url: str
    commit: str
    changed: bool
    uploaded: tuple[str, ...]
    removed: tuple[str, ...]
    kept: int
    size: int
    pull_request: str | None = None


def publish(
    folder: str,
    repo: str,
    branch: str = MAIN,
    *,
    private: bool = False,
    create_pr: bool = False,
    overwrite: bool = False,
    message: str | None = None,
    step: str | None = None,
    progress: bool = False,
) -> Published:
    """Make a branch hold a folder's files, by one commit; nothing where it does already.

    Repository and branch are made where they lack; a new branch starts at the repository's first
    commit, so that it doesn't hold the weights of another. Large files go through Xet or LFS, as
    huggingface_hub finds; what the Hub has already isn't sent again, so that a call that was cut
    off goes on.

    private: of a repository that is made; one that is there and public is refused.
    create_pr: propose the commit as a pull request to the branch, which must be there.
    overwrite: replace files that differ and remove those that the folder hasn't; else either is
        refused where weights are concerned, and other files of the branch stay.
    step: the ``global_stepN`` of a GPT-NeoX folder, to be put beside those of the branch.
    progress: whether huggingface_hub shows its bars on stderr.
    Raises BridgeError, with the branch as it was, where the Hub refuses or can't be reached, or
    somebody else commits meanwhile.
    """
    job = _Job(
        hub_api(f"hf://{repo} is on the Hub"), folder, repo, branch, step, create_pr, _sizes(folder)
    )
    with explained(repo), bars(progress):
        remote = _ready(job, private)
        found = _compared(job, remote)
        inherited = bool(found.conflicts) and is_untouched(job.api, repo, branch, remote)
        if found.conflicts and not (overwrite or inherited):
            raise BridgeError(conflict_message(repo, branch, found.conflicts))
        removed = found.leave if overwrite or inherited else ()
        uploaded = (*found.add, *found.replace)
        page = f"{job.api.endpoint}/{repo}/tree/{branch}"
        if not uploaded and not removed:
            return Published(
                repo, branch, page, str(remote.commit), False, (), (), len(found.same), 0
            )
        words = message or f"Upload {len(uploaded)} files with neox-bridge"
        commit, pull_request = _commit(job, remote, uploaded, removed, words)
        _check_whole(job, commit, (*uploaded, *found.same))
        size = sum(job.files[path] for path in uploaded)
        return Published(
            repo,
            branch,
            pull_request or page,
            commit,
            True,
            uploaded,
            removed,
            len(found.same),
            size,
            pull_request,
        )


def conflict_message(repo: str, branch: str, conflicts: tuple[str, ...]) -> str:
    """Why a branch isn't touched, and what to do."""
    more = f" and {len(conflicts) - 1} more" if len(conflicts) > 1 else ""
    return (
        f"hf://{repo}@{branch} holds other files: {conflicts[0]}{more}. Name another branch, or "
        "say --overwrite to replace what it holds; its history stays."
    )


def check_base(repo: str, branch: str, *, repo_exists: bool, branch_exists: bool) -> None:
    """Raise BridgeError where a pull request would have nothing to go into."""
    if not branch_exists:
        raise BridgeError(
            f"hf://{repo}@{branch}: there is no such {'branch' if repo_exists else 'repository'}, "
            "and a pull request needs one to go into. Leave out --create-pr to make it."
        )


@dataclass(frozen=True, slots=True)
class _Job:
    """What is published where. api: huggingface_hub's."""

    api: Any
    folder: str
    repo: str
    branch: str
    step: str | None
    create_pr: bool
    files: Mapping[str, int]  # sizes by path, relative and with slashes

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)


def _ready(job: _Job, private: bool) -> Remote:
    """Repository and branch, made where they lack."""
    repo, branch = job.repo, job.branch
    remote = look(repo, branch)
    if job.create_pr:
        check_base(repo, branch, repo_exists=remote.exists, branch_exists=remote.commit is not None)
    elif remote.commit is None:
        if not remote.exists:
            job.api.create_repo(repo, private=private or None, exist_ok=True)
            remote = look(repo, branch)
        if remote.commit is None:
            start = first_commit(job.api, repo)
            job.api.create_branch(repo, branch=branch, revision=start, exist_ok=True)
            remote = look(repo, branch)
    if private:
        check_private(repo, private)  # also of one that somebody else made meanwhile
    return remote


def _sizes(folder: str) -> dict[str, int]:
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            found[os.path.relpath(path, folder).replace(os.sep, "/")] = os.path.getsize(path)
    if not found:
        raise BridgeError(f"{folder} holds no files to publish. Name a checkpoint's folder.")
    return found


def _compared(job: _Job, remote: Remote) -> Changes:
    same = {
        name
        for name, size in job.files.items()
        if name in remote.files and _is_same(job.path(name), size, remote.files[name])
    }
    return compare(job.files, remote.files, same, job.step)


def _is_same(path: str, size: int, there: RemoteFile) -> bool:
    if size != there.size:
        return False
    state = sha256() if there.sha256 else sha1(b"blob %d\0" % size)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.hexdigest() == (there.sha256 or there.blob)


def _commit(
    job: _Job, remote: Remote, uploaded: tuple[str, ...], removed: tuple[str, ...], words: str
) -> tuple[str, str | None]:
    """Upload, then commit, again where the Hub fails: the commit, and a pull request's address.

    Raises huggingface_hub's errors, BridgeError where somebody else committed meanwhile.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    adds = [CommitOperationAdd(name, job.path(name)) for name in uploaded]
    deletes = [CommitOperationDelete(name) for name in removed]
    where = {"revision": job.branch, "create_pr": job.create_pr}
    job.api.preupload_lfs_files(job.repo, adds, free_memory=False, **where)
    for wait in (1, 2, 4, 8, None):  # seconds, as huggingface_hub has them for other requests
        try:
            info = job.api.create_commit(
                job.repo,
                [*deletes, *adds],
                commit_message=words,
                parent_commit=remote.commit,
                **where,
            )
            return str(info.oid), info.pr_url
        except Exception as error:  # noqa: PERF203
            transient = is_transient(error)
            # a second attempt could open a second pull request
            if job.create_pr or not (transient or status_of(error) == _CONFLICT):
                raise
            now = look(job.repo, job.branch)
            if now.commit != remote.commit:
                if _is_there(job, now, removed):  # it was made, and the answer lost
                    return str(now.commit), None
                raise BridgeError(
                    f"hf://{job.repo}@{job.branch}: somebody else committed meanwhile, and "
                    "nothing of this was. Look at the branch, then give the same command again."
                ) from error
            if wait is None or not transient:
                raise
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _is_there(job: _Job, remote: Remote, removed: tuple[str, ...]) -> bool:
    found = _compared(job, remote)
    return not (found.add or found.replace or set(removed) & set(remote.files))


def _check_whole(job: _Job, commit: str, names: tuple[str, ...]) -> None:
    """A .gitignore of the branch makes the Hub leave files out without a word."""
    there = files_at(job.api, job.repo, commit)
    lacking = [n for n in names if n not in there or there[n].size != job.files[n]]
    if lacking:
        raise BridgeError(
            f"hf://{job.repo}@{job.branch}: commit {commit[:12]} lacks {lacking[0]}"
            f"{f' and {len(lacking) - 1} more' if len(lacking) > 1 else ''}. Is there a .gitignore "
            "in it? Remove it, and give the same command again."
        )
