"""Converted checkpoints load strictly in the real GPT-NeoX, and it computes the same logits."""

import os
import subprocess
from pathlib import Path

import pytest
import transformers
from common import convert
from loads_table import CELLS, VERSIONS
from real_neox import TREES, agree, era, run

pytestmark = pytest.mark.neox
STORES = {"today": False, "2024-03": True, "2024-09": False}
WORDS = {
    "missing": "Missing key(s) in state_dict: ",
    "unexpected": "Unexpected key(s) in state_dict: ",
}


@pytest.mark.parametrize("pp", [0, 1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("tree", TREES)
def test_loads(tree: str, tp: int, pp: int, hf: Path, neox_python: str, tmp_path: Path) -> None:
    jobs = []
    for inv_freq in ("omit", "store"):
        target = tmp_path / inv_freq
        convert(hf, target, tp=tp, pp=pp, inv_freq=inv_freq, era=era(tree))
        logits = str(tmp_path / f"{inv_freq}.npz") if pp < 2 else None
        drop = ["rotary_save_freqs_buffer"]
        jobs.append({"yml": str(target / "finetune.yml"), "drop": drop, "logits": logits})
    knows = tree != "2024-03"
    if knows:  # the flag as it was written
        jobs.append({"yml": str(tmp_path / "store" / "finetune.yml")})
    errors = run(neox_python, TREES[tree], tp * max(1, pp), jobs, tmp_path)
    VERSIONS[f"GPT-NeoX {tree}"] = version(TREES[tree])
    VERSIONS["with"] = f"{libraries(neox_python)}; transformers {transformers.__version__}"
    loads = "store" if STORES[tree] else "omit"
    for inv_freq, error in zip(("omit", "store"), errors, strict=False):
        if inv_freq == loads:
            assert error is None
            CELLS[tree, tp, pp, inv_freq] = "loads"
        else:
            word = "unexpected" if inv_freq == "store" else "missing"
            assert error is not None
            said = error.split(WORDS[word], 1)[1].split(",")[0]
            assert said.strip().rstrip(". ").endswith('attention.rotary_emb.inv_freq"')
            CELLS[tree, tp, pp, inv_freq] = word
    if knows:
        assert errors[2] is None
    if pp == 2:
        one = tmp_path / "one.yml"
        text = (tmp_path / loads / "finetune.yml").read_text()
        one.write_text(text.replace("pipe_parallel_size: 2", "pipe_parallel_size: 1"))
        job = {"yml": str(one), "logits": str(tmp_path / f"{loads}.npz")}
        folder = tmp_path / "again"
        folder.mkdir()
        (error,) = run(neox_python, TREES[tree], tp, [job], folder)
        assert error is None
    assert agree(tmp_path / f"{loads}.npz", hf) <= 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("tree", TREES)
def test_half_precision_trains(
    tree: str, dtype: str, hf: Path, neox_python: str, tmp_path: Path
) -> None:
    """From the written yml GPT-NeoX loads and takes two optimizer steps."""
    convert(hf, tmp_path / "neox", tp=2, dtype=dtype, era=era(tree))
    job = {"yml": str(tmp_path / "neox" / "finetune.yml"), "steps": 2}
    assert run(neox_python, TREES[tree], 2, [job], tmp_path) == [None]


def version(tree: str) -> str:
    known = {"gpt-neox": "ea7aefd8 of 2026-05", "neox-2024-03": "the parent of e109bf5e"}
    known["neox-2024-09"] = "the parent of 0d4bdb96"
    return known.get(tree, Path(tree).name)


def libraries(python: str) -> str:
    names = "'DeepSpeed', deepspeed.__version__, 'torch', torch.__version__"
    code = f"import deepspeed, torch; print({names})"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=environment)
    return done.stdout.strip().splitlines()[-1]
