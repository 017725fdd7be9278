"""Where the real GPT-NeoX is, and the table of what loads in it."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from real_trees import RealTrees

TABLE = Path(__file__).parents[2] / "docs" / "loads-in-gpt-neox.md"
CELLS: dict[tuple[str, int, int, str], str] = {}
VERSIONS: dict[str, str] = {}
TEXT = """\
# What loads in the real GPT-NeoX

Written by `make test-neox`: a tiny model made with transformers is converted and loaded strictly by
GPT-NeoX on CPU, from the `finetune.yml` that the conversion wrote, with the tree's own default for
`rotary_save_freqs_buffer`. Where it loads, GPT-NeoX's logits agree with transformers' within 1e-5
(fp32). A folder with two pipeline stages is loaded in two stages; its logits come from loading the
same folder in one.

{versions}
{cells}
*missing*: GPT-NeoX says `Missing key(s) in state_dict: "attention.rotary_emb.inv_freq"`. This tree
wants the buffer: convert with `--for neox@2024-03`.

*unexpected*: it says `Unexpected key(s) in state_dict: "attention.rotary_emb.inv_freq"`. This tree
doesn't store it: convert with `--for` and its date, or set `rotary_save_freqs_buffer: true`, as the
written `finetune.yml` does where the tree knows that key (tested too).

`--for neox@2024-03`, `neox@2024-09`, `neox@2024-10` or `today` chooses what the tree expects.
"""


def results_in(output: str) -> list[dict[str, Any]]:
    """What run_cpu.py said of its jobs; other ranks may print right behind it."""
    lines = [line[7:] for line in output.splitlines() if line.startswith("RESULT ")]
    return [json.JSONDecoder().raw_decode(line)[0] for line in lines]


@pytest.fixture(scope="session")
def neox_python() -> str:
    home = os.environ.get("NEOX_HOME", "")
    python = os.environ.get("NEOX_PYTHON") or f"{home}/venv/bin/python"
    if not Path(python).exists():
        pytest.skip("no NEOX_HOME (trees and venv), no NEOX_TREE with NEOX_PYTHON")
    return python


@pytest.fixture(scope="session")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The sources of the real trees by date, in place of the stand-ins of tests/conftest.py."""
    return RealTrees(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="session", autouse=True)
def table() -> Iterator[None]:
    yield
    trees = list(dict.fromkeys(tree for tree, *_ in CELLS))
    if len(CELLS) < 54:
        return
    layouts = [(tp, pp) for tp in (1, 2, 4) for pp in (0, 1, 2)]
    rows = [("tree", "inv_freq", *(f"TP {tp} PP {pp}" for tp, pp in layouts)), ("---",) * 11]
    rows += [
        (tree, inv_freq, *(CELLS[tree, tp, pp, inv_freq] for tp, pp in layouts))
        for tree in trees
        for inv_freq in ("omit", "store")
    ]
    versions = "".join(f"- {name}: {version}\n" for name, version in VERSIONS.items())
    cells = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(TEXT.format(versions=versions, cells=cells))
