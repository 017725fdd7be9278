"""Reward and preference runs that start from Hugging Face models and export their steps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_neox
import torch
from checkpoint_edits import tokenizer
from common import hf_logits, make_hf
from inside_neox import run, wait_for, yml_of
from scorers import make_scorer, scores

from neox_bridge import verify
from neox_bridge.training.exports import JOURNAL

pytestmark = pytest.mark.neox

TREES = ["2024-10", "today"]  # the earlier ones train language models only


def exporting(hf: Path, tree: str, folder: Path, **keys: Any) -> dict[str, Any]:
    """A job without steps, which saves the model as step 1, exports it and computes its logits."""
    yml = yml_of(hf, tree, 1, 0, folder / "neox", **keys)
    outputs = {"save": str(folder / "run"), "save_hf": str(folder / "exported")}
    return {"yml": str(yml), "set": outputs, "save": outputs["save"]}


def read(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    with np.load(path) as file:
        return torch.from_numpy(file["tokens"]), torch.from_numpy(file["logits"])


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@pytest.mark.parametrize("tree", TREES)
def test_a_reward_model_starts_and_is_exported(
    tree: str, family: str, neox_python: str, inside: None, tmp_path: Path
) -> None:
    real_neox.tree_of(tree)
    epsilon = {"rms_norm_eps": 1e-12} if family == "llama" else {}
    hf = make_scorer(tmp_path / "hf", family, pad_token_id=299, **epsilon)
    tokenizer(hf / "tokenizer.json")
    job = {**exporting(hf, tree, tmp_path), "logits": str(tmp_path / "rewards.npz")}
    other = {"yml": job["yml"], "set": {"train_impl": "dpo"}}
    results = real_neox.results(neox_python, real_neox.ALL_TREES[tree], 1, [job, other], tmp_path)
    assert results[0]["error"] is None
    assert "is a reward model, but the yml says train_impl: dpo" in results[1]["error"]
    tokens, rewards = read(tmp_path / "rewards.npz")
    assert float((scores(hf, tokens) - rewards).abs().max()) < 1e-5
    wait_for(tmp_path / "exported" / JOURNAL, "done 1")
    exported = tmp_path / "exported" / "step1"
    assert verify(str(hf), str(exported)).holds
    assert float((scores(exported, tokens) - scores(hf, tokens)).abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("tree", "train_impl"),
    [("2024-10", "dpo"), ("today", "dpo"), ("today", "kto"), ("today", "reinforce")],
)
def test_a_preference_run_keeps_its_reference_model(
    tree: str, train_impl: str, neox_python: str, inside: None, tmp_path: Path
) -> None:
    """It resumes with weights of its own; the reference model still is the one of ``load``."""
    real_neox.tree_of(tree)
    hf = make_hf(tmp_path / "hf", torch.float32)
    tokenizer(hf / "tokenizer.json")
    first = exporting(hf, tree, tmp_path, train_iters=100, lr_decay_iters=100)
    trained = {**first, "losses": 2}  # as a language model, whose loss needs no pairs
    preference = {"yml": first["yml"], "set": {**first["set"], "train_impl": train_impl}}
    names = ("policy", "reference", "resumed", "kept")
    policy, reference, resumed, kept = (str(tmp_path / f"{name}.npz") for name in names)
    start = {"yml": first["yml"], "set": {"train_impl": train_impl}}
    jobs: list[dict[str, Any]] = [
        {**start, "logits": policy, "reference": reference},
        trained,
        {**preference, "logits": resumed, "reference": kept},
    ]
    run(neox_python, tree, 1, jobs, tmp_path)
    for path in (policy, reference, kept):
        tokens, logits = read(Path(path))
        assert float((hf_logits(hf, tokens) - logits[..., :300]).abs().max()) < 1e-5, path
    tokens, logits = read(Path(resumed))
    assert float((hf_logits(hf, tokens) - logits[..., :300]).abs().max()) > 1e-3
    wait_for(tmp_path / "exported" / JOURNAL, "done 2")
    exported = tmp_path / "exported" / "step2"
    assert float((hf_logits(exported, tokens) - logits[..., :300]).abs().max()) < 1e-5
