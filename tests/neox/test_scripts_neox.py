"""GPT-NeoX's own conversion scripts, patched, in the Python of the real GPT-NeoX.

tests/patch/test_scripts.py runs every option of every script; here they run where their users run
them, and the real GPT-NeoX loads what they wrote from where the scripts say that it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from common import TESTS, convert, fixture, hf_tensors, make_hf, same_bits, step_of
from real_neox import ALL_TREES, HOME, agree, run_alone, with_tokenizer

from neox_bridge.patch.patcher import apply
from neox_bridge.patch.scripts import plan_scripts

pytestmark = pytest.mark.neox


@pytest.fixture(scope="module", params=ALL_TREES)
def tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patched copy of a tree."""
    source = Path(HOME) / ALL_TREES[request.param]
    if not source.is_dir():
        pytest.skip(f"no tree {source}")
    folder = tmp_path_factory.mktemp("scripts") / request.param
    shutil.copytree(source, folder, symlinks=True)
    apply(plan_scripts(folder))
    return folder


def call(python: str, folder: Path, *words: str) -> str:
    """Run a script with GPT-NeoX's Python, which finds neox-bridge on PATH alone."""
    program = folder / "bin" / "neox-bridge"
    program.parent.mkdir(exist_ok=True)
    start = f"import sys; sys.path.insert(0, {str(TESTS.parent / 'src')!r})"
    program.write_text(
        f"#!{sys.executable}\n{start}\nfrom neox_bridge.__main__ import main\nmain()\n"
    )
    program.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PATH"] = f"{program.parent}:/usr/bin:/bin"
    done = subprocess.run(
        [python, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_hf_to_sequential_loads(tree: Path, neox_python: str, tmp_path: Path) -> None:
    """From Hugging Face by the script, and from the folder above what it wrote into GPT-NeoX."""
    hf = with_tokenizer(make_hf(tmp_path / "EleutherAI" / "tiny"))
    (tmp_path / "layout.yml").write_text("pipe-parallel-size: 1\nmodel-parallel-size: 1\n")
    script = str(tree / "tools" / "ckpts" / "convert_hf_to_sequential.py")
    words = ["--hf-model-name", "tiny", "--output-dir", "runs/tiny", "--config", "layout.yml"]
    printed = call(neox_python, tmp_path, script, *words)
    assert printed.count(" is patched and runs: ") == 1
    settings = yaml.safe_load((tmp_path / "runs" / "tiny" / "finetune.yml").read_text())
    settings["load"] = str(tmp_path / "runs")
    (tmp_path / "run.yml").write_text(yaml.safe_dump(settings))
    job = {"yml": str(tmp_path / "run.yml"), "logits": str(tmp_path / "logits.npz")}
    assert run_alone(neox_python, tree, [job], tmp_path / "a").errors == [None]
    assert agree(tmp_path / "logits.npz", hf) <= 1e-5


def test_neox_to_hf(tree: Path, neox_python: str, tmp_path: Path) -> None:
    """Two ranks: the script itself sums biases that every rank holds whole, and ignores gelu."""
    shutil.copytree(fixture("pythia_fp32_pp1_tp2"), tmp_path / "run")
    settings: dict[str, object] = {}
    for path in sorted((step_of(tmp_path / "run") / "configs").glob("*.yml")):
        settings.update(yaml.safe_load(path.read_text()))
    (tmp_path / "run.yml").write_text(yaml.safe_dump(settings))
    step = f"run/{step_of(tmp_path / 'run').name}"
    script = str(tree / "tools" / "ckpts" / "convert_neox_to_hf.py")
    words = ["--input_dir", step, "--config_file", "run.yml", "--output_dir"]
    printed = call(neox_python, tmp_path, script, *words, "hf")
    assert printed.count(" is patched and runs: ") == 1
    convert(tmp_path / step, tmp_path / "expected", to="hf")
    written, expected = hf_tensors(tmp_path / "hf"), hf_tensors(tmp_path / "expected")
    assert sorted(written) == sorted(expected)
    assert all(same_bits(written[name], expected[name]) for name in expected)
    config = (tmp_path / "hf" / "config.json").read_bytes()
    assert config == (tmp_path / "expected" / "config.json").read_bytes()

    # as the unit test of the tree calls it
    start = (
        f"import sys; sys.path[:0] = [{str(tree)!r}]\nfrom tools.ckpts import convert_neox_to_hf"
    )
    code = f"{start}\nconvert_neox_to_hf.main(input_args={[*words, 'again']!r})"
    call(neox_python, tmp_path, "-c", code)
    again = hf_tensors(tmp_path / "again")
    assert all(same_bits(again[name], expected[name]) for name in expected)
