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

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.doctor.advice import Advice, advise
from neox_bridge.doctor.diagnose import judge
from neox_bridge.doctor.verdict import Verdict
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
    assert lines[0] == f"error: {root} does not load"
    words = [line.split()[0] for line in lines[1:]]
    assert words == ["missing", "unexpected", "why", "why", "fix", "more", "more"]
    bare = CliRunner().invoke(app, ["doctor", "--error", "-", "--json"], input=FIRST)
    facts = json.loads(bare.stdout)
    assert [cause["code"] for cause in facts["error"]] == ["neox-inv-freq", "neox-mlp-names"]
    assert facts["advice"]["fix"].endswith("--to neox --for neox@2024-03")


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
    assert len(found.others) == (0 if script else 1)
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
