"""Mamba in the real GPT-NeoX, around a stand-in for mamba_ssm, whose kernels want a GPU.

GPT-NeoX's environment needs einops for it, which mamba_ssm would bring.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import real_neox
from common import assert_same, convert, hf_tensors, make_hf

pytestmark = pytest.mark.neox
CASES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False, "use_conv_bias": False},
    {"expand": 3, "hidden_size": 48},
]


def test_loads(neox_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = str(Path(__file__).parent / "stand_in")
    monkeypatch.setenv("PYTHONPATH", stand_in + os.pathsep + os.environ.get("PYTHONPATH", ""))
    if subprocess.run([neox_python, "-c", "import einops"], capture_output=True).returncode:
        pytest.skip("GPT-NeoX's environment has no einops")
    jobs, sources = [], []
    for number, config in enumerate(CASES):
        hf = make_hf(tmp_path / f"hf{number}", family="mamba", **config)
        sources.append(real_neox.with_tokenizer(hf))
        for layout in ("ranks", "layers"):
            target = tmp_path / f"neox{number}-{layout}"
            convert(hf, target, layout=layout)
            jobs.append(
                {
                    "yml": str(target / "finetune.yml"),
                    "logits": str(tmp_path / f"{number}-{layout}.npz"),
                    "training": True,
                    "save": str(tmp_path / f"own{number}-{layout}"),
                }
            )
    found = real_neox.run(neox_python, "gpt-neox", 1, jobs, tmp_path)
    assert found == [None] * len(jobs)
    for job, hf in zip(jobs, [hf for hf in sources for _ in range(2)], strict=True):
        assert real_neox.agree(Path(str(job["logits"])), hf) <= 1e-5
        # what GPT-NeoX itself then saved is the model
        back = Path(str(job["save"]) + "-back")
        convert(Path(str(job["save"])), back)
        own, want = hf_tensors(back), hf_tensors(hf)
        padded = {name for name in want if "embed" in name or "lm_head" in name}
        own |= {name: own[name][: len(want[name])].contiguous() for name in padded}
        assert_same(own, want)
