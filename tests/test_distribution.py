"""What is published works: the wheel in an empty environment, and the tests of the sdist."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from tiny import write_hf

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
pytestmark = pytest.mark.slow
# tests that read the repository's own files, and some of the package
FROM_SOURCES = (
    "tests/test_project.py",
    "tests/test_extras.py",
    "tests/planning/test_model_card.py",
    "tests/frameworks/test_changes.py",
)


def run(*words: object, cwd: Path | str = "/") -> str:
    command = [str(word) for word in words]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel and the source distribution, without a network."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def metadata(dist: Path) -> Message:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_twine_finds_nothing_wrong(dist: Path) -> None:
    """Among others, that the index can show the README."""
    output = run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir())
    assert output.count("PASSED") == 2


def test_the_metadata_is_full(metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Project-URL" not in metadata, "the address of the repository is not decided"


def test_links_of_the_readme_lead_out_of_the_index(metadata: Message) -> None:
    text = str(metadata.get_payload())
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert [link for link in links if not link.startswith("https://")] == []
    assert "https://github.com/EleutherAI/gpt-neox" in links
    assert "Get started" in text
    assert ".invalid" not in text


def test_the_wheel_in_an_empty_environment(dist: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    (wheel,) = dist.glob("*.whl")
    run(tmp_path / "env/bin/python", "-m", "pip", "install", "--quiet", wheel)
    command = tmp_path / "env/bin/neox-bridge"
    assert "Usage: neox-bridge" in run(command, "--help")
    hf, neox, back = write_hf(tmp_path / "hf"), tmp_path / "neox", tmp_path / "back"
    assert "verified bit by bit" in run(command, "convert", hf, neox, "--tp", "2")
    run(command, "convert", neox, back)
    assert "equal" in run(command, "verify", hf, back)
    assert (back / "model.safetensors").stat().st_size > 0


def test_the_tests_of_the_source_distribution_run(dist: Path, tmp_path: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    options = ["-q", "--quick", "-p", "no:cacheprovider", "--basetemp", tmp_path / "tests"]
    code = f"import sys; sys.path.insert(0, {str(root / 'src')!r}); import pytest, neox_bridge; "
    code += f"assert neox_bridge.__file__.startswith({str(root)!r}); sys.exit(pytest.main())"
    output = run(sys.executable, "-c", code, *options, *FROM_SOURCES, cwd=root)
    assert re.search(r"\d+ passed|\[100%\]", output)
