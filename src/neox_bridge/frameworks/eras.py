"""How GPT-NeoX trees of some time name, store and order things."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from neox_bridge.errors import BridgeError
from neox_bridge.frameworks.deepspeed import StatesForm
from neox_bridge.frameworks.keys import neox_keys
from neox_bridge.tensors.fused import GqaOrder

MlpNames = Literal["linear", "dense"]
InvFreq = Literal["omit", "store"]
# biases of a gated MLP in a tree: it has none; swiglu has none and every other activation must have
# them; the yml's use_bias_in_mlp decides
GatedBiases = Literal["none", "by activation", "optional"]


@dataclass(frozen=True, slots=True)
class Era:
    """A span of GPT-NeoX's history.

    mlp_names: mlp.linear1/linear2 since 0d4bdb96 (2024-09, #1212), before it
        mlp.dense_h_to_4h/dense_4h_to_h.
    inv_freq: whether the tree expects the buffer: always before e109bf5e (2024-03, #1168), later
        only with rotary_save_freqs_buffer.
    inv_freq_key: whether the tree knows rotary_save_freqs_buffer (unknown keys are refused).
    plain_mlp_4h: the plain MLP is always 4 times as wide as the model.
    gqa_order: a rank's rows of grouped-query attention: "grouped", all q, all k, all v, since
        96c242eb (2024-11, #1315); "interleaved" by query head before. The shapes are the same.
    inv_freq_either: a load hook accepts checkpoints with and without the buffer.
    rms_eps: RMSNorm's epsilon is added "inside" the root since 4c9f1081 (2025-05, #1345).
    gated_biases: "none" with LLaMAParallelMLP, which 0d4bdb96 (2024-09, #1212) removed; "by
        activation" since then, as ParallelTransformerLayer.forward asserts that a swiglu has none
        and adds those of others without asking; "optional" since f5325805 (2024-11, #1325). Run in
        the trees of 2024-10 and 2026-05.
    states: how its DeepSpeed cuts the optimizer's states over ranks: see ``StatesForm``.
    deepspeed: the version of DeeperSpeed that it requires (requirements/requirements.txt).
    keys: the yml keys that it takes, where they were read from a tree; see ``known_keys``.
    """

    name: str
    until: str
    mlp_names: MlpNames
    inv_freq: InvFreq
    inv_freq_key: bool
    plain_mlp_4h: bool
    keys: frozenset[str] | None = None
    gqa_order: GqaOrder = "interleaved"
    rms_eps: Literal["inside", "outside"] = "outside"
    inv_freq_either: bool = False
    gated_biases: GatedBiases = "none"
    deepspeed: str = "0.16.5"
    states: StatesForm = "partitions"

    @property
    def predates_deepspeed_06(self) -> bool:
        """Whether its DeepSpeed knows neither ds_version nor states that are not elastic."""
        return self.states == "sub-partitions"


ERAS: tuple[Era, ...] = (
    Era(
        "v1.0",
        "of release v1.0 (2023-03-07) and before",
        "dense",
        "store",
        False,
        True,
        deepspeed="0.3.15",
        states="sub-partitions",
    ),
    Era(
        "2024-03", "before e109bf5e of 2024-03-04", "dense", "store", False, True, deepspeed="0.9.3"
    ),
    Era(
        "2024-09",
        "from 2024-03 to before 0d4bdb96 of 2024-09",
        "dense",
        "omit",
        True,
        True,
        deepspeed="0.12.4",
    ),
    Era(
        "2024-10",
        "from 2024-09 to before 96c242eb of 2024-11",
        "linear",
        "omit",
        True,
        False,
        gated_biases="by activation",
        deepspeed="0.12.4",
    ),
    Era(
        "today",
        "since 2024-11",
        "linear",
        "omit",
        True,
        False,
        gqa_order="grouped",
        rms_eps="inside",
        gated_biases="optional",
    ),
)
TODAY = ERAS[-1]
LATER_ERAS = tuple(era for era in ERAS if not era.predates_deepspeed_06)  # since v2.0
DENSE = {
    "mlp.linear1.weight": "mlp.dense_h_to_4h.weight",
    "mlp.linear1.bias": "mlp.dense_h_to_4h.bias",
    "mlp.linear2.weight": "mlp.dense_4h_to_h.weight",
    "mlp.linear2.bias": "mlp.dense_4h_to_h.bias",
}
LINEAR = {old: new for new, old in DENSE.items()}


def era_named(name: str) -> Era:
    """A span of GPT-NeoX's history, for ``Options.era`` and ``Resharding.era``.

    Args:
        name: Such as ``neox@2024-03``, ``2024-03``, ``v1.0`` or ``today``.

    Raises:
        BridgeError: There is no such era; the message names those that there are.
    """
    short = name.removeprefix("neox@")
    for era in ERAS:
        if era.name == short:
            return era
    known = ", ".join(f"neox@{era.name} ({era.until})" for era in ERAS)
    raise BridgeError(f"--for {name}: no such GPT-NeoX is known. Known are {known}.")


def known_keys(era: Era) -> frozenset[str]:
    """The yml keys that a tree of this era takes; it refuses all others."""
    return neox_keys(era.name) if era.keys is None else era.keys


def mlp_biases(
    rule: GatedBiases, activation: str, *, gated: bool, parallel: bool
) -> Literal["required", "none", "optional"]:
    """Whether a tree can run an MLP with biases, and without them.

    rule: the tree's ``gated_biases``. activation: as the yml of a tree since 2024-09 spells it.
    parallel: with gpt_j_residual, whose branch asks whether there is a bias (e37ad2f0, 2024-09).
    A plain MLP adds its bias without asking in every tree (ParallelMLP.forward).
    """
    if not gated:
        return "required"
    if rule == "none":
        return "none"
    if rule == "optional" or parallel:
        return "optional"
    return "none" if activation == "swiglu" else "required"


def fitting(mlp_names: MlpNames, inv_freq: InvFreq, raw: Mapping[str, object]) -> Era:
    """The era whose trees write such names and buffers; raw: the yml of the run, or nothing."""
    if mlp_names == "linear":
        return TODAY
    oldest = inv_freq == "store" and "rotary_save_freqs_buffer" not in raw
    return era_named("2024-03" if oldest else "2024-09")
