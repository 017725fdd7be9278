"""What doctor and doctor --error advise is one command, and it works: run here as it is printed."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from common import convert, fixture, make_hf, step_of
from safetensors.torch import load_file, save_file

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.doctor.advice import Advice, advise
from neox_bridge.doctor.diagnose import judge
from neox_bridge.doctor.verdict import Verdict, free_folder
from neox_bridge.frameworks.eras import era_named
from neox_bridge.frameworks.targets import target_named

ROOT = Path(__file__).parents[2]
ERAS = ("2024-03", "2024-09", "2024-10", "today")
FIRST = (  # what a Pythia that was converted for today gets in a GPT-NeoX of March 2024
    "RuntimeError: Error(s) in loading state_dict for ParallelTransformerLayerPipe:\n"
    '\tMissing key(s) in state_dict: "attention.rotary_emb.inv_freq", "mlp.dense_h_to_4h.weight", '
    '"mlp.dense_h_to_4h.bias", "mlp.dense_4h_to_h.weight", "mlp.dense_4h_to_h.bias".\n'
    '\tUnexpected key(s) in state_dict: "mlp.linear1.weight", "mlp.linear1.bias", '
    '"mlp.linear2.weight", "mlp.linear2.bias".\n'
)
INV_FREQ = "attention.rotary_emb.inv_freq"
ONLY = 'Missing key(s) in state_dict: "attention.rotary_emb.inv_freq". '


def run(command: str) -> None:
    """A command as it was printed, up to what a shell takes for a comment."""
    words = shlex.split(command, comments=True)
    assert words[0] == "neox-bridge"
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, (command, done.output)


def target_of(command: str) -> Path:
    words = shlex.split(command, comments=True)
    return Path(words[words.index("--fix") + 1] if "--fix" in words else words[3])


def judged(root: Path, target: str) -> Verdict:
    return judge(open_checkpoint(str(root)), target_named(target))


def advised(text: str, path: Path | str = "", target: str = "") -> Advice:
    checkpoint = open_checkpoint(str(path)) if path and Path(path).exists() else None
    found = advise(text, str(path), checkpoint, target_named(target) if target else None)
    assert found is not None, text
    return found


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("advice") / "a model")


# ---- the first case


def test_the_first_case(hf: Path, tmp_path: Path) -> None:
    root = tmp_path / "my run"
    convert(hf, root)
    found = advised(FIRST)
    assert found.fix == "neox-bridge convert CHECKPOINT NEW --to neox --for neox@2024-03"
    assert found.others == ()  # nothing that leaves the names as they are
    found = advised(FIRST, root)
    new = f"{root}-2024-03"
    quoted = f"{shlex.quote(str(root))} {shlex.quote(new)}"
    assert found.fix == f"neox-bridge convert {quoted} --to neox --for neox@2024-03"
    assert {cause.remedy for cause in found.causes} == {found.fix}
    run(found.fix)
    assert judged(Path(new), "neox@2024-03").answer == "loads"
    assert advised(FIRST, root).fix.count(f"{new}-2") == 1  # the first one is there now


def test_only_the_buffer(hf: Path, tmp_path: Path) -> None:
    """The message that most saw, of a checkpoint with the old names."""
    assert "--for neox@2024-03" in advised(ONLY).fix
    assert "--inv-freq" not in advised(ONLY).fix
    convert(hf, tmp_path / "old", era=era_named("2024-09"))
    found = advised(ONLY, tmp_path / "old")
    assert found.fix.endswith("--for neox@2024-03")
    run(found.fix)
    assert judged(target_of(found.fix), "neox@2024-03").answer == "loads"
    # today's names: the tree has the flag on
    convert(hf, tmp_path / "new")
    found = advised(ONLY, tmp_path / "new")
    assert found.fix.endswith("--inv-freq store")
    run(found.fix)
    assert judged(target_of(found.fix), "today").answer == "loads"
    assert any("rotary_save_freqs_buffer: true" in other for other in found.others)


def test_its_page(tmp_path: Path, hf: Path) -> None:
    convert(hf, tmp_path / "neox")
    root = tmp_path / "neox"
    done = CliRunner().invoke(app, ["doctor", str(root), "--error", "-"], input=FIRST)
    assert done.exit_code == 0, done.output
    block, _ = done.stdout.split("\n\n")
    lines = block.splitlines()
    assert lines[0] == f"error: {root} does not load in GPT-NeoX 2024-03"
    words = [line.split()[0] for line in lines[1:]]
    assert words == ["missing", "unexpected", "why", "why", "fix", "more", "more", "more"]
    bare = CliRunner().invoke(app, ["doctor", "--error", "-", "--json"], input=FIRST)
    facts = json.loads(bare.stdout)
    assert [cause["code"] for cause in facts["error"]] == ["neox-inv-freq", "neox-mlp-names"]
    assert facts["advice"]["fix"].endswith("--to neox --for neox@2024-03")


def test_the_first_case_is_explained(hf: Path, tmp_path: Path, trees: Mapping[str, Path]) -> None:
    """Who changed what and when, why it is harmless, how to fix either side, with real paths."""
    root, tree = tmp_path / "neox", tmp_path / "gpt-neox"
    convert(hf, root, era=era_named("2024-09"))  # only the buffer is missing
    shutil.copytree(trees["2024-03"], tree)
    text = f'  File "{tree}/megatron/checkpointing.py", line 1, in load\n{ONLY}\n'
    (tmp_path / "traceback.txt").write_text(text)
    words = ["doctor", str(root), "--error", str(tmp_path / "traceback.txt")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    head, *rows = done.stdout.split("\n\n")[0].splitlines()
    assert head == f"error: {root} does not load in GPT-NeoX at {tree}"
    labels = [row.split()[0] for row in rows]
    assert labels == ["missing", "why", "fix", "or", "or", "more", "more"]
    shown = dict(zip(labels, rows, strict=True))
    assert "attention.rotary_emb.inv_freq (2 layers)" in shown["missing"]
    for fact in (
        "GPT-NeoX stopped storing it in e109bf5e (#1168, 2024-03-04)",
        "transformers in 4.35 (#25830, 2023-11-02)",
        "not learned: inv_freq = 1 / rotary_emb_base ** (arange(0, dim, 2) / dim)",
    ):
        assert fact in shown["why"], fact
    for row in rows:  # the fix of either side
        if "neox-bridge" in row:
            shutil.rmtree(f"{root}-fixed", ignore_errors=True)
            command = row.split(maxsplit=1)[1]
            run(command)
            loaded = root if " patch " in command else Path(f"{root}-fixed")
            assert judged(loaded, f"neox:{tree}").answer == "loads", command
    assert sum("neox-bridge patch" in row for row in rows) == 1
    again = CliRunner().invoke(app, ["doctor", str(root), "--error", "-", "--json"], input=ONLY)
    advice = json.loads(again.stdout)["advice"]
    assert advice["unnamed"] == ["TREE"]
    named = [*words[:2], "--error", "-", "--for", f"neox:{tree}", "--json"]
    advice = json.loads(CliRunner().invoke(app, named, input=ONLY).stdout)["advice"]
    assert f"neox-bridge patch {tree}   # lets the tree load both kinds" in advice["commands"]
    assert (advice["layers"], advice["unnamed"]) == (2, [])


def test_a_message_and_a_target_have_one_block(hf: Path, tmp_path: Path) -> None:
    """What is known of the checkpoint explains the message, unless that names something else."""
    root = tmp_path / "run"
    convert(hf, root)
    words = ["doctor", str(root), "--error", "-"]
    for text, more, code, blocks in (
        (FIRST, ["--for", "neox@2024-03"], 4, 1),
        (ONLY, ["--for", "neox@2024-03"], 4, 1),
        (ONLY, [], 0, 1),
        (ONLY, ["--for", "today"], 0, 1),  # with the flag in another yml
        (f"{FIRST}{PADDING}", ["--for", "neox@2024-03"], 4, 2),
    ):
        done = CliRunner().invoke(app, [*words, *more], input=text)
        assert done.exit_code == code, done.output
        assert len(re.findall("^error: ", done.stdout, re.M)) == blocks, done.stdout
        fixes = re.findall(r"^  fix +(neox-bridge .*)$", done.stdout, re.M)
        assert len(fixes) == blocks, done.stdout
    done = CliRunner().invoke(app, ["doctor", f"{root}-not", *words[2:], *more], input=FIRST)
    assert done.exit_code == 1
    assert done.stdout.startswith("error: the checkpoint does not load in GPT-NeoX 2024-03")


def test_a_path_that_cannot_be_opened_is_said_first(hf: Path, tmp_path: Path) -> None:
    """Its commands would end in the next error, so that the advice does not name it."""
    missing, damaged = tmp_path / "missing", shutil.copytree(hf, tmp_path / "damaged")
    (damaged / "config.json").write_text("{")
    for path, more, reason in (
        (missing, [], "no such folder"),
        (damaged, [], "config.json"),
        (missing, ["--for", "neox@2024-03"], "no such folder"),
        (damaged, ["--fix", str(tmp_path / "fixed")], "config.json"),
    ):
        words = ["doctor", str(path), "--error", "-", *more]
        done = CliRunner().invoke(app, words, input=FIRST)
        assert done.exit_code == 1, done.output
        first = done.output.splitlines()[0]
        assert first.startswith("error: ")
        assert str(path) in first
        assert reason in first, first
        assert str(path) not in done.stdout
        (fix,) = re.findall(r"^  fix +(neox-bridge .*)$", done.stdout, re.M)
        assert "CHECKPOINT" in fix
        told = CliRunner().invoke(app, [*words, "--json"], input=FIRST)
        assert (told.exit_code, told.stdout) == (1, "")
        assert not (tmp_path / "fixed").exists()


def test_a_message_without_keys_and_a_target_have_one_block_and_one_fix(tmp_path: Path) -> None:
    source = shutil.copytree(
        ROOT / "tests" / "data" / "published" / "v1_dp2" / "flat", tmp_path / "run"
    )
    words = ["doctor", str(source), "--error", "-"]
    duplicate = (ROOT / "tests" / "data" / "messages" / "neox_duplicate_key.txt").read_text()
    for text, more, blocks in (
        ("AssertionError: Empty ds_version in checkpoint", ["--for", "today"], 1),
        (duplicate, ["--for", "today"], 2),
    ):
        done = CliRunner().invoke(app, [*words, *more], input=text)
        assert len(re.findall("^error: ", done.stdout, re.M)) == blocks, done.stdout
        commands = re.findall(r"^  (?:fix|then) +(neox-bridge .*)$", done.stdout, re.M)
        assert len(commands) == 1, done.stdout
    run(re.findall(r"^  fix +(neox-bridge .*)$", done.stdout, re.M)[0])


PADDING = (
    "\tsize mismatch for word_embeddings.weight: copying a param with shape torch.Size([300, 48]) "
    "from checkpoint, the shape in current model is torch.Size([512, 48]).\n"
)
ONE_RANK = (  # a file a rank, loaded by a tree of March 2024 with other padding
    "RuntimeError: Error(s) in loading state_dict for SequentialWrapper:\n"
    '\tMissing key(s) in state_dict: "sequential.2.attention.rotary_emb.inv_freq", '
    '"sequential.2.mlp.dense_h_to_4h.weight", "sequential.3.attention.rotary_emb.inv_freq", '
    '"sequential.3.mlp.dense_h_to_4h.weight".\n'
    '\tUnexpected key(s) in state_dict: "sequential.2.mlp.linear1.weight", '
    '"sequential.3.mlp.linear1.weight".\n'
    "\tsize mismatch for sequential.0.word_embeddings.weight: copying a param with shape "
    "torch.Size([300, 48]) from checkpoint, the shape in current model is torch.Size([512, 48]).\n"
)


@pytest.mark.parametrize(
    ("era", "text", "key"),
    [
        ("today", 'Missing key(s) in state_dict: "mlp.linear1.weight".', "mlp.linear1.weight"),
        ("2024-03", ONLY, INV_FREQ),
        ("2024-03", ONE_RANK, INV_FREQ),
        ("today", "AssertionError: Empty ds_version in checkpoint", "optimizer states"),
    ],
)
def test_a_message_about_another_checkpoint(
    era: str, text: str, key: str, hf: Path, tmp_path: Path
) -> None:
    """The checkpoint contains what the message misses, so no conversion of it helps."""
    root = tmp_path / "run"
    convert(hf, root, era=era_named(era))
    advice = advised(text, root)
    assert key in advice.contradiction
    assert advice.fix == ""
    assert not any("neox-bridge" in way for way in (*advice.steps, *advice.others))
    done = CliRunner().invoke(app, ["doctor", str(root), "--error", "-"], input=text)
    head, *rows = done.stdout.split("\n\n")[0].splitlines()
    assert head == f"error: this message is not from {root}"
    assert [row.split()[0] for row in rows] == ["why", "fix"]
    assert "(here: global_step0)" in rows[1]
    assert not advise(text).contradiction  # type: ignore[union-attr]


def test_the_optimizer_is_resharded_only_if_there_is_one(hf: Path, tmp_path: Path) -> None:
    text = "KeyError: 'csr_tensor_module_names'"
    convert(hf, tmp_path / "run")
    assert not any("reshard" in way for way in advised(text, tmp_path / "run").others)
    source = fixture("pythia_bf16_pp1_tp2_dp2")
    assert any("reshard" in way for way in advised(text, source).others)
    assert any("reshard" in way for way in advised(text).others)


def test_no_ending_stands_twice_in_a_name(tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    assert free_folder(f"{path}-fixed", "fixed") == f"{path}-fixed-2"  # never the folder itself
    assert free_folder(f"{path}-fixed-2/", "fixed") == f"{path}-fixed"
    assert free_folder(f"{path}-2024-03", "fixed") == f"{path}-2024-03-fixed"


def test_several_causes_have_one_command(hf: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    convert(hf, root, layout="ranks")
    advice = advised(ONE_RANK, root)
    assert [cause.code for cause in advice.causes] == [
        *("neox-inv-freq", "neox-mlp-names", "vocabulary-rows")
    ]
    assert advice.steps == (advice.fix,)
    assert "--for neox@2024-03 --vocab-multiple 512" in advice.fix
    assert advice.layers == 2
    assert advice.wrong == ("sequential.0.word_embeddings.weight: [300, 48], [512, 48] expected",)
    assert advise(ONE_RANK).layers == 2  # type: ignore[union-attr]
    run(advice.fix)
    written = open_checkpoint(str(target_of(advice.fix)))
    assert judge(written, target_named("neox@2024-03")).answer == "loads"
    assert written.config.dims["vocab"] == 512


def test_what_no_command_fixes_is_a_step_of_its_own(hf: Path, tmp_path: Path) -> None:
    """The command alone would end in the message about the norms."""
    convert(hf, tmp_path / "run")
    norms = 'Missing key(s) in state_dict: "input_layernorm.scale", "attention.rotary_emb.inv_freq"'
    text = f'{norms}.\nUnexpected key(s) in state_dict: "input_layernorm.weight".'
    advice = advised(text, tmp_path / "run")
    assert advice.steps == (advice.fix, "in the yml: norm: layernorm")
    done = CliRunner().invoke(app, ["doctor", str(tmp_path / "run"), "--error", "-"], input=text)
    labels = [row.split()[0] for row in done.stdout.split("\n\n")[0].splitlines()[1:]]
    assert labels.index("then") == labels.index("fix") + 1


def test_another_number_of_tensor_parallel_ranks(hf: Path, tmp_path: Path) -> None:
    """Attention and MLP differ by one factor: TP does, and not the heads and the width."""
    convert(hf, tmp_path / "run", tp=2, era=era_named("2024-09"))
    stored = {"attention.query_key_value.weight": (72, 48), "mlp.dense_h_to_4h.weight": (96, 48)}
    text = "".join(
        f"size mismatch for {key}: copying a param with shape torch.Size([{rows}, {width}]) from "
        f"checkpoint, the shape in current model is torch.Size([{rows * 2}, {width}]).\n"
        for key, (rows, width) in stored.items()
    )
    alone = advised(text)
    assert [cause.code for cause in alone.causes] == ["tensor-parallel"]
    assert "--tp N" in alone.fix
    advice = advised(text, tmp_path / "run")
    assert advice.fix.endswith("--to neox --tp 1")
    assert "in the yml: model_parallel_size: 2" in advice.others
    run(advice.fix)
    written = open_checkpoint(str(target_of(advice.fix)))
    assert written.neox is not None
    assert written.neox.tp == 1
    other = text.replace("[192, 48]", "[64, 48]")  # the width differs too
    assert {cause.code for cause in advised(other).causes} == {"query-key-value-rows", "mlp-width"}


def test_settings_are_those_of_the_checkpoint(hf: Path, tmp_path: Path) -> None:
    convert(hf, tmp_path / "run")
    text = (ROOT / "tests" / "data" / "messages" / "neox_gqa.txt").read_text()
    step = "in the yml: num_attention_heads: 12, model_parallel_size: 1, no num_kv_heads"
    assert advised(text, tmp_path / "run").fix == step
    assert advised(text).fix.endswith("model_parallel_size as when the checkpoint was saved")


def test_a_folder_of_transformers_has_one_command_too(hf: Path, tmp_path: Path) -> None:
    """A warning about masks, another name of the head, and a size that config.json denies."""
    folder = Path(shutil.copytree(hf, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"vocab_size": 320}))
    names = "['lm_head.weight', 'gpt_neox.layers.0.attention.masked_bias']"
    text = (
        "Some weights of the model checkpoint at x were not used when initializing "
        f"GPTNeoXForCausalLM: {names}\n"
        "Some weights of GPTNeoXForCausalLM were not initialized from the model checkpoint at x "
        "and are newly initialized: ['embed_out.weight']\n"
        "size mismatch for gpt_neox.embed_in.weight: copying a param with shape torch.Size([300, "
        "48]) from checkpoint, the shape in current model is torch.Size([320, 48]).\n"
    )
    advice = advised(text, folder)
    assert {cause.code for cause in advice.causes} == {"hf-lm-head", "hf-masks", "vocabulary-rows"}
    assert advice.unexpected[1] == "gpt_neox.layers.*.attention.masked_bias"
    assert advice.steps == (f"neox-bridge doctor {folder} --fix {folder}-fixed",)
    assert judged(folder, "transformers@4.48").answer == "fails"
    run(advice.fix)
    assert judged(target_of(advice.fix), "transformers@4.48").answer == "loads"


def test_left_over_files_are_fixed_by_a_command(hf: Path, tmp_path: Path) -> None:
    convert(hf, tmp_path / "run")
    convert(hf, tmp_path / "larger", pp=2)
    shutil.copy(
        step_of(tmp_path / "larger") / "mp_rank_01_model_states.pt", step_of(tmp_path / "run")
    )
    text = (ROOT / "tests" / "data" / "messages" / "neox_mp_world_size.txt").read_text()
    advice = advised(text, tmp_path / "run")
    for command in (advice.fix, *advice.others):
        run(command)
        written = target_of(command)
        assert judged(written, "today").answer == "loads", command
        shutil.rmtree(written)


def test_states_of_another_form_and_number_of_ranks(tmp_path: Path) -> None:
    text = f"{ZERO}AssertionError: Empty ds_version in checkpoint, not clear how to proceed"
    advice = advised(text, "run")
    assert advice.steps == ("neox-bridge reshard run run-fixed --for today --dp 1",)


def test_findings_have_their_facts_as_fields(hf: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    convert(hf, root)
    words = ["doctor", str(root), "--json"]
    done = CliRunner().invoke(app, [*words, "--for", "neox@2024-03"])
    (checkpoint,) = json.loads(done.stdout)["checkpoints"]
    buffer, names = checkpoint["findings"][:2]
    assert buffer["command"] == buffer["remedy"] == names["command"]
    run(buffer["command"])
    assert "mlp.linear1.weight" in names["unexpected"]
    assert {INV_FREQ, "mlp.dense_h_to_4h.weight"} <= set(buffer["missing"])
    assert (buffer["layers"], buffer["silent"]) == (2, False)
    assert buffer["more"][0].endswith("/gpt-neox/pull/1168")
    assert checkpoint["verdicts"][0]["framework"] == "GPT-NeoX 2024-03"
    everywhere = json.loads(CliRunner().invoke(app, words).stdout)["checkpoints"][0]
    assert [verdict["verdict"] for verdict in everywhere["verdicts"]].count("fails") == 3


def test_where_it_fails_the_command_that_explains_it_is_named(hf: Path, tmp_path: Path) -> None:
    convert(hf, tmp_path / "run")
    done = CliRunner().invoke(app, ["doctor", str(tmp_path / "run")])
    (command,) = re.findall(r"^  run  (.*)$", done.stdout, re.M)
    again = CliRunner().invoke(app, shlex.split(command)[1:])
    assert again.exit_code == 4
    assert again.stdout.splitlines()[1].startswith("error: ")


def test_a_source_tree_is_told_from_a_checkpoint(
    hf: Path, tmp_path: Path, trees: Mapping[str, Path]
) -> None:
    """Both commands that it names run."""
    tree = Path(shutil.copytree(trees["2024-03"], tmp_path / "my tree"))
    convert(hf, tmp_path / "run", era=era_named("2024-03"))
    done = CliRunner().invoke(app, ["doctor", str(tree)])
    assert done.exit_code == 1
    check, patch = re.findall(r"neox-bridge (?:doctor|patch) [^.]*?'[^']+'", done.stderr)
    run(check.replace("CHECKPOINT", str(tmp_path / "run")))
    run(patch)


def test_a_path_below_the_current_folder_stays_short(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(hf, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run-fixed").mkdir()
    done = CliRunner().invoke(app, ["doctor", "run", "--for", "neox@2024-03"])
    assert "error: run does not load in GPT-NeoX 2024-03\n" in done.stdout
    command = "neox-bridge doctor run --for neox@2024-03 --fix run-fixed-2"
    assert f"  fix         {command}\n" in done.stdout
    run(command)


def test_inv_freq_store_alone_says_which_trees_load_it(hf: Path, tmp_path: Path) -> None:
    args = ["convert", str(hf), str(tmp_path / "stored"), "--to", "neox", "--inv-freq", "store"]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0
    assert "--for neox@2024-03" in done.stderr
    assert judged(tmp_path / "stored", "today").answer == "loads"
    quiet = CliRunner().invoke(app, [*args[:2], str(tmp_path / "b"), *args[3:], "--for", "today"])
    assert "--for neox@2024-03" not in quiet.stderr


# ---- every source in every tree

SOURCES: dict[str, dict[str, Any]] = {
    **{era: {"era": era_named(era)} for era in ERAS},
    "flag": {"inv_freq": "store"},
    "flag, old names": {"inv_freq": "store", "era": era_named("2024-09")},
    "ranks": {"pp": 0, "tp": 2, "era": era_named("2024-09")},
}


@pytest.mark.parametrize("tree", ERAS)
@pytest.mark.parametrize(
    ("family", "source"),
    [
        *(("gpt_neox", source) for source in SOURCES),
        *(("llama", source) for source in ("2024-03", "2024-09", "today", "flag")),
    ],
)
def test_every_source_in_every_tree(
    source: str, tree: str, family: str, hf: Path, tmp_path: Path
) -> None:
    """By doctor's own remedies, and by the message alone, with and without --for."""
    if family == "llama":
        hf = make_hf(tmp_path / "llama", family="llama")
    root = tmp_path / "run"
    convert(hf, root, **SOURCES[source])
    target = f"neox@{tree}" if tree != "today" else "today"
    found = judged(root, target)
    if found.answer != "fails":
        return
    commands = {case.finding.remedy for case in found.cases if case.fails}
    commands.add(advised(found.message, root, target).fix)
    alone = advised(found.message, root)
    if "neox:TREE" in alone.fix:  # other trees print the same
        assert found.message.startswith("TypeError: NeoXArgs")
        assert "name the tree by its date" in alone.others[0]
    else:
        commands.add(alone.fix)
    for command in commands:
        run(command)
        again = judged(target_of(command), target)
        assert again.answer != "fails", (command, again.message)
        shutil.rmtree(target_of(command))  # each is the way out alone


@pytest.mark.parametrize("tree", ERAS)
def test_the_tree_of_the_traceback(
    tree: str, hf: Path, tmp_path: Path, trees: Mapping[str, Path]
) -> None:
    """Frames name the tree, and where it is on this machine it is read."""
    convert(hf, tmp_path / "run", era=era_named("2024-03" if tree != "2024-03" else "today"))
    target = f"neox:{trees[tree]}"
    message = judged(tmp_path / "run", target).message
    text = f'  File "{trees[tree]}/megatron/checkpointing.py", line 1, in load\n{message}\n'
    found = advised(text, tmp_path / "run")
    assert f"--for {target}" in found.fix
    run(found.fix)
    assert judged(target_of(found.fix), target).answer == "loads"
    elsewhere = advised(text.replace(str(trees[tree]), "/nowhere"), tmp_path / "run")
    assert "/nowhere" not in elsewhere.fix


# ---- what a command cannot do without


def set_keys(root: Path, **keys: Any) -> None:
    (step_of(root) / "configs" / "zz.yml").write_text(json.dumps(keys))


def bend_inv_freq(root: Path) -> None:
    """Stored buffers that are not what the settings give."""
    for path in step_of(root).glob("layer_*.pt"):
        tensors = torch.load(path)
        if INV_FREQ in tensors:
            tensors[INV_FREQ] *= 1.5
            torch.save(tensors, path)


DEFECTS: dict[str, Callable[[Path], object]] = {
    "a fork's key": lambda root: set_keys(root, rope_scaling={"factor": 2.0}),
    "two keys of forks": lambda root: set_keys(root, rope_scaling={"a": 2}, attention_cap=3.0),
    "other padding": lambda root: set_keys(root, make_vocab_size_divisible_by=512),
    "inv_freq deviates": bend_inv_freq,
}


@pytest.mark.parametrize("tree", ERAS)
@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("states", [False, True])
def test_commands_have_the_options_that_they_need(
    states: bool, defect: str, tree: str, hf: Path, tmp_path: Path
) -> None:
    """They run as they are printed, whatever stands in the yml and beside the weights."""
    root = tmp_path / "run"
    convert(hf, root, era=era_named("2024-03"), vocab_multiple=128)
    if states:
        value = {"zero_stage": 1, "partition_count": 1, "ds_version": "0.16.5"}
        path = step_of(root) / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": value}, path)
    if defect == "other padding":
        yml = step_of(root) / "configs" / "neox_bridge.yml"
        kept = [k for k in yml.read_text().splitlines(True) if "divisible_by" not in k]
        yml.write_text("".join(kept))
    DEFECTS[defect](root)
    target = f"neox@{tree}" if tree != "today" else "today"
    found = judged(root, target)
    commands = {case.finding.remedy for case in found.cases if case.fails}
    for command in {command for command in commands if command.startswith("neox-bridge ")}:
        run(command)
        written = target_of(command)
        again = judged(written, target)
        assert again.answer != "fails", (command, again.message)
        shutil.rmtree(written)
    assert found.answer != "fails" or commands


# ---- other messages

ZERO = (
    "deepspeed.runtime.zero.utils.ZeRORuntimeException: The checkpoint being loaded used a DP "
    "world size of 2 but the current world size is 1. Automatic adjustment of ZeRO's optimizer "
    "state partitioning with a new world size is not currently supported.\n"
)


def test_another_number_of_ranks(tmp_path: Path) -> None:
    source = fixture("pythia_bf16_pp1_tp2_dp2")
    found = advised(ZERO, source)
    command = found.fix.replace(f"{source}-fixed", str(tmp_path / "out"))
    assert command == f"neox-bridge reshard {source} {tmp_path}/out --dp 1"
    run(command)
    assert open_checkpoint(str(tmp_path / "out")).has_optimizer


def test_padded_vocabulary(hf: Path, tmp_path: Path) -> None:
    convert(hf, tmp_path / "run", vocab_multiple=512)
    for message in (
        "AssertionError: padded_vocab_size value from checkpoint (512) is not equal to the "
        "currently set argument value (384).",
        "size mismatch for word_embeddings.weight: copying a param with shape torch.Size([512, 48])"
        " from checkpoint, the shape in current model is torch.Size([384, 48]).",
    ):
        found = advised(message, tmp_path / "run")
        assert "--vocab-multiple 384" in found.fix
        assert any("make_vocab_size_divisible_by" in other for other in found.others)


@pytest.mark.parametrize(
    "key", ["mlp.linear1.weight", "attention.rotary_emb.inv_freq", "norm.bias"]
)
@pytest.mark.parametrize(
    ("script", "to"), [("convert_hf_to_sequential", "neox"), ("convert_neox_to_hf", "hf"), ("", "")]
)
def test_a_conversion_script(key: str, script: str, to: str, hf: Path, tmp_path: Path) -> None:
    text = f"KeyError: '{key}'"
    if script:
        text = f'  File "/x/tools/ckpts/{script}.py", line 3, in main\n{text}'
    found = advised(text)
    assert [cause.code for cause in found.causes] == ["conversion-script"]
    assert f"--to {to}" in found.fix
    assert len(found.others) == 1
    assert ("neox-bridge patch TREE --scripts" in found.others[0]) is bool(script)
    if to == "neox":
        found = advised(text, hf)
        command = found.fix.replace(shlex.quote(f"{hf}-fixed"), str(tmp_path / "out"))
        run(command)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("TypeError: 'NoneType' object is not subscriptable", "finetune: true"),
        (
            "AssertionError: Empty ds_version in checkpoint, not clear how to proceed",
            "neox-bridge reshard CHECKPOINT NEW --for today",
        ),
        ("KeyError: 'csr_tensor_module_names'", "--to neox --for neox@v1.0"),
        (
            "TypeError: NeoXArgs.__init__() got an unexpected keyword argument 'gas'",
            "remove gas from the yml",
        ),
        ("Automatic adjustment of ZeRO's optimizer", "neox-bridge reshard CHECKPOINT NEW --dp N"),
        ("KeyError: 'module'", "--layout layers"),
        ('Unexpected key(s) in state_dict: "mlp.linear1.weight".', "--for neox@2024-09"),
    ],
)
def test_quoted_alone(text: str, remedy: str) -> None:
    assert remedy in advised(text).fix


def test_paths_are_quoted(tmp_path: Path) -> None:
    path = tmp_path / "it's $HOME; `x`"
    fix = advised(ONLY, path).fix
    assert shlex.split(fix)[2:4] == [str(path), f"{path}-2024-03"]
    echoed = subprocess.run(["sh", "-c", f"echo {fix}"], capture_output=True, text=True)
    assert str(path) in echoed.stdout


# ---- what pages quote

_QUOTE = re.compile(
    r"`([^`]*(?:Error: |\wException|Missing key|Unexpected key|size mismatch|not subscriptable|"
    r"not currently supported|KeyError)[^`]*)`"
)
_BLOCK = re.compile(r"^ *((?:Missing|Unexpected) key\(s\) in .*|\w+Error: (?!Error\(s\)).*)$", re.M)
# errors of other kinds of software, or of neox-bridge itself
_NOT_LOADING = ("serious vulnerability", "rope_scaling", "pytorch_model.bin")


def quotes() -> list[tuple[str, str]]:
    found = []
    for page in [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]:
        text = page.read_text()
        plain = re.sub(r"^(```|\$ ).*$", "", text, flags=re.M)
        joined = re.sub(r"(?<!\n)\n(?!\n)", " ", plain)
        found += [(page.name, quote) for quote in _QUOTE.findall(joined)]
        found += [(page.name, quote) for quote in _BLOCK.findall(text)]
    return [(n, q) for n, q in found if not any(word in q for word in _NOT_LOADING)]


@pytest.mark.parametrize(("page", "quote"), quotes())
def test_messages_that_pages_quote(page: str, quote: str) -> None:
    assert advise(quote) is not None, page


def test_pages_quote_some() -> None:
    pages = {page for page, _ in quotes()}
    assert {"patch.md", "convert.md", "loads-in-gpt-neox.md", "reshard.md"} <= pages


def test_what_pages_advise_for_a_message() -> None:
    """No page sends a user of an older tree to --inv-freq store or --mlp-names dense."""
    for page in [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]:
        text = page.read_text()
        assert "--inv-freq store" not in text, page
        assert "--mlp-names dense" not in text, page


@pytest.mark.parametrize("tree", ERAS)
def test_messages_that_doctor_prints(tree: str, hf: Path, tmp_path: Path) -> None:
    """Whatever it predicts that a framework prints, it recognizes when it is pasted."""
    root = tmp_path / "run"
    convert(hf, root)
    target = f"neox@{tree}" if tree != "today" else "today"
    configs = step_of(root) / "configs" / "neox_bridge.yml"
    text = configs.read_text()
    for change in (
        text,
        f"{text}finetune: false\n",
        f"{text}gas: 1\n",
        text.replace("pipe_parallel_size: 1", "pipe_parallel_size: 0"),
        text.replace("model_parallel_size: 1", "model_parallel_size: 2"),
    ):
        configs.write_text(change)
        for case in judged(root, target).cases:
            if case.prints and case.fails:
                assert advise(case.prints) is not None, case.prints
