"""What ``neox-bridge inspect`` prints about optimizer states."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from neox_bridge.wording import plural

if TYPE_CHECKING:
    from neox_bridge.findings import Finding
    from neox_bridge.layouts.checkpoint import Checkpoint
    from neox_bridge.optimizer.states import Optimizer


def states_facts(checkpoint: "Checkpoint") -> tuple[dict[str, Any] | None, list["Finding"]]:
    """The kind of the optimizer states and what can resume them, as plain data, with findings.

    Reads only the first state file, without its tensors. Returns None if there is no such file, or
    if it cannot be read, which is reported as a finding.
    """
    from neox_bridge.errors import BridgeError
    from neox_bridge.findings import Finding
    from neox_bridge.optimizer.saved_states import saved_states

    try:
        states = saved_states(checkpoint)
    except BridgeError as error:
        return None, [Finding("optimizer-unreadable", "warning", str(error))]
    if states is None:
        return None, []
    findings = []
    if states.incomplete and not (checkpoint.neox and checkpoint.neox.missing_ranks):
        findings.append(Finding("optimizer-incomplete", "warning", states.incomplete))
    if states.form is None or states.resumption is None:
        return None, findings
    form, resumption = states.form, states.resumption
    return {
        "kind": form.kind,
        "zero_stage": states.stage,
        "data_parallel": form.dp,
        "intervals": list(form.intervals),
        "deepspeed": states.version or None,
        "written_by": form.generation.releases,
        "resumed_by": {
            "deepspeed": resumption.releases,
            "data_parallel": "any" if resumption.any_dp else form.dp,
            "setting": resumption.setting or None,
            "today": not states.refusal,
            "keeps_step": resumption.keeps_step,
        },
        "complete": not states.incomplete,
    }, findings


def states_lines(
    facts: dict[str, Any], path: str, options: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """``states_facts`` as text. options: those needed to open the checkpoint again."""
    ranks = plural(facts["data_parallel"], "data-parallel rank")
    most = max(facts["intervals"], default=1)
    parts = f" in up to {most} communication intervals" if most > 1 else ""
    writer = (facts["deepspeed"] and f"DeepSpeed {facts['deepspeed']}") or facts["written_by"]
    by = facts["resumed_by"]
    where = "any number of data-parallel ranks" if by["data_parallel"] == "any" else ranks
    lines = [
        (
            "saved as",
            f"{facts['kind']} ZeRO {facts['zero_stage']} states of {ranks}{parts}, as {writer} "
            "saves them",
        ),
        (
            "resumed by",
            f"{by['deepspeed']}, on {where}"
            + (f", with zero_optimization {by['setting']}" if by["setting"] else "")
            + ("" if by["keeps_step"] else "; Adam's step count restarts there"),
        ),
    ]
    if not by["today"] and facts["complete"]:
        from neox_bridge.optimizer.saved_states import reshard_command

        command = reshard_command(path, options)
        lines.append(("", f"today's GPT-NeoX cannot resume them; to convert them: {command}"))
    return lines


def optimizer_lines(facts: dict[str, Any], masters: dict[str, Any] | None) -> list[tuple[str, str]]:
    """The lines that ``--optimizer`` adds: parameter groups, and weights that match their masters.

    masters: the result of ``masters_facts``, or None if they were not compared.
    """
    ranks = plural(facts["data_parallel"], "data-parallel rank")
    lines = [("states", f"ZeRO {facts['zero_stage']}, {ranks}: {', '.join(facts['states'])}")]
    for group in facts["groups"]:
        named = {key: group.get(key) for key in ("lr", "weight_decay", "step")} | group["state"]
        numbers = [f"{k} {v:.4g}" for k, v in named.items() if isinstance(v, int | float)]
        tensors = plural(len(group["tensors"]), "tensor")
        lines.append(("", ", ".join([f"{group.get('name', 'group')}: {tensors}", *numbers])))
    if masters is not None:
        count, differing = masters["compared"], len(masters["differing"])
        equal = (
            f"{count - differing} of {plural(count, 'weight')} equal their rounded master weights"
        )
        lines.append(("masters", equal))
    return lines


def masters_facts(
    checkpoint: "Checkpoint", optimizer: "Optimizer", workers: int | None
) -> tuple[dict[str, Any] | None, list["Finding"]]:
    """Compare every weight with its fp32 master weight. Returns plain data and findings."""
    from neox_bridge.cli.progress import progress_bar
    from neox_bridge.verification.optimizer import master_findings, rounded_masters

    with progress_bar(checkpoint.size, "comparing", False) as progress:
        result = rounded_masters(checkpoint, optimizer, workers=workers, progress=progress)
    if result is None:
        return None, []
    facts = {"compared": result.compared, "differing": list(result.differing)}
    return facts, list(master_findings(result, checkpoint.path))
