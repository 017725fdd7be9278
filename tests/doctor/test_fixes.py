"""What --fix and --in-place write: it loads where it should, and the weights are the same bits."""

import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from click.testing import CliRunner
from common import (
    GPT_NEOX,
    assert_same,
    convert,
    fixture,
    hf_tensors,
    make_hf,
    neox_config,
    neox_files,
    neox_ranks,
    step_of,
)
from safetensors.torch import load_file, save_file

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.doctor import fixes
from neox_bridge.doctor.diagnose import judge
from neox_bridge.errors import Refused, Unverified
from neox_bridge.execution import exchange as swapping
from neox_bridge.frameworks.changes import change_named
from neox_bridge.frameworks.eras import era_named
from neox_bridge.frameworks.targets import target_named
from neox_bridge.layouts.derived_values import inv_freq

ERA_NAMES = ("2024-03", "2024-09", "2024-10", "today")
LINEAR = {
    f"{old}.{part}": f"{new}.{part}"
    for old, new in change_named("neox-mlp-names").renames.items()
    for part in ("weight", "bias")
}


def doctor(*args: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["doctor", *map(str, args)])
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.stderr


def answer(path: Path, target: str) -> str:
    return judge(open_checkpoint(str(path)), target_named(target)).answer


def neox(folder: Path, era: str = "today", **options: Any) -> Path:
    """A converted model with heads of 12 dimensions, 6 of them rotated, and no tokenizer."""
    source = make_hf(folder / "source", num_attention_heads=4)
    convert(source, folder / "neox", era=era_named(era), **options)
    return folder / "neox"


def weights(root: Path) -> list[dict[str, torch.Tensor]]:
    """Learned tensors of each rank under the names of today."""
    return [
        {
            LINEAR.get(key.partition(".")[2], key.partition(".")[2]) + key.partition(".")[0]: value
            for key, value in rank.items()
            if "inv_freq" not in key
        }
        for rank in neox_ranks(root)
    ]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def edit_yml(root: Path, **keys: Any) -> None:
    (path,) = (step_of(root) / "configs").glob("*.yml")
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **keys}))


# ---- GPT-NeoX


@pytest.mark.parametrize("era", ERA_NAMES)
@pytest.mark.parametrize("name", GPT_NEOX)
def test_every_fixture_for_every_tree(
    name: str, era: str, tmp_path: Path, trees: Mapping[str, Path]
) -> None:
    """Fixed, it loads, with the same bits; where it loads already nothing is to fix."""
    source, target = fixture(name), f"neox:{trees[era]}"
    before = digests(source)
    loaded = answer(source, target) == "loads"
    held = any("optim_states" in path for path in before)
    flags = ["--drop-optimizer"] if held else []
    text = doctor(source, "--for", target, "--fix", tmp_path / "out", *flags)
    assert digests(source) == before
    if loaded:
        assert text.startswith("nothing to fix")
        return
    out = tmp_path / "out"
    assert answer(out, target) == "loads"
    for ours, theirs in zip(weights(out), weights(source), strict=True):
        assert_same(ours, theirs)
    assert doctor(out, "--for", target, "--fix", tmp_path / "again").startswith("nothing to fix")


def listed(*args: object) -> dict[str, dict[str, Any]]:
    """What --dry-run lists, by the path of the file; it writes nothing."""
    facts = json.loads(doctor(*args, "--dry-run", "--json"))["fixed"]
    assert not Path(facts["path"]).exists() or "--in-place" in args
    return {change["path"]: change for change in facts["changes"]}


def edits(change: dict[str, Any], kind: str) -> set[tuple[str, str, int]]:
    return {(e["before"], e["after"], e["count"]) for e in change["edits"] if e["kind"] == kind}


@pytest.mark.parametrize("pp", [0, 1])
@pytest.mark.parametrize(("era", "target"), [("2024-03", "today"), ("today", "neox@2024-03")])
def test_changes_are_listed_before_anything_is_written(
    era: str, target: str, pp: int, tmp_path: Path
) -> None:
    """Each key that differs afterwards, in the file that has it, with its shape, old and new."""
    root = neox(tmp_path, era, pp=pp)
    edit_yml(root, gas=4)
    before = {key: list(value.shape) for key, value in neox_ranks(root)[0].items()}
    changes = listed(root, "--for", target, "--fix", tmp_path / "out")
    text = doctor(root, "--for", target, "--fix", tmp_path / "out")
    after = {key: list(value.shape) for key, value in neox_ranks(tmp_path / "out")[0].items()}
    layers = [c for c in changes.values() if any("mlp." in e["before"] for e in c["edits"])]
    assert len(layers) == (1 if pp == 0 else 2)
    old, new = (
        {f"{k.partition('.')[2]} {v}" for k, v in side.items() if k.partition(".")[2] not in other}
        for side, other in (
            (before, {key.partition(".")[2] for key in after}),
            (after, {key.partition(".")[2] for key in before}),
        )
    )
    for change in layers:
        assert {b for b, _, _ in edits(change, "renamed") | edits(change, "removed")} == old
        assert {a for _, a, _ in edits(change, "renamed") | edits(change, "added")} == new
        assert {count for _, _, count in edits(change, "renamed")} == {2 if pp == 0 else 1}
    for edit in layers[0]["edits"]:
        times = " (2 times)" if pp == 0 else ""
        shown = " → ".join(filter(None, (edit["before"], edit["after"])))
        assert re.search(rf"^  {edit['kind']} +{re.escape(shown + times)}$", text, re.M), shown
    yml = changes["global_step0/configs/neox_bridge.yml"]
    keys = edits(yml, "removed") | edits(yml, "changed") | edits(yml, "added")
    assert ("gas: 4", "", 1) in keys
    wanted = {k for k in neox_config(root) if neox_config(tmp_path / "out").get(k) is None}
    assert {b.partition(":")[0] for b, _, _ in edits(yml, "removed")} == wanted
    assert text.index("gas: 4") < text.index("fixed ")


def test_listed_changes_are_those_of_files(tmp_path: Path) -> None:
    """Every file that differs is listed, and no other."""
    root = neox(tmp_path, "2024-03")
    states = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": {"ds_version": "0.16.5"}}, step_of(root) / states)
    changes = listed(root, "--for", "today", "--in-place", "--drop-optimizer")
    before = digests(root)
    doctor(root, "--for", "today", "--in-place", "--drop-optimizer")
    after = digests(root)
    differing = {path for path in before | after if before.get(path) != after.get(path)}
    removed = {f"global_step0/{p}" for p, c in changes.items() if c["kind"] == "removed"}
    assert removed == {f"global_step0/{states}"}
    rewritten = {path for path, change in changes.items() if change["kind"] == "rewritten"}
    assert differing - rewritten - removed == {
        path for path, change in changes.items() if change["kind"] in ("changed", "added")
    }


def test_there_and_back_is_the_same_checkpoint(tmp_path: Path) -> None:
    root = neox(tmp_path, "2024-03", tp=2)
    doctor(root, "--for", "today", "--fix", tmp_path / "new")
    doctor(tmp_path / "new", "--for", "neox@2024-03", "--fix", tmp_path / "old")
    for ours, theirs in zip(neox_ranks(tmp_path / "old"), neox_ranks(root), strict=True):
        assert list(ours) == list(theirs)
        assert_same(ours, theirs)


def test_only_what_must_change_is_written(tmp_path: Path) -> None:
    root = neox(tmp_path)
    (step_of(root) / "configs" / "zz.yml").write_text("num_layers: 2\n")
    (step_of(root) / "notes.txt").write_text("mine")
    text = doctor(root, "--for", "today", "--fix", tmp_path / "out")
    assert "layer_" not in text
    assert "mp_rank_" not in text
    before, after = digests(step_of(root)), digests(step_of(tmp_path / "out"))
    del before["configs/zz.yml"]
    for changed in (
        "configs/neox_bridge.yml",
        "neox_bridge.json",
    ):  # its hashes are of the new ones
        assert before.pop(changed) != after.pop(changed)
    assert after == before
    assert neox_config(tmp_path / "out") == neox_config(root)
    assert answer(tmp_path / "out", "today") == "loads"


def test_unknown_keys_go_and_paths_stay(tmp_path: Path) -> None:
    root = neox(tmp_path, "2024-03")
    edit_yml(root, rotary_save_freqs_buffer=True, data_path="/data/mine")
    text = doctor(root, "--for", "neox@2024-03", "--fix", tmp_path / "out")
    assert "dropped: yml: rotary_save_freqs_buffer" in text
    settings = neox_config(tmp_path / "out")
    assert "rotary_save_freqs_buffer" not in settings
    assert settings["data_path"] == "/data/mine"


def test_the_yml_is_corrected_by_what_the_files_say(tmp_path: Path) -> None:
    root = neox(tmp_path, tp=2)
    edit_yml(root, make_vocab_size_divisible_by=1, model_parallel_size=1, pipe_parallel_size=0)
    assert answer(root, "today") == "fails"
    doctor(root, "--fix", tmp_path / "out")
    assert answer(tmp_path / "out", "today") == "loads"
    settings = neox_config(tmp_path / "out")
    assert (settings["model_parallel_size"], settings["pipe_parallel_size"]) == (2, 1)
    assert settings["make_vocab_size_divisible_by"] == 150  # of 300 rows on two ranks


def test_rows_that_the_tokenizer_doesn_t_give(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "source")
    vocabulary = {f"t{i}": i for i in range(290)}
    (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    root = tmp_path / "neox"
    convert(source, root, vocab_multiple=300)
    assert answer(root, "today") == "loads"
    tokenizer = root / "tokenizer" / "tokenizer.json"
    vocabulary.update({f"t{i}": i for i in range(290, 310)})
    tokenizer.write_text(json.dumps({"model": {"vocab": vocabulary}}))
    assert answer(root, "today") == "fails"
    changes = listed(root, "--for", "today", "--fix", tmp_path / "out")
    doctor(root, "--for", "today", "--fix", tmp_path / "out")
    assert answer(tmp_path / "out", "today") == "loads"
    old, new = neox_ranks(root)[0], neox_ranks(tmp_path / "out")[0]
    for name, number in (("word_embeddings.weight", 0), ("final_linear.weight", 6)):
        change = changes[f"global_step0/layer_{number:02}-model_00-model_states.pt"]
        shapes = [list(side[f"{number}.{name}"].shape) for side in (old, new)]
        assert edits(change, "changed") == {(f"{name} {shapes[0]}", f"{shapes[1]}", 1)}
    args = changes["global_step0/mp_rank_00_model_states.pt"]
    assert ("padded_vocab_size: 300", f"{shapes[1][0]}", 1) in edits(args, "changed")
    assert torch.equal(new["0.word_embeddings.weight"][:300], old["0.word_embeddings.weight"])


@pytest.mark.parametrize("era", ["2024-09", "today"])
def test_a_flag_that_asks_for_the_buffer(tmp_path: Path, era: str) -> None:
    """Stored and said so: kept. Stored and not said, or said and not stored: neither afterwards."""
    said = neox(tmp_path, era, inv_freq="store")
    assert doctor(said, "--for", f"neox@{era}", "--fix", tmp_path / "o").startswith("nothing")
    edit_yml(said, rotary_save_freqs_buffer=False)
    doctor(said, "--for", f"neox@{era}", "--fix", tmp_path / "a")
    assert not any("inv_freq" in key for key in neox_ranks(tmp_path / "a")[0])
    other = neox(tmp_path / "other", era)
    edit_yml(other, rotary_save_freqs_buffer=True)
    doctor(other, "--for", f"neox@{era}", "--fix", tmp_path / "b")
    assert neox_config(tmp_path / "b")["rotary_save_freqs_buffer"] is False
    assert [answer(tmp_path / n, f"neox@{era}") for n in "ab"] == ["loads", "loads"]


@pytest.mark.parametrize("pp", [0, 1])
def test_a_deviating_buffer_isn_t_lost_in_silence(tmp_path: Path, pp: int) -> None:
    root = neox(tmp_path, "2024-03", pp=pp)
    edit_yml(root, rotary_emb_base=20000)
    assert answer(root, "neox@2024-03") == "loads with warnings"
    for target in ("neox@2024-09", "today"):
        error = doctor(root, "--for", target, "--fix", tmp_path / "out", code=4)
        assert "--recompute" in error
        assert "inv_freq" in error
        assert not (tmp_path / "out").exists()
    same = doctor(root, "--for", "neox@2024-03", "--fix", tmp_path / "out")
    assert same.startswith("nothing to fix")
    doctor(root, "--for", "today", "--fix", tmp_path / "new", "--recompute")
    assert answer(tmp_path / "new", "today") == "loads"
    doctor(root, "--for", "neox@2024-03", "--fix", tmp_path / "out", "--recompute")
    assert answer(tmp_path / "out", "neox@2024-03") == "loads"
    config = open_checkpoint(str(tmp_path / "out")).config
    stored = neox_ranks(tmp_path / "out")[0]["2.attention.rotary_emb.inv_freq"]
    assert torch.equal(stored, torch.from_numpy(inv_freq(config)))


@pytest.mark.parametrize("name", ["zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_optimizer_states(tmp_path: Path, name: str) -> None:
    root = neox(tmp_path, "2024-03")
    torch.save({"optimizer_state_dict": {"ds_version": "0.16.5"}}, step_of(root) / name)
    states = (step_of(root) / name).read_bytes()
    # a buffer only: they stay, and so does the file that goes with them
    doctor(root, "--for", "neox@2024-09", "--fix", tmp_path / "kept")
    kept = step_of(tmp_path / "kept")
    assert (kept / name).read_bytes() == states
    first = "mp_rank_00_model_states.pt"
    assert (kept / first).read_bytes() == (step_of(root) / first).read_bytes()
    assert answer(tmp_path / "kept", "neox@2024-09") == "loads"
    # other names: only without them
    error = doctor(root, "--for", "today", "--fix", tmp_path / "out", code=4)
    assert "--drop-optimizer" in error
    text = doctor(root, "--for", "today", "--fix", tmp_path / "out", "--drop-optimizer")
    assert f"dropped: global_step0/{name}: optimizer states" in text
    assert not (step_of(tmp_path / "out") / name).exists()


def test_left_over_files_of_a_layers_checkpoint(tmp_path: Path) -> None:
    root = neox(tmp_path, tp=1, pp=1)
    larger = neox(tmp_path / "larger", tp=1, pp=2)
    shutil.copy(step_of(larger) / "mp_rank_01_model_states.pt", step_of(root))
    assert answer(root, "today") == "fails"
    text = doctor(root, "--for", "today", "--fix", tmp_path / "out")
    assert "mp_rank_01_model_states.pt: left over" in text
    assert answer(tmp_path / "out", "today") == "loads"
    assert sorted(neox_files(tmp_path / "out")) == sorted(neox_files(neox(tmp_path / "right")))


def test_what_the_target_can_t_hold_is_refused(tmp_path: Path) -> None:
    convert(make_hf(tmp_path / "hf", intermediate_size=200), tmp_path / "neox")
    error = doctor(tmp_path / "neox", "--for", "neox@2024-09", "--fix", tmp_path / "o", code=4)
    assert "four times" in error


def test_the_other_kind_is_a_conversion(tmp_path: Path) -> None:
    root = neox(tmp_path)
    error = doctor(root, "--for", "transformers@4.48", "--fix", tmp_path / "out", code=1)
    assert f"neox-bridge convert {root} {root}-hf --for transformers@4.48" in error
    error = doctor(tmp_path / "source", "--for", "today", "--fix", tmp_path / "out", code=1)
    assert "neox-bridge convert" in error


# ---- Hugging Face


def old_hf(tmp_path: Path, deviate: float = 0.0) -> Path:
    """A folder as transformers 4.30 saved it, with files of the user's own beside."""
    folder = make_hf(tmp_path / "hf", num_attention_heads=4)
    convert(folder, tmp_path / "both", to="hf")
    shutil.rmtree(folder)
    shutil.move(tmp_path / "both", folder)
    values = torch.from_numpy(inv_freq(open_checkpoint(str(folder)).config)) + deviate
    tensors = load_file(folder / "model.safetensors")
    for i in range(2):
        layer = f"gpt_neox.layers.{i}.attention."
        tensors[f"{layer}bias"] = torch.ones(1, 1, 32, 32, dtype=torch.bool)
        tensors[f"{layer}masked_bias"] = torch.tensor(-1e9)
        tensors[f"{layer}rotary_emb.inv_freq"] = values.clone()
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    raw = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "dtype"):
        del raw[key]
    raw["mine"] = 1
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("mine")
    return folder


def test_an_old_folder_loses_buffers_and_gains_spellings(tmp_path: Path) -> None:
    folder = old_hf(tmp_path)
    before = torch.load(folder / "pytorch_model.bin")
    doctor(folder, "--for", "transformers@5.5", "--fix", tmp_path / "out")
    out = tmp_path / "out"
    after = hf_tensors(out)
    assert_same(after, {k: before[k] for k in after})
    lost = set(before) - set(after)
    assert len(lost) == 6
    assert all(k.endswith(("inv_freq", ".attention.bias", "masked_bias")) for k in lost)
    raw = json.loads((out / "config.json").read_text())
    assert raw["mine"] == 1
    assert raw["rope_parameters"]["partial_rotary_factor"] == raw["rotary_pct"] == 0.5
    assert raw["dtype"] == raw["torch_dtype"] == "float32"
    assert (out / "sub" / "notes.txt").read_text() == "mine"
    assert not (out / "pytorch_model.bin").exists()
    assert doctor(out, "--fix", tmp_path / "again").startswith("nothing to fix")


def test_changes_of_an_old_folder_are_listed(tmp_path: Path) -> None:
    folder = old_hf(tmp_path)
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")  # git's files are neither copied nor listed
    changes = listed(folder, "--for", "transformers@5.5", "--fix", tmp_path / "out")
    assert not any(".git" in path for path in changes)
    old = changes["pytorch_model.bin"]
    assert old["kind"] == "removed"
    layer = "gpt_neox.layers.*.attention."
    assert edits(old, "removed") == {
        (f"{layer}bias [1, 1, 32, 32]", "", 2),
        (f"{layer}masked_bias []", "", 2),
        (f"{layer}rotary_emb.inv_freq [3]", "", 2),
    }
    config = changes["config.json"]
    assert ("", 'dtype: "float32"', 1) in edits(config, "added")
    assert (changes["model.safetensors"]["kind"], changes["model.safetensors"]["edits"]) == (
        "added",
        [],
    )
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"vocab_size": 400}))
    config = listed(folder, "--fix", tmp_path / "out")["config.json"]
    assert ("vocab_size: 400", "300", 1) in edits(config, "changed")


def test_one_spelling_only_rewrites_config_json(tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "hf")
    assert answer(folder, "transformers@4.48") == "fails"
    before = digests(folder)
    doctor(folder, "--for", "transformers@4.48", "--fix", tmp_path / "out")
    after = digests(tmp_path / "out")
    assert {k for k in after if after[k] != before.get(k)} == {
        "config.json",
        "neox_bridge.json",
    }
    assert set(after) == {*before, "neox_bridge.json"}
    assert answer(tmp_path / "out", "transformers@4.48") == "loads"


def test_a_size_and_a_missing_key_of_config_json(tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "hf", attention_bias=False)
    raw = json.loads((folder / "config.json").read_text())
    raw["vocab_size"] = 400
    del raw["attention_bias"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert answer(folder, "transformers@5.24") == "fails"
    doctor(folder, "--for", "transformers@5.24", "--fix", tmp_path / "out")
    assert answer(tmp_path / "out", "transformers@5.24") == "loads"
    doctor(folder, "--for", "transformers@4.36", "--fix", tmp_path / "old", code=4)


def test_the_head_s_new_name(tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    doctor(folder, "--for", "transformers@4.48", "--fix", tmp_path / "out")
    assert answer(tmp_path / "out", "transformers@4.48") == "loads"
    assert "embed_out.weight" in hf_tensors(tmp_path / "out")


def test_a_deviating_inv_freq_of_hugging_face(tmp_path: Path) -> None:
    folder = old_hf(tmp_path, deviate=0.1)
    assert answer(folder, "transformers@4.30") == "loads with warnings"
    assert "--recompute" in doctor(folder, "--fix", tmp_path / "out", code=4)
    doctor(folder, "--fix", tmp_path / "out", "--recompute")
    assert answer(tmp_path / "out", "transformers@4.30") == "loads"


# ---- in place


def test_in_place_replaces_one_step_and_nothing_else(tmp_path: Path) -> None:
    root = neox(tmp_path, "2024-03", tp=2)
    shutil.copytree(step_of(root), root / "global_step7")
    (step_of(root) / "notes.txt").write_text("mine")
    before, old = digests(root), weights(root)
    doctor(root, "--for", "today", "--in-place")
    after = digests(root)
    assert set(after) == set(before)
    outside = {k: v for k, v in after.items() if not k.startswith("global_step0/")}
    assert outside == {k: before[k] for k in outside}
    assert after["global_step0/notes.txt"] == before["global_step0/notes.txt"]
    assert answer(root, "today") == "loads"
    for ours, theirs in zip(weights(root), old, strict=True):
        assert_same(ours, theirs)
    assert doctor(root, "--for", "today", "--in-place").startswith("nothing to fix")


def test_in_place_of_a_hugging_face_folder(tmp_path: Path) -> None:
    folder = old_hf(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(folder)
    doctor(link, "--for", "transformers@4.48", "--in-place")
    assert link.is_symlink()
    assert answer(link, "transformers@4.48") == "loads"
    assert (folder / "sub" / "notes.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "link"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_failure_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    root = neox(tmp_path, "2024-03")
    before = digests(root)
    if not exchange:
        monkeypatch.setattr(swapping, "_exchange", lambda *_: False)
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if not exchange and str(target).endswith("global_step0") and ".old" not in str(source):
            raise OSError("no")
        real(source, target)

    def broken(*_args: Any) -> bool:
        raise OSError("no")

    if exchange:
        monkeypatch.setattr(swapping, "_exchange", broken)
    monkeypatch.setattr(os, "rename", rename)
    doctor(root, "--for", "today", "--in-place", code=1)
    assert digests(root) == before
    assert [p.name for p in root.iterdir() if p.name.startswith(".")] == []


def test_in_place_without_the_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = neox(tmp_path, "2024-03")
    monkeypatch.setattr(swapping, "_exchange", lambda *_: False)
    doctor(root, "--for", "today", "--in-place")
    assert answer(root, "today") == "loads"
    assert [p.name for p in root.iterdir() if p.name.startswith(".")] == []


def test_a_step_named_by_its_folder(tmp_path: Path) -> None:
    root = neox(tmp_path, "2024-03")
    doctor(step_of(root), "--for", "today", "--in-place")
    assert answer(root, "today") == "loads"


def test_fixed_as_json(tmp_path: Path) -> None:
    root = neox(tmp_path, "2024-03")
    facts = json.loads(doctor(root, "--for", "today", "--fix", tmp_path / "out", "--json"))
    assert facts["fixed"]["path"] == str(tmp_path / "out")
    facts = json.loads(doctor(tmp_path / "out", "--for", "today", "--fix", "x", "--json"))
    assert facts["fixed"] is None


@pytest.mark.parametrize("kind", ["hf", "neox"])
def test_old_files_that_cannot_be_removed_are_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is whole and fixed: exit code 0. The next run removes them."""
    folder = old_hf(tmp_path) if kind == "hf" else neox(tmp_path, "2024-03")
    command = [folder, "--for", "transformers@4.48" if kind == "hf" else "today", "--in-place"]
    work = folder.parent / f".{folder.name}.neox-bridge"

    def fail(_path: object, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        done = CliRunner().invoke(app, ["doctor", *map(str, command)])
        assert done.exit_code == 0, done.output
        assert f"could not be deleted from {work}" in done.stderr
        again = CliRunner().invoke(app, ["doctor", *map(str, command)])
        assert f"could not be deleted from {work}" in again.stderr
    for reader in (["inspect", folder], ["convert", folder, tmp_path / "out"], ["verify", folder]):
        told = CliRunner().invoke(app, list(map(str, reader)))
        assert str(work) in told.output + told.stderr, reader
    done = CliRunner().invoke(app, ["doctor", *map(str, command)])
    assert done.exit_code == 0
    assert not work.exists()
    assert done.stdout.startswith("nothing to fix")


@pytest.mark.parametrize("spoil", ["record", "config", "weights", "missing"])
def test_what_was_written_is_read_back(
    spoil: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that isn't what it should be gets no name, and the old checkpoint stays."""
    folder = old_hf(tmp_path)
    before = digests(folder)
    name = {"record": "neox_bridge.json", "config": "config.json"}.get(spoil, "model.safetensors")

    def damage(work: str) -> None:
        (path,) = Path(work).rglob(name)
        data = bytearray(path.read_bytes())
        if spoil == "missing":
            path.unlink()
        else:
            data[-40] ^= 1
            path.write_bytes(data)

    monkeypatch.setattr("neox_bridge.execution.disk.flush_folders", damage)
    for how in (["--fix", tmp_path / "out"], ["--in-place"]):
        done = CliRunner().invoke(
            app, ["doctor", str(folder), "--for", "transformers@4.48", *map(str, how)]
        )
        assert done.exit_code == 3, done.output
        assert "fixed" not in done.stdout
        assert digests(folder) == before
    assert not (tmp_path / "out").exists()


def test_a_copy_of_another_model_is_noticed(tmp_path: Path) -> None:
    """Its files have the hashes of its record, so only the comparison with the source tells."""
    source = tiny.write_hf(tmp_path / "source")
    other = tiny.write_hf(tmp_path / "other", seed=1)
    tiny.convert(other, tmp_path / "copy", to="hf")
    plan = tiny.plan_of(source, tmp_path / "copy", to="hf")
    check = fixes.checker(open_checkpoint(str(source)), plan)
    message = rf"The fixed copy differs from {source}: .*13 more tensors differ"
    with pytest.raises(Unverified, match=message):
        check(str(tmp_path / "copy"))
    check(str(tiny.convert(source, tmp_path / "same", to="hf")))


def test_in_place_in_the_cache_of_the_hub_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that the error names writes a copy into the current folder."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    root = tmp_path / "models--org--model"
    tiny.write_hf(root / "snapshots" / "abc", torch_dtype=None, dtype="float32")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    error = doctor(root, "--for", "transformers@4.48", "--in-place", code=4)
    assert "org/model@main is on the Hub, where --in-place cannot replace it." in error
    doctor(*shlex.split(error.rpartition("Write a copy here: neox-bridge doctor ")[2]))
    assert answer(tmp_path / "cwd" / "model-fixed", "transformers@4.48") == "loads"
    checkpoint = replace(open_checkpoint(str(root)), hub_repo="org/model")
    command = "neox-bridge doctor org/model --fix model-fixed-2"
    with pytest.raises(Refused, match=rf"Write a copy here: {command}"):
        fixes.fix_plan(checkpoint, None, "out", in_place=True)


def test_settings_named_by_the_user_are_the_copys(tmp_path: Path) -> None:
    """A copy has the ymls that --config named, where the checkpoint has none or others."""
    root = neox(tmp_path, "2024-03")
    (yml,) = (step_of(root) / "configs").glob("*.yml")
    yml.rename(tmp_path / "own.yml")
    (step_of(root) / "configs").rmdir()
    options = ["--config", tmp_path / "own.yml", "--for", "today", "--fix", tmp_path / "out"]
    doctor(root, *options)
    assert answer(tmp_path / "out", "today") == "loads"


def test_a_key_without_effect_is_not_taken_for_another(tmp_path: Path) -> None:
    """GPT-NeoX v1.0 computes ``gas`` from gradient_accumulation_steps, whatever the yml says."""
    flat = Path(__file__).parents[1] / "data" / "published" / "v1_dp2" / "flat"
    source = Path(shutil.copytree(flat, tmp_path / "run"))
    yml = source / "160M.yml"
    yml.write_text(yml.read_text().replace('"gas": 1', '"gas": 4'))
    options = ["--for", "today", "--fix", str(tmp_path / "fixed"), "--drop-optimizer"]
    done = CliRunner().invoke(app, ["doctor", str(source), *options])
    assert done.exit_code == 0, done.output
    why = "it had no effect: GPT-NeoX computes it from gradient_accumulation_steps"
    assert f"dropped: yml: gas: {why}" in done.output
    for path in (tmp_path / "fixed").rglob("*.yml"):
        settings = yaml.safe_load(path.read_text())
        assert settings.get("gradient_accumulation_steps", 1) == 1
        assert "gas" not in settings
