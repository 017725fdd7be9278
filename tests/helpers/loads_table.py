"""The page of what loads in the real GPT-NeoX, written from what a run of the tests saw."""

from pathlib import Path

TABLE = Path(__file__).parents[2] / "docs" / "reference" / "loads-in-gpt-neox.md"
CELLS: dict[tuple[str, int, int, str], str] = {}
VERSIONS: dict[str, str] = {}
TEXT = """\
# What loads in the real GPT-NeoX

```console
$ neox-bridge doctor pythia-neox --for neox@2024-03     # predicts it for your checkpoint
```

For this table a tiny model made with transformers was converted, and loaded strictly by GPT-NeoX on
CPU, from the `finetune.yml` that the conversion wrote, with the tree's own default for
`rotary_save_freqs_buffer`. If it loads, GPT-NeoX's logits agree with those of transformers within
1e-5 (fp32). A folder with two pipeline stages is loaded in two stages; its logits come from loading
the same folder in one.

{versions}
{cells}
*missing*: GPT-NeoX prints `Missing key(s) in state_dict: "attention.rotary_emb.inv_freq"`. This
tree requires the buffer. Convert with `--for neox@2024-03`.

*unexpected*: GPT-NeoX prints `Unexpected key(s) in state_dict: "attention.rotary_emb.inv_freq"`.
This tree does not store the buffer. Convert with `--for` and its date, or set
`rotary_save_freqs_buffer: true`, as the written `finetune.yml` does if the tree knows that key
(tested too).

[Which `--for` do I need?](../how-to/convert.md#convert-for-your-version-of-gpt-neox)

Next: [the glossary](glossary.md).
"""


def write_table() -> None:
    """Writes the page if every cell was tested."""
    if len(CELLS) < 54:
        return
    trees = list(dict.fromkeys(tree for tree, *_ in CELLS))
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
