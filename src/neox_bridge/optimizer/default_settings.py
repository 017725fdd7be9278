"""Writes the defaults of the GPT-NeoX that trained a run into the yml that resumes it."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from neox_bridge.findings import Finding
from neox_bridge.frameworks.deepspeed import release_of
from neox_bridge.frameworks.eras import Era, known_keys
from neox_bridge.frameworks.setting_defaults import (
    COMPUTED_KEYS,
    defaults_left_out,
    predates_changes,
    run_predates_changes,
)
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.optimizer.current_form import writer_version
from neox_bridge.optimizer.states import Optimizer
from neox_bridge.planning.neox_files import WRITER


def with_own_defaults(
    checkpoint: Checkpoint, optimizer: Optimizer, era: Era | None
) -> tuple[Checkpoint, tuple[Finding, ...]]:
    """Add the defaults that the run trained with to its settings. Returns the run and findings.

    Only where the defaults of another GPT-NeoX differ. era: of the target; None for one like the
    source.
    """
    if era is None:
        return checkpoint, ()
    version = writer_version(optimizer) or ""
    old = _predates_changes(version)
    if old is not None and old == predates_changes(era):
        return checkpoint, ()
    left_out = defaults_left_out(checkpoint.raw, old=bool(old))
    settings = {key: value for key, value in left_out.items() if key in known_keys(era)}
    if not settings:
        return checkpoint, ()
    listed = ", ".join(f"{key}: {value:g}" for key, value in settings.items())
    finding = Finding(
        "defaults-kept",
        "info",
        "the yml does not set keys whose GPT-NeoX defaults changed in 2023. The new yml sets "
        f"them to the defaults of the GPT-NeoX that wrote the run: {listed}",
    )
    if old is None:
        finding = Finding(
            "defaults-unknown",
            "warning",
            "the yml does not set keys whose GPT-NeoX defaults changed from 2023-03-26 to "
            f"2023-12-26, and DeepSpeed {version} does not show which GPT-NeoX wrote the run. The "
            f"new yml sets them to the later defaults: {listed}",
            "edit the new yml if the GPT-NeoX of the run was older",
        )
    return replace(checkpoint, raw={**settings, **checkpoint.raw}), (finding,)


def _predates_changes(version: str) -> bool | None:
    """Whether a run trained with the older defaults; None if its version does not tell.

    version: ``ds_version`` of its files, "" for none.
    """
    # neox-bridge starts runs with every default written into their yml where it was another one
    if version.startswith(WRITER):
        return False
    if version and release_of(version) is None:
        return None
    return run_predates_changes(release_of(version))


def computed_findings(raw: Mapping[str, Any], effective: Mapping[str, Any]) -> Iterator[Finding]:
    """A warning for each key of the yml that had no effect in GPT-NeoX.

    effective: the effective values, by the keys that GPT-NeoX reads.
    """
    for key, source in COMPUTED_KEYS.items():
        value = raw.get(key)
        if value is not None and source in effective and value != effective[source]:
            yield Finding(
                "computed-key",
                "warning",
                f"{key}: {value} in the yml had no effect: GPT-NeoX computes it from {source}, "
                f"which is {effective[source]}",
            )
