"""``neox-bridge verify`` and ``neox-bridge diff``."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

from neox_bridge.cli import plotting, values
from neox_bridge.cli.asked import given
from neox_bridge.cli.output import print_json, print_line, tell_findings
from neox_bridge.cli.progress import progress_bar
from neox_bridge.errors import BridgeError, UsageError
from neox_bridge.wording import human, plural

if TYPE_CHECKING:
    from neox_bridge.layouts.checkpoint import Checkpoint
    from neox_bridge.verification.logits import Agreement
    from neox_bridge.verification.tokens import Input

Workers = Annotated[int | None, typer.Option(min=1, metavar="N", help="Threads that compare.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def verify(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The checkpoint it came from.")],
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[DST]",
            help="What was made of it. Alone, SRC is something that neox-bridge wrote, compared "
            "with the hashes in its neox_bridge.json.",
        ),
    ] = None,
    config: values.Configs = None,
    gqa_order: values.GqaOrder = None,
    optimizer: Annotated[
        bool, typer.Option("--optimizer", help="Optimizer states of two GPT-NeoX checkpoints too.")
    ] = False,
    logits: Annotated[
        bool, typer.Option("--logits", help="Compute both models too, and say where they part.")
    ] = False,
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|TEXT",
            help="What --logits runs: ids (.npy, .npz, .json) or text; else made-up ids. `logits` "
            "in an .npz are compared with those of SRC.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            **values.one_of("cpu", "cuda"), help="Where --logits computes; cpu by default."
        ),
    ] = None,
    max_workers: Workers = None,
    as_json: AsJson = False,
    quiet: values.Quiet = False,
) -> None:
    """Say whether DST is SRC: every tensor bit by bit, the padding, the ranks, the config.

    Declared changes are no differences: a cast, padding, rows cut to the tokenizer, norms written
    twice, biases spread over ranks. `convert` does this by itself.

    \b
    Examples:
      neox-bridge verify pythia-410m pythia-neox
      neox-bridge verify pythia-410m pythia-neox --logits --tokens 'The quick brown fox'
      neox-bridge verify pythia-neox

    Exit codes: 0 it is, 3 it isn't or can't be compared, 1 error.
    """
    from dataclasses import asdict, replace

    from neox_bridge.layouts.open import check_configs_used, open_with
    from neox_bridge.optimizer.masters import as_it_was_converted
    from neox_bridge.planning.option_checks import check_gqa_order, check_optimizer
    from neox_bridge.verification.verify import describe
    from neox_bridge.verification.verify import verify as compare

    if not logits and (named := given(tokens=tokens, device=device)):
        raise UsageError(named, "only for --logits", "Add --logits.")
    if target is None:
        if named := given(logits=logits, gqa_order=gqa_order, optimizer=optimizer, configs=config):
            raise UsageError(
                named, "only for two checkpoints, and DST is missing", "Name DST as well."
            )
        _verify_alone(source, max_workers, as_json, quiet)
        return
    device = device or "cpu"
    if logits:
        _require_torch(device)
    first = open_with(source, config or (), gqa_order=gqa_order)
    second = open_with(target, config or ())
    check_configs_used(config or (), first, second)
    check_gqa_order(gqa_order, first)
    check_optimizer(optimizer, first, second)
    first, said = as_it_was_converted(first, second)
    if optimizer:
        from neox_bridge.optimizer.masters import with_states

        first, second = with_states(first), with_states(second)
    inputs = _tokens(tokens, first, second) if logits else None
    with progress_bar(second.size, "verifying", quiet) as progress:
        found = compare(first, second, workers=max_workers, progress=progress)
    found = replace(found, findings=(*said, *found.findings))
    agreements = _computed(first, second, inputs, device) if inputs else {}
    holds = found.holds and all(agreement.agrees for agreement in agreements.values())
    if as_json:
        more = {
            key: {"agrees": a.agrees, "comparable": a.comparable, **asdict(a)}
            for key, a in agreements.items()
        }
        print_json({**asdict(found), "verdict": found.verdict, "holds": holds, **more})
    elif not quiet:
        tell_findings(found.findings, quiet)
        for difference in found.differences:
            print_line(describe(difference))
        what = f"{plural(found.tensors, 'tensor')}, {human(found.size)}"
        print_line(f"{target}: {what}: {found.verdict}")
        for key, agreement in agreements.items():
            of = {"logits": target, "recorded": f"recorded logits, and {source}"}[key]
            other = {"logits": target, "recorded": "the recorded logits"}[key]
            if agreement.non_finite is not None:
                _tell_non_finite(of, source, other, agreement)
            else:
                _tell_agreement(of, agreement)
    if not holds:
        raise typer.Exit(3)


_NOTES = {
    "edited": " since it was written; it is yours to edit",
    "added": " since the checkpoint was written; whatever loads the folder may read it",
    "extra": " since the checkpoint was written; nothing that loads the folder reads it",
}


def _verify_alone(path: str, workers: int | None, as_json: bool, quiet: bool) -> None:
    from dataclasses import asdict

    from neox_bridge.layouts.interrupted import interrupted
    from neox_bridge.verification.sealed import check_seal, find_record

    record = find_record(path)
    home = os.path.dirname(record)
    tell_findings([*interrupted(home), *interrupted(os.path.dirname(home))], quiet)
    with progress_bar(None, "reading", quiet) as progress:
        found = check_seal(record, progress, workers)
    if as_json:
        print_json(asdict(found) | {"holds": found.holds})
    elif not quiet:
        for change in found.changes:
            print_line(f"{change.kind}: {change.path}{_NOTES.get(change.kind, '')}")
        verdict = "as it was written" if found.holds else "NOT what was written"
        sizes = f"; of {plural(found.unhashed, 'file')} only the size" if found.unhashed else ""
        print_line(f"{path}: {plural(found.files, 'file')}, {human(found.size)}: {verdict}{sizes}")
    if not found.holds:
        raise typer.Exit(3)


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


def _tokens(told: str | None, first: "Checkpoint", second: "Checkpoint") -> "Input":
    from neox_bridge.verification.tokens import read_tokens

    return read_tokens(told, (first, second))


def _computed(
    first: "Checkpoint", second: "Checkpoint", given: "Input", device: str
) -> "dict[str, Agreement]":
    """What both compute; and, where logits came with the tokens, what the first does beside."""
    from neox_bridge.verification.logits import compare_logits, compare_recorded

    found = {"logits": compare_logits(first, second, given.tokens, device)}
    if given.recorded is not None:
        found["recorded"] = compare_recorded(first, given.tokens, given.recorded, device)
    return found


def _tell_agreement(of: str, agreement: "Agreement") -> None:
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


def _tell_non_finite(of: str, source: str, other: str, agreement: "Agreement") -> None:
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


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A checkpoint of any kind.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    tensor: Annotated[
        str, typer.Option(metavar="GLOB", help="Only tensors of such names, quoted: '*.bias'.")
    ] = "*",
    optimizer: Annotated[
        bool, typer.Option("--optimizer", help="Optimizer states of both too, as 'exp_avg: NAME'.")
    ] = False,
    config: values.Configs = None,
    gqa_order: values.GqaOrder = None,
    stat: Annotated[bool, typer.Option("--stat", help="Only how many differ.")] = False,
    plot: Annotated[
        str | None,
        typer.Option(
            **plotting.plot_file(), help="Draw the relative differences, block by block, too."
        ),
    ] = None,
    max_workers: Workers = None,
    as_json: AsJson = False,
    quiet: values.Quiet = False,
) -> None:
    """Compare two checkpoints in the model's own tensors, whatever their kinds and layouts.

    Largest relative difference first. Names are Hugging Face's.

    \b
    Examples:
      neox-bridge diff run/global_step1000 run/global_step2000 --tensor '*layernorm*'
      neox-bridge diff pythia-410m pythia-neox --stat --plot differences.svg

    Exit codes: 0 equal, 3 different, 1 error.
    """
    from dataclasses import asdict, replace

    from neox_bridge.layouts.open import check_configs_used, open_with
    from neox_bridge.planning.option_checks import check_gqa_order, check_optimizer
    from neox_bridge.verification.diff import diff as compare
    from neox_bridge.verification.verify import describe

    plotting.prepare(plot)
    a, b = (open_with(path, config or (), gqa_order=gqa_order) for path in (first, second))
    check_configs_used(config or (), a, b)
    check_gqa_order(gqa_order, a, b)
    check_optimizer(optimizer, a, b)
    if optimizer:
        from neox_bridge.optimizer.masters import with_states

        a, b = with_states(a), with_states(b)
    with progress_bar(a.size + b.size, "comparing", quiet) as progress:
        found = compare(a, b, pattern=tensor, workers=max_workers, progress=progress)
    if plot:
        from neox_bridge.verification.plots import plot_differences

        plot_differences(found, plot)
    apart = [difference for difference in found if difference.kind != "equal"]
    if as_json:
        print_json({"equal": not apart, "tensors": [asdict(difference) for difference in found]})
    elif not quiet:
        from neox_bridge.layouts.unknown_keys import undecided

        # only tensors are compared here, so these change no verdict
        tell_findings((replace(f, severity="warning") for f in undecided(a, b)), quiet)
        for difference in () if stat else apart:
            print_line(describe(difference))
        print_line(
            f"{plural(len(found), 'tensor')}: {len(found) - len(apart)} equal, {len(apart)} not"
        )
    if apart:
        raise typer.Exit(3)
