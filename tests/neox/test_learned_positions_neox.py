"""Models with learned positions in the real GPT-NeoX: what is written loads strictly there.

And what GPT-NeoX itself wrote becomes a model of transformers with the same logits.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_neox
import torch
import yaml
from common import convert, hf_logits, make_hf
from neox_mixes import BASE, add_noise

pytestmark = pytest.mark.neox
TOLERANCE = 1e-5
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {}),
    ("gpt2", {"activation_function": "gelu", "tie_word_embeddings": False}),
    ("gpt2", {"activation_function": "relu", "layer_norm_epsilon": 1e-3}),
    ("opt", {}),
]
# what GPT-NeoX trains from: settings of the yml, and the family that they are
LEARNED = {"pos_emb": "learned", "gpt_j_residual": False}
GENUINE: list[tuple[dict[str, Any], str]] = [
    ({"bias_gelu_fusion": True, "no_weight_tying": False}, "gpt2"),
    ({"activation": "relu", "layernorm_epsilon": 1e-4}, "gpt2"),
    ({"use_bias_in_attn_linear": False}, "gpt2"),
]


def start(folder: Path, tp: int, pp: int, settings: dict[str, Any]) -> Path:
    """The yml of a run from random weights."""
    folder.mkdir()
    words = real_neox.with_tokenizer(folder) / "tokenizer.json"
    layout = {"pipe_parallel_size": pp, "model_parallel_size": tp, "vocab_file": str(words)}
    path = folder / "start.yml"
    path.write_text(yaml.safe_dump({**BASE, **LEARNED, **layout, **settings}))
    return path


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("tree", real_neox.ALL_TREES)
def test_loads_and_comes_back(tree: str, tp: int, neox_python: str, tmp_path: Path) -> None:
    real_neox.tree_of(tree)
    jobs: list[dict[str, Any]] = []
    sources: list[tuple[Path, Path]] = []
    for number, (family, config) in enumerate(CASES):
        hf = make_hf(tmp_path / f"hf{number}", family=family, **config)
        real_neox.with_tokenizer(hf)
        for pp in (0, 1):
            target = tmp_path / f"neox{number}-{pp}"
            convert(hf, target, tp=tp, pp=pp, era=real_neox.era(tree))
            logits = tmp_path / f"{number}-{pp}.npz"
            jobs.append({"yml": str(target / "finetune.yml"), "logits": str(logits)})
            sources.append((hf, logits))
    runs = {}
    for number, (settings, family) in enumerate(GENUINE):
        folder = tmp_path / f"run{number}"
        yml = start(folder, tp, number % 2, settings)
        jobs.append({"yml": str(yml), "save": str(folder / "run")})
        runs[folder] = family, yml
    assert real_neox.run(neox_python, real_neox.ALL_TREES[tree], tp, jobs, tmp_path) == [
        None
    ] * len(jobs)
    for hf, logits in sources:
        assert real_neox.agree(logits, hf) <= TOLERANCE
    jobs = []
    for folder, (_, yml) in runs.items():
        add_noise(folder / "run" / "global_step1", parallel=False)
        changes = {"load": str(folder / "run"), "finetune": True}
        jobs.append({"yml": str(yml), "set": changes, "logits": str(folder / "logits.npz")})
    assert real_neox.run(neox_python, real_neox.ALL_TREES[tree], tp, jobs, tmp_path) == [
        None
    ] * len(jobs)
    for folder, (family, _) in runs.items():
        plan = convert(folder / "run", folder / "hf")
        assert plan.target["architecture"] == family
        with np.load(folder / "logits.npz") as file:
            tokens, want = torch.from_numpy(file["tokens"]), torch.from_numpy(file["logits"])
        computed = hf_logits(folder / "hf", tokens)
        assert float((computed - want[..., : computed.shape[-1]]).abs().max()) <= TOLERANCE
