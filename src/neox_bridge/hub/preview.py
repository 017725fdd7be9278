"""Previews what publishing would do, before anything is written."""

from dataclasses import dataclass

from neox_bridge.hub.changes import compare
from neox_bridge.hub.remote import check_private, is_published, is_untouched, look
from neox_bridge.planning.plan import Plan
from neox_bridge.stores.hub_api import explained, hub_api
from neox_bridge.stores.hub_names import MAIN
from neox_bridge.version import __version__
from neox_bridge.wording import plain


@dataclass(frozen=True, slots=True)
class PublishPreview:
    """The preview of a publication.

    Attributes:
        private: Whether the repository is private, or would be created as private.
        done: Whether the branch is already up to date.
        new: Files that the branch does not have.
        other: Existing files of another size.
        unknown: Existing files of the same size. They are not uploaded if their bytes are equal.
        leave: Files of the branch that are not in the plan.
        conflicts: Files that require --overwrite.
        size: The maximum number of bytes to upload: those of new, other and unknown.
    """

    repo: str
    branch: str
    repo_exists: bool
    branch_exists: bool
    private: bool
    done: bool
    new: tuple[str, ...]
    other: tuple[str, ...]
    unknown: tuple[str, ...]
    leave: tuple[str, ...]
    conflicts: tuple[str, ...]
    size: int


def plan_publish(
    plan: Plan, repo: str, branch: str = MAIN, *, private: bool = False
) -> PublishPreview:
    """Preview what ``publish`` would do with the files of a plan. Only reads.

    Raises BridgeError if the Hub does not answer, or if a repository is public but should be
    private.
    """
    sizes = {file.path: file.size for file in plan.files}
    remote = look(repo, branch)
    is_private = check_private(repo, private) if remote.exists else private
    alike = {p for p in sizes if p in remote.files and remote.files[p].size == sizes[p]}
    changes = compare(sizes, remote.files, alike, step_of_plan(plan))
    done = remote.commit is not None and is_published(plan, repo, branch)
    conflicts = () if done else changes.conflicts
    if conflicts:
        api = hub_api(f"hf://{repo} is on the Hub")
        with explained(repo):
            conflicts = () if is_untouched(api, repo, branch, remote) else conflicts
    sent = () if done else (*changes.add, *changes.replace, *changes.same)
    return PublishPreview(
        repo,
        branch,
        repo_exists=remote.exists,
        branch_exists=remote.commit is not None,
        private=is_private,
        done=done,
        new=changes.add,
        other=changes.replace,
        unknown=changes.same,
        leave=changes.leave,
        conflicts=conflicts,
        size=sum(sizes[path] for path in sent),
    )


def step_of_plan(plan: Plan) -> str | None:
    """The folder ``global_stepN`` that a plan for GPT-NeoX writes."""
    step = plan.target.get("step")
    return step if isinstance(step, str) else None


def message_of(plan: Plan) -> str:
    """The title of the commit that publishes the files of a plan."""
    source = plan.source.get("revision") or plan.source.get("name")
    return f"Convert {plain(str(source))} with neox-bridge {__version__}"
