"""Converted checkpoints load strictly in the real GPT-NeoX, and it computes the same logits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from common import convert, hf_logits, make_hf
from conftest import CELLS, VERSIONS, results_in

pytestmark = pytest.mark.neox
TREES = {"today": "gpt-neox", "2024-03": "neox-2024-03", "2024-09": "neox-2024-09"}
if os.environ.get("NEOX_TREE"):
    TREES = {os.environ.get("NEOX_ERA", "today"): os.environ["NEOX_TREE"]}
STORES = {"today": False, "2024-03": True, "2024-09": False}
WORDS = {
    "missing": "Missing key(s) in state_dict: ",
    "unexpected": "Unexpected key(s) in state_dict: ",
}


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of fewer entries than it has rows."""
    return with_tokenizer(make_hf(tmp_path_factory.mktemp("source") / "hf", num_hidden_layers=4))


def with_tokenizer(folder: Path) -> Path:
    """The folder, with a tokenizer of 290 words added."""
    vocabulary = {f"t{i}": i for i in range(290)}
    vocabulary["<|endoftext|>"] = 0
    del vocabulary["t0"]
    added = {"id": 0, "content": "<|endoftext|>", "single_word": False, "lstrip": False}
    added |= {"rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<|endoftext|>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def run(
    python: str, tree: str, processes: int, jobs: list[dict[str, Any]], folder: Path
) -> list[str | None]:
    """Each job's error in the real GPT-NeoX, None where it went through."""
    return [result["error"] for result in results(python, tree, processes, jobs, folder)]


def results(
    python: str, tree: str, processes: int, jobs: list[dict[str, Any]], folder: Path
) -> list[dict[str, Any]]:
    """What run_cpu.py says of each job."""
    path = folder / "jobs.json"
    defaults = {"drop": [], "logits": None, "steps": 0}
    path.write_text(json.dumps([{**defaults, **job} for job in jobs]))
    where = tree if os.path.isabs(tree) else f"{os.environ.get('NEOX_HOME', '.')}/{tree}"
    script = str(Path(__file__).parent / "run_cpu.py")
    command = [python, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += [f"--master_port={20000 + os.getpid() % 20000}", script, where, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    found = results_in(done.stdout)
    assert len(found) == len(jobs), done.stdout[-2000:] + done.stderr[-4000:]
    return found


def agree(path: Path, hf: Path) -> float:
    with np.load(path) as file:
        tokens, logits = torch.from_numpy(file["tokens"]), torch.from_numpy(file["logits"])
    return float((hf_logits(hf, tokens) - logits[..., :300]).abs().max())


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


def era(tree: str) -> Any:
    from neox_bridge.frameworks.eras import era_named

    return era_named(tree)


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
