"""An audit finds each fault that is planted in a run, and none in one that was really trained."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import TINY, convert, fixture, make_hf
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from neox_bridge.verification.audit import Audit, audit, verdict
from neox_bridge.verification.opened import open_places
from neox_bridge.verification.runs import Fault, find_runs

STEPS = (0, 1, 2, 4, 8, 16, 32, 64, 80, 96, 112, 128, 144, 160)
SHARD = 150_000  # bytes: three files


def look(*paths: Path, **options: Any) -> Audit:
    runs, faults = find_runs(map(str, paths))
    return audit(open_places(runs), faults=faults, **options)


def wrong(found: Audit) -> list[Fault]:
    return [fault for fault in found.faults if fault.severity != "info"]


def only(found: Audit) -> Fault:
    (fault,) = wrong(found)
    return fault


def train(folder: Path, seed: int = 0) -> Path:
    """A genuine little training: warmup from 0, cosine, AdamW; powers of two first, as Pythia's."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **TINY))
    follows = torch.randint(0, 300, (300, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    warm = 16

    def rate(step: int) -> float:
        late = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / (STEPS[-1] - warm)))
        return step / warm if step < warm else late

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            model.save_pretrained(folder / f"step{step}", max_shard_size=SHARD)
        tokens = torch.randint(0, 300, (8, 1))
        for _ in range(23):
            choice = torch.randint(0, 3, (8,))
            tokens = torch.cat((tokens, follows[tokens[:, -1], choice][:, None]), 1)
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        schedule.step()
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="module")
def trained_neox(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in GPT-NeoX's layers, on two ranks."""
    return to_neox(trained, tmp_path_factory.mktemp("neox") / "run", tp=2)


def to_neox(run: Path, root: Path, **options: Any) -> Path:
    for step in STEPS:
        convert(run / f"step{step}", root / "one", **options)
        (root / "one" / "global_step0").rename(root / f"global_step{step}")
        shutil.rmtree(root / "one")
    (root / "latest").write_text(f"global_step{STEPS[-1]}")
    return root


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def neox(trained_neox: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_neox, tmp_path / "neox"))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})


def replace(source: Path, target: Path) -> None:
    shutil.rmtree(target)
    shutil.copytree(source, target)


@pytest.mark.parametrize("dtype", ["keep", "float16", "bfloat16"])
def test_nothing_is_wrong_with_a_genuine_run(dtype: str, trained: Path, tmp_path: Path) -> None:
    run = trained
    if dtype != "keep":
        run = tmp_path / "run"
        for step in STEPS:
            convert(trained / f"step{step}", run / f"step{step}", to="hf", dtype=dtype)
    found = look(run)
    assert wrong(found) == []
    assert found.holds
    assert [step.number for step in found.steps] == list(STEPS)
    # the learning rate of the first step was 0, as GPT-NeoX's
    assert [fault.code for fault in found.faults] == ["unchanged-at-first"]


def test_nothing_is_wrong_with_a_clean_suite(
    trained: Path, trained_neox: Path, tmp_path: Path
) -> None:
    """Several runs, formats and layouts, below one folder."""
    suite = tmp_path / "suite"
    shutil.copytree(trained, suite / "small-seed0")
    train(suite / "small-seed1", seed=1)
    to_neox(suite / "small-seed1", suite / "copy" / "ranks", tp=2, layout="ranks")
    shutil.rmtree(suite / "small-seed1")
    make_hf(suite / "another-model" / "step0", hidden_size=24)
    found = look(suite)
    assert wrong(found) == []
    assert {step.run for step in found.steps} == {
        str(suite / name) for name in ("another-model", "copy/ranks", "small-seed0")
    }


def test_layouts_may_change_within_a_run(run: Path, tmp_path: Path) -> None:
    """Some steps are converted already, to roots of their own."""
    for number, options in ((8, {"tp": 2}), (64, {"tp": 4, "layout": "ranks"}), (80, {"tp": 1})):
        convert(run / f"step{number}", tmp_path / "one", **options)
        shutil.rmtree(run / f"step{number}")
        (tmp_path / "one").rename(run / f"step{number}")
    found = look(run)
    assert wrong(found) == []
    assert [step.tp for step in found.steps if step.kind == "neox"] == [2, 4, 1]
    convert(run / "step96", tmp_path / "one", tp=2)
    replace(tmp_path / "one", run / "step144")
    assert only(look(run)).steps == ("96", "144")


def test_identical_steps(run: Path) -> None:
    """As in pythia#205: early steps that are the last one."""
    replace(run / "step160", run / "step4")
    replace(run / "step160", run / "step32")
    fault = only(look(run))
    assert (fault.code, fault.severity, fault.steps) == (
        "identical-steps",
        "error",
        ("4", "32", "160"),
    )
    assert "they belong to step 160, so 32 and 4 have wrong weights" in fault.remedy


def test_identical_neighbours(run: Path) -> None:
    replace(run / "step96", run / "step112")
    fault = only(look(run))
    assert (fault.code, fault.steps) == ("identical-steps", ("96", "112"))
    assert "do not show which step" in fault.remedy


def test_a_file_of_another_step(run: Path) -> None:
    """As in pythia#206: two steps with the first file of the last one."""
    name = "model-00001-of-00003.safetensors"
    for step in ("step64", "step96"):
        shutil.copy(run / "step160" / name, run / step / name)
    fault = only(look(run))
    assert (fault.code, fault.steps) == ("shared-shard", ("64", "96", "160"))
    assert name in fault.message
    assert set(fault.tensors) == {
        n for n, t in load_file(run / "step160" / name).items() if t.unique().numel() > 1
    }
    assert "step 160, so 96 and 64 have wrong weights" in fault.remedy


def test_a_stale_file(run: Path) -> None:
    """The step before's, as an upload that failed leaves it."""
    name = "model-00002-of-00003.safetensors"
    shutil.copy(run / "step128" / name, run / "step144" / name)
    fault = only(look(run))
    assert (fault.code, fault.steps) == ("shared-shard", ("128", "144"))


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("layer_03-model_*-model_states.pt", None),
        ("layer_03-model_01-model_states.pt", 1),
        ("layer_00-model_00-model_states.pt", 0),
        ("layer_06-model_01-model_states.pt", 1),
        ("layer_05-model_*-model_states.pt", None),  # the final norm: vectors alone
    ],
)
@pytest.mark.parametrize("source", [64, 112])
def test_a_layer_of_another_step(name: str, ranks: int | None, source: int, neox: Path) -> None:
    """Down to the shard of one rank."""
    for path in (neox / f"global_step{source}").glob(name):
        shutil.copy(path, neox / "global_step128" / path.name)
    fault = only(look(neox))
    assert (fault.code, fault.steps) == ("shared-shard", (str(source), "128"))
    assert (f"of tensor-parallel rank {ranks}" in fault.message) == (ranks is not None)
    assert name.replace("*", "00") in fault.message or ranks is not None
    layer = {"00": "embed_in", "03": "layers.1.", "05": "final_layer_norm", "06": "embed_out"}
    assert all(layer[name[6:8]] in tensor for tensor in fault.tensors)


def test_one_matrix_that_comes_back(run: Path) -> None:
    """Not all of a file: no rounding brings back what had changed. What merely stays is none."""
    name, file = "embed_out.weight", "model-00003-of-00003.safetensors"
    for source, count in ((64, 1), (112, 0)):
        old, step = load_file(run / f"step{source}" / file)[name], run / "step128"
        before = load_file(step / file)
        edit(step, lambda t, old=old: t.update({name: old} if name in t else {}))  # type: ignore
        found = wrong(look(run))
        assert [(f.code, f.steps) for f in found] == [("shared-shard", (str(source), "128"))][
            :count
        ]
        save_file(before, step / file, {"format": "pt"})


def test_frozen_tensors_are_no_fault(run: Path) -> None:
    name = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
    frozen = torch.randn(192, 48)
    for folder in run.iterdir():
        edit(folder, lambda tensors: tensors.update({name: frozen} if name in tensors else {}))
    found = look(run)
    assert found.holds
    (fault,) = [fault for fault in found.faults if fault.code == "frozen"]
    assert fault.tensors == (name,)


@pytest.mark.parametrize("later", [False, True])
def test_a_norm_that_jumps(later: bool, run: Path) -> None:
    """One step's, or from one step on; training itself is slow by then."""
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
    wrong_ones = [n for n in STEPS if n >= 112] if later else [112]
    for step in wrong_ones:
        edit(run / f"step{step}", lambda t: t[name].mul_(1.5) if name in t else None)
    fault = only(look(run))
    assert (fault.code, fault.severity) == ("norm-jump", "warning")
    assert (fault.steps, fault.tensors) == (("112",), (name,))
    assert ("to normal at the next step" in fault.message) != later


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite(value: float, run: Path) -> None:
    name = "embed_out.weight"
    edit(run / "step64", lambda t: t[name][3].fill_(value) if name in t else None)
    fault = only(look(run))
    assert (fault.code, fault.steps, fault.tensors) == ("not-finite", ("64",), (name,))


def test_a_matrix_that_became_blank(run: Path) -> None:
    name = "gpt_neox.layers.0.attention.dense.weight"
    edit(run / "step160", lambda t: t[name].zero_() if name in t else None)
    assert "blank-tensor" in {fault.code for fault in wrong(look(run))}


def test_another_config(run: Path) -> None:
    path = run / "step32" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["partial_rotary_factor"] = 0.25
    path.write_text(json.dumps(config))
    fault = only(look(run))
    assert (fault.code, fault.steps) == ("config-differs", ("32",))
    assert "rotary_pct is 0.25" in fault.message


def test_another_model_among_the_steps(run: Path) -> None:
    shutil.rmtree(run / "step32")
    make_hf(run / "step32", intermediate_size=96)
    codes = {fault.code: fault.steps for fault in wrong(look(run))}
    assert codes["shapes-differ"] == codes["config-differs"] == ("32",)


def test_another_dtype(run: Path, tmp_path: Path) -> None:
    convert(run / "step64", tmp_path / "half", to="hf", dtype="bfloat16")
    replace(tmp_path / "half", run / "step64")
    assert (only(look(run)).code, only(look(run)).steps) == ("dtype-differs", ("64",))


def test_what_a_checkpoint_says_of_its_step(neox: Path) -> None:
    for path in (neox / "global_step64").glob("mp_rank*"):
        value = torch.load(path, weights_only=False)
        value["iteration"] = 80
        torch.save(value, path)
    assert (only(look(neox)).code, only(look(neox)).steps) == ("other-iteration", ("64",))


def test_a_missing_step(run: Path) -> None:
    shutil.rmtree(run / "step112")
    assert (only(look(run)).code, only(look(run)).steps) == ("missing-steps", ("112",))


def test_latest_names_a_missing_step(neox: Path) -> None:
    (neox / "latest").write_text("global_step999")
    fault = only(look(neox))
    assert (fault.code, "global_step160" in fault.remedy) == ("latest-missing", True)


def spoil(run: Path) -> dict[str, str]:
    """Steps that can't be read, and a word of what is said of each."""
    (run / "step1" / "model-00002-of-00003.safetensors").unlink()
    cut = run / "step2" / "model-00001-of-00003.safetensors"
    cut.write_bytes(cut.read_bytes()[:9_000])
    (run / "step4" / "config.json").write_text("{")
    shutil.rmtree(run / "step8")
    (run / "step8").mkdir()
    shutil.rmtree(run / "step16")
    shutil.copytree(fixture("pythia_fp32_pp1_tp2") / "global_step2", run / "step16")
    shutil.rmtree(run / "step16" / "configs")  # with them it is read, whatever its name
    other = run / "step32" / "config.json"
    other.write_text(json.dumps({**json.loads(other.read_text()), "model_type": "mamba"}))
    words = ["missing", "", "JSON", "neither", "`configs="]
    return dict(zip(("1", "2", "4", "8", "16"), words, strict=True))


def test_bad_input_does_not_stop_the_audit(run: Path) -> None:
    bad = spoil(run)
    replace(run / "step144", run / "step96")
    found = look(run)
    said = {f.steps[0]: f.message for f in wrong(found) if f.code == "unreadable"}
    assert said.keys() == bad.keys()
    assert [step for step, word in bad.items() if word not in said[step]] == []
    assert [f.steps for f in wrong(found) if f.code == "identical-steps"] == [("96", "144")]
    assert len(found.steps) == len(STEPS) - len(bad)
    # a step of another family has no tensors of it, so all are read by their names
    assert {step.read_by for step in found.steps} == {"names"}
    (config,) = (f for f in wrong(found) if f.code == "config-differs")
    assert (config.steps, config.severity) == (("32",), "warning")
    assert "model_type is 'mamba', and 'gpt_neox' at most steps" in config.message


def test_half_written_gpt_neox_steps(neox: Path) -> None:
    (neox / "global_step64" / "layer_02-model_01-model_states.pt").unlink()
    shutil.rmtree(neox / "global_step80" / "configs")
    (neox / "global_step96" / "layer_02-model_01-model_states.pt").write_bytes(b"PK\3\4")
    found = look(neox)
    assert [f.steps for f in wrong(found)] == [("64",), ("80",), ("96",)]
    assert {f.code for f in wrong(found)} == {"unreadable"}


def starts(folder: Path, seeds: dict[str, int], told: dict[str, int]) -> Path:
    """GPT-NeoX runs with a step 0: made from one seed, and what their yml says."""
    for name, seed in seeds.items():
        make_hf(folder / "hf" / name, seed=seed)
        convert(folder / "hf" / name, folder / "suite" / name)
        yml = folder / "suite" / name / "global_step0" / "configs" / "neox_bridge.yml"
        text = yml.read_text()
        yml.write_text(f"{text}\nseed: {told[name]}\n" if name in told else text)
    return folder / "suite"


def test_initial_weights(tmp_path: Path) -> None:
    made = {"a": 1, "b": 1, "c": 2}
    differs = starts(tmp_path / "1", made, {"a": 7, "b": 7, "c": 7})
    fault = only(look(differs))
    assert (fault.code, fault.run, len(fault.tensors)) == ("init-differs", str(differs / "c"), 28)
    same = starts(tmp_path / "2", made, {"a": 7, "b": 8, "c": 9})
    fault = only(look(same))
    assert (fault.code, fault.run) == ("init-same", str(same / "b"))
    assert look(starts(tmp_path / "3", made, {"a": 7, "b": 7, "c": 8})).holds
    assert look(starts(tmp_path / "4", made, {})).holds


def test_same_init(tmp_path: Path) -> None:
    """What a yml doesn't tell, the user may: pythia's deduped runs begin as the others do."""
    for name, seed in (("pythia", 1), ("pythia-deduped", 2)):
        make_hf(tmp_path / name / "step0", seed=seed)
    assert look(tmp_path).holds
    assert only(look(tmp_path, same_init=True)).code == "init-differs"
    replace(tmp_path / "pythia", tmp_path / "pythia-deduped")
    assert look(tmp_path, same_init=True).holds


def test_steps_of_another_run(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "a")
    train(tmp_path / "b", seed=1)
    assert look(tmp_path).holds
    replace(tmp_path / "a" / "step112", tmp_path / "b" / "step112")
    codes = {fault.code: fault for fault in wrong(look(tmp_path))}
    assert codes["shared-step"].steps == ("112",)


def test_a_run_that_goes_on_from_another(trained: Path, tmp_path: Path) -> None:
    """A fork has its beginning."""
    train(tmp_path / "b", seed=1)
    shutil.copytree(trained, tmp_path / "a")
    for step in STEPS[:5]:
        replace(tmp_path / "a" / f"step{step}", tmp_path / "b" / f"step{step}")
    assert "shared-step" not in {fault.code for fault in wrong(look(tmp_path))}


def command(*arguments: object, cache: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "neox_bridge", "audit", *map(str, arguments)]
    return subprocess.run([*words, "--cache", str(cache)], capture_output=True, text=True)


def test_the_command(run: Path, tmp_path: Path) -> None:
    cache, picture = tmp_path / "cache", tmp_path / "norms.svg"
    done = command(run, "--plot", picture, cache=cache)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str(run)
    assert lines[-1] == "14 steps of 1 run: 0 errors, 0 warnings"
    assert [line.split()[0] for line in lines[2:-1]] == [str(step) for step in STEPS]
    assert "<svg" in picture.read_text()
    replace(run / "step160", run / "step80")
    done = command(run, "--json", cache=cache)
    assert done.returncode == 3
    told = json.loads(done.stdout)
    assert (told["schema_version"], told["holds"]) == (1, False)
    assert [f["code"] for f in told["findings"] if f["severity"] == "error"] == ["identical-steps"]
    verdicts = {step["step"]: step["verdict"] for step in told["steps"]}
    assert [step for step, word in verdicts.items() if word != "ok"] == [80, 160]
    quiet = command(run, "-q", cache=cache)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (3, "", "")
    nothing = command(tmp_path / "nowhere", cache=cache)
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert "Traceback" not in nothing.stderr


def test_steps_are_read_once(run: Path, tmp_path: Path) -> None:
    import os

    for path in run.rglob("*.safetensors"):
        os.utime(path, (1e9, 1e9))
    cache = str(tmp_path / "cache")
    first = look(run, cache=cache)
    assert {step.read for step in first.steps} == {28}
    again = look(run, cache=cache)
    assert {step.read for step in again.steps} == {0}
    assert again.faults == first.faults
    for one, two in zip(first.steps, again.steps, strict=True):
        assert (one.hash, one.tensors) == (two.hash, two.tensors)
    assert {verdict(step, again.faults) for step in again.steps} == {"ok"}


def test_what_a_folder_may_be(trained: Path, neox: Path, tmp_path: Path) -> None:
    def places(*paths: Path) -> dict[str, list[str]]:
        return {r.name: [p.label for p in r.places] for r in find_runs(map(str, paths))[0]}

    everything = [str(step) for step in STEPS]
    assert places(trained) == {str(trained): everything}
    assert places(neox) == {str(neox): everything}
    assert places(neox / "global_step4", neox / "global_step2") == {str(neox): ["2", "4"]}
    assert places(neox, neox / "global_step2") == {str(neox): everything}
    assert places(trained / "step8") == {str(trained): ["8"]}
    suite = tmp_path / "suite"
    for name in ("pythia-70m-step5", "pythia-70m_step10", "other/checkpoint-3", "logs", "single"):
        (suite / name).mkdir(parents=True)
    (suite / "single" / "config.json").write_text("{}")
    assert places(suite) == {
        str(suite / "other"): ["3"],
        str(suite / "pythia-70m"): ["5", "10"],
        str(suite / "single"): ["single"],
    }
    cached = tmp_path / "models--EleutherAI--pythia-70m"
    for name, commit in (("main", "c1"), ("step0", "c0"), ("step1000", "c1")):
        (cached / "refs").mkdir(parents=True, exist_ok=True)
        (cached / "refs" / name).write_text(commit)
        (cached / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
    assert places(cached) == {str(cached): ["0", "1000"]}
    (tmp_path / "empty").mkdir()
    assert [f.code for f in find_runs([str(tmp_path / "empty")])[1]] == ["no-checkpoint"]
