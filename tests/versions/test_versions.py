"""Converted folders load in many versions of transformers, each in its own environment."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from common import GPT_NEOX, convert, fixture, hf_logits, make_hf, recorded

pytestmark = pytest.mark.versions
# python, transformers, torch, and what a release needs beside them
VERSIONS: dict[str, tuple[str, ...]] = {
    "4.30": ("transformers==4.30.2", "torch==2.13.0", "numpy<2", "accelerate<0.30"),
    "4.48": ("transformers==4.48.3", "torch==2.13.0"),
    "5.0": ("transformers==5.0.0", "torch==2.13.0"),
    "5.4": ("transformers==5.4.0", "torch==2.13.0"),
    "newest": ("transformers", "torch==2.13.0"),
}
CHOSEN = os.environ.get("TRANSFORMERS", " ".join(VERSIONS)).split()
CASES = [name for name in GPT_NEOX if "fp32" in name]


@pytest.fixture(scope="session", params=CHOSEN)
def python(request: Any) -> str:
    """The interpreter of an environment with that version, made on first use."""
    home = Path(os.environ.get("VERSIONS_HOME", ".versions")).absolute() / request.param
    interpreter = home / "bin" / "python"
    if not (home / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        packages = [*VERSIONS[request.param], "numpy"]
        install = [str(interpreter), "-m", "pip", "install", "--quiet", *packages]
        subprocess.run(install, check=True)
        (home / ".ready").touch()
    return str(interpreter)


def check(python: str, folder: Path, tokens: torch.Tensor, logits: torch.Tensor) -> None:
    """The folder loads in that version without a key too many or too few, and computes these."""
    work = folder.parent
    np.savez(work / "tokens.npz", tokens=tokens.numpy())
    script = str(Path(__file__).parent / "load.py")
    command = [python, script, folder.name, "tokens.npz", "logits.npz"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["missing"], told["unexpected"]) == ([], [])
    with np.load(work / "logits.npz") as file:
        computed = torch.from_numpy(file["logits"])[..., : logits.shape[-1]]
    assert float((computed - logits).abs().max()) <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_loads_and_agrees(name: str, python: str, tmp_path: Path) -> None:
    convert(fixture(name), tmp_path / "hf")
    check(python, tmp_path / "hf", *recorded(name))


def test_a_rope_that_is_no_default(python: str, tmp_path: Path) -> None:
    """Each version must read the fraction and the base in its own spelling."""
    hf = make_hf(tmp_path / "source", rotary_pct=0.5, rotary_emb_base=50000)
    convert(hf, tmp_path / "neox", tp=2)
    convert(tmp_path / "neox", tmp_path / "hf")
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(3))
    check(python, tmp_path / "hf", tokens, hf_logits(hf, tokens))


@pytest.mark.parametrize("name", ["llama_fp32_tp2", "llama_gqa_fp32_tp2"])
def test_llama(name: str, python: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if "gqa" in name and "4.30" in request.node.name:
        pytest.skip("transformers has grouped-query attention since 4.31")
    convert(fixture(name), tmp_path / "hf")
    check(python, tmp_path / "hf", *recorded(name))


def test_a_llama_with_another_base(
    python: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if "4.30" in request.node.name:
        pytest.skip("transformers' Llama computes with base 10000 only, whatever config.json says")
    hf = make_hf(tmp_path / "source", family="llama", rope_theta=500000.0)
    convert(hf, tmp_path / "neox", tp=2)
    convert(tmp_path / "neox", tmp_path / "hf")
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(3))
    check(python, tmp_path / "hf", tokens, hf_logits(hf, tokens))
