"""Gated MLPs with biases of GPT-NeoX before 2024-09, which are Llamas where the rest is one."""

from pathlib import Path

import pytest
import torch
import yaml
from common import convert, hf_tensors, plan_of
from neox_parts import HIDDEN, Part, block, cut, model, read, write

from neox_bridge.api import open_checkpoint, verify
from neox_bridge.errors import Refused
from neox_bridge.frameworks.eras import era_named

FFN = 2 * HIDDEN  # int(4 * 2 / 3) of ParallelMLP
SETTINGS = {"norm": "rmsnorm", "activation": "geglu", "rotary_pct": 1}


def _parts() -> list[Part]:
    plain = [p for p in block(0, norm="scale") if not p.name.startswith("mlp.")]
    first, last = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
    gated = [
        *(Part(0, f"{first}.weight", (FFN, HIDDEN), "rows") for _ in ("up", "gate")),
        *(Part(0, f"{first}.bias", (FFN,), "rows") for _ in ("up", "gate")),
        Part(0, f"{last}.weight", (HIDDEN, FFN), "columns"),
        Part(0, f"{last}.bias", (HIDDEN,)),
    ]
    return model([[*plain, *gated]] * 2, norm="scale")


def test_it_is_a_llama_with_biases(tmp_path: Path) -> None:
    source = write(tmp_path / "source", _parts(), 2, SETTINGS)
    convert(source, tmp_path / "hf")
    tensors = hf_tensors(tmp_path / "hf")
    (whole,) = (cut(_parts(), 1, 0)[3],)
    up, gate = whole["mlp.dense_h_to_4h.weight"].chunk(2)
    assert torch.equal(tensors["model.layers.1.mlp.up_proj.weight"], up)
    assert torch.equal(tensors["model.layers.1.mlp.gate_proj.weight"], gate)
    bias = tensors["model.layers.1.mlp.down_proj.bias"]
    assert torch.equal(bias, whole["mlp.dense_4h_to_h.bias"])
    assert verify(open_checkpoint(str(source)), open_checkpoint(str(tmp_path / "hf"))).holds


@pytest.mark.parametrize("era", ["2024-03", "today"])
def test_it_moves_to_trees_of_both_times(era: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source", _parts(), 2, SETTINGS)
    convert(source, tmp_path / "new", to="neox", tp=4, era=era_named(era))
    yml = yaml.safe_load((tmp_path / "new" / "finetune.yml").read_text())
    width = None if era == "2024-03" else 3 * FFN
    assert (yml["activation"], yml.get("intermediate_size")) == ("geglu", width)
    assert "mlp_type" not in yml
    name = "mlp.dense_h_to_4h.weight" if era == "2024-03" else "mlp.linear1.weight"
    for rank, layers in enumerate(read(tmp_path / "new")):
        expected = cut(_parts(), 4, rank)[2]["mlp.dense_h_to_4h.weight"]
        assert torch.equal(layers[2][name], expected)


def test_trees_of_2024_09_have_no_other_gated_mlp_with_biases(tmp_path: Path) -> None:
    source = write(tmp_path / "source", _parts(), 2, SETTINGS)
    convert(source, tmp_path / "hf")
    with pytest.raises(Refused, match="mlp_bias: the MLP of the model has biases"):
        plan_of(tmp_path / "hf", tmp_path / "old", to="neox", era=era_named("2024-03"))
