"""The patch of GPT-NeoX's conversion scripts, on stand-ins and by ``make test-neox`` on real ones.

The scripts run in the Python of the tests: a patched script needs neither DeepSpeed nor a tree
that can be imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from checkpoint_edits import tokenizer
from commands import run
from common import FIXTURES, TESTS, fixture, make_hf, step_of
from file_trees import content
from raw_llama import write_raw
from stand_in_trees import NAMES, scripts_of

from neox_bridge import Refused
from neox_bridge.patch.patcher import KEPT, apply, plan_patch, revert
from neox_bridge.patch.scripts import SCRIPTS, hook_source, plan_scripts

FOLDER = Path("tools/ckpts")
SRC = str(TESTS.parent / "src")


def edit(tree: Path, script: str, old: str, new: str) -> None:
    path = tree / FOLDER / script
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def call(
    tree: Path, script: str, *words: object, cwd: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script of a tree as its users do."""
    command = [sys.executable, str(tree / FOLDER / script), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": SRC, **variables}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def check(tree: Path, script: str, *words: object, cwd: Path, output: str, command: str) -> str:
    """Patch a tree and run a script: its output is that of ``neox-bridge convert``.

    output: relative to cwd. command: without ``neox-bridge convert``, as the notice shows it.
    """
    apply(plan_scripts(tree))
    done = call(tree, script, *words, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    (notice,) = [line for line in done.stdout.splitlines() if " is patched and runs: " in line][:1]
    _, _, shown = notice.partition(" runs: neox-bridge ")
    assert shlex.split(shown) == ["convert", *shlex.split(command)]
    written = content(cwd / output)
    shutil.rmtree(cwd / output)
    convert = [sys.executable, "-m", "neox_bridge", "convert", *shlex.split(command)]
    environment = {**os.environ, "PYTHONPATH": SRC}
    subprocess.run(convert, capture_output=True, check=True, cwd=cwd, env=environment)
    expected = content(cwd / output)
    assert sorted(written) == sorted(expected)
    assert [name for name in expected if written[name] != expected[name]] == []
    return done.stdout


# what the patch does to the files


def test_puts_lines_in_and_takes_none_out(tree: Path) -> None:
    plan = plan_scripts(tree)
    assert [Path(file.path).name for file in plan.files] == [
        f"{script.name}.py" for script in SCRIPTS if (tree / script.path).exists()
    ]
    assert {file.path for file in plan.files} == {
        str(FOLDER / name) for name in scripts_of(tree.name)
    }
    for file in plan.files:
        changed = [line for line in file.diff.splitlines() if line[:1] == "-"]
        assert changed == [f"--- a/{file.path}"]
        assert b"import neox_bridge" not in file.new
        assert b"from neox_bridge" not in file.new


def test_revert_is_byte_for_byte(tree: Path) -> None:
    before = content(tree)
    apply(plan_scripts(tree))
    apply(plan_patch(tree))  # the other patch, with the same record
    assert plan_scripts(tree).files == ()
    assert plan_patch(tree).files == ()
    assert content(tree) != before
    revert(tree)
    assert content(tree) == before
    assert not (tree / KEPT).exists()


def test_the_command(tree: Path) -> None:
    before = content(tree)
    done = run("patch", tree, "--scripts", "--dry-run")
    assert content(tree) == before
    subprocess.run(["git", "apply", "-"], input=done.stdout, text=True, cwd=tree, check=True)
    applied = content(tree)
    for file in plan_scripts_of(before, tree):
        (tree / file).write_bytes(before[file])
    shown = run("patch", tree, "--scripts").stdout
    assert "convert_neox_to_hf.py:" in shown
    assert "neox-bridge converts in place of the script, with its command line" in shown
    now = content(tree)
    assert {name: now[name] for name in applied} == applied
    assert "is patched already" in run("patch", tree, "--scripts").stdout
    assert run("patch", tree, "--revert").exit_code == 0
    assert content(tree) == before


def plan_scripts_of(before: dict[str, bytes], tree: Path) -> list[str]:
    """The files that ``git apply`` changed."""
    return [name for name, data in content(tree).items() if before[name] != data]


@pytest.mark.parametrize(
    "change",
    [lambda text: text.replace(b"\n", b"\r\n"), lambda text: b"\xef\xbb\xbf" + text],
    ids=["crlf", "bom"],
)
def test_odd_bytes_survive(today: Path, change: object) -> None:
    assert callable(change)
    for path in (today / FOLDER).glob("*.py"):
        path.write_bytes(change(path.read_bytes()))
    before = content(today)
    apply(plan_scripts(today))
    for script in SCRIPTS:
        text = (today / script.path).read_bytes()
        assert text.count(b"\r\n") in (0, text.count(b"\n"))
    assert plan_scripts(today).files == ()
    revert(today)
    assert content(today) == before


@pytest.mark.parametrize("script", [script.name for script in SCRIPTS])
def test_the_hook_is_wrapped_as_the_tree(script: str) -> None:
    (this,) = [each for each in SCRIPTS if each.name == script]
    assert max(map(len, hook_source(this).splitlines())) <= 88


@pytest.mark.neox
@pytest.mark.parametrize("trees", ["real"], indirect=True)
def test_the_page_shows_what_happens_line_by_line(today: Path) -> None:
    page = (TESTS.parent / "docs" / "how-to" / "patch.md").read_text().splitlines()
    shown = [line for line in page if line.startswith(f"{FOLDER}/")]
    printed = run("patch", today, "--scripts").stdout.splitlines()
    assert shown == [line for line in printed if line.startswith(f"{FOLDER}/")]


def test_doctor_advises_it(today: Path, tmp_path: Path) -> None:
    """For the traceback of issue #1323, and not for scripts of older trees."""
    log = tmp_path / "log"
    error = "{}, line 198, in <listcomp>\nKeyError: 'sequential.2.input_layernorm.weight'\n"
    log.write_text(error.format(f'  File "{today}/{FOLDER}/convert_neox_to_hf.py"'))
    checkpoint = fixture("llama_gqa_fp32_tp2")
    words = ["doctor", checkpoint, "--error", log, "--for", f"neox:{today}", "--json"]
    advised = json.loads(run(*words).stdout)["advice"]["commands"]
    (command,) = [line for line in advised if " patch " in line]
    assert command == f"neox-bridge patch {today} --scripts   # lets the scripts call neox-bridge"
    assert run(*shlex.split(command, comments=True)[1:]).exit_code == 0
    assert "is patched already" in run("patch", today, "--scripts").stdout
    log.write_text(error.format('  File "tools/convert_sequential_to_hf.py"'))
    assert not [
        line for line in json.loads(run(*words).stdout)["advice"]["commands"] if " patch " in line
    ]


# what is refused

SEQUENTIAL, TO_HF = "convert_hf_to_sequential.py", "convert_neox_to_hf.py"


@pytest.mark.parametrize(
    ("script", "old", "new", "reason"),
    [
        (SEQUENTIAL, '"--revision"', '"--branch"', "options that are not known (--branch)"),
        (TO_HF, '"--precision"', "NAME", "options that are not known (?)"),
        (TO_HF, '"--precision"', '"--architecture"', "does not have the options --precision"),
        (TO_HF, "def main(", "def start(", "does not have exactly one def main("),
        (TO_HF, "def main(input_args", "def main(args", "does not have exactly one def main("),
        (SEQUENTIAL, 'if __name__ == "__main__"', "if True", "exactly one if __name__"),
        (SEQUENTIAL, "type=int", "type=number", "declares its options in an unknown way"),
        (SEQUENTIAL, "import argparse", "import (", "cannot be parsed"),
    ],
)
def test_unknown_forms_are_refused(
    script: str, old: str, new: str, reason: str, today: Path
) -> None:
    edit(today, script, old, new)
    before = content(today)
    with pytest.raises(Refused) as caught:
        plan_scripts(today)
    assert reason in str(caught.value)
    assert f"{FOLDER}/{script}" in str(caught.value)
    assert "nothing was patched" in str(caught.value)
    assert content(today) == before


def test_a_part_of_the_patch_is_refused(today: Path) -> None:
    apply(plan_scripts(today))
    edit(today, TO_HF, "    return _neox_bridge_convert_neox_to_hf(", "    print(")
    with pytest.raises(Refused, match="contains a part of the patch"):
        plan_scripts(today)


def test_links_are_refused(today: Path) -> None:
    (today / FOLDER / TO_HF).rename(today / "elsewhere")
    (today / FOLDER / TO_HF).symlink_to(today / "elsewhere")
    with pytest.raises(Refused, match="is a link"):
        plan_scripts(today)


def test_a_tree_without_scripts_is_refused(today: Path) -> None:
    shutil.rmtree(today / FOLDER)
    with pytest.raises(Refused, match=r"none of the scripts.* convert_neox_to_hf\.py"):
        plan_scripts(today)


# what a patched script does


def one_yml(run: str | Path, folder: Path, **more: object) -> Path:
    """The settings of a run or a fixture in one file, as the scripts want them."""
    settings: dict[str, object] = {}
    root = fixture(run) if isinstance(run, str) else run
    for path in sorted((step_of(root) / "configs").glob("*.yml")):
        settings.update(yaml.safe_load(path.read_text()))
    path = folder / "run.yml"
    path.write_text(yaml.safe_dump({**settings, **more}))
    return path


def step_in(name: str, folder: Path) -> str:
    """A copy of a fixture's step, which the script gets by a relative path."""
    shutil.copytree(FIXTURES / name / "checkpoints", folder / "run")
    return f"run/{step_of(fixture(name)).name}"


def test_neox_to_hf(tree: Path, tmp_path: Path) -> None:
    name = "pythia_fp32_pp1_tp2"
    step = step_in(name, tmp_path)
    tokenizer(tmp_path / "tokenizer.json")
    yml = one_yml(name, tmp_path, vocab_file="tokenizer.json", tokenizer_type="HFTokenizer").name
    words = ["--input_dir", step, "--config_file", yml, "--output_dir", "hf", "--prec", "bf16"]
    command = f"{step} hf --to hf --config {yml} --dtype bf16 --tokenizer tokenizer.json"
    check(tree, TO_HF, *words, cwd=tmp_path, output="hf", command=command)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_neox_to_hf_of_llama(tree: Path, tmp_path: Path) -> None:
    """The script itself crashes if the MLP is not as wide as it thinks."""
    name = "llama_gqa_fp32_tp2"
    step = step_in(name, tmp_path)
    words = ["--input_dir", step, "--config_file", one_yml(name, tmp_path).name]
    words += ["--output_dir", "hf", "--architecture", "llama"]
    command = f"{step} hf --to hf --config run.yml"
    check(tree, TO_HF, *words, cwd=tmp_path, output="hf", command=command)


@pytest.mark.parametrize("name", ["2024-10", "today"])
def test_a_tokenizer_in_a_folder(name: str, trees: Mapping[str, Path], tmp_path: Path) -> None:
    tree = Path(shutil.copytree(trees[name], tmp_path / name))
    step = step_in("pythia_fp32_pp1_tp2", tmp_path)
    (tmp_path / "words").mkdir()
    tokenizer(tmp_path / "words" / "tokenizer.json")
    one_yml("pythia_fp32_pp1_tp2", tmp_path, vocab_file="words/vocab.json")
    words = ["--input_dir", step, "--config_file", "run.yml", "--output_dir", "hf"]
    command = f"{step} hf --to hf --config run.yml --tokenizer words"
    words += ["--vocab-is-hf-tokenizer"]
    check(tree, TO_HF, *words, cwd=tmp_path, output="hf", command=command)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--no_save_tokenizer"], "--no_save_tokenizer is not supported. Instead, delete the"),
        (["--pad-token-id", "3"], "--pad-token-id is not supported. Instead, set pad_token_id in"),
        (["--architecture", "mistral"], "Instead, give --architecture neox: the settings say so"),
        (["--config_file", ""], "this script needs --config_file"),
    ],
)
def test_neox_to_hf_refuses(words: list[str], message: str, today: Path, tmp_path: Path) -> None:
    apply(plan_scripts(today))
    step = step_in("pythia_fp32_pp1_tp2", tmp_path)
    one_yml("pythia_fp32_pp1_tp2", tmp_path)
    always = ["--input_dir", step, "--config_file", "run.yml", "--output_dir", "hf"]
    done = call(today, TO_HF, *always, *words, cwd=tmp_path)
    assert done.returncode == 1
    assert f"neox-bridge: {message}" in done.stderr or message in done.stderr
    assert not (tmp_path / "hf").exists()


def test_an_error_of_convert_is_the_script_s(today: Path, tmp_path: Path) -> None:
    apply(plan_scripts(today))
    step = step_in("pythia_fp32_pp1_tp2", tmp_path)
    one_yml("pythia_fp32_pp1_tp2", tmp_path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "notes").write_text("mine")
    words = ["--input_dir", step, "--config_file", "run.yml", "--output_dir", "hf"]
    done = call(today, TO_HF, *words, cwd=tmp_path)
    assert done.returncode == 1
    assert "error: hf " in done.stderr
    assert content(tmp_path / "hf") == {"notes": b"mine"}


def test_main_is_patched_for_those_who_import_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a stand-in: the real script imports megatron (tests/neox/test_scripts_neox.py)."""
    path = tmp_path / TO_HF
    file = plan_for(scripts_of("today")[TO_HF], tmp_path / "tree")
    path.write_bytes(file)
    step = step_in("pythia_fp32_pp1_tp2", tmp_path)
    one_yml("pythia_fp32_pp1_tp2", tmp_path)
    spec = importlib.util.spec_from_file_location("patched_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", SRC)
    words = ["--input_dir", step, "--config_file", "run.yml", "--output_dir", "hf"]
    with pytest.raises(SystemExit, match="overwrite_values is not supported"):
        module.main(words, {"num_layers": 3})
    module.main(words)
    assert "this script is patched and runs: neox-bridge convert" in capfd.readouterr().out
    assert (tmp_path / "hf" / "config.json").is_file()


def plan_for(text: str, tree: Path) -> bytes:
    """The patched text of a script."""
    (tree / FOLDER).mkdir(parents=True)
    (tree / "megatron" / "model").mkdir(parents=True)
    (tree / "megatron" / "model" / "positional_embeddings.py").write_text("")
    (tree / FOLDER / TO_HF).write_text(text)
    (file,) = plan_scripts(tree).files
    return file.new


def hub_model(folder: Path, **how: str) -> Path:
    """A folder that transformers takes for EleutherAI/tiny, and the yml of a layout."""
    layout = {"pipe-parallel-size": 1, "model_parallel_size": 2, "num_layers": 2}
    (folder / "layout.yml").write_text(json.dumps(layout))
    (folder / "more.yml").write_text("make-vocab-size-divisible-by: 64\n")
    return make_hf(folder / "EleutherAI" / "tiny", **how)


def test_hf_to_sequential(tree: Path, tmp_path: Path) -> None:
    hub_model(tmp_path)
    words = ["--hf-model-name", "tiny", "--output-dir", "runs/tiny/", "--cache-dir", "cache"]
    words += ["--config", "layout.yml", "more.yml", "--test", "--ckpt-tmp-dir", "unused"]
    command = f"EleutherAI/tiny runs/tiny --to neox --for neox:{tree} --tp 2 --pp 1"
    command += " --vocab-multiple 64"
    shown = check(tree, SEQUENTIAL, *words, cwd=tmp_path, output="runs/tiny", command=command)
    assert (tmp_path / "runs" / "latest").read_text() == "tiny/global_step0"
    assert "runs: neox-bridge verify EleutherAI/tiny runs/tiny --logits" in shown
    assert "the same model" in shown


def test_hf_to_sequential_of_ranks(today: Path, tmp_path: Path) -> None:
    hub_model(tmp_path)
    (tmp_path / "layout.yml").write_text('"rotary-save-freqs-buffer": true\n')
    (tmp_path / "latest").write_text("global_step7")
    words = ["--hf-model-name", "tiny", "--output-dir", "tiny", "--config", "layout.yml"]
    command = f"EleutherAI/tiny tiny --to neox --for neox:{today} --tp 1 --pp 0 --inv-freq store"
    shown = check(today, SEQUENTIAL, *words, cwd=tmp_path, output="tiny", command=command)
    assert (tmp_path / "latest").read_text() == "global_step7"
    assert "latest still names global_step7. Set load to tiny." in shown


def test_the_cache_of_an_earlier_download_is_read(today: Path, tmp_path: Path) -> None:
    model = hub_model(tmp_path)
    cache = tmp_path / "cache" / "tiny" / "step143000" / "models--EleutherAI--tiny"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "step143000").write_text("0123abcd")
    model.rename(cache / "snapshots" / "0123abcd")
    words = ["--hf-model-name", "tiny", "--output-dir", "tiny", "--config", "layout.yml"]
    words += ["--cache-dir", "cache"]
    source = "cache/tiny/step143000/models--EleutherAI--tiny/snapshots/0123abcd"
    command = f"{source} tiny --to neox --for neox:{today} --tp 2 --pp 1"
    check(today, SEQUENTIAL, *words, cwd=tmp_path, output="tiny", command=command)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--download-only"],
            "--download-only is not supported. Instead, run hf download EleutherAI/tiny "
            "--revision step143000.",
        ),
        (["--config", "te.yml"], "te_mha in the yml is not supported. Instead, run neox-bridge"),
        (["--config"], "this script needs --config."),
    ],
)
def test_hf_to_sequential_refuses(
    words: list[str], message: str, today: Path, tmp_path: Path
) -> None:
    apply(plan_scripts(today))
    (tmp_path / "layout.yml").write_text("pipe-parallel-size: 1\n")
    (tmp_path / "te.yml").write_text("te_mha: true\n")
    always = ["--hf-model-name", "tiny", "--output-dir", "tiny", "--config", "layout.yml"]
    done = call(today, SEQUENTIAL, *always, *words, cwd=tmp_path)
    assert (done.returncode, done.stderr.strip().partition(message)[0]) == (1, "neox-bridge: ")


def test_a_launcher_is_refused(today: Path, tmp_path: Path) -> None:
    apply(plan_scripts(today))
    words = ["--hf-model-name", "tiny", "--output-dir", "tiny", "--config", "layout.yml"]
    done = call(today, SEQUENTIAL, *words, cwd=tmp_path, WORLD_SIZE="4")
    assert done.returncode == 1
    assert "a launcher of several processes is not supported" in done.stderr


def test_the_hub_is_named_by_its_revision(today: Path, tmp_path: Path) -> None:
    """Without a network: the notice shows what convert was asked for."""
    apply(plan_scripts(today))
    (tmp_path / "layout.yml").write_text("pipe-parallel-size: 1\n")
    words = ["--hf-model-name", "tiny", "--output-dir", "x", "--config", "layout.yml"]
    words += ["--revision", "1000"]
    done = call(today, SEQUENTIAL, *words, cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert "runs: neox-bridge convert EleutherAI/tiny@step1000 x --to neox" in done.stdout
    assert done.returncode == 1


@pytest.mark.parametrize("name", [name for name in NAMES if name != "2024-03"])
def test_hf_llama(name: str, trees: Mapping[str, Path], tmp_path: Path) -> None:
    tree = Path(shutil.copytree(trees[name], tmp_path / name))
    make_hf(tmp_path / "hf", family="llama", num_key_value_heads=2)
    words = ["--tp", 2, "--model", "hf", "--model_path", "runs/llama"]
    command = f"hf runs/llama --to neox --for neox:{tree} --tp 2 --pp 0"
    script = "convert_hf_llama_to_neox.py"
    check(tree, script, *words, cwd=tmp_path, output="runs/llama", command=command)


def test_raw_llama(tree: Path, tmp_path: Path) -> None:
    script = "convert_raw_llama_weights_to_neox.py"
    (tmp_path / "meta").mkdir()
    write_raw(make_hf(tmp_path / "hf", family="llama"), tmp_path / "meta" / "7B", 2)
    words = ["--input_dir", "meta", "--output_dir", "out", "--num_output_shards", 2]
    command = f"meta/7B out --to neox --for neox:{tree} --tp 2 --pp 1"
    parallel = [*words, "--model_size", "7B", "--pipeline_parallel"]
    check(tree, script, *parallel, cwd=tmp_path, output="out", command=command)
    done = call(tree, script, *words, "--model_size", "tokenizer_only", cwd=tmp_path)
    assert "--model_size tokenizer_only is not supported. Instead, copy the" in done.stderr


def test_merge20b(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(fixture("pythia_fp32_pp2_tp2"), tmp_path / "in")
    step_of(tmp_path / "in").rename(tmp_path / "in" / "global_step150000")
    words = ["--input_dir", "in", "--output_dir", "out"]
    command = "in out --to neox --step 150000 --tp 1 --pp 1"
    check(tree, "merge20b.py", *words, cwd=tmp_path, output="out", command=command)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "2024-03"])
def test_mamba(name: str, trees: Mapping[str, Path], tmp_path: Path) -> None:
    tree = Path(shutil.copytree(trees[name], tmp_path / name))
    shutil.copytree(TESTS / "data" / "mamba" / "checkpoints", tmp_path / "run")
    one_yml(tmp_path / "run", tmp_path)
    words = ["--input_dir", "run/global_step2", "--config_file", "run.yml", "--output_dir", "hf"]
    command = "run/global_step2 hf --to hf --config run.yml --format mamba_ssm"
    script = "convert_neox_to_mamba_ssm.py"
    check(tree, script, *words, cwd=tmp_path, output="hf", command=command)


def test_neox_bridge_of_another_environment(today: Path, tmp_path: Path) -> None:
    """GPT-NeoX's Python does not need the package: the command is found on PATH."""
    apply(plan_scripts(today))
    step = step_in("pythia_fp32_pp1_tp2", tmp_path)
    one_yml("pythia_fp32_pp1_tp2", tmp_path)
    words = ["--input_dir", step, "--config_file", "run.yml", "--output_dir", "hf"]
    # -S: without the site-packages of the tests, where neox_bridge and what it needs may be
    command = [sys.executable, "-S", str(today / FOLDER / TO_HF), *words]
    shutil.copytree(Path(yaml.__file__).parent, tmp_path / "site" / "yaml")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "neox-bridge"
    start = f"import sys; sys.path[:0] = {[SRC, *sys.path]!r}"
    program.write_text(
        f"#!{sys.executable}\n{start}\nfrom neox_bridge.__main__ import main\nmain()\n"
    )
    program.chmod(0o755)
    without = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=without)
    assert done.returncode == 1
    assert "which is not installed. Install it, or restore the script" in done.stderr
    there = {**without, "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=there)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hf" / "config.json").is_file()
