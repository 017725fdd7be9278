"""The head of reward models, which gives one number for each token. It is the same in all families.

With ``train_impl: rm``, GPT-NeoX has ``rm_linear`` instead of ``final_linear``, a row-parallel
matrix without bias (megatron/model/transformer.py, ParallelLinear), and uses the number of the last
token of an answer (megatron/training.py, forward_step). …ForSequenceClassification of transformers
has ``score``, and uses the number of the last token that is not padding.
"""

from collections.abc import Mapping
from typing import Any

from neox_bridge.architectures.base import ModelConfig, Refusal, Weight

SCORE, RM_LINEAR = "score.weight", "rm_linear.weight"
REWARD = Weight("head", RM_LINEAR, SCORE, "row", ("labels", "hidden"), "reward")


def head_config(hf_class: str, config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json about the head: the class, and the one label of a reward model."""
    if not config.reward:
        return {"architectures": [hf_class]}
    stem = hf_class.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    # transformers takes the number of labels from their names
    return {
        "architectures": [f"{stem}ForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": None,
    }


def refuse_labels(dims: Mapping[str, int]) -> list[Refusal]:
    """Refuse a head with more than one label, the number in GPT-NeoX."""
    labels = dims.get("labels", 1)
    if labels == 1:
        return []
    return [
        Refusal(
            "num_labels",
            "the reward model of GPT-NeoX (train_impl: rm) has one label, but this model has "
            f"{labels}",
        )
    ]


def refuse_tied(raw: Mapping[str, Any]) -> list[Refusal]:
    """Refuse tied embeddings: GPT-NeoX then has no reward head (megatron/model/gpt2_model.py)."""
    if raw.get("train_impl") != "rm" or raw.get("no_weight_tying"):
        return []
    return [
        Refusal(
            "train_impl",
            "with no_weight_tying: false, train_impl: rm of GPT-NeoX has no reward head. It "
            "outputs the logits of the vocabulary",
            "to convert it as a language model, set it to normal",
        )
    ]
