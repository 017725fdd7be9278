"""What a GPT-NeoX tree or a transformers version expects of a checkpoint, as data."""

from dataclasses import dataclass, field
from typing import Literal

from neox_bridge.frameworks.deepspeed import StatesForm
from neox_bridge.frameworks.eras import Era, GatedBiases, MlpNames

# how a tree keeps attention.rotary_emb.inv_freq: always in the state dict, when
# rotary_save_freqs_buffer says so, never; "either": a load hook accepts both kinds
Buffer = Literal["always", "flag", "never", "either"]


@dataclass(frozen=True, slots=True)
class TreeFacts:
    """A GPT-NeoX source tree, read by its syntax alone.

    path: the tree, or "neox@2024-03" for one known by its date.
    gqa_order: rows of a rank's grouped-query projection: "grouped", all q, all k, all v (since
        96c242eb), or "interleaved" by query head.
    rms_eps: RMSNorm's epsilon is added "inside" the root (since 4c9f1081) or "outside".
    plain_mlp_4h: plain MLPs are always four times as wide as the model.
    args_checked: keys of a checkpoint's args that are compared at load.
    keys: yml keys that the tree knows; it refuses others.
    places: what was found where, "file:line", for messages.
    gated_biases, states: see ``Era``. deepspeed: also see there; "" where the tree does not tell.
    """

    path: str
    inv_freq: Buffer
    mlp_names: MlpNames
    gqa_order: Literal["grouped", "interleaved"]
    rms_eps: Literal["inside", "outside"]
    plain_mlp_4h: bool
    rope_tables_fp32: bool
    transformer_engine: bool
    args_checked: tuple[str, ...]
    keys: frozenset[str]
    places: dict[str, str] = field(default_factory=dict)
    gated_biases: GatedBiases = "optional"
    states: StatesForm = "partitions"
    deepspeed: str = ""

    @property
    def era(self) -> Era:
        """The tree as an era, for plans."""
        omits = self.inv_freq in ("flag", "never", "either")
        return Era(
            self.path,
            f"like {self.path}",
            self.mlp_names,
            "omit" if omits else "store",
            self.inv_freq in ("flag", "either") and "rotary_save_freqs_buffer" in self.keys,
            self.plain_mlp_4h,
            self.keys,
            self.gqa_order,
            self.rms_eps,
            self.inv_freq == "either",
            self.gated_biases,
            self.deepspeed,
            self.states,
        )


@dataclass(frozen=True, slots=True)
class TransformersFacts:
    """A version of transformers.

    persistent_inv_freq: gpt_neox's buffer is in the state dict (4.34 and older); a file without it
        is loaded all the same, since its absence is ignored or only warned of.
    rope_parameters: config.json's new spelling is read (5.0 and newer).
    loses_rotary_pct: saves lose any fraction other than 0.25 (5.0 to 5.4).
    """

    version: str
    persistent_inv_freq: bool
    rope_parameters: bool
    loses_rotary_pct: bool
