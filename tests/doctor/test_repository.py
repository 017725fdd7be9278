"""doctor on Hugging Face repositories of families that neox-bridge does not convert."""

import json
import shlex
import shutil
import struct
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hf_families import FAMILIES, changed, make
from hub_stub import Stub, serving, use
from safetensors.torch import load_file, save_file

import neox_bridge
from neox_bridge.cli.app import app
from neox_bridge.doctor.fix_index import index_checker, plan_index_fix
from neox_bridge.doctor.repository import read_repository
from neox_bridge.errors import BridgeError, Refused, Unverified
from neox_bridge.frameworks.facts import TransformersFacts
from neox_bridge.frameworks.model_types import lacks_class
from neox_bridge.frameworks.targets import target_named

INDEX = "model.safetensors.index.json"
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f"
    b"32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
Findings = dict[str, dict[str, Any]]


def run(*words: object) -> Any:
    return CliRunner().invoke(app, list(map(str, words)))


def examined(code: int, path: Path, *words: str) -> Findings:
    """The findings of doctor by code. code: the exit code. Text and JSON say the same."""
    done = run("doctor", path, *words)
    assert done.exit_code == code, done.output
    found = run("doctor", path, *words, "--json")
    assert found.exit_code == code
    (facts,) = json.loads(found.stdout)["checkpoints"]
    assert facts["read_by"] == "names"
    assert "read by names, shapes and settings, not by a family" in done.stdout
    for finding in facts["findings"]:
        assert f"{finding['severity']}: {finding['message']}" in done.stdout
        for name in finding["wrong"][:1] + finding["missing"][:1] + finding["unexpected"][:1]:
            assert name in done.stdout
        if finding["code"] not in ("written-by", "not-converted"):
            assert finding["severity"] == "info" or finding["remedy"], finding
    return {finding["code"]: finding for finding in facts["findings"]}


def follow(finding: dict[str, Any]) -> None:
    """Run the command that a finding advises."""
    words = shlex.split(finding["command"])
    if words[0] == "neox-bridge":
        assert run(*words[1:]).exit_code == 0
    else:
        subprocess.run(finding["command"], shell=True, check=True)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen3", tmp_path_factory.mktemp("repository") / "shards", max_shard_size="30KB")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen3", tmp_path_factory.mktemp("repository") / "whole")


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "model"))


@pytest.fixture
def single(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model-*.safetensors"))


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_healthy_repository_has_no_errors(family: str, tmp_path: Path) -> None:
    folder = make(family, tmp_path / family)
    found = examined(0, folder)
    assert not [one for one in found.values() if one["severity"] != "info"]
    assert "main" not in found
    (facts,) = json.loads(run("doctor", folder, "--json").stdout)["checkpoints"]
    assert facts["verdicts"][-1]["verdict"] == "loads"
    assert facts["loads"]


def test_gpt_neox_cannot_load_it(whole: Path) -> None:
    found = examined(4, whole, "--for", "today")
    assert "qwen3" in found["other-kind"]["why"]
    (facts,) = json.loads(run("doctor", whole, "--for", "today", "--json").stdout)["checkpoints"]
    assert facts["verdicts"][0]["verdict"] == "fails"
    assert run("doctor", whole, "--compare").exit_code == 4  # needs a family


def test_a_version_without_the_class(whole: Path) -> None:
    found = examined(4, whole, "--for", "transformers@4.48")
    assert found["class-unknown"]["wrong"] == ["model_type: qwen3"]
    assert "transformers 4.55" in found["class-unknown"]["remedy"]
    assert "does not recognize this architecture" in found["class-unknown"]["prints"]
    found = examined(4, whole, "--for", "transformers@4.30")
    assert found["class-unknown"]["prints"] == "KeyError: 'qwen3'"
    assert "class-unknown" not in examined(0, whole, "--for", "transformers")


def test_the_installed_transformers_has_the_classes_of_the_list() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    facts = target_named("transformers")
    assert isinstance(facts, TransformersFacts)
    assert not [name for name in CONFIG_MAPPING_NAMES if lacks_class(name, facts)]
    assert lacks_class("no_such_type", facts)
    older = target_named("transformers@4.57")
    assert isinstance(older, TransformersFacts)
    assert not lacks_class("ernie_m", older)  # 5.0 removed it
    assert lacks_class("ernie_m", facts)
    newer = target_named("transformers@9.0")
    assert isinstance(newer, TransformersFacts)
    assert not lacks_class("no_such_type", newer)  # nobody knows its classes yet


def test_the_python_interface(shards: Path) -> None:
    healthy = neox_bridge.diagnose(str(shards), "transformers@5.24")
    assert healthy.loads
    assert healthy.read_by == "names"
    assert healthy.error is None
    (shards / names(shards)[0]).unlink()
    damaged = neox_bridge.diagnose(str(shards))
    assert not damaged.loads
    assert "1 of 4 shards missing" in str(damaged.error)
    assert damaged.findings[0].code == "missing-shards"


# files


def test_every_damage_is_collected(shards: Path) -> None:
    first, second, third, fourth = names(shards)
    (shards / first).unlink()
    (shards / second).write_bytes(POINTER)
    (shards / third).write_bytes((shards / third).read_bytes()[:-10])
    (shards / fourth).write_bytes((shards / fourth).read_bytes().replace(b'"dtype"', b'"dtyqe"'))
    (shards / "generation_config.json").write_text("{")
    (shards / "tokenizer.json").symlink_to("/nowhere/tokenizer.json")
    (shards / "tokenizer.model").write_bytes(POINTER)
    (shards / "README.md").symlink_to("/nowhere/README.md")
    done = run("doctor", shards)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {shards} cannot be read: ")
    (facts,) = json.loads(run("doctor", shards, "--json").stdout)["checkpoints"]
    assert not facts["loads"]
    found = facts["findings"]
    assert [one["wrong"] for one in found if one["code"] == "damaged-file"] == [
        [third],
        [fourth],
        ["generation_config.json"],
    ]
    by_code = examined(1, shards)
    assert by_code["missing-shards"]["missing"] == [first]
    assert "wrong-total-size" not in by_code  # that of files that are not there
    assert by_code["misplaced-file"]["wrong"] == [second, "tokenizer.model"]
    assert "git lfs pull" in by_code["misplaced-file"]["remedy"]
    links = [one for one in found if one["code"] == "dangling-link"]
    assert [one["severity"] for one in links] == ["error", "warning"]
    assert [one["missing"] for one in links] == [["tokenizer.json"], ["README.md"]]
    (shards / "x.safetensors.incomplete").touch()
    unfinished = examined(1, shards)
    assert unfinished["unfinished-download"]["severity"] == "error"
    assert "run the same download again" in unfinished["missing-shards"]["remedy"]


def test_an_unfinished_download_of_another_file(single: Path) -> None:
    (single / "x.incomplete").touch()
    assert examined(0, single)["unfinished-download"]["severity"] == "warning"


def test_a_damaged_index(shards: Path) -> None:
    (shards / INDEX).write_text("[]")
    found = examined(1, shards)
    assert found["damaged-file"]["wrong"] == [INDEX]
    assert "no-index" not in found  # there is one


def test_a_snapshot_in_the_cache_without_its_blobs(shards: Path, tmp_path: Path) -> None:
    root = tmp_path / "models--org--name"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("a" * 40)
    snapshot = root / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for path in shards.iterdir():
        shutil.move(path, root / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert "dangling-link" not in examined(0, root)
    first = names(snapshot)[0]
    (root / "blobs" / first).unlink()
    found = examined(1, root)
    assert found["dangling-link"]["missing"] == [first]
    assert "hf download org/name" in found["dangling-link"]["remedy"]
    assert "blobs" in found["dangling-link"]["why"]
    assert "missing-shards" not in found  # the same file


def test_tensors_that_no_shard_has(shards: Path) -> None:
    edited(shards / INDEX, lambda index: index["weight_map"].update(x=names(shards)[0]))
    found = examined(1, shards)
    assert found["missing-tensors"]["missing"] == ["x"]
    assert found["missing-tensors"]["wrong"] == [names(shards)[0]]
    done = run("doctor", shards, "--fix", f"{shards}-fixed")
    assert done.exit_code == 1
    assert "cannot be fixed" in done.stderr
    assert not Path(f"{shards}-fixed").exists()


def wrong_index(index: dict[str, Any]) -> None:
    weight_map = index["weight_map"]
    files = sorted(set(weight_map.values()))
    moved = next(key for key, file in weight_map.items() if file == files[0])
    weight_map[moved] = files[-1]
    del weight_map[next(key for key, file in weight_map.items() if file == files[1])]
    index["metadata"]["total_size"] = 5


def test_an_index_that_the_shards_contradict_is_written_again(shards: Path) -> None:
    right = json.loads((shards / INDEX).read_text())
    edited(shards / INDEX, wrong_index)
    found = examined(0, shards)
    for code in ("index-wrong-shard", "not-in-index", "wrong-total-size"):
        assert found[code]["severity"] == "warning"
        assert found[code]["command"] == found["wrong-total-size"]["command"]
    dry = run("doctor", shards, "--fix", f"{shards}-x", "--dry-run")
    assert "changed  metadata.total_size: 5 → " in dry.stdout
    assert not Path(f"{shards}-x").exists()
    follow(found["wrong-total-size"])
    fixed = Path(f"{shards}-fixed")
    assert json.loads((fixed / INDEX).read_text()) == right
    assert all((fixed / n).read_bytes() == (shards / n).read_bytes() for n in names(shards))
    assert set(examined(0, fixed)) == {"written-by", "not-converted"}
    assert "nothing to fix" in run("doctor", fixed, "--fix", f"{shards}-x").stdout
    assert run("verify", fixed).exit_code == 0
    facts = json.loads(run("doctor", shards, "--in-place", "--json").stdout)["fixed"]
    assert facts["changes"][0]["path"] == INDEX
    assert json.loads((shards / INDEX).read_text()) == right


def test_shards_without_their_index(shards: Path) -> None:
    right = json.loads((shards / INDEX).read_text())
    (shards / INDEX).unlink()
    found = examined(4, shards)
    assert found["no-index"]["missing"] == [INDEX]
    follow(found["no-index"])
    fixed = json.loads((Path(f"{shards}-fixed") / INDEX).read_text())
    assert fixed["weight_map"] == right["weight_map"]
    assert fixed["metadata"]["total_size"] == right["metadata"]["total_size"]
    assert run("doctor", f"{shards}-fixed").exit_code == 0


def test_an_index_is_not_replaced_beside_what_would_be_lost(shards: Path) -> None:
    (shards / INDEX).unlink()
    (shards / "empty").mkdir()
    done = run("doctor", shards, "--in-place")
    assert done.exit_code == 4
    assert "empty/" in done.stderr
    repository = read_repository(str(shards), "", "org/name@main")
    with pytest.raises(Refused, match="is on the Hub"):
        plan_index_fix(repository, in_place=True)


def test_the_check_of_a_fixed_copy_notices_differences(shards: Path, tmp_path: Path) -> None:
    (shards / INDEX).unlink()
    repository = read_repository(str(shards), "")
    check = index_checker(repository)
    assert run("doctor", shards, "--fix", tmp_path / "copy").exit_code == 0
    check(str(tmp_path / "copy"))
    with pytest.raises(Unverified, match="cannot be read"):
        check(str(tmp_path / "nothing"))
    with pytest.raises(Unverified, match="differs from"):
        index_checker(read_repository(str(tmp_path), ""))(str(tmp_path / "copy"))
    with (tmp_path / "copy" / names(shards)[0]).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    with pytest.raises(Unverified, match="differs from what was written: model-00001"):
        check(str(tmp_path / "copy"))


def test_shards_of_another_save(shards: Path) -> None:
    stale = ["model-00001-of-00009.safetensors", "model-00009-of-00009.safetensors"]
    for name in stale:
        shutil.copy(shards / names(shards)[0], shards / name)
    found = examined(0, shards)
    assert found["stale-shards"]["unexpected"] == stale
    follow(found["stale-shards"])
    assert not (shards / stale[0]).exists()
    assert "stale-shards" not in examined(0, shards)


def test_shards_and_an_index_beside_a_whole_model(single: Path, sharded: Path) -> None:
    shutil.copy(sharded / names(sharded)[0], single)
    assert examined(0, single)["stale-shards"]["unexpected"] == names(sharded)[:1]
    shutil.copy(sharded / INDEX, single)
    found = examined(0, single)
    assert "3 shards would be missing" in found["index-ignored"]["why"]
    assert found["index-ignored"]["severity"] == "warning"


def test_shards_of_two_sets_without_an_index(shards: Path) -> None:
    shutil.copy(shards / names(shards)[0], shards / "model-00001-of-00001.safetensors")
    (shards / INDEX).unlink()
    assert len(examined(1, shards)["mixed-shards"]["wrong"]) == 2


def test_shards_that_are_missing_without_an_index(shards: Path) -> None:
    gone = names(shards)[1]
    (shards / gone).unlink()
    (shards / INDEX).unlink()
    assert examined(1, shards)["missing-shards"]["missing"] == [gone]


def test_a_tensor_in_two_files(shards: Path) -> None:
    first, second = names(shards)[:2]
    tensors = load_file(shards / second)
    name, value = next(iter(load_file(shards / first).items()))
    save_file({**tensors, name: value}, shards / second, {"format": "pt"})
    found = examined(0, shards)
    assert second in found["second-copy"]["message"]
    (shards / INDEX).unlink()
    assert examined(1, shards)["two-copies"]["wrong"] == [name]


def test_a_known_family_keeps_its_error_and_shows_all_damage(tmp_path: Path) -> None:
    from common import make_hf

    folder = make_hf(tmp_path / "model", family="llama")
    done = run("doctor", folder)
    assert done.exit_code == 0
    assert "read by the family llama" in done.stdout
    (facts,) = json.loads(run("doctor", folder, "--json").stdout)["checkpoints"]
    assert facts["read_by"] == "family"
    edited(folder / "generation_config.json", lambda one: one.update(temperature=0.5))
    (folder / "x.incomplete").touch()
    done = run("doctor", folder)
    assert done.exit_code == 0
    assert "warning: transformers refuses to save a model" in done.stdout
    assert "warning: a download into" in done.stdout
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "merges.txt").write_bytes(POINTER)
    done = run("doctor", folder)
    assert done.exit_code == 1
    assert done.stderr == run("convert", folder, tmp_path / "out").stderr
    assert "model.safetensors cannot be read" in done.stdout
    assert "merges.txt is a Git LFS pointer" in done.stdout


def test_the_index_of_a_known_family_is_written_again(tmp_path: Path) -> None:
    from common import make_hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_hf(tmp_path / "whole", family="llama"))
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="30KB")
    edited(folder / INDEX, lambda index: index["metadata"].update(total_size=5))
    (facts,) = json.loads(run("doctor", folder, "--json").stdout)["checkpoints"]
    (finding,) = [one for one in facts["findings"] if one["code"] == "wrong-total-size"]
    follow(finding)
    fixed = run("doctor", f"{folder}-fixed", "--json")
    assert fixed.exit_code == 0
    assert "wrong-total-size" not in fixed.stdout


# settings


def without_head(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["lm_head.weight"]


def both(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config.update(values)


YARN = {"rope_type": "yarn", "factor": 4.0}
SETTINGS: dict[str, tuple[Callable[[dict[str, Any]], object], int, str, str]] = {
    "no-model-type": (lambda c: c.pop("model_type"), 0, "warning", "model_type"),
    "no-head": (lambda c: None, 4, "error", "tie_word_embeddings: false"),
    "config-vocab": (both(vocab_size=100), 0, "warning", "vocab_size: 100, 96 expected"),
    "config-dtype": (both(dtype="bfloat16"), 0, "warning", "float32 expected"),
    "dtype-two-spellings": (both(torch_dtype="float16"), 0, "warning", "torch_dtype: float16"),
    "quantization-unused": (
        both(quantization_config={"quant_method": "fp8"}),
        4,
        "error",
        "config.json: quantization_config",
    ),
    "rope-two-spellings": (both(rope_theta=5000.0), 0, "warning", "rope_theta: 5000.0"),
    "rope-type": (
        both(
            rope_scaling={"type": "linear", "rope_type": "yarn", "factor": 2.0},
            rope_parameters=None,
        ),
        0,
        "warning",
        "type: linear",
    ),
    "rope-scaling": (
        both(rope_scaling=YARN, rope_parameters={**YARN, "factor": 2.0, "rope_theta": 1e4}),
        0,
        "warning",
        "factor: 4.0, 2.0",
    ),
    "code-missing": (
        both(auto_map={"AutoConfig": "configuration_x.XConfig", "AutoModel": "o/n--m.Model"}),
        0,
        "warning",
        "configuration_x.py",
    ),
    "written-by-newer": (both(transformers_version="9.1"), 0, "warning", "9.1"),
}


@pytest.mark.parametrize("fault", SETTINGS)
def test_settings(fault: str, single: Path) -> None:
    change, code, severity, evidence = SETTINGS[fault]
    edited(single / "config.json", change)
    if fault == "no-head":
        changed(single, without_head)
    found = examined(code, single)
    name = "rope-two-spellings" if fault.startswith("rope") else fault
    assert found[name]["severity"] == severity
    assert any(evidence in one for one in (*found[name]["wrong"], *found[name]["missing"]))
    if fault == "code-missing":  # the code of another repository is not missing here
        assert found[name]["missing"] == ["configuration_x.py"]


def test_no_config(single: Path) -> None:
    (single / "config.json").unlink()
    assert examined(4, single)["no-config"]["missing"] == ["config.json"]


def test_an_empty_config_is_not_a_missing_one(single: Path) -> None:
    (single / "config.json").write_text("{}")
    found = examined(0, single)
    assert "no-config" not in found
    assert found["no-model-type"]["missing"] == ["config.json: model_type"]


def test_the_name_of_a_folder_keeps_its_case(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text("{}")
    single.rename(pipeline / "unet")
    monkeypatch.chdir(tmp_path)
    assert f"why  {pipeline} does not contain" in run("doctor", "pipeline").stdout


def test_a_tied_config_with_another_head(tmp_path: Path) -> None:
    folder = make("gemma2", tmp_path / "model")

    def same(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    changed(folder, same)
    assert "head-differs" not in examined(0, folder)
    changed(folder, lambda t: t.update({"lm_head.weight": torch.ones(96, 32)}))
    assert examined(0, folder)["head-differs"]["wrong"] == ["lm_head.weight"]
    changed(folder, lambda t: t.update({"lm_head.weight": torch.ones(96, 31)}))
    assert examined(0, folder)["head-differs"]["severity"] == "warning"


def tokenizer(folder: Path, entries: int, **added: int) -> None:
    vocabulary = {f"t{number}": number for number in range(entries)}
    more = [{"content": name, "id": number} for name, number in added.items()]
    content = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": more}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def test_more_tokens_than_rows(single: Path) -> None:
    tokenizer(single, 90)
    assert "tokenizer-larger" not in examined(0, single)
    tokenizer(single, 96)
    assert "tokenizer-larger" not in examined(0, single)
    tokenizer(single, 97)
    found = examined(4, single)["tokenizer-larger"]
    assert found["wrong"] == ["model.embed_tokens.weight: 96 rows, 97 expected"]
    tokenizer(single, 90, special=96)  # one token whose id has no row
    assert examined(4, single)["tokenizer-larger"]["severity"] == "error"
    (single / "tokenizer.json").unlink()
    (single / "vocab.json").write_text(json.dumps({f"t{number}": number for number in range(90)}))
    assert "tokenizer-larger" not in examined(0, single)
    (single / "added_tokens.json").write_text(json.dumps({"special": 96}))
    assert "97 entries" in examined(4, single)["tokenizer-larger"]["message"]


def pieces(count: int) -> bytes:
    """A sentencepiece model: a ModelProto of pieces with a score and a type, and a trainer_spec."""
    texts = [f"piece{number}" * (1 + number % 30) for number in range(count)]
    inner = [bytes([10, len(t) % 128 + 128, len(t) // 128]) + t.encode() for t in texts]
    inner = [piece + b"\x15\x00\x00\x80\xbf\x18\x01" for piece in inner]
    whole = [bytes([10, len(piece) % 128 + 128, len(piece) // 128]) + piece for piece in inner]
    return b"".join(whole) + b"\x12\x03\x0a\x01x"


def test_the_pieces_of_sentencepiece_are_counted(single: Path) -> None:
    path = single / "tokenizer.model"
    path.write_bytes(pieces(96))
    assert "tokenizer-larger" not in examined(0, single)
    path.write_bytes(pieces(97))
    assert "97 entries" in examined(4, single)["tokenizer-larger"]["message"]
    path.write_bytes(pieces(97)[:-9])  # not complete, so nothing is known of it
    assert "tokenizer-larger" not in examined(0, single)
    path.write_bytes(b"IQ== 0\nIg== 1\n" * 97)  # of tiktoken
    assert "tokenizer-larger" not in examined(0, single)
    path.write_bytes(pieces(90))
    (single / "added_tokens.json").write_text(json.dumps({"special": 96}))
    assert "97 entries" in examined(4, single)["tokenizer-larger"]["message"]
    path.unlink()
    assert "tokenizer-larger" not in examined(0, single)


def test_a_tokenizer_without_a_vocabulary(single: Path) -> None:
    (single / "tokenizer.json").write_text("{}")
    assert "tokenizer-larger" not in examined(0, single)
    (single / "tokenizer.json").write_text('{"model": {}}')
    assert examined(1, single)["damaged-file"]["wrong"] == ["tokenizer.json"]


def quantized(folder: Path) -> None:
    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            base = name.removesuffix("weight")
            rows, columns = tensors.pop(name).shape
            tensors[f"{base}qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
            tensors[f"{base}scales"] = torch.ones(1, rows, dtype=torch.float16)
            tensors[f"{base}qzeros"] = torch.zeros(1, max(1, rows // 8), dtype=torch.int32)
            tensors[f"{base}g_idx"] = torch.zeros(columns, dtype=torch.int32)

    changed(folder, pack)


def test_quantized_tensors_with_and_without_their_settings(single: Path) -> None:
    quantized(single)
    found = examined(4, single)["quantization-unsaid"]
    assert "GPTQ" in found["message"]
    assert found["why"].endswith("initializes weights at random")
    (single / "quantize_config.json").write_text('{"bits": 4, "quant_method": "gptq"}')
    assert "quantize_config.json" in examined(4, single)["quantization-unsaid"]["why"]
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    edited(single / "config.json", both(quantization_config=settings))
    found = examined(0, single)
    assert not [one for one in found.values() if one["severity"] != "info"]


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (
            {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
            ["temperature: 0.6", "top_p: 0.9"],
        ),
        ({"temperature": 0.6}, ["temperature: 0.6"]),
        ({"do_sample": True, "temperature": 0.6}, []),
        ({"num_beams": 1, "length_penalty": 2.0}, ["length_penalty: 2.0"]),
        ({"num_beams": 4, "length_penalty": 2.0, "early_stopping": True}, []),
        ({"temperature": 1.0, "top_p": 1.0, "top_k": 50}, []),
    ],
)
def test_generation_settings_that_cannot_be_saved(
    content: dict[str, Any], wrong: list[str], single: Path
) -> None:
    from transformers import GenerationConfig

    (single / "generation_config.json").write_text(json.dumps(content))
    found = examined(0, single)
    assert found.get("generation-config", {"wrong": []})["wrong"] == wrong
    if wrong:
        with pytest.raises(ValueError, match=wrong[0].partition(":")[0]):
            GenerationConfig(**content).validate(strict=True)
    else:
        GenerationConfig(**content).validate(strict=True)


def adapter(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.ones(4, 32)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


def test_the_base_of_an_adapter(whole: Path, tmp_path: Path) -> None:
    assert "adapter-base" not in examined(
        0, adapter(tmp_path / "a", base_model_name_or_path="org/base")
    )
    assert "adapter-base" not in examined(
        0, adapter(tmp_path / "b", base_model_name_or_path=str(whole))
    )
    found = examined(4, adapter(tmp_path / "c", base_model_name_or_path=None))
    assert "does not name the base model" in found["adapter-base"]["message"]
    gone = str(tmp_path / "gone")
    found = examined(4, adapter(tmp_path / "d", base_model_name_or_path=gone))
    assert gone in found["adapter-base"]["message"]


def test_an_adapter_in_a_pickle_is_called_by_its_name(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", base_model_name_or_path="org/base")
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    done = run("doctor", folder, "--for", "transformers@4.52")
    assert done.exit_code == 0, done.output
    assert "the weights are pickles" in done.stdout
    assert "pytorch_model.bin" not in done.stdout


def test_an_adapter_beside_a_model(single: Path) -> None:
    (single / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert examined(0, single)["adapter-base"]["severity"] == "warning"


# versions of transformers


def test_custom_code(single: Path) -> None:
    code = {"AutoConfig": "configuration_x.XConfig"}
    (single / "configuration_x.py").write_text("raise SystemExit")
    edited(single / "config.json", both(auto_map=code))
    assert examined(0, single)["remote-code"]["severity"] == "info"
    edited(single / "config.json", both(model_type="not_a_type"))
    found = examined(0, single)
    assert found["remote-code"]["severity"] == "warning"
    assert found["remote-code"]["wrong"] == ["configuration_x.XConfig"]
    edited(single / "config.json", lambda config: config.pop("auto_map"))
    assert "No known version" in examined(4, single)["class-unknown"]["why"]


def test_spellings_that_older_versions_do_not_read(tmp_path: Path) -> None:
    folder = make("mixtral", tmp_path / "model")
    target = ("--for", "transformers@4.48")
    found = examined(0, folder, *target)
    assert found["dtype-key"]["missing"] == ["config.json: torch_dtype"]
    assert found["rope-parameters"]["severity"] == "warning"
    assert found["rope-parameters"]["missing"] == ["config.json: rope_theta"]
    assert found["written-by-newer"]["severity"] == "info"
    assert found["written-by-newer"]["message"].endswith("is older")
    scaling = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    edited(folder / "config.json", both(rope_parameters=scaling))
    missing = examined(0, folder, *target)["rope-parameters"]["missing"]
    assert missing == ["config.json: rope_theta", "config.json: rope_scaling"]
    more = {"torch_dtype": "float32", "rope_theta": 1e6, "rope_scaling": scaling}
    edited(folder / "config.json", both(**more, transformers_version="4.48.0"))
    assert set(examined(0, folder, *target)) == {"written-by", "not-converted"}
    assert "llama3-rope" in examined(0, folder, "--for", "transformers@4.36")
    edited(folder / "config.json", both(rope_scaling={"type": "linear", "factor": 4.0}))
    assert "llama3-rope" not in examined(0, folder, "--for", "transformers@4.36")


def test_tokenizer_settings_of_newer_versions(tmp_path: Path) -> None:
    folder = make("mixtral", tmp_path / "model")
    settings = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<x>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    found = examined(0, folder, "--for", "transformers@4.48")
    assert "TokenizersBackend" in found["tokenizer-class"]["prints"]
    assert "'list' object" in found["tokenizer-extra-tokens"]["prints"]
    for version in ("4.36", "5.24"):
        assert "tokenizer-extra-tokens" not in examined(
            0, folder, "--for", f"transformers@{version}"
        )
    assert "tokenizer-class" not in examined(0, folder)


def test_pickles_need_a_new_torch(single: Path) -> None:
    torch.save(load_file(single / "model.safetensors"), single / "pytorch_model.bin")
    assert "torch-load" not in examined(0, single)
    (single / "model.safetensors").unlink()
    found = examined(0, single)
    assert found["torch-load"]["severity"] == "info"


# size


def large(folder: Path, shards: int = 62, layers: int = 61, experts: int = 128) -> int:
    """A repository like Kimi K2: headers and sparse files. Returns the number of tensors."""
    folder.mkdir()
    described: list[tuple[str, str, list[int]]] = []
    for layer in range(layers):
        block = f"model.layers.{layer}."
        described.append((f"{block}input_layernorm.weight", "BF16", [7168]))
        for expert in range(experts):
            for part in ("gate", "up", "down"):
                name = f"{block}mlp.experts.{expert}.{part}_proj.weight"
                described.append((f"{name}_packed", "I32", [2048, 896]))
                described.append((f"{name}_scale", "BF16", [2048, 224]))
                described.append((f"{name}_shape", "I32", [2]))
    described.append(("model.embed_tokens.weight", "BF16", [163840, 7168]))
    described.append(("lm_head.weight", "BF16", [163840, 7168]))
    weight_map, total = {}, 0
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:06d}.safetensors"
        header, offset = {}, 0
        for name, dtype, shape in described[number::shards]:
            size = {"BF16": 2, "I32": 4}[dtype]
            for length in shape:
                size *= length
            header[name] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [offset, offset + size],
            }
            offset += size
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + offset)
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    config = {
        "model_type": "kimi_k2",
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "tie_word_embeddings": False,
        "vocab_size": 163840,
        "quantization_config": {"quant_method": "compressed-tensors"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_deepseek.py").write_text("")
    return len(described)


def test_70_000_tensors_in_62_shards(tmp_path: Path) -> None:
    assert large(tmp_path / "kimi") > 70_000
    tracemalloc.start()
    examination = neox_bridge.diagnose(str(tmp_path / "kimi"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 150 << 20
    severities = {one.code: one.severity for one in examination.findings}
    assert severities == {"remote-code": "warning", "written-by": "info", "not-converted": "info"}
    (tmp_path / "kimi" / "model-00007-of-000062.safetensors").unlink()
    damaged = neox_bridge.diagnose(str(tmp_path / "kimi"))
    assert damaged.findings[0].details.missing == ("model-00007-of-000062.safetensors",)


def test_a_folder_that_is_no_repository(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BridgeError, match="The folder is empty"):
        neox_bridge.diagnose(str(tmp_path / "empty"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stub]:
    with serving(Stub()) as stub:
        use(stub, monkeypatch, tmp_path)
        monkeypatch.chdir(tmp_path)
        yield stub


def test_a_repository_of_the_hub_is_read_there_by_ranges(hub: Stub, shards: Path) -> None:
    edited(shards / INDEX, wrong_index)
    hub.put_files("org/qwen", "main", shards)
    found = examined(0, Path("org/qwen"))
    weights = [answer for answer in hub.served if answer.target.startswith("/lfs/")]
    assert all(answer.range for answer in weights)  # nothing is downloaded as a whole
    assert found["wrong-total-size"]["command"].startswith("neox-bridge doctor org/qwen --fix ")
    follow(found["wrong-total-size"])
    assert "wrong-total-size" not in examined(0, Path("qwen-fixed"))


def test_a_known_model_of_the_hub_is_read_there_by_ranges(hub: Stub, tmp_path: Path) -> None:
    from common import make_hf

    hub.put_files("org/llama", "main", make_hf(tmp_path / "model", family="llama"))
    done = run("doctor", "org/llama")
    assert done.exit_code == 0
    weights = [answer for answer in hub.served if answer.target.startswith("/lfs/")]
    assert [answer.range for answer in weights] == ["bytes=0-65535"]  # once for all versions
