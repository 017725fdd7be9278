"""Writes the defaults of the GPT-NeoX that trained a run into the yml that continues it."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from neox_bridge.findings import Finding
from neox_bridge.frameworks.eras import Era, known_keys
from neox_bridge.frameworks.setting_defaults import (
    COMPUTED_KEYS,
    defaults_left_out,
    predates_changes,
    trained_before_changes,
)
from neox_bridge.layouts.checkpoint import Checkpoint


def with_default_settings(
    checkpoint: Checkpoint, version: str, era: Era | None
) -> tuple[Checkpoint, tuple[Finding, ...]]:
    """Add the defaults that the run trained with to its settings. Returns the run and findings.

    A default is only added if that of the other GPT-NeoX differs.

    Args:
        checkpoint: A GPT-NeoX checkpoint.
        version: The version of DeepSpeed that wrote it; "" if its files do not contain one.
        era: The era of the target; None for the GPT-NeoX of the source.
    """
    if era is None:
        return checkpoint, ()
    old = trained_before_changes(version, checkpoint.neox_state.mlp_names)
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


def computed_findings(raw: Mapping[str, Any], effective: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield a warning for each key of the yml that had no effect in GPT-NeoX.

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
