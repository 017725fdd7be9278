"""``neox-bridge doctor``."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import click

from neox_bridge.cli.command import Argument, command, given, only
from neox_bridge.cli.errors import writing
from neox_bridge.cli.options import Output, Source
from neox_bridge.cli.output import print_json, print_line, print_table, tell_findings
from neox_bridge.cli.usage import wrong
from neox_bridge.documents import document
from neox_bridge.errors import BridgeError, UsageError
from neox_bridge.option import FIX, inherited, option
from neox_bridge.wording import some

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from neox_bridge.doctor.advice import Advice
    from neox_bridge.doctor.verdict import Verdict
    from neox_bridge.frameworks.targets import Target
    from neox_bridge.layouts.checkpoint import Checkpoint

_FAILS = 4
_LONGEST = 400  # characters of a line that a framework printed
_ORDER = {"error": 0, "warning": 1, "info": 2}


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """What is diagnosed, and whether it is fixed."""

    target: Target | None = option(
        None,
        "The framework that should load it. A GPT-NeoX source tree, a GPT-NeoX tag, date or "
        "commit, or a transformers version (transformers: the installed one).",
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
    Argument("paths", "PATH...", "Checkpoints in either format.", many=True, required=False),
    DoctorOptions,
    only(Source, "step", "configs", "gqa_order"),
    only(Output, "as_json"),
)
def doctor(paths: tuple[str, ...], options: DoctorOptions, reading: Source, output: Output) -> None:
    """Diagnose a checkpoint: where it loads, what is wrong with it, and how to fix it.

    Without --for, every known version of GPT-NeoX or transformers is checked. Nothing in a
    checkpoint is executed.

    \b
    Examples:
      neox-bridge doctor pythia-neox --for neox:~/gpt-neox
      neox-bridge doctor pythia-neox --for today --fix pythia-fixed
      neox-bridge doctor pythia-410m --for transformers@4.48
      neox-bridge doctor pythia-neox --error traceback.txt

    Exit codes: 0 loads, perhaps with warnings, 1 error, 2 usage error, 4 will not load.
    """
    as_json = output.as_json
    _check_applies(paths, options)
    if not paths and options.error is None:
        raise wrong("PATH", "missing", "Give a checkpoint, or a traceback with --error FILE.")
    from neox_bridge.stores.folder import is_hub
    from neox_bridge.stores.paths import is_local, plain

    if urls := [path for path in paths if not is_local(plain(path)) and not is_hub(path)]:
        raise wrong(
            urls[0], "doctor reads only local folders and Hub models", "Use inspect for other URLs."
        )
    paths = tuple(map(plain, paths))
    report = document(paths=paths)
    if options.error is not None:
        report |= _advise(options.error, paths, options.target, as_json)
    if options.fixes:
        report["fixed"] = _fix(_open(paths[0], reading), options, bool(reading.configs), as_json)
        if as_json:
            print_json(report)
        return
    report.setdefault("checkpoints", [])
    for number, path in enumerate(paths):
        facts = _examine(path, reading, options)
        report["checkpoints"].append(facts)
        if not as_json:
            if number or options.error is not None:
                print()
            _print(facts)
    if as_json:
        print_json(report)
    if not all(facts["loads"] for facts in report["checkpoints"]):
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
    more = given("recompute", "drop_optimizer", "ignore_keys")
    if more and not options.fixes:
        raise UsageError(more, "only for --fix and --in-place", "Add one of them.")
    if options.fixes and options.compare:
        raise UsageError(
            ["compare"], "it prints a table, and --fix writes", "Leave one of them out."
        )
    named = given("compare", "step", "configs", "gqa_order", "fix", "in_place")
    if not paths and options.error is not None and named:
        raise UsageError(named, "only for a checkpoint", "Give the checkpoint as well: PATH.")


def _open(path: str, reading: Source) -> Checkpoint:
    from neox_bridge.errors import Refused
    from neox_bridge.planning.option_checks import check_gqa_order

    checkpoint = reading.open(path)
    check_gqa_order(reading.gqa_order, checkpoint)
    if checkpoint.neox is not None and checkpoint.neox.universal:
        raise Refused(
            f"{path} is a universal checkpoint of DeepSpeed, which GPT-NeoX loads with checkpoint: "
            '{"load_universal": true} in its yml. doctor does not know its files. Convert it into '
            "an ordinary checkpoint with reshard."
        )
    return checkpoint


def _examine(path: str, reading: Source, options: DoctorOptions) -> dict[str, Any]:
    """Everything about one checkpoint, as plain data."""
    from neox_bridge.doctor.diagnose import cannot_open, judge, judge_all, own_target
    from neox_bridge.doctor.verdict import verdict
    from neox_bridge.frameworks.targets import name_of
    from neox_bridge.layouts.head import drop_equal_head

    target = options.target
    try:
        checkpoint = _open(path, reading)
    except BridgeError:
        case = cannot_open(path)
        if case is None:
            raise
        name = name_of(target) if target is not None else "any GPT-NeoX"
        facts = _verdict(verdict(name, [case]))
        return {
            "path": os.path.abspath(path),
            "kind": "neox",
            "loads": False,
            "findings": facts.pop("findings"),
            "verdicts": [facts],
        }
    checkpoint = drop_equal_head(checkpoint)  # compared once, not for every target
    main = judge(checkpoint, target or own_target(checkpoint))
    verdicts = [main] if target is not None else judge_all(checkpoint)
    facts = {
        "path": checkpoint.path,
        "kind": checkpoint.kind,
        "loads": any(v.answer != "fails" for v in verdicts),
        "findings": _verdict(main)["findings"],
        "verdicts": [_verdict(v) for v in verdicts],
    }
    for entry in facts["verdicts"] if target is not None else ():
        entry.pop("findings")
    if options.compare:
        from neox_bridge.doctor.compare import compare

        facts["comparison"] = [asdict(row) for row in compare(checkpoint)]
    return facts


def _verdict(verdict: Verdict) -> dict[str, Any]:
    from neox_bridge.planning.report import finding_json

    cases = sorted(verdict.cases, key=lambda case: _ORDER[case.finding.severity])
    return {
        "target": verdict.target,
        "verdict": verdict.answer,
        "message": verdict.message or None,
        "findings": [
            {**finding_json(case.finding), "prints": case.prints or None} for case in cases
        ],
    }


def _print(facts: dict[str, Any]) -> None:
    print_line(facts["path"])
    findings, verdicts = facts["findings"], facts["verdicts"]
    judged = (v["target"] for v in verdicts if v.get("findings", findings) == findings)
    if errors := [finding for finding in findings if finding["severity"] == "error"]:
        head = f"error: {facts['path']} does not load in {next(judged)}"
        _print_block(head, list(_causes(errors)))
    for finding in findings[len(errors) :]:  # errors are first
        fix = [("fix", finding["remedy"])] if finding["remedy"] else []
        _print_block(f"{finding['severity']}: {finding['message']}", fix)
    for entry in verdicts:
        print_line(f"{entry['target']}: {entry['verdict']}")
        for line in (entry["message"] or "").splitlines():
            line = line.strip()  # one may name every layer
            print_line(f"    {line[:_LONGEST]}{' …' if len(line) > _LONGEST else ''}")
    if rows := facts.get("comparison"):
        keys = ("feature", "neox", "transformers", "answer", "note")
        titles = ("", "GPT-NeoX", "transformers", "", "")
        print()
        print_table([titles, *([row[key] for key in keys] for row in rows)])


def _causes(errors: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Why each error is one, and what to do; what helps against several in a row stands once."""
    for error, following in zip_longest(errors, errors[1:]):
        yield "why", error["message"]
        if error["remedy"] and (following is None or following["remedy"] != error["remedy"]):
            yield "fix", error["remedy"]


def _print_block(head: str, rows: Sequence[tuple[str, str]]) -> None:
    print_line(head)
    width = max((len(word) for word, _ in rows), default=0)
    for word, words in rows:
        print_line(f"  {word:<{width}}  {words}")


def _advise(source: str, paths: Sequence[str], target: Any, as_json: bool) -> dict[str, Any]:
    """What a pasted traceback tells, and the command that fixes it."""
    from neox_bridge.doctor.advice import advise
    from neox_bridge.layouts.open import open_checkpoint
    from neox_bridge.layouts.text_files import LARGE_BYTES, read_text

    text = sys.stdin.read() if source == "-" else read_text(source, LARGE_BYTES)
    path = paths[0] if len(paths) == 1 else ""
    checkpoint = None
    with suppress(BridgeError, OSError):  # the message may be about one that cannot be opened
        checkpoint = open_checkpoint(path) if path else None
    advice = advise(text, path, checkpoint, target)
    if advice is None:
        raise BridgeError("This text contains no known error message. Paste the whole traceback.")
    if not as_json:
        _print_advice(advice, path)
    facts = asdict(advice)
    return {"error": facts.pop("causes"), "advice": facts}


def _print_advice(advice: Advice, path: str) -> None:
    """What is wrong, why, the one command, other ways and links."""
    rows: list[tuple[str, str]] = []
    for word, keys in (("missing", advice.missing), ("unexpected", advice.unexpected)):
        if keys:
            rows.append((word, some(list(keys), 6)))
    for cause in advice.causes:
        rows.append(("why", cause.cause))
        if not advice.fix:
            rows.append(("fix", cause.remedy))
    rows += [("fix", advice.fix)] if advice.fix else []
    rows += [("or", other) for other in advice.others]
    rows += [("more", link) for link in advice.more]
    if not path and "CHECKPOINT" in f"{advice.fix}{advice.causes[0].remedy}":
        rows.append(("note", "add the checkpoint's path to this command to see it filled in"))
    _print_block(f"error: {path or 'the checkpoint'} does not load", rows)


def _fix(
    checkpoint: Checkpoint, options: DoctorOptions, given_yml: bool, as_json: bool
) -> dict[str, Any] | None:
    from neox_bridge.doctor import fixes
    from neox_bridge.execution.execute import execute
    from neox_bridge.execution.staging import sweep
    from neox_bridge.planning.report import remarks

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
        if not as_json:
            print_line(f"nothing to fix: {checkpoint.path}")
        return None
    where = options.fix or fixes.replaced(checkpoint)
    if options.in_place:
        plan = fixes.in_place(checkpoint, plan)
    with writing(where):
        check = fixes.checker(checkpoint, plan)
        result = execute(plan, options.fix or home, check=check, in_place=options.in_place)
    tell_findings(result.findings, quiet=False)
    if not as_json:
        for drop in plan.dropped:
            print_line(f"dropped: {drop.name}: {drop.reason}")
        for note in plan.notes:
            print_line(note)
        count = sum(file.copy_of is None for file in plan.files)
        print_line(f"fixed {where}: {count} of {len(plan.files)} files rewritten")
    return {"path": os.path.abspath(where), "files": len(plan.files), **remarks(plan)}
