"""The patch of GPT-NeoX trees, and install() at run time.

On stand-ins for four trees, and by ``make test-neox`` on the real ones.
"""

import ast
import difflib
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from file_trees import content

from neox_bridge import BridgeError, Refused
from neox_bridge.extras import install_command
from neox_bridge.patch.patcher import KEPT, apply, plan_patch, plan_revert, revert

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "patch.md"
HOME = Path("megatron/model/positional_embeddings.py")
ROTARY = "sequential.2.attention.rotary_emb."
COUNT = itertools.count()


def copy_of(trees: Mapping[str, Path], name: str, folder: Path) -> Path:
    return Path(shutil.copytree(trees[name], folder / name))


def patched(tree: Path) -> Path:
    apply(plan_patch(tree))
    return tree


def line_of(tree: Path, owner: str) -> int:
    """The line where a class registers its buffer first."""
    lines = (tree / HOME).read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"class {owner}("))
    return next(i for i in range(first, len(lines)) if "register_buffer" in lines[i]) + 1


def edit(tree: Path, old: str, new: str, file: Path = HOME) -> None:
    text = (tree / file).read_text()
    assert old in text
    (tree / file).write_text(text.replace(old, new))


# what changes in the source


def test_only_additions_and_the_argument(tree: Path) -> None:
    (file,) = plan_patch(tree).files
    assert file.path == str(HOME)
    before, after = (text.decode().splitlines() for text in (file.old, file.new))
    lost = [
        before[i]
        for tag, a, b, *_ in difflib.SequenceMatcher(None, before, after, False).get_opcodes()
        for i in range(a, b)
        if tag != "equal"
    ]
    stored = [line for line in before if "register_buffer" in line and "persistent" not in line]
    assert lost == stored
    for line in stored:
        assert line.replace(")", ", persistent=False)  # neox-bridge") in after
    flags = [line for line in before if "persistent=save_inv_freqs" in line]
    assert [line for line in after if "persistent=save_inv_freqs" in line] == flags
    assert len(flags) == (0 if tree.name == "2024-03" else 2)


def test_is_python_and_formatted_as_the_tree(tree: Path) -> None:
    file = tree / HOME
    before = ruff_diff(file)
    patched(tree)
    compile(file.read_text(), str(file), "exec")
    assert ruff_diff(file) == before
    assert "import neox_bridge" not in file.read_text()
    assert "from neox_bridge" not in file.read_text()


def ruff_diff(file: Path) -> list[str]:
    """The lines that a formatter with 88 columns would change (it isn't quite the tree's black)."""
    command = ["-m", "ruff", "format", "--isolated", "--line-length", "88", "--diff", str(file)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    lines = done.stdout.splitlines()
    return [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]


def test_says_what_each_change_is(tree: Path) -> None:
    (file,) = plan_patch(tree).files
    lines = file.old.decode().splitlines()
    for change in file.changes:
        assert "register_buffer" in lines[change.line - 1]
    text = "\n".join(change.what for change in file.changes)
    for owner, buffer in (
        ("SinusoidalPositionalEmbedding", "inv_freq"),
        ("RotaryEmbedding", "inv_freq"),
        ("AliBi", "slopes"),
    ):
        assert f"{owner}: loads with and without {buffer}" in text
    assert ("persistent=save_inv_freqs stays" in text) == (tree.name != "2024-03")


def test_any_other_class_of_the_tree_too(today: Path) -> None:
    other = today / "megatron" / "model" / "more.py"
    other.write_text(
        textwrap.dedent(
            """\
            import torch  # a fork's own


            class Scaled(torch.nn.Module):
                def __init__(self, dim):
                    super().__init__()
                    inv_freq = 1.0 / torch.arange(1, dim).float()
                    self.register_buffer(
                        "inv_freq",
                        inv_freq,  # kept
                    )
            """
        )
    )
    patched(today)
    text = other.read_text()
    assert "            inv_freq,  # kept\n            persistent=False,\n" in text
    assert ruff_diff(other) == []
    module = load(other).Scaled(4)
    assert module.state_dict() == {}
    assert module.load_state_dict({"inv_freq": module.inv_freq}).unexpected_keys == []


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text.rstrip(b"\n"),
        lambda text: b"# -*- coding: latin-1 -*-\n# \xe9\n" + text,
        lambda text: text.replace(b"    ", b"\t"),
    ],
    ids=["crlf", "bom", "no-newline", "latin-1", "tabs"],
)
def test_odd_bytes_survive(today: Path, change: Any) -> None:
    file = today / HOME
    file.write_bytes(change(file.read_bytes()))
    before = file.read_bytes()
    patched(today)
    after = file.read_bytes()
    ast.parse(after)
    kept = [line for line in before.splitlines() if b"register_buffer" not in line]
    rest = iter(after.splitlines())
    assert all(line in rest for line in kept)  # all there, in their order
    assert (b"\r\n" in before) == (b"\r\n" in after)
    assert after.count(b"\r\n") in (0, after.count(b"\n"))
    revert(today)
    assert file.read_bytes() == before


# what the patched classes do


def load(file: Path) -> Any:
    """A source file as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"patched_{next(COUNT)}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def classes(module: Any, name: str) -> Iterator[tuple[str, torch.nn.Module, bool]]:
    """Each class once (RotaryEmbedding with its flag too): buffer, instance, whether stored."""
    single = torch.float32
    yield "inv_freq", module.SinusoidalPositionalEmbedding(8), False
    yield "slopes", module.AliBi(4, 1, 0), False
    yield "inv_freq", module.RotaryEmbedding(8, 16, precision=single), False
    if name != "2024-03":
        flagged = module.RotaryEmbedding(8, 16, precision=single, save_inv_freqs=True)
        yield "inv_freq", flagged, True


def nested(module: torch.nn.Module, path: str) -> torch.nn.Module:
    """A model that holds the module under a dotted path, with a weight beside it."""
    for name in reversed(path.strip(".").split(".")):
        outer = torch.nn.Module()
        outer.add_module(name, module)
        module = outer
    module.weight = torch.nn.Parameter(torch.ones(3))
    return module


@pytest.mark.parametrize("prefix", ["attention.rotary_emb.", ROTARY], ids=["layer", "sequential"])
def test_both_kinds_load(tree: Path, prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = load(patched(tree) / HOME)
    for name, inner, stores in classes(module, tree.name):
        model = nested(inner, prefix)
        want = getattr(inner, name).clone()
        assert (prefix + name in model.state_dict()) is stores
        without = {"weight": torch.zeros(3)}
        holding = {**without, prefix + name: want.clone()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                for given in (without, holding):
                    keys = sorted(given)
                    model.load_state_dict(given, strict=True)
                    assert sorted(given) == keys  # the caller's own mapping stays
                    assert torch.equal(getattr(inner, name), want)
                    assert not model.weight.any()
        said = capsys.readouterr().out.splitlines()
        did = "isn't in the checkpoint: computed" if stores else "is in the checkpoint: left out"
        assert len(said) == 1
        assert f"neox-bridge: {type(inner).__name__}'s {name} {did}" in said[0]


def test_fails_before(tree: Path) -> None:
    """The failure that the patch is for, on the same classes without it."""
    module = load(tree / HOME)
    inner = module.RotaryEmbedding(8, 16, precision=torch.float32)
    model = nested(inner, "attention.rotary_emb")
    given = {"weight": torch.zeros(3)}
    word = "Missing"
    if tree.name != "2024-03":
        given["attention.rotary_emb.inv_freq"] = inner.inv_freq.clone()
        word = "Unexpected"
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(given, strict=True)
    assert f'{word} key(s) in state_dict: "attention.rotary_emb.inv_freq"' in str(caught.value)


def test_other_keys_stay_strict(today: Path) -> None:
    module = load(patched(today) / HOME)
    model = nested(module.RotaryEmbedding(8, 16), "attention.rotary_emb")
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
        model.load_state_dict({})
    extra = {"weight": torch.zeros(3), "attention.rotary_emb.other": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*rotary_emb.other"):
        model.load_state_dict(extra)


def test_computes_the_same(tree: Path, tmp_path: Path) -> None:
    old = load(tree / HOME)
    new = load(patched(tree) / HOME)
    x = torch.randn(1, 4, 5, 5)
    for (_, a, _), (_, b, _) in zip(classes(old, tree.name), classes(new, tree.name), strict=True):
        for given, made in zip(tuples(a(x)), tuples(b(x)), strict=True):
            assert torch.equal(given, made)


def tuples(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("base", [10_000, 1_000_000])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("built", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_no_difference(
    today: Path, base: int, stored: torch.dtype, built: torch.dtype
) -> None:
    module = load(patched(today) / HOME)
    inner = module.RotaryEmbedding(128, 16, base=base, precision=torch.float32).to(built)
    exact = module.RotaryEmbedding(128, 16, base=base, precision=torch.float32).inv_freq
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inner.load_state_dict({"inv_freq": exact.to(stored)})
        other = torch.nextafter(exact, torch.full_like(exact, 9.0))
        inner.load_state_dict({"inv_freq": other.to(stored)})


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_warns_once_of_other_values(today: Path, stored: torch.dtype) -> None:
    module = load(patched(today) / HOME)
    inner = module.RotaryEmbedding(8, 16, precision=torch.float32)
    want = inner.inv_freq.clone()
    wrong = want.clone()
    wrong[1] *= 1.05
    model = nested(inner, ROTARY)
    given = {"weight": torch.zeros(3), ROTARY + "inv_freq": wrong.to(stored)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.load_state_dict(given)
        model.load_state_dict(given)
    (warning,) = caught
    off = (wrong.to(stored).double() - want.double()).abs().max()
    message = "RotaryEmbedding's inv_freq in the checkpoint isn't what this model computes"
    assert message in str(warning.message)
    assert f"{ROTARY}inv_freq is off by up to {off:.3g}" in str(warning.message)
    assert torch.equal(inner.inv_freq, want)


def test_not_a_number_is_a_difference(today: Path) -> None:
    module = load(patched(today) / HOME)
    with pytest.warns(UserWarning, match="slopes is off by up to nan"):
        module.AliBi(4, 1, 0).load_state_dict({"slopes": torch.full((4,), float("nan"))})


def test_the_flag_loads_what_is_stored(today: Path) -> None:
    module = load(patched(today) / HOME)
    inner = module.RotaryEmbedding(8, 16, precision=torch.float32, save_inv_freqs=True)
    wrong = inner.inv_freq * 2
    with pytest.warns(UserWarning, match="isn't what this model computes"):
        inner.load_state_dict({"inv_freq": wrong})
    assert torch.equal(inner.inv_freq, wrong)


@pytest.mark.parametrize("flag", [False, True])
def test_another_length_is_an_error(today: Path, flag: bool) -> None:
    module = load(patched(today) / HOME)
    inner = module.RotaryEmbedding(8, 16, save_inv_freqs=flag)
    with pytest.raises(RuntimeError, match="size mismatch for inv_freq"):
        inner.load_state_dict({"inv_freq": torch.ones(3)})


# writing and taking back


def test_idempotent(tree: Path) -> None:
    patched(tree)
    before = content(tree)
    assert plan_patch(tree).files == ()
    apply(plan_patch(tree))
    assert content(tree) == before


def test_revert_is_byte_for_byte(tree: Path) -> None:
    (tree / HOME).chmod(0o640)
    before = content(tree)
    patched(tree)
    assert set(content(tree)) - set(before) == {
        f"{KEPT}/{name}" for name in (".gitignore", "patch.json", str(HOME))
    }
    assert (tree / HOME).stat().st_mode & 0o777 == 0o640
    assert revert(tree).files != ()
    assert content(tree) == before
    assert (tree / HOME).stat().st_mode & 0o777 == 0o640
    assert not (tree / KEPT).exists()
    assert revert(tree).files == ()


def test_revert_refuses_a_file_edited_since(today: Path) -> None:
    patched(today)
    edit(today, "import math", "import math  # mine")
    before = content(today)
    with pytest.raises(Refused, match=f"{HOME}: edited since"):
        revert(today)
    assert content(today) == before
    assert plan_patch(today).files == ()


def test_revert_refuses_a_kept_file_that_was_edited(today: Path) -> None:
    patched(today)
    edit(today, "import math", "import maths", Path(KEPT) / HOME)
    with pytest.raises(Refused, match="is missing or was edited"):
        revert(today)


@pytest.mark.parametrize(
    "text", ["{", '{"files": []}', '{"files": {"megatron/../x": {"original": "", "patched": ""}}}']
)
def test_revert_refuses_a_strange_record(today: Path, text: str) -> None:
    patched(today)
    (today / KEPT / "patch.json").write_text(text)
    with pytest.raises(Refused, match="nothing was changed"):
        revert(today)


def test_revert_after_git_did_it(today: Path, trees: Mapping[str, Path]) -> None:
    original = (today / HOME).read_bytes()
    patched(today)
    (today / HOME).write_bytes(original)
    assert plan_revert(today).files == ()
    patched(today)
    revert(today)
    assert (today / HOME).read_bytes() == original
    patched(today)
    shutil.copy(trees["2024-03"] / HOME, today / HOME)  # another version was checked out
    revert(today)
    assert (today / HOME).read_bytes() == (trees["2024-03"] / HOME).read_bytes()
    assert not (today / KEPT).exists()


def two_files(tree: Path) -> None:
    text = (tree / HOME).read_text()
    (tree / "megatron" / "model" / "zz.py").write_text(text)


@pytest.mark.parametrize("call", range(1, 6))
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_all_or_nothing(
    today: Path, call: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the renames fails (four kept files, then the two): all is as before."""
    two_files(today)
    before = content(today)
    plan = plan_patch(today)
    real, calls = os.replace, itertools.count(1)

    def replace(*args: Any) -> None:
        if next(calls) == call + 1:
            raise error("no")
        real(*args)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(error):
        apply(plan)
    assert content(today) == before


def test_revert_is_all_or_nothing(today: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_files(today)
    original = content(today)
    patched(today)
    before = content(today)
    real, calls = os.replace, itertools.count(1)

    def replace(*args: Any) -> None:
        if next(calls) == 2:
            raise OSError("no")
        real(*args)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="no"):
        revert(today)
    assert content(today) == before
    monkeypatch.undo()
    revert(today)
    assert content(today) == original


def test_a_file_that_changed_meanwhile(today: Path) -> None:
    plan = plan_patch(today)
    edit(today, "import math", "import math  # mine")
    before = content(today)
    with pytest.raises(BridgeError, match="changed during the run"):
        apply(plan)
    assert content(today) == before


# what is refused

STORES = '        self.register_buffer("inv_freq", inv_freq, persistent=save_inv_freqs)\n'
SLOPES = '        self.register_buffer("slopes", slopes)\n'


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (SLOPES, '        setattr(self, "s", 1)\n        self.slopes = slopes\n', "assigned"),
        (SLOPES, "        self.register_buffer(NAME, slopes)\n", "name is not a literal"),
        (SLOPES, "        if math:\n    " + SLOPES, "a separate statement"),
        (SLOPES, '        self.register_buffer("slopes", slopes * 2)\n', "computed as slopes"),
        (SLOPES, '        self.register_buffer("slopes", *slopes)\n', "arguments other than"),
        (SLOPES, '        self.register_buffer("slopes", tensor=slopes)\n', "arguments other than"),
        (SLOPES, '        self.register_buffer("slopes", slopes, False)\n', "arguments other than"),
        (SLOPES, '        other.register_buffer("slopes", slopes)\n', "on self"),
        (SLOPES, '        keep = self.register_buffer("slopes", slopes)\n', "a separate statement"),
        (SLOPES, SLOPES + SLOPES.replace("slopes", "inv_freq"), "both inv_freq and slopes"),
        ("class AliBi(torch.nn.Module)", "class AliBi", "is not a subclass"),
        (
            SLOPES,
            SLOPES + "        self.register_load_state_dict_pre_hook(f)\n",
            "its own load hook",
        ),
        (SLOPES, SLOPES + "\n    def _load_from_state_dict(self): pass\n", "its own load hook"),
        ("import torch\n", "import torch as t\ntorch = t\n", "does not import torch"),
        ("class RotaryEmbedding", "class Rotary", "has no RotaryEmbedding"),
        (STORES, "", "has no RotaryEmbedding"),
        ("import math\n", "import math(\n", "cannot be parsed"),
    ],
)
def test_unknown_forms_are_refused(today: Path, old: str, new: str, reason: str) -> None:
    two_files(today)
    other = f"megatron/model/zz.py:{line_of(today, 'AliBi')} (AliBi: slopes)"
    edit(today, old, new)
    before = content(today)
    with pytest.raises(Refused) as caught:
        plan_patch(today)
    assert caught.value.exit_code == 4
    assert reason in str(caught.value)
    if reason[:3] != "can":  # the others are named too
        assert other in str(caught.value)
    assert content(today) == before


def test_classes_of_one_name_are_refused(today: Path) -> None:
    with (today / HOME).open("a") as file:
        file.write("\n\nclass AliBi(torch.nn.Module):\n    pass\n")
    with pytest.raises(Refused, match="is not the only class of that name"):
        plan_patch(today)


def test_classes_inside_something_are_refused(today: Path) -> None:
    before, word, after = (today / HOME).read_text().partition("class AliBi")
    inside = textwrap.indent(word + after, "    ")
    (today / HOME).write_text(f"{before}if math:\n{inside}")
    with pytest.raises(Refused, match="at the top level of the file"):
        plan_patch(today)


def test_half_a_patch_is_refused(today: Path) -> None:
    patched(today)
    edit(today, '        _neox_bridge_load(self, "slopes", state_dict, prefix, rest[-1])\n', "")
    with pytest.raises(Refused, match="contains only a part of the patch"):
        plan_patch(today)


def test_links_are_refused(today: Path) -> None:
    moved = today / "elsewhere"
    (today / HOME).rename(moved)
    (today / HOME).symlink_to(moved)
    with pytest.raises(Refused, match="is a link"):
        plan_patch(today)


def test_not_a_tree(tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match="no such folder"):
        plan_patch(tmp_path / "none")
    with pytest.raises(Refused, match="is not the root of a GPT-NeoX source tree"):
        plan_patch(tmp_path)


# the command


def test_dry_run_is_a_diff_that_git_applies(tree: Path) -> None:
    before = content(tree)
    done = run("patch", tree, "--dry-run")
    assert done.exit_code == 0
    assert content(tree) == before
    want = plan_patch(tree).files[0].new
    subprocess.run(["git", "apply", "-"], input=done.stdout, text=True, cwd=tree, check=True)
    assert (tree / HOME).read_bytes() == want


def test_command(tree: Path) -> None:
    before = content(tree)
    line = line_of(tree, "SinusoidalPositionalEmbedding")
    done = run("patch", tree)
    assert done.exit_code == 0, done.output
    assert f"{HOME}:{line}: SinusoidalPositionalEmbedding: inv_freq no longer stored" in done.stdout
    assert f"patched {tree}: 1 file; neox-bridge patch {tree} --revert undoes it" in done.stdout
    assert "is patched already" in run("patch", tree).stdout
    there = content(tree)
    back = run("patch", tree, "--revert", "--dry-run").stdout
    assert content(tree) == there
    assert '-        self.register_buffer("slopes", slopes, persistent=False)' in back
    assert f"reverted {tree}: 1 file" in run("patch", tree, "--revert").stdout
    assert content(tree) == before
    assert "is not patched" in run("patch", tree, "--revert").stdout


def test_command_json(today: Path) -> None:
    facts = json.loads(run("patch", today, "--dry-run", "--json").stdout)
    assert facts["written"] is False
    (file,) = facts["files"]
    assert file["path"] == str(HOME)
    assert file["changes"][0]["line"] == line_of(today, "SinusoidalPositionalEmbedding")
    assert file["diff"].startswith(f"--- a/{HOME}\n")
    assert json.loads(run("patch", today, "--json").stdout)["written"] is True
    assert json.loads(run("patch", today, "--json").stdout)["files"] == []
    facts = json.loads(run("patch", today, "--revert", "--json").stdout)
    assert (facts["action"], facts["written"]) == ("revert", True)


def test_command_refuses(today: Path) -> None:
    edit(today, SLOPES, SLOPES.replace("slopes)", "slopes + 0)"))
    alibi, rotary = line_of(today, "AliBi"), line_of(today, "RotaryEmbedding")
    done = run("patch", today)
    assert done.exit_code == 4
    assert done.stdout == ""
    assert f"{HOME}:{alibi} (AliBi: slopes): its value is not computed as slopes" in done.stderr
    assert f"{HOME}:{rotary} (RotaryEmbedding: inv_freq)" in done.stderr


def test_command_without_libcst(today: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(today)
    monkeypatch.setitem(sys.modules, "libcst", None)
    done = run("patch", today)
    assert done.exit_code == 1
    assert f"Install it: {install_command('patch')}" in done.stderr
    assert run("patch", today, "--revert").exit_code == 0


def test_the_page_shows_what_happens(today: Path) -> None:
    """But for the numbers of lines, which are those of the real tree: see the next test."""
    texts = blocks_of_the_page()
    assert texts["diff"] in plan_patch(today).diff
    changes = shown_changes(run("patch", today).stdout)
    assert [(file, what) for file, _, what in shown_changes(texts["console"])] == [
        (file, what) for file, _, what in changes
    ]


@pytest.mark.neox
@pytest.mark.parametrize("trees", ["real"], indirect=True)
def test_the_page_shows_what_happens_line_by_line(today: Path) -> None:
    shown = shown_changes(blocks_of_the_page()["console"])
    assert shown == shown_changes(run("patch", today).stdout)


def blocks_of_the_page() -> dict[str, str]:
    """The page's code blocks by language; of several the first."""
    blocks = [block.split("\n", 1) for block in PAGE.read_text().split("```")[1::2]]
    return {language: text for language, text in reversed(blocks) if language}


def shown_changes(text: str) -> list[tuple[str, str, str]]:
    """The file, line and description of each change that the command printed."""
    rows = [line.split(":", 2) for line in text.splitlines() if line.startswith("megatron/")]
    return [(file, line, what) for file, line, what in rows]


def test_the_page_shows_what_to_do_by_hand() -> None:
    page = PAGE.read_text()
    source = page[page.rindex("class RotaryEmbedding") :].rpartition("```")[0]
    names: dict[str, Any] = {"torch": torch}
    exec(source, names)
    module = names["RotaryEmbedding"](4)
    module.load_state_dict({})
    module.load_state_dict({"inv_freq": torch.zeros(2)})
    assert module.inv_freq.all()


# at run time

USE = """\
import contextlib, io, sys, torch, warnings
from neox_bridge.compat import install
{first}
{second}
install()
import inspect
from megatron.model.positional_embeddings import AliBi, RotaryEmbedding
from megatron.model.positional_embeddings import SinusoidalPositionalEmbedding
warnings.simplefilter("error")
module = sys.modules["megatron.model.positional_embeddings"]
assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ \\
    == "SourceFileLoader"
assert inspect.getsource(RotaryEmbedding).startswith("class RotaryEmbedding(")
flags = [{{}}] if "save_inv_freqs" not in inspect.signature(RotaryEmbedding).parameters else \\
    [{{}}, {{"save_inv_freqs": True}}]
made = [("inv_freq", SinusoidalPositionalEmbedding(8), False), ("slopes", AliBi(4, 1, 0), False)]
made += [("inv_freq", RotaryEmbedding(8, 16, **flag), bool(flag)) for flag in flags]
for name, inner, stores in made:
    layer = torch.nn.Module()
    layer.add_module("part", inner)
    layer.register_buffer("inv_freq", torch.ones(1))  # another module's is its own affair
    want = getattr(inner, name).clone()
    assert ("part." + name in layer.state_dict()) is stores, name
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for _ in range(2):
            rest = {{"inv_freq": torch.zeros(1)}}
            layer.load_state_dict(rest)
            layer.load_state_dict({{**rest, "part." + name: want}})
    assert torch.equal(getattr(inner, name), want)
    assert said.getvalue().count("neox-bridge:") == 1, said.getvalue()
    inner.register_buffer("other", torch.ones(1))
    assert "other" in inner.state_dict()
loading = RotaryEmbedding._load_from_state_dict
install()
assert RotaryEmbedding._load_from_state_dict is loading
print("patched", sum("neox" in str(finder).lower() for finder in sys.meta_path))
"""
ORDERS = {
    "before": ("install()", "import megatron.model.positional_embeddings"),
    "after": ("import megatron.model.positional_embeddings", ""),
    "twice": ("install()", "install()"),
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["2024-03", "today"])
def test_install(name: str, order: str, trees: Mapping[str, Path], tmp_path: Path) -> None:
    use(copy_of(trees, name, tmp_path), order)


@pytest.mark.slow
def test_install_beside_a_patched_tree(tree: Path) -> None:
    use(patched(tree), "before")


def use(tree: Path, order: str) -> None:
    without_packages(tree)
    before = content(tree)
    done = script(tree, USE.format(first=ORDERS[order][0], second=ORDERS[order][1]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["patched", "0" if order == "after" else "1"]
    assert content(tree) == before


def without_packages(tree: Path) -> None:
    """Let the module be imported alone: the real packages import DeepSpeed and more.

    tests/neox/test_patched.py runs install() with all of them.
    """
    for package in ("megatron", "megatron/model"):
        (tree / package / "__init__.py").unlink(missing_ok=True)


def test_install_touches_no_torch(today: Path) -> None:
    without_packages(today)
    code = "import sys\nfrom neox_bridge.compat import install\ninstall()\nimport megatron.model\n"
    done = script(today, code + "print([m for m in ('torch', 'libcst') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_install_says_when_it_finds_nothing(today: Path) -> None:
    without_packages(today)
    (today / HOME).write_text("")
    code = "from neox_bridge.compat import install\ninstall()\n"
    done = script(today, code + "import megatron.model.positional_embeddings")
    assert "has no module classes" in done.stderr


def script(tree: Path, code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_second_patch_that_fails_keeps_the_originals_of_the_first(
    today: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = content(today)
    patched(today)
    two_files(today)  # a copy of what is patched already: the tree needs a second patch
    copy = today / "megatron" / "model" / "zz.py"
    copy.write_bytes(original[str(HOME)])
    before = content(today)
    plan = plan_patch(today)
    real = os.replace
    for call in range(1, 4):
        calls = itertools.count(1)

        def replace(*args: Any, call: int = call, calls: Any = calls) -> None:
            if next(calls) == call:
                raise OSError("no")
            real(*args)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(OSError, match="no"):
            apply(plan)
        monkeypatch.undo()
        assert content(today) == before, call
    apply(plan)
    revert(today)
    assert content(today) == {**original, str(copy.relative_to(today)): original[str(HOME)]}
