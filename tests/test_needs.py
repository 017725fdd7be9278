"""A test's markers follow from its source (tests/helpers/needs.py)."""

from pathlib import Path

import needs
import pytest

SOURCE = """
import os
from pathlib import Path
import signal
import numpy
import s3_server
import torch
from common import convert, make_hf, plan_of
from file_trees import same_tree
from safetensors.numpy import load_file

HALF = torch.float16
PROGRAM = "crash_run.py"

@pytest.fixture
def model(tmp_path): return make_hf(tmp_path)
@pytest.fixture
def other(model): return model
def ends(process): os.kill(process.pid, signal.SIGKILL)

def test_nothing(tmp_path): same_tree(tmp_path, convert(tmp_path))
def test_annotation(value: torch.Tensor) -> torch.Tensor: numpy.zeros(value)
def test_itself(): torch.zeros(1)
def test_constant(): assert HALF
def test_inside():
    from transformers import AutoConfig
def test_part():
    from safetensors.torch import load_file
def test_helper(): make_hf(".")
def test_fixture(model): pass
def test_fixture_of_a_fixture(other): pass
@pytest.mark.parametrize("dtype", [torch.float32])
def test_parameter(dtype): pass
def test_kill(process): ends(process)
def test_program(): subprocess.run([PROGRAM])
def test_command(): run("verify", "--logits")
def test_server(): s3_server.server()
def test_several(model, process): ends(process)
@pytest.fixture(params=[1])
def page(): import playwright
def test_page(page): pass
class Test_methods:
    @pytest.fixture
    def stored(self): s3_server.server()
    def test_one(self, model): pass
"""
EXPECTED = {
    "nothing": set(),
    "annotation": set(),
    "itself": {"torch"},
    "constant": {"torch"},
    "inside": {"torch"},
    "command": {"torch"},
    "part": {"torch"},
    "helper": {"torch"},
    "parameter": {"torch"},
    "fixture": {"torch"},
    "fixture_of_a_fixture": {"torch"},
    "kill": {"kill"},
    "program": {"kill"},
    "server": {"server"},
    "several": {"torch", "kill"},
    "page": {"browser"},
    "methods": {"torch", "server"},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "test_made_up.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize("test", EXPECTED)
def test_of_a_test(test: str, path: Path) -> None:
    name = "Test_methods" if test == "methods" else f"test_{test}"
    assert needs.needs(path, name) == EXPECTED[test]


def test_every_test_of_the_file_is_expected(path: Path) -> None:
    assert {name[len("test_") :] for name in needs.module(path).tests()} == set(EXPECTED)


def test_a_fixture_that_every_test_gets(path: Path) -> None:
    fixture = "@pytest.fixture(autouse=True)\ndef seeded(): torch.manual_seed(0)\n"
    path.write_text(SOURCE + fixture)
    assert needs.needs(path, "test_nothing") == {"torch"}
    assert needs.all_tests_need(path)


def test_fixtures_of_conftest() -> None:
    files = (needs.TESTS / "stores").glob("test_*.py")
    tests = [(path, test) for path in files for test in needs.module(path).tests()]
    assert any("server" in needs.needs(path, test) for path, test in tests)


ROOMS = sorted(path.name for path in needs.TESTS.iterdir() if any(path.glob("test_*.py")))


@pytest.mark.parametrize(
    "room", [room for room in ROOMS if room not in ("fuzz", "neox", "versions")]
)
def test_the_quick_tests_are_of_every_room(room: str) -> None:
    files = (needs.TESTS / room).glob("test_*.py")
    assert [path.name for path in files if not needs.all_tests_need(path)]
