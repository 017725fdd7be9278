"""Nodes that save on disks of their own: what their processes bring together in a store."""

import errno
import importlib
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron_stand_in
import pytest
import tiny
from hub_stub import Stub, serving, use
from megatron_stand_in import Megatron
from s3_server import BUCKET, server

from neox_bridge import verify
from neox_bridge.api import convert
from neox_bridge.errors import BridgeError, DiskFull
from neox_bridge.stores import objects
from neox_bridge.training import exporter, hooks, nodes
from neox_bridge.training.exporter import run
from neox_bridge.training.exports import ExporterProcess, Exports, StepGone, exports_of


@pytest.fixture
def target() -> Iterator[str]:
    url = f"memory://exports-{os.getpid()}"
    yield url
    objects.remove(objects.below(url))


@pytest.fixture
def both(tmp_path: Path, target: str) -> tuple[Exports, Exports]:
    """The exports of two nodes, each of which has some layers of the model."""
    saves = [tmp_path / f"disk-{node}" / "save" for node in (0, 1)]
    for save in saves:
        save.mkdir(parents=True)
    first, second = (Exports(str(save), target, node=n, nodes=2) for n, save in enumerate(saves))
    return first, second


def save_step(both: tuple[Exports, Exports], iteration: int, save_id: str, seed: int = 0) -> Path:
    """A step whose layers are on two disks, and the same step in one folder."""
    whole = Path(both[0].save).parent.parent / f"whole-{save_id}"
    convert(str(tiny.write_hf(whole / "hf", seed)), str(whole / "neox"), tp=2, pp=1)
    (step,) = (whole / "neox").glob("global_step*")
    files = sorted(p.relative_to(step) for p in step.rglob("*") if p.is_file())
    for node, exports in enumerate(both):
        for number, name in enumerate(files):
            if node == (number < len(files) // 2):
                path = Path(exports.step(iteration)) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes((step / name).read_bytes())
        folder = Path(exports.step(iteration))
        (folder / f"zero_pp_rank_{node}_mp_rank_00_optim_states.pt").write_bytes(b"not sent")
        nodes.note_save(exports, iteration, save_id)
        (Path(exports.save) / "latest").write_text(f"global_step{iteration}")
    return step


def together(both: tuple[Exports, Exports], *iterations: int) -> list[list[str]]:
    """Run the processes of both nodes at the same time. Returns their logs."""
    logs: list[list[str]] = [[], []]
    lines = [f"{iteration}\n" for iteration in iterations]
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(run, e, lines, logs[n].append) for n, e in enumerate(both)]
        assert [done.result() for done in runs] == [True, True], logs
    return logs


def at(exports: Exports, iteration: int = 5) -> Exports:
    """The exports while a step is exported."""
    return nodes.with_last_save(exports, iteration)


def names(url: str) -> list[str]:
    return sorted(place.removeprefix(f"{url}/") for place in objects.below(url))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_POLL_SECONDS", 0.01)


def test_two_nodes_export_what_a_conversion_of_the_whole_step_would(
    both: tuple[Exports, Exports], target: str, tmp_path: Path
) -> None:
    step = save_step(both, 5, "a")
    logs = together(both, 5)
    convert(str(step), str(tmp_path / "alone"), to="hf")
    for name in ("model.safetensors", "config.json"):
        size = objects.look(f"{target}/step5/{name}").size
        data = objects.fetch(f"{target}/step5/{name}", 0, size)
        assert data == (tmp_path / "alone" / name).read_bytes()
    assert verify(str(step), f"{target}/step5").holds
    assert [name for name in names(target) if not name.startswith("step5/")] == []
    assert logs[0][-1].startswith(f"step 5 exported to {target}/step5 and verified in ")
    assert logs[1][-1].startswith("step 5: the files of this node are in memory://")
    for exports in both:
        assert Path(exports.journal).read_text().splitlines()[-1] == "done 5 a"


def test_optimizer_states_are_not_uploaded(both: tuple[Exports, Exports], target: str) -> None:
    save_step(both, 5, "a")
    parts = nodes.upload_step(at(both[1]), 5)
    assert parts == f"{target}/{nodes.PARTS}/a/global_step5"
    assert not [name for name in names(target) if "optim_states" in name]
    assert objects.kind(f"{target}/{nodes.PARTS}/a/node1.json") == "file"


def test_nothing_is_exported_before_all_nodes_have_uploaded(
    both: tuple[Exports, Exports], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(both, 5, "a")
    monkeypatch.setattr(nodes, "PATIENCE_SECONDS", 0.05)
    with pytest.raises(BridgeError, match="node 1 has not uploaded its files of the step"):
        exporter.convert_step(at(both[0]), 5)
    assert not [name for name in names(target) if name.startswith("step5")]
    nodes.upload_step(at(both[1]), 5)
    exporter.convert_step(at(both[0]), 5)
    assert objects.kind(f"{target}/step5/neox_bridge.json") == "file"


def test_a_node_that_is_killed_while_it_uploads_leaves_no_list(
    both: tuple[Exports, Exports], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = save_step(both, 5, "a")

    def killed(url: str, data: bytes) -> None:
        raise KeyboardInterrupt

    importlib.import_module("neox_bridge.execution.object_store")  # which keeps the function
    with monkeypatch.context() as patch:
        patch.setattr(objects, "put_small", killed)
        with pytest.raises(KeyboardInterrupt):
            nodes.upload_step(at(both[1]), 5)
    with monkeypatch.context() as patch:
        patch.setattr(nodes, "PATIENCE_SECONDS", 0.05)
        with pytest.raises(BridgeError, match="node 1 has not uploaded"):
            exporter.convert_step(at(both[0]), 5)
    together(both)  # the next run: both journals still have the step
    assert verify(str(step), f"{target}/step5").holds


def test_a_step_that_is_saved_again_is_never_mixed(
    both: tuple[Exports, Exports], target: str
) -> None:
    """One node has uploaded the first save when the second one replaces it."""
    save_step(both, 5, "a")
    nodes.upload_step(at(both[1]), 5)
    # the first node has not read its files yet: now they are those of the second save
    step = save_step(both, 5, "b", seed=1)
    logs = together(both, 5)
    assert verify(str(step), f"{target}/step5").holds
    assert names(f"{target}/{nodes.PARTS}") == []
    assert logs[0][-1].startswith("step 5 exported")


def test_a_step_that_is_saved_again_during_its_export_is_exported_again(
    both: tuple[Exports, Exports], target: str
) -> None:
    save_step(both, 5, "a")
    steps = []

    def saving(exports: Exports, iteration: int) -> str:
        if not steps:
            steps.append(save_step(both, 5, "b", seed=1))
        return exporter.convert_step(exports, iteration)

    log: list[str] = []
    nodes.upload_step(at(both[1]), 5)
    assert run(both[0], [], log.append, saving)
    assert "saved again before it was exported" in log[-1]
    assert [*exporter.Journal(both[0].journal, print).left(both[0])] == [5]
    together(both, 5)
    assert verify(str(steps[0]), f"{target}/step5").holds


def test_files_of_another_save_are_not_uploaded(
    both: tuple[Exports, Exports], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash left a journal that knows the first save, and half of the files of the second."""
    save_step(both, 5, "a")
    journal = Path(both[1].journal).read_text()
    save_step(both, 5, "b", seed=1)
    Path(both[1].journal).write_text(journal)
    with pytest.raises(StepGone, match="was removed or saved again"):
        nodes.upload_step(at(both[1]), 5)
    assert names(target) == []


def test_files_that_change_while_they_are_uploaded_are_removed(
    both: tuple[Exports, Exports], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(both, 5, "a")
    step = Path(both[1].step(5))
    (name, *_) = (p for p in step.iterdir() if p.name.startswith("layer_"))
    checks = []
    same = nodes._check_same

    def check(exports: Exports, iteration: int) -> None:
        checks.append(iteration)
        if len(checks) == 2:  # after the upload
            name.write_bytes(name.read_bytes())
        same(exports, iteration)

    monkeypatch.setattr(nodes, "_check_same", check)
    with pytest.raises(StepGone):
        nodes.upload_step(at(both[1]), 5)
    assert names(target) == []


def test_a_removed_step_is_skipped_by_the_first_node_and_its_files_are_removed(
    both: tuple[Exports, Exports], target: str
) -> None:
    save_step(both, 5, "a")
    nodes.upload_step(at(both[1]), 5)
    shutil.rmtree(both[0].step(5))
    log: list[str] = []
    assert run(both[0], ["5\n"], log.append)
    assert log[-1] == "step 5 was removed or saved again before it was exported, skipped"
    assert names(target) == []


def test_a_step_that_is_removed_while_the_first_node_waits_is_skipped(
    both: tuple[Exports, Exports], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(both, 5, "a")
    nodes.upload_step(at(both[0]), 5)
    shutil.rmtree(both[0].step(5))
    monkeypatch.setattr(nodes, "PATIENCE_SECONDS", 10.0)
    with pytest.raises(StepGone):
        nodes.collect_step(at(both[0]), 5)


def test_a_step_that_the_trainer_did_not_note_is_an_error(both: tuple[Exports, Exports]) -> None:
    save_step(both, 5, "a")
    with pytest.raises(BridgeError, match="does not contain step 10"):
        at(both[0], 10)


def test_a_step_that_no_node_has_noted_is_not_waited_for(both: tuple[Exports, Exports]) -> None:
    save_step(both, 5, "a")
    for exports in both:
        (Path(exports.save) / "global_step10").mkdir()
        (Path(exports.save) / "latest").write_text("global_step10")
        assert [*exporter.Journal(exports.journal, print).left(exports)] == [5]


def test_an_object_that_is_not_what_a_node_sent_is_an_error(
    both: tuple[Exports, Exports], target: str
) -> None:
    save_step(both, 5, "a")
    parts = nodes.upload_step(at(both[1]), 5)
    (layer, *_) = (n for n in names(parts) if n.startswith("layer_"))
    objects.put_small(f"{parts}/{layer}", b"short")
    with pytest.raises(BridgeError, match="is not the file that a node has uploaded"):
        exporter.convert_step(at(both[0]), 5)


def test_files_of_a_pending_or_unknown_save_stay(
    both: tuple[Exports, Exports], target: str
) -> None:
    for iteration, save_id in ((5, "a"), (10, "b")):
        save_step(both, iteration, save_id)
        nodes.upload_step(at(both[0], iteration), iteration)
    objects.put_small(f"{target}/{nodes.PARTS}/unknown/node1.json", b"{}")
    nodes.remove_parts(both[0], [10])
    assert {name.split("/")[0] for name in names(f"{target}/{nodes.PARTS}")} == {"b", "unknown"}


def test_keeps_the_newest_exports_in_a_store(
    both: tuple[Exports, Exports], target: str, tmp_path: Path
) -> None:
    keeping = Exports(both[0].save, target, keep=1)  # of one node that has everything
    for iteration in (5, 10):
        step = save_step(both, iteration, str(iteration))
        shutil.rmtree(both[0].step(iteration))
        shutil.copytree(step, both[0].step(iteration))
    assert run(keeping, ["5\n", "10\n"], print)
    assert {name.split("/")[0] for name in names(target)} == {"step10"}
    assert Path(both[0].save, "neox_bridge_exports.log").exists() is False  # of main() only
    assert Path(both[0].save, ".neox_bridge_exports").exists()


@pytest.mark.parametrize("split", [True, False])
def test_steps_in_a_store_are_pushed(
    both: tuple[Exports, Exports],
    target: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    split: bool,
) -> None:
    step = save_step(both, 5, "a")
    first, second = (replace(e, repository="org/model", nodes=2 if split else 1) for e in both)
    with serving(Stub()) as hub:
        use(hub, monkeypatch, tmp_path)
        if split:
            together((first, second), 5)
        else:
            shutil.copytree(step, first.step(5), dirs_exist_ok=True)
            assert run(first, ["5\n"], print)
        assert "model.safetensors" in hub.files("org/model", "step5")
    assert not list(Path(first.save).glob(".neox_bridge_push*"))


def test_a_copy_that_is_pushed_leaves_space_for_the_next_checkpoint(
    both: tuple[Exports, Exports], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = save_step(both, 5, "a")
    pushing = replace(both[0], nodes=1, repository="org/model")
    shutil.copytree(step, pushing.step(5), dirs_exist_ok=True)
    url = exporter.convert_step(pushing, 5)
    size = sum(state.size for state in objects.below(url).values())
    monkeypatch.setattr(exporter, "free_bytes", lambda folder: size)
    with pytest.raises(DiskFull, match="and the next checkpoint need") as caught:
        exporter.push_step(pushing, 5)
    assert caught.value.needed > size
    assert not list(Path(pushing.save).glob(".neox_bridge_push*"))


def test_the_trainer_notes_a_save_with_its_number(
    both: tuple[Exports, Exports], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(ExporterProcess, "start", lambda self: None)
    process = ExporterProcess(replace(both[1], interval=10), "run")
    process._process = SimpleNamespace(  # type: ignore[assignment]
        poll=lambda: None, stdin=SimpleNamespace(write=lambda line: None)
    )
    for iteration in (5, 10):
        process.saved(iteration)
    (line,) = Path(both[1].journal).read_text().splitlines()
    assert line.startswith("saved 10 run-2 ")  # also the saves that are not exported count

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nodes, "fingerprint", full)
    process.saved(20)
    assert "step 20 is not exported yet: [Errno 28]" in capsys.readouterr().err


def test_a_process_that_is_killed_while_it_uploads(
    both: tuple[Exports, Exports], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process of the second node. Its next one uploads the rest."""
    target = f"s3://{BUCKET}/exported"
    first, second = (replace(exports, target=target) for exports in both)
    step = save_step((first, second), 5, "a")
    is_uploading, is_killed = threading.Event(), threading.Event()

    def stop(method: str, key: str, query: str) -> str:
        if method == "PUT" and key.endswith(".pt") and not is_killed.is_set():
            is_uploading.set()
            is_killed.wait(60)
        return ""

    with server() as store:
        store.spoil = stop
        process = ExporterProcess(second)
        process.start()
        assert process._process is not None
        assert is_uploading.wait(60)
        process._process.kill()
        process._process.wait()
        is_killed.set()
        with monkeypatch.context() as patch:
            patch.setattr(nodes, "PATIENCE_SECONDS", 0.05)
            with pytest.raises(BridgeError, match="node 1 has not uploaded"):
                exporter.convert_step(at(first), 5)
        process.finish()  # starts another one
        assert run(first, [], print)
        assert verify(str(step), f"{target}/step5").holds
        assert names(f"{target}/{nodes.PARTS}") == []


def test_the_start_checks_that_a_store_can_be_written(target: str, tmp_path: Path) -> None:
    assert hooks._check_store(str(tmp_path)) == ""
    assert hooks._check_store(target) == ""
    assert names(target) == []
    with server() as store:
        store.spoil = lambda method, key, query: "deny" if method == "PUT" else ""
        error = hooks._check_store(f"s3://{BUCKET}/exported")
        assert error.startswith("save_hf: s3://bucket/exported/.neox_bridge_")
        assert hooks._check_store("s3://missing/exported").startswith("save_hf: s3://missing/")


# which rank exports what


class World:
    """Ranks as threads, each with a ``save`` of its own where they do not share one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tree: Path, count: int) -> None:
        self._local, self._barrier = threading.local(), threading.Barrier(count)
        self._texts = [""] * count
        self.megatron = megatron_stand_in.use(Megatron(tree, []), monkeypatch)
        monkeypatch.setattr(hooks, "_rank", lambda: self._local.rank)
        monkeypatch.setattr(hooks, "_gather", self._gather)

    def _gather(self, text: str) -> list[str]:
        self._texts[self._local.rank] = text
        self._barrier.wait(10)
        texts = list(self._texts)
        self._barrier.wait(10)
        return texts

    def place(
        self, saves: list[Path], replicas: list[int], target: str, **settings: Any
    ) -> list[Any]:
        """For each rank the exports of the process that it starts, None, or its error."""
        mpu = self.megatron.modules["megatron.mpu"].__dict__
        mpu["get_data_parallel_rank"] = lambda: replicas[self._local.rank]

        def place(rank: int) -> Any:
            self._local.rank = rank
            keys = {"save": str(saves[rank]), "save_hf": target, **settings}
            exports = exports_of(keys)
            assert exports is not None
            try:
                process = hooks._exporter_of(exports, SimpleNamespace(**keys))
            except BridgeError as error:
                return str(error)
            return process and process.exports

        with ThreadPoolExecutor(len(saves)) as pool:
            return list(pool.map(place, range(len(saves))))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, trees: Mapping[str, Path]) -> World:
    return World(monkeypatch, trees["today"], 4)


def test_one_process_exports_a_save_that_all_share(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "exported")
    first, *others = world.place([tmp_path / "save"] * 4, [0, 0, 0, 0], target)
    assert (first.node, first.nodes) == (0, 1)
    assert others == [None] * 3
    assert list((tmp_path / "save").iterdir()) == []
    assert "warning" not in capsys.readouterr().out


def test_one_process_exports_if_its_node_has_all_weights(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two nodes with a replica each, which is split over two ranks."""
    saves = [tmp_path / "one"] * 2 + [tmp_path / "other"] * 2
    first, *others = world.place(saves, [0, 0, 1, 1], str(tmp_path / "exported"))
    assert (first.node, first.nodes) == (0, 1)
    assert others == [None] * 3
    assert f"warning: save: {saves[0]} is on a disk of each node's own" in capsys.readouterr().out


def test_a_process_on_each_node_exports_weights_that_are_split(
    world: World, tmp_path: Path, target: str
) -> None:
    saves = [tmp_path / "one"] * 2 + [tmp_path / "other"] * 2
    placed = world.place(saves, [0, 0, 0, 0], target)
    assert [exports and (exports.node, exports.nodes) for exports in placed] == [
        (0, 2),
        None,
        (1, 2),
        None,
    ]
    assert placed[2].save == str(tmp_path / "other")


def test_split_weights_need_a_store(world: World, tmp_path: Path) -> None:
    saves = [tmp_path / "one"] * 2 + [tmp_path / "other"] * 2
    errors = world.place(saves, [0, 0, 0, 0], str(tmp_path / "exported"))
    for rank, error in enumerate(errors):
        assert error.startswith(f"save: {saves[rank]} is not the same folder on all nodes")
        assert "Or set save_hf to a folder of an object store" in error
    assert list((tmp_path / "one").iterdir()) == []


def test_a_rank_that_does_not_see_the_save_of_its_node_is_refused(
    world: World, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")  # only rank 0 is the first of a node
    errors = world.place([tmp_path / "one"] * 3 + [tmp_path / "other"], [0, 0, 0, 0], target)
    assert all("is not the same folder on all nodes" in error for error in errors)
    assert list((tmp_path / "one").iterdir()) == []


def test_weights_in_optimizer_states_are_not_brought_together(
    world: World, tmp_path: Path, target: str
) -> None:
    saves = [tmp_path / "one"] * 2 + [tmp_path / "other"] * 2
    stage = {"zero_optimization": {"stage": 3}}
    errors = world.place(saves, [0, 1, 2, 3], target, **stage)
    assert all("With ZeRO stage 3, the weights are in the optimizer states" in e for e in errors)
