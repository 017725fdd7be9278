"""CONTRIBUTING.md, "Add a family of models", followed to the letter, makes a family."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from common import assert_same, hf_tensors, make_hf

import neox_bridge

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the section's two files."""
    source = tmp_path_factory.mktemp("tree") / "src"
    shutil.copytree(
        Path(neox_bridge.__file__).parent,
        source / "neox_bridge",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    made, line, table = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    new, changed = re.findall(r"^### \d\. .*`src/(.*)`$", PAGE, re.MULTILINE)
    assert not (source / new).exists()
    (source / new).write_text(made)
    init = source / changed
    text = init.read_text()
    known = re.search(r"^ARCHITECTURES.*?^\)\n", text, re.MULTILINE | re.DOTALL)
    assert known
    # the page's table is today's and one more
    assert table.replace("    YARROW,\n", "") == known[0]
    init.write_text(text.replace(known[0], table).replace("from neox", line + "from neox", 1))
    return source


def run(tree: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "neox_bridge", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def yarrow(folder: Path) -> Path:
    make_hf(folder, family="mistral", sliding_window=5, num_key_value_heads=2)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"model_type": "yarrow", "architectures": ["YarrowForCausalLM"]}
    del config["max_position_embeddings"]
    path.write_text(json.dumps(config))
    return folder


def test_families_names_it(tree: Path) -> None:
    assert "yarrow  YarrowForCausalLM" in run(tree, "families")
    assert "Yarrow 7B" in run(tree, "families")


def test_it_goes_both_ways(tree: Path, tmp_path: Path) -> None:
    source = str(yarrow(tmp_path / "yarrow"))
    told = json.loads(run(tree, "inspect", source, "--json"))
    assert (told["family"], told["max_positions"]) == ("yarrow", 4096)
    run(tree, "convert", source, str(tmp_path / "neox"), "--tp", "2")
    run(tree, "verify", source, str(tmp_path / "neox"))
    run(tree, "convert", str(tmp_path / "neox"), str(tmp_path / "back"))
    assert_same(hf_tensors(tmp_path / "yarrow"), hf_tensors(tmp_path / "back"))
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["architectures"] == ["YarrowForCausalLM"]
    assert (config["model_type"], config["sliding_window"]) == ("yarrow", 5)


def test_without_the_page_it_is_refused(tmp_path: Path) -> None:
    source = yarrow(tmp_path / "yarrow")
    command = [sys.executable, "-m", "neox_bridge", "convert", str(source), str(tmp_path / "neox")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "yarrow" in done.stderr
