"""What a user gets wrong: an error that names the file and the way out, and nothing is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_edits import edit_yml
from common import convert, fixture, make_hf, plan_of, step_of
from safetensors.torch import load_file, save_file

from neox_bridge.api import open_checkpoint
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.optimizer.read_files import read_optimizer


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("source") / "model")


def spoiled_hf(hf: Path, tmp_path: Path, change: Callable[[Path], None]) -> Path:
    copy = tmp_path / "hf"
    shutil.copytree(hf, copy)
    change(copy)
    return copy


def spoiled_neox(name: str, tmp_path: Path, change: Callable[[Path], None]) -> Path:
    copy = tmp_path / "neox"
    shutil.copytree(fixture(name), copy)
    change(step_of(copy))
    return copy


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


def truncate(file: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        path = folder / file
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * 2 // 3])

    return cut


def remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def fails(source: Path, tmp_path: Path, *parts: str, **options: Any) -> BridgeError:
    """Converting fails with a message of these parts, and leaves nothing behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BridgeError) as caught:
        convert(source, tmp_path / "out", **options)
    for part in parts:
        assert part in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    return caught.value


def edit_ranks(
    layer: int, change: Callable[[dict[str, torch.Tensor]], object], ranks: str = "*"
) -> Callable[[Path], None]:
    """Change the tensors of a layer, on all tensor-parallel ranks or on one."""

    def edit(step: Path) -> None:
        for path in step.glob(f"layer_{layer:02d}-model_{ranks}-model_states.pt"):
            tensors = torch.load(path)
            change(tensors)
            torch.save(tensors, path)

    return edit


LAYER = "layer_02-model_01-model_states.pt"
EMBED = "gpt_neox.embed_in.weight"
QKV = "gpt_neox.layers.1.attention.query_key_value.weight"
QKV_BIAS = "gpt_neox.layers.{}.attention.query_key_value.bias"
NEOX_BIAS = "attention.query_key_value.bias"
DENSE = "attention.dense.weight"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (remove("model.safetensors"), ["config.json", "model.safetensors", "Download"]),
        (remove("config.json"), ["neither"]),
        (truncate("model.safetensors"), ["model.safetensors", "truncated"]),
        (truncate("config.json"), ["config.json", "is not valid JSON"]),
        (edit_config(num_hidden_layers=3), ["num_hidden_layers", "3", "2"]),
        (edit_config(num_attention_heads=7), ["num_attention_heads", "7", "48"]),
        (edit_config(num_attention_heads=None), ["num_attention_heads"]),
        (edit_tensors(lambda t: t.pop(EMBED)), [EMBED, "missing"]),
        (edit_tensors(lambda t: t.pop(QKV)), [QKV, "missing"]),
        (edit_tensors(lambda t: t.pop(QKV_BIAS.format(1))), [QKV_BIAS.format(1), "are missing"]),
        (
            edit_tensors(lambda t: t.pop(QKV_BIAS.format(0))),
            [QKV_BIAS.format(1), "do not belong to the model that the others describe"],
        ),
        (
            edit_tensors(lambda t: t.update({QKV_BIAS.format(70000): torch.ones(2)})),
            ["tensors of layer 70000, more layers than"],
        ),
        (edit_tensors(lambda t: t.update(strange=torch.ones(2))), ["strange"]),
        (edit_tensors(lambda t: t.update({QKV: torch.ones(144, 24)})), [QKV, "24", "48"]),
        (edit_tensors(lambda t: t.update({QKV: torch.ones(144)})), [QKV, "dimensions"]),
    ],
)
def test_hugging_face(
    change: Callable[[Path], None], parts: list[str], hf: Path, tmp_path: Path
) -> None:
    error = fails(spoiled_hf(hf, tmp_path, change), tmp_path, *parts)
    assert error.exit_code == 1


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model_type": "bert"}, "bert"),
        ({"model_type": "qwen3"}, "use_qk_layernorm"),
        ({"model_type": "phi"}, "its output layer has biases"),
        ({"hidden_act": "gelu_10"}, "hidden_act"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_theta": 10000.5}}, "rotary_emb_base"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_gpt_neox_has_not_is_refused(
    changes: dict[str, Any], key: str, hf: Path, tmp_path: Path
) -> None:
    error = fails(spoiled_hf(hf, tmp_path, edit_config(**changes)), tmp_path, key)
    assert error.exit_code == 4


@pytest.mark.parametrize(
    ("name", "change", "parts"),
    [
        ("pythia_fp32_pp1_tp2", remove(LAYER), [LAYER, "missing"]),
        ("pythia_fp32_pp1_tp2", truncate(LAYER), [LAYER]),
        ("pythia_fp32_pp0_tp2", remove("mp_rank_01_model_states.pt"), ["mp_rank_01", "missing"]),
        ("pythia_fp32_pp0_tp2", truncate("mp_rank_01_model_states.pt"), ["mp_rank_01"]),
        ("pythia_fp32_pp1_tp2", edit_yml(num_layers=3), ["num_layers"]),
        ("pythia_fp32_pp1_tp2", lambda s: shutil.rmtree(s / "configs"), ["configs", "`configs="]),
        ("pythia_fp32_pp1_tp2", lambda s: (s.parent / "latest").write_text("global_step9"),
         ["global_step9", "global_step2", "`step="]),
        ("pythia_fp32_pp1_tp2", lambda s: (s / "configs/base.yml").write_text("a: [1"),
         ["base.yml", "line"]),
        ("pythia_fp32_pp1_tp2",
         lambda s: shutil.copy(s / "layer_02-model_00-model_states.pt",
                               s / "layer_00-model_00-model_states.pt"),
         ["layer 0"]),
        ("pythia_fp32_pp1_tp2", edit_ranks(2, lambda t: t.pop(DENSE), "01"),
         [f"layer 2 of rank 1 is missing {DENSE}"]),
        ("pythia_fp32_pp1_tp2", edit_ranks(2, lambda t: t.update({DENSE: t[DENSE].half()}), "01"),
         [f"{DENSE} of layer 2 is float16 [32, 16] on rank 1 and float32 [32, 16] on rank 0"]),
        ("pythia_fp32_pp1_tp2", edit_ranks(2, lambda t: t.pop(DENSE)),
         [f"tensors are missing: layer 2: {DENSE}. Copy"]),
        ("pythia_fp32_pp1_tp2", edit_ranks(3, lambda t: t.pop(NEOX_BIAS)),
         [f"tensors are missing: layer 3: {NEOX_BIAS}. Copy"]),
        ("pythia_fp32_pp1_tp2", edit_ranks(2, lambda t: t.pop(NEOX_BIAS)),
         ["do not belong to the model that the others describe", f"layer 3: {NEOX_BIAS}. The"]),
    ],
)  # fmt: skip
def test_gpt_neox(
    name: str, change: Callable[[Path], None], parts: list[str], tmp_path: Path
) -> None:
    error = fails(spoiled_neox(name, tmp_path, change), tmp_path, *parts)
    assert error.exit_code == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"pos_emb": "alibi"},
        {"pos_emb": "learned"},
        {"moe_num_experts": 4},
        {"soft_prompt_tuning": {"enabled": True, "num_tokens": 4}},
        {"use_bias_in_mlp": False},
        {"norm": "scalenorm"},
        {"activation": "softsign"},
        {"attention_config": [[["local"], 2]]},
        {"use_qk_layernorm": True},
    ],
)
def test_what_transformers_has_not_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    source = spoiled_neox("pythia_fp32_pp1_tp2", tmp_path, edit_yml(**changes))
    error = fails(source, tmp_path, next(iter(changes)))
    assert error.exit_code == 4


def test_learned_positions_are_refused_by_name(tmp_path: Path) -> None:
    """In transformers they come with sequential blocks only."""

    def learn(step: Path) -> None:
        edit_yml(pos_emb="learned")(step)
        for path in step.glob("layer_00-*"):
            tensors = torch.load(path)
            tensors["position_embeddings.weight"] = torch.zeros(32, 32)
            torch.save(tensors, path)

    source = spoiled_neox("pythia_fp32_pp1_tp2", tmp_path, learn)
    assert fails(source, tmp_path, "pos_emb").exit_code == 4


def test_zero_3_beside_another_stage_is_refused(tmp_path: Path) -> None:
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt"
    source = spoiled_neox("pythia_fp32_pp1_tp2", tmp_path, lambda s: (s / name).touch())
    assert fails(source, tmp_path, name, "layer_00-model_00-model_states.pt").exit_code == 4


@pytest.mark.parametrize("tp", [5, 7, 16])
def test_tp_that_does_not_divide(tp: int, hf: Path, tmp_path: Path) -> None:
    error = fails(hf, tmp_path, f"`tp={tp}`", "heads", "2, 3, 4, 6, 12", tp=tp)
    assert isinstance(error, Refused)


def test_tp_that_does_not_divide_the_mlp(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", intermediate_size=190)
    assert isinstance(fails(hf, tmp_path, "`tp=4`", "MLP", tp=4), Refused)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"pp": 3}, "`pp=3`"),
        ({"layout": "ranks", "pp": 2}, "layout, pp"),
        ({"layout": "layers", "pp": 0}, "layout, pp"),
        ({"vocab_rows": "tokenizer"}, "`tokenizer="),
        ({"to": "hf", "tp": 2}, "tp: only for GPT-NeoX targets"),
        ({"tokenizer": "/nowhere"}, "`tokenizer=/nowhere`"),
    ],
)
def test_options_that_do_not_go_together(
    options: dict[str, Any], part: str, hf: Path, tmp_path: Path
) -> None:
    fails(hf, tmp_path, part, **options)


def test_a_vocabulary_multiple_that_leaves_rows_out(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    tokens = {f"t{i}": i for i in range(250)}
    (hf / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}}))
    error = fails(hf, tmp_path, "`vocab_multiple=128`", "300", vocab_multiple=128)
    assert isinstance(error, Refused)
    plan = plan_of(hf, tmp_path / "out")
    assert (plan.target["vocab_rows"], plan.target["vocab_multiple"]) == (300, 300)
    plan = plan_of(hf, tmp_path / "out", vocab_rows="tokenizer")
    assert (plan.target["vocab_rows"], plan.target["vocab_multiple"]) == (250, 250)
    assert [d.name for d in plan.dropped] == ["vocabulary rows 250 to 299"]


def test_target_exists(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    fails(hf, tmp_path, "out", "`overwrite=True`")
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_a_folder_that_is_neither(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", tmp_path, "neither")
    fails(tmp_path / "absent", tmp_path, "no such folder")


def test_a_yml_key_in_two_files_is_reported(tmp_path: Path) -> None:
    source = spoiled_neox(
        "pythia_fp32_pp1_tp2",
        tmp_path,
        lambda s: (s / "configs/zz.yml").write_text("num-layers: 2"),
    )
    plan = plan_of(source, tmp_path / "out")
    (finding,) = [f for f in plan.findings if f.code == "yml-key-twice"]
    assert "num_layers" in finding.message


def test_a_stored_inv_freq_of_another_base_is_reported(tmp_path: Path) -> None:
    source = spoiled_neox("pythia_fp32_2024_03_inv_freq", tmp_path, edit_yml(rotary_pct=0.5))
    codes = [f.code for f in plan_of(source, tmp_path / "o").findings]
    assert codes == ["inv-freq-differs", "tokenizer-missing"]


def test_replicas_that_differ_are_reported_with_the_deviation(tmp_path: Path) -> None:
    from common import hf_tensors

    from neox_bridge.execution.execute import execute

    def spoil(step: Path) -> None:
        path = step / "layer_05-model_01-model_states.pt"
        tensors = torch.load(path)
        tensors["norm.weight"][3] += 0.25
        torch.save(tensors, path)

    source = spoiled_neox("pythia_fp32_pp1_tp2", tmp_path, spoil)
    result = execute(plan_of(source, tmp_path / "out"), str(tmp_path / "out"))
    (finding,) = result.findings
    assert "0.125" in finding.message
    before = torch.load(step_of(source) / "layer_05-model_00-model_states.pt")["norm.weight"]
    got = hf_tensors(tmp_path / "out")["gpt_neox.final_layer_norm.weight"]
    assert got[3] == before[3] + 0.125
    assert torch.equal(got[:3], before[:3])


def test_a_setting_of_a_yml_that_is_no_number_names_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(fixture("pythia_fp32_pp1_tp2"), root)
    (step,) = root.glob("global_step*")
    for path in (step / "configs").glob("*.yml"):
        settings = {k: v for k, v in yaml.safe_load(path.read_text()).items() if "rotary" not in k}
        path.write_text(yaml.safe_dump(settings))
    (step / "configs" / "zz.yml").write_text("rotary_pct: null\n")
    with pytest.raises(BridgeError) as caught:
        open_checkpoint(str(root))
    assert str(caught.value).startswith(f"{step}: rotary_pct: 'None' is not a number.")


@pytest.mark.parametrize("groups", [None, [], [{}, {}, {}]])
def test_an_optimizer_of_stage_0_with_groups_that_gpt_neox_does_not_make(
    groups: Any, tmp_path: Path
) -> None:
    source = Path(__file__).parents[1] / "data" / "reshard" / "fp16_stage0"
    root = Path(shutil.copytree(source, tmp_path / "run"))
    path = next(root.glob("global_step*/mp_rank_00*"))
    value = torch.load(path, weights_only=False)
    value["optimizer"]["optimizer_state_dict"]["param_groups"] = groups
    torch.save(value, path)
    with pytest.raises(BridgeError, match=r"mp_rank_00_model_states.pt: .*param_groups"):
        read_optimizer(open_checkpoint(str(root)))
