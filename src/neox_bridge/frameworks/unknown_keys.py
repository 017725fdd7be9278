"""Settings that no known version of a framework has, and whether they change the model.

GPT-NeoX refuses unknown keys, so a yml that has one is from a fork. transformers silently ignores
unknown keys of a config.json. In both cases, the code that trained the model may compute something
else.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from neox_bridge.frameworks.changes import proposal_with

Effect = Literal["model", "off", "none"]


@dataclass(frozen=True, slots=True)
class UnknownKey:
    """A setting that no known version of the framework has.

    Attributes:
        name: The key; dotted if it is inside a block.
        effect: "model" if its name suggests that it changes what the model computes, or if it is a
            misspelling of a key that does; "off" if its value turns it off; "none" for others.
        neighbour: The known key that may be meant, or "".
        file: The file of the key.
        removed: The date on which the framework removed the key, or "".
        proposal: The id of the change that proposes it, or "".
    """

    side: Literal["hf", "neox"]
    name: str
    value: Any
    effect: Effect
    neighbour: str = ""
    file: str = ""
    removed: str = ""
    proposal: str = ""

    @property
    def top(self) -> str:
        """The key at the top level of the file."""
        return self.name.partition(".")[0]

    @property
    def shown(self) -> str:
        """``name: value`` for a message, with a shortened value."""
        text = repr(self.value)
        return f"{self.name}: {text if len(text) <= 60 else text[:57] + '...'}"


# a name with one of these words always changes the model
_CERTAIN = frozenset(
    "rope rotary yarn ntk alibi xpos longrope mrope rpe softcap softcapping softcaps".split()
)
_CHANGES = _CERTAIN | frozenset(
    """scale scales scaling scaled scaler rescale multiplier mult factor temperature gain norm
    norms normalize normalized normalization layernorm rmsnorm qknorm prenorm postnorm ln
    attention attn mha gqa mqa mla swa retention window windows sliding cap caps capping
    clip clamp bias biases residual residuals skip activation activations act gelu silu
    swish swiglu glu geglu relu mish logit logits softmax embed embedding embeddings pos
    position positions positional mlp ffn feedforward moe expert experts router routing
    mixture depths theta base freq freqs frequency frequencies head heads kv qk qkv query
    layer layers block blocks causal bidirectional mask masking masked sparse sparsity quant
    quantize quantized quantization compression prune pruned lora adapter adapters mup tie
    tied tying eps epsilon hidden dim dims conv convolution ssm gate gated gating interleave
    interleaved recurrent sink sinks nope""".split()
)
# for compounds without an underscore
_BEGIN = ("rope", "rotary", "alibi", "yarn", "softcap", "attn", "attention", "embed", "logit")
_END = ("norm", "scale", "scaling", "softcap", "bias", "glu", "gelu", "multiplier")
# a name with one of these words concerns only training, data, precision or implementation
_HARMLESS = frozenset(
    """dropout lr wd optim optimizer adam muon momentum warmup schedule scheduler grad grads
    gradient gradients loss losses reg regularization ema init inits initializer
    initialization initialize log logs logging logger wandb tensorboard comet mlflow clearml
    profile profiler profiling print verbose debug monitor monitoring report reporting timer
    timers stats statistics metric metrics track tracking trace data dataset datasets
    dataloader tokenizer corpus seed shuffle path paths file files dir dirs folder url host
    port save saving load loading eval evaluation validation validate test freeze frozen
    unfreeze unfrozen trainable flash fused fusion triton cuda xformers sdpa impl
    implementation backend compile compiled cache caching checkpoint checkpoints
    checkpointing recompute recomputation offload cpu gpu overlap async fp32 fp16 bf16
    float32 float16 bfloat16 dtype precision id ids author comment comments tag tags license
    description allreduce allgather reduce communication comm stage stages num_gpus""".split()
)
_FACTORS = frozenset(
    """scale scales scaling scaled rescale multiplier mult factor temperature temp gain alpha
    expert experts moe groups""".split()
)
_ZERO_IS_OFF = frozenset(
    """cap caps capping softcap softcapping softcaps clip clamp window windows bias offset shift
    expert experts moe coeff coefficient sink sinks lora adapter mult_of dropout prefix""".split()
)
_OFF_WORDS = frozenset({"", "none", "null", "default", "off", "false", "no", "disabled"})
# with these words, a decay is part of the model; otherwise it is weight decay
_DECAYS_IN_MODEL = frozenset(
    {"attention", "attn", "pos", "position", "positional", "head", "heads"}
)
_NOT_OFF_WHEN_FALSE = frozenset({"is_causal", "causal"})
_ALWAYS = frozenset({"transformers_weights"})  # names another file of weights


def words_of(name: str) -> list[str]:
    """The words of a name in snake case or camel case, in lower case."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    words = [word for word in re.split(r"[^a-z0-9]+", spaced.lower()) if word]
    return [word if word in _HARMLESS else word.strip("0123456789") or word for word in words]


def effect_of(name: str, value: Any) -> Effect:
    """The effect that a name and its value suggest. name: dotted if it is inside a block."""
    if not any(map(_suggests, name.split("."))):
        return "none"
    return "off" if is_off(name, value) else "model"


def _suggests(name: str) -> bool:
    words = set(words_of(name))
    if name in _ALWAYS or any(map(is_certain, words)):
        return True
    if not any(map(_changes, words)):
        return False
    if "decay" in words:
        return bool(words & _DECAYS_IN_MODEL)
    if ("base" in words and "model" in words) or {"parallel", "size"} <= words:
        return False
    return not words & _HARMLESS


def is_certain(word: str) -> bool:
    return word in _CERTAIN or word.startswith(("rope", "rotary", "alibi", "yarn", "softcap"))


def _changes(word: str) -> bool:
    return word in _CHANGES or word.startswith(_BEGIN) or word.endswith(_END)


def is_off(name: str, value: Any) -> bool:
    """Whether a value turns a setting off, such as null, false, 1 for a factor or 0 for a cap."""
    words = set(words_of(name.rpartition(".")[2]))
    if value is None:
        return True
    if isinstance(value, bool):
        return value == bool(words & _NOT_OFF_WHEN_FALSE)
    if isinstance(value, str):
        number = _number(value)
        if number is None:
            return value.strip().lower() in _OFF_WORDS
        value = number
    if isinstance(value, int | float):
        if value == 1:
            return any(word in _FACTORS or word.endswith(("scale", "scaling")) for word in words)
        if value == 0:
            return any(word in _ZERO_IS_OFF or word.startswith("softcap") for word in words)
        return value == -1 and bool(words & {"window", "windows"})
    if isinstance(value, list):
        return all(item == "full_attention" or is_off(name, item) for item in value)
    if isinstance(value, dict):
        kind = value.get("rope_type", value.get("type"))
        default = kind is not None and is_off("type", kind) and not _ROPE_ITSELF & set(value)
        if default or value.get("enabled") is False:
            return True
        linear = kind == "linear" and "factor" in value
        return all((linear and key in _KINDS) or is_off(key, item) for key, item in value.items())
    return False


_KINDS = ("type", "rope_type")
_ROPE_ITSELF = frozenset({"rope_theta", "partial_rotary_factor"})


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# switches that are on by default
_ON = frozenset(
    """use_parallel_residual attention_bias use_conv_bias residual_in_fp32 rms_norm tie_embeddings
    use_bias_in_attn_linear use_bias_in_mlp use_bias_in_norms""".split()
)


def unknown_key(
    side: Literal["hf", "neox"],
    name: str,
    value: Any,
    known: Collection[str],
    raw: Mapping[str, Any],
    file: str = "",
    removed: str = "",
) -> UnknownKey:
    """An unknown key with its effect, by its name, its value and the nearest known key.

    known: the keys that are valid in its place. raw: the keys beside it.
    """
    if side == "neox" and (proposal := proposal_with(key=name)):
        off = is_off(name, value) or proposal.is_as_before(raw)
        return UnknownKey(
            side, name, value, "off" if off else "model", file=file, proposal=proposal.id
        )
    neighbour, is_slip = neighbour_of(name.rpartition(".")[2], known)
    effect = effect_of(name, value)
    if is_slip and (_suggests(neighbour) or effect == "model"):
        same = value is None or (neighbour in raw and raw[neighbour] == value)
        off = neighbour not in raw and is_off(neighbour, value) and neighbour not in _ON
        effect = "off" if same or off else "model"
    return UnknownKey(side, name, value, effect, neighbour, file, removed)


def neighbour_of(name: str, known: Iterable[str]) -> tuple[str, bool]:
    """The known key that is nearest to a name, or "", and whether the name is a misspelling."""
    from difflib import get_close_matches

    known = sorted(known, key=lambda key: (not _suggests(key), key))
    words, small = words_of(name), name.lower()
    for key in known:
        other = words_of(key)
        if "".join(other) == "".join(words) or sorted(other) == sorted(words):
            return key, True
    slips = {key: _slips(small, key) for key in known}
    near = [key for key, count in slips.items() if count <= (1 if len(key) < 8 else 2)]
    if near:
        return min(near, key=lambda key: slips[key]), True
    close = get_close_matches(small, known, 1, 0.85)
    return (close[0] if close else ""), False


def _slips(a: str, b: str) -> int:
    """The number of missing, extra, wrong and swapped letters, up to 3."""
    most = 2
    if abs(len(a) - len(b)) > most:
        return most + 1
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        after = [i]
        for j, y in enumerate(b, 1):
            cost = min(row[j] + 1, after[j - 1] + 1, row[j - 1] + (x != y))
            if before and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, before[j - 2] + 1)
            after.append(cost)
        before, row = row, after
        if min(row) > most:
            return most + 1
    return row[-1]
