"""Hostile checkpoints: a one-line error in bounded time and memory; nothing run, nothing leaked."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attack_files as attacks
import attack_neox
import pytest
from attack_safetensors import SAFETENSORS
from common import HELPERS, convert, fixture, make_hf, neox_config, plan_of, step_of

import neox_bridge
from neox_bridge.api import open_checkpoint
from neox_bridge.errors import BridgeError
from neox_bridge.formats.safetensors import read_safetensors

pytestmark = pytest.mark.slow

PACKAGE = str(Path(neox_bridge.__file__).parents[1])
NEOX = "pythia_fp32_pp1_tp2"
MEGABYTES, SECONDS = 256, 5  # the bound is 2 s; a machine that does other things may take longer


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model"
    convert(fixture(NEOX), path)
    for made in ("README.md", "neox_bridge.json"):
        (path / made).unlink()
    return path


def _link_or_copy(source: str, target: str) -> None:
    """No change writes into a .pt, so that those need no copies."""
    (os.link if source.endswith(".pt") else shutil.copy)(source, target)


def attacked(source: Path | None, folder: Path, change: Callable[[Path], None]) -> Path:
    if source is None:
        folder.mkdir()
        attack_neox.params()(folder)
        (folder / "consolidated.00.pth").touch()
    else:
        shutil.copytree(source, folder, copy_function=_link_or_copy)
    change(folder)
    return folder


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(SAFETENSORS[name]())
    with pytest.raises(BridgeError) as caught:
        read_safetensors(str(path))
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 1


CASES = {
    **{f"hf: {name}": ("hf", change) for name, change in attacks.HF.items()},
    **{f"neox: {name}": ("neox", change) for name, change in attack_neox.NEOX.items()},
    **{f"llama: {name}": ("llama", change) for name, change in attack_neox.RAW_LLAMA.items()},
}


def test_from_the_command_line(hf: Path, tmp_path: Path) -> None:
    """All of them, through the real command, within bounds of memory and of processor time."""
    sources = {"hf": hf, "neox": fixture(NEOX), "llama": None}
    work = tmp_path / "work"
    work.mkdir()
    todo = []
    for number, (kind, change) in enumerate(CASES.values()):
        folder = attacked(sources[kind], tmp_path / f"case{number}", change)
        todo.append(["convert", str(folder), str(work / f"out{number}")])
    done = subprocess.run(
        [
            sys.executable,
            HELPERS / "run_attacks.py",
            str(MEGABYTES),
            str(SECONDS),
        ],
        input=json.dumps(todo),
        capture_output=True,
        text=True,
        cwd=work,
        check=True,
        env={**os.environ, "PYTHONPATH": PACKAGE, "OPENBLAS_NUM_THREADS": "1"},
    )
    wrong = {}
    for name, (code, out, err) in zip(CASES, json.loads(done.stdout), strict=True):
        line = err.removesuffix("\n")
        good = code in (1, 4) and not out and line.startswith("error: ") and line.isprintable()
        if not good or len(line) > 4100 or "bug in" in line or "out of memory" in line:
            wrong[name] = (code, out[-500:], err[-500:])
    assert wrong == {}
    for path in tmp_path.glob("case*"):
        shutil.rmtree(path)  # they are large
    assert list(work.iterdir()) == []  # no output, no marker of anything that ran


# --- links ------------------------------------------------------------------------------------


def test_links_within_the_folder_and_of_weights_are_followed(hf: Path, tmp_path: Path) -> None:
    copy = attacked(hf, tmp_path / "model", lambda folder: None)
    (copy / "config.json").rename(copy / "other.json")
    (copy / "config.json").symlink_to("other.json")
    (copy / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (copy / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    (tmp_path / "link").symlink_to(copy)
    assert plan_of(tmp_path / "link", tmp_path / "out").target["parameters"]


def cached(hf: Path, cache: Path) -> Path:
    """The model as huggingface_hub keeps it: links to blobs."""
    repo = cache / "models--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(hf.iterdir())):
        shutil.copy(file, repo / "blobs" / f"{number:040}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040}")
    return snapshot


TOKENIZER = json.dumps({"model": {"vocab": {"a": 0}}})


def test_a_cache_of_hugging_face_is_links_to_blobs(hf: Path, tmp_path: Path) -> None:
    snapshot = cached(hf, tmp_path / "real" / "hub")
    (tmp_path / "hub").symlink_to(tmp_path / "real" / "hub")  # on another disk
    (snapshot.parents[1] / "blobs" / "t").write_text(TOKENIZER)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/t")
    linked = tmp_path / "hub" / snapshot.relative_to(tmp_path / "real" / "hub")
    plan = plan_of(linked, tmp_path / "out")
    assert "tokenizer/tokenizer.json" in [file.path for file in plan.files]


@pytest.mark.parametrize("where", ["blob", "blobs", "another model", "no cache"])
def test_a_cache_that_leads_out_of_itself(where: str, hf: Path, tmp_path: Path) -> None:
    """A blob that is a link, blobs that are one, another model's; a folder that looks like one."""
    snapshot = cached(hf, tmp_path / "hub")
    blobs = snapshot.parents[1] / "blobs"
    secret = attacks.outside(tmp_path / "hub")
    secret.write_text(TOKENIZER)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/secret.json")
    if where == "blob":
        (blobs / "secret.json").symlink_to(secret)
    elif where == "blobs":
        shutil.copytree(blobs, secret.parent, dirs_exist_ok=True)
        shutil.rmtree(blobs)
        blobs.symlink_to(secret.parent)
    elif where == "another model":
        (snapshot / "tokenizer.json").unlink()
        (snapshot / "tokenizer.json").symlink_to(secret)
        secret.rename(tmp_path / "hub" / "blobs")
        (snapshot / "tokenizer.json").unlink()
        (snapshot / "tokenizer.json").symlink_to("../../../blobs")
    else:
        (blobs / "secret.json").write_text(TOKENIZER)
        snapshot.parents[1].rename(tmp_path / "hub" / "name")
        snapshot = tmp_path / "hub" / "name" / "snapshots" / snapshot.name
    with pytest.raises(BridgeError, match="symbolic link"):
        open_checkpoint(str(snapshot))


def test_a_copy_that_is_fixed_takes_no_secrets(tmp_path: Path) -> None:
    """doctor --fix copies all files that it doesn't write anew."""
    root = tmp_path / "run"
    shutil.copytree(fixture("pythia_fp32_2024_09_old_mlp_pp0_tp2"), root)
    command = [sys.executable, "-m", "neox_bridge", "doctor", str(root), "--for", "today"]
    command += ["--fix", str(tmp_path / "out")]
    attacks.linked(f"{step_of(root).name}/notes.txt")(root)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "notes.txt is a symbolic link" in done.stderr
    assert not (tmp_path / "out").exists()
    (step_of(root) / "notes.txt").unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- what reaches a terminal -------------------------------------------------------------------


def test_tables_move_no_cursor(tmp_path: Path) -> None:
    """A folder of such a name is printed in tables, and in JSON as it is."""
    root = tmp_path / "a\x1b[2Jb\u202ec"
    shutil.copytree(fixture(NEOX), root)
    command = [sys.executable, "-m", "neox_bridge", "inspect", "--tensors", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "a\\x1b[2Jb\\u202ec" in done.stdout
    assert all(line.isprintable() for line in done.stdout.splitlines())
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["path"] == str(root)


# --- settings of every kind --------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    0, -1, 1.5, 10**9, 10**39, float("nan"), float("inf"), "a" * 10_000, "\x1b[2J", [[["all"], 2]],
    {"type": []}, True, None,
)  # fmt: skip


def settings_of(raw: dict[str, Any]) -> list[str]:
    from neox_bridge.architectures import setting_types

    return sorted({*raw, *setting_types.HF, "bos_token_id", "pad_token_id", "ssm_cfg"})


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "mamba"])
def test_any_value_of_any_key(family: str, tmp_path: Path) -> None:
    """A plan or an error that is meant, whatever a key of config.json says."""
    source = make_hf(tmp_path / "hf", family=family)
    path = source / "config.json"
    good = json.loads(path.read_text())
    planned = 0
    for key in settings_of(good):
        for value in VALUES:
            path.write_text(json.dumps({**good, key: value}))
            try:
                planned += bool(plan_of(source, tmp_path / "out").files)
            except BridgeError as error:
                assert len(str(error)) < 1000  # noqa: PT017
    assert planned > 100


@pytest.mark.parametrize("name", ["pythia_fp32_pp0_tp2", "llama_gqa_fp32_tp2"])
def test_any_value_of_any_setting(name: str, tmp_path: Path) -> None:
    from neox_bridge.architectures import setting_types

    root = tmp_path / "run"
    shutil.copytree(fixture(name), root)
    path = step_of(root) / "configs" / "zz.yml"
    planned = 0
    for key in setting_types.NEOX:
        for value in VALUES:
            path.write_text(json.dumps({key: value}))
            try:
                planned += bool(plan_of(root, tmp_path / "out").files)
            except BridgeError as error:
                assert len(str(error)) < 1000  # noqa: PT017
    assert planned > 100


# --- found by fuzzing --------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "kept"), [("gelu_10", "gelu_10"), (None, "gelu")])
def test_an_activation_that_gpt_neox_lacks_stays_on_its_side(
    word: str | None, kept: str, hf: Path, tmp_path: Path
) -> None:
    source = attacked(hf, tmp_path / "model", attacks.config(hidden_act=word))
    convert(source, tmp_path / "out", to="hf")
    told = json.loads((tmp_path / "out" / "config.json").read_text())["hidden_act"]
    assert told in (kept, word)


def test_an_activation_that_transformers_lacks_stays_on_its_side(tmp_path: Path) -> None:
    root = attacked(fixture(NEOX), tmp_path / "run", attack_neox.yml("activation: softsign"))
    convert(root, tmp_path / "out", to="neox", tp=1)
    assert neox_config(tmp_path / "out")["activation"] == "softsign"
