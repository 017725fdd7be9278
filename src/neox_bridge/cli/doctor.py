"""``neox-bridge doctor``."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neox_bridge.cli import values
from neox_bridge.cli.asked import given
from neox_bridge.cli.errors import writing
from neox_bridge.cli.output import print_json, print_line, tell_findings
from neox_bridge.errors import BridgeError, UsageError

if TYPE_CHECKING:
    from neox_bridge.doctor.advice import Advice
    from neox_bridge.doctor.verdict import Verdict
    from neox_bridge.frameworks.targets import Target
    from neox_bridge.layouts.checkpoint import Checkpoint

_FAILS = 4
_MEND = "Mending"
_HUB = "hf://"
_ORDER = {"error": 0, "warning": 1, "info": 2}


def doctor(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH...", help="Checkpoints of either kind."),
    ] = None,
    target: Annotated[
        Any,
        typer.Option(
            "--for",
            **values.target(),
            help="What shall load it: a GPT-NeoX source tree, one by its date or commit, or a "
            "version of transformers (transformers: the installed one).",
        ),
    ] = None,
    error: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="A traceback that a framework printed; - reads it from stdin."
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Both frameworks side by side, for this model."),
    ] = False,
    step: values.Step = None,
    config: values.Configs = None,
    gqa_order: values.GqaOrder = None,
    fix: Annotated[
        str | None,
        typer.Option(metavar="DST", rich_help_panel=_MEND, help="Write a mended copy to DST."),
    ] = None,
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place",
            rich_help_panel=_MEND,
            help="Replace the checkpoint by the mended one, when that is whole.",
        ),
    ] = False,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute",
            rich_help_panel=_MEND,
            help="Drop or replace stored inv_freq that isn't what the config gives.",
        ),
    ] = False,
    drop_optimizer: Annotated[
        bool,
        typer.Option(
            "--drop-optimizer",
            rich_help_panel=_MEND,
            help="Leave out optimizer states where they can't be kept.",
        ),
    ] = False,
    ignore_key: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore-key",
            metavar="NAME",
            rich_help_panel=_MEND,
            help="An unknown setting that does not matter; may be repeated. A fixed yml is without "
            "it, since GPT-NeoX refuses it.",
        ),
    ] = None,
    as_json: values.AsJson = False,
) -> None:
    """Say what is wrong with a checkpoint, where it loads, and how to mend it.

    Without --for every known GPT-NeoX or transformers is tried. Nothing is loaded.

    \b
    Examples:
      neox-bridge doctor pythia-neox --for neox:~/gpt-neox
      neox-bridge doctor pythia-neox --for today --fix pythia-mended
      neox-bridge doctor pythia-410m --for transformers@4.48
      neox-bridge doctor pythia-neox --error traceback.txt

    Exit codes: 0 nothing or warnings only, 1 error, 2 usage, 4 will not load.
    """
    paths = paths or []
    mending = fix is not None or in_place
    _check_applies(locals())
    if not paths and error is None:
        raise typer.BadParameter("Name a checkpoint, or a traceback with --error FILE.")
    from neox_bridge.stores.paths import is_url, plain

    if urls := [path for path in paths if is_url(plain(path)) and not path.startswith(_HUB)]:
        raise typer.BadParameter(
            f"{urls[0]}: doctor reads folders and models of the Hub. Use inspect for other URLs."
        )
    paths = list(map(plain, paths))
    report: dict[str, Any] = {"schema_version": 1}
    if error is not None:
        report |= _advise(error, paths, target, as_json)
    if mending:
        opened = _open(paths[0], step, config, gqa_order)
        flags: dict[str, Any] = {"recompute": recompute, "drop_optimizer": drop_optimizer}
        flags["ignore_keys"] = tuple(ignore_key or ())
        flags["given_yml"] = bool(config)
        report["mended"] = _mend(opened, target, fix, flags, as_json)
        if as_json:
            print_json(report)
        return
    failed = False
    found = report.setdefault("checkpoints", [])
    for number, path in enumerate(paths):
        facts = _examine(path, target, partial(_open, path, step, config, gqa_order), compare)
        failed = failed or not facts["loads"]
        found.append(facts)
        if not as_json:
            if number or error is not None:
                print()
            _print(facts)
    if as_json:
        print_json(report)
    if failed:
        sys.stdout.flush()
        raise typer.Exit(_FAILS)


def _check_applies(options: dict[str, Any]) -> None:
    """Raise UsageError for options that would be ignored, or that contradict each other."""
    paths, fix, in_place = options["paths"], options["fix"], options["in_place"]
    if fix is not None and in_place:
        raise UsageError(
            ["fix", "in_place"],
            "--fix DST writes a copy, and --in-place replaces PATH itself",
            "Leave one of them out.",
        )
    mending = fix is not None or in_place
    if mending and len(paths) > 1:
        raise UsageError(
            ["fix" if fix is not None else "in_place"],
            f"it takes one PATH, and there are {len(paths)}",
            "Run the command once for each.",
        )
    more = given(**{name: options[name] for name in ("recompute", "drop_optimizer", "ignore_key")})
    if more and not mending:
        raise UsageError(more, "only for --fix and --in-place", "Add one of them.")
    if mending and options["compare"]:
        raise UsageError(
            ["compare"], "it prints a table, and --fix writes", "Leave one of them out."
        )
    names = ("compare", "step", "config", "gqa_order", "fix", "in_place")
    named = given(**{name: options[name] for name in names})
    if not paths and options["error"] is not None and named:
        raise UsageError(named, "only for a checkpoint", "Name the checkpoint as well: PATH.")


def _open(path: str, step: int | None, config: list[str] | None, order: str | None) -> "Checkpoint":
    from neox_bridge.errors import Refused
    from neox_bridge.layouts.open import open_checkpoint
    from neox_bridge.planning.option_checks import check_gqa_order

    found = open_checkpoint(
        path,
        step=step,
        configs=config or (),
        gqa_order=order,  # type: ignore[arg-type]
    )
    check_gqa_order(order, found)
    if found.neox is not None and found.neox.universal:
        raise Refused(
            f"{path} is a universal checkpoint of DeepSpeed, which GPT-NeoX loads with checkpoint: "
            '{"load_universal": true} in its yml, and whose files doctor doesn\'t know. Make an '
            "ordinary one of it with reshard."
        )
    return found


def _examine(
    path: str, target: "Target | None", opened: "Callable[[], Checkpoint]", side: bool
) -> dict[str, Any]:
    """Everything about one checkpoint, as plain data."""
    from neox_bridge.doctor.diagnose import cannot_open, judge, judge_all, own_target
    from neox_bridge.doctor.verdict import verdict
    from neox_bridge.frameworks.targets import name_of
    from neox_bridge.layouts.head import drop_equal_head

    try:
        checkpoint = opened()
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
    if side:
        from dataclasses import asdict

        from neox_bridge.doctor.compare import compare

        facts["comparison"] = [asdict(row) for row in compare(checkpoint)]
    return facts


def _verdict(verdict: "Verdict") -> dict[str, Any]:
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
    for finding in facts["findings"]:
        print_line(f"{finding['severity']}: {finding['message']}")
        if finding["remedy"]:
            print_line(f"    fix: {finding['remedy']}")
    for entry in facts["verdicts"]:
        print_line(f"{entry['target']}: {entry['verdict']}")
        for line in (entry["message"] or "").splitlines():
            print_line(f"    {_short(line.strip())}")
    if rows := facts.get("comparison"):
        _print_rows(rows)


def _short(line: str, most: int = 400) -> str:
    """One printed line of a framework, which may name every layer."""
    return line if len(line) <= most else f"{line[:most]} …"


def _print_rows(rows: list[dict[str, str]]) -> None:
    head = {"feature": "", "neox": "GPT-NeoX", "transformers": "transformers", "answer": ""}
    keys = ("feature", "neox", "transformers", "answer")
    widths = {key: max(len(row[key]) for row in (head, *rows)) for key in keys}
    print()
    for row in ({**head, "note": ""}, *rows):
        cells = "  ".join(row[key].ljust(widths[key]) for key in keys)
        print_line(f"{cells}  {row['note']}".rstrip())


def _advise(source: str, paths: list[str], target: Any, as_json: bool) -> dict[str, Any]:
    """What a pasted traceback tells, and the command that fixes it."""
    from dataclasses import asdict

    from neox_bridge.doctor.advice import advise
    from neox_bridge.layouts.text_files import LARGE, read_text

    text = sys.stdin.read() if source == "-" else read_text(source, LARGE)
    path = paths[0] if len(paths) == 1 else ""
    advice = advise(text, path, _opened(path), target)
    if advice is None:
        raise BridgeError("No known message is in this text. Paste the whole traceback.")
    if not as_json:
        _print_advice(advice, path)
    facts = asdict(advice)
    return {"error": facts.pop("causes"), "advice": facts}


def _opened(path: str) -> "Checkpoint | None":
    """The checkpoint that a message is about, where it can be opened."""
    from neox_bridge.layouts.open import open_checkpoint

    try:
        return open_checkpoint(path) if path else None
    except (BridgeError, OSError):
        return None


def _print_advice(advice: "Advice", path: str) -> None:
    """What is wrong, why, the one command, other ways and links."""
    first = advice.causes[0]
    shown = f"{path or 'the checkpoint'} does not load"
    rows: list[tuple[str, str]] = []
    for word, keys in (("missing", advice.missing), ("unexpected", advice.unexpected)):
        if keys:
            rows.append((word, _some(keys)))
    for cause in advice.causes:
        rows.append(("why", cause.cause))
        if not advice.fix:
            rows.append(("fix", cause.remedy))
    rows += [("fix", advice.fix)] if advice.fix else []
    rows += [("or", other) for other in advice.others]
    rows += [("more", link) for link in advice.more]
    if not path and "CHECKPOINT" in f"{advice.fix}{first.remedy}":
        rows.append(("note", "add the checkpoint's path to this command to see it filled in"))
    print_line(f"error: {shown}")
    width = max(len(word) for word, _ in rows)
    for word, words in rows:
        print_line(f"  {word:<{width}}  {words}")


def _some(keys: Sequence[str], most: int = 6) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def _mend(
    checkpoint: "Checkpoint",
    target: "Target | None",
    folder: str | None,
    flags: dict[str, Any],
    as_json: bool,
) -> dict[str, Any] | None:
    from neox_bridge.doctor import fixes as mend
    from neox_bridge.execution.execute import execute
    from neox_bridge.execution.staging import sweep
    from neox_bridge.planning.report import remarks

    home = checkpoint.neox.root if checkpoint.neox is not None else checkpoint.path
    if finding := sweep(home):
        tell_findings([finding], quiet=False)
    plan = mend.mend_plan(checkpoint, target, folder or home, in_place=folder is None, **flags)
    if plan is None:
        if not as_json:
            print_line(f"nothing to mend: {checkpoint.path}")
        return None
    where = folder or mend.replaced(checkpoint)
    if folder is None:
        plan = mend.in_place(checkpoint, plan)
    with writing(where):
        check = mend.checker(checkpoint, plan)
        result = execute(plan, folder or home, check=check, in_place=folder is None)
    tell_findings(result.findings, quiet=False)
    if not as_json:
        for drop in plan.dropped:
            print_line(f"dropped: {drop.name}: {drop.reason}")
        for note in plan.notes:
            print_line(note)
        count = sum(file.copy_of is None for file in plan.files)
        print_line(f"mended {where}: {count} of {len(plan.files)} files rewritten")
    return {"path": os.path.abspath(where), "files": len(plan.files), **remarks(plan)}
