"""Verification sees what is wrong with a target, and calls nothing wrong that isn't."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import GPT_NEOX, convert, fixture, make_hf, plan_of, step_of
from safetensors.torch import load_file, save_file

from neox_bridge.api import open_checkpoint
from neox_bridge.verification.diff import diff
from neox_bridge.verification.verify import Verification, verify


def check(source: Path, target: Path) -> Verification:
    return verify(open_checkpoint(str(source)), open_checkpoint(str(target)))


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {"tp": 1},
        {"tp": 4, "layout": "ranks"},
        {"tp": 3, "pp": 2, "inv_freq": "store"},
        {"tp": 3, "row_bias": "split"},
        {"tp": 12, "mlp_names": "dense"},
        {"to": "hf", "shard_size": 20_000},
    ],
)
@pytest.mark.parametrize("residual", [True, False])
def test_conversions_hold(
    residual: bool, options: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    hf = make_hf(tmp_path / "hf", use_parallel_residual=residual)
    convert(hf, tmp_path / "out", dtype=dtype, **options)
    found = check(hf, tmp_path / "out")
    assert found.holds, found
    assert found.tensors == len(load_file(hf / "model.safetensors"))


@pytest.mark.parametrize("name", GPT_NEOX)
@pytest.mark.parametrize("to", ["hf", "neox"])
def test_fixtures_hold(to: str, name: str, tmp_path: Path) -> None:
    convert(fixture(name), tmp_path / "out", to=to)
    assert check(fixture(name), tmp_path / "out").holds


def edit_pt(pattern: str, key: str, change: Callable[[torch.Tensor], None]) -> Any:
    def edit(root: Path) -> None:
        for path in step_of(root).glob(pattern):
            tensors = torch.load(path, weights_only=False)
            change(tensors[key])
            torch.save(tensors, path)

    return edit


def flip(tensor: torch.Tensor) -> None:
    tensor.view(-1).view(torch.uint8)[5] ^= 1


@pytest.mark.parametrize(
    ("pattern", "key", "kind"),
    [
        ("layer_03-model_01*", "mlp.linear1.weight", "values"),
        ("layer_03-model_00*", "attention.dense.weight", "values"),
        ("layer_03-model_00*", "attention.dense.bias", "values"),
        ("layer_02-model_01*", "input_layernorm.bias", "values"),
        ("layer_00-model_01*", "word_embeddings.weight", "values"),
        ("layer_06-model_00*", "final_linear.weight", "values"),
    ],
)
def test_one_flipped_bit_is_found(pattern: str, key: str, kind: str, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    convert(hf, tmp_path / "neox", tp=2)
    edit_pt(pattern, key, flip)(tmp_path / "neox")
    found = check(hf, tmp_path / "neox")
    assert [d.kind for d in found.differences] == [kind]
    assert found.differences[0].differing == 1


def test_ranks_that_differ_are_found_though_their_mean_is_right(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    name = "gpt_neox.layers.0.input_layernorm.bias"
    tensors = load_file(hf / "model.safetensors")
    tensors[name][1] = 1.0
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    convert(hf, tmp_path / "neox", tp=2)
    for rank, value in enumerate((1.5, 0.5)):
        edit_pt(
            f"layer_02-model_0{rank}*", "input_layernorm.bias", lambda t, v=value: t[1].fill_(v)
        )(tmp_path / "neox")
    (difference,) = check(hf, tmp_path / "neox").differences
    assert (difference.name, difference.kind) == (name, "replicas")


def test_padding_that_is_not_zero_is_found(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    convert(hf, tmp_path / "neox", tp=2, vocab_multiple=128)
    edit_pt("layer_00-model_01*", "word_embeddings.weight", lambda t: t[-1].fill_(1.0))(
        tmp_path / "neox"
    )
    (difference,) = check(hf, tmp_path / "neox").differences
    assert "padding" in difference.detail


def test_a_bias_counted_twice_is_found(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    convert(hf, tmp_path / "neox", tp=2)
    first = torch.load(step_of(tmp_path / "neox") / "layer_02-model_00-model_states.pt")
    whole = first["mlp.linear2.bias"].clone()
    edit_pt("layer_02-model_01*", "mlp.linear2.bias", lambda t: t.copy_(whole))(tmp_path / "neox")
    (difference,) = check(hf, tmp_path / "neox").differences
    assert difference.name == "gpt_neox.layers.0.mlp.dense_4h_to_h.bias"
    assert difference.relative == 1.0


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("rotary_pct", 0.25, "rotary_pct"),
        ("use_parallel_residual", False, "parallel_residual"),
        ("hidden_act", "gelu_fast", "activation"),
        ("layer_norm_eps", 1e-6, "norm_eps"),
        ("rotary_emb_base", 20000, "rotary_base"),
    ],
)
def test_a_config_of_another_meaning_is_found(
    key: str, value: Any, field: str, tmp_path: Path
) -> None:
    hf = make_hf(tmp_path / "hf")
    convert(hf, tmp_path / "neox")
    convert(tmp_path / "neox", tmp_path / "back")
    path = tmp_path / "back" / "config.json"
    config = json.loads(path.read_text())
    config[key] = value
    spelled = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
    if key in spelled:
        config["rope_parameters"][spelled[key]] = value
    path.write_text(json.dumps(config))
    found = check(tmp_path / "neox", tmp_path / "back")
    assert not found.holds
    assert [f.message.split(":")[0] for f in found.findings] == [field]


def test_a_yml_of_another_meaning_is_found(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    convert(hf, tmp_path / "neox")
    path = step_of(tmp_path / "neox") / "configs" / "neox_bridge.yml"
    text = re.sub("rotary_pct: .*", "rotary_pct: 1.0", path.read_text())
    path.write_text(text)
    assert [f.code for f in check(hf, tmp_path / "neox").findings] == ["config-differs"]


def test_another_model_differs(tmp_path: Path) -> None:
    one = make_hf(tmp_path / "one", seed=1)
    two = make_hf(tmp_path / "two", seed=2)
    assert len(check(one, two).differences) == len(load_file(one / "model.safetensors"))
    other = make_hf(tmp_path / "three", num_hidden_layers=1)
    kinds = {d.kind for d in check(one, other).differences}
    assert "only-first" in kinds


def test_a_tensor_that_changed_shape(tmp_path: Path) -> None:
    one = make_hf(tmp_path / "one")
    two = make_hf(tmp_path / "two", intermediate_size=96)
    kinds = {d.name: d.kind for d in check(one, two).differences}
    assert kinds["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"] == "shape"


def test_statistics(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    tensors = load_file(hf / "model.safetensors")
    changed = {k: v.clone() for k, v in tensors.items()}
    name = "gpt_neox.layers.0.input_layernorm.weight"
    changed[name][3] += 0.5
    changed[name][5] -= 0.25
    convert(hf, tmp_path / "two", to="hf")
    save_file(changed, tmp_path / "two" / "model.safetensors", {"format": "pt"})
    (found,) = check(hf, tmp_path / "two").differences
    assert (found.name, found.differing, found.elements) == (name, 2, 48)
    assert found.largest == pytest.approx(0.5, rel=1e-6)
    assert found.mean == pytest.approx(0.75 / 48, rel=1e-6)
    assert found.relative == pytest.approx(0.5 / float(tensors[name].abs().max()), rel=1e-6)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "neox_bridge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_convert_keeps_a_bad_result_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that loses a bit: exit 3, the target untouched, the folder kept to look at."""
    from neox_bridge.errors import Unverified
    from neox_bridge.execution import disk
    from neox_bridge.execution.execute import execute
    from neox_bridge.verification.verify import checker

    hf = make_hf(tmp_path / "hf")
    real = disk.flush_folders

    def spoil(folder: str) -> None:
        real(folder)
        path = next(Path(folder).glob("global_step0/layer_02*"))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(disk, "flush_folders", spoil)
    target = tmp_path / "neox"
    target.mkdir()
    (target / "README.md").write_text("precious")
    checkpoint = open_checkpoint(str(hf))
    plan = plan_of(hf, target)
    for number in ("", "-2"):
        with pytest.raises(Unverified, match=r"layers\.0") as caught:
            execute(plan, str(target), overwrite=True, check=checker(checkpoint))
        assert caught.value.exit_code == 3
        aside = tmp_path / f"neox.unverified{number}"
        assert str(aside) in str(caught.value)
        assert (aside / "latest").exists()
    assert [p.name for p in target.iterdir()] == ["README.md"]
    assert not list(tmp_path.glob(".*"))


def test_the_command(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    other = make_hf(tmp_path / "other", seed=3)
    convert(hf, tmp_path / "neox", tp=2)
    done = run("verify", hf, tmp_path / "neox")
    assert (done.returncode, "equal, bit by bit" in done.stdout) == (0, True)
    done = run("verify", other, tmp_path / "neox", "--json")
    assert done.returncode == 3
    told = json.loads(done.stdout)
    assert told["holds"] is False
    assert len(told["differences"]) == 28
    assert run("verify", hf, tmp_path / "nowhere").returncode == 1


def test_diff(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    convert(hf, tmp_path / "neox", tp=3)
    convert(hf, tmp_path / "half", to="hf", dtype="bfloat16")
    done = run("diff", hf, tmp_path / "neox")
    assert (done.returncode, done.stdout.strip()) == (0, "28 tensors: 28 equal, 0 different")
    done = run("diff", hf, tmp_path / "half", "--tensor", "*layernorm.bias")
    assert done.returncode == 3
    assert done.stdout.splitlines()[-1] == "4 tensors: 0 equal, 4 different"
    assert "float32 and bfloat16" in done.stdout
    done = run("diff", hf, tmp_path / "half")
    assert done.stdout.splitlines() == [
        "28 tensors: float32 and bfloat16, equal after casting the first",
        "28 tensors: 0 equal, 28 different",
    ]
    *lines, _ = run("diff", hf, tmp_path / "half", "--all").stdout.splitlines()
    assert len(lines) == 28
    name = "gpt_neox.layers.0.attention.dense.bias"
    assert f"{name}: float32 and bfloat16, equal after casting the first" in lines
    tensors = json.loads(run("diff", hf, tmp_path / "half", "--json").stdout)["tensors"]
    assert {tensor["kind"] for tensor in tensors} == {"dtype"}
    assert len(tensors) == 28
    assert run("diff", hf, tmp_path / "half", "--all", "--stat").returncode == 2
    back = run("diff", tmp_path / "half", hf).stdout.splitlines()
    assert back[0].startswith("28 tensors: bfloat16 and float32, values differ by 0.0")
    assert len(back) == 2
    edit_pt("layer_03-model_00*", "mlp.linear1.bias", flip)(tmp_path / "neox")
    done = run("diff", hf, tmp_path / "neox", "--stat")
    assert (done.returncode, done.stdout.strip()) == (3, "28 tensors: 27 equal, 1 different")


def test_diff_sorts_by_how_much(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    tensors = load_file(hf / "model.safetensors")
    changed = {k: v.clone() for k, v in tensors.items()}
    small, large = "gpt_neox.layers.0.attention.dense.bias", "embed_out.weight"
    changed[small][0] += 1e-4
    changed[large][0, 0] += 5
    convert(hf, tmp_path / "two", to="hf")
    save_file(changed, tmp_path / "two" / "model.safetensors", {"format": "pt"})
    found = diff(open_checkpoint(str(hf)), open_checkpoint(str(tmp_path / "two")))
    assert [d.name for d in found if d.kind != "equal"] == [large, small]
