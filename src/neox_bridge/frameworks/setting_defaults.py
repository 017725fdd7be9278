"""GPT-NeoX's defaults that changed, and settings that it computes whatever a yml says.

A run whose yml leaves a setting out trains with the default of the GPT-NeoX that runs it. Sources:
megatron/neox_arguments/neox_args.py and deepspeed_args.py of v1.0 and of the commits below; values
of v1.0 were seen by running its NeoXArgs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class DefaultChange:
    """A default that changed.

    Attributes:
        key: Of the yml.
        before: The default of GPT-NeoX v1.0.
        since: The default since the commit.
        commit: That changed it, with its date.
        only_with: A key without which the setting does nothing; "" where there is none.
    """

    key: str
    before: float
    since: float
    commit: str
    only_with: str = ""


_OF_DECEMBER_2023 = "e5a7ea71 (#1107, 2023-12-26)"
DEFAULT_CHANGES = (
    DefaultChange("gradient_clipping", 0.0, 1.0, "5c5fb945 (#819, 2023-03-26)"),
    DefaultChange("hidden_dropout", 0.1, 0.0, _OF_DECEMBER_2023),
    DefaultChange("attention_dropout", 0.1, 0.0, _OF_DECEMBER_2023),
    DefaultChange("weight_decay", 0.01, 0.1, _OF_DECEMBER_2023),
    DefaultChange(
        "weighted_sampler_alpha", 0.3, 1.0, _OF_DECEMBER_2023, only_with="weight_by_num_documents"
    ),
)
# the release of DeepSpeed from which on a run's GPT-NeoX is of after these changes: of 2024-01
_AFTER = (0, 13, 0)
_BEFORE = (0, 8, 0)  # GPT-NeoX v2.0 came with 0.8.3 in 2023-03

# calculate_derived of neox_arguments/arguments.py sets the first from the second, so that its value
# in a yml has no effect: `gas` until 91c44bc3 (#1144, 2024-02-05), which removed it
COMPUTED_KEYS = {"gas": "gradient_accumulation_steps", "clip_grad": "gradient_clipping"}
# how GPT-NeoX divides the output layer over ranks; v1.0's default was "row", until 25e1fb05
# (2023-05-02), since which "row" ends the program (#905)
OUTPUT_LAYER = "output_layer_parallelism"
COLUMN = "column"


def defaults_left_out(raw: Mapping[str, Any], *, old: bool) -> dict[str, float]:
    """The defaults with which a run trains whose yml leaves these settings out.

    Args:
        raw: The merged yml.
        old: Whether the run is of GPT-NeoX v1.0; otherwise it is of one after all the changes.
    """
    return {
        change.key: change.before if old else change.since
        for change in DEFAULT_CHANGES
        if raw.get(change.key) is None and (not change.only_with or raw.get(change.only_with))
    }


def predates_changes(release: tuple[int, int, int] | None) -> bool | None:
    """Whether a run is of before the changes, by its DeepSpeed's release; None if that is unknown.

    Args:
        release: None where the files name no version, as those of GPT-NeoX v1.0.
    """
    if release is None or release < _BEFORE:
        return True
    return False if release >= _AFTER else None
