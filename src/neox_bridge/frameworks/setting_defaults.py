"""GPT-NeoX's defaults that changed, and settings that it computes whatever a yml says.

A run whose yml leaves a setting out trains with the default of the GPT-NeoX that runs it. Sources:
megatron/neox_arguments/neox_args.py and deepspeed_args.py.
"""

from collections.abc import Mapping
from typing import Any

from neox_bridge.frameworks.deepspeed import release_of
from neox_bridge.frameworks.eras import MERGED, Era, MlpNames

WRITER = "neox-bridge "  # before its version, in place of DeepSpeed's in what it starts
_CHANGED = {key: values for change in MERGED for key, values in change.defaults.items()}
DROPOUT = ("hidden_dropout", "attention_dropout")
# a key without which a setting does nothing
_ONLY_WITH = {"weighted_sampler_alpha": "weight_by_num_documents"}
# the release of DeepSpeed from which on a run's GPT-NeoX is of after these changes: of 2024-01
_AFTER = (0, 13, 0)
_BEFORE = (0, 8, 0)  # GPT-NeoX v2.0 came with 0.8.3 in 2023-03
# trees require this DeeperSpeed since 2024-03, which is after the changes
_REQUIRED_AFTER = (0, 12, 4)

# calculate_derived of neox_arguments/arguments.py sets the first from the second, so that its value
# in a yml has no effect: `gas` until neox-gas-key, which removed it
COMPUTED_KEYS = {"gas": "gradient_accumulation_steps", "clip_grad": "gradient_clipping"}
# how GPT-NeoX divides the output layer over ranks; v1.0's default was "row", which ends the
# program since #905 (2023-05-02)
OUTPUT_LAYER = "output_layer_parallelism"
COLUMN = "column"


def defaults_left_out(raw: Mapping[str, Any], *, old: bool) -> dict[str, float]:
    """The defaults with which a run trains whose yml leaves these settings out.

    old: whether the run is of GPT-NeoX v1.0; otherwise it is of one after all the changes.
    """
    return {
        key: before if old else since
        for key, (before, since) in _CHANGED.items()
        if raw.get(key) is None and (key not in _ONLY_WITH or raw.get(_ONLY_WITH[key]))
    }


def trained_before_changes(version: str, mlp_names: MlpNames) -> bool | None:
    """Whether a run trained with the older defaults; None if its files do not tell.

    version: ``ds_version`` of its files, "" for none, as those of GPT-NeoX v1.0.
    """
    # neox-bridge starts runs with every default written into their yml where it was another one
    if version.startswith(WRITER) or mlp_names == "linear":
        return False
    release = release_of(version)
    if release is None:
        return None if version else True
    if release < _BEFORE:
        return True
    return False if release >= _AFTER else None


def predates_changes(era: Era) -> bool | None:
    """Whether the trees of an era have the older defaults; None if only some of them do."""
    if era.predates_deepspeed_06:
        return True
    release = release_of(era.deepspeed)
    return False if release is not None and release >= _REQUIRED_AFTER else None
