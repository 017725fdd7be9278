"""The settings of a run in the words of GPT-NeoX of another date."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neox_bridge.findings import Dropped
from neox_bridge.frameworks.eras import Era, known_keys
from neox_bridge.frameworks.setting_defaults import COMPUTED_KEYS
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.planning.neox_files import RankLayout
from neox_bridge.planning.neox_yml import is_elsewhere

INV_FREQ_FLAG = "rotary_save_freqs_buffer"


@dataclass(frozen=True)
class EraSettings:
    """The keys of a run's yml that GPT-NeoX of a date accepts.

    changed: those that say the same in other words there, with their new values. dropped: those
    that it refuses. None of them changes the model.
    """

    raw: Mapping[str, Any]
    changed: Mapping[str, Any]
    dropped: tuple[Dropped, ...]


def era_settings(checkpoint: Checkpoint, layout: RankLayout, era: Era | None) -> EraSettings:
    """The yml of a GPT-NeoX source for trees of an era; None keeps every key as it is."""
    raw = checkpoint.raw
    if era is None:
        return EraSettings(raw, {}, ())
    known = known_keys(era)
    kept = dict(raw)
    written = checkpoint.architecture.write_neox(checkpoint.config, layout.old_names)
    changed = {
        key: value
        for key, value in written.items()
        if key in checkpoint.architecture.era_keys and key in known
    }
    if layout.inv_freq == "store" and era.inv_freq_key:
        changed[INV_FREQ_FLAG] = True
    else:
        kept.pop(INV_FREQ_FLAG, None)
    return EraSettings(
        {key: value for key, value in kept.items() if key in known and key not in changed},
        changed,
        tuple(
            Dropped(f"yml: {key}", reason_dropped(key, era.name), "setting")
            for key in sorted(kept)
            if key not in known and not is_elsewhere(key)
        ),
    )


def reason_dropped(key: str, era: str) -> str:
    """Why a key is not in the yml for trees of an era."""
    if source := COMPUTED_KEYS.get(key):
        return f"GPT-NeoX computes it from {source}, so that it had no effect"
    return f"GPT-NeoX of {era} refuses it"
