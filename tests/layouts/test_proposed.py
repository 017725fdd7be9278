"""Checkpoints of GPT-NeoX trees with a pull request that is not merged.

They are converted where the proposal changes nothing, and refused by its number otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_edits import set_keys
from commands import run
from common import convert, hf_tensors, make_hf, plan_of, same_bits, step_of
from stand_in_trees import write_tree

from neox_bridge import BridgeError, Refused
from neox_bridge.api import open_checkpoint


@pytest.fixture
def neox(tmp_path: Path) -> Path:
    """A Llama of two ranks: hidden 64, four heads, two of them for keys."""
    hf = make_hf(tmp_path / "hf", family="llama", num_key_value_heads=2)
    convert(hf, tmp_path / "neox", tp=2)
    return tmp_path / "neox"


def edit_tensors(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of each block of each rank."""
    for layer in ("02", "03"):
        for path in step_of(root).glob(f"layer_{layer}-*.pt"):
            tensors = torch.load(path, weights_only=False)
            change(tensors)
            torch.save(tensors, path)


@pytest.mark.parametrize(
    ("key", "value", "pull"),
    [
        ("head_dim", 16, "#1436"),
        ("norm_placement", "pre_norm", "#1408"),
        ("qk_layernorm_over_heads", False, "#1424"),
    ],
)
def test_what_changes_nothing_is_converted(
    key: str, value: object, pull: str, neox: Path, tmp_path: Path
) -> None:
    set_keys(step_of(neox), **{key: value})
    plan = convert(neox, tmp_path / "back")
    (finding,) = [f for f in plan.findings if f.code == "unmerged-format"]
    assert f"{key}: {value!r}" in finding.message
    assert f"{pull} proposes" in finding.message
    assert finding.severity == "warning"
    written, original = hf_tensors(tmp_path / "back"), hf_tensors(tmp_path / "hf")
    assert all(same_bits(written[name], original[name]) for name in original)


@pytest.mark.parametrize(
    ("key", "value", "pull"),
    [("head_dim", 32, "#1436"), ("norm_placement", "post_norm_inside_residual", "#1408")],
)
def test_what_changes_the_model_is_refused(
    key: str, value: object, pull: str, neox: Path, tmp_path: Path
) -> None:
    set_keys(step_of(neox), **{key: value})
    with pytest.raises(Refused, match=f"which {pull} proposes and no merged GPT-NeoX knows"):
        plan_of(neox, tmp_path / "back")
    shown = run("inspect", neox).stdout
    assert f"{key}: {value!r}, which {pull} proposes" in shown


def wide_heads(tensors: dict[str, Any]) -> None:
    """Heads of 32 in place of 16: twice the rows of q, k and v."""
    qkv, dense = "attention.query_key_value.weight", "attention.dense.weight"
    tensors[qkv] = torch.cat([tensors[qkv], tensors[qkv]])
    tensors[dense] = torch.cat([tensors[dense], tensors[dense]], 1)


def test_tensors_of_wider_heads_name_the_proposal(neox: Path) -> None:
    set_keys(step_of(neox), head_dim=32)
    edit_tensors(neox, wide_heads)
    with pytest.raises(Refused, match="was written by a GPT-NeoX with #1436, which is proposed"):
        open_checkpoint(str(neox))
    done = run("inspect", neox)
    assert done.exit_code == 4
    assert "head_dim: 32" in done.stderr
    assert "https://github.com/EleutherAI/gpt-neox/pull/1436" in done.stderr


@pytest.mark.parametrize("name", ["q_norm", "q_layernorm", "query_layernorm"])
def test_norms_of_q_and_k_name_the_proposal(name: str, neox: Path) -> None:
    def with_norms(tensors: dict[str, Any]) -> None:
        for each in (name, name.replace("q", "k", 1).replace("kuery", "key")):
            tensors[f"attention.{each}.scale"] = torch.ones(16)

    edit_tensors(neox, with_norms)
    set_keys(step_of(neox), use_qk_layernorm=True)
    for command in (["inspect"], ["doctor"], ["convert", "--dry-run"]):
        target = [neox.parent / "back"] if "convert" in command else []
        done = run(*command, neox, *target)
        assert done.exit_code == 4, done.stderr
        assert "was written by a GPT-NeoX with #1424, which is proposed and not merged" in (
            done.stderr
        )
        assert "layer 2: attention.k" in done.stderr


def test_a_damaged_checkpoint_is_no_proposal(neox: Path) -> None:
    """The key changes nothing, so the tensors are wrong for another reason."""
    set_keys(step_of(neox), head_dim=16)
    edit_tensors(neox, wide_heads)
    with pytest.raises(BridgeError, match=r"are 32 wide, but hidden_size .* is 16") as caught:
        open_checkpoint(str(neox))
    assert "#1436" not in str(caught.value)


def test_a_tree_is_read_by_what_it_does(neox: Path, tmp_path: Path) -> None:
    """A branch with the key takes it; today's tree does not, and the pull request is named."""
    set_keys(step_of(neox), head_dim=16)
    today = write_tree("today", tmp_path / "today")
    branch = write_tree("today", tmp_path / "branch")
    arguments = branch / "megatron" / "neox_arguments" / "neox_args.py"
    text = arguments.read_text()
    arguments.write_text(
        text.replace("    hidden_size:", "    head_dim: int = None\n    hidden_size:")
    )
    assert run("doctor", neox, "--for", f"neox:{branch}").exit_code == 0
    done = run("doctor", neox, "--for", f"neox:{today}")
    assert done.exit_code == 4
    assert "unexpected keyword argument 'head_dim'" in done.stdout
    assert "https://github.com/EleutherAI/gpt-neox/pull/1436" in done.stdout


def test_an_error_message_names_the_proposal(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("TypeError: NeoXArgs.__init__() got an unexpected keyword argument 'head_dim'\n")
    assert "neox-head-dim" in json.dumps(json.loads(run("doctor", "--error", log, "--json").stdout))
    log.write_text('Unexpected key(s) in state_dict: "sequential.2.attention.q_norm.scale". \n')
    told = run("doctor", "--error", log, "--json").stdout
    assert "neox-separate-qk-norms" in told
    assert "It is not merged" in told
