"""Publishes a folder as one commit of a branch, so that it appears atomically.

``upload_folder`` of huggingface_hub 2 creates several commits for a folder if hf_xet is installed,
so that a branch would contain half a checkpoint in between; ``create_commit`` creates one.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neox_bridge.documents import document
from neox_bridge.errors import BridgeError
from neox_bridge.execution.work import Work
from neox_bridge.hub.changes import Changes, compare
from neox_bridge.hub.preview import message_of, step_of_plan
from neox_bridge.hub.remote import (
    Remote,
    check_private,
    files_at,
    first_commit,
    is_untouched,
    look,
)
from neox_bridge.planning.plan import Plan
from neox_bridge.stores.hub_api import (
    bars,
    check_writer,
    explained,
    hub_api,
    is_transient,
    status_of,
)
from neox_bridge.stores.hub_names import MAIN, HubTarget
from neox_bridge.wording import plural, some

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

_FORBIDDEN = 403
_CONFLICT = 412  # HTTP status: the branch moved after the commit was prepared


@dataclass(frozen=True, slots=True)
class Published:
    """The result of a publication.

    Attributes:
        repo: The repository, ``org/name``.
        branch: The branch that holds the files, or that the pull request is for.
        url: The URL of the files or of the pull request.
        commit: 40 hexadecimal digits.
        changed: Whether there is a new commit.
        uploaded: Paths that the commit added or replaced.
        removed: Paths that it deleted.
        kept: The number of unchanged files.
        size: Bytes of the uploaded files.
        pull_request: The URL of the pull request; None without one.
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

    def to_json(self) -> dict[str, Any]:
        """A document with the key ``published`` of ``convert --json`` to the Hub."""
        return document(published=self)


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
    """Publish the files of a folder in one commit; in none if the branch is up to date.

    Creates the repository and the branch if they do not exist; a new branch starts at the
    repository's first commit, so that it does not contain the weights of another branch.
    huggingface_hub sends large files through Xet or LFS and skips files that the Hub already has,
    so an interrupted call can be repeated.

    Args:
        private: Create the repository as private. An existing public one is refused.
        create_pr: Open a pull request to the branch, which must exist, instead of committing.
        overwrite: Replace files that differ, and delete files that are not in the folder. By
            default, both are refused for weights, and other files of the branch are kept.
        message: The title of the commit.
        step: The ``global_stepN`` of a GPT-NeoX folder, which is added beside those of the branch.
        progress: Whether huggingface_hub shows its progress bars on stderr.

    Raises:
        BridgeError: The Hub refuses or cannot be reached, or somebody else commits in the meantime.
            The branch is unchanged.
    """
    job = _Job(
        hub_api(f"hf://{repo} is on the Hub"), folder, repo, branch, step, create_pr, _sizes(folder)
    )
    with explained(repo), bars(progress):
        remote = _ready(job, private)
        changes = _compared(job, remote)
        inherited = bool(changes.conflicts) and is_untouched(job.api, repo, branch, remote)
        if changes.conflicts and not (overwrite or inherited):
            raise conflict(repo, branch, changes.conflicts)
        removed = changes.leave if overwrite or inherited else ()
        uploaded = (*changes.add, *changes.replace)
        commit, pull_request = str(remote.commit), None
        if uploaded or removed:
            words = message or f"Upload {plural(len(uploaded), 'file')} with neox-bridge"
            commit, pull_request = _commit(job, remote, uploaded, removed, words)
            _check_whole(job, commit, (*uploaded, *changes.same))
    return Published(
        repo,
        branch,
        url=pull_request or f"{job.api.endpoint}/{repo}/tree/{branch}",
        commit=commit,
        changed=bool(uploaded or removed),
        uploaded=uploaded,
        removed=removed,
        kept=len(changes.same),
        size=sum(job.files[path] for path in uploaded),
        pull_request=pull_request,
    )


def publish_written(plan: Plan, work: Work, target: HubTarget, **options: bool) -> Published:
    """``publish`` the files that a plan wrote into a work folder. On failure, the folder is kept.

    options: keyword arguments of ``publish``.
    """
    kept = (
        f"The files are kept in {work.folder}. Run the same command again to continue, or delete "
        "that folder to start over."
    )
    message, step = message_of(plan), step_of_plan(plan)
    try:
        return publish(
            work.files, target.repo, target.branch, message=message, step=step, **options
        )
    except BridgeError as error:
        raise BridgeError(f"{error} {kept}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept) from None


def conflict(repo: str, branch: str, files: tuple[str, ...]) -> BridgeError:
    """The error for a branch with other files of the same names."""
    return BridgeError(
        f"hf://{repo}@{branch} holds other files: {some(list(files), 1)}. Choose another "
        "branch, or use `overwrite=True` to replace its files; its history is kept."
    )


def check_writable(repo: str) -> None:
    """Check that the user may commit to a repository. Creates it as private if it does not exist.

    The check is the first request of an upload, which the Hub refuses without write access. It
    changes nothing.

    Raises:
        BridgeError: The Hub refuses the token.
        ConnectionError: The Hub cannot be reached or fails, so that nothing is known.
    """
    api = hub_api(f"hf://{repo} is on the Hub")
    from huggingface_hub import CommitOperationAdd

    try:
        check_writer(repo)
        with explained(repo):
            if not api.repo_exists(repo):
                api.create_repo(repo, private=True, exist_ok=True)
            api.preupload_lfs_files(repo, [CommitOperationAdd("config.json", b"{}")])
    except BridgeError as error:
        if error.__cause__ is not None and is_transient(error.__cause__):
            raise ConnectionError(str(error)) from error
        if status_of(error) == _FORBIDDEN:
            raise BridgeError(
                f"{repo}: the token may not write to this repository. Give it write access "
                "(huggingface.co/settings/tokens), and set HF_TOKEN to it, or choose a repository "
                "of your own."
            ) from error
        raise


def check_base(repo: str, branch: str, *, repo_exists: bool, branch_exists: bool) -> None:
    """Raise BridgeError if the branch of a pull request does not exist."""
    if not branch_exists:
        raise BridgeError(
            f"hf://{repo}@{branch}: there is no such {'branch' if repo_exists else 'repository'}, "
            "and a pull request needs an existing one. Leave out `create_pr=True` to create it."
        )


def work_base(chosen: str | None) -> str:
    """The folder in which files are written before they are uploaded."""
    base = os.path.realpath(chosen or os.environ.get("TMPDIR") or ".")
    if not os.path.isdir(base):
        raise BridgeError(
            f"{base}: no such folder. Choose an existing folder with enough space for the files: "
            "`work=DIR`."
        )
    return base


@dataclass(frozen=True, slots=True)
class _Job:
    """A publication in progress. api: huggingface_hub's ``HfApi``."""

    api: Any
    folder: str
    repo: str
    branch: str
    step: str | None
    create_pr: bool
    files: Mapping[str, int]  # sizes by relative path with slashes

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)


def _ready(job: _Job, private: bool) -> Remote:
    """The content of repository and branch; creates either if it does not exist."""
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
        check_private(repo, private)  # also if somebody else created it in the meantime
    return remote


def _sizes(folder: str) -> dict[str, int]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    if not paths:
        raise BridgeError(
            f"{folder} contains no files to publish. Give the folder of a checkpoint."
        )
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def _compared(job: _Job, remote: Remote) -> Changes:
    same = {
        name
        for name, size in job.files.items()
        if name in remote.files and _is_same(job.path(name), size, remote.files[name])
    }
    return compare(job.files, remote.files, same, job.step)


def _is_same(path: str, size: int, there: "RepoFile") -> bool:
    """Whether a file is unchanged, by the Hub's hash: SHA-256 for large files, otherwise git's."""
    from huggingface_hub.utils.sha import git_hash, sha_fileobj

    if size != there.size:
        return False
    with open(path, "rb") as file:
        if there.lfs is not None:
            return bool(sha_fileobj(file).hex() == there.lfs.sha256)
        return bool(git_hash(file.read()) == there.blob_id)


def _commit(
    job: _Job, remote: Remote, uploaded: tuple[str, ...], removed: tuple[str, ...], words: str
) -> tuple[str, str | None]:
    """Upload and commit, with retries. Returns the commit and the URL of a pull request.

    Raises errors of huggingface_hub, and BridgeError if somebody else committed in the meantime.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    adds = [CommitOperationAdd(name, job.path(name)) for name in uploaded]
    deletes = [CommitOperationDelete(name) for name in removed]
    where = {"revision": job.branch, "create_pr": job.create_pr}
    job.api.preupload_lfs_files(job.repo, adds, free_memory=False, **where)
    for wait in (1, 2, 4, 8, None):  # seconds, as in huggingface_hub for other requests
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
                if _is_there(job, now, removed):  # the commit succeeded, but the answer was lost
                    return str(now.commit), None
                raise BridgeError(
                    f"hf://{job.repo}@{job.branch}: another commit was pushed during the upload, "
                    "so nothing was committed. Check the branch, then run the same command again."
                ) from error
            if wait is None or not transient:
                raise
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _is_there(job: _Job, remote: Remote, removed: tuple[str, ...]) -> bool:
    changes = _compared(job, remote)
    return not (changes.add or changes.replace or set(removed) & set(remote.files))


def _check_whole(job: _Job, commit: str, names: tuple[str, ...]) -> None:
    """Check for missing files: a .gitignore in the branch makes the Hub drop files silently."""
    there = files_at(job.api, job.repo, commit)
    missing = [n for n in names if n not in there or there[n].size != job.files[n]]
    if missing:
        raise BridgeError(
            f"hf://{job.repo}@{job.branch}: commit {commit[:12]} does not contain "
            f"{some(missing, 1)}. A .gitignore in the repository may exclude them. Remove it, "
            "then run the same command again."
        )
