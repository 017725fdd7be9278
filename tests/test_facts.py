"""Facts are fields: no verdict depends on a sentence, whatever a checkpoint's values look like."""

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from common import convert, fixture, make_hf, step_of

import neox_bridge
from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.doctor.diagnose import judge, written_by
from neox_bridge.doctor.verdict import Verdict
from neox_bridge.formats.yml import merge_ymls
from neox_bridge.frameworks.eras import era_named
from neox_bridge.frameworks.targets import target_named
from neox_bridge.frameworks.writers import UNKNOWN
from neox_bridge.layouts.gqa import unknown_order, with_gqa_order
from neox_bridge.layouts.run_tokenizer import missing_finding, not_missing

PACKAGE = Path(neox_bridge.__file__).parent
PROSE = ("code", "reason", "message")
# fields of these names that are no finding's: (file, owner)
OTHERS = {
    ("errors.py", "self"),  # UsageError
    ("cli/output.py", "file"),  # the reason of a file that is not copied is one of four words
    ("layouts/checkpoint.py", "refusal"),  # the refusals become an error's text
    ("planning/model_card.py", "drop"),  # counts what was dropped by the words that it prints
    ("formats/pickle_security.py", "opcode"),
    ("formats/pickles.py", "opcode"),
    ("execution/ray_cluster.py", "member"),
    ("execution/ray_cluster.py", "self._members[n]"),
}


def doctor(*args: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["doctor", *map(str, args)])
    assert done.exit_code == code, done.output
    return done.stdout


def judged(root: Path, target: str = "today") -> Verdict:
    return judge(open_checkpoint(str(root)), target_named(target))


@pytest.fixture
def neox(tmp_path: Path) -> Path:
    convert(make_hf(tmp_path / "hf"), tmp_path / "neox")
    return tmp_path / "neox"


# ---- the package


def test_no_code_decides_by_prose() -> None:
    """What prints shows a finding's message, or why something was left out, and asks it nothing."""
    reads = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        tree = ast.parse(path.read_text())
        reads += [(name, *place) for place in prose_reads(tree) if (name, place[1]) not in OTHERS]
    assert reads == []


def prose_reads(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, owner) where such a field is compared, matched, searched or tested for membership."""
    found = []
    for node in ast.walk(tree):
        operands: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.Call):
            operands = [node.func, *node.args] if searches(node.func) else []
        elif isinstance(node, ast.SetComp | ast.DictComp):
            operands = [node.elt if isinstance(node, ast.SetComp) else node.key]
        elif isinstance(node, ast.If | ast.IfExp):
            operands = [node.test]
        found += [
            (part.lineno, ast.unparse(part.value))
            for operand in operands
            for part in ast.walk(operand)
            if isinstance(part, ast.Attribute) and part.attr in PROSE
        ]
    return found


def searches(func: ast.AST) -> bool:
    words = ("match", "search", "fullmatch", "findall", "startswith", "endswith", "find", "split")
    more = ("replace", "index", "partition", "removeprefix", "get", "count")
    return isinstance(func, ast.Attribute) and func.attr in (*words, *more)


@pytest.mark.parametrize(
    "code",
    [
        "x = any(f.code == 'a' for f in found)",
        "x = 'optimizer' in drop.reason",
        "x = re.match('a', finding.message)",
        "x = finding.message.startswith('a')",
        "x = {f.code for f in found}",
        "if finding.code in CODES: pass",
        "x = NAMES.get(finding.code)",
    ],
)
def test_the_test_sees_it(code: str) -> None:
    assert prose_reads(ast.parse(code))


# ---- keys in two files

VALUES: list[Any] = [
    {"stage": 1, "allgather_partitions": True},
    [[["global"], 2]],
    "a, b and c, d",
    "x is set in y and z, to the same value",
    "1, to 2 and to 3; the second value is used",
    None,
    "",
    True,
    1e-5,
]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        ("wandb_group", "wandb_group", True),
        ("wandb-group", "wandb_group", True),
        ("wandb_group", "wandb-group", False),
        ("wandb-group", "wandb-group", False),
        ("seed", "seed", True),
    ],
)
def test_keys_in_two_files(
    value: object, first: str, second: str, refused: bool, neox: Path
) -> None:
    """GPT-NeoX looks for a key as it is spelled among those with underscores."""
    configs = step_of(neox) / "configs"
    (configs / "y a, b and c.yml").write_text(yaml.safe_dump({first: 1}))
    (configs / "z.yml").write_text(yaml.safe_dump({second: value}))
    if first == second == "seed":
        (configs / "neox_bridge.yml").write_text(
            "".join(
                line
                for line in (configs / "neox_bridge.yml").read_text().splitlines(keepends=True)
                if not line.startswith("seed:")
            )
        )
    found = judged(neox)
    key = second.replace("-", "_")
    assert [d.refused for d in open_checkpoint(str(neox)).neox.duplicate_keys] == [refused]  # type: ignore[union-attr]
    if refused:
        assert found.answer == "fails"
        assert found.message == (
            "ValueError: Conf file z.yml has the following duplicate keys with previously loaded "
            f"file: {key}"
        )
    else:
        assert found.answer == "loads"
        assert any(key in case.finding.message for case in found.cases)


def test_a_key_twice_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yml"
    for text, refused in (("a-b: 1\na_b: 2\n", True), ("a_b: 1\na-b: 2\n", False)):
        path.write_text(text)
        merged, (duplicate,) = merge_ymls([str(path)])
        assert merged == {"a_b": 2}
        assert (duplicate.refused, duplicate.first, duplicate.values) == (refused, "a.yml", (1, 2))


def test_three_files(tmp_path: Path) -> None:
    for name, text in (("a", "k_l: 1"), ("b", "k-l: 2"), ("c", "k_l: 3")):
        (tmp_path / f"{name}.yml").write_text(text)
    merged, duplicates = merge_ymls([str(path) for path in tmp_path.iterdir()])
    assert merged == {"k_l": 3}
    assert [(d.first, d.second, d.refused) for d in duplicates] == [
        ("a.yml", "b.yml", False),
        ("b.yml", "c.yml", True),
    ]


def test_fix_merges_them(neox: Path, tmp_path: Path) -> None:
    (step_of(neox) / "configs" / "z.yml").write_text("norm: layernorm\n")
    doctor(neox, "--for", "today", code=4)
    doctor(neox, "--for", "today", "--fix", tmp_path / "fixed")
    assert "today: loads" in doctor(tmp_path / "fixed", "--for", "today")


# ---- states that no later tree resumes


def add_states(root: Path, **more: Any) -> None:
    states = {"zero_stage": 1, "partition_count": 1, **more}
    path = step_of(root) / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": states}, path)


@pytest.mark.parametrize("target", ["neox@2024-03", "neox@2024-09", "neox@2024-10", "today"])
def test_states_without_a_version(target: str, tmp_path: Path) -> None:
    """As GPT-NeoX v1.0 left them: the loader of DeepSpeed insists on its version."""
    era = era_named(target) if "@" in target else None
    convert(make_hf(tmp_path / "hf"), tmp_path / "neox", era=era)
    root = tmp_path / "neox"
    add_states(root, ds_version="0.16.5")
    assert judged(root, target).answer == "loads"
    add_states(root)
    found = judged(root, target)
    assert found.answer == "fails"
    assert found.message.startswith("AssertionError: Empty ds_version in checkpoint")
    (remedy,) = {case.finding.remedy for case in found.cases if case.fails}
    assert "--fix" in remedy
    text = doctor(root, "--for", target, "--fix", tmp_path / "fixed")
    assert "finetune: true" in text
    assert judged(tmp_path / "fixed", target).answer == "loads"
    assert open_checkpoint(str(tmp_path / "fixed")).raw["finetune"] is True


def test_finetune_false_without_states(neox: Path, tmp_path: Path) -> None:
    path = step_of(neox) / "configs" / "neox_bridge.yml"
    path.write_text(path.read_text() + "finetune: false\n")
    assert judged(neox).answer == "fails"
    doctor(neox, "--for", "today", "--fix", tmp_path / "fixed")
    assert judged(tmp_path / "fixed").answer == "loads"


# ---- what is said


def test_written_by_is_a_sentence(neox: Path) -> None:
    whole = open_checkpoint(str(neox))
    assert whole.neox is not None
    anonymous = replace(whole, record={}, neox=replace(whole.neox, writer=UNKNOWN))
    assert written_by(anonymous).startswith("a tool that left no name, in the form of GPT-NeoX ")
    assert written_by(whole).startswith("neox-bridge ")


def test_a_buffer_that_is_kept_was_not_dropped(tmp_path: Path) -> None:
    source = fixture("pythia_fp32_2024_03_inv_freq")
    text = doctor(source, "--for", "neox@2024-03", "--fix", tmp_path / "none")
    assert "nothing to fix" in text
    root = tmp_path / "old"
    convert(make_hf(tmp_path / "hf"), root, era=era_named("2024-03"))
    (step_of(root) / "configs" / "z.yml").write_text("te_columnparallel: false\n")
    text = doctor(root, "--for", "neox@2024-03", "--fix", tmp_path / "kept")
    assert "dropped: yml: te_columnparallel" in text
    assert "inv_freq" not in text
    text = doctor(root, "--for", "today", "--fix", tmp_path / "gone")
    assert "dropped: layer 2: attention.rotary_emb.inv_freq" in text


def test_a_conversion_that_keeps_the_buffer_has_not_dropped_it(tmp_path: Path) -> None:
    source = fixture("pythia_fp32_2024_03_inv_freq")
    for more, dropped in (([], False), (["--for", "today"], True)):
        args = ["convert", str(source), str(tmp_path / "x"), "--to", "neox", "--dry-run", "--json"]
        done = CliRunner().invoke(app, [*args, *more])
        assert done.exit_code == 0, done.output
        names = [drop["name"] for drop in json.loads(done.stdout)["dropped"]]
        assert any("inv_freq" in name for name in names) == dropped


# ---- grouped-query attention


def test_what_is_known_of_its_rows(tmp_path: Path) -> None:
    convert(make_hf(tmp_path / "hf", family="llama", num_key_value_heads=2), tmp_path / "neox")
    whole = open_checkpoint(str(tmp_path / "neox"))
    assert whole.neox is not None
    assert (whole.neox.gqa_order, whole.neox.gqa_order_known) == ("grouped", True)
    record = step_of(tmp_path / "neox") / "neox_bridge.json"
    told = json.loads(record.read_text())
    del told["gqa_order"]
    record.write_text(json.dumps(told))
    yml = step_of(tmp_path / "neox") / "configs" / "neox_bridge.yml"
    values = yaml.safe_load(yml.read_text())
    whole = open_checkpoint(str(tmp_path / "neox"))
    assert whole.neox is not None
    assert values["num_kv_heads"] == 2
    if not whole.neox.gqa_order_known:
        assert any(f.code == "gqa-order-unknown" for f in whole.findings)
    for order, eps in (("grouped", "inside"), ("interleaved", "outside")):
        known = with_gqa_order(whole, order)  # type: ignore[arg-type]
        assert known.neox is not None
        assert (known.neox.gqa_order_known, known.neox.rms_eps) == (True, eps)
        assert not any(f.code == "gqa-order-unknown" for f in known.findings)


def test_what_is_settled_goes_whatever_its_words(tmp_path: Path) -> None:
    """A finding is taken back by what it is about, not by its sentence."""
    convert(make_hf(tmp_path / "hf", family="llama", num_key_value_heads=2), tmp_path / "neox")
    whole = open_checkpoint(str(tmp_path / "neox"))
    order = replace(unknown_order(), message="in other words")
    unsettled = replace(whole, findings=(*whole.findings, order))
    assert with_gqa_order(unsettled, "grouped").findings == whole.findings
    named = replace(whole, missing_tokenizer="/fsx/tokenizer.json")
    missing = missing_finding(named)
    assert missing is not None
    reworded = replace(missing, message="in other words")
    assert not_missing(replace(named, findings=(*named.findings, reworded))) == whole
