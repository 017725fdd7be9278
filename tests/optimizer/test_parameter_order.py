"""Which parameters GPT-NeoX exempts from weight decay: megatron/model/utils.py."""

import pytest

from neox_bridge.optimizer.parameter_order import divided

SHAPES = {
    "2.input_layernorm.weight": (8,),
    "2.attention.query_key_value.weight": (24, 8),
    "2.attention.query_key_value.bias": (24,),
    "2.mlp.layer_norm_weight": (8,),  # of Transformer Engine
    "2.mlp.fc1_bias": (32,),
    "2.mixer.A_log": (16, 16),
    "2.mixer.D": (16,),
    "2.mixer.conv1d.weight": (16, 1, 4),
    "3.ln1.weight": (8,),  # of RWKV
    "3.att.ln_x.weight": (8,),  # a GroupNorm, which is not in the list of GPT-NeoX
    "3.ln2.bias": (8,),
    "4.norm.scale": (8,),
}
EXEMPT = [
    "2.input_layernorm.weight",
    "2.attention.query_key_value.bias",
    "2.mixer.A_log",
    "2.mixer.D",
    "3.ln1.weight",
    "3.ln2.bias",
    "4.norm.scale",
]


@pytest.mark.parametrize("as_pair", [False, True])
def test_what_decays_is_told_by_module_and_name(as_pair: bool) -> None:
    if as_pair:
        pairs = {(int(n[0]), n[2:]): shape for n, shape in SHAPES.items()}
        decaying, exempt = divided(pairs, 2, "states.pt")
        names = [[f"{layer}.{name}" for layer, name in group] for group in (decaying, exempt)]
    else:
        names = [list(group) for group in divided(SHAPES, 2, "states.pt")]
    assert names == [[name for name in SHAPES if name not in EXEMPT], EXEMPT]
