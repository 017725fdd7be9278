"""Options that do not apply to a kind of target are errors before anything is written."""

from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner
from tiny import plan_of, write_hf

from neox_bridge.cli.app import app
from neox_bridge.errors import UsageError
from neox_bridge.execution.execute import execute

RUNNER = CliRunner()


def objects(folder: str) -> list[str]:
    found: list[str] = fsspec.filesystem("memory").find(f"/{folder}")
    return found


@pytest.mark.parametrize("name", ["every_crc", "hash_shared", "in_place"])
def test_an_option_that_an_object_store_has_no_use_for_is_an_error(
    name: str, tmp_path: Path
) -> None:
    source = write_hf(tmp_path / "hf")
    options: dict[str, Any] = {name: True}
    with pytest.raises(UsageError, match="only for targets on a local disk") as caught:
        execute(plan_of(source, tmp_path / "out"), "memory://options/out", **options)
    assert caught.value.parameters == (name,)
    assert objects("options") == []


def test_they_apply_to_a_folder_that_is_named_by_a_url(tmp_path: Path) -> None:
    source, target = write_hf(tmp_path / "hf"), tmp_path / "out"
    execute(plan_of(source, target), f"file://{target}", every_crc=True, hash_shared=True)
    assert (target / "latest").exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
@pytest.mark.parametrize("command", ["convert", "batch"])
def test_the_command_line_names_its_option(command: str, more: list[str], tmp_path: Path) -> None:
    source = str(write_hf(tmp_path / "hf"))
    arguments = [command, source, "memory://options/cli", "--crc", *more]
    done = RUNNER.invoke(app, arguments)
    assert done.exit_code == 2, done.output
    assert "--crc: only for targets on a local disk" in done.stderr
    assert objects("options") == []


@pytest.mark.parametrize(
    "options", [[], ["--no-verify"], ["--hash", "sha256"], ["--hash", "xxh3", "--no-verify"]]
)
def test_what_applies_to_both_needs_no_thought(options: list[str], tmp_path: Path) -> None:
    source = str(write_hf(tmp_path / "hf"))
    url = f"memory://options-{len(options)}-{len(' '.join(options))}/out"
    done = RUNNER.invoke(app, ["convert", source, url, *options])
    assert done.exit_code == 0, done.output
    assert RUNNER.invoke(app, ["verify", url]).exit_code == 0
