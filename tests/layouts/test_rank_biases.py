"""Biases that sequence_parallel let drift apart between ranks: no single model has both.

tests/neox/test_rank_biases_neox.py trains such a run in the real GPT-NeoX.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference_logits
import torch
from checkpoint_edits import edit_yml, set_keys
from click.testing import CliRunner
from common import (
    convert,
    fixture,
    hf_logits,
    hf_tensors,
    make_hf,
    neox_config,
    neox_ranks,
    step_of,
)
from resharding import DATA, reshard

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.findings import Finding
from neox_bridge.layouts.rank_biases import drifted_biases
from neox_bridge.verification.logits import compare_logits
from neox_bridge.verification.tokens import read_tokens
from neox_bridge.verification.verify import verify

CODE = "rank-biases-differ"
DRIFT = 0.25  # of each rank from the mean of two


def drifted(
    source: Path, target: Path, names: tuple[str, ...] = ("attention.dense.bias",), **yml: Any
) -> Path:
    """A copy whose rank 1 has other values of these tensors in its first block."""
    shutil.copytree(source, target)
    edit(target, lambda tensors: [tensors[name].add_(_slope(tensors[name])) for name in names])
    if yml:
        set_keys(step_of(target), **yml)
    return target


def _slope(tensor: torch.Tensor) -> torch.Tensor:
    """No constant: a norm would take it out again."""
    return torch.linspace(-2 * DRIFT, 2 * DRIFT, len(tensor), dtype=tensor.dtype)


def edit(root: Path, change: Callable[[dict[str, torch.Tensor]], object], rank: int = 1) -> None:
    path = step_of(root) / f"layer_02-model_0{rank}-model_states.pt"
    tensors = torch.load(path, weights_only=False)
    change(tensors)
    torch.save(tensors, path)


def told(findings: Any) -> list[Finding]:
    return [finding for finding in findings if finding.code == CODE]


def test_the_cause_the_tensor_and_by_how_much(tmp_path: Path) -> None:
    names = ("attention.dense.bias", "mlp.linear2.bias")
    source = fixture("sequential_residual_fp32_tp2")
    run = drifted(source, tmp_path / "run", names, sequence_parallel=True)
    done = CliRunner().invoke(app, ["convert", str(run), str(tmp_path / "hf"), "--to", "hf"])
    assert done.exit_code == 0
    assert done.stderr.count("differ") == 1  # once, and not as another finding again
    for words in ("sequence_parallel: true", "no single model", "0.25", "2 biases", ".bias)"):
        assert words in done.stderr
    mean = torch.stack([rank["2.attention.dense.bias"] for rank in neox_ranks(run)]).mean(dim=0)
    written = hf_tensors(tmp_path / "hf")["gpt_neox.layers.0.attention.dense.bias"]
    assert torch.allclose(written, mean)


def test_without_sequence_parallel_no_other_cause_is_named(tmp_path: Path) -> None:
    run = drifted(fixture("sequential_residual_fp32_tp2"), tmp_path / "run")
    plan = convert(run, tmp_path / "hf")
    (finding,) = told(plan.findings)
    assert "no single model" in finding.message
    assert "sequence_parallel" not in finding.message
    found = drifted_biases(open_checkpoint(str(run)))
    assert found is not None
    assert (found.count, round(found.largest, 5), found.sequence_parallel) == (1, DRIFT, False)
    assert found.name == "gpt_neox.layers.0.attention.dense.bias"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("sequential_residual_fp32_tp2", ""),  # nothing differs
        ("pythia_fp32_pp1_tp2", "attention.dense.bias"),  # the ranks' sum is the model's bias
    ],
)
def test_no_word_where_it_is_exact(name: str, tensor: str, tmp_path: Path) -> None:
    run = drifted(
        fixture(name), tmp_path / "run", (tensor,) if tensor else (), sequence_parallel=True
    )
    assert told(convert(run, tmp_path / "hf").findings) == []
    assert drifted_biases(open_checkpoint(str(run))) is None


def test_a_model_without_biases_is_exact(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="llama")
    convert(hf, tmp_path / "neox", tp=2)
    set_keys(step_of(tmp_path / "neox"), sequence_parallel=True)
    assert told(convert(tmp_path / "neox", tmp_path / "back").findings) == []


def test_a_llama_with_biases(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", family="llama", attention_bias=True, mlp_bias=True)
    convert(hf, tmp_path / "neox", tp=2)
    run = drifted(tmp_path / "neox", tmp_path / "run", ("mlp.linear2.bias",))
    (finding,) = told(convert(run, tmp_path / "back").findings)
    assert "model.layers.0.mlp.down_proj.bias" in finding.message


@pytest.mark.parametrize("layout", ["layers", "ranks"])
def test_as_many_ranks_keep_their_own(layout: str, tmp_path: Path) -> None:
    """The same checkpoint rank by rank is exact, and verified to be."""
    run = drifted(fixture("sequential_residual_fp32_tp2"), tmp_path / "run", sequence_parallel=True)
    done = CliRunner().invoke(
        app, ["convert", str(run), str(tmp_path / "new"), "--to", "neox", "--layout", layout]
    )
    assert done.exit_code == 0
    assert "no single model" not in done.stderr
    for a, b in zip(neox_ranks(run), neox_ranks(tmp_path / "new"), strict=True):
        assert torch.equal(a["2.attention.dense.bias"], b["2.attention.dense.bias"])


def test_ranks_of_the_same_mean_are_not_the_same(tmp_path: Path) -> None:
    run = drifted(fixture("sequential_residual_fp32_tp2"), tmp_path / "run")
    other = shutil.copytree(run, tmp_path / "other")
    first, second = (rank["2.attention.dense.bias"] for rank in neox_ranks(run))
    edit(other, lambda tensors: tensors["attention.dense.bias"].copy_(first))
    edit(other, lambda tensors: tensors["attention.dense.bias"].copy_(second), rank=0)
    found = verify(open_checkpoint(str(run)), open_checkpoint(str(other)))
    assert [difference.kind for difference in found.differences] == ["replicas"]


def test_norms_that_differ_keep_their_own(tmp_path: Path) -> None:
    run = drifted(
        fixture("sequential_residual_fp32_tp2"), tmp_path / "run", ("input_layernorm.weight",)
    )
    done = CliRunner().invoke(app, ["convert", str(run), str(tmp_path / "new"), "--to", "neox"])
    assert done.exit_code == 0


def test_another_number_of_ranks_says_it(tmp_path: Path) -> None:
    run = drifted(fixture("sequential_residual_fp32_tp2"), tmp_path / "run", sequence_parallel=True)
    assert len(told(convert(run, tmp_path / "one", to="neox", tp=1).findings)) == 1
    assert neox_config(tmp_path / "one")["sequence_parallel"] is True


def test_reshard_says_it(tmp_path: Path) -> None:
    source = DATA / "bf16_tp2"
    run = drifted(source, tmp_path / "run")
    edit_yml(gpt_j_residual=False, sequence_parallel=True)(step_of(run))
    plan, _ = reshard(run, tmp_path / "new", tp=1)
    assert len(told(plan.findings)) == 1
    plan, _ = reshard(run, tmp_path / "same", pp=2)
    assert told(plan.findings) == []


def test_every_view_says_it(tmp_path: Path) -> None:
    run = drifted(fixture("sequential_residual_fp32_tp2"), tmp_path / "run", sequence_parallel=True)
    convert(run, tmp_path / "hf")
    for arguments in (
        ["inspect", str(run)],
        ["doctor", str(run), "--for", "today"],
        ["verify", str(run), str(tmp_path / "hf")],
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0
        assert "no single model" in done.output + done.stderr


@pytest.mark.parametrize("parallel", [True, False])
def test_the_logits_are_another_model_s(parallel: bool, tmp_path: Path) -> None:
    run = drifted(
        fixture("sequential_residual_fp32_tp2"), tmp_path / "run", sequence_parallel=parallel
    )
    convert(run, tmp_path / "hf")
    first, second = open_checkpoint(str(run)), open_checkpoint(str(tmp_path / "hf"))
    found = compare_logits(first, second, read_tokens(None, (first, second)).tokens)
    assert not found.agrees
    (cause,) = found.causes
    assert "no single model" in cause.text
    assert ("sequence_parallel: true" in cause.text) is parallel


def test_the_reference_adds_each_rank_s_own_to_its_part(tmp_path: Path) -> None:
    """Causal attention: the first half of the sequence sees the first rank's biases alone."""
    run = drifted(fixture("sequential_residual_fp32_tp2"), tmp_path / "run", sequence_parallel=True)
    ranks, config = neox_ranks(run), neox_config(run)
    tokens = torch.arange(20)[None]
    computed = reference_logits.forward(ranks, config, tokens)
    alone = reference_logits.forward(
        [ranks[0], {**ranks[1], **_row_biases(ranks[0])}], config, tokens
    )
    assert torch.equal(computed[:, :10], alone[:, :10])
    assert not torch.equal(computed[:, 10:], alone[:, 10:])
    convert(fixture("sequential_residual_fp32_tp2"), tmp_path / "hf")
    logits = hf_logits(tmp_path / "hf", tokens)
    assert float((alone[..., : logits.shape[-1]] - logits).abs().max()) <= 1e-5


def _row_biases(rank: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ends = ("attention.dense.bias", "mlp.linear2.bias")
    return {name: tensor for name, tensor in rank.items() if name.endswith(ends)}
