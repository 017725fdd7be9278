"""``neox-bridge verify`` and ``neox-bridge diff``."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import click

from neox_bridge.cli.command import Argument, command, given, only
from neox_bridge.cli.options import Execution, Output, Source
from neox_bridge.cli.output import print_json, print_line, tell_findings
from neox_bridge.cli.progress import progress_bar
from neox_bridge.documents import document, plain_data
from neox_bridge.errors import BridgeError, UsageError
from neox_bridge.option import inherited, option
from neox_bridge.wording import human, plural

if TYPE_CHECKING:
    from neox_bridge.layouts.checkpoint import Checkpoint
    from neox_bridge.verification.logits import Agreement
    from neox_bridge.verification.tokens import TokenInput


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What is compared."""

    optimizer: bool = option(
        False, "Compare the optimizer states of two GPT-NeoX checkpoints too.", common=True
    )
    logits: bool = option(
        False,
        "Compute the logits of both models too, and name the first layer that differs.",
        common=True,
    )
    tokens: str | None = option(
        None,
        "The input of --logits: token ids (.npy, .npz, .json) or text. Default: made-up ids. "
        "`logits` in an .npz are compared with those of SRC.",
        value="path",
        metavar="FILE|TEXT",
    )
    device: Literal["cpu", "cuda"] | None = option(
        None, "Where --logits computes. Default: cpu.", choices=("cpu", "cuda")
    )
    max_workers: int | None = inherited(Execution, "max_workers", text="Threads that compare.")


@command(
    "verify",
    Argument("source", "SRC", "The checkpoint that DST was converted from."),
    Argument(
        "target",
        "[DST]",
        "The result of the conversion. Without DST, SRC is something that neox-bridge wrote, and "
        "is compared with the hashes in its neox_bridge.json.",
        required=False,
    ),
    VerifyOptions,
    only(Source, "configs", "gqa_order"),
    Output,
)
def verify(
    source: str, target: str | None, options: VerifyOptions, reading: Source, output: Output
) -> None:
    """Check that DST equals SRC: every tensor bit by bit, the padding, the ranks, the config.

    Declared changes are no differences: a cast, padding, rows cut to the tokenizer, norms written
    twice, biases spread over ranks. `convert` runs this check by default.

    \b
    Examples:
      neox-bridge verify pythia-410m pythia-neox
      neox-bridge verify pythia-410m pythia-neox --logits --tokens 'The quick brown fox'
      neox-bridge verify pythia-neox

    Exit codes: 0 equal, 3 different or not comparable, 1 error.
    """
    from neox_bridge.conversion import comparison_of, verify_comparison
    from neox_bridge.layouts.open import check_configs_used, open_with
    from neox_bridge.planning.option_checks import check_gqa_order
    from neox_bridge.verification.verify import describe

    if not options.logits and (named := given("tokens", "device")):
        raise UsageError(named, "only for --logits", "Add --logits.")
    if target is None:
        if named := given("logits", "gqa_order", "optimizer", "configs"):
            raise UsageError(
                named, "only for two checkpoints, and DST is missing", "Name DST as well."
            )
        _verify_alone(source, options.max_workers, output)
        return
    device = options.device or "cpu"
    if options.logits:
        _require_torch(device)
    first = open_with(source, reading.configs, gqa_order=reading.gqa_order)
    second = open_with(target, reading.configs)
    check_configs_used(reading.configs, first, second)
    check_gqa_order(reading.gqa_order, first)
    comparison = comparison_of(first, second, optimizer=options.optimizer)
    first, second = comparison.source, comparison.target
    inputs = None
    if options.logits:
        from neox_bridge.verification.tokens import read_tokens

        inputs = read_tokens(options.tokens, (first, second))
    with progress_bar(second.size, "verifying", output.quiet) as progress:
        result = verify_comparison(comparison, progress, workers=options.max_workers)
    agreements = _computed(first, second, inputs, device) if inputs else {}
    holds = result.holds and all(agreement.agrees for agreement in agreements.values())
    if output.as_json:
        more = {
            key: {"agrees": a.agrees, "comparable": a.comparable, **asdict(a)}
            for key, a in agreements.items()
        }
        print_json({**result.to_json(), "holds": holds, **more})
    elif not output.quiet:
        tell_findings(result.findings, output.quiet)
        for difference in result.differences:
            print_line(describe(difference))
        what = f"{plural(result.tensors, 'tensor')}, {human(result.size)}"
        print_line(f"{target}: {what}: {result.verdict}")
        for key, agreement in agreements.items():
            of = {"logits": target, "recorded": f"recorded logits, and {source}"}[key]
            other = {"logits": target, "recorded": "the recorded logits"}[key]
            if agreement.non_finite is not None:
                _tell_non_finite(of, source, other, agreement)
            else:
                _tell_agreement(of, agreement)
    if not holds:
        raise click.exceptions.Exit(3)


_NOTES = {
    "edited": " since it was written; it is yours to edit",
    "added": " since the checkpoint was written; whatever loads the folder may read it",
    "extra": " since the checkpoint was written; nothing that loads the folder reads it",
}


def _verify_alone(path: str, workers: int | None, output: Output) -> None:
    from neox_bridge.layouts.interrupted import interrupted
    from neox_bridge.verification.sealed import check_seal, find_record

    record = find_record(path)
    home = os.path.dirname(record)
    tell_findings([*interrupted(home), *interrupted(os.path.dirname(home))], output.quiet)
    with progress_bar(None, "reading", output.quiet) as progress:
        seal = check_seal(record, progress, workers)
    if output.as_json:
        print_json(document(source=path, target=None, **plain_data(seal), holds=seal.holds))
    elif not output.quiet:
        for change in seal.changes:
            print_line(f"{change.kind}: {change.path}{_NOTES.get(change.kind, '')}")
        verdict = "as it was written" if seal.holds else "NOT what was written"
        sizes = f"; of {plural(seal.unhashed, 'file')} only the size" if seal.unhashed else ""
        print_line(f"{path}: {plural(seal.files, 'file')}, {human(seal.size)}: {verdict}{sizes}")
    if not seal.holds:
        raise click.exceptions.Exit(3)


def _require_torch(device: str) -> None:
    """Raise BridgeError, before anything long is read, where --logits can't compute."""
    try:
        import torch
    except ImportError:
        raise BridgeError(
            "--logits computes with torch, which isn't installed: "
            "pip install 'neox-bridge[verify]'."
        ) from None
    if device == "cuda" and not torch.cuda.is_available():
        raise BridgeError(
            "--device cuda: torch sees no CUDA device here. Leave it out for the CPU."
        )


def _computed(
    first: Checkpoint, second: Checkpoint, inputs: TokenInput, device: str
) -> dict[str, Agreement]:
    """What both compute; and, if logits came with the tokens, what the first computes beside."""
    from neox_bridge.verification.logits import compare_logits, compare_recorded

    agreements = {"logits": compare_logits(first, second, inputs.tokens, device)}
    if inputs.recorded is not None:
        recorded = compare_recorded(first, inputs.tokens, inputs.recorded, device)
        agreements["recorded"] = recorded
    return agreements


def _tell_agreement(of: str, agreement: Agreement) -> None:
    verdict = "the same model" if agreement.agrees else "ANOTHER MODEL"
    print_line(
        f"{of}: logits of {plural(agreement.tokens, 'token')} differ by {agreement.largest:.3g} at "
        f"most (relative {agreement.relative:.2g}, mean {agreement.mean:.3g}), KL "
        f"{agreement.kl:.2g}, top-1 {agreement.top1:.1%}: {verdict}"
    )
    if agreement.place:
        print_line(
            f"  they part at {agreement.place}, by {agreement.apart:.2g} of its largest value"
        )
    for cause in agreement.causes:
        tail = "; no conversion removes that" if cause.inherent else ""
        print_line(f"  likely cause: {cause.cause}: {cause.text}{tail}")
    if agreement.place and not agreement.explained:
        more = "that isn't all" if agreement.causes else "none of the usual mistakes explains it"
        print_line(f"  {more}: compare the tensors above, and the configs")


def _tell_non_finite(of: str, source: str, other: str, agreement: Agreement) -> None:
    odd = agreement.non_finite
    assert odd is not None
    where = f"in {source} alone" if odd.first else f"in {other} alone"
    where = "on both sides, but not at the same places" if odd.first and odd.second else where
    verdict = "ANOTHER MODEL"
    if odd.same_places:
        where, verdict = "at the same places on both sides", "they CANNOT BE COMPARED"
    print_line(
        f"{of}: logits of {plural(odd.tokens, 'token')} are NaN or infinite {where}: {verdict}"
    )
    if not odd.tensor:
        print_line(
            f"  every weight is finite; the first such values are those of {agreement.place}"
        )
        return
    counts = [f"{odd.tensor_first:,} in {source}"]
    if other != "the recorded logits":
        counts.append(f"{odd.tensor_second:,} in {other}")
    print_line(f"  first weight that is not finite: {odd.tensor} (values: {', '.join(counts)})")
