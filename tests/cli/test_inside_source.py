"""Nothing is written inside a source: it would change the folder that is read."""

import os
import shutil
from pathlib import Path

import pytest
from commands import run
from resharding import DATA
from tiny import convert, write_hf

import neox_bridge
from neox_bridge.errors import UsageError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, a run with optimizer states, and a link to the model."""
    monkeypatch.chdir(tmp_path)
    write_hf(Path("toy"))
    shutil.copytree(DATA / "bf16_tp2_dp2", "run")
    os.symlink("toy", "link")
    return tmp_path


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


@pytest.mark.parametrize(
    ("command", "target", "names"),
    [
        ("convert toy toy/sub", "DST", "toy/sub is inside the source toy."),
        ("convert toy toy/sub --dry-run", "DST", "toy/sub is inside the source toy."),
        ("convert toy toy/a/../b/c", "DST", "toy/a/../b/c is inside the source toy."),
        ("convert toy link/sub", "DST", "link/sub ({}/toy/sub) is inside the source toy."),
        ("convert link toy/sub", "DST", "toy/sub is inside the source link ({}/toy)."),
        ("convert run run/hf", "DST", "run/hf is inside the source run."),
        ("reshard run run/dp1 --dp 1", "DST", "run/dp1 is inside the source run."),
        ("export-optimizer run run/moments", "DST", "run/moments is inside the source run."),
        ("batch toy toy/all", "DST", "toy/all is inside the source toy."),
        ("batch run toy toy/all --dry-run", "DST", "toy/all is inside the source toy."),
        ("doctor toy --fix toy/fixed", "--fix", "toy/fixed is inside the source toy."),
    ],
)
def test_a_target_inside_its_source(command: str, target: str, names: str, here: Path) -> None:
    before = files()
    result = run(*command.split())
    assert result.exit_code == 2, result.output
    names = names.format(os.path.realpath(here))
    assert result.stderr.splitlines()[-1] == (
        f"error: {target}: {names} Choose a folder outside of the source."
    )
    assert files() == before


def test_the_python_functions_refuse_it_too() -> None:
    before = files()
    conversion = neox_bridge.plan(neox_bridge.open_checkpoint("toy"), neox_bridge.Options(), "x")
    for call in (
        lambda: neox_bridge.convert("toy", "toy/sub"),
        lambda: neox_bridge.execute(conversion, "link/sub"),
        lambda: neox_bridge.reshard("run", "run/dp1", dp=1),
        lambda: neox_bridge.batch("toy", "toy/all"),
    ):
        with pytest.raises(UsageError, match=r"target: .* is inside the source"):
            call()
    assert files() == before


def test_a_step_is_added_to_its_own_run_and_names_may_start_alike() -> None:
    assert run("convert", "toy", "toy-neox", "-q").exit_code == 0
    assert (
        run(
            "convert", "toy-neox", "toy-neox", "--to", "neox", "--tp", "2", "--iteration", "5", "-q"
        ).exit_code
        == 0
    )
    assert sorted(path.name for path in Path("toy-neox").glob("global_step*")) == [
        "global_step0",
        "global_step5",
    ]
    convert(Path("toy"), Path("toyland"))
