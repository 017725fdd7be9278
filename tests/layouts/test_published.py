"""Raw checkpoints as they are published: the files of one step flat in a folder of any name."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from common import assert_same, convert, hf_logits, hf_tensors, neox_ranks
from published import PUBLISHED
from zero_writer import Save, made_up, write

from neox_bridge.cli.app import app
from neox_bridge.doctor.diagnose import judge
from neox_bridge.errors import BridgeError, SettingsMissing, UsageError
from neox_bridge.frameworks.targets import target_named
from neox_bridge.frameworks.writers import UNKNOWN, words_of, writer_of
from neox_bridge.layouts.checkpoint import Checkpoint, NeoxState
from neox_bridge.layouts.config_files import is_neox_config
from neox_bridge.layouts.file_names import optimizer_files
from neox_bridge.layouts.open import detect, open_checkpoint
from neox_bridge.layouts.run_tokenizer import with_tokenizer

FLAT = PUBLISHED / "v1_dp2" / "flat"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKENIZER = {"model": {"vocab": {f"token{number}": number for number in range(250)}}}


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def run_line(command: str) -> Result:
    """A command as it was printed."""
    words = shlex.split(command)
    assert words[0] == "neox-bridge"
    return run(*words[1:])


def command_in(message: str) -> str:
    """The command at the end of an error."""
    return "neox-bridge " + message.strip().rpartition(": neox-bridge ")[2]


def state_of(path: object, **options: Any) -> NeoxState:
    state = open_checkpoint(str(path), **options).neox
    assert state is not None
    return state


def said(checkpoint: Checkpoint) -> dict[str, str]:
    """The findings' severities by their codes."""
    return {finding.code: finding.severity for finding in checkpoint.findings}


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = torch.load(path, weights_only=False)
    change(value)
    torch.save(value, path)


def settings() -> dict[str, Any]:
    """The published yml's keys and values."""
    loaded: dict[str, Any] = yaml.safe_load((FLAT / "160M.yml").read_text())
    return loaded


def flattened(root: Path, target: Path) -> Path:
    """A run's step as it would be published: its files and its ymls in one folder."""
    step = root / (root / "latest").read_text()
    target.mkdir()
    for path in (*step.glob("*.pt"), *step.glob("configs/*")):
        shutil.copy(path, target)
    return target


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """A copy of a published step in a folder whose name tells nothing."""
    return Path(shutil.copytree(FLAT, tmp_path / "downloaded"))


@pytest.fixture
def bare(flat: Path) -> Path:
    """The same without its yml, which lies elsewhere as ``own.yml``."""
    elsewhere = flat.parent / "elsewhere"
    elsewhere.mkdir()
    (flat / "160M.yml").rename(elsewhere / "own.yml")
    return flat


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("published") / "hf"
    convert(FLAT, folder)
    return hf_tensors(folder)


# ---- the folder is a checkpoint, whatever its name


@pytest.mark.parametrize("name", ["v1_dp2", "v1_dp4_intervals"])
def test_logits_agree_with_gpt_neox_v1(name: str, tmp_path: Path) -> None:
    convert(PUBLISHED / name / "flat", tmp_path / "hf", dtype="float32")
    with np.load(PUBLISHED / name / "logits.npz") as file:
        tokens = torch.from_numpy(file["tokens"])
        logits = torch.from_numpy(file["logits_fp32"])
    computed = hf_logits(tmp_path / "hf", tokens)[..., : logits.shape[-1]]
    assert float((computed - logits).abs().max()) < 4e-6


def test_a_flat_folder_is_its_own_root(flat: Path) -> None:
    state = state_of(flat)
    assert (state.root, state.folder, state.flat) == (str(flat), str(flat), True)
    assert (state.step, state.iteration, state.named_step) == ("global_step8", 8, None)
    assert state.configs == (str(flat / "160M.yml"),)


@pytest.mark.parametrize(
    ("name", "is_flat"),
    [
        ("neox-ckpt-pythia-160m", True),
        (COMMIT, True),
        ("step8", True),
        ("main", True),
        ("with space", True),
        ("global_step8", False),
    ],
)
def test_any_name_is_opened(
    name: str, is_flat: bool, flat: Path, tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    source = flat.rename(tmp_path / name)
    (tmp_path / "latest").write_text("global_step3")  # is another run's
    state = state_of(source)
    assert (state.folder, state.flat, state.iteration) == (str(source), is_flat, 8)
    convert(source, tmp_path / "hf")
    assert_same(hf_tensors(tmp_path / "hf"), weights)


def test_flat_files_above_a_step_are_not_read(flat: Path) -> None:
    shutil.copytree(FLAT, flat / "global_step64")
    checkpoint = open_checkpoint(str(flat))
    assert checkpoint.neox is not None
    assert checkpoint.neox.folder == str(flat / "global_step64")
    assert said(checkpoint)["two-places"] == "warning"


def test_every_command_opens_it(flat: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "made").mkdir(parents=True)
    for words in (
        ("inspect", flat, "--json"),
        ("convert", flat, out / "hf"),
        ("convert", flat, out / "neox", "--to", "neox", "--tp", "1", "--pp", "0"),
        ("verify", flat, out / "hf"),
        ("verify", flat, out / "neox"),
        ("diff", flat, out / "neox"),
        ("audit", flat, "--cache", "none"),
        ("batch", flat, out / "batch"),
        ("export-optimizer", flat, out / "states"),
        ("reshard", flat, out / "resharded", "--dp", "1", "--for", "today"),
    ):
        done = run(*words)
        assert done.exit_code == 0, (words, done.output)
    assert (out / "neox" / "latest").read_text() == "global_step8"
    assert (out / "resharded" / "latest").read_text() == "global_step8"


@pytest.mark.parametrize("beside", [".git", "README.md", ".gitattributes", "config.json"])
def test_what_a_clone_of_the_hub_holds_too(
    beside: str, flat: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    if beside == ".git":
        (flat / ".git" / "objects").mkdir(parents=True)
        (flat / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    else:
        (flat / beside).write_text("{}")
    convert(flat, tmp_path / "hf")
    assert_same(hf_tensors(tmp_path / "hf"), weights)


def test_a_store_holds_it_flat(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    store = fsspec.filesystem("memory")
    for folder in ("published", "suite/step8"):
        for path in FLAT.iterdir():
            store.pipe(f"/{folder}/{path.name}", path.read_bytes())
    state = state_of("memory://published")
    assert (state.root, state.folder) == ("memory://published", "memory://published")
    assert state_of("memory://suite").folder == "memory://suite/step8"
    done = run("convert", "memory://published", tmp_path / "hf")
    assert done.exit_code == 0, done.output
    assert_same(hf_tensors(tmp_path / "hf"), weights)


def test_ranks_of_v1_without_pipeline(
    flat: Path, tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    """pipe_parallel_size 0: one file a rank, whose tensors are views of two flat storages."""
    module: dict[str, torch.Tensor] = {}
    for path in sorted(flat.glob("layer_*.pt")):
        layer = int(path.name[6:8])
        held = torch.load(path, weights_only=False)
        module |= {f"sequential.{layer}.{name}": tensor for name, tensor in held.items()}
        path.unlink()
    storage = torch.cat([tensor.flatten() for tensor in module.values()])
    start = 0
    for name, tensor in module.items():
        module[name] = storage[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    edit(flat / "mp_rank_00_model_states.pt", lambda value: value.update(module=module))
    assert detect(str(flat)) == "neox"
    (flat / "config.json").write_text("{}")  # which DeepSpeed's folders of a Trainer have
    assert state_of(flat).layout == "ranks"
    convert(flat, tmp_path / "hf")
    assert_same(hf_tensors(tmp_path / "hf"), weights)


@pytest.mark.parametrize(("tp", "pp"), [(3, 1), (1, 2), (3, 2)])
def test_ranks_and_stages(
    tp: int, pp: int, tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    convert(FLAT, tmp_path / "run", to="neox", tp=tp, pp=pp)
    source = flattened(tmp_path / "run", tmp_path / "published")
    state = state_of(source)
    assert (state.tp, state.pp, state.flat) == (tp, pp, True)
    convert(source, tmp_path / "hf", vocab_rows=256)
    assert_same(hf_tensors(tmp_path / "hf"), weights)
    convert(source, tmp_path / "again", to="neox", tp=1, pp=1, vocab_rows=256)
    convert(FLAT, tmp_path / "once", to="neox", tp=1, pp=1, vocab_rows=256)
    assert_same(neox_ranks(tmp_path / "again")[0], neox_ranks(tmp_path / "once")[0])


def test_deepspeeds_files_of_another_program_stay_refused(flat: Path) -> None:
    for path in (*flat.glob("layer_*"), flat / "160M.yml"):
        path.unlink()
    module = {"model.embed_tokens.weight": torch.ones(2, 2)}
    edit(flat / "mp_rank_00_model_states.pt", lambda value: value.update(module=module))
    with pytest.raises(BridgeError, match="a program other than GPT-NeoX"):
        open_checkpoint(str(flat))


def test_a_download_without_the_weights_is_named(flat: Path) -> None:
    for path in (*flat.glob("layer_*"), *flat.glob("mp_rank_*")):
        path.unlink()
    with pytest.raises(BridgeError, match="is not a complete GPT-NeoX checkpoint"):
        open_checkpoint(str(flat))


# ---- the settings


@pytest.mark.parametrize("name", ["160M.yaml", "pythia-19Mnew.yml", "config.new.json"])
def test_one_config_of_any_name(name: str, flat: Path) -> None:
    (flat / "160M.yml").unlink()
    (flat / name).write_text(json.dumps(settings()))  # JSON is yml
    assert state_of(flat).configs == (str(flat / name),)


def test_several_ymls_are_merged(flat: Path, tmp_path: Path) -> None:
    whole, expected = settings(), open_checkpoint(str(flat))
    (flat / "160M.yml").unlink()
    sizes = {key: whole.pop(key) for key in ("num-layers", "hidden-size", "num-attention-heads")}
    paths = {key: whole.pop(key) for key in ("vocab-file", "train-data-paths")}
    for name, part in (("a.yml", sizes), ("local_setup.yml", paths), ("z.yaml", whole)):
        (flat / name).write_text(yaml.safe_dump(part))
    merged = open_checkpoint(str(flat))
    assert (merged.raw, merged.config) == (expected.raw, expected.config)
    assert merged.neox is not None
    assert [os.path.basename(path) for path in merged.neox.configs] == [
        "a.yml", "local_setup.yml", "z.yaml",
    ]  # fmt: skip


FOREIGN = {
    "eval.yml": "tasks: [lambada_openai]\nnum_fewshot: 5\nbatch_size: 8\nseed: 1\n",
    "accelerate.yml": "distributed_type: DEEPSPEED\nmixed_precision: fp16\nnum_machines: 1\n"
    "deepspeed_config: {zero_stage: 1}\n",
    "environment.yml": "name: neox\nchannels: [conda-forge]\ndependencies: [python=3.8]\n",
    "trainer.yml": "lr: 0.1\nseed: 3\noptimizer: adam\nscheduler: cosine\nweight_decay: 0.0\n",
    "config.yaml": "model_type: gpt_neox\nhidden_size: 4096\nnum_hidden_layers: 2\nvocab_size: 7\n",
    "list.yml": "- num_layers\n",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_yml_is_named_and_not_merged(name: str, flat: Path) -> None:
    expected = open_checkpoint(str(flat))
    (flat / name).write_text(FOREIGN[name])
    (flat / ".github").mkdir()
    (flat / ".github" / "ci.yml").write_text("num_layers: 7\n")
    checkpoint = open_checkpoint(str(flat))
    assert checkpoint.raw == expected.raw
    messages = [f.message for f in checkpoint.findings if f.code == "yml-skipped"]
    assert len(messages) == 1
    assert str(flat / name) in messages[0]


@pytest.mark.parametrize("name", ["ds_config.json", "tokenizer.json", "results.json"])
def test_other_json_is_not_merged(name: str, flat: Path) -> None:
    expected = open_checkpoint(str(flat))
    deepspeed = {"train_batch_size": 3, "fp16": {"enabled": True}, "optimizer": {"type": "Lion"}}
    contents = {"tokenizer.json": TOKENIZER, "ds_config.json": deepspeed, "results.json": {"a": 1}}
    (flat / name).write_text(json.dumps(contents[name]))
    assert open_checkpoint(str(flat)).raw == expected.raw


@pytest.mark.parametrize(
    ("values", "answer"),
    [
        ({"data_path": "x", "vocab_file": "y"}, True),
        ({"num_layers": 1}, True),
        ({"pipe_parallel_size": 1, "unheard_of": 1}, True),
        ({"pipe_parallel_size": 1, "unheard_of": 1, "another": 2}, False),
        ({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}, False),
        ({}, False),
    ],
)
def test_configs_are_told_by_their_keys(values: dict[str, Any], answer: bool) -> None:
    assert is_neox_config(values) == answer


def test_a_yml_that_cannot_be_read(flat: Path) -> None:
    (flat / "other.yml").write_text("a: [1\n")
    assert said(open_checkpoint(str(flat)))["yml-skipped"] == "warning"
    (flat / "160M.yml").unlink()
    with pytest.raises(BridgeError, match=r"other\.yml, line 2: not valid YAML"):
        open_checkpoint(str(flat))


def test_the_ymls_of_two_models(flat: Path) -> None:
    other = {**settings(), "num-layers": 9}
    (flat / "70M.yml").write_text(yaml.safe_dump(other))
    done = run("inspect", flat)
    assert done.exit_code == 1
    assert "settings of two models" in done.stderr
    assert run("inspect", flat, "--config", flat / "160M.yml").exit_code == 0


def test_a_yml_that_leads_out_is_refused(flat: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.yml"
    (flat / "160M.yml").rename(secret)
    (flat / "160M.yml").symlink_to(secret)
    with pytest.raises(BridgeError, match="outside of"):
        open_checkpoint(str(flat))


COMMANDS: dict[str, tuple[str, ...]] = {
    "inspect": ("SRC",),
    "convert": ("SRC", "OUT"),
    "doctor": ("SRC", "--for", "today", "--fix", "OUT", "--drop-optimizer"),
    "verify": ("SRC", "REF"),
    "diff": ("REF", "SRC"),
    "export-optimizer": ("SRC", "OUT"),
    "reshard": ("SRC", "OUT", "--for", "today"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_without_a_yml_the_command_with_one_is_named(name: str, bare: Path, tmp_path: Path) -> None:
    """The error repeats the command that was typed, and works once the yml is filled in."""
    places = {"SRC": str(bare), "OUT": str(tmp_path / "out"), "REF": str(FLAT)}
    done = run(name, *(places.get(word, word) for word in COMMANDS[name]))
    assert done.exit_code == 1
    command = command_in(done.stderr)
    assert command.endswith("--config RUN.yml")
    done = run_line(command.replace("RUN.yml", str(tmp_path / "elsewhere" / "own.yml")))
    assert done.exit_code == 0, done.output


def test_a_yml_nearby_is_suggested(bare: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "own.yml").rename(tmp_path / "160M.yml")
    with pytest.raises(SettingsMissing) as error:
        open_checkpoint(str(bare))
    assert error.value.nearby == str(tmp_path / "160M.yml")
    assert f"`configs={error.value.nearby}`" in str(error.value)
    done = run_line(command_in(run("inspect", bare).stderr))
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("words", [("audit", "SRC", "--cache", "none"), ("batch", "SRC", "OUT")])
def test_many_checkpoints_without_a_yml(words: tuple[str, ...], bare: Path, tmp_path: Path) -> None:
    places = {"SRC": str(bare), "OUT": str(tmp_path / "out")}
    typed = [places.get(word, word) for word in words]
    done = run(*typed)
    assert done.exit_code != 0
    assert "--config RUN.yml" in done.stderr
    done = run(*typed, "--config", tmp_path / "elsewhere" / "own.yml")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("words", [("verify", "SRC", "SRC"), ("audit", "SRC")])
def test_a_yml_for_what_has_its_own_is_a_mistake(words: tuple[str, ...], flat: Path) -> None:
    typed = [str(flat) if word == "SRC" else word for word in words]
    done = run(*typed, "--config", flat / "160M.yml")
    assert done.exit_code == 2
    assert "--config" in done.stderr


@pytest.mark.parametrize("target", ["neox@2024-03", "neox@2024-09", "neox@2024-10", "today"])
def test_what_doctor_advises_works(target: str, bare: Path, tmp_path: Path) -> None:
    """Every command, as printed, with the yml that the user named: to fix, and to reshard."""
    own = tmp_path / "elsewhere" / "own.yml"
    done = run("doctor", bare, "--for", target, "--config", own)
    assert done.exit_code == 4
    lines = done.stdout.splitlines()
    fixes = {way for line in lines if "neox-bridge" in (way := line.partition("  fix  ")[2])}
    assert [command.split()[1] for command in fixes] == ["reshard"], "one command settles it all"
    commands = {f"neox-bridge {word}" for line in lines for word in line.split("neox-bridge ")[1:]}
    assert {command.split()[1] for command in commands} == {"doctor", "reshard"}
    for command in commands:
        made = run_line(command)
        assert made.exit_code == 0, (command, made.output)
        word = "fixed" if " doctor " in command else "resharded"
        assert run("doctor", f"{bare}-{word}", "--for", target).exit_code == 0, command


def test_configs_of_the_step_come_first(flat: Path) -> None:
    (flat / "configs").mkdir()
    (flat / "configs" / "run.yml").write_text((flat / "160M.yml").read_text())
    checkpoint = open_checkpoint(str(flat))
    assert checkpoint.neox is not None
    assert checkpoint.neox.configs == (str(flat / "configs" / "run.yml"),)
    assert said(checkpoint)["yml-skipped"] == "info"


# ---- the step


def test_a_name_that_contradicts_the_files(flat: Path, tmp_path: Path) -> None:
    source = flat.rename(tmp_path / "step5")
    checkpoint = open_checkpoint(str(source))
    assert checkpoint.neox is not None
    assert (checkpoint.neox.iteration, checkpoint.neox.named_step) == (8, 5)
    (finding,) = [f for f in checkpoint.findings if f.code == "step-differs"]
    assert finding.severity == "warning"
    assert "step 5 by its name" in finding.message
    assert "step 8 by its files" in finding.message
    convert(source, tmp_path / "out", to="neox")
    assert (tmp_path / "out" / "latest").read_text() == "global_step8"
    done = run("doctor", source, "--for", "today", "--fix", tmp_path / "fix", "--drop-optimizer")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "fix" / "latest").read_text() == "global_step8"
    assert (tmp_path / "fix" / "global_step8").is_dir()
    done = run("audit", source, "--cache", "none")
    assert "say that they are step 8" in done.stderr


@pytest.mark.parametrize("name", ["downloaded", "step8"])
def test_a_step_that_is_asked_for(name: str, flat: Path, tmp_path: Path) -> None:
    source = flat.rename(tmp_path / name)
    assert state_of(source, step=8).iteration == 8
    with pytest.raises(UsageError, match="is the folder of step 8, not of 7"):
        open_checkpoint(str(source), step=7)


def test_step_zero(flat: Path, tmp_path: Path) -> None:
    edit(flat / "mp_rank_00_model_states.pt", lambda value: value.update(iteration=0))
    checkpoint = open_checkpoint(str(flat))
    assert checkpoint.neox is not None
    assert (checkpoint.neox.iteration, checkpoint.neox.step) == (0, "global_step0")
    assert "step-unknown" not in said(checkpoint)
    source = flat.rename(tmp_path / "step8")
    assert (state_of(source).iteration, state_of(source).named_step) == (0, 8)
    assert said(open_checkpoint(str(source)))["step-differs"] == "warning"


def test_the_name_tells_what_the_files_do_not(flat: Path, tmp_path: Path) -> None:
    edit(flat / "mp_rank_00_model_states.pt", lambda value: value.pop("iteration"))
    assert said(open_checkpoint(str(flat)))["step-unknown"] == "warning"
    told = open_checkpoint(str(flat), step=7)
    assert told.neox is not None
    assert (told.neox.iteration, "step-unknown" in said(told)) == (7, False)
    assert state_of(flat.rename(tmp_path / "step1000")).iteration == 1000


# ---- copies of the Hub


def snapshot(tmp_path: Path, ref: str) -> Path:
    """A snapshot in a cache of the Hub, whose files are links into its blobs."""
    root = tmp_path / "models--EleutherAI--neox-ckpt-pythia-160m"
    folder = root / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / ref).write_text(COMMIT)
    for number, path in enumerate(sorted(FLAT.iterdir())):
        shutil.copy(path, root / "blobs" / f"{number:064}")
        (folder / path.name).symlink_to(f"../../blobs/{number:064}")
    return folder


def test_a_snapshot_of_the_hub(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    folder = snapshot(tmp_path, "step8")
    (folder.parent / "latest").write_text("global_step3")
    (folder.parent / "20B_tokenizer.json").write_text(json.dumps(TOKENIZER))
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.neox is not None
    assert (checkpoint.neox.root, checkpoint.neox.named_step) == (str(folder), 8)
    assert checkpoint.revision == "EleutherAI/neox-ckpt-pythia-160m@step8"
    assert checkpoint.tokenizer == ()
    convert(folder, tmp_path / "hf")
    assert_same(hf_tensors(tmp_path / "hf"), weights)
    cache = folder.parents[1]
    assert state_of(cache, revision="step8").folder == str(folder)
    found = json.loads(run("audit", cache, "--cache", "none", "--json").stdout)
    assert [step["step"] for step in found["steps"]] == [8]
    done = run("doctor", folder, "--for", "today", "--fix", tmp_path / "fix", "--drop-optimizer")
    assert done.exit_code == 0, done.output
    assert not any(path.is_symlink() for path in (tmp_path / "fix").rglob("*"))


def test_a_snapshot_with_configs_reads_nothing_above(tmp_path: Path) -> None:
    folder = snapshot(tmp_path, "main")
    (folder / "configs").mkdir()
    (folder / "configs" / "160M.yml").symlink_to(os.path.realpath(folder / "160M.yml"))
    (folder.parent / "latest").write_text(COMMIT)
    state = state_of(folder)
    assert (state.root, state.configs) == (str(folder), (str(folder / "configs" / "160M.yml"),))


def test_a_branch_that_holds_another_step(tmp_path: Path, flat: Path) -> None:
    checkpoint = open_checkpoint(str(snapshot(tmp_path, "step512")))
    (finding,) = [f for f in checkpoint.findings if f.code == "step-differs"]
    assert "neox-ckpt-pythia-160m@step512" in finding.message
    (flat / ".git").mkdir()
    (flat / ".git" / "HEAD").write_text("ref: refs/heads/step512\n")
    state = state_of(flat)
    assert (state.named_step, state.iteration) == (512, 8)
    (flat / ".git" / "HEAD").write_text(COMMIT)
    assert state_of(flat).named_step is None


# ---- runs


def make_run(root: Path, yml: str) -> Path:
    """A run of three flat steps. yml: "each" step has it, or where it lies in the run."""
    for step in (0, 4, 8):
        folder = Path(shutil.copytree(FLAT, root / f"step{step}"))

        def told(value: dict[str, Any], step: int = step) -> None:
            value.update(iteration=step, global_steps=step)

        edit(folder / "mp_rank_00_model_states.pt", told)
        for path in folder.glob("layer_*"):
            value = torch.load(path, weights_only=False)
            torch.save({name: tensor * (1 + step / 64) for name, tensor in value.items()}, path)
        if yml != "each":
            (folder / "160M.yml").unlink()
    if yml != "each":
        (root / yml).parent.mkdir(exist_ok=True)
        shutil.copy(FLAT / "160M.yml", root / yml)
    return root


@pytest.mark.parametrize("yml", ["each", "160M.yml", "configs/160M.yml"])
def test_runs_of_steps(yml: str, tmp_path: Path) -> None:
    root = make_run(tmp_path / "suite", yml)
    done = run("audit", root, "--cache", "none", "--json")
    found = json.loads(done.stdout)
    assert [step["step"] for step in found["steps"]] == [0, 4, 8]
    assert [f for f in found["findings"] if f["severity"] != "info"] == []
    assert not any(f["code"] == "left-out" for f in found["findings"])
    done = run("batch", root, tmp_path / "out", "--steps", "0,8")
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["step0", "step8"]
    assert state_of(root, step=4).iteration == 4
    assert state_of(root / "step4").iteration == 4
    with pytest.raises(BridgeError, match="step0, step4, step8"):
        open_checkpoint(str(root))


def test_one_tokenizer_for_all_steps(tmp_path: Path) -> None:
    for yml in ("each", "160M.yml"):
        root = make_run(tmp_path / yml, yml)
        (root / "20B_tokenizer.json").write_text(json.dumps(TOKENIZER))
        checkpoint = open_checkpoint(str(root / "step4"))
        assert checkpoint.tokenizer == (str(root / "20B_tokenizer.json"),)


# ---- the tokenizer


def test_the_tokenizer_beside(flat: Path, tmp_path: Path) -> None:
    (flat / "20B_tokenizer.json").write_text(json.dumps(TOKENIZER))
    checkpoint = open_checkpoint(str(flat))
    assert checkpoint.tokenizer == (str(flat / "20B_tokenizer.json"),)
    assert (checkpoint.tokenizer_size, checkpoint.missing_tokenizer) == (250, "")
    assert "tokenizer-missing" not in said(checkpoint)
    convert(flat, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "tokenizer.json").read_text()) == TOKENIZER
    done = run("doctor", flat, "--for", "neox@2024-03", "--fix", tmp_path / "fixed")
    assert done.exit_code == 0, done.output
    copies = [path.parent.name for path in (tmp_path / "fixed").rglob("*tokenizer.json")]
    assert copies == ["tokenizer"]


def test_the_usual_name_beside(flat: Path) -> None:
    (flat / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    assert open_checkpoint(str(flat)).tokenizer == (str(flat / "tokenizer.json"),)


def test_a_missing_tokenizer_is_named(flat: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(flat))
    assert checkpoint.missing_tokenizer == "/fsx/pile/20B_tokenizer.json"
    (finding,) = [f for f in checkpoint.findings if f.code == "tokenizer-missing"]
    assert "/fsx/pile/20B_tokenizer.json" in finding.message
    assert str(flat) in finding.remedy
    file = tmp_path / "20B_tokenizer.json"
    file.write_text(json.dumps(TOKENIZER))
    done = run("convert", flat, tmp_path / "hf", "--tokenizer", file)
    assert done.exit_code == 0, done.output
    assert "20B_tokenizer.json, which" not in done.stderr
    completed = with_tokenizer(checkpoint, (str(file),))
    assert (completed.tokenizer_size, completed.missing_tokenizer) == (250, "")
    assert "tokenizer-missing" not in said(completed)
    assert with_tokenizer(checkpoint, ()) is checkpoint


def test_another_kind_of_tokenizer_is_not_looked_for(flat: Path) -> None:
    path = flat / "160M.yml"
    path.write_text(path.read_text().replace("HFTokenizer", "GPT2BPETokenizer"))
    assert open_checkpoint(str(flat)).missing_tokenizer == ""


# ---- the writer


def test_the_writer_of_the_published_runs(flat: Path) -> None:
    writer = state_of(flat).writer
    assert (writer.program, writer.version) == ("GPT-NeoX", "v1.0")
    assert (writer.deepspeed, writer.deepspeed_version) == ("DeeperSpeed", "0.3.15")
    assert writer.evidence == ("no ds_version", "csr_tensor_module_names")
    assert writer.guessed == {"version", "deepspeed", "deepspeed_version"}
    words = "GPT-NeoX v1.0 with DeeperSpeed 0.3.15"
    assert words in run("inspect", flat).stdout
    assert words in run("doctor", flat).stdout
    facts = json.loads(run("inspect", flat, "--json").stdout)["neox"]
    assert facts["writer"]["deepspeed_version"] == "0.3.15"
    assert facts["writer"]["words"].startswith(words)
    assert (facts["flat"], facts["configs"]) == (True, [str(flat / "160M.yml")])


def test_later_writers_tell_their_version() -> None:
    folder = Path(__file__).parents[1] / "data" / "reshard" / "fp32"
    writer = state_of(folder).writer
    assert (writer.deepspeed, writer.guessed) == ("DeepSpeed", {"version"})
    assert writer.deepspeed_version.startswith("0.16.5")
    assert "sparse_tensor_module_names" in writer.evidence


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({}, "a tool that left no name"),
        ({"ds_version": 3}, "a tool that left no name"),
        ({"ds_version": "x" * 1000}, "a tool that left no name"),
        ({"ds_version": "0.5.1"}, "GPT-NeoX with DeepSpeed 0.5.1 (ds_version)"),
        ({"ds_version": "neox-bridge 0.1"}, "neox-bridge 0.1 (ds_version)"),
    ],
)
def test_what_is_said_of_other_writers(meta: dict[str, Any], words: str) -> None:
    assert words_of(writer_of(meta)) == words


def test_a_tool_that_left_a_record_is_the_writer() -> None:
    assert writer_of({"ds_version": "0.16.5"}, (), "neox-bridge 1").program == "neox-bridge"
    assert writer_of({}) == UNKNOWN


# ---- old names of the optimizer's files


def test_files_named_before_deepspeed_0_3_14(flat: Path, tmp_path: Path) -> None:
    for path in flat.glob("zero_*"):
        path.rename(path.with_name(path.name.replace("_optim_states", "optim_states")))
    checkpoint = open_checkpoint(str(flat))
    assert checkpoint.neox is not None
    assert len(checkpoint.neox.optimizer) == 2
    assert checkpoint.has_optimizer
    assert checkpoint.neox.writer.version == "before v1.0"
    for name, source in (("old", flat), ("new", FLAT)):
        done = run("export-optimizer", source, tmp_path / name)
        assert done.exit_code == 0, done.output
    assert_same(hf_tensors(tmp_path / "old"), hf_tensors(tmp_path / "new"))
    done = run("doctor", flat, "--for", "today", "--fix", tmp_path / "fix", "--drop-optimizer")
    assert done.exit_code == 0, done.output
    assert not list((tmp_path / "fix").rglob("zero_*"))


def test_ranks_are_in_the_order_of_their_numbers() -> None:
    ranks = [(mp, dp) for mp in range(2) for dp in range(12)]
    names = [f"zero_pp_rank_{dp}_mp_rank_{mp:02}_optim_states.pt" for mp, dp in ranks]
    assert sorted(names) != names
    assert optimizer_files(sorted(names)) == tuple(names)


# ---- doctor


def test_doctor_says_that_no_gpt_neox_finds_a_flat_folder(flat: Path, tmp_path: Path) -> None:
    path = flat / "160M.yml"
    path.write_text(path.read_text().replace('"gas": 1,', ""))
    verdict = judge(open_checkpoint(str(flat)), target_named("neox@2024-03"))
    assert verdict.answer == "fails"
    assert verdict.message.startswith(f"Unable to find latest file at {flat}/latest")
    done = run("doctor", flat, "--for", "neox@2024-03", "--fix", tmp_path / "fixed")
    assert done.exit_code == 0, done.output
    state = state_of(tmp_path / "fixed")
    assert (state.flat, state.optimizer) == (False, state_of(flat).optimizer)
    assert run("doctor", tmp_path / "fixed", "--for", "neox@2024-03").exit_code == 0
    assert run("verify", flat, tmp_path / "fixed").exit_code == 0
    assert not list((tmp_path / "fixed" / "global_step8").glob("*.yml"))


def test_in_place_makes_no_run_of_a_flat_folder(flat: Path) -> None:
    before = {path.name: path.read_bytes() for path in flat.iterdir()}
    done = run("doctor", flat, "--for", "today", "--in-place", "--drop-optimizer")
    assert done.exit_code == 4
    assert {path.name: path.read_bytes() for path in flat.iterdir()} == before
    done = run_line(command_in(done.stderr))
    assert done.exit_code == 0, done.output
    assert run("doctor", f"{flat}-fixed", "--for", "today").exit_code == 0


@pytest.mark.parametrize("name", ["step8", "global_step5"])
def test_in_place_and_the_name_of_a_step(name: str, tmp_path: Path) -> None:
    """A folder of GPT-NeoX's form keeps its name, whatever its files say; others are refused."""
    root = tmp_path / "run"
    shutil.copytree(FLAT, root / name)
    (root / name / "configs").mkdir()
    (root / name / "160M.yml").rename(root / name / "configs" / "160M.yml")
    (root / "latest").write_text(name)
    done = run("doctor", root, "--for", "today", "--in-place", "--drop-optimizer")
    if name == "step8":
        assert done.exit_code == 4
        done = run_line(command_in(done.stderr))
        root = Path(f"{root}-fixed")
    assert done.exit_code == 0, done.output
    assert run("doctor", root, "--for", "today").exit_code == 0
    assert (root / "latest").read_text() == {"step8": "global_step8"}.get(name, name)


def test_transformers_has_nothing_to_say_of_the_optimizer(flat: Path, tmp_path: Path) -> None:
    done = run("doctor", flat, "--for", "transformers@4.48")
    commands = [c for line in done.stdout.splitlines() for c in line.split("  fix  ")[1:]]
    assert [c.split()[1] for c in commands if c.startswith("neox-bridge")] == ["convert"]
    assert "optimizer states" not in done.stdout


# ---- files that are missing


def _without(folder: Path, *patterns: str) -> Path:
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()
    return folder


@pytest.mark.parametrize("lost", ["mp_rank_00", "mp_rank_03"])
def test_missing_mp_rank_files(lost: str, tmp_path: Path) -> None:
    """They hold no weights, so that conversion goes on; what resumes a run is refused."""
    stages = [range(3), range(3, 100)]
    source = write(made_up(tp=2, layers=2), Save(stages=stages), tmp_path / "step8")
    expected = state_of(source)
    _without(source, f"{lost}_*")
    state = state_of(source)
    name = f"{lost}_model_states.pt"
    assert (state.missing_ranks, state.pp) == ((name,), expected.pp)
    done = run("convert", source, tmp_path / "hf")
    assert done.exit_code == 0
    assert f"{source} is incomplete: {name} missing" in done.stderr
    for words in (
        ("export-optimizer", source, tmp_path / "states"),
        ("reshard", source, tmp_path / "new", "--for", "today"),
        ("inspect", source, "--optimizer"),
        ("doctor", source, "--for", "neox@2024-03", "--fix", tmp_path / "fixed"),
    ):
        done = run(*words)
        assert done.exit_code == 1, (words, done.output)
        assert f"{source} is incomplete: {name} missing" in done.stderr, words
    assert not (tmp_path / "fixed").exists()
    done = run("doctor", source)
    assert done.exit_code == 4
    assert "neox-bridge reshard" not in done.stdout
    errors = [line for line in done.stdout.splitlines() if line.startswith(("error:", "  why"))]
    assert sum(" mp_rank" in line for line in errors) == 1
    assert "neox-bridge doctor" not in done.stdout


def test_no_mp_rank_file_at_all(flat: Path) -> None:
    _without(flat, "mp_rank_*")
    assert state_of(flat).missing_ranks == ("mp_rank_00_model_states.pt",)
    done = run("doctor", flat)
    assert done.exit_code == 4
    assert "neox-bridge reshard" not in done.stdout
    assert f"{flat} is incomplete: mp_rank_00_model_states.pt missing" in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lost", "is incomplete: zero_pp_rank_1_mp_rank_00_optim_states.pt missing, of 2 data-par"),
        ("added", "more ranks than the 2 of its mp_rank files: zero_pp_rank_2_mp_rank_00"),
    ],
)
def test_optimizer_files_that_are_not_those_of_the_run(
    change: str, message: str, flat: Path
) -> None:
    """inspect and doctor say so too, by the names alone, and advise nothing that fails."""
    name = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    if change == "lost":
        (flat / name.format(1)).unlink()
    else:
        shutil.copy(flat / name.format(1), flat / name.format(2))
    done = run("inspect", flat)
    assert done.exit_code == 0
    assert message in done.stdout
    assert "states of 2 data-parallel ranks" in done.stdout
    assert "neox-bridge reshard" not in done.stdout
    done = run("doctor", flat)
    assert done.exit_code == 4
    assert message in done.stdout
    assert "neox-bridge reshard" not in done.stdout
    assert run("export-optimizer", flat, f"{flat}-states").exit_code == 1


def test_files_of_another_layout_are_removed_by_the_command_as_printed(tmp_path: Path) -> None:
    source = write(made_up(layers=2), Save(), tmp_path / "with space")
    shutil.copy(source / "mp_rank_00_model_states.pt", source / "mp_rank_01_model_states.pt")
    done = run("doctor", source)
    (command,) = re.findall(r"^  (?:fix|then)  +(rm .*)$", done.stdout, re.M)
    words = shlex.split(command)
    assert words == ["rm", str(source / "mp_rank_01_model_states.pt")]


def test_an_empty_folder(tmp_path: Path) -> None:
    done = run("inspect", tmp_path)
    assert done.exit_code == 1
    assert "no layer_*-model_*-model_states.pt). The folder is empty." in done.stderr


@pytest.mark.parametrize("told", ["row", None])
def test_an_output_layer_divided_by_its_columns(told: str | None, tmp_path: Path) -> None:
    """GPT-NeoX v1.0's default at several tensor-parallel ranks, which later trees refuse."""
    source = write(made_up(tp=2, layers=1), Save(), tmp_path / "x")
    for path in source.glob("layer_05-*"):
        torch.save({"final_linear.weight": torch.zeros(32, 8).half()}, path)
    if told:
        with (source / "run.yml").open("a") as file:
            file.write(f"output-layer-parallelism: {told}\n")
    done = run("convert", source, tmp_path / "hf")
    assert done.exit_code == 4
    assert f"{source}: the columns of final_linear.weight are split over 2" in done.stderr
    assert ("output_layer_parallelism: row" if told else "row by default") in done.stderr
