"""The rows of a model: every weight with its block, its layer and its name on both sides."""

from dataclasses import replace
from itertools import pairwise

import pytest

from neox_bridge.architectures import ARCHITECTURES
from neox_bridge.architectures.base import Architecture
from neox_bridge.architectures.rows import model_rows, rows_by_name, table_rows
from neox_bridge.toy import toy_checkpoint

LAYERS = 3
each_family = pytest.mark.parametrize("family", ARCHITECTURES, ids=lambda family: family.name)


@each_family
def test_every_weight_of_every_block_has_a_row(family: Architecture) -> None:
    rows = table_rows(family, LAYERS)
    assert len({row.hf for row in rows}) == len(rows)
    assert all(first.layer <= second.layer for first, second in pairwise(rows))
    for weight in family.weights:
        blocks = [row.block for row in rows if row.weight is weight]
        assert blocks == (list(range(LAYERS)) if weight.place == "block" else [0])
    assert rows_by_name(family, LAYERS) == {row.hf: row for row in rows}


@each_family
def test_layers_are_numbered_as_in_gpt_neox(family: Architecture) -> None:
    """megatron/model/gpt2_model.py: two functions stand around the blocks."""
    layers = {(row.weight.place, row.block): row.layer for row in table_rows(family, LAYERS)}
    has_norm = any(weight.place == "norm" for weight in family.weights)  # OLMo has none
    assert layers == {
        ("embed", 0): 0,
        **{("block", block): 2 + block for block in range(LAYERS)},
        **({("norm", 0): LAYERS + 3} if has_norm else {}),
        ("head", 0): LAYERS + 4,
    }


def test_a_checkpoint_carries_the_rows_of_its_tensors() -> None:
    toy = toy_checkpoint("pythia-70m", layers=LAYERS)
    assert [row.hf for row in toy.rows] == list(toy.tensors)
    assert toy.config.head_layer == toy.rows[-1].layer
    assert {row.hf for row in toy.table} > set(toy.tensors)
    assert toy.by_name["embed_out.weight"].weight.place == "head"


def test_the_rows_follow_the_config() -> None:
    toy = toy_checkpoint("pythia-70m", layers=LAYERS)
    tied = replace(toy, config=replace(toy.config, tied_embeddings=True, norm_bias=False))
    names = {row.hf for row in tied.rows}
    assert "embed_out.weight" not in names
    assert "gpt_neox.final_layer_norm.bias" not in names
    assert "gpt_neox.final_layer_norm.weight" in names
    assert model_rows(tied.architecture, tied.config) == tied.rows
    assert not any(row.weight.neox_only for row in tied.rows)
