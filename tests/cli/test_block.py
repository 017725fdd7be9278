"""The block of a problem: labels in a column, prose wrapped below itself, commands in one line."""

import pytest

from neox_bridge.cli.block import cause_rows, evidence_rows, print_block, way_out_rows
from neox_bridge.findings import Command, Details

COMMAND = Command(
    "neox-bridge convert pythia-neox pythia-neox-2024-03 --to neox --for neox@2024-03"
)
ROWS = [
    ("missing", "attention.rotary_emb.inv_freq (24 layers)"),
    ("why", "This GPT-NeoX stores the rotary buffer in every layer and loads strictly."),
    ("fix", COMMAND),
    ("or", "set `tp=2` in the yml"),
    ("more", "https://github.com/EleutherAI/gpt-neox/pull/1168/a-link-that-is-longer-than-a-line"),
]


def test_prose_wraps_below_itself_and_commands_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    print_block("error: pythia-neox does not load", ROWS, columns=60)
    assert capsys.readouterr().out.splitlines() == [
        "error: pythia-neox does not load",
        "  missing  attention.rotary_emb.inv_freq (24 layers)",
        "  why      This GPT-NeoX stores the rotary buffer in every",
        "           layer and loads strictly.",
        f"  fix      {COMMAND}",
        "  or       set --tp 2 in the yml",
        f"  more     {ROWS[-1][1]}",
    ]


@pytest.mark.parametrize("columns", [None, 0, 20])
def test_nothing_wraps_off_a_terminal_or_on_a_narrow_one(
    columns: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    print_block("error: pythia-neox does not load", ROWS, columns)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(ROWS)


def test_a_name_cannot_forge_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_block("error: a\nerror: b", [("fix", Command("rm 'a\x1b[2K\nb'")), ("why", "c\nd")])
    assert capsys.readouterr().out.count("\n") == 3
    print_block("error", [("why", f"{'word ' * 20}\x1b[2K")], columns=50)
    assert "\x1b" not in capsys.readouterr().out


def test_evidence_of_several_findings_is_one() -> None:
    first = Details(missing=("a", "b"), unexpected=("c",), layers=3, where="m.py:7")
    second = Details(missing=("b",), wrong=("d: 1, 2 expected",), where="m.py:7")
    assert list(evidence_rows([first, second])) == [
        ("missing", "a, b (3 layers)"),
        ("unexpected", "c (3 layers)"),
        ("wrong", "d: 1, 2 expected"),
        ("where", "m.py:7"),
    ]
    many = Details(missing=tuple("abcdefgh"))
    assert list(evidence_rows([many])) == [("missing", "a, b, c, d, e, f and 2 more")]


def test_steps_are_in_order_and_each_stands_once() -> None:
    rows = list(way_out_rows(["one", "two", "one"], ["two", "three"], ["link", "link"]))
    assert rows == [("fix", "one"), ("then", "two"), ("or", "three"), ("more", "link")]
    assert list(cause_rows(["the yml", "the yml", "config.json says", "transformers 4.30"])) == [
        ("why", "The yml."),
        ("why", "config.json says."),
        ("why", "transformers 4.30."),
    ]
