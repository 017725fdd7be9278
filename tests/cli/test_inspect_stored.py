"""``inspect`` of repositories of any family: what their files say, without a model."""

import json
import shutil
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf_families
import pytest
import torch
from commands import run
from hub_stub import Stub, serving, use
from safetensors.torch import load_file, save_file

from neox_bridge.layouts.open_stored import open_any
from neox_bridge.layouts.stored_model import StoredModel

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for family in hf_families.FAMILIES:
        hf_families.make(family, root / family)
    return root


@pytest.fixture
def qwen3(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "qwen3", tmp_path / "qwen3"))


def write_safetensors(path: Path, entries: dict[str, tuple[str, list[int], int]]) -> None:
    """A file with these tensors: dtype, shape and bytes, which are all zeros."""
    header, end = {}, 0
    for name, (dtype, shape, size) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def facts_of(path: Path, *options: str) -> dict[str, Any]:
    done = run("inspect", path, "--json", *options)
    assert done.exit_code == 0, done.output
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


@pytest.mark.parametrize("family", hf_families.FAMILIES)
def test_every_tensor_of_a_family_is_shown_as_it_is_stored(family: str, models: Path) -> None:
    tensors = load_file(models / family / "model.safetensors")
    facts = facts_of(models / family, "--tensors", "--stats")
    assert (facts["read_by"], facts["family"]) == ("names", family)
    stored = {t["name"]: (t["dtype"], t["shape"]) for t in facts["tensors"]}
    assert stored == {
        name: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for name, tensor in tensors.items()
    }
    assert facts["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert sum(pattern["count"] for pattern in facts["patterns"]) == len(tensors)
    for numbers in facts["stats"]:
        expected = tensors[numbers["name"]].double()
        assert numbers["norm"] == pytest.approx(expected.norm().item(), rel=1e-12)
        assert numbers["minimum"] == expected.min().item()


def test_the_output_says_that_no_family_was_used(qwen3: Path) -> None:
    done = run("inspect", qwen3)
    assert "read by     names, shapes and dtypes as stored, not by a family" in done.stdout
    assert "model.layers.#.self_attn.q_norm.weight" in done.stdout
    assert "refused     by every conversion: config.json: model_type 'qwen3'" in done.stdout


def test_convert_and_reshard_stay_bound_to_families(qwen3: Path, tmp_path: Path) -> None:
    for command in ("convert", "reshard"):
        done = run(command, qwen3, tmp_path / "out")
        assert done.exit_code == 4
        assert "GPT-NeoX cannot represent this model" in done.stderr


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("sharded", [False, True])
def test_files_of_each_kind(kind: str, sharded: bool, models: Path, tmp_path: Path) -> None:
    source = models / "gemma2"
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]] if sharded else [names]
    stem = "model" if kind == "safetensors" else "pytorch_model"
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}-{number:05}-of-00002.{kind}" if sharded else f"{stem}.{kind}"
        weight_map |= dict.fromkeys(part, file)
        inside = {name: tensors[name] for name in part}
        if kind == "bin":
            torch.save(inside, tmp_path / file)
        else:
            save_file(inside, tmp_path / file)
    if sharded:
        index = {"metadata": {}, "weight_map": weight_map}
        (tmp_path / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    shutil.copy(source / "config.json", tmp_path)
    facts = facts_of(tmp_path, "--tensors")
    assert {t["name"]: t["shape"] for t in facts["tensors"]} == {
        name: list(tensor.shape) for name, tensor in tensors.items()
    }
    assert len(facts["files"]) == len(parts)
    assert facts["findings"] == []


DTYPES = {
    **{"F4": ([4, 6], 12), "F6_E2M3": ([4, 4], 12), "F6_E3M2": ([8], 6), "F8_E8M0": ([7], 7)},
    **{"F8_E4M3": ([3], 3), "F8_E5M2FNUZ": ([3], 3), "C64": ([2], 16), "U64": ([2], 16)},
    **{"BOOL": ([5], 5), "I4_OF_2031": ([10], 5)},
}


def test_dtypes_that_numpy_does_not_know_are_shown_by_name_and_bytes(qwen3: Path) -> None:
    entries = {f"t.{name}": (name, *rest) for name, rest in DTYPES.items()}
    write_safetensors(qwen3 / "model.safetensors", entries)
    facts = facts_of(qwen3, "--tensors", "--stats")
    tensors = {tensor["name"]: tensor for tensor in facts["tensors"]}
    stats = {numbers["name"]: numbers for numbers in facts["stats"]}
    for name, (shape, size) in DTYPES.items():
        assert tensors[f"t.{name}"]["shape"] == shape
        assert tensors[f"t.{name}"]["shards"][0]["bytes"] == size
    undecoded = {"F4", "F6_E2M3", "F6_E3M2", "C64", "I4_OF_2031"}
    assert {name for name in DTYPES if not stats[f"t.{name}"]["decoded"]} == undecoded
    assert tensors["t.F4"]["dtype"] == "F4"
    assert tensors["t.C64"]["dtype"] == "complex64"
    assert stats["t.F4"]["norm"] is None
    assert stats["t.F8_E8M0"]["elements"] == 7
    done = run("inspect", qwen3, "--stats")
    assert done.exit_code == 0
    assert done.stdout.count("not decoded") == len(undecoded)


def test_the_bytes_of_packed_dtypes_must_fit_their_shape(qwen3: Path) -> None:
    write_safetensors(qwen3 / "model.safetensors", {"t": ("F4", [4, 6], 13)})
    done = run("inspect", qwen3)
    assert done.exit_code == 1
    assert f"{qwen3 / 'model.safetensors'} is not a complete safetensors file" in done.stderr


def test_quantized_weights_are_shown_as_stored(qwen3: Path) -> None:
    config = json.loads((qwen3 / "config.json").read_text())
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (qwen3 / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "proj" in name]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(1, 1)

    hf_families.changed(qwen3, quantize)
    facts = facts_of(qwen3, "--stats")
    assert facts["quantization"]["method"] == "fp8"
    assert set(facts["dtypes"]) == {"float8_e4m3fn", "float32"}
    assert all(numbers["decoded"] for numbers in facts["stats"])
    done = run("inspect", qwen3)
    assert "quantized (fp8)" in done.stdout
    assert "convert the original, unquantized model" in done.stdout


def test_an_adapter(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weights = {f"base_model.model.l.{i}.lora_A.weight": torch.zeros(8, 4) for i in range(2)}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    facts = facts_of(tmp_path)
    assert facts["components"][0]["model"] == "LORA"
    assert facts["patterns"][0]["name"] == "base_model.model.l.#.lora_A.weight"
    assert "is a LoRA adapter of org/base" in facts["refusals"][0]["reason"]


def test_several_components_in_one_repository(models: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "Pipeline"}')
    shutil.copytree(models / "t5", tmp_path / "text_encoder")
    shutil.copytree(models / "bert", tmp_path / "vae")
    (tmp_path / "scheduler").mkdir()
    facts = facts_of(tmp_path, "--tensors")
    assert [(c["name"], c["model"]) for c in facts["components"]] == [
        ("text_encoder", "T5ForConditionalGeneration"),
        ("vae", "BertModel"),
    ]
    names = {tensor["name"] for tensor in facts["tensors"]}
    assert {"text_encoder/shared.weight", "vae/embeddings.word_embeddings.weight"} <= names
    assert "component   vae (BertModel)" in run("inspect", tmp_path).stdout


def test_a_folder_below_and_another_copy_of_the_weights(models: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(models / "mixtral", tmp_path / "mixtral"))
    shutil.copy(root / "model.safetensors", root / "consolidated.safetensors")
    shutil.copytree(models / "bert", root / "vision")
    torch.save({"a": torch.zeros(2)}, root / "pytorch_model.bin")
    (root / "checkpoint-5").mkdir()
    facts = facts_of(root)
    assert [c["name"] for c in facts["components"]] == ["", "consolidated.safetensors", "vision"]
    (finding,) = facts["findings"]
    assert "pytorch_model.bin" in finding["message"]
    assert "checkpoint-5" in finding["message"]


def test_a_variant_is_a_copy_beside_the_weights_that_are_loaded(qwen3: Path) -> None:
    variant = {name: tensor.half() for name, tensor in load_file(qwen3 / WEIGHTS).items()}
    save_file(variant, qwen3 / "model.fp16.safetensors")
    components = facts_of(qwen3)["components"]
    assert [one["name"] for one in components] == ["", "model.fp16.safetensors"]
    assert components[0]["files"] == [str(qwen3 / WEIGHTS)]


def test_a_link_that_leads_back_adds_no_tensors(qwen3: Path) -> None:
    (qwen3 / "alias").symlink_to(".")
    (facts,) = facts_of(qwen3)["components"]
    assert facts["tensors"] == len(load_file(qwen3 / WEIGHTS))


@pytest.mark.parametrize("key", ["intermediate_size", "conv_kernel", "num_attention_heads"])
def test_settings_of_an_unknown_family_are_of_any_kind(key: str, qwen3: Path) -> None:
    config = json.loads((qwen3 / "config.json").read_text())
    (qwen3 / "config.json").write_text(json.dumps({**config, key: [3, 3]}))
    assert facts_of(qwen3)["read_by"] == "names"


def test_nan_is_found_without_warnings_of_numpy(qwen3: Path) -> None:
    signaling = torch.tensor([[0x7C01, 0x3C00]], dtype=torch.int16).view(torch.float16)
    save_file({"w": signaling}, qwen3 / WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = run("inspect", qwen3, "--stats")
    assert (done.exit_code, "NaN in 1 of 1 tensors: w" in done.output) == (0, True), done.output


def test_a_folder_of_adapters_names_them(tmp_path: Path) -> None:
    for name in ("french", "german"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    done = run("inspect", tmp_path)
    assert done.exit_code == 1
    assert "There are models in french, german" in done.output


def test_a_base_model_of_a_known_family(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaModel

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaModel(LlamaConfig(**small, vocab_size=96, intermediate_size=64)).save_pretrained(tmp_path)
    facts = facts_of(tmp_path)
    assert facts["read_by"] == "names"
    assert "base model without an output head" in facts["refusals"][0]["reason"]


def test_a_known_family_is_read_by_it(tmp_path: Path) -> None:
    assert run("toy", "pythia-70m", tmp_path / "toy", "--as", "hf").exit_code == 0
    assert facts_of(tmp_path / "toy")["read_by"] == "family"


def shards_of(source: Path, count: int) -> list[Path]:
    """Rewrite the weights of a folder as shards with an index."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names, weight_map, files = sorted(tensors), {}, []
    for number in range(count):
        path = source / f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = names[number::count]
        save_file({name: tensors[name] for name in part}, path)
        weight_map |= dict.fromkeys(part, path.name)
        files.append(path)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


def edit_index(source: Path, **changes: str | None) -> None:
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= {name: file for name, file in changes.items() if file is not None}
    for name in [name for name, file in changes.items() if file is None]:
        del index["weight_map"][name]
    path.write_text(json.dumps(index))


def test_an_absent_shard_is_named(qwen3: Path) -> None:
    files = shards_of(qwen3, 3)
    files[1].unlink()
    done = run("inspect", qwen3)
    assert done.exit_code == 1
    assert f"{files[1]} is missing, although model.safetensors.index.json names it" in done.stderr


def test_an_absent_shard_without_an_index_is_named(qwen3: Path) -> None:
    files = shards_of(qwen3, 3)
    (qwen3 / "model.safetensors.index.json").unlink()
    assert "index file of 3 shards" in facts_of(qwen3)["findings"][0]["message"]
    files[0].unlink()
    done = run("inspect", qwen3)
    assert done.exit_code == 1
    assert f"{files[0]} is missing, although the names of the others tell it" in done.stderr


def test_a_single_file_is_read_instead_of_an_index(qwen3: Path, models: Path) -> None:
    files = shards_of(qwen3, 2)
    files[1].unlink()
    shutil.copy(models / "qwen3" / "model.safetensors", qwen3)
    facts = facts_of(qwen3)
    assert [finding["code"] for finding in facts["findings"]] == ["index-ignored"]
    assert facts["files"] == [str(qwen3 / "model.safetensors")]


def test_the_files_of_mistral(models: Path, tmp_path: Path) -> None:
    shutil.copy(models / "mixtral" / "model.safetensors", tmp_path / "consolidated.safetensors")
    (tmp_path / "params.json").write_text('{"dim": 32, "n_layers": 2, "n_heads": 4}')
    facts = facts_of(tmp_path)
    assert facts["family"] is None
    assert facts["components"][0]["files"] == [str(tmp_path / "consolidated.safetensors")]


def test_names_of_folders_may_have_dots(models: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    shutil.copytree(models / "bert", tmp_path / "v1.5")
    assert [part["folder"] for part in facts_of(tmp_path)["components"]] == [str(tmp_path / "v1.5")]


def test_a_tensor_that_no_shard_has_is_named(qwen3: Path) -> None:
    files = shards_of(qwen3, 2)
    edit_index(qwen3, **{"model.other.weight": files[1].name})
    done = run("inspect", qwen3)
    assert done.exit_code == 1
    assert f"{files[1]} does not contain model.other.weight" in done.stderr


def test_what_index_and_shards_disagree_on(qwen3: Path) -> None:
    files = shards_of(qwen3, 2)
    first, second = (sorted(load_file(file)) for file in files)
    edit_index(qwen3, **{first[0]: None, second[0]: files[0].name})
    index = json.loads((qwen3 / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] += 4
    (qwen3 / "model.safetensors.index.json").write_text(json.dumps(index))
    facts = facts_of(qwen3)
    assert {f["code"]: f["severity"] for f in facts["findings"]} == {
        "index-wrong-shard": "warning",
        "not-in-index": "warning",
        "wrong-total-size": "warning",
    }
    words = " ".join(finding["message"] for finding in facts["findings"])
    assert first[0] in words
    assert second[0] in words


def test_a_tensor_in_two_shards_needs_an_index(qwen3: Path) -> None:
    files = shards_of(qwen3, 2)
    tensors = load_file(files[1])
    name = next(iter(load_file(files[0])))
    save_file({**tensors, name: torch.zeros(2)}, files[1])
    shape = load_file(files[0])[name].shape
    facts = facts_of(qwen3, "--tensors")
    (second,) = [f for f in facts["findings"] if f["code"] == "second-copy"]
    assert name in second["message"]
    assert {t["name"]: t["shape"] for t in facts["tensors"]}[name] == list(shape)
    (qwen3 / "model.safetensors.index.json").unlink()
    done = run("inspect", qwen3)
    assert done.exit_code == 1
    assert f"{files[1]} contains {name}, and so does {files[0].name}" in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (struct.pack("<Q", 50) + b"{", "fewer than its header announces"),
        (struct.pack("<Q", 2) + b"[]", "does not start with {"),
        (
            struct.pack("<Q", 21) + b'{"a": null, "a":null}',
            "not valid JSON with unique names (a name is used twice)",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS"),
    ],
)
def test_a_damaged_header_names_its_file(content: bytes, message: str, qwen3: Path) -> None:
    path = qwen3 / "model.safetensors"
    path.write_bytes(content)
    done = run("inspect", qwen3)
    assert done.exit_code == 1
    assert str(path) in done.stderr
    assert message in done.stderr


@pytest.mark.parametrize("weight_map", [None, {}, {"a": 3}, {"a": "../x.safetensors"}])
def test_a_damaged_index_is_named(weight_map: object, qwen3: Path) -> None:
    path = qwen3 / "model.safetensors.index.json"
    (qwen3 / "model.safetensors").unlink()
    path.write_text(json.dumps({"weight_map": weight_map}))
    done = run("inspect", qwen3)
    assert done.exit_code == 1
    assert str(path) in done.stderr


def test_a_folder_without_weights_keeps_its_error(qwen3: Path) -> None:
    (qwen3 / "model.safetensors").unlink()
    done = run("inspect", qwen3)
    assert done.exit_code == 4
    assert "model_type 'qwen3'" in done.stderr


def test_a_config_without_a_model_type(qwen3: Path, tmp_path: Path) -> None:
    (qwen3 / "config.json").write_text('{"hidden_size": 32}')
    reason = "model_type is missing from config.json, so the family of the model is unknown"
    assert reason in run("inspect", qwen3).stdout
    done = run("convert", qwen3, tmp_path / "out")
    assert done.exit_code == 4
    assert reason in done.stderr


def test_one_element_of_one_tensor(qwen3: Path) -> None:
    write_safetensors(qwen3 / "model.safetensors", {"w": ("BF16", [1], 2)})
    assert "bfloat16 (1 element)" in run("inspect", qwen3).stdout


def test_optimizer_states_are_not_expected(qwen3: Path) -> None:
    done = run("inspect", qwen3, "--optimizer")
    assert done.exit_code == 2
    assert "--optimizer" in done.stderr


def test_70000_tensors_in_60_shards(tmp_path: Path) -> None:
    """Headers in the shape of Kimi K2's: sparse files, 500 GB of them."""
    layers, experts, shards = 61, 384, 62
    names = [f"model.layers.{i}.input_layernorm.weight" for i in range(layers)]
    names += [
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight_packed"
        for layer in range(layers)
        for expert in range(experts)
        for part in ("gate", "up", "down")
    ]
    weight_map, total = {}, 0
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:06}.safetensors"
        entries = {
            name: ("I32", [2048, 896], 4 * 2048 * 896)
            if name.endswith("packed")
            else ("BF16", [7168], 2 * 7168)
            for name in names[shard::shards]
        }
        write_safetensors(tmp_path / file, entries)
        weight_map |= dict.fromkeys(entries, file)
        total += sum(size for _, _, size in entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "kimi_k2", "quantization_config": {"quant_method": "x"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    facts = facts_of(tmp_path)
    assert facts["tensor_count"] == layers * (1 + 3 * experts)
    assert facts["findings"] == []
    assert len(facts["patterns"]) == 4
    assert facts["bytes"] > total
    model = open_any(str(tmp_path))
    assert isinstance(model, StoredModel)
    assert model.size == total


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stub]:
    with serving(Stub()) as stub:
        use(stub, monkeypatch, tmp_path)
        yield stub


def test_a_model_of_the_hub_is_read_there_by_ranges(
    hub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}
    config = Qwen3Config(**sizes, vocab_size=5000, intermediate_size=256)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "model", max_shard_size="2MB")
    hub.put_files("org/qwen", "main", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    done = run("inspect", "org/qwen", "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert (facts["family"], facts["revision"]) == ("qwen3", "org/qwen@main")
    assert sum(answer.size for answer in hub.served) < facts["bytes"] / 10
    assert facts["tensor_count"] == len(config.layer_types or ()) * 11 + 3
    before = len(hub.served)
    stats = json.loads(run("inspect", "org/qwen", "--json", "--stats").stdout)["stats"]
    assert sum(answer.size for answer in hub.served[before:]) > facts["bytes"]  # downloaded
    assert len(stats) == facts["tensor_count"]
    before = len(hub.served)
    assert run("inspect", "org/qwen").exit_code == 0  # from the cache
    assert sum(answer.size for answer in hub.served[before:]) < 10_000


def test_objects_that_are_not_tensors_are_named(models: Path, tmp_path: Path) -> None:
    shutil.copy(models / "qwen3" / "config.json", tmp_path)
    torch.save({"a.weight": torch.zeros(2), "epoch": 3}, tmp_path / "pytorch_model.bin")
    (finding,) = facts_of(tmp_path)["findings"]
    assert finding["code"] == "not-tensors"
    assert "epoch" in finding["message"]
