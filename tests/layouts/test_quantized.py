"""Quantized models are recognized by settings and by names, and weights of odd dtypes are cast."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from common import convert, fixture, hf_tensors, make_hf, plan_of, same_bits, step_of
from safetensors.torch import load_file, save_file

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.errors import Refused
from neox_bridge.layouts.quantized import QuantizedModel

Tensors = dict[str, torch.Tensor]
INT8 = torch.zeros(4, 4, dtype=torch.int8)
U32 = torch.zeros(4, 4, dtype=torch.uint32)
SCALE = torch.ones(4)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("source") / "model")


def run(*words: object) -> Any:
    return CliRunner().invoke(app, list(map(str, words)))


def changed(
    hf: Path, folder: Path, change: Callable[[str, torch.Tensor], Tensors], **config: Any
) -> Path:
    """A copy whose matrices in blocks are changed."""
    folder.mkdir()
    raw = json.loads((hf / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **config}))
    tensors: Tensors = {}
    for name, tensor in load_file(hf / "model.safetensors").items():
        matrix = tensor.dim() == 2 and ".layers." in name
        tensors |= change(name, tensor) if matrix else {name: tensor}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def beside(replace: bool, **more: torch.Tensor) -> Callable[[str, torch.Tensor], Tensors]:
    """Tensors beside the weight, or in its place; ``__`` stands for a dot."""

    def change(name: str, tensor: torch.Tensor) -> Tensors:
        base = name.removesuffix(".weight")
        extra = {base + key.replace("__", "."): value.clone() for key, value in more.items()}
        return extra if replace else {name: tensor.to(torch.int8), **extra}

    return change


FORMS: dict[str, tuple[Callable[[str, torch.Tensor], Tensors], str]] = {
    "gptq": (beside(True, __qweight=INT8.int(), __scales=SCALE, __g_idx=INT8.int()), "GPTQ"),
    "awq": (beside(True, __qweight=INT8.int(), __qzeros=INT8.int(), __scales=SCALE), "AWQ"),
    "bnb4": (beside(False, __weight__absmax=SCALE, __weight__quant_map=SCALE), "bitsandbytes 4"),
    "bnb8": (beside(False, __SCB=SCALE), "bitsandbytes 8"),
    "fp8": (
        lambda k, v: {k: v.to(torch.float8_e4m3fn), f"{k}_scale_inv": SCALE.clone()},
        "fp8",
    ),
    "w8a8": (beside(False, __weight_scale=SCALE), "scaled weights"),
    "compressed": (beside(True, __weight_packed=INT8.int(), __weight_shape=INT8), "compressed"),
    "hqq": (beside(True, __W_q=INT8, __scale=SCALE), "HQQ"),
    "aqlm": (beside(True, __codes=INT8, __codebooks=SCALE), "AQLM"),
    "eetq": (beside(False, __weight_scales=SCALE), "EETQ"),
    "quanto": (beside(True, __weight___data=INT8, __weight___scale=SCALE), "quanto"),
    "torchao": (beside(True, ___weight_qdata=INT8, ___weight_scale=SCALE), "torchao"),
    "quip": (beside(True, __Qidxs=INT8, __SU=SCALE), "QuIP#"),
    "spqr": (beside(True, __dense_weights=INT8, __col_vals=INT8), "SpQR"),
    "vptq": (beside(True, __indices=INT8, __centroids__weight=SCALE), "VPTQ"),
    "nvfp4": (beside(False, __weight_scale=SCALE, __weight_scale_2=SCALE), "NVFP4"),
    "exl2": (beside(True, __q_weight=INT8.int(), __q_invperm=INT8), "ExLlamaV2"),
    "mlx": (beside(True, __weight=U32, __scales=SCALE, __biases=SCALE), "MLX"),
}


@pytest.mark.parametrize("form", FORMS)
def test_quantized_models_are_recognized_by_their_tensors(
    form: str, hf: Path, tmp_path: Path
) -> None:
    change, method = FORMS[form]
    source = changed(hf, tmp_path / "q", change)
    with pytest.raises(QuantizedModel, match="convert the original, unquantized model") as caught:
        plan_of(source, tmp_path / "out")
    assert caught.value.exit_code == 4
    assert caught.value.model is not None
    assert caught.value.model.quantization.method.startswith(method)
    assert "remove them" not in str(caught.value)


def test_every_command_says_so_and_inspect_goes_on(hf: Path, tmp_path: Path) -> None:
    settings = {"quant_method": "gptq", "bits": 4}
    source = changed(hf, tmp_path / "q", FORMS["gptq"][0], quantization_config=settings)
    for command in (
        ("convert", source, tmp_path / "out", "--to", "neox"),
        ("convert", source, tmp_path / "out", "--to", "hf", "--dtype", "float32"),
        ("reshard", source, tmp_path / "out"),
    ):
        done = run(*command)
        assert done.exit_code == 4
        assert "is quantized (GPTQ, 4 bits: config.json: quantization_config" in done.stderr
    assert not (tmp_path / "out").exists()
    done = run("inspect", source)
    assert done.exit_code == 0
    assert "Hugging Face, quantized (GPTQ, 4 bits)" in done.stdout
    assert "cannot be converted" in done.stdout
    done = run("doctor", source)
    assert done.exit_code == 0
    assert "is quantized (GPTQ, 4 bits: config.json: quantization_config" in done.stdout
    facts = json.loads(run("inspect", source, "--json", "--tensors").stdout)
    assert facts["quantization"]["method"] == "GPTQ"
    assert facts["refusals"][0]["key"] == "quantized"
    assert any(row["name"].endswith("g_idx") for row in facts["tensors"])
    assert json.loads(run("inspect", hf, "--json").stdout)["quantization"] is None
    assert run("inspect", source, "--stats").exit_code == 0


@pytest.mark.parametrize(
    ("name", "value", "bits"),
    [
        ("quantize_config.json", {"bits": 3, "quant_method": "gptq"}, 3),
        ("quant_config.json", {"w_bit": 4}, 4),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, None),
    ],
)
def test_settings_in_files_of_their_own(
    name: str, value: dict[str, Any], bits: int | None, hf: Path, tmp_path: Path
) -> None:
    source = changed(hf, tmp_path / "q", beside(False))
    (source / name).write_text(json.dumps(value))
    with pytest.raises(QuantizedModel, match=name) as caught:
        open_checkpoint(str(source))
    assert caught.value.model is not None
    assert caught.value.model.quantization.bits == bits


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_settings_in_config_json(key: str, hf: Path, tmp_path: Path) -> None:
    source = changed(hf, tmp_path / "q", beside(False), **{key: {"bits": 8}})
    with pytest.raises(QuantizedModel, match=f"config.json: {key}"):
        open_checkpoint(str(source))


def test_the_original_is_named(hf: Path, tmp_path: Path) -> None:
    source = changed(hf, tmp_path / "q", FORMS["awq"][0], _name_or_path="EleutherAI/pythia-70m")
    with pytest.raises(QuantizedModel, match="unquantized model, EleutherAI/pythia-70m"):
        open_checkpoint(str(source))
    (source / "README.md").write_text("---\nbase_model: org/original\n---\n# Quantized\n")
    with pytest.raises(QuantizedModel, match="unquantized model, org/original"):
        open_checkpoint(str(source))


def test_settings_beside_plain_weights_are_refused_by_their_key(hf: Path, tmp_path: Path) -> None:
    source = changed(
        hf, tmp_path / "q", lambda k, v: {k: v}, quantization_config={"load_in_4bit": True}
    )
    with pytest.raises(Refused, match="quantization_config"):
        plan_of(source, tmp_path / "out")
    assert run("inspect", source).exit_code == 0


def test_gpt_neox_files(tmp_path: Path) -> None:
    source = tmp_path / "neox"
    import shutil

    shutil.copytree(fixture("pythia_fp32_pp1_tp2"), source)
    for path in step_of(source).glob("layer_03-*"):
        tensors = torch.load(path)
        for name in [n for n in tensors if n.endswith("dense.weight")]:
            tensors[f"{name}_scale_inv"] = torch.ones(1)
        torch.save(tensors, path)
    with pytest.raises(QuantizedModel, match="unquantized"):
        open_checkpoint(str(source))
    for words in (["inspect", source], ["diff", source, source], ["verify", source, source]):
        done = run(*words, "--optimizer")
        assert done.exit_code == 2
        reason = f"the weights of {step_of(source)} are quantized, so its optimizer states cannot"
        assert reason in done.stderr


INTEGERS = [
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.int64,
    torch.bool,
]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_are_no_weights(dtype: torch.dtype, hf: Path, tmp_path: Path) -> None:
    source = changed(hf, tmp_path / "q", lambda k, v: {k: (v * 100).round().to(dtype)})
    for options in ({}, {"dtype": "float32"}, {"to": "hf"}):
        with pytest.raises(Refused, match="convert the original, unquantized model"):
            plan_of(source, tmp_path / "out", **options)
    done = run("doctor", source)
    assert done.exit_code == 4
    assert "as if they were the weights" in done.stdout
    done = run("inspect", source)
    assert done.exit_code == 0
    assert "refused     by every conversion" in done.stdout


CASTS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [*CASTS, torch.float64])
def test_odd_floats_are_cast_on_request_only(
    dtype: torch.dtype, form: str, hf: Path, tmp_path: Path
) -> None:
    source = changed(hf, tmp_path / "q", lambda k, v: {k: (v * 8).to(dtype)})
    stored = load_file(source / "model.safetensors")
    if form == "bin":
        (source / "model.safetensors").unlink()
        torch.save(stored, source / "pytorch_model.bin")
    for to in ("hf", "neox"):
        with pytest.raises(Refused, match="`dtype=bfloat16`"):
            plan_of(source, tmp_path / "out", to=to)
    assert run("doctor", source).exit_code == 0
    for name in ("float32", "float16", "bfloat16"):
        want: Any = getattr(torch, name)
        plan = convert(source, tmp_path / name, to="hf", dtype=name)
        (finding,) = [f for f in plan.findings if f.code == "cast-dtype"]
        how = "rounded" if dtype == torch.float64 else "exactly"
        assert f"to {name}, {how}" in finding.message
        written = hf_tensors(tmp_path / name)
        assert all(same_bits(written[k], v.to(want)) for k, v in stored.items())
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == name
    convert(source, tmp_path / "neox", tp=2, dtype="bfloat16")
    convert(tmp_path / "neox", tmp_path / "back")
    back = hf_tensors(tmp_path / "back")
    assert all(same_bits(back[k], v.to(torch.bfloat16)) for k, v in stored.items())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64, torch.int8])
def test_odd_dtypes_of_gpt_neox_files(dtype: torch.dtype, tmp_path: Path) -> None:
    import shutil

    source = tmp_path / "neox"
    shutil.copytree(fixture("pythia_fp16_pp1_tp1"), source)
    for path in step_of(source).glob("layer_*"):
        torch.save({k: v.to(dtype) for k, v in torch.load(path).items()}, path)
    for command in (
        ("convert", source, tmp_path / "out"),
        ("convert", source, tmp_path / "out", "--to", "neox", "--pp", "2"),
        ("reshard", source, tmp_path / "out", "--dp", "1"),
    ):
        done = run(*command)
        assert done.exit_code == 4, done.stderr
        assert "weights of" in done.stderr
    done = run("convert", source, tmp_path / "out", "--dtype", "float32")
    assert done.exit_code == (4 if dtype == torch.int8 else 0)
    if dtype != torch.int8:
        assert f"{str(dtype).removeprefix('torch.')} to float32" in done.stderr


def test_the_doctors_cast_works_as_advised(hf: Path, tmp_path: Path) -> None:
    import shlex

    source = changed(hf, tmp_path / "q", lambda k, v: {k: v.to(torch.float8_e4m3fn)})
    facts = json.loads(run("doctor", source, "--json").stdout)
    (found,) = [f for f in facts["checkpoints"][0]["findings"] if f["code"] == "weight-dtype"]
    words = shlex.split(found["remedy"])
    assert words[:2] == ["neox-bridge", "convert"]
    assert run(*words[1:]).exit_code == 0
    assert json.loads((tmp_path / "q-bfloat16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_masks_of_old_transformers_are_still_dropped(hf: Path, tmp_path: Path) -> None:
    source = changed(hf, tmp_path / "m", lambda k, v: {k: v})
    tensors = load_file(source / "model.safetensors")
    for block in range(2):
        name = f"gpt_neox.layers.{block}.attention."
        tensors[name + "bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
        tensors[name + "masked_bias"] = torch.tensor(-1e9)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    plan = convert(source, tmp_path / "out")
    assert len(plan.dropped) == 4


def test_floats_of_less_than_a_byte_are_quantized(hf: Path, tmp_path: Path) -> None:
    source = changed(hf, tmp_path / "q", lambda k, v: {k: v})
    raw = (source / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    embeddings = header["gpt_neox.embed_in.weight"]
    embeddings["dtype"] = "F4"
    embeddings["shape"][1] *= 8  # as many bytes
    text = json.dumps(header).encode()
    (source / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + raw[8 + size :]
    )
    with pytest.raises(Refused, match="unquantized"):
        open_checkpoint(str(source))


def test_integers_never_equal_weights(hf: Path, tmp_path: Path) -> None:
    """Cast to integers the source would be these very values."""
    source = changed(hf, tmp_path / "q", lambda k, v: {k: v.to(torch.int8)})
    for command in (("verify", hf, source), ("verify", source, hf), ("diff", hf, source)):
        done = run(*command)
        assert done.exit_code == 3, done.output
        assert "int8" in done.output
    done = run("audit", source)
    assert done.exit_code == 3
    assert "weights of int8" in done.output
