"""What an audit finds in folders, and what it says of steps that it cannot read."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import convert, tensors, write_hf

from neox_bridge.api import open_checkpoint
from neox_bridge.errors import BridgeError
from neox_bridge.findings import Dropped
from neox_bridge.verification import audit as auditing
from neox_bridge.verification import steps as reading
from neox_bridge.verification.audit import Audit, audit
from neox_bridge.verification.opened import Opened, open_places
from neox_bridge.verification.runs import Fault, StepLocation, find_runs
from neox_bridge.verification.steps import read_step

STATES = Dropped("optim_states.pt", "states", kind="optimizer")


def folders(home: Path, *paths: str) -> Path:
    """Empty folders; those that end in .json are files of configs."""
    for path in paths:
        if path.endswith(".json"):
            (home / path).parent.mkdir(parents=True, exist_ok=True)
            (home / path).write_text("{}")
        else:
            (home / path).mkdir(parents=True, exist_ok=True)
    return home


def places(*paths: Path) -> dict[str, list[str]]:
    runs, _ = find_runs(map(str, paths))
    return {run.name: [place.label for place in run.places] for run in runs}


def faults(*paths: Path) -> list[tuple[str, str]]:
    return [(fault.code, fault.run) for fault in find_runs(map(str, paths))[1]]


# --- runs


def test_steps_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folders(tmp_path, "step10", "step9", "step100")
    ((run,), no_faults) = find_runs([str(tmp_path)])
    assert run.places == tuple(
        StepLocation(str(tmp_path / f"step{n}"), str(n), n) for n in (9, 10, 100)
    )
    assert no_faults == []


def test_runs_are_in_the_order_of_the_numbers_in_their_names(tmp_path: Path) -> None:
    folders(tmp_path, "seed10/step1", "seed9/step1", "seed9/step0")
    assert list(places(tmp_path).items()) == [
        (str(tmp_path / "seed9"), ["0", "1"]),
        (str(tmp_path / "seed10"), ["1"]),
    ]


def test_a_checkpoint_without_a_number_is_named_by_its_folder(tmp_path: Path) -> None:
    folders(tmp_path, "model/config.json")
    ((run,), _) = find_runs([str(tmp_path / "model")])
    assert run.places == (StepLocation(str(tmp_path / "model"), "model", None),)


def test_one_step_converted_to_a_root_of_its_own_is_a_step_of_the_run(tmp_path: Path) -> None:
    folders(tmp_path, "run/step5/global_step5", "run/step6/global_step6")
    assert places(tmp_path / "run") == {str(tmp_path / "run"): ["5", "6"]}
    assert places(tmp_path / "run/step5") == {str(tmp_path / "run"): ["5"]}


def test_a_numbered_folder_with_two_steps_is_a_run(tmp_path: Path) -> None:
    folders(tmp_path, "step5/global_step5", "step5/global_step6")
    assert places(tmp_path / "step5") == {str(tmp_path / "step5"): ["5", "6"]}


def test_the_same_folder_counts_once(tmp_path: Path) -> None:
    folders(tmp_path, "run/step1", "run/step2")
    run = tmp_path / "run"
    assert places(run, run, run / "step1") == {str(run): ["1", "2"]}


@pytest.mark.parametrize(("above", "seen"), [("a/b/c/d", True), ("a/b/c/d/e", False)])
def test_four_folders_deep_is_looked_at(above: str, seen: bool, tmp_path: Path) -> None:
    folders(tmp_path, f"{above}/config.json")
    assert places(tmp_path) == ({str(tmp_path / above): [Path(above).name]} if seen else {})
    assert faults(tmp_path) == ([] if seen else [("no-checkpoint", str(tmp_path))])


def test_a_folder_without_a_checkpoint_is_an_error_unless_another_fault_says_why(
    tmp_path: Path,
) -> None:
    folders(tmp_path, "empty", "full/config.json")
    assert faults(tmp_path / "empty") == [("no-checkpoint", str(tmp_path / "empty"))]
    assert faults(tmp_path / "full") == []
    assert faults(tmp_path / "none") == [("unreadable", str(tmp_path / "none"))]
    # one path that holds something does not excuse another
    both = faults(tmp_path / "full", tmp_path / "empty")
    assert both == [("no-checkpoint", str(tmp_path / "empty"))]


def test_what_is_left_out_beside_checkpoints_is_said(tmp_path: Path) -> None:
    folders(tmp_path, "logs", "model/config.json", "wandb")
    (fault,) = find_runs([str(tmp_path)])[1]
    assert (fault.code, fault.severity) == ("left-out", "info")
    assert fault.message.endswith("skipped, not a checkpoint of a run: logs, wandb")
    folders(tmp_path, "run/step1", "run/config.json")
    said = [f.message for f in find_runs([str(tmp_path / "run")])[1]]
    assert [message.rpartition(": ")[2] for message in said] == ["the final model beside its steps"]


def test_hidden_folders_are_no_checkpoints(tmp_path: Path) -> None:
    folders(tmp_path, ".cache/config.json", "model/config.json")
    assert places(tmp_path) == {str(tmp_path / "model"): ["model"]}
    assert faults(tmp_path) == []


def test_latest_must_name_a_step_that_is_there(tmp_path: Path) -> None:
    folders(tmp_path, "global_step9", "global_step10")
    assert faults(tmp_path) == []
    (tmp_path / "latest").write_text("global_step9\n")
    assert faults(tmp_path) == []
    (tmp_path / "latest").write_text("global_step11")
    (fault,) = find_runs([str(tmp_path)])[1]
    assert (fault.code, fault.severity, fault.run) == ("latest-missing", "error", str(tmp_path))
    assert "'global_step11'" in fault.message
    assert fault.remedy.endswith("global_step10"), "the largest number, not the last name"


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "model.safetensors", "latest"])
def test_weights_make_a_checkpoint(name: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).touch()
    assert places(tmp_path / "model") == {str(tmp_path / "model"): ["model"]}
    (tmp_path / "model" / name).rename(tmp_path / "model" / "notes.txt")
    assert places(tmp_path / "model") == {}


def test_revisions_of_a_cache_are_steps_and_main_is_one_of_them(tmp_path: Path) -> None:
    folders(tmp_path, "refs", "snapshots/c0", "snapshots/c1", "refs/pr")
    for name, commit in (("main", "c1\n"), ("step0", "c0"), ("step8", "c1")):
        (tmp_path / "refs" / name).write_text(commit)
    ((run,), no_faults) = find_runs([str(tmp_path)])
    assert no_faults == []
    assert run.places == (
        StepLocation(str(tmp_path / "snapshots/c0"), "0", 0),
        StepLocation(str(tmp_path / "snapshots/c1"), "8", 8),
    )
    (tmp_path / "refs/step0").unlink()
    (tmp_path / "refs/step8").unlink()
    ((run,), _) = find_runs([str(tmp_path)])
    assert run.places == (StepLocation(str(tmp_path / "snapshots/c1"), "main", None),)


# --- a step


def hf_step(folder: Path, run: str = "run", **options: Any) -> reading.Step:
    place = StepLocation(str(folder), "7", 7)
    return read_step(run, place, open_checkpoint(str(folder)), workers=1, **options)


def test_a_step_is_what_its_checkpoint_holds(tmp_path: Path) -> None:
    step = hf_step(write_hf(tmp_path / "hf"))
    assert (step.run, step.label, step.number, step.path) == ("run", "7", 7, str(tmp_path / "hf"))
    assert (step.kind, step.tp, step.dtype) == ("hf", 1, "float32")
    assert (step.iteration, step.updates, step.states, step.bad) == (None, (), {}, 0)
    assert step.size == sum(value.nbytes for value in tensors().values())
    assert step.read == len(step.tensors) == len(tensors())
    assert set(step.files.values()) == {("model.safetensors",)}
    assert step.making == ("float32",)
    squares = sum(float((value.astype("f8") ** 2).sum()) for value in tensors().values())
    assert step.norm == pytest.approx(squares**0.5, rel=1e-12)
    assert step.meaning["family"] == "gpt_neox"
    assert step.meaning["hidden size"] == 8
    assert "vocab size" not in step.meaning


def test_ranks_are_counted_and_each_has_its_files(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    root = convert(tmp_path / "hf", tmp_path / "neox", tp=2, iteration=7)
    step = hf_step(root)
    assert (step.kind, step.tp, step.iteration) == ("neox", 2, None)
    assert step.making[:3] == ("float32", "tp=2", "pp=1")
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    assert step.files[name] == tuple(f"layer_02-model_0{r}-model_states.pt" for r in (0, 1))
    assert len(step.tensors[name].shards) == 2
    assert step.hash == hf_step(tmp_path / "hf").hash


def test_the_hash_of_a_step_is_that_of_every_tensor_and_name(tmp_path: Path) -> None:
    step = hf_step(write_hf(tmp_path / "hf"))
    hashes = {step.hash}
    for name, found in step.tensors.items():
        changed = {**step.tensors, name: replace(found, hash="0" * 32)}
        hashes.add(replace(step, tensors=changed).hash)
        renamed = {(key + "x" if key == name else key): f for key, f in step.tensors.items()}
        hashes.add(replace(step, tensors=renamed).hash)
    assert len(hashes) == 1 + 2 * len(step.tensors)
    backwards = dict(reversed(step.tensors.items()))
    assert replace(step, tensors=backwards).hash == step.hash


def test_what_is_in_the_cache_is_not_read_again(tmp_path: Path) -> None:
    hf, cache = write_hf(tmp_path / "hf"), str(tmp_path / "cache")
    os.utime(hf / "model.safetensors", (1e9, 1e9))  # files of the last seconds are not remembered
    counted: list[int] = []
    first = hf_step(hf, cache=cache, progress=counted.append)
    assert (first.read, sum(counted)) == (len(first.tensors), first.size)
    counted.clear()
    again = hf_step(hf, cache=cache, progress=counted.append)
    assert (again.read, sum(counted)) == (0, again.size)
    assert (again.hash, again.tensors) == (first.hash, first.tensors)


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: Any) -> None:
    hf = write_hf(tmp_path / "hf")
    real = reading.fingerprints

    def meanwhile(checkpoint: Any, **options: Any) -> Any:
        found = real(checkpoint, **options)
        (hf / "model.safetensors").write_bytes(b"0" + (hf / "model.safetensors").read_bytes())
        return found

    monkeypatch.setattr(reading, "fingerprints", meanwhile)
    with pytest.raises(BridgeError, match=r"model\.safetensors"):
        hf_step(hf, cache=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("**/*.json")), "nothing of it is remembered"


@pytest.mark.parametrize(
    ("run", "raw", "seed"),
    [
        ("runs/pythia-70m-seed3", {}, 3),
        ("runs/pythia-70m-Seed_3", {"seed": 5}, 5),
        ("runs/seed4/model", {}, None),
        ("runs/pythia", {"seed": 0}, 0),
        ("runs/pythia", {"seed": "x"}, None),
    ],
)
def test_the_seed_is_the_ymls_or_the_runs_name(run: str, raw: Any, seed: int | None) -> None:
    assert reading._seed(run, raw) == seed


def test_an_optimizer_counts_the_steps_that_the_loss_scale_skipped() -> None:
    groups = [
        SimpleNamespace(scalars={"step": 5}, settings={}),
        SimpleNamespace(scalars={}, settings={"step": 4}),
        SimpleNamespace(scalars={}, settings={}),
    ]
    for skipped, updates in ((3, (8, 7)), (0, (5, 4)), (None, (5, 4))):
        optimizer: Any = SimpleNamespace(metas=[{"skipped_steps": skipped}], groups=groups)
        assert reading._updates(optimizer) == updates


@pytest.mark.parametrize(
    ("neox", "iteration"),
    [
        (None, None),
        (SimpleNamespace(iteration=5, named_step=5), None),
        (SimpleNamespace(iteration=5, named_step=None), None),
        (SimpleNamespace(iteration=4, named_step=5), 4),
    ],
)
def test_a_number_inside_is_named_where_it_is_another(neox: Any, iteration: int | None) -> None:
    checkpoint: Any = SimpleNamespace(neox=neox)
    assert reading._iteration(checkpoint) == iteration


def test_what_initial_weights_depend_on() -> None:
    raw = {"init_method": "normal", "mup-x": 1, "initial_loss": 2, "hidden": 3, "use_mup": True}
    config = SimpleNamespace(dtype="float16")
    neox: Any = SimpleNamespace(config=config, raw=raw, neox=SimpleNamespace(tp=2, pp=4))
    expected = ("float16", "tp=2", "pp=4", "init_method=normal", "mup-x=1", "use_mup=True")
    assert reading._making(neox) == expected


# --- all together


def run_of(home: Path, *numbers: int) -> Path:
    for number in numbers:
        write_hf(home / f"step{number}", seed=number)
    return home


def look(home: Path, **options: Any) -> Audit:
    runs, known = find_runs([str(home)])
    return audit(open_places(runs), faults=known, workers=1, **options)


def test_a_sound_run_has_no_faults(tmp_path: Path) -> None:
    found = look(run_of(tmp_path, 0, 10, 20))
    assert (found.faults, found.holds) == ((), True)
    assert [step.label for step in found.steps] == ["0", "10", "20"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (BridgeError("model.safetensors is cut short"), "model.safetensors is cut short"),
        (OSError(5, "Input/output error", "a/b.pt"), "a/b.pt cannot be read: Input/output error"),
        (OSError("odd"), "/step10 cannot be read: odd"),
    ],
)
def test_a_step_whose_weights_cannot_be_read_is_an_error_and_stops_no_other(
    error: Exception, words: str, tmp_path: Path, monkeypatch: Any
) -> None:
    run_of(tmp_path, 0, 10, 20)
    real = auditing.read_step

    def fails(run: str, place: StepLocation, *rest: Any, **options: Any) -> Any:
        if place.number == 10:
            raise error
        return real(run, place, *rest, **options)

    monkeypatch.setattr(auditing, "read_step", fails)
    found = look(tmp_path)
    (fault,) = found.faults
    assert (fault.code, fault.severity, fault.steps) == ("unreadable", "error", ("10",))
    assert fault.message.removeprefix(str(tmp_path)) == words
    assert fault.run == str(tmp_path)
    assert not found.holds
    assert [step.label for step in found.steps] == ["0", "20"]


def test_a_step_that_cannot_be_opened_counts_as_there(tmp_path: Path) -> None:
    run_of(tmp_path, 0, 10, 20, 30, 40, 50, 60)
    (tmp_path / "step30/config.json").write_text("{")
    found = look(tmp_path)
    assert [(f.code, f.steps) for f in found.faults] == [("unreadable", ("30",))]
    (tmp_path / "step30/config.json").unlink()
    (tmp_path / "step30/model.safetensors").unlink()
    (tmp_path / "step30").rmdir()
    found = look(tmp_path)
    assert [(f.code, f.steps) for f in found.faults] == [("missing-steps", ("30",))]


def test_a_learned_head_beside_tied_embeddings_is_a_warning(tmp_path: Path) -> None:
    run_of(tmp_path, 0, 10)
    write_hf(tmp_path / "step20", seed=20, tie_word_embeddings=True)
    found = look(tmp_path)
    said = [(f.code, f.severity, f.steps) for f in found.faults]
    assert ("head-differs", "warning", ("20",)) in said
    assert not found.holds


def test_the_worst_is_said_first_and_information_is_no_fault() -> None:
    severities: list[Any] = ["info", "warning", "error", "info"]
    opened = [
        Opened(
            "run",
            StepLocation(f"p{n}", str(n), None),
            None,
            Fault(f"f{n}", severity, "m", "", "run"),
        )
        for n, severity in enumerate(severities)
    ]
    known = [Fault("known", "warning", "m")]
    found = audit(opened, faults=known)
    assert [f.code for f in found.faults] == ["f2", "known", "f1", "f0", "f3"]
    assert found.steps == ()
    assert not found.holds
    assert audit([one for one in opened if one.fault and one.fault.severity == "info"]).holds
    warned = audit([], faults=known)
    assert not warned.holds


def test_bytes_of_a_checkpoint_and_of_its_states(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_hf(tmp_path / "hf")))
    place = StepLocation(str(tmp_path / "hf"), "hf")
    size = sum(value.nbytes for value in tensors().values())
    assert (Opened("r", place, checkpoint).size, Opened("r", place, checkpoint).states) == (size, 0)
    trained = replace(checkpoint, dropped=(STATES,))
    assert Opened("r", place, trained).states == 12 * size // 4
    assert (Opened("r", place, None).size, Opened("r", place, None).states) == (0, 0)


def test_an_optimizer_that_cannot_be_read_keeps_the_weights_in_the_audit(
    tmp_path: Path, monkeypatch: Any
) -> None:
    run_of(tmp_path, 0, 10)
    runs, _ = find_runs([str(tmp_path)])
    opened = [
        replace(
            one, checkpoint=replace(one.checkpoint, dropped=(STATES,) * (one.place.number == 10))
        )
        for one in open_places(runs)
        if one.checkpoint is not None
    ]

    def unreadable(_: Any) -> Any:
        raise BridgeError("no optimizer")

    monkeypatch.setattr(auditing, "read_optimizer", unreadable)
    assert audit(opened, workers=1).faults == ()
    found = audit(opened, optimizer=True, workers=1)
    assert [(f.code, f.severity, f.steps) for f in found.faults] == [
        ("no-states", "error", ("10",))
    ]
    assert [step.label for step in found.steps] == ["0", "10"]


def test_same_init_reaches_the_judge(tmp_path: Path) -> None:
    write_hf(tmp_path / "one/step0", seed=1)
    write_hf(tmp_path / "two/step0", seed=2)
    assert look(tmp_path).faults == ()
    (fault,) = look(tmp_path, same_init=True).faults
    assert fault.code == "init-differs"
    assert json.loads(json.dumps(fault.steps)) == ["0"]
