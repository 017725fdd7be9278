"""``neox-bridge doctor``."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any

import click

from neox_bridge.cli.block import cause_rows, evidence_rows, print_block, way_out_rows
from neox_bridge.cli.command import Argument, command, given, only
from neox_bridge.cli.errors import message_of, writing
from neox_bridge.cli.options import Output, Source
from neox_bridge.cli.output import print_json, print_line, say, tell_findings
from neox_bridge.cli.usage import wrong
from neox_bridge.documents import document
from neox_bridge.errors import BridgeError, UsageError
from neox_bridge.findings import Command, Details
from neox_bridge.option import FIX, inherited, option
from neox_bridge.wording import plural, some

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from neox_bridge.doctor.advice import Advice
    from neox_bridge.doctor.compare import Answer, Row
    from neox_bridge.doctor.examination import Examination
    from neox_bridge.doctor.fix_changes import FileChange
    from neox_bridge.doctor.repository import Repository
    from neox_bridge.findings import Finding
    from neox_bridge.frameworks.targets import Target
    from neox_bridge.layouts.checkpoint import Checkpoint
    from neox_bridge.planning.plan import Plan

_FAILS = 4
_ANSWERS: dict[Answer, str] = {
    "same": "same in GPT-NeoX and transformers:",
    "translated": "translated by convert:",
    "cannot be": "cannot be converted:",
}
_LONGEST = 400  # characters that are shown of a line from a framework


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """Options for the diagnosis and the fix."""

    target: Target | None = option(
        None,
        "The framework that should load it. A GPT-NeoX source tree, a GPT-NeoX tag, date or "
        "commit (neox@2024-03, or only 2024-03), or a transformers version (transformers: the "
        "installed one). Default: every known version.",
        "--for",
        common=True,
        value="target",
    )
    error: str | None = option(
        None,
        "A file with the traceback that a framework printed. Use - for stdin.",
        common=True,
        value="path",
        metavar="FILE",
    )
    compare: bool = option(
        False, "Show how both frameworks compute this model, side by side.", common=True
    )
    fix: str | None = option(
        None,
        "Write a fixed copy to DST.",
        group=FIX,
        common=True,
        value="path",
        metavar="DST",
    )
    in_place: bool = option(
        False,
        "Fix PATH itself. It is replaced when the fixed copy is complete.",
        group=FIX,
        common=True,
    )
    dry_run: bool = option(
        False, "Print what would change in each file and write nothing.", group=FIX, common=True
    )
    recompute: bool = option(
        False,
        "Drop or replace a stored inv_freq that differs from the one that the config gives.",
        group=FIX,
    )
    drop_optimizer: bool = option(False, "Drop optimizer states that cannot be kept.", group=FIX)
    ignore_keys: tuple[str, ...] = inherited(
        Source,
        "ignore_keys",
        (),
        text="Ignore this unknown key in the settings. The fixed yml does not contain it, because "
        "GPT-NeoX refuses it. May be repeated.",
        group=FIX,
    )

    @property
    def fixes(self) -> bool:
        """Whether anything is written."""
        return self.fix is not None or self.in_place


@command(
    "doctor",
    Argument(
        "paths",
        "PATH...",
        "Checkpoints in either format, and any Hugging Face repositories.",
        many=True,
        required=False,
    ),
    DoctorOptions,
    only(Source, "step", "configs", "gqa_order"),
    only(Output, "as_json"),
)
def doctor(paths: tuple[str, ...], options: DoctorOptions, reading: Source, output: Output) -> None:
    """Diagnose a checkpoint: where it loads, what is wrong with it, and how to fix it.

    Without --for, every known version of GPT-NeoX or transformers is checked. A Hugging Face
    repository of any family is checked by its files and settings, also a damaged one. Nothing in a
    checkpoint is executed.

    \b
    Examples:
      neox-bridge doctor pythia-neox --for neox:~/gpt-neox
      neox-bridge doctor pythia-neox --for today --fix pythia-neox-fixed
      neox-bridge doctor pythia-410m --for transformers@4.48
      neox-bridge doctor pythia-neox --error traceback.txt

    Exit codes: 0 loads, perhaps with warnings, 1 error, also missing and damaged files, 2 usage
    error, 4 will not load in the framework of --for or, without it, in any known version. --error
    does not change them. Without PATH: 0 the message is known, 1 it is not.
    """
    as_json = output.as_json
    _check_applies(paths, options)
    if not paths and options.error is None:
        raise wrong("PATH", "missing", "Give a checkpoint, or a traceback with --error FILE.")
    from neox_bridge.doctor.advice import is_among
    from neox_bridge.stores.folder import is_hub
    from neox_bridge.stores.paths import is_local, plain

    if urls := [path for path in paths if not is_local(plain(path)) and not is_hub(path)]:
        raise wrong(
            urls[0], "doctor reads only local folders and Hub models", "Use inspect for other URLs."
        )
    paths = tuple(map(plain, paths))
    report = document(paths=paths)
    advice = None
    if options.error is not None:
        if problem := _problem(paths, reading, options):
            if not as_json:  # a command with this path would end in the same error
                say("error", message_of(problem))
                _print_advice(_advise(options.error, (), options.target), ())
                raise click.exceptions.Exit(problem.exit_code)
            raise problem
        advice = _advise(options.error, paths, options.target)
        report |= _advice_facts(advice)
        if not as_json and (options.fixes or options.target is None or len(paths) != 1):
            _print_advice(advice, paths)
            advice = None
    if options.fixes:
        report["fixed"] = _fix_any(paths[0], reading, options, as_json)
        if as_json:
            print_json(report)
        return
    report.setdefault("checkpoints", [])
    loads = True
    damaged: list[BridgeError] = []
    for number, path in enumerate(paths):
        examination = _examine(path, reading, options)
        loads = loads and examination.loads
        damaged += [examination.error] if examination.error is not None else []
        report["checkpoints"].append(examination.facts())
        if not as_json:
            if advice is not None and not is_among(advice, examination.findings):
                _print_advice(advice, paths)
                advice = None
            if number or (options.error is not None and advice is None):
                print()
            _print(examination, path)
    if as_json:
        print_json(report)
    if damaged:
        sys.stdout.flush()
        raise damaged[0]
    if not loads:
        sys.stdout.flush()
        raise click.exceptions.Exit(_FAILS)


def _check_applies(paths: Sequence[str], options: DoctorOptions) -> None:
    """Raise UsageError for options that would be ignored, or that contradict each other."""
    if options.fix is not None and options.in_place:
        raise UsageError(
            ["fix", "in_place"],
            "--fix DST writes a copy, and --in-place replaces PATH itself",
            "Leave one of them out.",
        )
    if options.fixes and len(paths) > 1:
        raise UsageError(
            ["fix" if options.fix is not None else "in_place"],
            f"it takes one PATH, and there are {len(paths)}",
            "Run the command once for each.",
        )
    more = given("dry_run", "recompute", "drop_optimizer", "ignore_keys")
    if more and not options.fixes:
        raise UsageError(more, "only for --fix and --in-place", "Add one of them.")
    if options.fixes and options.compare:
        raise UsageError(
            ["compare"], "it prints a table, and --fix writes", "Leave one of them out."
        )
    named = given("compare", "step", "configs", "gqa_order", "fix", "in_place")
    if not paths and options.error is not None and named:
        raise UsageError(named, "only for a checkpoint", "Give the checkpoint as well: PATH.")


def _open(path: str, reading: Source, *, by_ranges: bool = False) -> Checkpoint:
    """Open a checkpoint. by_ranges: read a Hub model there, instead of downloading it."""
    from neox_bridge.errors import Refused
    from neox_bridge.layouts.open import find_place, open_place
    from neox_bridge.planning.option_checks import check_gqa_order

    checkpoint = open_place(
        path,
        find_place(path, None, reading.step, by_ranges=by_ranges),
        step=reading.step,
        configs=reading.configs,
        gqa_order=reading.gqa_order,
    )
    check_gqa_order(reading.gqa_order, checkpoint)
    if checkpoint.neox is not None and checkpoint.neox.universal:
        raise Refused(
            f"{path} is a universal checkpoint of DeepSpeed, which GPT-NeoX loads with checkpoint: "
            '{"load_universal": true} in its yml. doctor does not know its files. Convert it into '
            "an ordinary checkpoint with reshard."
        )
    return checkpoint


def _problem(paths: Sequence[str], reading: Source, options: DoctorOptions) -> BridgeError | None:
    """Why the one checkpoint that a message may be about cannot be opened; None if it can."""
    try:
        if len(paths) == 1 and options.fixes:
            _open(paths[0], reading)
        elif len(paths) == 1:
            return _examine(paths[0], reading, options).error
    except BridgeError as error:
        return error
    return None


def _examine(path: str, reading: Source, options: DoctorOptions) -> Examination:
    from neox_bridge.doctor.examination import examine_path

    def open_it(path: str) -> Checkpoint:
        return _open(path, reading, by_ranges=True)

    try:
        return examine_path(path, open_it, options.target, with_comparison=options.compare)
    except BridgeError:
        if os.path.isdir(os.path.join(path, "megatron")):
            word = shlex.quote(path)
            raise BridgeError(
                f"{path} is a GPT-NeoX source tree, not a checkpoint. To check a checkpoint for "
                f"it: neox-bridge doctor CHECKPOINT --for neox:{word}. To let it load checkpoints "
                f"with and without inv_freq: neox-bridge patch {word}"
            ) from None
        raise


def _print(examination: Examination, path: str) -> None:
    """The problems of a checkpoint as blocks, and where it loads. path: as the user wrote it."""
    print_line(path)
    main, verdicts = examination.main, examination.verdicts
    errors = [finding for finding in examination.findings if finding.severity == "error"]
    if examination.read_by == "names":
        print_line("read by names, shapes and settings, not by a family")
        _print_findings(examination.findings)
    else:
        if examination.kind == "hf":
            print_line(f"read by the family {examination.family}")
        _print_as_one(f"error: {path} {main.headline}", errors)
        for finding in examination.findings[len(errors) :]:
            steps = [finding.remedy] if finding.remedy else []
            rows = way_out_rows(steps, finding.details.others, finding.details.more)
            print_block(f"{finding.severity}: {finding.message}", rows)
    shown: dict[str, str] = {}
    for verdict in verdicts:
        before = shown.setdefault(verdict.message, verdict.target)
        same = verdict.message and before != verdict.target
        is_explained = verdict is main and not any(case.prints for case in verdict.cases)
        print_line(f"{verdict.target}: {verdict.answer}{f', as {before}' if same else ''}")
        if not same and not is_explained:
            _print_message(verdict.message)
    if not errors and (failing := [v.target for v in verdicts if v.answer == "fails"]):
        command = shlex.join(["neox-bridge", "doctor", path, "--for", failing[-1]])
        print_block("note: --for explains a failure and how to fix it", [("run", Command(command))])
    if examination.comparison is not None:
        print()
        _print_comparison(examination.comparison)


def _print_as_one(headline: str, errors: Sequence[Finding]) -> None:
    """Print the errors of a family's checkpoint as one block: one command fixes all of them."""
    if not errors:
        return
    details = [finding.details for finding in errors]
    rows = [
        *evidence_rows(details),
        *cause_rows(finding.details.why or finding.message for finding in errors),
        *way_out_rows(
            [finding.remedy for finding in errors if finding.remedy],
            [other for one in details for other in one.others],
            [link for one in details for link in one.more],
        ),
    ]
    print_block(headline, rows)


def _print_findings(findings: Sequence[Finding]) -> None:
    """Print each finding as a block: they are about different files."""
    for finding in findings:
        details = finding.details
        steps = [finding.remedy] if finding.remedy else []
        rows = [
            *evidence_rows([details]),
            *cause_rows([details.why] if details.why else []),
            *way_out_rows(steps, details.others, details.more),
        ]
        print_block(f"{finding.severity}: {finding.message}", rows)


def _print_comparison(rows: Sequence[Row]) -> None:
    """Print the features, grouped by how they translate, wrapped to the terminal or 80 columns."""
    columns = get_terminal_size().columns
    width = max(len(row.feature) for row in rows)
    for answer, headline in _ANSWERS.items():
        lines: list[tuple[str, str]] = []
        for row in (row for row in rows if row.answer == answer):
            texts = [f"GPT-NeoX: {row.neox}", f"transformers: {row.transformers}"]
            texts = [row.neox] if row.neox == row.transformers else texts
            texts += [f"note: {row.note}"] if row.note else []
            labels = [row.feature.ljust(width), *[""] * (len(texts) - 1)]
            lines += zip(labels, texts, strict=True)
        if lines:
            print_block(headline, lines, columns)


def _print_message(message: str) -> None:
    """Print the output of a framework with shortened lines, because one may name every layer."""
    for line in map(str.strip, message.splitlines()):
        print_line(f"    {line[:_LONGEST]}{' …' if len(line) > _LONGEST else ''}")


def _advise(source: str, paths: Sequence[str], target: Target | None) -> Advice:
    """Explain a pasted traceback, and print the command that fixes it."""
    from neox_bridge.doctor.advice import advise
    from neox_bridge.layouts.open import open_checkpoint
    from neox_bridge.layouts.text_files import LARGE_BYTES, read_text

    text = sys.stdin.read() if source == "-" else read_text(source, LARGE_BYTES)
    path = paths[0] if len(paths) == 1 else ""
    checkpoint = None
    with suppress(BridgeError, OSError):  # the message may be about a checkpoint that does not open
        checkpoint = open_checkpoint(path) if path else None
    advice = advise(text, path, checkpoint, target)
    if advice is None:
        raise BridgeError("This text contains no known error message. Paste the whole traceback.")
    return advice


def _advice_facts(advice: Advice) -> dict[str, Any]:
    facts = asdict(advice)
    ways = (*advice.steps, *advice.others)
    facts["commands"] = [way for way in ways if isinstance(way, Command)]
    causes = [
        {**cause, "more": " ".join(cause["more"][:1]), "links": cause["more"]}
        for cause in facts.pop("causes")
    ]
    return {"error": causes, "advice": facts}


def _print_advice(advice: Advice, paths: Sequence[str]) -> None:
    """Print the problem, its cause, the one command, other ways and links."""
    path = paths[0] if len(paths) == 1 else ""
    if advice.contradiction:
        rows = [("why", advice.contradiction), *way_out_rows(advice.steps, (), ())]
        print_block(f"error: this message is not from {path}", rows)
        return
    details = Details(advice.missing, advice.unexpected, advice.wrong, advice.layers)
    rows = [
        *evidence_rows([details]),
        *cause_rows(cause.cause for cause in advice.causes),
        *way_out_rows(advice.steps, advice.others, advice.more),
    ]
    if advice.unnamed:
        options = {"CHECKPOINT": "PATH", "TREE": "--for neox:TREE"}
        names = " and ".join(options[word] for word in advice.unnamed)
        rows.append(("note", f"Add {names} to this command, and its commands have your paths."))
    where = f" in {advice.framework}" if advice.framework else ""
    print_block(f"error: {path or 'the checkpoint'} does not load{where}", rows)


def _fix_any(
    path: str, reading: Source, options: DoctorOptions, as_json: bool
) -> dict[str, Any] | None:
    """Fix a checkpoint of a known family, or else the index of a repository."""
    from neox_bridge.doctor.examination import repository_at

    try:
        checkpoint = _open(path, reading)
    except UsageError:
        raise
    except BridgeError as error:
        repository = repository_at(path, error)
        if repository is None:
            raise
    else:
        facts = _fix(checkpoint, options, bool(reading.configs), as_json)
        if facts is not None or checkpoint.kind == "neox":
            return facts
        repository = repository_at(path)
    facts = _fix_index(repository, options, as_json) if repository is not None else None
    if facts is None and not as_json:
        print_line(f"nothing to fix: {repository.model.path if repository is not None else path}")
    return facts


def _fix_index(
    repository: Repository, options: DoctorOptions, as_json: bool
) -> dict[str, Any] | None:
    """Write the indexes of shards again; None if they are right."""
    from neox_bridge.doctor.fix_index import index_checker, plan_index_fix
    from neox_bridge.planning.option_checks import check_outside

    path = repository.model.path
    if options.fix is not None:
        check_outside([path], options.fix, "fix")
    fix = plan_index_fix(repository, in_place=options.in_place)
    if fix is None:
        return None
    places = (options.fix or os.path.realpath(path), options.fix or path)
    return _write_fix(fix.plan, fix.changes, *places, index_checker(repository), options, as_json)


def _fix(
    checkpoint: Checkpoint, options: DoctorOptions, given_yml: bool, as_json: bool
) -> dict[str, Any] | None:
    from neox_bridge.doctor import fixes
    from neox_bridge.doctor.fix_changes import changes_of
    from neox_bridge.doctor.fix_index import with_right_indexes
    from neox_bridge.execution.staging import sweep
    from neox_bridge.planning.option_checks import check_outside

    if options.fix is not None:
        check_outside([checkpoint.source], options.fix, "fix")
    home = checkpoint.neox.root if checkpoint.neox is not None else checkpoint.path
    if finding := sweep(home):
        tell_findings([finding], quiet=False)
    plan = fixes.fix_plan(
        checkpoint,
        options.target,
        options.fix or home,
        in_place=options.in_place,
        recompute=options.recompute,
        drop_optimizer=options.drop_optimizer,
        ignore_keys=options.ignore_keys,
        given_yml=given_yml,
    )
    if plan is None:
        if not as_json and checkpoint.kind == "neox":
            print_line(f"nothing to fix: {checkpoint.path}")
        return None
    plan = with_right_indexes(checkpoint, plan)
    where = options.fix or fixes.replaced(checkpoint)
    if options.in_place:
        plan = fixes.in_place(checkpoint, plan)
    changes = changes_of(checkpoint, plan)
    check = fixes.checker(checkpoint, plan)
    return _write_fix(plan, changes, where, options.fix or home, check, options, as_json)


def _write_fix(
    plan: Plan,
    changes: Sequence[FileChange],
    where: str,
    target: str,
    check: Callable[[str], None],
    options: DoctorOptions,
    as_json: bool,
) -> dict[str, Any]:
    """Print what a fix changes, write it unless it is a dry run, and return the facts about it.

    where: what becomes the fixed checkpoint. target: what the plan's files are in, such as a run.
    """
    from neox_bridge.execution.execute import execute
    from neox_bridge.planning.report import remarks

    if not as_json:
        _print_changes(plan, changes)
    if options.dry_run:
        done = f"nothing written: {where}"
    else:
        with writing(where):
            result = execute(plan, target, check=check, in_place=options.in_place)
        tell_findings(result.findings, quiet=False)
        count = sum(file.copy_of is None for file in plan.files)
        done = f"fixed {where}: {count} of {len(plan.files)} files rewritten"
    if not as_json:
        print_line(done)
    return {
        "path": os.path.abspath(where),
        "files": len(plan.files),
        "changes": [asdict(change) for change in changes],
        **remarks(plan),
    }


def _print_changes(plan: Plan, changes: Iterable[FileChange]) -> None:
    """Print what the fix changes, one block per set of equal edits, and what it leaves out."""
    from itertools import groupby

    from neox_bridge.planning.report import by_reason

    for (kind, edits), group in groupby(changes, lambda change: (change.kind, change.edits)):
        first, *others = [change.path for change in group]
        more = f" and {plural(len(others), 'more file')}" if others and edits else ""
        paths = first + more if edits else ", ".join([first, *others])
        rows = []
        for edit in edits:
            text = " → ".join(filter(None, (edit.before, edit.after)))
            rows.append((edit.kind, text + (f" ({edit.count} times)" if edit.count > 1 else "")))
        print_block(f"{kind}: {paths}", rows)
    for drop in plan.dropped:
        if drop.kind == "setting":  # each is listed separately, because it may change the model
            print_line(f"dropped: {drop.name}: {drop.reason}")
    tensors = [drop for drop in plan.dropped if drop.kind != "setting"]
    for reason, names in by_reason(tensors).items():
        print_line(f"dropped: {some(names)}: {reason}")
    for note in plan.notes:
        print_line(f"note: {note}")
