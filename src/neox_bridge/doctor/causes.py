"""Explains why trees and checkpoints differ: causes that several diagnoses share."""

from neox_bridge.frameworks.changes import change_named
from neox_bridge.frameworks.eras import FLAG, InvFreq, MlpNames

_FORMULA = "inv_freq = 1 / rotary_emb_base ** (arange(0, dim, 2) / dim)"
BUFFER_LINKS = tuple(change_named(name).link for name in ("neox-inv-freq", "hf-neox-inv-freq"))
NAMES_LINKS = (change_named("neox-mlp-names").link,)


def buffer_cause(tree: InvFreq, flag: bool = False) -> str:
    """Why a tree and a checkpoint disagree about the rotary buffer, and that it is harmless.

    Args:
        tree: What the tree does. The checkpoint does the opposite.
        flag: Whether the tree does so because a key is set, or missing, in its yml.
    """
    neox, hf = change_named("neox-inv-freq"), change_named("hf-neox-inv-freq")
    if tree == "store":
        tree_does = "This GPT-NeoX stores the rotary buffer in every layer and loads strictly"
        if flag:
            tree_does = f"The yml says {FLAG}: true, so this GPT-NeoX expects the rotary buffer"
        history = (
            f"GPT-NeoX stopped storing it in {neox.cited}, and transformers in {hf.cited}, so "
            "newer and converted checkpoints do not contain it"
        )
    else:
        tree_does = "This GPT-NeoX does not store the rotary buffer, and loads strictly"
        if flag:
            tree_does += f". It expects the buffer only if the yml says {FLAG}: true"
        history = f"GPT-NeoX stored it in every layer until {neox.cited}, as the checkpoint does"
    return f"{tree_does}. {history}. The buffer is not learned: {_FORMULA}."


def names_cause(tree: MlpNames, gated: bool) -> str:
    """Why a tree and a checkpoint name the MLP differently.

    Args:
        tree: The names in the tree. The checkpoint has the others.
        gated: Whether the old names are those of a gated MLP.
    """
    old = "w1, w2 and w3" if gated else "dense_h_to_4h and dense_4h_to_h"
    new = "linear1 and linear2"
    here, there = (old, new) if tree == "dense" else (new, old)
    return (
        f"This GPT-NeoX names the MLP {here}, and the checkpoint names it {there}. GPT-NeoX "
        f"renamed it in {change_named('neox-mlp-names').cited}"
        + (", and w1 and w3 became one tensor" if gated else "")
        + ". The values are the same."
    )
