"""What the keys of a yml ask for."""

from typing import Any

import pytest

from neox_bridge.errors import BridgeError
from neox_bridge.training.exports import Exports, exports_of


def test_what_the_keys_mean(tmp_path: Any) -> None:
    save, target = str(tmp_path / "save"), str(tmp_path / "hf")
    assert exports_of({"save": save}) is None
    assert exports_of({"save": save, "save_hf": target}) == Exports(save, target)
    stored = exports_of({"save": save, "save_hf": "s3://bucket/hf/"})
    assert stored is not None
    assert (stored.target, stored.home) == ("s3://bucket/hf", save)
    more = {"save_hf_interval": 10, "save_hf_keep": 2, "push_to_hub": "org/model"}
    exports = exports_of({"save": save, "save_hf": target, **more})
    assert exports == Exports(save, target, 10, 2, "org/model")
    assert [n for n in (5, 10, 15, 20) if exports.is_due(n)] == [10, 20]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save": "a", "save_hf_keep": 2}, "save_hf_keep is set without save_hf"),
        ({"save": "a", "push_to_hub": "org/model"}, "push_to_hub is set without save_hf"),
        ({"save_hf": "b"}, "save_hf is set without `save`"),
        ({"save": "a", "save_hf": "b", "save_hf_interval": 0}, "save_hf_interval: 0 must be at"),
        ({"save": "a", "save_hf": "b", "save_hf_keep": -1}, "save_hf_keep: -1 must be at least 1"),
        ({"save": "a", "save_hf": "hf://org/model"}, "push_to_hub to the repository on the Hub"),
        ({"save": "a", "save_hf": "./a/"}, "is also the folder of GPT-NeoX's checkpoints"),
        ({"save": "a", "save_hf": "b", "push_to_hub": "model"}, "'model' is not ORG/NAME"),
        ({"save": "a", "save_hf": "b", "push_to_hub": "org/model@main"}, "is not ORG/NAME"),
    ],
)
def test_keys_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BridgeError, match=message):
        exports_of(settings)
