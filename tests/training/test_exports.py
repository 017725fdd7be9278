"""What the keys of a yml ask for."""

from typing import Any

import pytest

from neox_bridge.errors import BridgeError
from neox_bridge.training.exports import (
    JOURNAL,
    ExporterProcess,
    Exports,
    exports_of,
    owner_line,
)


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
        (
            {
                **{"save": "a", "save_hf": "b", "save_hf_interval": 7},
                **{"checkpoint_factor": 5, "train_iters": 20},
            },
            r"save_hf_interval: 7 matches none of .*checkpoint_factor: 5, train_iters: 20",
        ),
        ({"save": "a", "save_hf": "hf://org/model"}, "push_to_hub to the repository on the Hub"),
        ({"save": "a", "save_hf": "./a/"}, "is also the folder of GPT-NeoX's checkpoints"),
        ({"save": "a", "save_hf": "a/global_step5/hf"}, "is inside global_step5, a step in `save`"),
        ({"save": "a", "save_hf": "b", "push_to_hub": "model"}, "'model' is not ORG/NAME"),
        ({"save": "a", "save_hf": "b", "push_to_hub": "org/model@main"}, "is not ORG/NAME"),
    ],
)
def test_keys_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BridgeError, match=message):
        exports_of(settings)


@pytest.mark.parametrize(
    ("interval", "settings"),
    [
        (7, {"train_iters": 20, "checkpoint_factor": 5, "extra_save_iters": [14]}),
        (10, {"train_iters": 20, "checkpoint_factor": 3}),  # the last step is saved too
        (8, {"train_iters": 20, "checkpoint_factor": 2, "checkpoint_scale": "log"}),
        (7, {"checkpoint_factor": 5}),
        (7, {"train_iters": 40, "checkpoint_factor": 5}),
    ],
)
def test_intervals_that_match_a_save(interval: int, settings: dict[str, Any]) -> None:
    keys = {"save": "a", "save_hf": "b", "save_hf_interval": interval, **settings}
    assert exports_of(keys) is not None


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    exports = exports_of({"save": "a", "save_hf": "~/exported"})
    assert exports is not None
    assert exports.target == f"{tmp_path}/exported"


def test_the_exports_of_another_run_are_refused(tmp_path: Any) -> None:
    one, other = (Exports(str(tmp_path / name), str(tmp_path / "hf")) for name in "ab")
    ExporterProcess(one).check()
    (tmp_path / "hf" / JOURNAL).write_text(f"{owner_line(one.save)}\nafter -1\n")
    ExporterProcess(one).check()
    with pytest.raises(BridgeError, match=r"hf contains the exports of the run in .*/a\", and"):
        ExporterProcess(other).check()
