"""``convert`` to the Hub: writes the files to a folder first, then uploads them in one commit."""

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from neox_bridge.cli.execution import Checker, perform
from neox_bridge.cli.options import Execution, Upload
from neox_bridge.cli.output import blanks, print_json, print_line, print_plan, say
from neox_bridge.cli.progress import progress_bar
from neox_bridge.documents import document
from neox_bridge.errors import Unverified, UsageError
from neox_bridge.option import options_of
from neox_bridge.wording import human, plural, side

if TYPE_CHECKING:
    from neox_bridge.execution.result import Result
    from neox_bridge.execution.work import Work
    from neox_bridge.hub.preview import PublishPreview
    from neox_bridge.hub.publish import Published
    from neox_bridge.planning.plan import Plan
    from neox_bridge.stores.hub_names import HubTarget


def check_upload(upload: Upload, target: str) -> None:
    """Raise UsageError if one of these options is given but the target is not on the Hub."""
    from neox_bridge.stores.folder import is_hub

    values = {name: getattr(upload, name) for name in options_of(Upload)}
    named = [name for name, value in values.items() if value not in (False, None)]
    if named and not is_hub(target):
        raise UsageError(named, f"only for targets on the Hub, and {target} is not hf://ORG/NAME")


def root_of(target: str) -> str:
    """The folder in the paths of a GPT-NeoX yml; for the Hub, the user's download folder."""
    from neox_bridge.stores.folder import is_hub
    from neox_bridge.stores.hub_names import hub_target, reader_folder

    return reader_folder(hub_target(target).repo) if is_hub(target) else target


def publish_plan(
    plan: "Plan",
    source: str,
    target: str,
    execution: Execution,
    checker: Checker,
    upload: Upload,
    **options: Any,
) -> None:
    """Print a preview for --dry-run; otherwise execute the plan and publish the files.

    options: of ``execute``. Raises BridgeError and what ``execute`` raises. Finished files are then
    kept, and the message says where.
    """
    from neox_bridge.execution.work import held
    from neox_bridge.hub.preview import plan_publish
    from neox_bridge.hub.publish import check_base, conflict, publish_written
    from neox_bridge.stores.hub_api import check_writer
    from neox_bridge.stores.hub_names import hub_target

    place = hub_target(target)
    plan = _with_paths_blank(plan)
    preview = plan_publish(plan, place.repo, place.branch, private=upload.private)
    if execution.dry_run:
        _print_preview(plan, source, place, preview, execution.as_json)
        return
    if preview.done and not execution.overwrite:
        _say_done(plan, source, target, preview, execution)
        return
    if preview.conflicts and not execution.overwrite:
        raise conflict(place.repo, place.branch, preview.conflicts)
    if upload.create_pr:
        there = preview.branch_exists
        check_base(place.repo, place.branch, repo_exists=preview.repo_exists, branch_exists=there)
    check_writer(place.repo)
    work = _work(source, place, upload.work, execution.quiet)
    with held(work, str(place)):
        result = _finished(plan, work, execution, checker) or perform(
            plan, work.files, replace(execution, overwrite=True), checker, **options
        )
        published = publish_written(
            plan,
            work,
            place,
            private=upload.private,
            create_pr=upload.create_pr,
            overwrite=execution.overwrite,
            progress=not execution.quiet and sys.stderr.isatty(),
        )
    if execution.as_json:
        from neox_bridge.planning.report import sides

        verified = not execution.no_verify
        facts = replace(result, target=str(place), verified=verified, plan=plan).to_json()
        print_json(facts | sides(plan, source, target) | {"published": published})
    elif not execution.quiet:
        print_line(_line(plan, place, published, execution))
        for line in blanks(plan, str(place)):
            print_line(line)


def _work(source: str, place: "HubTarget", chosen: str | None, quiet: bool) -> "Work":
    """The folder in which the files are written. It is the same for every run."""
    from neox_bridge.execution.work import work_of
    from neox_bridge.hub.publish import work_base
    from neox_bridge.planning.option_checks import check_outside

    work = work_of(os.path.join(work_base(chosen), place.folder_name))
    check_outside([source], work.folder, "work")
    if not quiet:
        text = (
            f"files are written to {work.folder} before the upload; --work chooses another folder"
        )
        say("note", text)
    return work


def _finished(
    plan: "Plan", work: "Work", execution: Execution, checker: Checker
) -> "Result | None":
    """The files of an earlier run that stopped during the upload; None if incomplete."""
    from neox_bridge.execution.result import Result
    from neox_bridge.hub.remote import plan_in, record_path
    from neox_bridge.layouts.text_files import LARGE_BYTES, read_bytes
    from neox_bridge.planning.report import plan_hash
    from neox_bridge.verification.sealed import check_seal

    record = os.path.join(work.files, record_path(plan))
    if not os.path.isfile(record) or plan_in(read_bytes(record, LARGE_BYTES)) != plan_hash(plan):
        return None
    with progress_bar(plan.size, "checking", execution.quiet) as progress:
        if execution.no_verify:
            if not check_seal(record, progress, execution.max_workers).holds:
                return None
        else:
            try:
                checker(progress)(work.files)
            except Unverified:
                return None
    return Result(work.files, len(plan.files), plan.size, 0, 0, 0, plan.size, 0.0)


def _with_paths_blank(plan: "Plan") -> "Plan":
    """The plan with blanks for the paths in its yml, which only the downloader knows."""
    keys = ("load", "save", "vocab_file")
    path_blanks = tuple((file, key) for file, _ in plan.blanks[:1] for key in keys)
    return replace(plan, blanks=tuple(dict.fromkeys((*plan.blanks, *path_blanks))))


def _line(plan: "Plan", place: "HubTarget", published: "Published", execution: Execution) -> str:
    from neox_bridge.planning.casts import verified as in_words

    if not published.changed:
        return f"{place} is already up to date: {published.url}"
    parts = [f"{plural(len(published.uploaded), 'file')} uploaded ({human(published.size)})"]
    if published.kept:
        parts.append(f"{published.kept} unchanged")
    if published.removed:
        parts.append(f"{len(published.removed)} removed")
    what = f"proposed for {place}" if published.pull_request else f"published {place}"
    verified = "not verified" if execution.no_verify else in_words(plan.casts)
    return (
        f"{what}: {side(plan.target)}, {plan.target['parameters']:,} parameters, "
        f"{', '.join(parts)}, commit {published.commit[:12]}; {verified}: {published.url}"
    )


def _say_done(
    plan: "Plan",
    source: str,
    target: str,
    preview: "PublishPreview",
    execution: Execution,
) -> None:
    if execution.as_json:
        from neox_bridge.planning.report import sides

        print_json(document(**sides(plan, source, target), hub=preview, published=None))
    elif not execution.quiet:
        print_line(f"{target} is already up to date, nothing was uploaded")


def _print_preview(
    plan: "Plan", source: str, place: "HubTarget", preview: "PublishPreview", as_json: bool
) -> None:
    if as_json:
        from neox_bridge.execution.memory import peak_memory
        from neox_bridge.planning.report import to_json

        facts = to_json(plan, peak_memory(plan, ""), source, str(place))
        print_json(facts | {"hub": preview})
        return
    print_plan(plan, str(place))
    there = "exists" if preview.repo_exists else "will be created"
    print_line(f"hub      {preview.repo} {there}, {'private' if preview.private else 'public'}")
    there = "exists" if preview.branch_exists else "will be created"
    print_line(f"branch   {preview.branch} {there}")
    if preview.done:
        print_line("upload   nothing, the branch is already up to date")
        return
    files = (*preview.new, *preview.other)
    print_line(
        f"upload   {plural(len(files) + len(preview.unknown), 'file')}, {human(preview.size)}"
    )
    if preview.unknown:
        print_line(
            f"         {len(preview.unknown)} of them may be unchanged: the Hub has the same size"
        )
    if preview.conflicts:
        print_line(f"conflicts, replaced only with --overwrite: {', '.join(preview.conflicts)}")
