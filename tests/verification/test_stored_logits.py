"""``verify --logits`` of models of any family, which transformers computes in a child process."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import hf_families
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import save_file

from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.layouts.open_stored import open_any, stored_model_of
from neox_bridge.layouts.stored_model import StoredModel
from neox_bridge.verification import stored_logits, transformers_run
from neox_bridge.verification.logits import Agreement, LoadChange
from neox_bridge.verification.stored_logits import compare_stored_logits
from neox_bridge.verification.transformers_run import compute, first_tensor, model_class

Config = dict[str, Any]
IDS = [[5, 6, 7, 8], [9, 10, 11, 12]]


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


def edit_config(folder: Path, change: Callable[[Config], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    home = tmp_path_factory.mktemp("families")

    def make(family: str) -> Path:
        folder = home / family
        return folder if folder.exists() else hf_families.make(family, folder)

    return make


@pytest.fixture
def qwen3(made: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made("qwen3"), tmp_path / "qwen3"))


@pytest.fixture
def ids(tmp_path: Path) -> str:
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    return str(tmp_path / "ids.json")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in this process, which has transformers already."""
    monkeypatch.setattr(stored_logits, "answer_of", lambda request, _models: compute(request))


def opened(folder: Path) -> StoredModel:
    return stored_model_of(open_any(str(folder)))


def agreement(first: Path, second: Path, tokens: str | None = None) -> Agreement:
    return compare_stored_logits(opened(first), opened(second), tokens)["logits"]


# --- in a child process


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gemma2", "t5"])  # experts, a tied head, an encoder
def test_copies_compute_the_same(family: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    hf_families.make(family, sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    code, text = run("verify", made(family), sharded, "--logits")
    assert code == 0, text
    assert "logits of 128 tokens differ by 0 at most" in text
    assert text.endswith("top-1 100.0%: the same model\n")


@pytest.mark.slow
def test_a_cast_is_computed_with_its_rounded_weights(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    rounded = Path(shutil.copytree(made("olmo2"), tmp_path / "rounded"))

    def cast(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.bfloat16()

    hf_families.changed(rounded, cast)
    code, text = run("verify", made("olmo2"), rounded, "--logits", "--json")
    document = json.loads(text)
    assert code == 3
    assert document["verdict"] == "equal after casting float32 to bfloat16"
    logits = document["logits"]
    assert not logits["agrees"]
    assert logits["comparable"]
    assert logits["load_changes"] == []
    assert logits["place"] == "model.embed_tokens"
    assert 0 < logits["relative"] < 0.05


@pytest.mark.slow
def test_no_file_of_the_current_folder_or_the_repository_runs(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if the current folder is the repository."""
    mark = tmp_path / "ran"
    for name in ("json", "numpy", "torch", "transformers", "modeling_mine", "sitecustomize"):
        (qwen3 / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    classes = {"AutoConfig": "modeling_mine.C", "AutoModelForCausalLM": "modeling_mine.M"}
    edit_config(qwen3, lambda config: config.update(auto_map=classes))
    monkeypatch.chdir(qwen3)
    code, text = run("verify", ".", ".", "--logits")
    assert code == 0, text
    assert not mark.exists()


@pytest.mark.slow
def test_a_refusal_of_the_child_is_one_of_the_command(qwen3: Path) -> None:
    edit_config(qwen3, lambda config: config.update(model_type="yarrow"))
    code, text = run("verify", qwen3, qwen3, "--logits")
    assert code == 4
    assert "is a model of the family 'yarrow', which transformers" in text
    assert "without --logits" in text
    assert "Traceback" not in text


def child(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """What the child does, with ``request`` as its request."""
    prologue = "import json, os, sys, time; request = json.load(sys.stdin); "
    monkeypatch.setattr(stored_logits, "_PROGRAM", prologue + program)


AT_WORK = (
    "open(request['folder'] + '/stage.json', 'w').write('{\"side\": 1, \"stage\": \"loading\"}'); "
)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            "os.kill(os.getpid(), 9)",
            "Reading the configs of {first} and {second} with transformers needs more memory than "
            "there is (the system ended the process, most likely because memory ran out)",
        ),
        (
            AT_WORK + "os.kill(os.getpid(), 9)",
            "Loading {second} with transformers needs more memory than there is (the system",
        ),
        (
            AT_WORK + "answer = dict(out_of_memory=True, sides=[]); "
            "open(request['folder'] + '/answer.json', 'w').write(json.dumps(answer))",
            "Loading {second} with transformers needs more memory than there is (the process says "
            "memory ran out). In float32 its weights have ",
        ),
        (
            AT_WORK + "os.abort()",
            "Loading {second} with transformers failed: the process ended "
            "with SIGABRT. Try another version of torch",
        ),
        ("sys.exit('no CUDA here')", "failed: the process ended with exit code 1 (no CUDA here). "),
        ("pass", "failed: the process ended with exit code 0. "),
    ],
)
def test_a_child_that_crashes_is_explained(
    program: str, message: str, qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(qwen3, tmp_path / "other"))
    child(monkeypatch, program)
    code, text = run("verify", qwen3, other, "--logits")
    assert code == 1
    assert message.format(first=qwen3, second=other) in text
    with pytest.raises(BridgeError):
        agreement(qwen3, other)


@pytest.mark.parametrize(("error", "code"), [(BridgeError, 1), (Refused, 4)])
def test_an_error_of_the_child_is_one_of_the_command(
    error: type[BridgeError], code: int, qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = {"error": "model is no model.", "exit_code": error.exit_code, "sides": []}
    child(
        monkeypatch,
        f"open(request['folder'] + '/answer.json', 'w').write({json.dumps(answer)!r})",
    )
    assert run("verify", qwen3, qwen3, "--logits") == (code, "error: model is no model.\n")
    with pytest.raises(error, match=r"^model is no model\.$"):
        agreement(qwen3, qwen3)


def test_a_child_that_hangs_is_stopped(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, AT_WORK + "time.sleep(1000)")
    monkeypatch.setattr(stored_logits, "BASE_SECONDS", 1)
    with pytest.raises(BridgeError, match=r"Loading .* took longer than 0.0 hours and was stopped"):
        agreement(qwen3, qwen3)


def test_transformers_is_missing(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_logits, "find_spec", lambda _name: None)
    with pytest.raises(BridgeError, match=r"transformers, which is missing\. Install it: "):
        agreement(qwen3, qwen3)


def test_a_model_in_a_store_is_refused(qwen3: Path) -> None:
    model = replace(opened(qwen3), path="s3://bucket/model")
    with pytest.raises(Refused, match="s3://bucket/model: transformers computes only models on"):
        compare_stored_logits(model, model, None)


# --- in this process


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.embed_tokens.weight", "model.embed_tokens"),
        (
            "model.layers.0.post_attention_layernorm.weight",
            "model.layers.0.post_attention_layernorm",
        ),
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp"),
        ("model.layers.1.self_attn.v_proj.weight", "model.layers.1.self_attn"),
        ("model.norm.weight", "logits"),
        ("lm_head.weight", "logits"),
    ],
)
def test_the_first_module_that_differs_is_named(
    name: str, place: str, made: Callable[[str], Path], qwen3: Path, ids: str
) -> None:
    hf_families.changed(qwen3, lambda tensors: tensors.update({name: tensors[name] * 1.5}))
    found = agreement(made("qwen3"), qwen3, ids)
    assert not found.agrees
    assert found.comparable
    assert (found.tokens, found.place) == (8, place)
    assert found.apart > 1e-3


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("factor", "agrees"), [(1 + 1e-6, True), (1 + 1.5e-5, True), (1 + 3e-5, False)]
)
def test_rounding_is_the_same_model(
    factor: float, agrees: bool, made: Callable[[str], Path], qwen3: Path, ids: str
) -> None:
    name = "lm_head.weight"
    hf_families.changed(qwen3, lambda tensors: tensors.update({name: tensors[name] * factor}))
    found = agreement(made("qwen3"), qwen3, ids)
    assert found.agrees is agrees
    assert found.place == ("" if agrees else "logits")
    assert found.relative > 0


@pytest.mark.usefixtures("here")
def test_weights_that_transformers_invents_or_ignores_are_named(
    made: Callable[[str], Path], qwen3: Path, ids: str
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.upper.weight"] = tensors.pop(name)

    hf_families.changed(qwen3, rename)
    found = agreement(made("qwen3"), qwen3, ids)
    assert found.load_changes == (
        LoadChange(str(qwen3), "initialized", (name,)),
        LoadChange(str(qwen3), "ignored", ("model.layers.1.mlp.upper.weight",)),
    )
    assert not found.comparable
    assert not found.agrees
    code, text = run("verify", qwen3, qwen3, "--logits", "--tokens", ids)
    assert code == 3
    assert "loads other models than the files: CANNOT BE COMPARED" in text
    assert f"{qwen3}: transformers initializes randomly, because the files do not contain" in text
    assert "its class does not have them: model.layers.1.mlp.upper.weight\n" in text


@pytest.mark.usefixtures("here")
def test_values_that_are_not_finite_are_no_agreement(
    made: Callable[[str], Path], qwen3: Path, ids: str
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][0, 0] = float("nan")

    hf_families.changed(qwen3, spoil)
    one = agreement(made("qwen3"), qwen3, ids)
    assert one.comparable
    assert not one.agrees
    assert one.place == "model.layers.1.mlp"
    assert one.non_finite is not None
    assert (one.non_finite.tensor, one.non_finite.tensor_second) == (name, 1)
    both = agreement(qwen3, qwen3, ids)
    assert not both.comparable
    assert both.place == "model.layers.1.mlp"


@pytest.mark.usefixtures("here")
def test_recorded_logits_are_compared(qwen3: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor(IDS)).logits.numpy()

    def recorded(values: Any) -> Agreement:
        np.savez(tmp_path / "a.npz", tokens=np.array(IDS), logits=values)
        first = opened(qwen3)
        return compare_stored_logits(first, first, str(tmp_path / "a.npz"))["recorded"]

    assert recorded(logits).agrees
    assert recorded(logits).relative < 1e-5
    wrong = recorded(logits * 1.001)
    assert (wrong.agrees, wrong.place) == (False, "the recorded logits")
    assert recorded(np.full_like(logits, np.nan)).non_finite is not None
    with pytest.raises(BridgeError, match="one row of logits per token"):
        recorded(logits[:, :2])
    hf_families.changed(qwen3, lambda tensors: tensors.pop("lm_head.weight"))
    assert recorded(logits).load_changes


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[95, 96]], "the vocabulary has the ids 0 to 95"),
        ([[1] * 33], "a row has 33 tokens, but the model has 32 positions"),
    ],
)
def test_tokens_are_within_the_limits_of_the_config(
    tokens: list[list[int]], message: str, qwen3: Path, tmp_path: Path
) -> None:
    edit_config(qwen3, lambda config: config.update(max_position_embeddings=32))
    (tmp_path / "ids.json").write_text(json.dumps(tokens))
    with pytest.raises(BridgeError, match=message):
        agreement(qwen3, qwen3, str(tmp_path / "ids.json"))
    assert agreement(qwen3, qwen3).tokens == 64


@pytest.mark.usefixtures("here")
def test_generated_tokens_have_no_special_ids(
    made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    original = transformers_run._forward

    def forward(model: Any, task: Any, tokens: torch.Tensor, *rest: Any) -> list[str]:
        seen.append(tokens)
        return original(model, task, tokens, *rest)

    monkeypatch.setattr(transformers_run, "_forward", forward)
    agreement(made("qwen3"), made("qwen3"))
    assert torch.equal(*seen)
    assert int(seen[0].min()) >= 3  # those of padding, begin and end are 0, 1 and 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda config: config.update(
                model_type="kimi_k9", auto_map={"AutoConfig": "configuration_kimi.KimiConfig"}
            ),
            r"is a model of the family 'kimi_k9', which transformers \S+ does not have\. Its code "
            r"is in the repository \(auto_map: configuration_kimi.KimiConfig\), which neox-bridge",
        ),
        (
            lambda config: config.update(model_type="yarrow"),
            r"the family 'yarrow', which transformers \S+ does not have. Its code is unknown",
        ),
        (lambda config: config.pop("model_type"), "has no config.json with a model_type"),
        (
            lambda config: config.update(transformers_weights="other.safetensors"),
            r"names the files of its weights \(transformers_weights: other.safetensors\), so",
        ),
        (
            lambda config: config.update(architectures=["Qwen3Model"]),
            "names the class Qwen3Model, which has no logits of tokens in transformers",
        ),
        (
            lambda config: config.update(architectures=["Qwen3ForTokenClassification"]),
            "names the class Qwen3ForTokenClassification, which has no logits of tokens",
        ),
    ],
)
def test_models_that_transformers_cannot_compute_are_refused(
    change: Callable[[Config], object], message: str, qwen3: Path
) -> None:
    edit_config(qwen3, change)
    with pytest.raises(Refused, match=message):
        model_class(str(qwen3))


def test_a_config_without_a_class_is_of_a_causal_model(qwen3: Path) -> None:
    edit_config(qwen3, lambda config: config.pop("architectures"))
    kind, _, task = model_class(str(qwen3))
    assert (kind, task) == (transformers.Qwen3ForCausalLM, "CAUSAL_LM")


def test_adapters_are_refused(qwen3: Path) -> None:
    (qwen3 / "adapter_config.json").write_text("{}")
    with pytest.raises(Refused, match="is an adapter, which computes no logits without its base"):
        model_class(str(qwen3))


@pytest.mark.usefixtures("here")
def test_what_transformers_cannot_load_or_compute_is_an_error(qwen3: Path, ids: str) -> None:
    broken = Path(shutil.copytree(qwen3, qwen3.parent / "broken"))
    edit_config(broken, lambda config: config.update(intermediate_size=7))
    with pytest.raises(BridgeError, match=r"broken: transformers \S+ cannot load it: "):
        agreement(qwen3, broken, ids)
    edit_config(qwen3, lambda config: config.update(hidden_act="strange"))
    with pytest.raises(BridgeError, match=r"qwen3: transformers \S+ cannot load it: "):
        agreement(qwen3, qwen3, ids)
    edit_config(qwen3, lambda config: config.update(hidden_act="silu", hidden_size="many"))
    with pytest.raises(BridgeError, match=r"qwen3: transformers \S+ cannot load it: "):
        agreement(qwen3, qwen3, ids)


@pytest.mark.usefixtures("here")
def test_pickles_are_read_only_if_they_are_what_is_compared(
    made: Callable[[str], Path], qwen3: Path, ids: str
) -> None:
    from safetensors.torch import load_file

    file = qwen3 / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    torch.save(tensors, qwen3 / "pytorch_model.bin")
    assert agreement(made("qwen3"), qwen3, ids).largest == 0.0
    kind, config, _ = model_class(str(qwen3))
    with pytest.raises(BridgeError, match=r"cannot load it: .*model\.safetensors"):
        transformers_run.load(str(qwen3), kind, config, "cpu", safetensors=True)


@pytest.mark.usefixtures("here")
def test_a_model_that_fails_to_compute_is_an_error(made: Callable[[str], Path], ids: str) -> None:
    folder = made("qwen3_moe")  # it chooses 8 of 4 experts
    with pytest.raises(BridgeError, match="transformers cannot compute it from tokens alone: "):
        agreement(folder, folder, ids)


@pytest.mark.usefixtures("here")
def test_a_model_of_images_and_text_is_computed_on_text(tmp_path: Path, ids: str) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
        | vision
        | heads,
        text_config={"model_type": "llama", "num_key_value_heads": 2} | text | heads,
        image_token_index=95,
    )
    torch.manual_seed(0)
    folder = tmp_path / "llava"
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    found = agreement(folder, folder, ids)
    assert found.agrees
    assert found.tokens == 8


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError(),
        RuntimeError("alloc_cpu.cpp: DefaultCPUAllocator: can't allocate memory: 1 TB"),
    ],
)
def test_a_lack_of_memory_is_no_fault_of_the_files(
    error: Exception, qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "from_pretrained", load)
    kind, config, _ = model_class(str(qwen3))
    with pytest.raises(MemoryError):
        transformers_run.load(str(qwen3), kind, config, "cpu", True)
    paths, folder = (str(qwen3), str(qwen3)), str(qwen3.parent)
    request = transformers_run.Request(paths, ((), ()), (True, True), None, "cpu", folder)
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(asdict(request))))
    transformers_run.main()
    assert json.loads((qwen3.parent / "answer.json").read_text())["out_of_memory"] is True


def test_the_first_tensor_of_an_output() -> None:
    value = torch.ones(2)
    assert first_tensor(value) is value
    assert first_tensor((None, torch.ones(2, dtype=torch.int64), [value])) is value
    assert first_tensor({"ids": torch.ones(1, dtype=torch.int64), "hidden": value}) is value
    assert first_tensor(torch.ones(2, dtype=torch.int64)) is None
    assert first_tensor("text") is None


def test_a_repository_without_a_config_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(Refused, match=r"has no config\.json with a model_type"):
        model_class(str(tmp_path))
