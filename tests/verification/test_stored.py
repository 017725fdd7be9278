"""Hugging Face repositories of any family are compared by name, shape, dtype and bits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_families
import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import neox_bridge
from neox_bridge.cli.app import app
from neox_bridge.errors import Refused
from neox_bridge.layouts.stored_model import StoredModel
from neox_bridge.verification.config_differences import config_findings, is_harmless
from neox_bridge.verification.diff import Diff
from neox_bridge.verification.differences_figure import differences_figure
from neox_bridge.verification.verify import Verification

Config = dict[str, Any]


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


def verified(first: Path, second: Path) -> Verification:
    return neox_bridge.verify(str(first), str(second))


def compared(first: Path, second: Path) -> Diff:
    return neox_bridge.diff(str(first), str(second))


def apart(diff: Diff) -> dict[str, tuple[str, str]]:
    return {one.name: (one.kind, one.detail) for one in diff.tensors if one.kind != "equal"}


def edit_config(folder: Path, change: Callable[[Config], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def copy_of(folder: Path, name: str = "copy") -> Path:
    return Path(shutil.copytree(folder, folder.parent / name))


def write(folder: Path, tensors: dict[str, torch.Tensor], config: Config | None = None) -> Path:
    """A repository of these tensors, of no known family."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "yarrow"}))
    return folder


def write_raw(folder: Path, dtype: str, shape: list[int], data: bytes) -> Path:
    """A repository with a tensor of a dtype that torch may not know."""
    folder.mkdir()
    header = {"scales": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "config.json").write_text('{"model_type": "yarrow"}')
    return folder


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_families.make("qwen3", tmp_path_factory.mktemp("qwen3") / "model")


def flip(tensors: dict[str, torch.Tensor], name: str) -> None:
    bits = tensors[name].view(torch.int32).clone()
    bits.view(-1)[-1] ^= 1
    tensors[name] = bits.view(torch.float32)


@pytest.mark.parametrize("family", hf_families.FAMILIES)
def test_one_changed_bit_of_any_family_is_seen(family: str, tmp_path: Path) -> None:
    first = hf_families.make(family, tmp_path / "first")
    second = hf_families.make(family, tmp_path / "second", max_shard_size="20KB")
    assert len(list(second.glob("*.safetensors"))) > 1
    same = verified(first, second)
    assert same.holds, same.findings
    assert same.verdict == "equal, bit by bit"
    assert same.read_by == "names"
    assert compared(first, second).equal
    name = sorted(load_file(first / "model.safetensors"))[-1]
    hf_families.changed(first, lambda tensors: flip(tensors, name))
    found = verified(first, second)
    assert not found.holds
    assert [(d.name, d.kind, d.differing) for d in found.differences] == [(name, "values", 1)]
    assert list(apart(compared(first, second))) == [name]


def test_the_command_says_how_the_tensors_were_read(qwen3: Path, tmp_path: Path) -> None:
    other = copy_of(qwen3, tmp_path.name)
    code, text = run("verify", qwen3, other)
    assert code == 0, text
    assert text.startswith("read by names, shapes and dtypes as stored, not by a family\n")
    assert text.endswith("equal, bit by bit\n")
    assert json.loads(run("verify", qwen3, other, "--json")[1])["read_by"] == "names"
    code, text = run("diff", qwen3, other, "--stat")
    assert (code, text.splitlines()[0]) == (
        0,
        "read by names, shapes and dtypes as stored, not by a family",
    )
    assert json.loads(run("diff", qwen3, other, "--json")[1])["read_by"] == "names"


def test_a_known_family_is_read_by_its_family(tmp_path: Path) -> None:
    tiny.write_hf(tmp_path / "model")
    path = str(tmp_path / "model")
    assert neox_bridge.diff(path, path).to_json()["read_by"] == "family"
    assert neox_bridge.verify(path, path).to_json()["read_by"] == "family"


def test_a_model_of_a_known_family_is_compared_by_names_with_another(
    qwen3: Path, tmp_path: Path
) -> None:
    tiny.write_hf(tmp_path / "model")
    result = compared(tmp_path / "model", qwen3)
    assert result.read_by == "names"
    assert {one.kind for one in result.tensors} == {"only-first", "only-second"}
    checkpoint = neox_bridge.open_checkpoint(str(tmp_path / "model"))
    assert neox_bridge.diff(checkpoint, str(qwen3)).tensors == result.tensors
    assert neox_bridge.diff(checkpoint, str(qwen3)).first == result.first


def test_gpt_neox_and_a_model_of_no_known_family_are_refused(qwen3: Path, tmp_path: Path) -> None:
    tiny.write_hf(tmp_path / "hf")
    neox = tmp_path / "neox"
    neox_bridge.convert(str(tmp_path / "hf"), str(neox))
    for command in ("diff", "verify"):
        for pair in ((neox, qwen3), (qwen3, neox)):
            code, text = run(command, *pair)
            assert code == 4, text
            assert f"{neox}" in text
            assert "qwen3" in text
    with pytest.raises(Refused) as refused:
        compared(neox, qwen3)
    advice = str(refused.value).partition("convert the GPT-NeoX checkpoint first: ")[2]
    convert, diff = advice.split(", then ")
    assert run(*convert.split()[1:])[0] == 0
    assert run(*diff.split()[1:])[0] == 3  # they are other models


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--optimizer"], "--optimizer"),
        (["--gqa-order", "grouped"], "--gqa-order"),
        (["--config", "run.yml"], "--config"),
    ],
)
def test_options_of_gpt_neox_do_not_apply(qwen3: Path, words: list[str], option: str) -> None:
    for command in ("diff", "verify"):
        code, text = run(command, qwen3, qwen3, *words)
        assert code == 2, text
        assert option in text


def test_a_cast_is_named_and_its_overflows_are_counted(tmp_path: Path) -> None:
    weights = torch.tensor([1.0, 1e30, -2.0])
    first = write(tmp_path / "first", {"a": weights, "b": torch.ones(2)})
    second = write(tmp_path / "second", {"a": weights.half(), "b": torch.ones(2).half()})
    result = verified(first, second)
    assert result.holds
    assert result.verdict == "equal after casting float32 to float16"
    assert result.overflows == {"a": 1}
    assert [finding.code for finding in result.findings] == ["cast-overflow"]
    assert apart(compared(first, second)) == {
        "a": ("dtype", "float32 and float16"),
        "b": ("dtype", "float32 and float16"),
    }
    other = write(tmp_path / "other", {"a": weights.half(), "b": torch.full((2,), 3.0).half()})
    assert not verified(first, other).holds
    assert apart(compared(first, other))["b"] == ("values", "float32 and float16")
    assert "values differ by 2 at most" in run("diff", first, other)[1]


def test_integers_are_not_cast(tmp_path: Path) -> None:
    first = write(tmp_path / "first", {"qweight": torch.ones(4, dtype=torch.int8)})
    second = write(tmp_path / "second", {"qweight": torch.ones(4)})
    detail = "int8 and float32: only floating-point numbers can be cast"
    assert apart(compared(first, second)) == {"qweight": ("values", detail)}
    assert not verified(first, second).holds
    assert f"qweight: {detail}\n" in run("diff", first, second)[1]


def test_shapes_and_names_differ(tmp_path: Path) -> None:
    first = write(tmp_path / "first", {"a": torch.ones(2, 3), "b": torch.ones(1)})
    second = write(tmp_path / "second", {"a": torch.ones(3, 2), "c": torch.ones(1)})
    assert apart(compared(first, second)) == {
        "a": ("shape", "[2, 3] and [3, 2]"),
        "b": ("only-first", "only-first, [1]"),
        "c": ("only-second", "only-second, [1]"),
    }
    assert {d.name for d in verified(first, second).differences} == {"a", "b", "c"}


def test_many_names_of_one_side_share_lines(tmp_path: Path) -> None:
    first = write(tmp_path / "first", {f"h.{i}.w": torch.ones(2) for i in range(6)})
    second = write(tmp_path / "second", {"b": torch.ones(1)})
    third = write(tmp_path / "third", {"h.0.w": torch.ones(2)})
    text = run("diff", first, second)[1]
    assert "h.#.w: 6 tensors only in the first\n" in text
    assert "b is only in the second\n" in text
    assert "h.5.w" not in text
    assert text.endswith("7 tensors: 0 equal, 7 different\n")
    assert "h.5.w is only in the first\n" in run("diff", first, second, "--all")[1]
    assert "h.5.w is only in the first\n" in run("diff", first, third)[1]


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3"])
def test_tensors_that_cannot_be_decoded_are_compared_as_bytes(dtype: str, tmp_path: Path) -> None:
    elements = {"F4": 16, "F6_E2M3": 16}[dtype]
    data = bytes(range(elements * (4 if dtype == "F4" else 6) // 8))
    first = write_raw(tmp_path / "first", dtype, [4, 4], data)
    same = write_raw(tmp_path / "same", dtype, [4, 4], data)
    other = write_raw(tmp_path / "other", dtype, [4, 4], b"\xff\xff" + data[2:])
    shaped = write_raw(tmp_path / "shaped", dtype, [2, 8], data)
    assert verified(first, same).holds
    detail = f"2 of {len(data)} bytes differ ({dtype}, whose values are not decoded)"
    assert apart(compared(first, other)) == {"scales": ("bytes", detail)}
    assert not verified(first, other).holds
    assert f"scales: {detail}\n" in run("verify", first, other)[1]
    assert f"scales: {detail}\n" in run("diff", first, other)[1]
    assert apart(compared(first, shaped)) == {"scales": ("shape", "[4, 4] and [2, 8]")}
    floats = write(tmp_path / "floats", {"scales": torch.ones(4, 4)})
    detail = f"{dtype} and float32: only floating-point numbers can be cast"
    assert apart(compared(first, floats)) == {"scales": ("values", detail)}


def test_quantized_weights_and_scales_are_compared_as_stored(tmp_path: Path) -> None:
    weights = torch.randn(8, 8).to(torch.float8_e4m3fn)
    scales = torch.randint(0, 255, (8,), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    config = {
        "model_type": "yarrow",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]},
    }
    tensors = {"a.weight": weights, "a.weight_scale_inv": scales, "b.qweight": torch.arange(8)}
    first = write(tmp_path / "first", tensors, config)
    second = copy_of(first)
    assert verified(first, second).holds
    raw = weights.view(torch.uint8).clone()
    raw[0, 0] ^= 1
    tensors["a.weight"] = raw.view(torch.float8_e4m3fn)
    save_file(tensors, second / "model.safetensors")
    assert list(apart(compared(first, second))) == ["a.weight"]
    edit_config(second, lambda c: c["quantization_config"].update(weight_block_size=[4, 4]))
    messages = [finding.message for finding in verified(first, second).findings]
    assert messages == [
        "quantization_config.weight_block_size: the source has [8, 8], the target [4, 4]"
    ]


def adapter(folder: Path, scale: float = 1.0, rank: int = 2) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    name = "base_model.model.layers.0.q_proj.lora_A.weight"
    save_file({name: torch.full((rank, 4), scale)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank}))
    return folder


def test_adapters_are_compared(tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "first"), adapter(tmp_path / "second")
    assert verified(first, second).holds
    adapter(second, 2.0)
    assert not verified(first, second).holds
    third = adapter(tmp_path / "third", 1.0, 3)
    messages = [finding.message for finding in verified(first, third).findings]
    assert messages == ["r: the source has 2, the target 3"]


def test_components_are_compared_under_their_folders(qwen3: Path, tmp_path: Path) -> None:
    first = Path(shutil.copytree(qwen3, tmp_path / "first"))
    second = Path(shutil.copytree(qwen3, tmp_path / "second"))
    adapter(first / "lora")
    adapter(second / "lora", 2.0)
    (second / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    name = "lora/base_model.model.layers.0.q_proj.lora_A.weight"
    result = verified(first, second)
    assert [difference.name for difference in result.differences] == [name]
    assert [f.message for f in result.findings] == ["lora: r: the source has 2, the target 4"]
    assert list(apart(compared(first, second))) == [name]
    assert apart(compared(first, qwen3)) == {name: ("only-first", "only-first, [2, 4]")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.update(rms_norm_eps=0.5),
            "rms_norm_eps: the source has 1e-06, the target 0.5",
        ),
        (
            lambda c: c.pop("tie_word_embeddings"),
            "tie_word_embeddings: the source has False, and the key is missing in the target, so "
            "the default of the model's class counts there",
        ),
        (
            lambda c: c.update(layer_scale=2.0),
            "layer_scale: the target has 2.0, and the key is missing in the source, so the "
            "default of the model's class counts there",
        ),
        (
            lambda c: c.update(attention_bias=0),
            "attention_bias: the source has False, the target 0",
        ),
        (
            lambda c: c["rope_parameters"].update(rope_theta=5.0),
            "rope_parameters.rope_theta: the source has 10000.0, the target 5.0",
        ),
    ],
)
def test_a_key_that_changes_the_model_is_an_error(
    change: Callable[[Config], object], message: str, qwen3: Path, tmp_path: Path
) -> None:
    edit_config(qwen3, lambda config: config.update(tie_word_embeddings=False))
    other = Path(shutil.copytree(qwen3, tmp_path / "other"))
    edit_config(other, change)
    result = verified(qwen3, other)
    assert not result.differences
    assert not result.holds
    assert [(f.severity, f.message) for f in result.findings] == [("error", message)]
    code, text = run("verify", qwen3, other)
    assert code == 3
    assert f"error: {message}" in text


def test_keys_that_do_not_change_the_model_are_no_difference(qwen3: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(qwen3, tmp_path / "other"))
    edit_config(
        other,
        lambda config: config.update(
            _name_or_path="elsewhere",
            transformers_version="4.0.0",
            torch_dtype="bfloat16",
            dtype="float16",
            use_cache=False,
            attention_dropout=0.5,
            initializer_range=3.0,
        ),
    )
    assert verified(qwen3, other).holds
    assert not is_harmless("num_hidden_layers")
    assert not is_harmless("rope_theta")
    assert not is_harmless("eos_token_id")


def model(config: Config) -> StoredModel:
    from neox_bridge.layouts.stored_model import Component

    component = Component("", "folder", ("folder/model.safetensors",), {}, config=config)
    return StoredModel("folder", (component,), config, "")


YARN = {"rope_type": "yarn", "factor": 4.0}


def test_a_config_whose_spellings_of_rope_contradict_is_another_one() -> None:
    both = model({"rope_theta": 6.0, "rope_parameters": {"rope_theta": 5.0}})
    (finding,) = config_findings(both, model({"rope_parameters": {"rope_theta": 5.0}}))
    assert finding.message.startswith("rope_theta: the source has 6.0, and the key is missing")
    agreeing = model({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 5.0}})
    assert not config_findings(agreeing, model({"rope_parameters": {"rope_theta": 5.0}}))


def test_rope_of_a_part_of_the_model_is_spelled_alike() -> None:
    old = model({"text_config": {"rope_theta": 5.0, "rope_scaling": {"type": "yarn"}}})
    new = model({"text_config": {"rope_parameters": {"rope_theta": 5.0, "rope_type": "yarn"}}})
    other = model({"text_config": {"rope_parameters": {"rope_theta": 6.0, "rope_type": "yarn"}}})
    assert not config_findings(old, new)
    (finding,) = config_findings(old, other)
    assert finding.message.startswith("text_config.rope_parameters.rope_theta: the source has 5")


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ({"rope_theta": 5.0}, {"rope_type": "default", "rope_theta": 5}, True),
        ({"rope_theta": 5.0, "rope_scaling": None}, {"rope_theta": 5.0}, True),
        ({"rope_theta": 5.0, "rope_scaling": YARN}, {**YARN, "rope_theta": 5.0}, True),
        (
            {"rope_theta": 5.0, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            {**YARN, "rope_theta": 5.0},
            True,
        ),
        ({"rope_theta": 6.0}, {"rope_type": "default", "rope_theta": 5.0}, False),
        ({"rope_theta": 5.0, "rope_scaling": YARN}, {"rope_theta": 5.0}, False),
        ({"rope_theta": 5.0}, {**YARN, "rope_theta": 5.0}, False),
    ],
)
def test_both_spellings_of_rope_are_one(old: Config, new: Config, same: bool) -> None:
    merged = {"rope_parameters": new}
    assert (not config_findings(model(old), model(merged))) is same
    assert (not config_findings(model(merged), model(old))) is same


def test_a_folder_without_a_record_cannot_be_verified_alone(qwen3: Path) -> None:
    code, text = run("verify", qwen3)
    assert code == 1
    assert "has no neox_bridge.json" in text
    assert "converted or copied from: verify SRC DST" in text
    assert run("verify", qwen3, qwen3)[0] == 0


def test_a_pattern_chooses_tensors(qwen3: Path) -> None:
    result = neox_bridge.diff(str(qwen3), str(qwen3), pattern="*q_norm*")
    assert [one.name for one in result.tensors] == [
        f"model.layers.{layer}.self_attn.q_norm.weight" for layer in (0, 1)
    ]


def test_progress_counts_the_bytes_of_the_target(qwen3: Path) -> None:
    seen: list[Any] = []
    neox_bridge.verify(str(qwen3), str(qwen3), progress=seen.append)
    assert seen[-1].done == seen[-1].total > 0
    seen.clear()
    neox_bridge.diff(str(qwen3), str(qwen3), progress=seen.append)
    assert seen[-1].done == seen[-1].total > 0


def test_values_that_cannot_be_compared_have_no_colour_of_equal_ones(tmp_path: Path) -> None:
    first = write(tmp_path / "first", {"layers.0.a": torch.ones(4, dtype=torch.int8)})
    second = write(tmp_path / "second", {"layers.0.a": torch.ones(4)})
    figure = differences_figure(compared(first, second).tensors)
    (cell,) = figure.axes[0].patches
    assert cell.get_facecolor() == (1, 1, 1, 1)
    assert cell.get_hatch()
