"""A batch target on the Hub: one branch per checkpoint, written to a local folder first."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from neox_bridge.batches.target_state import TargetState, changed_texts, is_of
from neox_bridge.errors import UsageError
from neox_bridge.execution.execute import sources_of
from neox_bridge.execution.files import identities
from neox_bridge.execution.sink import recorded_texts
from neox_bridge.execution.work import Work, held, work_of
from neox_bridge.hub.preview import plan_publish
from neox_bridge.hub.publish import publish_written, work_base
from neox_bridge.hub.remote import published_record, record_path
from neox_bridge.planning.plan import Plan
from neox_bridge.stores.folder import is_hub
from neox_bridge.stores.hub_api import hub_api
from neox_bridge.stores.hub_names import HubTarget, hub_target
from neox_bridge.stores.paths import is_local


@dataclass(frozen=True, slots=True)
class HubModel:
    """repo: ``org/name``. work: the folder in which files are written before their upload."""

    repo: str
    work: str
    private: bool = False
    create_pr: bool = False


def hub_model(
    target: str, work: str | None = None, *, private: bool = False, create_pr: bool = False
) -> HubModel | None:
    """The model whose branches a batch writes; None for a folder or its URL.

    Raises BridgeError once, and not per checkpoint, if a required library is missing.
    """
    if is_hub(target):
        if "@" in target:
            raise UsageError(
                ["target"], f"{target}: a batch writes one branch per step", "Leave it out."
            )
        hub_api(f"{target} is on the Hub")
        return HubModel(hub_target(target).repo, work_base(work), private, create_pr)
    if not is_local(target):
        from neox_bridge.stores.objects import store_of

        store_of(target)
    return None


def work_place(model: HubModel, branch: str) -> Work:
    """The work folder for the files of a branch. It is the same for every run."""
    return work_of(os.path.join(model.work, HubTarget(model.repo, branch).folder_name))


def state_of(plan: Plan, model: HubModel, branch: str) -> tuple[TargetState, str]:
    """The state of the branch: "whole" according to its record, "other", or "absent".

    Raises BridgeError if the Hub does not answer.
    """
    record = published_record(model.repo, branch, record_path(plan))
    if (
        record is not None
        and is_of(record, plan.options, identities(sources_of(plan)))
        and not changed_texts(record, recorded_texts(plan.checkpoint))
    ):
        return "whole", ""
    preview = plan_publish(plan, model.repo, branch, private=model.private)
    if preview.conflicts:
        return "other", f"{place_of(model, branch)} holds other files"
    return "absent", ""


def place_of(model: HubModel, branch: str) -> str:
    """The URL of the branch."""
    return str(HubTarget(model.repo, branch))


@contextmanager
def made_in(model: HubModel, branch: str) -> Iterator[Work]:
    """The work folder for the files of a branch, locked for one run.

    It is deleted at the end. After an error, it is kept if it contains finished files.
    """
    work = work_place(model, branch)
    with held(work, place_of(model, branch)):
        yield work


def send(plan: Plan, work: Work, model: HubModel, branch: str, overwrite: bool) -> None:
    """Publish the files. On BridgeError, they are kept for the next attempt."""
    publish_written(
        plan,
        work,
        HubTarget(model.repo, branch),
        private=model.private,
        create_pr=model.create_pr,
        overwrite=overwrite,
    )
