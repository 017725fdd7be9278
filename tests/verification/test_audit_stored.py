"""An audit of suites whose family neox-bridge does not know: each fault is found, and no other."""

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hf_families import make
from hub_stub import Stub, serving, use
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import convert, write_hf

from neox_bridge import audit
from neox_bridge.cli.app import app
from neox_bridge.stores import retry
from neox_bridge.verification.audit import Audit
from neox_bridge.verification.runs import Fault

STEPS = tuple(range(0, 9000, 1000))
INDEX = "model.safetensors.index.json"
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}


def suite(folder: Path, family: str) -> Path:
    """Steps of a made-up training: each changes every element a little."""
    base = make(family, folder / "base", max_shard_size="30KB")
    torch.manual_seed(1)
    for step in STEPS:
        target = folder / "run" / f"step{step}"
        shutil.copytree(base, target)
        for path in target.glob("*.safetensors"):
            tensors = load_file(path)
            changed = {
                name: value * (1 + step * 1e-6) + 1e-5 * torch.randn_like(value)
                for name, value in tensors.items()
            }
            save_file(changed, path, {"format": "pt"})
        (target / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    shutil.rmtree(base)
    return folder / "run"


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return suite(tmp_path_factory.mktemp("suite"), "qwen3")


@pytest.fixture
def run(qwen3: Path, tmp_path: Path) -> Path:
    """A copy to put a fault into."""
    return Path(shutil.copytree(qwen3, tmp_path / "run"))


def wrong(result: Audit) -> list[Fault]:
    return [fault for fault in result.faults if fault.severity != "info"]


def only(run: Path) -> Fault:
    (fault,) = wrong(audit([str(run)]))
    return fault


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def cli(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


# --- each fault


@pytest.mark.parametrize("family", ["deepseek_v3", "gemma2", "mixtral", "bloom", "mamba2", "t5"])
def test_a_sound_suite_has_no_findings(family: str, tmp_path: Path) -> None:
    run = suite(tmp_path, family)
    result = audit([str(run)])
    assert result.faults == ()
    assert [step.read_by for step in result.steps] == ["names"] * len(STEPS)
    names = {key for path in shards(run / "step0") for key in load_file(path)}
    assert all(set(step.tensors) == names for step in result.steps)
    assert len({step.hash for step in result.steps}) == len(STEPS)


def test_identical_steps(run: Path) -> None:
    shutil.rmtree(run / "step4000")
    shutil.copytree(run / "step2000", run / "step4000")
    fault = only(run)
    assert (fault.code, fault.steps) == ("identical-steps", ("2000", "4000"))


def test_a_shard_of_another_step(run: Path) -> None:
    name = shards(run / "step2000")[1].name
    with safe_open(run / "step2000" / name, "pt") as file:
        names = set(file.keys())
    shutil.copyfile(run / "step2000" / name, run / "step6000" / name)
    fault = only(run)
    assert (fault.code, fault.steps) == ("shared-shard", ("2000", "6000"))
    assert set(fault.tensors) == names
    assert name in fault.message


def test_a_norm_that_jumps(run: Path) -> None:
    path = shards(run / "step5000")[0]
    name = next(iter(load_file(path)))
    change(path, lambda tensors: tensors.update({name: tensors[name] * 3}))
    fault = only(run)
    assert (fault.code, fault.steps, fault.tensors) == ("norm-jump", ("5000",), (name,))


def test_nan(run: Path) -> None:
    path = shards(run / "step5000")[0]
    name = next(iter(load_file(path)))
    change(path, lambda tensors: tensors[name].view(-1)[:2].fill_(torch.nan))
    fault = only(run)
    assert (fault.code, fault.steps, fault.tensors) == ("not-finite", ("5000",), (name,))
    assert f"{name} (2)" in fault.message


def test_a_changed_config(run: Path) -> None:
    config = run / "step3000" / "config.json"
    edit_json(config, lambda c: c.update({"num_experts_per_tok": 7, "rms_norm_eps": 0.5}))
    fault = only(run)
    assert (fault.code, fault.steps) == ("config-differs", ("3000",))
    assert "num_experts_per_tok is 7, and missing at most steps" in fault.message
    assert "rms_norm_eps is 0.5, and 1e-06 at most steps" in fault.message


def test_configs_that_mean_the_same(run: Path) -> None:
    def older(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        del config["layer_types"]  # a key that older versions of transformers do not write
        config.update(rope_theta=float(rope["rope_theta"]), transformers_version="4.56.0")

    edit_json(run / "step3000" / "config.json", older)
    assert audit([str(run)]).faults == ()


def test_long_values_that_differ_at_their_end(run: Path) -> None:
    for step in STEPS:
        values = [*range(100), step == 4000]
        edit_json(run / f"step{step}/config.json", lambda c, v=values: c.update({"long": v}))
    fault = only(run)
    assert (fault.code, fault.steps) == ("config-differs", ("4000",))


def test_another_tokenizer(run: Path) -> None:
    edit_json(run / "step7000/tokenizer.json", lambda t: t["model"]["vocab"].update({"b": 1}))
    (run / "step1000" / "tokenizer.json").unlink()  # none at all is no fault
    fault = only(run)
    assert (fault.code, fault.steps) == ("tokenizer-differs", ("7000",))
    assert "tokenizer.json at step 7000" in fault.message


def test_a_wrong_total_size(run: Path) -> None:
    edit_json(run / f"step1000/{INDEX}", lambda index: index["metadata"].update(total_size=5))
    fault = only(run)
    assert (fault.code, fault.severity, fault.steps) == ("wrong-total-size", "warning", ("1000",))
    assert f"step 1000: {INDEX}: metadata.total_size is 5" in fault.message


def test_files_that_the_index_does_not_name(run: Path) -> None:
    shutil.copy(shards(run / "step0")[0], run / "step2000" / "model-00001-of-00099.safetensors")
    fault = only(run)
    assert (fault.code, fault.steps) == ("shard-not-in-index", ("2000",))
    assert "model-00001-of-00099.safetensors" in fault.message


def test_an_index_that_names_another_shard(run: Path) -> None:
    first, second, *_ = shards(run / "step2000")
    name = next(iter(load_file(second)))
    edit_json(run / f"step2000/{INDEX}", lambda i: i["weight_map"].update({name: first.name}))
    fault = only(run)
    assert (fault.code, fault.steps) == ("index-wrong-shard", ("2000",))
    assert f"{name} (in {second.name})" in fault.message


def test_a_shard_that_is_missing_and_one_that_is_cut_do_not_stop_the_audit(run: Path) -> None:
    missing, cut = shards(run / "step2000")[1], shards(run / "step3000")[2]
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:-8])
    shutil.copytree(run / "step7000", run / "step8000", dirs_exist_ok=True)
    result = audit([str(run)])
    faults = {fault.steps: fault for fault in wrong(result)}
    assert {steps: fault.code for steps, fault in faults.items()} == {
        ("2000",): "unreadable",
        ("3000",): "unreadable",
        ("7000", "8000"): "identical-steps",
    }
    assert str(missing) in faults["2000",].message
    assert str(cut) in faults["3000",].message
    assert len(result.steps) == len(STEPS) - 2


# --- what is not decoded


def test_tensors_that_are_not_decoded_are_hashed_as_bytes_without_a_norm(tmp_path: Path) -> None:
    def write(step: int, data: bytes) -> None:
        folder = tmp_path / f"step{step}"
        folder.mkdir()
        header = json.dumps({"w": {"dtype": "F4", "shape": [4, 8], "data_offsets": [0, 16]}})
        content = len(header).to_bytes(8, "little") + header.encode() + data
        (folder / "model.safetensors").write_bytes(content)

    for step in range(5):
        write(step, bytes([step]) * 15 + b"\xff")
    shutil.rmtree(tmp_path / "step4")
    write(4, bytes([3]) * 15 + b"\xff")
    result = audit([str(tmp_path)])
    (fault,) = result.faults
    assert (fault.code, fault.steps) == ("identical-steps", ("3", "4"))
    tensor = result.steps[0].tensors["w"]
    assert (tensor.dtype, tensor.shape, tensor.norm, tensor.bad) == ("F4", (4, 8), None, 0)
    assert result.steps[0].dtype == "F4"
    assert result.to_json()["steps"][0]["tensors"]["w"]["norm"] is None


# --- other repositories than one model in safetensors


def test_components_in_folders(tmp_path: Path) -> None:
    def tensors(step: int, component: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(10 * step + component)
        return {f"w{n}": torch.randn(8, 8, generator=generator) for n in range(2)}

    for step in range(4):
        folder = tmp_path / "run" / f"step{step}"
        for number, component in enumerate(("unet", "vae")):
            (folder / component).mkdir(parents=True)
            wrong_step = 1 if (step, component) == (3, "vae") else step
            path = folder / component / "diffusion_pytorch_model.safetensors"
            save_file(tensors(wrong_step, number), path)
            (folder / component / "config.json").write_text(json.dumps({"channels": step == 2}))
        (folder / "model_index.json").write_text("{}")
    result = audit([str(tmp_path / "run")])
    shared, *configs = wrong(result)
    assert (shared.code, shared.steps) == ("shared-shard", ("1", "3"))
    assert "everything in vae/diffusion_pytorch_model.safetensors" in shared.message
    assert shared.tensors == ("vae/w0", "vae/w1")
    (config,) = configs
    assert (config.code, config.steps) == ("config-differs", ("2",))
    assert "unet: channels is True, and False at most steps" in config.message


def test_pickled_weights(tmp_path: Path) -> None:
    for step in range(3):
        folder = tmp_path / f"step{step}"
        folder.mkdir()
        weight = torch.arange(16.0).reshape(4, 4) + min(step, 1)
        torch.save({"w": weight}, folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps({"model_type": "unknown"}))
    (fault,) = audit([str(tmp_path)]).faults
    assert (fault.code, fault.steps) == ("identical-steps", ("1", "2"))
    (single,) = audit([str(tmp_path / "step0")]).steps
    assert (single.read_by, single.read) == ("names", 1)


# --- with a known family


def known(folder: Path, steps: int = 5) -> Path:
    """Steps of a model of a known family."""
    for step in range(steps):
        write_hf(folder / f"step{step}", seed=step)
    return folder


def with_another_tensor(folder: Path, value: int = 1) -> None:
    """Make a folder one of no known family."""
    change(
        folder / "model.safetensors",
        lambda tensors: tensors.update({"gpt_neox.extra": torch.full((3,), value)}),
    )


def test_one_step_of_no_known_family_among_those_of_a_known_one(tmp_path: Path) -> None:
    run = known(tmp_path / "run")
    assert [step.read_by for step in audit([str(run)]).steps] == ["family"] * 5
    with_another_tensor(run / "step3")
    result = audit([str(run)])
    assert [step.read_by for step in result.steps] == ["names"] * 5
    shapes, reading = result.faults
    assert (shapes.code, shapes.steps, shapes.tensors) == (
        *("shapes-differ", ("3",)),
        ("gpt_neox.extra",),
    )
    assert (reading.code, reading.severity, reading.steps) == ("read-by-names", "info", ("3",))
    assert "gpt_neox.extra" in reading.message, "the reason why no family is used"


def test_the_checks_of_a_family_stay_if_another_step_has_none(tmp_path: Path) -> None:
    run = known(tmp_path / "run")
    edits: dict[int, dict[str, Any]] = {
        1: {"rotary_emb_base": 5000, "rope_theta": 5000},
        4: {"rope_hyperdrive": 2},
    }
    for step, values in edits.items():
        path = run / f"step{step}" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def halved(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("dense.weight"))
        tensors[name] = tensors[name].double()

    change(run / "step2" / "model.safetensors", halved)

    def faults() -> set[tuple[str, tuple[str, ...]]]:
        return {(fault.code, fault.steps) for fault in audit([str(run)]).faults}

    by_family = faults()
    assert {
        ("config-differs", ("1",)),
        ("unknown-key", ("4",)),
        ("weight-dtype", ("2",)),
    } < by_family
    with_another_tensor(run / "step3")
    added = {("read-by-names", ("3",)), ("shapes-differ", ("3",))}
    assert faults() == by_family | added


def test_gpt_neox_steps_are_not_compared_with_steps_of_no_known_family(tmp_path: Path) -> None:
    run = known(tmp_path / "run")
    convert(run / "step2", tmp_path / "neox")
    for step in (2, 3):
        shutil.rmtree(run / f"step{step}")
        shutil.copytree(tmp_path / "neox", run / f"step{step}")
    with_another_tensor(run / "step4")
    result = audit([str(run)])
    ways = {step.label: step.read_by for step in result.steps}
    assert ways == {"2": "family", "3": "family", **dict.fromkeys(("0", "1", "4"), "names")}
    faults = {fault.code: fault for fault in result.faults}
    assert faults["not-comparable"].severity == "warning"
    assert "step 2, 3" in faults["not-comparable"].message
    assert {code: fault.steps for code, fault in faults.items()} == {
        "identical-steps": ("2", "3"),
        "shapes-differ": ("4",),
        "read-by-names": ("4",),
        "not-comparable": ("4",),
    }


# --- two runs


def test_two_runs_of_no_known_family(run: Path, qwen3: Path) -> None:
    def rows(*more: object) -> tuple[int, dict[str, dict[str, Any]]]:
        done = cli("audit", run, "--against", qwen3, "--json", "--cache", "none", *more)
        rows = json.loads(done.stdout)["comparisons"][0]["rows"]
        return done.exit_code, {row["label"]: row for row in rows}

    code, same = rows()
    assert code == 0
    assert {(row["status"], row["read_by"]) for row in same.values()} == {("same", "names")}
    shutil.rmtree(run / "step3000")
    shutil.copytree(run / "step5000", run / "step3000")
    code, mixed = rows()
    assert code == 3
    assert [label for label, row in mixed.items() if row["status"] != "same"] == ["3000"]
    assert [(o["side"], o["step"]) for o in mixed["3000"]["origins"]] == [("twin", "5000")]
    shown = cli("audit", run, "--against", qwen3, "--cache", "none", "--steps", "0,3000")
    assert "3000  DIFFERS" in shown.stdout
    assert "read by names, shapes and dtypes as stored" in shown.stdout


def test_a_run_in_another_dtype_is_compared_after_a_cast(run: Path, qwen3: Path) -> None:
    def half(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: value.bfloat16() for name, value in tensors.items()})

    def widened(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: value.bfloat16().float() for name, value in tensors.items()})

    for source, edit in ((run, half), (run.parent / "twin", widened)):
        if source != run:
            shutil.copytree(qwen3, source)
        for step in STEPS[2:]:
            shutil.rmtree(source / f"step{step}")
        for path in shards(source / "step0") + shards(source / "step1000"):
            change(path, edit)
    done = cli("audit", run, "--against", run.parent / "twin", "--cache", "none")
    assert done.exit_code == 0, done.output
    assert "bfloat16 and float32 were compared after a lossless cast" in done.stdout


def test_a_known_run_against_one_of_no_known_family(tmp_path: Path) -> None:
    source, twin = known(tmp_path / "a", 3), known(tmp_path / "b", 3)
    with_another_tensor(twin / "step1")
    done = cli("audit", source, "--against", twin, "--json", "--cache", "none")
    rows = json.loads(done.stdout)["comparisons"][0]["rows"]
    assert [(row["status"], row["read_by"]) for row in rows] == [
        ("same", "names"),
        ("differs", "names"),
        ("same", "names"),
    ]
    assert rows[1]["differences"] == [{"name": "gpt_neox.extra", "kind": "only in twin"}]


def test_a_gpt_neox_run_against_one_of_no_known_family(tmp_path: Path) -> None:
    twin = known(tmp_path / "b", 2)
    for step in range(2):
        convert(twin / f"step{step}", tmp_path / "a" / f"step{step}")
    with_another_tensor(twin / "step1")
    done = cli("audit", tmp_path / "a", "--against", twin, "--json", "--cache", "none")
    assert done.exit_code == 3
    rows = json.loads(done.stdout)["comparisons"][0]["rows"]
    assert {(row["status"], row["read_by"]) for row in rows} == {("unreadable", None)}
    assert "Only the rules of a family tell" in rows[0]["reason"]


# --- a cache


def cached(run: Path, home: Path) -> Path:
    """The run as huggingface_hub caches it: a revision for each step, with links to blobs."""
    root = home / "models--org--name"
    for folder in ("refs", "blobs"):
        (root / folder).mkdir(parents=True)
    for step in STEPS:
        commit = f"{step:040x}"
        (root / "refs" / f"step{step}").write_text(commit)
        snapshot = root / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for path in (run / f"step{step}").iterdir():
            data = path.read_bytes()
            name = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            if path.suffix == ".safetensors":
                name = hashlib.sha256(data).hexdigest()
            (root / "blobs" / name).write_bytes(data)
            (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    return root


def spoil(path: Path, place: int) -> Path:
    """Change a byte of the blob that a link leads to. Returns the blob."""
    blob = path.resolve()
    data = bytearray(blob.read_bytes())
    data[place] ^= 1
    blob.write_bytes(data)
    return blob


def test_blobs_with_the_hashes_in_their_names(qwen3: Path, tmp_path: Path) -> None:
    root = cached(qwen3, tmp_path)
    (unread,) = audit([str(root)]).faults
    assert (unread.code, unread.severity) == ("blobs-not-checked", "info")
    (read,) = audit([str(root)], blobs=True).faults
    assert (read.code, read.severity) == ("blobs-checked", "info")
    count = len(list((root / "blobs").iterdir()))
    assert f"{count} blobs (" in read.message
    assert len(audit([str(root)]).steps) == len(STEPS)


@pytest.mark.parametrize(("name", "place"), [("model-00001", -1), ("generation_config", 3)])
def test_a_blob_that_is_not_what_its_name_says(
    name: str, place: int, qwen3: Path, tmp_path: Path
) -> None:
    root = cached(qwen3, tmp_path)
    link = next((root / "snapshots" / f"{3000:040x}").glob(f"{name}*"))
    blob = spoil(link, place)
    done = cli("audit", root, "--blobs", "--json", "--cache", "none")
    assert done.exit_code == 3, done.output
    (finding,) = json.loads(done.stdout)["findings"]
    assert (finding["code"], finding["severity"]) == ("wrong-blob", "error")
    assert "3000" in finding["steps"]
    assert str(blob) in finding["message"]
    assert link.name in finding["message"]
    assert cli("audit", root, "--cache", "none").exit_code == 0, "only --blobs reads them"


def test_a_blob_that_is_missing(qwen3: Path, tmp_path: Path) -> None:
    root = cached(qwen3, tmp_path)
    link = root / "snapshots" / f"{3000:040x}" / "README.md"
    link.symlink_to(f"../../blobs/{'0' * 40}")
    (fault,) = audit([str(root)], blobs=True).faults
    assert (fault.code, fault.steps) == ("wrong-blob", ("3000",))
    assert "README.md at step 3000) is damaged: it cannot be read: No such file" in fault.message


# --- what is printed


def test_the_output_says_how_each_step_was_read(run: Path) -> None:
    done = cli("audit", run, "--cache", "none")
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stdout.splitlines() if "Hugging Face, by names, float32" in line]
    assert len(lines) == len(STEPS)
    assert all(line.endswith("  ok") for line in lines)
    document = json.loads(cli("audit", run, "--json", "--cache", "none").stdout)
    assert {step["read_by"] for step in document["steps"]} == {"names"}


def test_a_second_audit_reads_nothing_again(run: Path, tmp_path: Path) -> None:
    for path in run.rglob("*.safetensors"):
        os.utime(path, (1, 1))
    cache = str(tmp_path / "cache")
    first, second = (audit([str(run)], cache=cache) for _ in range(2))
    assert {step.read for step in second.steps} == {0}
    assert [step.hash for step in first.steps] == [step.hash for step in second.steps]


# --- the Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stub]:
    monkeypatch.setattr(retry, "FIRST_SECONDS", 0.001)
    with serving(Stub()) as stub:
        use(stub, monkeypatch, tmp_path / "hub")
        yield stub


def test_a_suite_on_the_hub_is_read_in_ranges(run: Path, hub: Stub, tmp_path: Path) -> None:
    first, third = (shards(run / f"step{step}") for step in (1000, 3000))
    shutil.copyfile(first[1], third[1])
    edit_json(run / "step2000/tokenizer.json", lambda t: t["model"]["vocab"].update({"b": 1}))
    for step in STEPS[:5]:
        hub.put_files("org/suite", f"step{step}", run / f"step{step}")
    hub.seen.clear()
    result = audit(["org/suite"])
    assert [step.label for step in result.steps] == [str(step) for step in STEPS[:5]]
    assert {step.read_by for step in result.steps} == {"names"}
    found = {fault.code: fault for fault in wrong(result)}
    assert found.keys() == {"shared-shard", "tokenizer-differs"}
    assert found["shared-shard"].steps == ("1000", "3000")
    assert first[1].name in found["shared-shard"].message
    assert found["tokenizer-differs"].steps == ("2000",)
    assert not list((tmp_path / "hub").rglob("*.safetensors")), "nothing was downloaded"
    local = audit([str(run)], steps="0-4000")
    assert [step.hash for step in local.steps] == [step.hash for step in result.steps]


# --- many shards


def sparse_step(folder: Path, salt: Callable[[int], int], shards: int = 60) -> None:
    """Shards of four matrices of 512 KiB each, whose first bytes depend on the shard's salt."""
    folder.mkdir(parents=True)
    weight_map, nbytes = {}, 512 << 10
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header = {
            f"model.layers.{shard}.mlp.experts.{n}.up_proj.weight": {
                "dtype": "BF16",
                "shape": [nbytes // 128, 64],
                "data_offsets": [n * nbytes, (n + 1) * nbytes],
            }
            for n in range(4)
        }
        weight_map |= dict.fromkeys(header, name)
        text = json.dumps(header).encode()
        with open(folder / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for n in range(4):
                file.seek(8 + len(text) + n * nbytes)
                file.write(bytes([salt(shard), 60]))
            file.truncate(8 + len(text) + 4 * nbytes)
    index = {"metadata": {"total_size": shards * 4 * nbytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "kimi_k2"}))


@pytest.mark.slow
def test_a_shard_of_sixty_from_another_step_in_bounded_memory(tmp_path: Path) -> None:
    for step in range(3):
        run = tmp_path / "run" / f"step{step}"
        sparse_step(run, lambda shard, step=step: 1 if (shard, step) == (41, 2) else step + 1)
    shard = "model-00042-of-00060.safetensors"
    shutil.copyfile(tmp_path / "run/step0" / shard, tmp_path / "run/step2" / shard)
    code = (
        "import sys, neox_bridge\n"
        "result = neox_bridge.audit([sys.argv[1]])\n"
        "print([(f.code, f.steps, f.message) for f in result.faults])\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    faults, peak = done.stdout.splitlines()
    ((code, steps, message),) = ast.literal_eval(faults)
    assert (code, steps) == ("shared-shard", ("0", "2"))
    assert f"everything in {shard}" in message
    assert int(peak) << 10 < 150 << 20, "of 360 MB of weights"
