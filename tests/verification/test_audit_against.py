"""``audit --against``: two runs, step by step, of either kind."""

import json
import os
import shutil
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator
from published import PUBLISHED
from safetensors.numpy import load_file, save_file
from tiny import convert, tensors, write_hf

from neox_bridge.cli.app import app
from neox_bridge.errors import UsageError
from neox_bridge.verification import opened as opened_places
from neox_bridge.verification.against import (
    Comparison,
    Origin,
    StepRow,
    compare_runs,
    compared_dtypes,
    faults_of,
)
from neox_bridge.verification.compare import common_dtype
from neox_bridge.verification.run_pairs import open_pair, pair_runs
from neox_bridge.verification.runs import StepLocation, TrainingRun, find_runs

STEPS = (0, 1000, 2000, 3000)
BIAS = "gpt_neox.layers.0.attention.dense.bias"


def compare(source: Path, twin: Path, cache: Path | None = None) -> Comparison:
    sources, twins = (find_runs([str(path)])[0] for path in (source, twin))
    ((one, other),) = pair_runs(sources, twins)
    return compare_runs(open_pair(one, other), cache=str(cache) if cache else None, workers=1)


def rows(found: Comparison) -> dict[int | None, StepRow]:
    return {row.step: row for row in found.rows}


def statuses(found: Comparison) -> dict[int | None, str]:
    return {step: row.status for step, row in rows(found).items()}


def audit(*words: object) -> Any:
    return CliRunner().invoke(app, ["audit", *map(str, words), "--cache", "none"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Hugging Face folders, and the same as GPT-NeoX's on two ranks."""
    folder = tmp_path_factory.mktemp("against")
    for step in STEPS:
        write_hf(folder / "hf" / f"step{step}", seed=step)
        convert(folder / "hf" / f"step{step}", folder / "one", to="neox", tp=2, iteration=step)
        shutil.copytree(folder / "one" / f"global_step{step}", folder / f"neox/global_step{step}")
        shutil.rmtree(folder / "one")
    return folder


@pytest.fixture
def hf(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "hf", tmp_path / "hf"))


@pytest.fixture
def neox(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "neox", tmp_path / "neox"))


def edit(step: Path, **changed: Any) -> None:
    path = step / "model.safetensors"
    save_file({**load_file(path), **changed}, path, {"format": "pt"})


def cast(folder: Path, dtype: type) -> None:
    path = folder / "model.safetensors"
    values = {name: value.astype(dtype) for name, value in load_file(path).items()}
    save_file(values, path, {"format": "pt"})


def test_the_same_weights_in_both_kinds(made: Path) -> None:
    """Other layouts and ranks are no difference; either side may be of either kind."""
    for source, twin in (("neox", "hf"), ("hf", "neox"), ("hf", "hf"), ("neox", "neox")):
        found = compare(made / source, made / twin)
        assert statuses(found) == dict.fromkeys(STEPS, "same")
        assert found.holds
        assert found.compared == len(STEPS)
        assert faults_of(found) == []
        assert found.settings == ()


def test_a_tensor_that_differs_is_named(made: Path, hf: Path) -> None:
    bias = tensors(2000)[BIAS]
    bias[3] = np.nextafter(bias[3], np.float32(9))
    edit(hf / "step2000", **{BIAS: bias})
    found = compare(made / "neox", hf)
    assert not found.holds
    assert statuses(found) == {**dict.fromkeys(STEPS, "same"), 2000: "differs"}
    row = rows(found)[2000]
    assert [(one.name, one.kind) for one in row.differences] == [(BIAS, "values")]
    assert row.origins == ()
    (fault,) = faults_of(found)
    assert (fault.code, fault.severity, fault.steps) == ("weights-differ", "error", ("2000",))
    assert fault.tensors == (BIAS,)


def test_mixed_up_steps_are_traced(made: Path, hf: Path) -> None:
    """Two branches that changed places, as in EleutherAI/pythia#205."""
    (hf / "step1000").rename(hf / "other")
    (hf / "step2000").rename(hf / "step1000")
    (hf / "other").rename(hf / "step2000")
    found = compare(made / "neox", hf)
    count = len(tensors())
    for step, other in ((1000, "2000"), (2000, "1000")):
        row = rows(found)[step]
        assert len(row.differences) == row.tensors == count
        assert set(row.origins) == {Origin("twin", other, count), Origin("source", other, count)}
    assert statuses(found)[3000] == "same"


def test_one_shard_of_another_step_is_traced(made: Path, hf: Path) -> None:
    """Part of a step's files are another step's, as in EleutherAI/pythia#206."""
    changed = {name: value for name, value in tensors(0).items() if "mlp" in name}
    edit(hf / "step3000", **changed)
    row = rows(compare(made / "neox", hf))[3000]
    assert {one.name for one in row.differences} == set(changed)
    assert row.origins == (Origin("source", "0", len(changed)),)


def test_weights_of_a_step_that_only_one_run_has_are_traced(neox: Path, hf: Path) -> None:
    """A step without a counterpart is read where that explains a step that differs."""
    shutil.rmtree(neox / "global_step3000")
    shutil.rmtree(hf / "step2000")
    (hf / "step3000").rename(hf / "step2000")
    write_hf(hf / "step4000", seed=2000)
    found = compare(neox, hf)
    assert statuses(found) == {**{0: "same", 1000: "same", 2000: "differs", 4000: "no counterpart"}}
    assert rows(found)[2000].origins == (Origin("twin", "4000", len(tensors())),)


def test_a_tensor_of_one_value_tells_nothing(made: Path, hf: Path, tmp_path: Path) -> None:
    """Biases are zeros and norms ones at many steps, so that they belong to none."""
    source = Path(shutil.copytree(hf, tmp_path / "source"))
    edit(source / "step0", **{BIAS: np.zeros(8, np.float32)})
    edit(hf / "step1000", **{BIAS: np.zeros(8, np.float32)})
    found = compare(source, hf)
    assert [row.origins for row in found.rows if row.status == "differs"] == [(), ()]


def test_a_step_that_only_one_run_has_is_a_row(
    neox: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(neox / "global_step1000")
    shutil.rmtree(hf / "step3000")
    opened: list[str] = []
    original = opened_places.open_any

    def opening(path: str, **more: Any) -> Any:
        opened.append(Path(path).name)
        return original(path, **more)

    monkeypatch.setattr(opened_places, "open_any", opening)
    found = compare(neox, hf)
    assert statuses(found) == {
        **{0: "same", 1000: "no counterpart", 2000: "same", 3000: "no counterpart"}
    }
    assert (rows(found)[1000].side, rows(found)[3000].side) == ("source", "twin")
    assert (rows(found)[1000].source, rows(found)[3000].twin) == ("", "")
    assert rows(found)[1000].twin == str(hf / "step1000")
    assert found.holds, "the steps that both have are the same"
    assert sorted(opened) == ["global_step0", "global_step2000", "step0", "step2000"]
    assert {fault.severity for fault in faults_of(found)} == {"info"}


def test_a_step_that_is_not_whole_is_named(neox: Path, hf: Path) -> None:
    (neox / "global_step2000" / "layer_02-model_01-model_states.pt").unlink()
    found = compare(neox, hf)
    row = rows(found)[2000]
    assert (row.status, row.side) == ("unreadable", "source")
    assert "layer_02-model_01-model_states.pt" in row.reason
    assert not found.holds
    assert found.count("same") == len(STEPS) - 1
    (hf / "step1000" / "model.safetensors").unlink()
    row = rows(compare(neox, hf))[1000]
    assert (row.status, row.side) == ("unreadable", "twin")
    assert "step1000" in row.reason


def test_other_dtypes_are_compared_after_the_exact_cast(made: Path, hf: Path) -> None:
    """fp16 against fp32 that holds the same values; one bit more in fp32 is a difference."""
    half = made / "half"
    if not half.exists():
        shutil.copytree(made / "hf", half)
        for step in STEPS:
            cast(half / f"step{step}", np.float16)
    for step in STEPS:
        cast(hf / f"step{step}", np.float16)
        cast(hf / f"step{step}", np.float32)
    found = compare(half, hf)
    assert found.holds
    assert compared_dtypes(found.rows) == [("float16", "float32")]
    bias = load_file(hf / "step0/model.safetensors")[BIAS]
    bias[0] = np.nextafter(bias[0], np.float32(9))
    edit(hf / "step0", **{BIAS: bias})
    found = compare(half, hf)
    assert [one.name for one in rows(found)[0].differences] == [BIAS]
    rounded = compare(half, made / "hf")
    assert statuses(rounded) == dict.fromkeys(STEPS, "differs"), "float32 has more digits"


@pytest.mark.parametrize(
    ("kinds", "common"),
    [
        (("float16", "float32"), "float32"),
        (("float16", "bfloat16"), "float32"),
        (("bfloat16", "float64"), "float64"),
        (("float32",), "float32"),
        (("float16", "int64"), None),
    ],
)
def test_the_dtype_that_keeps_every_value(kinds: tuple[str, ...], common: str | None) -> None:
    assert common_dtype(kinds) == common


def test_the_cache_keeps_what_was_read(made: Path, hf: Path, tmp_path: Path) -> None:
    """Also after a cast, apart from what an audit alone remembers of the same files."""
    for path in hf.glob("*/model.safetensors"):
        cast(path.parent, np.float16)
    old = 1_000_000_000
    for path in (*hf.rglob("*.safetensors"), *made.rglob("*.pt")):
        os.utime(path, (old, old))
    cache = tmp_path / "cache"
    before = compare(made / "neox", hf, cache)
    assert list(cache.glob("*.json"))
    assert list((cache / "cast").glob("*.json"))
    assert compare(made / "neox", hf, cache) == before
    assert compare(made / "neox", made / "hf", cache).holds


def test_other_settings_are_a_warning(made: Path, hf: Path) -> None:
    for step in STEPS:
        path = hf / f"step{step}" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "gelu_fast"}))
    found = compare(made / "neox", hf)
    assert found.holds
    assert found.settings == ("activation",)
    (fault,) = faults_of(found)
    assert (fault.code, fault.severity) == ("settings-differ", "warning")
    done = audit(made / "neox", "--against", hf)
    assert done.exit_code == 0
    assert "differ: activation" in done.stderr


def test_a_single_checkpoint_belongs_to_the_other_single_one(made: Path, tmp_path: Path) -> None:
    """A folder whose name tells no step, and one whose files do."""
    convert(PUBLISHED / "v1_dp2" / "flat", tmp_path / "hf", to="hf")
    for source, twin in (
        (tmp_path / "hf", PUBLISHED / "v1_dp2" / "flat"),
        (PUBLISHED / "v1_dp2" / "flat", tmp_path / "hf"),
    ):
        found = compare(source, twin)
        assert [row.status for row in found.rows] == ["same"]
    shutil.copytree(tmp_path / "hf", tmp_path / "run" / "step8")
    shutil.copytree(tmp_path / "hf", tmp_path / "run" / "step16")
    found = compare(PUBLISHED / "v1_dp2" / "flat", tmp_path / "run")
    assert statuses(found) == {8: "same", 16: "no counterpart"}, "its files say that this is step 8"


def test_what_a_step_says_of_itself(tmp_path: Path) -> None:
    shutil.copytree(PUBLISHED / "v1_dp2" / "flat", tmp_path / "raw" / "step16")
    convert(PUBLISHED / "v1_dp2" / "flat", tmp_path / "hf" / "step16", to="hf")
    (row,) = compare(tmp_path / "raw", tmp_path / "hf").rows
    assert (row.step, row.status, row.saved) == (16, "same", 8)


def test_runs_are_paired_by_name(made: Path) -> None:
    def run(name: str) -> TrainingRun:
        return TrainingRun(name, (StepLocation(name, "0", 0),))

    pairs = pair_runs([run("a/x"), run("a/y")], [run("b/y"), run("b/x")])
    assert [(one.name, other.name) for one, other in pairs] == [("a/x", "b/x"), ("a/y", "b/y")]
    raw = "EleutherAI/neox-ckpt-pythia-160m"
    twins = [run("EleutherAI/pythia-70m"), run("EleutherAI/pythia-160m")]
    assert pair_runs([run(raw)], twins)[0][1].name == "EleutherAI/pythia-160m"
    with pytest.raises(UsageError, match="a/z") as error:
        pair_runs([run("a/z")], twins)
    assert error.value.parameters == ("against",)


def test_the_command(made: Path, hf: Path, tmp_path: Path) -> None:
    same = audit(made / "neox", "--against", made / "hf")
    assert same.exit_code == 0, same.output
    assert "4 steps: 4 equal" in same.stdout
    assert same.stderr == ""
    edit(hf / "step1000", **{BIAS: tensors(2000)[BIAS]})
    shutil.rmtree(hf / "step3000")
    done = audit(made / "neox", "--against", hf)
    assert done.exit_code == 3
    assert "1000  DIFFERS" in done.stdout
    assert f"all of these tensors in {hf} equal step 2000 of {made / 'neox'}" in done.stdout
    assert f"3000  no counterpart           {hf} has no such step" in done.stdout
    assert "4 steps: 2 equal, 1 different, 1 without a counterpart" in done.stdout
    some = audit(made / "neox", "--against", hf, "--steps", "0,2000-3000")
    assert some.exit_code == 0, some.output
    assert "3 steps: 2 equal, 1 without a counterpart" in some.stdout
    assert audit(made / "neox", "--against", hf, "-q").output == ""


def test_the_document_is_that_of_its_schema(made: Path, hf: Path, tmp_path: Path) -> None:
    edit(hf / "step1000", **{BIAS: tensors(2000)[BIAS]})
    shutil.rmtree(hf / "step3000")
    (hf / "step2000" / "model.safetensors").unlink()
    done = audit(made / "neox", "--against", hf, "--json")
    assert done.exit_code == 3
    document = json.loads(done.stdout)
    text = resources("neox_bridge.verification").joinpath("against.schema.json").read_text()
    validator = Draft202012Validator(json.loads(text))
    validator.validate(document)
    (comparison,) = document["comparisons"]
    assert [(row["step"], row["status"]) for row in comparison["rows"]] == [
        *((0, "same"), (1000, "differs"), (2000, "unreadable"), (3000, "no counterpart"))
    ]
    assert (document["holds"], document["compared"]) == (False, 2)
    assert comparison["rows"][1]["differences"] == [{"name": BIAS, "kind": "values"}]
    assert comparison["rows"][1]["origins"] == [{"side": "source", "step": "2000", "tensors": 1}]
    path = tmp_path / "against.json"
    path.write_text(done.stdout)
    page = CliRunner().invoke(app, ["report", str(path), "-o", str(tmp_path / "page.html")])
    assert page.exit_code == 3, page.output
    html = (tmp_path / "page.html").read_text()
    assert "Different weights: 1 differs, 1 unreadable" in html
    assert "source step 2000 (1)" in html
    del document["comparisons"][0]["rows"][0]["label"]
    assert not validator.is_valid(document)


def test_nothing_to_compare_is_an_error(made: Path, tmp_path: Path) -> None:
    write_hf(tmp_path / "other" / "step7")
    done = audit(made / "neox", "--against", tmp_path / "other")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "nothing was compared" in done.stderr
    done = audit(made / "neox", "--against", tmp_path / "absent")
    assert done.exit_code == 1
    assert "absent" in done.stderr


@pytest.mark.parametrize("option", ["--optimizer", "--same-init", "--plot=x.svg"])
def test_options_of_an_audit_alone(option: str, made: Path) -> None:
    done = audit(made / "neox", "--against", made / "hf", option)
    assert done.exit_code == 2
    assert "cannot be combined with --against" in done.stderr
    assert option.partition("=")[0] in done.stderr


def test_steps_of_an_audit(made: Path) -> None:
    done = audit(made / "hf", "--steps", "1000,last", "--json")
    assert [step["step"] for step in json.loads(done.stdout)["steps"]] == [1000, 3000]
    for words, said in (
        ("7", "no step 7"),
        ("50-60", "matches no step"),
        ("x", "not a step"),
    ):
        done = audit(made / "hf", "--steps", words)
        assert done.exit_code == 2
        assert said in done.stderr
