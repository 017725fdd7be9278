"""Folders of other tools, broken downloads and wrapped names: the message names the cause."""

import json
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from common import convert, fixture, hf_tensors, make_hf, plan_of, same_bits
from safetensors.torch import load_file, save_file

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError
from neox_bridge.layouts.folder_kinds import ForeignFolder

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 166\n"
)
PAGE = b"<!DOCTYPE html><html><head><title>401 Unauthorized</title></head><body></body></html>"
BLOCKED = b"Access to model org/name is restricted. You must be authenticated to access it."
XML = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'
ANNEX = b"/annex/objects/SHA256E-s166--4d7a.safetensors\n"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def copy(hf: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hf, tmp_path / "copy"))


def run(*words: object) -> Any:
    return CliRunner().invoke(app, list(map(str, words)))


def said(path: Path, out: Path, code: int = 1, *, stored: bool = False) -> str:
    """The message of convert, which inspect and doctor give as well; nothing is written.

    stored: inspect and doctor read the weights as they are stored, and give the message there.
    """
    messages = set()
    for command in (("convert", path, out), ("inspect", path), ("doctor", path)):
        done = run(*command)
        if stored and command[0] == "inspect":
            assert done.exit_code == 0, done.output
            (line,) = (line for line in done.stdout.splitlines() if line.startswith("refused"))
            messages.add(f"error: {line.partition('every conversion: ')[2]}")
            assert not done.stderr
            continue
        if stored and command[0] == "doctor":
            assert done.exit_code in (0, 4), done.output  # 4 for a model without its head
            (facts,) = json.loads(run(*command, "--json").stdout)["checkpoints"]
            assert facts["read_by"] == "names"
            (why,) = (one["why"] for one in facts["findings"] if one["code"] == "not-converted")
            assert why in done.stdout
            messages.add(f"error: {why}")
            continue
        assert done.exit_code == code, done.output
        assert "Traceback" not in done.output
        assert "this is a bug" not in done.output
        messages.add(done.stderr.strip())
    assert not out.exists()
    assert len(messages) == 1
    return messages.pop()


def written(hf: Path, folder: Path) -> None:
    """The folder converts to the model that it was made from."""
    convert(folder, folder.parent / "out", to="hf")
    want, have = hf_tensors(hf), hf_tensors(folder.parent / "out")
    assert sorted(want) == sorted(have)
    assert all(same_bits(want[name], have[name]) for name in want)


# files that are not what their names say


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (POINTER, ["Git LFS pointer", "git lfs pull"]),
        (ANNEX, ["git-annex pointer", "git annex get"]),
        (PAGE, ["HTML page", "401 Unauthorized", "download the file again"]),
        (b"\n\n  <html><body>Sign in</body></html>", ["HTML page"]),
        (XML, ["XML document", "AccessDenied"]),
        (b"Entry not found", ["short text", "Entry not found"]),
        (BLOCKED, ["short text", "restricted"]),
        (b'{"error":"Repository not found"}', ["short text", "Repository not found"]),
        (b"../../blobs/4d7a2146", ["names another file", "cp -RL"]),
        (b"\x1f\x8b\x08" + bytes(600), ["gzip", "tar -xf"]),
        (b"GGUF" + bytes(600), ["GGUF"]),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_something_else(
    name: str, content: bytes, parts: list[str], copy: Path, tmp_path: Path
) -> None:
    (copy / "model.safetensors").unlink()
    (copy / name).write_bytes(content)
    message = said(copy, tmp_path / "out")
    for part in (str(copy / name), *parts):
        assert part in message
    assert "truncated" not in message


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "generation_config.json"])
@pytest.mark.parametrize(("content", "part"), [(POINTER, "git lfs pull"), (PAGE, "HTML page")])
def test_settings_that_are_something_else(
    name: str, content: bytes, part: str, copy: Path, tmp_path: Path
) -> None:
    (copy / name).write_bytes(content)
    message = said(copy, tmp_path / "out")
    assert str(copy / name) in message
    assert part in message


@pytest.mark.parametrize("name", ["merges.txt", "tokenizer.model", "vocab.json"])
def test_tokenizer_files_are_not_copied_as_pointers(name: str, copy: Path, tmp_path: Path) -> None:
    (copy / name).write_bytes(POINTER)
    assert "git lfs pull" in said(copy, tmp_path / "out")


@pytest.mark.parametrize("file", ["latest", "global_step2/configs/base.yml"])
def test_pointers_among_gpt_neox_files(file: str, tmp_path: Path) -> None:
    source = tmp_path / "run"
    shutil.copytree(fixture("pythia_fp32_pp1_tp2"), source)
    (source / file).write_bytes(POINTER)
    assert "git lfs pull" in said(source, tmp_path / "out")


def test_an_empty_file(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"")
    assert "it is empty" in said(copy, tmp_path / "out")
    (copy / "model.safetensors").write_bytes(bytes(4096))
    assert "zeros" in said(copy, tmp_path / "out")


def test_weights_under_the_other_formats_name(hf: Path, copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    message = said(copy, tmp_path / "out")
    subprocess.run(message.partition("Rename it: ")[2], shell=True, check=True)
    written(hf, copy)


def test_torch_weights_under_the_name_of_safetensors(hf: Path, copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()  # which is mapped into memory
    torch.save(tensors, copy / "model.safetensors")
    message = said(copy, tmp_path / "out")
    subprocess.run(message.partition("Rename it: ")[2], shell=True, check=True)
    written(hf, copy)


# links and caches


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_that_lead_nowhere(name: str, copy: Path, tmp_path: Path) -> None:
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to("../../blobs/blob9")
    message = said(copy, tmp_path / "out")
    assert f"{copy / name} is a link to ../../blobs/blob9, which does not exist" in message
    assert "cp -RL" in message


def cache(hf: Path, root: Path, *commits: str) -> Path:
    (root / "refs").mkdir(parents=True)
    (root / "blobs").mkdir()
    for commit in commits:
        (root / "snapshots" / commit).mkdir(parents=True)
        for file in hf.iterdir():
            blob = root / "blobs" / f"{commit[:4]}{file.name}"
            shutil.copy(file, blob)
            (root / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{blob.name}")
    return root


def test_the_root_of_a_cached_model_is_read(hf: Path, tmp_path: Path) -> None:
    root = cache(hf, tmp_path / "models--org--name", "a" * 40, "b" * 40)
    (root / "refs" / "main").write_text("a" * 40)
    (root / "refs" / "step3").write_text("b" * 40)
    checkpoint = open_checkpoint(str(root))
    assert checkpoint.path.endswith(f"snapshots/{'a' * 40}")
    assert checkpoint.revision == "org/name@main"
    assert open_checkpoint(str(root / "snapshots")).path == checkpoint.path
    for revision in ("step3", "b" * 40, "bbbbbbb"):
        assert open_checkpoint(str(root), revision=revision).path.endswith("b" * 40)
    (root / "refs" / "main").unlink()
    with pytest.raises(BridgeError, match=f"Name one of its snapshots: .*{'a' * 40}"):
        open_checkpoint(str(root))
    shutil.rmtree(root / "snapshots" / ("b" * 40))
    written(hf, root)
    with pytest.raises(BridgeError, match="no revision other"):
        open_checkpoint(str(root), revision="other")


def test_a_cache_without_its_blobs(hf: Path, tmp_path: Path) -> None:
    root = cache(hf, tmp_path / "models--org--name", "a" * 40)
    (root / "refs" / "main").write_text("a" * 40)
    shutil.rmtree(root / "blobs")
    message = said(root, tmp_path / "out")
    assert f"hf download org/name --revision {'a' * 40}" in message
    shutil.rmtree(root / "snapshots")
    (root / "snapshots").mkdir()
    assert "hf download org/name" in said(root, tmp_path / "out")


def test_a_whole_cache(hf: Path, tmp_path: Path) -> None:
    cache(hf, tmp_path / "hub" / "models--org--name", "a" * 40)
    message = said(tmp_path / "hub", tmp_path / "out")
    advised = message.partition("for example ")[2]
    assert run("inspect", advised).exit_code == 0


# other tools


def adapter(folder: Path, **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    name = "base_model.model.gpt_neox.layers.0.attention.query_key_value.lora_A.weight"
    save_file({name: torch.ones(4, 48)}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", **more}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def gguf(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model.Q4_K_M.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(64))
    return folder


def dcp(folder: Path) -> Path:
    folder.mkdir()
    for name in (".metadata", "__0_0.distcp"):
        (folder / name).write_bytes(b"x")
    return folder


def megatron(folder: Path) -> Path:
    step = folder / "iter_0001000" / "mp_rank_00"
    step.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("1000")
    torch.save({"model": {}}, step / "model_optim_rng.pt")
    return folder


def megatron_core(folder: Path) -> Path:
    dcp(folder)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return folder


def fsdp(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt_neox"}')
    dcp(folder / "pytorch_model_fsdp_0")
    return folder


def deepspeed(folder: Path) -> Path:
    """A Trainer's checkpoint under ZeRO stage 3: a config, and DeepSpeed's folder."""
    (folder / "global_step5").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "gpt_neox"}')
    (folder / "latest").write_text("global_step5")
    (folder / "zero_to_fp32.py").write_text("")
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save({"module": {}}, folder / "global_step5" / name)
    return folder


def named(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"x" * 600)
    return folder


@pytest.mark.parametrize(
    ("make", "kind", "parts"),
    [
        (adapter, "adapter", ["LoRA adapter of org/base", "merge_and_unload", "-merged"]),
        (gguf, "gguf", ["GGUF", "model that it was made from"]),
        (dcp, "dcp", ["torch.distributed.checkpoint", "dcp_to_torch"]),
        (megatron, "megatron", ["Megatron-LM"]),
        (lambda f: megatron(f) / "iter_0001000", "megatron", ["Megatron-LM"]),
        (megatron_core, "megatron-core", ["Megatron Core"]),
        (fsdp, "fsdp", ["FSDP", "accelerate merge-weights"]),
        (deepspeed, "deepspeed", ["DeepSpeed", "zero_to_fp32.py"]),
        (lambda f: named(f, "config.json.x", "tf_model.h5"), "tensorflow", ["TensorFlow"]),
        (lambda f: named(f, "flax_model.msgpack"), "tensorflow", ["from_flax=True"]),
        (lambda f: named(f, "model.onnx"), "compiled", ["inference"]),
        (lambda f: named(f, "model.nemo"), "nemo", ["NeMo"]),
        (lambda f: named(f, "manifest.ocdbt"), "orbax", ["Orbax"]),
        (lambda f: named(f, "model.safetensors.incomplete"), "unfinished", ["did not finish"]),
        (lambda f: named(f, "ckpt.pt"), "weights-only", ["without a config.json"]),
    ],
)
def test_other_tools_are_named(make: Any, kind: str, parts: list[str], tmp_path: Path) -> None:
    folder = make(tmp_path / "folder")
    with pytest.raises(ForeignFolder) as caught:
        open_checkpoint(str(folder))
    assert caught.value.kind == kind
    message = said(folder, tmp_path / "out", stored=kind == "adapter")
    for part in (str(folder), *parts):
        assert part in message
    assert "right folder" not in message


def test_a_trainers_output_names_its_checkpoints(hf: Path, tmp_path: Path) -> None:
    for number in (500, 1000):
        shutil.copytree(hf, tmp_path / "trainer" / f"checkpoint-{number}")
    message = said(tmp_path / "trainer", tmp_path / "out")
    assert "checkpoint-500, checkpoint-1000" in message
    first, _, batch = message.partition("for example ")[2].partition(". Or convert all of them: ")
    assert run("inspect", first).exit_code == 0
    assert batch.startswith("neox-bridge batch ")
    assert run(*shlex.split(batch)[1:]).exit_code == 0


def test_a_parent_names_the_models_of_both_frameworks(hf: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(hf, home / "a-model")
    convert(hf, home / "b-run", to="neox")
    (home / "notes").mkdir()
    message = said(home, tmp_path / "out")
    assert "There are models in a-model, b-run." in message
    assert "batch" not in message  # they are no steps


@pytest.mark.parametrize(("to", "suffix"), [("neox", "-hf"), ("hf", "-neox")])
def test_a_folder_of_steps_names_the_command_for_all(
    to: str, suffix: str, hf: Path, tmp_path: Path
) -> None:
    home = tmp_path / "steps"
    for number in (1000, 500):
        if to == "hf":
            shutil.copytree(hf, home / f"step{number}")
        else:
            convert(hf, home / f"step{number}", to="neox", iteration=number)
    message = said(home, tmp_path / "out")
    assert "There are models in step500, step1000." in message
    command = f"neox-bridge batch {home} {home}{suffix}"
    assert f"for example {home / 'step1000'}. Or convert all of them: {command}" in message
    assert run(*shlex.split(command)[1:]).exit_code == 0
    assert sorted(path.name for path in Path(f"{home}{suffix}").iterdir()) == [
        "step1000",
        "step500",
    ]


def test_torchs_own_converter_makes_a_folder_that_is_read(hf: Path, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as checkpoints

    folder = tmp_path / "dcp"
    checkpoints.save({"model": load_file(hf / "model.safetensors")}, checkpoint_id=str(folder))
    message = said(folder, tmp_path / "out")
    words = shlex.split(message.partition("with PyTorch: ")[2].partition(". Then")[0])
    assert words[0] == "python"
    subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True)
    shutil.copy(hf / "config.json", folder)
    written(hf, folder)


def test_adapters_that_cannot_be_merged(tmp_path: Path) -> None:
    message = said(
        adapter(tmp_path / "a", peft_type="PROMPT_TUNING"), tmp_path / "out", stored=True
    )
    assert "PROMPT_TUNING adapter" in message
    assert "merge_and_unload" not in message


def test_an_adapter_beside_full_weights_is_a_warning(copy: Path, tmp_path: Path) -> None:
    adapter(copy)
    done = run("convert", copy, tmp_path / "out")
    assert done.exit_code == 0
    assert "adapter_config.json lies beside the weights" in done.stderr
    assert "merge_and_unload" in done.stderr
    assert "adapter_config.json lies beside" in run("inspect", copy).stdout
    assert "adapter_config.json lies beside" in run("doctor", copy).stdout


def test_adapter_weights_among_the_models_own(copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["gpt_neox.layers.0.attention.dense.lora_A.default.weight"] = torch.ones(4, 48)
    save_file(tensors, copy / "model.safetensors")
    assert "merge_and_unload" in said(copy, tmp_path / "out", stored=True)


def test_a_file_in_the_place_of_a_folder(hf: Path, tmp_path: Path) -> None:
    message = said(hf / "model.safetensors", tmp_path / "out")
    assert run("inspect", message.partition("Name the folder: ")[2]).exit_code == 0
    assert "GGUF" in said(gguf(tmp_path / "g") / "model.Q4_K_M.gguf", tmp_path / "out")


# shards, heads


def shards(folder: Path, suffix: str = "safetensors", count: int = 2) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    for number in range(count):
        part = {k: v for i, (k, v) in enumerate(tensors.items()) if i % count == number}
        path = folder / f"{stem}-{number + 1:05d}-of-{count:05d}.{suffix}"
        if suffix == "safetensors":
            save_file(part, path, {"format": "pt"})
        else:
            torch.save(part, path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_complete_shards_without_an_index_are_read(
    suffix: str, hf: Path, copy: Path, tmp_path: Path
) -> None:
    shards(copy, suffix)
    (finding,) = [f for f in plan_of(copy, tmp_path / "x").findings if f.code == "no-index"]
    assert "the index file of 2 shards is missing" in finding.message
    written(hf, copy)
    facts = json.loads(run("doctor", copy, "--for", "transformers@5.24", "--json").stdout)
    (found,) = [f for f in facts["checkpoints"][0]["findings"] if f["code"] == "no-index"]
    assert run(*shlex.split(found["remedy"])[1:]).exit_code == 0
    assert run("doctor", f"{copy}-fixed").exit_code == 0


def test_shards_that_are_missing(copy: Path, tmp_path: Path) -> None:
    shards(copy, count=3)
    (copy / "model-00002-of-00003.safetensors").unlink()
    message = said(copy, tmp_path / "out")
    assert "2 of 3 shards" in message
    assert "Missing shards: 2" in message
    (copy / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (copy / ".cache" / "huggingface" / "download" / "x.incomplete").write_bytes(b"")
    assert "did not finish (x.incomplete)" in said(copy, tmp_path / "out")


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_base_models_without_a_head(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    full = make_hf(tmp_path / "full", family=family)
    model = AutoModel.from_config(AutoConfig.from_pretrained(full))
    model.save_pretrained(tmp_path / "base")
    message = said(tmp_path / "base", tmp_path / "out", stored=True)
    assert f"{type(model).__name__}, the base model without an output head" in message
    assert "Download" not in message
    config = tmp_path / "base" / "config.json"
    assert f'"tie_word_embeddings": true in {config}' in message
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    assert plan_of(tmp_path / "base", tmp_path / "out").target["parameters"]


def test_an_untied_model_without_its_head(copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["embed_out.weight"]
    save_file(tensors, copy / "model.safetensors")
    message = said(copy, tmp_path / "out", stored=True)
    assert "config.json says tie_word_embeddings: false" in message
    assert "embed_out.weight" in message


def test_heads_of_other_tasks(copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["classifier.weight"] = tensors.pop("embed_out.weight")
    save_file(tensors, copy / "model.safetensors")
    assert "head for another task" in said(copy, tmp_path / "out", stored=True)


# wrapped names


def renamed(folder: Path, change: Any, suffix: str = "safetensors") -> None:
    tensors = {change(k): v for k, v in load_file(folder / "model.safetensors").items()}
    if suffix == "safetensors":
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        (folder / "model.safetensors").unlink()
        torch.save({"state_dict": tensors}, folder / "pytorch_model.bin")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "prefix",
    [
        *("_orig_mod.", "module.", "model.", "base_model.model.", "pretrained_model."),
        *("_orig_mod.module.", "module._orig_mod.", "_forward_module.", "_fsdp_wrapped_module."),
    ],
)
def test_wrappers_around_the_model_are_removed(
    prefix: str, suffix: str, hf: Path, copy: Path, tmp_path: Path
) -> None:
    renamed(copy, lambda name: prefix + name, suffix)
    (finding,) = [f for f in plan_of(copy, tmp_path / "x").findings if f.code == "wrapped-names"]
    assert f"`{prefix}`" in finding.message
    written(hf, copy)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model."])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "mamba"])
def test_wrappers_around_other_families(prefix: str, family: str, tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf", family=family)
    renamed(Path(shutil.copytree(source, tmp_path / "copy")), lambda name: prefix + name)
    written(source, tmp_path / "copy")


def test_wrappers_inside_the_model(hf: Path, copy: Path, tmp_path: Path) -> None:
    """torch.compile and activation checkpointing of some blocks only."""
    renamed(
        copy,
        lambda name: name.replace("layers.0.", "layers.0._orig_mod.").replace(
            "layers.1.", "layers.1._checkpoint_wrapped_module."
        ),
    )
    (finding,) = [f for f in plan_of(copy, tmp_path / "x").findings if f.code == "wrapped-names"]
    assert "`_orig_mod`, `_checkpoint_wrapped_module`" in finding.message
    written(hf, copy)


def test_wrapped_names_do_not_load_and_are_fixed(hf: Path, copy: Path) -> None:
    renamed(copy, lambda name: f"_orig_mod.{name}")
    done = run("doctor", copy, "--for", "transformers@5.24", "--json")
    assert done.exit_code == 4
    facts = json.loads(done.stdout)["checkpoints"][0]
    (found,) = [f for f in facts["findings"] if f["code"] == "wrapped-names"]
    assert run(*shlex.split(found["remedy"])[1:]).exit_code == 0
    assert run("doctor", f"{copy}-fixed").exit_code == 0
    want, have = hf_tensors(hf), hf_tensors(copy.parent / "copy-fixed")
    assert all(same_bits(want[name], have[name]) for name in want)


def test_mixed_prefixes_are_an_error(copy: Path, tmp_path: Path) -> None:
    first = "gpt_neox.embed_in.weight"
    renamed(copy, lambda name: name if name == first else f"_orig_mod.{name}")
    message = said(copy, tmp_path / "out")
    assert first in message
    assert "_orig_mod.gpt_neox" in message or "_orig_mod.embed_out" in message
    assert "two different state dicts" in message


def test_names_that_become_the_same_are_an_error(copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    name = "gpt_neox.layers.0._orig_mod.attention.dense.weight"
    tensors[name] = torch.zeros(48, 48)
    save_file(tensors, copy / "model.safetensors")
    message = said(copy, tmp_path / "out")
    assert name in message
    assert "gpt_neox.layers.0.attention.dense.weight" in message


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
@pytest.mark.parametrize("name", ["pythia_fp32_pp1_tp2", "pythia_fp32_pp0_tp2"])
def test_wrappers_in_gpt_neox_files(name: str, prefix: str, tmp_path: Path) -> None:
    shutil.copytree(fixture(name), tmp_path / "run")
    for path in (tmp_path / "run").glob("global_step*/*.pt"):
        value = torch.load(path, weights_only=False)
        if path.name.startswith("layer_"):
            value = {prefix + key: tensor for key, tensor in value.items()}
        elif value["module"] is not None:
            value["module"] = {prefix + key: tensor for key, tensor in value["module"].items()}
        torch.save(value, path)
    convert(tmp_path / "run", tmp_path / "a")
    convert(fixture(name), tmp_path / "b")
    want, have = hf_tensors(tmp_path / "b"), hf_tensors(tmp_path / "a")
    assert all(same_bits(want[key], have[key]) for key in want)


# GPT-NeoX folders of other names


def test_renamed_steps_are_read(tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    shutil.copytree(fixture("pythia_fp16_pp1_tp1"), run_folder)
    (run_folder / "global_step8").rename(run_folder / "step8")
    (run_folder / "latest").write_text("step8")
    for words in ((run_folder,), (run_folder / "step8",), (run_folder, "--step", "8")):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        done = run("convert", words[0], tmp_path / "out", "--to", "neox", *words[1:])
        assert done.exit_code == 0, done.stderr
        assert (tmp_path / "out" / "latest").read_text() == "global_step8"
    (run_folder / "latest").unlink()
    assert open_checkpoint(str(run_folder)).neox is not None
    assert run("reshard", run_folder, tmp_path / "resharded", "--dp", "1").exit_code == 0
    assert run("audit", run_folder).exit_code == 0
    words = ("--for", "neox@2024-09", "--fix", tmp_path / "fixed", "--drop-optimizer")
    done = run("doctor", run_folder, *words)
    assert done.exit_code == 0, done.stderr
    assert open_checkpoint(str(tmp_path / "fixed")).neox is not None
    assert run("doctor", tmp_path / "fixed", "--for", "neox@2024-09").exit_code == 0


def test_other_names_with_latest(tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    shutil.copytree(fixture("pythia_fp16_pp1_tp1"), run_folder)
    (run_folder / "global_step8").rename(run_folder / "best model")
    (run_folder / "latest").write_text("best model")
    checkpoint = open_checkpoint(str(run_folder))
    assert checkpoint.neox is not None
    assert (checkpoint.neox.step, checkpoint.neox.iteration) == ("best model", 8)


def test_deepspeeds_files_of_another_program(tmp_path: Path) -> None:
    source = tmp_path / "run"
    shutil.copytree(fixture("pythia_fp32_pp0_tp1"), source)
    step = source / (source / "latest").read_text().strip()
    shutil.rmtree(step / "configs")
    path = step / "mp_rank_00_model_states.pt"
    value = torch.load(path, weights_only=False)
    value["module"] = {"model.embed_tokens.weight": torch.ones(2, 2)}
    torch.save(value, path)
    message = said(source, tmp_path / "out")
    assert "a program other than GPT-NeoX" in message
    assert "model.embed_tokens.weight" in message


def test_apple_double_files_are_skipped(hf: Path, copy: Path, tmp_path: Path) -> None:
    noise = b"\x00\x05\x16\x07\x00\x02" + bytes(200)
    for name in ("._config.json", "._model.safetensors", "._tokenizer.json", "._x.bin"):
        (copy / name).write_bytes(noise)
    written(hf, copy)
    assert run("inspect", copy, "--security").exit_code == 0
    source = tmp_path / "run"
    shutil.copytree(fixture("pythia_fp32_pp1_tp2"), source)
    step = source / (source / "latest").read_text().strip()
    names = ["._latest", f"{step.name}/._layer_00-model_00-model_states.pt"]
    for name in (*names, f"{step.name}/configs/._base.yml"):
        (source / name).write_bytes(noise)
    convert(source, tmp_path / "converted")


# inspect --security


def test_security_of_a_sound_safetensors_file(hf: Path) -> None:
    done = run("inspect", hf / "model.safetensors", "--security")
    assert done.exit_code == 0
    assert "may run code" not in done.output
    assert "safetensors files contain no pickles" in done.stderr
    facts = json.loads(run("inspect", hf / "model.safetensors", "--security", "--json").stdout)
    assert facts["files"][0]["container"] == "safetensors"
    assert "no file in this folder" in run("inspect", hf, "--security").stderr


@pytest.mark.parametrize("first", range(0, 256, 8))
def test_security_whatever_byte_a_header_begins_with(first: int, tmp_path: Path) -> None:
    """The first byte of a header's length may be an opcode of pickle."""
    path = tmp_path / "model.safetensors"
    header = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    length = first if first >= len(header) else first + 256
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + b"cos\n")
    assert run("inspect", path, "--security").exit_code == 0


def test_security_of_a_file_that_is_both(tmp_path: Path) -> None:
    """A safetensors file whose bytes are also a pickle that names something."""
    path = tmp_path / "model.safetensors"
    run_it = b"cos\nsystem\n(S'true'\ntR."
    entry = {"dtype": "U8", "shape": [len(run_it)], "data_offsets": [0, len(run_it)]}
    header = json.dumps({"a": entry}).encode()
    length = 0x158  # X: a string of so many bytes, up to the tensor's data
    skipped = 8 + length - 5
    assert skipped < 256 * 256
    start = bytearray(length.to_bytes(8, "little"))
    path.write_bytes(bytes(start) + header.ljust(length) + run_it)
    # BINUNICODE takes bytes 1 to 4 as its length: 1 here, so the text ends at byte 6
    report = run("inspect", path, "--security")
    assert report.exit_code == 0
    renamed_path = tmp_path / "weights.bin"
    path.rename(renamed_path)
    assert run("inspect", renamed_path, "--security").exit_code == 0


@pytest.mark.parametrize(("content", "part"), [(POINTER, "Git LFS pointer"), (PAGE, "HTML page")])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "layer.pt"])
def test_security_of_what_is_not_here(name: str, content: bytes, part: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_bytes(content)
    for path in (tmp_path / "folder", tmp_path / "folder" / name):
        done = run("inspect", path, "--security")
        assert done.exit_code == 1
        assert part in done.stderr
        assert "may run code" not in done.stderr
