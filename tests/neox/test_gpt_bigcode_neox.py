"""GPTBigCode in the real GPT-NeoX: learned positions and one head of k and v, on one rank."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_neox
import torch
import yaml
from common import convert, hf_logits, make_hf
from neox_mixes import BASE, add_noise

from neox_bridge.api import open_checkpoint

pytestmark = pytest.mark.neox
TOLERANCE = 1e-5
HEADS = {"n_embd": 64, "n_head": 4}
CASES: list[dict[str, Any]] = [
    HEADS,
    {**HEADS, "activation_function": "gelu", "tie_word_embeddings": False},
    {**HEADS, "multi_query": False},
]
# what GPT-NeoX trains from
GENUINE: list[dict[str, Any]] = [
    {"bias_gelu_fusion": True, "no_weight_tying": False},
    {"activation": "relu", "layernorm_epsilon": 1e-4},
]
MULTI_QUERY = {
    "num_attention_heads": 4,
    "num_kv_heads": 1,
    "pos_emb": "learned",
    "gpt_j_residual": False,
}


def start(folder: Path, pp: int, settings: dict[str, Any]) -> Path:
    """The yml of a run from random weights."""
    folder.mkdir()
    words = real_neox.with_tokenizer(folder) / "tokenizer.json"
    layout = {"pipe_parallel_size": pp, "model_parallel_size": 1, "vocab_file": str(words)}
    path = folder / "start.yml"
    path.write_text(yaml.safe_dump({**BASE, **MULTI_QUERY, **layout, **settings}))
    return path


@pytest.mark.parametrize("tree", real_neox.ALL_TREES)
def test_loads_and_comes_back(tree: str, neox_python: str, tmp_path: Path) -> None:
    real_neox.tree_of(tree)
    folder = real_neox.ALL_TREES[tree]
    jobs: list[dict[str, Any]] = []
    sources: list[tuple[Path, Path]] = []
    for number, config in enumerate(CASES):
        hf = make_hf(tmp_path / f"hf{number}", family="gpt_bigcode", **config)
        real_neox.with_tokenizer(hf)
        for pp in (0, 1):
            target = tmp_path / f"neox{number}-{pp}"
            convert(hf, target, pp=pp, era=real_neox.era(tree))
            logits = tmp_path / f"{number}-{pp}.npz"
            jobs.append({"yml": str(target / "finetune.yml"), "logits": str(logits)})
            sources.append((hf, logits))
    runs: dict[Path, Path] = {}
    for number, settings in enumerate(GENUINE):
        run = tmp_path / f"run{number}"
        runs[run] = start(run, number % 2, settings)
        jobs.append({"yml": str(runs[run]), "save": str(run / "run")})
    assert real_neox.run(neox_python, folder, 1, jobs, tmp_path) == [None] * len(jobs)
    for hf, logits in sources:
        assert real_neox.agree(logits, hf) <= TOLERANCE
    jobs = []
    for run, yml in runs.items():
        add_noise(run / "run" / "global_step1", parallel=False)
        changes = {"load": str(run / "run"), "finetune": True}
        jobs.append({"yml": str(yml), "set": changes, "logits": str(run / "logits.npz")})
    assert real_neox.run(neox_python, folder, 1, jobs, tmp_path) == [None] * len(jobs)
    # names that trees of 2024-10 and later share do not tell the order of grouped queries
    order = {"gqa_order": "interleaved"} if tree == "2024-10" else {}
    for run in runs:
        convert(run / "run", run / "hf", **order)
        assert open_checkpoint(str(run / "hf")).architecture.name == "gpt_bigcode"
        with np.load(run / "logits.npz") as file:
            tokens, want = torch.from_numpy(file["tokens"]), torch.from_numpy(file["logits"])
        computed = hf_logits(run / "hf", tokens)
        assert float((computed - want[..., : computed.shape[-1]]).abs().max()) <= TOLERANCE
