"""A batch's target on the Hub: a branch for each checkpoint, made in a folder here first."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from neox_bridge.api import plan as make_plan
from neox_bridge.batch.target_state import TargetState, is_of
from neox_bridge.errors import BridgeError
from neox_bridge.execution.execute import sources_of
from neox_bridge.execution.files import identities
from neox_bridge.execution.work import held, work_of
from neox_bridge.hub.preview import message_of, plan_publish, step_of_plan
from neox_bridge.hub.publish import publish
from neox_bridge.hub.remote import published_record, record_path
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.planning.options import Options
from neox_bridge.planning.plan import Plan
from neox_bridge.stores.hub_names import HubTarget, reader_folder


@dataclass(frozen=True, slots=True)
class HubModel:
    """repo: ``org/name``. work: the folder in which files are made before they are uploaded."""

    repo: str
    work: str
    private: bool = False
    create_pr: bool = False


def plan(checkpoint: Checkpoint, options: Options, model: HubModel) -> Plan:
    """A plan whose yml, where it has one, names no folder of this machine."""
    return make_plan(checkpoint, options, reader_folder(model.repo))


def state_of(plan: Plan, model: HubModel, branch: str) -> tuple[TargetState, str]:
    """What the branch holds: "whole" as its record says, "other", or "absent".

    Raises BridgeError where the Hub can't be asked.
    """
    record = published_record(model.repo, branch, record_path(plan))
    if record is not None and is_of(record, plan.asked, identities(sources_of(plan))):
        return "whole", ""
    preview = plan_publish(plan, model.repo, branch, private=model.private)
    if preview.conflicts:
        return "other", f"{place_of(model, branch)} holds other files"
    return "absent", ""


def place_of(model: HubModel, branch: str) -> str:
    """The branch as sources name it."""
    return str(HubTarget(model.repo, branch))


@contextmanager
def made_in(model: HubModel, branch: str) -> Iterator[str]:
    """The folder where a branch's files are made, the same for every run, one run at a time.

    It is gone at the end, unless that is an error and something in it is worth keeping.
    """
    place = HubTarget(model.repo, branch)
    work = work_of(os.path.join(model.work, place.folder_name))
    with held(work, str(place)):
        yield work.files


def send(plan: Plan, folder: str, model: HubModel, branch: str, overwrite: bool) -> None:
    """Publish the folder. Raises BridgeError, and the folder stays for the next try."""
    try:
        publish(
            folder,
            model.repo,
            branch,
            private=model.private,
            create_pr=model.create_pr,
            overwrite=overwrite,
            message=message_of(plan),
            step=step_of_plan(plan),
        )
    except BridgeError as error:
        raise BridgeError(f"{error} The files are kept in {folder}.") from error
