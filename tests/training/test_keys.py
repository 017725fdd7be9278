"""The keys that neox-bridge registers in GPT-NeoX's argument check, on a stand-in of it."""

from pathlib import Path

import pytest
from megatron_stand_in import Megatron

from neox_bridge.training.keys import KEYS, register


@pytest.fixture
def megatron(tmp_path: Path) -> Megatron:
    return Megatron(tmp_path, [])


def test_the_keys_are_accepted(megatron: Megatron) -> None:
    arguments = megatron.arguments
    with pytest.raises(TypeError, match="save_hf"):
        arguments.NeoXArgs(save_hf="exports")
    register(arguments)
    args = arguments.NeoXArgs(num_layers=2, load="model", save_hf="exports", save_hf_keep=3)
    assert (args.num_layers, args.load, args.save_hf, args.save_hf_keep) == (
        2,
        "model",
        "exports",
        3,
    )
    assert args.push_to_hub is None


def test_they_have_the_types_that_gpt_neox_checks(megatron: Megatron) -> None:
    register(megatron.arguments)
    fields = megatron.arguments.NeoXArgs.__dataclass_fields__
    assert {name: fields[name].type for name in KEYS} == {
        "save_hf": str,
        "save_hf_interval": int,
        "save_hf_keep": int,
        "push_to_hub": str,
    }
    with pytest.raises(AssertionError, match="save_hf_keep"):
        megatron.arguments.NeoXArgs(save_hf_keep="3")


def test_other_keys_are_refused_as_before(megatron: Megatron) -> None:
    register(megatron.arguments)
    with pytest.raises(TypeError, match="save_hff"):
        megatron.arguments.NeoXArgs(save_hff="exports")


def test_a_tree_that_has_the_keys_stays_as_it_is(megatron: Megatron) -> None:
    register(megatron.arguments)
    before = megatron.arguments.NeoXArgs.__init__
    register(megatron.arguments)
    assert megatron.arguments.NeoXArgs.__init__ is before
