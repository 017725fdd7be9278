"""GPT-NeoX's own scripts, as users start them, in patched trees: from Hugging Face to exports."""

import filecmp
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_neox
import torch
from checkpoint_edits import tokenizer
from common import TESTS, hf_logits, make_hf
from inside_neox import yml_of

from neox_bridge import verify

# of the stand-in for lm-evaluation-harness
CONTEXT, CONTINUATIONS = [5, 17, 100, 42, 7], [[9, 200], [33, 8, 1], [250]]
# DeepSpeed's ZeRO needs an optimizer, which older trees do not make for generate.py and eval.py
WITHOUT_TRAINING = {"distributed_backend": "gloo", "zero_optimization": {"stage": 0}}
pytestmark = pytest.mark.neox


def write_data(path: Path) -> Path:
    """Texts of random tokens as GPT-NeoX's MMapIndexedDataset: path.bin and path.idx."""
    texts, length = 64, 100
    tokens = np.random.default_rng(1).integers(1, 290, (texts, length), dtype=np.uint16)
    path.with_suffix(".bin").write_bytes(tokens.tobytes())
    with path.with_suffix(".idx").open("wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, texts, texts + 1))
        file.write(np.full(texts, length, np.int32).tobytes())
        file.write((np.arange(texts) * 2 * length).astype(np.int64).tobytes())
        file.write(np.arange(texts + 1, dtype=np.int64).tobytes())
    return path


@pytest.fixture(scope="module", params=sorted(real_neox.ALL_TREES))
def era(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tree(era: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a tree that ``neox-bridge patch TREE --train`` patched."""
    folder = tmp_path_factory.mktemp("launch") / era
    shutil.copytree(real_neox.tree_of(era), folder, symlinks=True)
    patch(folder)
    return folder


def patch(tree: Path, *words: str) -> None:
    command = [sys.executable, "-m", "neox_bridge", "patch", str(tree), "--train", *words]
    source = {**os.environ, "PYTHONPATH": str(TESTS.parent / "src")}
    subprocess.run(command, check=True, env=source, capture_output=True)


def launch(
    python: str,
    tree: Path,
    *words: str,
    script: str = "deepy.py",
    ranks: int = 1,
    bridge: bool = True,
) -> subprocess.CompletedProcess[str]:
    """``python deepy.py WORDS`` in a tree, with a GPU for each rank that does nothing."""
    paths = [str(TESTS / "neox" / "on_cpu")]
    paths += [os.environ["PYTHONPATH"]] if bridge else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "DS_ACCELERATOR": "cpu"}
    environment |= {"LOCAL_SIZE": str(ranks), "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    environment["PATH"] = f"{Path(python).parent}:{environment['PATH']}"  # of GPT-NeoX's make
    return subprocess.run(
        [python, script, *words],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_launched_training_starts_from_a_model_and_exports(
    era: str, tree: Path, neox_python: str, inside: None, tmp_path: Path
) -> None:
    hf = model_of("gpt_neox", tmp_path / "hf")
    keys: dict[str, Any] = {"save": str(tmp_path / "run"), "save_hf": str(tmp_path / "exported")}
    keys |= {"data_path": str(write_data(tmp_path / "data")), "distributed_backend": "gloo"}
    keys |= {"train_iters": 6, "lr_decay_iters": 6, "checkpoint_factor": 2, "eval_iters": 1}
    keys |= {"train_micro_batch_size_per_gpu": 1, "log_interval": 1, "save_hf_interval": 2}
    keys |= {"exit_interval": 2, "extra_save_iters": [0]}
    yml = yml_of(hf, era, 2, 0, tmp_path / "neox", **keys)
    for first, last in ((0, 2), (2, 4)):  # exit_interval ends the first run, the second resumes
        done = launch(neox_python, tree, "train.py", str(yml), ranks=2)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        verb = f"resuming from global_step{first}" if first else f"started from {hf}"
        assert f"neox-bridge: {verb}" in done.stdout
        for step in range(first, last + 2, 2):
            exported = str(tmp_path / "exported" / f"step{step}")
            assert verify(str(tmp_path / "run" / f"global_step{step}"), exported).holds
    assert verify(str(hf), str(tmp_path / "exported" / "step0")).holds


def test_without_neox_bridge_the_scripts_say_what_to_install(
    era: str, tree: Path, neox_python: str
) -> None:
    """Then ``--revert`` restores every file."""
    for script in ("deepy.py", "train.py", "eval.py", "generate.py"):
        done = launch(neox_python, tree, script=script, bridge=False)
        assert done.returncode == 1
        assert "pip install ./neox-bridge" in done.stderr
        assert "Traceback" not in done.stderr
    patch(tree, "--revert")
    try:
        real = real_neox.tree_of(era)
        names = ["train.py", "deepy.py", "eval.py", "generate.py"]
        assert filecmp.cmpfiles(real, tree, names, shallow=False)[0] == names
        left = filecmp.dircmp(real, tree).right_only
        assert [name for name in left if name != "__pycache__"] == []
    finally:
        patch(tree)


def model_of(family: str, folder: Path) -> Path:
    """A model as GPT-NeoX computes it in every tree: see ``model`` of test_inside_neox.py."""
    epsilon = {"rms_norm_eps": 1e-12} if family == "llama" else {}
    hf = make_hf(folder, torch.float32, family=family, vocab_size=290, **epsilon)
    tokenizer(hf / "tokenizer.json")
    return hf


def continuation(hf: Path, prompt: list[int], length: int) -> str:
    """What transformers generates, as GPT-NeoX writes it."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, torch_dtype=torch.float32)
    tokens = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": length, "eos_token_id": 0, "pad_token_id": 0}
    generated = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    text = Tokenizer.from_file(str(hf / "tokenizer.json")).decode(
        generated[0, len(prompt) :].tolist()
    )
    return str(text)


@pytest.mark.parametrize(("family", "stages"), [("gpt_neox", 0), ("llama", 1)])
def test_generate_writes_what_transformers_generates(
    family: str, stages: int, era: str, tree: Path, neox_python: str, inside: None, tmp_path: Path
) -> None:
    if stages == 0 and era in ("2024-09", "2024-10"):
        pytest.skip("generate.py of this tree takes the tuple of a model without stages for logits")
    hf = model_of(family, tmp_path / "hf")
    prompt = [5, 17, 100, 42, 7]  # one: GPT-NeoX keeps its cache for the next prompt of a file
    text = " ".join(f"t{token}" for token in prompt)
    (tmp_path / "prompts.txt").write_text(text)
    keys: dict[str, Any] = {
        "text_gen_type": "input-file",
        "sample_input_file": str(tmp_path / "prompts.txt"),
    }
    keys |= {"sample_output_file": str(tmp_path / "samples.jsonl"), **WITHOUT_TRAINING}
    yml = yml_of(hf, era, 1, stages, tmp_path / "neox", maximum_tokens=12, **keys)
    done = launch(neox_python, tree, "generate.py", str(yml))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    sample = json.loads((tmp_path / "samples.jsonl").read_text())
    assert sample["context"] == text
    assert sample["text"] == continuation(hf, prompt, 12)
    assert sample["length"] == 12


def test_eval_scores_as_transformers_does(
    era: str, tree: Path, neox_python: str, inside: None, tmp_path: Path
) -> None:
    """With a stand-in for lm-evaluation-harness; the adapter is GPT-NeoX's."""
    hf = model_of("gpt_neox", tmp_path / "hf")
    keys: dict[str, Any] = {"eval_tasks": ["fixed"], "eval_results_prefix": str(tmp_path / "of")}
    yml = yml_of(hf, era, 1, 1, tmp_path / "neox", **keys, **WITHOUT_TRAINING)
    done = launch(neox_python, tree, "eval.py", str(yml))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = tmp_path.glob("of_eval_results_*.json")
    sums = json.loads(path.read_text())["results"]["fixed"]["sums"]
    expected = [score(hf, CONTEXT, continuation) for continuation in CONTINUATIONS]
    assert sums == pytest.approx(expected, abs=5e-6)


def score(hf: Path, context: list[int], continuation: list[int]) -> float:
    """The score of a continuation by GPT-NeoX in fp32, computed by transformers.

    GPT-NeoX computes the loss too, which replaces logits in fp32 by probabilities
    (megatron/mpu/cross_entropy.py), and its adapter takes these for logits.
    """
    tokens = torch.tensor([context + continuation])
    logprobs = hf_logits(hf, tokens)[0, :-1].float().softmax(-1).log_softmax(-1)
    return float(logprobs.gather(1, tokens[0, 1:, None])[len(context) - 1 :].sum())
