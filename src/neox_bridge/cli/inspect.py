"""``neox-bridge inspect``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neox_bridge.cli.command import Argument, command, given, only
from neox_bridge.cli.inspect_optimizer import (
    masters_facts,
    optimizer_lines,
    states_facts,
    states_lines,
)
from neox_bridge.cli.options import Execution, Output, Source
from neox_bridge.cli.output import print_json, print_line, print_table, tell_findings, with_remedy
from neox_bridge.cli.security import print_security
from neox_bridge.cli.stats import measure, print_stats, stats_json
from neox_bridge.errors import UsageError
from neox_bridge.option import inherited, option, options_of
from neox_bridge.wording import KINDS, human, plain, plural

if TYPE_CHECKING:
    from neox_bridge.findings import Finding
    from neox_bridge.layouts.checkpoint import Checkpoint
    from neox_bridge.layouts.stored_model import StoredModel
    from neox_bridge.tensors.pieces import Whole
    from neox_bridge.tensors.tensor_ref import TensorRef
    from neox_bridge.verification.statistics import Statistics

PEEK_BYTES = 4 << 20  # bytes that are compared of tensors that are stored twice


@dataclass(frozen=True, slots=True)
class InspectOptions:
    """Options for what is read and printed."""

    tensors: bool = option(
        False, "List every tensor: name, shape, dtype, and where it is stored.", common=True
    )
    stats: bool = option(
        False,
        "Read the weights and print statistics. For each tensor: range, mean, std, norm, zeros, "
        "NaN and Inf.",
        common=True,
    )
    plot: str | None = option(
        None, "Plot the statistics per block. Implies --stats.", value="picture"
    )
    tensor: str | None = option(
        None,
        "Print statistics of tensors whose names match this pattern, such as '*.bias'. Implies "
        "--stats.",
        metavar="GLOB",
    )
    security: bool = option(
        False,
        "List the code that the pickles in PATH, a file or a folder, would run if they were "
        "loaded.",
        common=True,
    )
    optimizer: bool = option(
        False,
        "Also read the optimizer: groups, step, learning rate. With --tensors or --stats, its "
        "states are listed as 'exp_avg: NAME'.",
        common=True,
    )
    max_workers: int | None = inherited(Execution, "max_workers")


@command(
    "inspect",
    Argument(
        "path",
        "PATH",
        "A GPT-NeoX checkpoint, or any Hugging Face model: a folder, a URL (s3://…) or a Hub "
        "model (ORG/NAME[@REVISION]).",
    ),
    InspectOptions,
    only(Source, "revision", "step", "configs"),
    only(Output, "as_json"),
)
def inspect(path: str, options: InspectOptions, reading: Source, output: Output) -> None:
    """Show what a checkpoint contains, and what would stop a conversion.

    Shows format, version, layout and sizes. For GPT-NeoX checkpoints, it also shows which program
    wrote the checkpoint, the kind of its optimizer states, and which GPT-NeoX can resume them.

    Weights are read only with --stats. The exit code is 0 if the checkpoint can be opened. With
    --security, it is 1 if a pickle is not known to be harmless.

    \b
    Examples:
      neox-bridge inspect checkpoints/
      neox-bridge inspect EleutherAI/pythia-70m --revision step3000 --tensors
      neox-bridge inspect EleutherAI/neox-ckpt-pythia-160m@step1000
      neox-bridge inspect checkpoints/ --stats --plot statistics.svg
      neox-bridge inspect downloaded.bin --security
    """
    if options.security:
        others = [name for name in options_of(InspectOptions) if name != "security"]
        if named := given(*others, "revision", "step", "configs"):
            raise UsageError(
                named, "--security looks at files as they are", "Only --json goes with it."
            )
        print_security(path, output.as_json)
        return
    measured = bool(options.stats or options.plot or options.tensor)
    if options.max_workers is not None and not measured:
        raise UsageError(["max_workers"], "only for --stats", "Add --stats, or leave it out.")
    from neox_bridge.findings import finding_json
    from neox_bridge.layouts.stored_model import StoredModel
    from neox_bridge.planning.option_checks import check_optimizer

    if options.plot is not None:
        from neox_bridge.verification.drawing import check_plot

        check_plot(options.plot)
    checkpoint = reading.open_any(path, by_ranges=not measured, always_configs=True)
    check_optimizer(options.optimizer, checkpoint)
    if isinstance(checkpoint, StoredModel):
        _inspect_stored(checkpoint, options, measured=measured, as_json=output.as_json)
        return
    facts = describe(checkpoint)
    if options.optimizer:
        checkpoint, doubts = _with_optimizer(checkpoint, facts, options)
        facts["findings"] += map(finding_json, doubts)
    statistics: list[Statistics] | None = None
    faults: list[Finding] = []
    if measured:
        statistics, faults = _measured(checkpoint, options)
    if output.as_json:
        _print_json(facts, _tensors(checkpoint) if options.tensors else None, statistics, faults)
        return
    lines = summary_lines(facts)
    if options.optimizer:
        lines += optimizer_lines(facts["optimizer"], facts["optimizer"]["masters"])
    for key, text in lines:
        print_line(f"{key:<12}{text}")
    if options.tensors:
        _print_tensors(checkpoint)
    if statistics is not None:
        print_stats(statistics)
    tell_findings(faults, quiet=False)


def _inspect_stored(
    model: StoredModel, options: InspectOptions, *, measured: bool, as_json: bool
) -> None:
    """Print what is known of weights without a family."""
    from neox_bridge.cli.inspect_stored import describe_stored, print_stored, stored_tensors

    facts = describe_stored(model)
    statistics: list[Statistics] | None = None
    faults: list[Finding] = []
    if measured:
        statistics, faults = _measured(model, options)
    if as_json:
        _print_json(facts, stored_tensors(model) if options.tensors else None, statistics, faults)
        return
    print_stored(model, facts, tensors=options.tensors, patterns=statistics is None)
    if statistics is not None:
        print_stats(statistics)
    tell_findings(faults, quiet=False)


def _print_json(
    facts: dict[str, Any],
    tensors: list[dict[str, Any]] | None,
    statistics: list[Statistics] | None,
    faults: list[Finding],
) -> None:
    """Print the facts as JSON, with what else was asked for."""
    from neox_bridge.findings import finding_json

    facts["findings"] += map(finding_json, faults)
    if tensors is not None:
        facts["tensors"] = tensors
    if statistics is not None:
        facts["stats"] = stats_json(statistics)
    print_json(facts)


def _measured(
    checkpoint: Checkpoint | StoredModel, options: InspectOptions
) -> tuple[list[Statistics], list[Finding]]:
    """The statistics that the options ask for, plotted if they ask for it, and findings."""
    statistics, faults = measure(checkpoint, options.tensor or "*", options.max_workers)
    if options.plot:
        from neox_bridge.verification.drawing import save
        from neox_bridge.verification.statistics_figure import statistics_figure

        save(statistics_figure(statistics), options.plot)
    return statistics, faults


def _with_optimizer(
    checkpoint: Checkpoint, facts: dict[str, Any], options: InspectOptions
) -> tuple[Checkpoint, list[Finding]]:
    """The checkpoint with its states as tensors, and findings. Adds the optimizer to the facts."""
    from neox_bridge.findings import unrepeated
    from neox_bridge.optimizer.masters import with_states
    from neox_bridge.optimizer.read_export import scalars
    from neox_bridge.optimizer.read_files import read_optimizer

    optimizer = read_optimizer(checkpoint, "Leave out --optimizer.")
    masters: dict[str, Any] | None = None
    differing: list[Finding] = []
    if options.stats and options.tensor is None:
        masters, differing = masters_facts(checkpoint, optimizer, options.max_workers)
    facts["optimizer"] = {**scalars(checkpoint, optimizer), "masters": masters}
    others = unrepeated(optimizer.findings, differing)
    findings = [*differing, *others, *optimizer.derived_findings]
    return with_states(checkpoint, optimizer), findings


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The facts about a checkpoint, as plain data."""
    from neox_bridge.findings import finding_json
    from neox_bridge.layouts.copies import copy_findings
    from neox_bridge.layouts.head import head_findings, head_relation
    from neox_bridge.layouts.rank_biases import drifted_biases
    from neox_bridge.planning.weight_dtypes import odd_dtypes

    stored = head_findings(checkpoint, PEEK_BYTES) + copy_findings(checkpoint, PEEK_BYTES)
    if drifted := drifted_biases(checkpoint):
        written = "convert writes the mean of the ranks, which is close to it"
        stored = [*stored, drifted.finding(written)]
    states, unreadable = states_facts(checkpoint)
    stored += unreadable
    facts = checkpoint.to_json()
    if facts["neox"] is not None:
        facts["neox"]["optimizer_states"] = states
    facts["stored_head"] = head_relation(checkpoint, PEEK_BYTES)
    facts["findings"] += map(finding_json, stored)
    facts["refusals"] = _refusals(checkpoint)
    facts["quantization"] = None
    facts["odd_weights"] = [
        {
            "castable": entry.castable,
            "count": len(entry.names),
            "reason": entry.reason,
            "way_out": entry.way_out,
        }
        for entry in odd_dtypes(checkpoint)
    ]
    return facts


def _refusals(checkpoint: Checkpoint) -> list[dict[str, str]]:
    if not checkpoint.refusals:
        return []
    from neox_bridge.layouts.checkpoint import new_folder, way_out_of
    from neox_bridge.planning.make import relayout_command

    relayout = relayout_command(checkpoint, new_folder(checkpoint.path, "neox"))
    return [
        {"key": r.key, "reason": r.reason, "way_out": way_out_of(r, relayout)}
        for r in checkpoint.refusals
    ]


def summary_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines that ``inspect`` prints for the facts of ``describe``: a label and a text."""
    from neox_bridge.frameworks.unknown_keys import UnknownKey
    from neox_bridge.layouts.unknown_keys import listed, reason_of, remedy_of

    neox = facts["neox"]
    other = "hf" if facts["kind"] == "neox" else "neox"
    lines = [("path", facts["path"])]
    kind = KINDS[facts["kind"]]
    if neox is None:
        kind += f", {facts['format']} format" if facts["format"] else ""
        lines.append(("kind", kind + (f", {facts['revision']}" if facts["revision"] else "")))
    else:
        where = "flat (no global_stepN folder)" if neox["flat"] else neox["step"]
        revision = f", {facts['revision']}" if facts["revision"] else ""
        lines.append(("kind", f"{kind}, {where}, iteration {neox['iteration']}{revision}"))
    lines.append(("family", facts["family"]))
    if neox is not None:
        stored = "stored" if neox["inv_freq"] == "store" else "not stored"
        lines.append(
            (
                "era",
                f"matches GPT-NeoX {neox['era_span']} (neox@{neox['era']}): {neox['mlp_names']} "
                f"MLP names, inv_freq {stored}",
            )
        )
        lines.append(
            (
                "layout",
                ("DeepSpeed universal checkpoint, " if neox["universal"] else "")
                + ("ZeRO stage 3, " if neox["zero_stage"] else "")
                + f"{neox['layout']}, TP {neox['tensor_parallel']}, PP {neox['pipeline_stages']}",
            )
        )
    lines += _model_lines(facts)
    lines.append(("files", f"{plural(len(facts['files']), 'file')}, {human(facts['bytes'])}"))
    if neox is not None:
        count = len(neox["optimizer"])
        held = f"{plural(count, 'state file')}, not copied by convert"
        if neox["zero_stage"]:
            held = f"{plural(count, 'state file')}, which also contain the weights"
        none = "not present"
        if facts["has_optimizer"]:
            none = "states inside the weight files, not copied by convert"
        none = "one file per parameter and state" if neox["universal"] else none
        lines.append(("optimizer", held if count else none))
        if neox["optimizer_states"]:
            named = neox["configs"] if neox["configs_given"] else ()
            options = [word for path in named for word in ("--config", path)]
            lines += states_lines(neox["optimizer_states"], facts["path"], options)
    if facts["written_by"]:
        lines.append(("written by", facts["written_by"]))
    elif neox is not None:
        lines.append(("written by", neox["writer"]["words"]))
    unknown = [UnknownKey(**key) for key in facts["unknown_keys"]]
    for key in unknown:
        if key.effect == "model":
            lines.append(("refused", f"{key.name}: {reason_of(key)}; {remedy_of(key)}"))
    lines += [("warning", with_remedy(finding)) for finding in listed(unknown)]
    for finding in facts["findings"]:
        remedy = f" ({finding['remedy']})" if finding["remedy"] else ""
        lines.append((finding["severity"], finding["message"] + remedy))
    for odd in facts["odd_weights"]:
        lines.append(("refused", f"by every conversion: {odd['reason']}; {odd['way_out']}"))
    for refusal in facts["refusals"]:
        way = f"; {refusal['way_out']}" if refusal["way_out"] else ""
        reason = f"{refusal['key']}: {refusal['reason']}{way}"
        lines.append(("refused", f"to {KINDS[other]}: {reason}"))
    return lines


def _model_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    entries = facts["tokenizer_size"]
    known = f"{entries:,} entries" if entries is not None else "unknown"
    mixed = [f"{name} ({plural(count, 'parameter')})" for name, count in facts["dtypes"].items()]
    fewer = facts["kv_heads"] != facts["heads"]
    of_kv = f" ({facts['kv_heads']} for keys and values)" if fewer else ""
    residual = "parallel (gpt_j_residual)" if facts["parallel_residual"] else "sequential"
    absent = [name for name, there in facts["biases"].items() if not there]
    return [
        ("parameters", f"{facts['parameters']:,}"),
        ("dtype", ", ".join(mixed) if len(mixed) > 1 else facts["dtype"]),
        (
            "size",
            f"{plural(facts['layers'], 'layer')}, hidden {facts['hidden']}, "
            f"{plural(facts['heads'], 'head')}{of_kv}, MLP {facts['ffn']}",
        ),
        ("vocabulary", f"{facts['vocab_rows']:,} rows; tokenizer: {known}"),
        ("positions", f"{facts['max_positions']:,}"),
        (
            "rotary",
            f"{facts['rotary_dim']} of {facts['hidden'] // facts['heads']} dimensions per head, "
            f"base {facts['rotary_base']:g}"
            if facts["rotary_dim"]
            else "none",
        ),
        ("activation", facts["activation"]),
        ("residual", residual + (", one norm per block" if facts["tied_norms"] else "")),
        ("embeddings", _embeddings(facts)),
        ("biases", f"none in: {', '.join(absent)}" if absent else "everywhere"),
    ]


def _embeddings(facts: dict[str, Any]) -> str:
    if facts["stored_head"] == "differs":
        return "tied in the config, but the files contain a different output head"
    return "tied" if facts["tied_embeddings"] else "untied"


def _refs(whole: Whole) -> list[TensorRef]:
    """The location of a tensor: its shards, or its single piece."""
    return list(whole.shards) or list(
        dict.fromkeys(p.source for p in whole.pieces if p.source is not None)
    )


def _tensors(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "dtype": whole.dtype,
            "shape": list(whole.shape),
            "reduce": whole.reduce,
            "shards": [
                {"file": ref.file, "offset": ref.offset, "shape": list(ref.shape)}
                for ref in _refs(whole)
            ],
        }
        for name, whole in checkpoint.tensors.items()
    ]


def _print_tensors(checkpoint: Checkpoint) -> None:
    rows = []
    for name, whole in checkpoint.tensors.items():
        refs = _refs(whole)
        first = os.path.relpath(refs[0].file, checkpoint.path) if refs else ""
        where = f"{first} @ {refs[0].offset}" if refs else ""
        shards = f" and {plural(len(refs) - 1, 'more shard')}" if len(refs) > 1 else ""
        rows.append((plain(name), str(list(whole.shape)), whole.dtype, plain(where) + shards))
    print()
    print_table(rows)
