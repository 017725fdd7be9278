"""Values in optimizer files that neither DeepSpeed nor GPT-NeoX writes: the error names the key."""

from collections.abc import Callable
from typing import Any

import pytest

from neox_bridge.errors import BridgeError
from neox_bridge.layouts.deepspeed_values import (
    check_betas,
    check_meta,
    check_stage0_scaler,
    numbers_of,
    parameter_groups,
    shapes,
    states_of,
)

PATH = "run/global_step1/mp_rank_00_model_states.pt"


def numbers(value: Any, path: str) -> object:
    return numbers_of({"params": value}, 1, path)


def states(value: Any, path: str) -> object:
    return states_of({"state": value}, 0, path)


@pytest.mark.parametrize(
    ("check", "value", "words"),
    [
        (check_meta, {"dp_world_size": 1 << 21}, "dp_world_size is 2097152, not a number of GPUs"),
        (check_meta, {"ds_version": "1" * 200}, "ds_version is '1111"),
        (check_meta, {"ds_version": 0.3}, "ds_version is 0.3, not a version"),
        (check_meta, {"buffer_names": "inv_freq"}, "buffer_names is 'inv_freq', not a list"),
        (check_meta, {"buffer_names": ["a", 1]}, "buffer_names is 1, not a list of names"),
        (check_meta, {"rng_tracker_states": {"seed": 7}}, "rng_tracker_states.seed is 7, not a t"),
        (shapes, {"param_shapes": [{3: (2, 2)}]}, "a name in param_shapes is 3, not a text"),
        (parameter_groups, {"param_groups": [{"name": 4}]}, "param_groups[0].name is 4, not a te"),
        (numbers, [0, "1"], "param_groups[1].params is '1', not a list of numbers"),
        (states, [1], "state is a list, not a mapping of numbers to states"),
        (states, {0: "x"}, "state[0] is 'x', not a mapping of names to values"),
        (check_betas, [0.9], "optimizer.params.betas is a list, not a pair of numbers"),
        (check_betas, (0.9, 1.5), "optimizer.params.betas is a tuple, not a pair of numbers"),
        (check_stage0_scaler, {}, "optimizer.cur_scale is empty, not a number"),
        (
            check_stage0_scaler,
            {"cur_scale": 1.0, "dynamic_loss_scale": True, "cur_iter": None},
            "optimizer.cur_iter is empty, not a number",
        ),
    ],
)
def test_a_value_of_another_kind(
    check: Callable[[Any, str], object], value: Any, words: str
) -> None:
    with pytest.raises(BridgeError) as caught:
        check(value, PATH)
    assert str(caught.value).startswith(f"{PATH}: {words}")
    assert str(caught.value).endswith("damaged or malicious. Get it again from its source.")


def test_values_that_deepspeed_writes() -> None:
    check_meta({"dp_world_size": 8, "ds_version": "0.3.15", "buffer_names": ["a"]}, PATH)
    assert check_betas([0.9, 0.95], PATH) == [0.9, 0.95]
    assert numbers([0, 1], PATH) == [0, 1]
    assert states({0: {"step": 1}}, PATH) == {"step": 1}
    assert states({}, PATH) == {}
