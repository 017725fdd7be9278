"""``neox-bridge verify`` and ``neox-bridge diff``."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import click

from neox_bridge.cli.command import Argument, command, given, only
from neox_bridge.cli.inspect_stored import BY_NAMES
from neox_bridge.cli.options import Execution, Output, Source
from neox_bridge.cli.output import print_json, print_line, tell_findings
from neox_bridge.cli.progress import progress_bar
from neox_bridge.documents import document, plain_data
from neox_bridge.errors import BridgeError, UsageError
from neox_bridge.extras import missing
from neox_bridge.option import inherited, option
from neox_bridge.wording import human, plural, some

if TYPE_CHECKING:
    from collections.abc import Callable

    from neox_bridge.conversion import Comparison
    from neox_bridge.layouts.checkpoint import Checkpoint
    from neox_bridge.verification.logits import Agreement
    from neox_bridge.verification.tokens import TokenInput


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """Options for the comparison."""

    optimizer: bool = option(
        False, "Also compare the optimizer states of two GPT-NeoX checkpoints.", common=True
    )
    logits: bool = option(
        False,
        "Also compute the logits of both models, and name the first layer that differs.",
        common=True,
    )
    tokens: str | None = option(
        None,
        "Input for --logits: a file of token ids (.npy, .npz, .json), or text. Default: generated "
        "ids. If an .npz contains `logits`, they are compared with those of SRC.",
        value="path",
        metavar="FILE|TEXT",
    )
    device: Literal["cpu", "cuda"] | None = option(
        None, "Device for --logits. Default: cpu.", choices=("cpu", "cuda")
    )
    max_workers: int | None = inherited(Execution, "max_workers")


@command(
    "verify",
    Argument("source", "SRC", "The checkpoint that DST was converted or copied from."),
    Argument(
        "target",
        "[DST]",
        "The result of the conversion. Without DST, SRC must be output of neox-bridge, and is "
        "checked against the hashes in its neox_bridge.json.",
        required=False,
    ),
    VerifyOptions,
    only(Source, "configs", "gqa_order"),
    Output,
)
def verify(
    source: str, target: str | None, options: VerifyOptions, reading: Source, output: Output
) -> None:
    """Check that DST equals SRC: every tensor bit by bit, padding, ranks and config.

    Changes that the conversion declares do not count as differences: a cast, padding, rows cut to
    the tokenizer, norms that are written twice, biases that are split over ranks. `convert` runs
    this check by default. Hugging Face repositories of any family are compared by name, shape,
    dtype and bits, and by the keys of config.json.

    \b
    Examples:
      neox-bridge verify pythia-410m pythia-neox
      neox-bridge verify pythia-410m pythia-neox --logits --tokens 'The quick brown fox'
      neox-bridge verify pythia-neox

    Exit codes: 0 equal, 3 different or not comparable, 1 error, 4 refused.
    """
    from neox_bridge.conversion import comparison_of, verify_comparison
    from neox_bridge.layouts.open import check_configs_used
    from neox_bridge.layouts.open_stored import open_any
    from neox_bridge.planning.option_checks import check_gqa_order
    from neox_bridge.verification.verify import describe

    if not options.logits and (named := given("tokens", "device")):
        raise UsageError(named, "only for --logits", "Add --logits.")
    if target is None:
        if named := given("logits", "gqa_order", "optimizer", "configs"):
            raise UsageError(
                named, "needs two checkpoints, and DST is missing", "Give DST as well."
            )
        _verify_alone(source, options.max_workers, output)
        return
    device = options.device or "cpu"
    if options.logits:
        _require_torch(device)
    first = reading.open_any(source)
    second = open_any(target, configs=reading.configs)
    check_configs_used(reading.configs, first, second)
    check_gqa_order(reading.gqa_order, first)
    comparison = comparison_of(first, second, optimizer=options.optimizer)
    compute = _computation(comparison, options.tokens, device) if options.logits else None
    with progress_bar(comparison.target.size, "verifying", output.quiet) as progress:
        result = verify_comparison(comparison, progress, workers=options.max_workers)
    agreements = compute() if compute else {}
    holds = result.holds and all(agreement.agrees for agreement in agreements.values())
    if output.as_json:
        more = {
            key: {"agrees": a.agrees, "comparable": a.comparable, **asdict(a)}
            for key, a in agreements.items()
        }
        print_json({**result.to_json(), "holds": holds, **more})
    elif not output.quiet:
        tell_findings(result.findings, output.quiet)
        if result.read_by == "names":
            print_line(BY_NAMES)
        for difference in result.differences:
            print_line(describe(difference))
        what = f"{plural(result.tensors, 'tensor')}, {human(result.size)}"
        print_line(f"{target}: {what}: {result.verdict}")
        for key, agreement in agreements.items():
            of = {"logits": target, "recorded": f"recorded logits, and {source}"}[key]
            other = {"logits": target, "recorded": "the recorded logits"}[key]
            if agreement.load_changes:
                _tell_load_changes(of, agreement)
            elif agreement.non_finite is not None:
                _tell_non_finite(of, source, other, agreement)
            else:
                _tell_agreement(of, agreement)
    if not holds:
        raise click.exceptions.Exit(3)


_NOTES = {
    "edited": " (this file is meant to be edited)",
    "added": " (not in the record; frameworks that load the folder may read it)",
    "extra": " (not in the record; frameworks that load the folder do not read it)",
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
        verdict = "unchanged since it was written" if seal.holds else "CHANGED since it was written"
        sizes = (
            (f"; for {plural(seal.unhashed, 'file')} only the size was checked")
            if seal.unhashed
            else ""
        )
        print_line(f"{path}: {plural(seal.files, 'file')}, {human(seal.size)}: {verdict}{sizes}")
    if not seal.holds:
        raise click.exceptions.Exit(3)


def _require_torch(device: str) -> None:
    """Raise BridgeError early if --logits cannot run."""
    try:
        import torch
    except ImportError:
        raise missing("--logits computes with torch, which is missing", "verify") from None
    if device == "cuda" and not torch.cuda.is_available():
        raise BridgeError(
            "--device cuda: torch finds no CUDA device. Leave the option out to use the CPU."
        )


def _computation(
    comparison: Comparison, tokens: str | None, device: str
) -> Callable[[], dict[str, Agreement]]:
    """What computes and compares the logits, after the input was read."""
    from neox_bridge.layouts.stored_model import StoredModel
    from neox_bridge.verification.tokens import read_tokens

    first, second = comparison.source, comparison.target
    if isinstance(first, StoredModel) or isinstance(second, StoredModel):
        from neox_bridge.verification.stored_logits import compare_stored_logits

        assert isinstance(first, StoredModel)
        assert isinstance(second, StoredModel)
        # before the tensors are compared, since it may be refused
        agreements = compare_stored_logits(first, second, tokens, device)
        return lambda: agreements
    inputs = read_tokens(tokens, (first, second))
    return lambda: _computed(first, second, inputs, device)


def _computed(
    first: Checkpoint, second: Checkpoint, inputs: TokenInput, device: str
) -> dict[str, Agreement]:
    """Compare the logits of both models, and of the first model with recorded logits, if any."""
    from neox_bridge.verification.logits import compare_logits, compare_recorded

    agreements = {"logits": compare_logits(first, second, inputs.tokens, device)}
    if inputs.recorded is not None:
        recorded = compare_recorded(first, inputs.tokens, inputs.recorded, device)
        agreements["recorded"] = recorded
    return agreements


def _tell_load_changes(of: str, agreement: Agreement) -> None:
    print_line(f"{of}: logits: transformers loads other models than the files: CANNOT BE COMPARED")
    for change in agreement.load_changes:
        what = {
            "initialized": "initializes randomly, because the files do not contain them",
            "ignored": "ignores, because its class does not have them",
        }[change.kind]
        print_line(f"  {change.path}: transformers {what}: {some(list(change.keys))}")


def _tell_agreement(of: str, agreement: Agreement) -> None:
    verdict = "the same model" if agreement.agrees else "ANOTHER MODEL"
    print_line(
        f"{of}: logits of {plural(agreement.tokens, 'token')} differ by {agreement.largest:.3g} at "
        f"most (relative {agreement.relative:.2g}, mean {agreement.mean:.3g}), KL "
        f"{agreement.kl:.2g}, top-1 {agreement.top1:.1%}: {verdict}"
    )
    if agreement.place:
        print_line(
            f"  first difference: {agreement.place}, by {agreement.apart:.2g} of its largest value"
        )
    for cause in agreement.causes:
        tail = "; no conversion can remove this difference" if cause.inherent else ""
        print_line(f"  likely cause: {cause.cause}: {cause.text}{tail}")
    if agreement.place and not agreement.explained:
        more = (
            ("this does not explain everything")
            if agreement.causes
            else "no known cause explains it"
        )
        print_line(f"  {more}: compare the tensors above, and the configs")


def _tell_non_finite(of: str, source: str, other: str, agreement: Agreement) -> None:
    odd = agreement.non_finite
    assert odd is not None
    where = f"in {source} alone" if odd.first else f"in {other} alone"
    where = "on both sides, but not at the same places" if odd.first and odd.second else where
    verdict = "ANOTHER MODEL"
    if odd.same_places:
        where, verdict = "at the same places on both sides", "CANNOT BE COMPARED"
    print_line(
        f"{of}: logits of {plural(odd.tokens, 'token')} are NaN or infinite {where}: {verdict}"
    )
    if not odd.tensor:
        print_line(
            f"  all weights are finite; the first non-finite values are in {agreement.place}"
        )
        return
    counts = [f"{odd.tensor_first:,} in {source}"]
    if other != "the recorded logits":
        counts.append(f"{odd.tensor_second:,} in {other}")
    print_line(f"  first non-finite weight: {odd.tensor} (non-finite values: {', '.join(counts)})")
