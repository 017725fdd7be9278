"""Reward models load strictly in the real GPT-NeoX, which computes the same scores."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_neox
import torch
from common import convert
from scorers import make_scorer, scores

pytestmark = pytest.mark.neox
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gpt_neox", {}),
    ("llama", {"num_key_value_heads": 2}),
    ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
]


@pytest.mark.parametrize("tp", [1, 2])
def test_loads(tp: int, neox_python: str, tmp_path: Path) -> None:
    jobs, sources = [], []
    for number, (family, config) in enumerate(CASES):
        # its tokens are 0 to 290, so that none is taken for padding
        hf = make_scorer(tmp_path / f"hf{number}", family, **{"pad_token_id": 299, **config})
        sources.append(real_neox.with_tokenizer(hf))
        for layout in ("ranks", "layers"):
            target = tmp_path / f"neox{number}-{layout}"
            convert(hf, target, tp=tp, layout=layout)
            jobs.append(
                {
                    "yml": str(target / "finetune.yml"),
                    "logits": str(tmp_path / f"{number}-{layout}.npz"),
                }
            )
    found = real_neox.run(neox_python, "gpt-neox", tp, jobs, tmp_path)
    assert found == [None] * len(jobs)
    for job, hf in zip(jobs, [hf for hf in sources for _ in range(2)], strict=True):
        with np.load(job["logits"]) as file:
            tokens, rewards = torch.from_numpy(file["tokens"]), torch.from_numpy(file["logits"])
        # every rank has the whole reward, and run_cpu.py puts them side by side
        assert float((scores(hf, tokens) - rewards[..., :1]).abs().max()) <= 1e-5
