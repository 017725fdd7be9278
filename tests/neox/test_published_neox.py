"""EleutherAI's published form of a run resumes in the real GPT-NeoX of today and of 2024.

GPT-NeoX v1.0 trained these runs. What is proven after loading: the optimizer in memory holds the
master weights, the moments and the step that v1.0's had, bit for bit; the model computes v1.0's
logits; and training goes on.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_neox
from resharding import reshard

from neox_bridge.frameworks.eras import era_named

pytestmark = pytest.mark.neox
PUBLISHED = Path(__file__).parents[1] / "data" / "published"
VOCABULARY = 250
LOGITS_BOUND = 3e-3  # of float16 on two CPU builds; a wrong rotary table or norm gives 0.1 and more


def truth(name: str) -> dict[str, np.ndarray]:
    """The states that v1.0's optimizer held in memory when it saved."""
    states = "v1_dp2" if name == "v1_dp2_rigid" else name
    with np.load(PUBLISHED / states / "optimizer" / "optimizer_step8_mp00.npz") as file:
        return dict(file)


def logits_file(name: str) -> Path:
    return PUBLISHED / ("v1_dp2" if name == "v1_dp2_rigid" else name) / "logits.npz"


def settings(folder: Path) -> dict[str, Any]:
    """What a CPU needs in the yml, and a tokenizer that is there."""
    words = {f"t{number}": number for number in range(VOCABULARY)}
    words["<|endoftext|>"] = words.pop("t0")
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<|endoftext|>"}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": model}
    tokenizer |= {"normalizer": None, "pre_tokenizer": {"type": "Whitespace"}}
    tokenizer |= {"post_processor": None, "decoder": None, "truncation": None, "padding": None}
    (folder / "words.json").write_text(json.dumps(tokenizer))
    return {
        "vocab_file": str(folder / "words.json"),
        "bias_gelu_fusion": False,
        **dict.fromkeys(("checkpoint_activations", "partition_activations"), False),
        # DeepSpeed's own 0.16.5 fails on it: GPT-NeoX passes no steps_per_print of 10, which is the
        # default of DeeperSpeed and not of DeepSpeed since 0.15.2 (DeepSpeed#6602)
        "wall_clock_breakdown": False,
    }


def together(parts: list[np.ndarray], want: np.ndarray, name: str) -> np.ndarray:
    """The tensor-parallel ranks' parts of a state put together."""
    if parts[0].shape != want.shape:
        axis = next(n for n, size in enumerate(want.shape) if parts[0].shape[n] != size)
        whole = np.concatenate(parts, axis)
        assert not whole[want.shape[0] :].any(), "rows of padding are zeros"
        return whole[: want.shape[0]]
    if len(parts) > 1 and name.endswith(("dense.bias/fp32", "4h_to_h.bias/fp32")):
        return np.sum(parts, 0)  # parallel residual: GPT-NeoX adds the ranks' biases up
    assert all((part == parts[0]).all() for part in parts), name
    return parts[0]


@pytest.mark.parametrize(
    ("name", "tree", "era", "layout"),
    [
        ("v1_dp2", "gpt-neox", "today", {"tp": 1, "pp": 1, "dp": 2}),
        ("v1_dp2", "gpt-neox", "today", {"tp": 1, "pp": 2, "dp": 1, "micro_batch": 4}),
        ("v1_dp4_intervals", "gpt-neox", "today", {"tp": 1, "pp": 0, "dp": 2}),
        ("v1_dp4_intervals", "gpt-neox", "today", {"tp": 3, "pp": 1, "dp": 1, "micro_batch": 8}),
        ("v1_dp2_rigid", "gpt-neox", "today", {"tp": 1, "pp": 1, "dp": 1, "micro_batch": 4}),
        ("v1_dp2", "neox-2024-03", "2024-03", {"tp": 1, "pp": 1, "dp": 2}),
        ("v1_dp4_intervals", "neox-2024-09", "2024-09", {"tp": 1, "pp": 0, "dp": 1}),
        ("v1_dp2_rigid", "neox-2024-10", "2024-10", {"tp": 1, "pp": 2, "dp": 1, "micro_batch": 4}),
    ],
)
def test_it_resumes(
    name: str, tree: str, era: str, layout: dict[str, int], neox_python: str, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    reshard(PUBLISHED / name / "flat", new, era=era_named(era), **layout)
    stages = max(1, layout["pp"])
    job: dict[str, Any] = {
        "yml": str(new / "resume.yml"),
        "set": settings(tmp_path),
        "optimizer": str(tmp_path / "optimizer"),
        "losses": 3,
    }
    if stages == 1:
        job |= {"logits": str(tmp_path / "logits.npz"), "tokens": str(logits_file(name))}
    processes = layout["tp"] * stages * layout["dp"]
    (result,) = real_neox.results(neox_python, tree, processes, [job], tmp_path)
    assert result["error"] is None
    assert len(result["losses"]) == 3
    assert np.isfinite(result["losses"]).all()
    ranks = [dict(np.load(path)) for path in sorted(tmp_path.glob("optimizer-*.npz"))]
    assert len(ranks) == layout["tp"] * stages
    steps = [
        rank.pop(f"{of}_step/{n}") for rank in ranks for of in ("state", "group") for n in (0, 1)
    ]
    assert set(map(float, steps)) == {9.0}
    want = truth(name)
    assert {key for rank in ranks for key in rank} == {era_name(key, era) for key in want}, (
        "every parameter of the model"
    )
    for key, value in want.items():
        parts = [rank[era_name(key, era)] for rank in ranks if era_name(key, era) in rank]
        assert (together(parts, value, key) == value).all(), key
    if stages == 1:
        with np.load(tmp_path / "logits.npz") as mine, np.load(logits_file(name)) as theirs:
            difference = np.abs(mine["logits"][..., :VOCABULARY] - theirs["logits"])
        assert difference.max() < LOGITS_BOUND


def era_name(key: str, era: str) -> str:
    """The name of a state of v1.0's in trees of an era."""
    if era in ("2024-03", "2024-09"):
        return key
    return key.replace("dense_h_to_4h", "linear1").replace("dense_4h_to_h", "linear2")
