"""What a GPT-NeoX tree or a transformers version expects of a checkpoint, as data."""

from dataclasses import dataclass, field

from neox_bridge.frameworks.deepspeed import StatesForm
from neox_bridge.frameworks.eras import Buffer, Era, GatedBiases, MlpNames, RmsEps
from neox_bridge.tensors.fused import GqaOrder


@dataclass(frozen=True, slots=True)
class TreeFacts:
    """A GPT-NeoX source tree, read by its syntax alone.

    Attributes:
        path: The tree, or "neox@2024-03" for one known by its date.
        inv_freq: See ``Buffer``.
        args_checked: Keys of a checkpoint's args that are compared at load.
        keys: Yml keys that the tree knows; it refuses others.
        places: Where each fact stands in the source, "file:line", for messages.
        deepspeed: "" where the tree does not tell. This and the other fields are those of ``Era``.
    """

    path: str
    inv_freq: Buffer
    mlp_names: MlpNames
    gqa_order: GqaOrder
    rms_eps: RmsEps
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
        return Era(
            self.path,
            f"like {self.path}",
            self.inv_freq,
            self.mlp_names,
            self.gqa_order,
            self.rms_eps,
            self.plain_mlp_4h,
            self.gated_biases,
            self.rope_tables_fp32,
            self.transformer_engine,
            self.states,
            self.deepspeed,
            self.keys,
        )


@dataclass(frozen=True, slots=True)
class TransformersFacts:
    """A version of transformers. What else it has is asked of ``targets.has_change``.

    Attributes:
        version: Such as "4.48.3".
        persistent_inv_freq: Whether gpt_neox's buffer is in the state dict; a file without it is
            loaded all the same, since its absence is ignored or only warned of.
        rope_parameters: Whether config.json's new spelling is read.
        loses_rotary_pct: Whether saves lose any fraction other than 0.25.
    """

    version: str
    persistent_inv_freq: bool
    rope_parameters: bool
    loses_rotary_pct: bool
