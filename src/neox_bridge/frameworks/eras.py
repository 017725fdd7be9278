"""How GPT-NeoX trees of each era name, store and order tensors."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from neox_bridge.errors import BridgeError
from neox_bridge.frameworks.change import Change
from neox_bridge.frameworks.changes import HISTORY
from neox_bridge.frameworks.deepspeed import StatesForm
from neox_bridge.frameworks.keys import neox_keys
from neox_bridge.tensors.fused import GqaOrder

MlpNames = Literal["linear", "dense"]
InvFreq = Literal["omit", "store"]
# How a tree keeps attention.rotary_emb.inv_freq: in the state dict always, or if
# rotary_save_freqs_buffer says so, or never. "either": a load hook accepts both kinds.
Buffer = Literal["always", "flag", "never", "either"]
RmsEps = Literal["inside", "outside"]
# Biases of a gated MLP in a tree: none; none for swiglu and required for other activations; or as
# the yml's use_bias_in_mlp says.
GatedBiases = Literal["none", "by activation", "optional"]
FLAG = "rotary_save_freqs_buffer"


@dataclass(frozen=True, slots=True)
class Era:
    """A span of GPT-NeoX's history, as plans need it. The changes are in ``changes_neox.py``.

    Attributes:
        name: Such as "2024-03", or the path of a tree.
        until: When such trees existed, for sentences.
        buffer: How the trees keep inv_freq.
        mlp_names: "linear" are mlp.linear1 and linear2, "dense" mlp.dense_h_to_4h and
            dense_4h_to_h, and for a gated MLP w1, w2 and w3 (neox-mlp-names).
        gqa_order: A rank's rows of grouped-query attention: "grouped", all q, all k, all v, or
            "interleaved" by query head. The shapes are the same (neox-gqa-order).
        rms_eps: Where RMSNorm adds its epsilon (neox-rms-epsilon).
        plain_mlp_4h: Whether a plain MLP is always 4 times as wide as the model (neox-mlp-width).
        gated_biases: "none" with LLaMAParallelMLP; "by activation" where
            ParallelTransformerLayer.forward asserts that a swiglu has none and adds those of others
            without asking (neox-mlp-names, neox-gated-biases). Run in the trees of 2024-10 and
            2026-05.
        states: How its DeepSpeed cuts the optimizer's states over ranks: see ``StatesForm``.
        rope_tables_fp32: Whether the tables of RoPE are computed in fp32 (neox-rope-fp32).
        transformer_engine: Whether layers may be Transformer Engine's (neox-transformer-engine).
        deepspeed: The version of DeeperSpeed that it requires (requirements/requirements.txt).
        keys: The yml keys that it takes, where they were read from a tree; see ``known_keys``.
    """

    name: str
    until: str
    buffer: Buffer
    mlp_names: MlpNames
    gqa_order: GqaOrder
    rms_eps: RmsEps
    plain_mlp_4h: bool
    gated_biases: GatedBiases
    rope_tables_fp32: bool
    transformer_engine: bool
    states: StatesForm
    deepspeed: str
    keys: frozenset[str] | None = None

    @property
    def inv_freq(self) -> InvFreq:
        """What the trees expect if the yml does not say otherwise."""
        return "store" if self.buffer == "always" else "omit"

    @property
    def inv_freq_key(self) -> bool:
        """Whether the trees know rotary_save_freqs_buffer. They reject unknown keys."""
        return self.buffer in ("flag", "either") and FLAG in known_keys(self)

    @property
    def inv_freq_either(self) -> bool:
        """Whether a load hook accepts checkpoints with and without the buffer."""
        return self.buffer == "either"

    @property
    def predates_deepspeed_06(self) -> bool:
        """Whether its DeepSpeed knows neither ds_version nor states that are not elastic."""
        return self.states == "sub-partitions"


_BEFORE_ALL: Mapping[str, Any] = {
    "buffer": "always",
    "mlp_names": "dense",
    "gqa_order": "interleaved",
    "rms_eps": "outside",
    "plain_mlp_4h": True,
    "gated_biases": "none",
    "rope_tables_fp32": False,
    "transformer_engine": False,
    "states": "sub-partitions",
    "deepspeed": "0.3.15",
}


def merged(changes: Iterable[Change]) -> tuple[Change, ...]:
    """The changes of GPT-NeoX that are merged, not only proposed."""
    return tuple(c for c in changes if c.framework == "gpt-neox" and not c.proposed)


MERGED = merged(reversed(HISTORY))  # oldest first
_ENDS = tuple(change for change in MERGED if change.ends_era)
_NEWEST_ERA = "today"


def facts_after(changes: Iterable[Change]) -> dict[str, Any]:
    """The fields of ``Era`` in a tree that has these changes, and none of the others."""
    facts = dict(_BEFORE_ALL)
    for change in changes:
        facts |= change.sets
    return facts


def era_after(changes: Iterable[Change]) -> str:
    """The name of the era in which the newest tree has these changes."""
    ended = {change.ends_era for change in changes}
    return next((end.ends_era for end in _ENDS if end.ends_era not in ended), _NEWEST_ERA)


def changes_of(era: str) -> tuple[Change, ...]:
    """The changes that the last tree of an era has."""
    end = next((change.date for change in _ENDS if change.ends_era == era), "")
    return tuple(change for change in MERGED if not end or change.date < end)


def _eras() -> Iterator[Era]:
    untils = ["of release v1.0 (2023-03-07) and before"]
    for before, end in pairwise(_ENDS):
        since = "" if len(untils) == 1 else f"from {before.date[:7]} to "
        day = end.date[: 7 if since else 10]
        untils.append(f"{since}before {end.commit} of {day}")
    untils.append(f"since {_ENDS[-1].date[:7]}")
    names = (*(end.ends_era for end in _ENDS), _NEWEST_ERA)
    for name, until in zip(names, untils, strict=True):
        yield Era(name, until, **facts_after(changes_of(name)))


ERAS: tuple[Era, ...] = tuple(_eras())
TODAY = ERAS[-1]
LATER_ERAS = tuple(era for era in ERAS if not era.predates_deepspeed_06)  # since v2.0


def era_named(name: str) -> Era:
    """A span of GPT-NeoX's history, for ``Options.era`` and ``Resharding.era``.

    Examples:
        >>> from neox_bridge import era_named
        >>> era_named("neox@2024-03").name
        '2024-03'

    Args:
        name: Such as ``neox@2024-03``, ``2024-03``, ``v1.0`` or ``today``.

    Raises:
        BridgeError: There is no such era. The message names the eras.
    """
    short = name.removeprefix("neox@")
    for era in ERAS:
        if era.name == short:
            return era
    known = ", ".join(f"neox@{era.name} ({era.until})" for era in ERAS)
    raise BridgeError(f"`era={name}`: unknown GPT-NeoX. Valid values: {known}.")


def span_of(era: Era) -> str:
    """The name of the era in ``ERAS`` that a tree, which may be of a day, belongs to."""
    short = era.name.removeprefix("neox@")
    if any(known.name == short for known in ERAS):
        return short
    equal = {e.name: sum(getattr(era, f) == getattr(e, f) for f in _BEFORE_ALL) for e in ERAS}
    return max(reversed(equal), key=lambda name: equal[name])


def known_keys(era: Era) -> frozenset[str]:
    """The yml keys that a tree of this era takes. It rejects all others."""
    return neox_keys(era.name) if era.keys is None else era.keys


def mlp_biases(
    rule: GatedBiases, activation: str, *, gated: bool, parallel: bool
) -> Literal["required", "none", "optional"]:
    """Whether a tree can run an MLP with biases, and without them.

    activation: as the yml of a tree since 2024-09 spells it. parallel: with gpt_j_residual, whose
    branch asks for a bias first (neox-gpt-j-no-mlp-bias).
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
    oldest = inv_freq == "store" and FLAG not in raw
    return era_named("2024-03" if oldest else "2024-09")
