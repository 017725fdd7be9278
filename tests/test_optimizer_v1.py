"""Optimizer states of DeepSpeed before 0.6, elastic and rigid, against the live optimizer's."""

from pathlib import Path

import pytest
from published import NAMES, differing, facts, run_folder, truth

from neox_bridge.layouts.open import open_checkpoint
from neox_bridge.layouts.optimizer_reader import read_optimizer


@pytest.mark.parametrize("name", NAMES)
def test_published_states_are_the_live_optimizers(name: str, tmp_path: Path) -> None:
    optimizer = read_optimizer(open_checkpoint(str(run_folder(name, tmp_path))))
    assert differing(optimizer, truth(name)) == []
    live = facts(name)
    assert [dict(group.settings) for group in optimizer.groups] == live["param_groups"]
    assert optimizer.form is not None
    assert optimizer.form.intervals == tuple(live["num_comm_intervals_per_group"])
    assert optimizer.form.kind == ("elastic" if live["elastic_checkpoint"] else "rigid")
    assert (optimizer.stage, optimizer.dp) == (1, live["partition_count"])
    for index, names in enumerate(live["group_names"]):
        places = [tuple(name.removeprefix("sequential.").split(".", 1)) for name in names]
        members = [p for p, group in optimizer.members.items() if group == index]
        assert members == [(int(layer), short) for layer, short in places]
