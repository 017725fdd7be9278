"""GPT-NeoX source trees read by their syntax, and the names of targets.

On stand-ins for four trees, and by ``make test-neox`` on the real ones.
"""

import hashlib
import importlib.metadata
import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from stand_in_trees import NAMES

from neox_bridge.errors import BridgeError
from neox_bridge.frameworks.eras import ERAS, known_keys
from neox_bridge.frameworks.facts import TransformersFacts, TreeFacts
from neox_bridge.frameworks.source_tree import (
    ARGUMENTS,
    CHECKPOINTING,
    NORMS,
    POSITIONS,
    TRANSFORMER,
    read_tree,
)
from neox_bridge.frameworks.targets import target_named

# the yml keys of the real trees: how many, and sha256 of their names, sorted, a line each
KEYS = {
    "2024-03": (239, "9e221750cb700fddcf6ca301bd1770dd4d57a452c6789d5b75317613d47689be"),
    "2024-09": (268, "ff027156c63b652fdf11568b3d12bcdd42fa895f1ee734a6b0bdbe0520ee1554"),
    "2024-10": (309, "464cc4079bb93cf3514a26a607548e987baac77765981dea1c6504e4f875f6e1"),
    "today": (318, "a4bd48ca24759d0a631c65888656152e2340a714910f7ff02e92772056d6fe31"),
}


def named(text: str) -> TreeFacts:
    found = target_named(text)
    assert isinstance(found, TreeFacts)
    return found


@pytest.fixture
def tree(request: pytest.FixtureRequest, trees: Mapping[str, Path], tmp_path: Path) -> Path:
    """A copy of a tree to break: today's, or the one that the test names."""
    name = getattr(request, "param", "today")
    return Path(shutil.copytree(trees[name], tmp_path / "tree"))


def edit(tree: Path, file: str, old: str, new: str) -> None:
    text = (tree / file).read_text()
    assert old in text
    (tree / file).write_text(text.replace(old, new))


@pytest.mark.parametrize("name", NAMES)
def test_a_tree_is_what_the_data_say_of_its_time(name: str, trees: Mapping[str, Path]) -> None:
    of_tree, of_date = read_tree(str(trees[name])), named(f"neox@{name}")
    assert replace(of_tree, name="", until="", places={}) == replace(
        of_date, name="", until="", places={}
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_known_keys_are_those_of_the_dataclasses(name: str, trees: Mapping[str, Path]) -> None:
    era = next(era for era in ERAS if era.name == name)
    keys = read_tree(str(trees[name])).keys
    assert keys == known_keys(era)
    digest = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()
    assert (len(keys), digest) == KEYS[name]


def test_each_fact_changes_once_in_time(trees: Mapping[str, Path]) -> None:
    facts = [read_tree(str(trees[name])) for name in NAMES]
    assert [f.buffer for f in facts] == ["always", "flag", "flag", "flag"]
    assert [f.mlp_names for f in facts] == ["dense", "dense", "linear", "linear"]
    assert [f.gqa_order for f in facts] == ["interleaved"] * 3 + ["grouped"]
    assert [f.rms_eps for f in facts] == ["outside"] * 3 + ["inside"]
    assert [f.plain_mlp_4h for f in facts] == [True, True, False, False]
    assert [f.transformer_engine for f in facts] == [False] * 3 + [True]
    biases = ["none", "none", "by activation", "optional"]
    assert [f.gated_biases for f in facts] == biases
    assert all(f.rope_tables_fp32 and "padded_vocab_size" in f.args_checked for f in facts)


def test_places_name_the_line(trees: Mapping[str, Path]) -> None:
    file, line = read_tree(str(trees["today"])).places["rms_eps"].split(":")
    text = (trees["today"] / file).read_text().splitlines()[int(line) - 1]
    assert "rsqrt(variance + self.eps)" in text


@pytest.mark.parametrize("tree", NAMES, indirect=True)
def test_persistent_false_by_hand(tree: Path) -> None:
    text = (tree / POSITIONS).read_text()
    for old in ('("inv_freq", inv_freq)', '("inv_freq", inv_freq, persistent=save_inv_freqs)'):
        text = text.replace(old, '("inv_freq", inv_freq, persistent=False)')
    (tree / POSITIONS).write_text(text)
    assert read_tree(str(tree)).buffer == "never"
    assert read_tree(str(tree)).inv_freq == "omit"


@pytest.mark.parametrize("tree", NAMES, indirect=True)
def test_the_patched_tree_takes_either(tree: Path) -> None:
    pytest.importorskip("libcst")
    from neox_bridge.patch import patcher

    patcher.apply(patcher.plan_patch(str(tree)))
    found = read_tree(str(tree))
    assert found.buffer == "either"
    assert "load hook" in found.places


HOOK = """
class RotaryEmbedding(torch.nn.Module):
    def _keep(self, state, prefix, *_):
        state.pop(prefix + "inv_freq", None)

    def _other(self, state, prefix, *_):
        state.pop(prefix + "bias", None)

    def _prepare_cache(self):
        pass

    def __init__(self, dim, save_inv_freqs=False):
        self.register_buffer("inv_freq", dim, persistent=save_inv_freqs)
        self._register_load_state_dict_pre_hook(self._keep)
"""


def test_a_registered_hook_counts_if_it_is_about_inv_freq(tree: Path) -> None:
    (tree / POSITIONS).write_text(HOOK)
    assert read_tree(str(tree)).buffer == "either"
    (tree / POSITIONS).write_text(HOOK.replace("hook(self._keep)", "hook(self._other)"))
    with pytest.raises(BridgeError, match="load hook"):
        read_tree(str(tree))


@pytest.mark.parametrize(("default", "kind"), [("False", "never"), ("True", "always")])
def test_without_the_flag_passed_on_the_default_counts(tree: Path, default: str, kind: str) -> None:
    edit(tree, TRANSFORMER, "save_inv_freqs=neox_args.rotary_save_freqs_buffer,", "")
    edit(tree, POSITIONS, "save_inv_freqs=False", f"save_inv_freqs={default}")
    assert read_tree(str(tree)).buffer == kind


@pytest.mark.parametrize(
    ("file", "old", "new", "sought"),
    [
        (POSITIONS, "class RotaryEmbedding", "class Rotary", "class RotaryEmbedding"),
        (POSITIONS, '"inv_freq"', '"frequencies"', "register_buffer"),
        (POSITIONS, "persistent=save_inv_freqs", "persistent=keep()", "a known persistent="),
        (
            TRANSFORMER,
            "save_inv_freqs=neox_args.rotary_save_freqs_buffer",
            "save_inv_freqs=x",
            "save",
        ),
        (
            POSITIONS,
            "class RotaryEmbedding(torch.nn.Module):",
            "class RotaryEmbedding(torch.nn.Module):\n"
            '    def other(self):\n        self.register_buffer("inv_freq", 1)\n',
            "one and the same persistent=",
        ),
        (TRANSFORMER, "assert mlp_bias is None", "assert not mlp_bias", "assert mlp_bias is None"),
        (TRANSFORMER, "self.linear1 =", "self.up =", "self.linear1 or self.dense_h_to_4h"),
        (TRANSFORMER, "split_sizes = (", "sizes = (", "gqa_project's split_sizes"),
        (TRANSFORMER, "class ParallelMLP(", "class MLP(", "class ParallelMLP"),
        (NORMS, "variance + self.eps", "variance", "rsqrt"),
        (CHECKPOINTING, '"args": {', '"arguments": {', 'the "args"'),
        (CHECKPOINTING, "def check_checkpoint_args", "def check", "check_checkpoint_args"),
        (ARGUMENTS[0], "num_layers: int", "depth: int", "num_layers"),
    ],
)
def test_an_unknown_form_names_the_file_and_what_was_looked_for(
    tree: Path, file: str, old: str, new: str, sought: str
) -> None:
    edit(tree, file, old, new)
    with pytest.raises(BridgeError) as caught:
        read_tree(str(tree))
    assert file in str(caught.value)
    assert sought in str(caught.value)


def test_a_flag_without_a_known_default(tree: Path) -> None:
    edit(tree, TRANSFORMER, "save_inv_freqs=neox_args.rotary_save_freqs_buffer,", "")
    edit(tree, POSITIONS, "save_inv_freqs=False", "save_inv_freqs=DEFAULT")
    with pytest.raises(BridgeError, match=r"does not contain RotaryEmbedding\(…, save_inv_freqs=…"):
        read_tree(str(tree))


@pytest.mark.parametrize("file", ARGUMENTS)
def test_arguments_that_are_no_dataclasses(tree: Path, file: str) -> None:
    (tree / file).write_text("num_layers: int = 2\n")
    with pytest.raises(BridgeError, match=rf"{file} does not contain the dataclasses"):
        read_tree(str(tree))


def test_a_file_that_is_too_large_is_not_read(tree: Path) -> None:
    with (tree / TRANSFORMER).open("a") as file:
        file.truncate(5 << 20)
    with pytest.raises(BridgeError, match=rf"{TRANSFORMER} is larger than 4 MiB"):
        read_tree(str(tree))


@pytest.mark.parametrize("file", [POSITIONS, TRANSFORMER, NORMS, CHECKPOINTING, *ARGUMENTS])
def test_a_missing_or_broken_file_is_named(tree: Path, file: str) -> None:
    (tree / file).write_text("def broken(:\n")
    with pytest.raises(BridgeError, match=rf"{file}, line 1: not valid Python"):
        read_tree(str(tree))
    (tree / file).unlink()
    with pytest.raises(BridgeError, match=f"is not a GPT-NeoX tree: {file}"):
        read_tree(str(tree))


def test_a_folder_that_isn_t_there() -> None:
    with pytest.raises(BridgeError, match="is not a folder"):
        target_named("neox:/nowhere")


def test_nothing_of_a_tree_is_run(tree: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    text = (tree / POSITIONS).read_text()
    (tree / POSITIONS).write_text(f"open({str(mark)!r}, 'w')\n{text}")
    read_tree(str(tree))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("text", "like"),
    [
        ("2024-03", "neox@2024-03"),
        ("today", "neox@today"),
        ("neox@2024-05", "neox@2024-09"),
        ("neox@2024-05-31", "neox@2024-09"),
        ("neox@e109bf5e", "neox@2024-09"),
        ("0d4bdb96", "neox@2024-10"),
        ("neox@0d4bdb965e3bd9eed6df8f5a4f024f9ff310601c", "neox@2024-10"),
        ("neox@2026-06", "neox@today"),
        ("neox@ea7aefd8", "neox@today"),
    ],
)
def test_dates_and_commits_have_an_era(text: str, like: str) -> None:
    found, want = named(text), named(like)
    assert replace(found, name="", until="") == replace(want, name="", until="")


def test_dates_tell_more_than_eras() -> None:
    early, late = named("neox@2025-05-08"), named("neox@2025-05-10")
    assert (early.rms_eps, late.rms_eps) == ("outside", "inside")
    assert not named("neox@2023-06").rope_tables_fp32
    assert not named("neox@2024-12-01").transformer_engine


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("neox@2024-11", "96c242eb changed checkpoints on 2024-11-13"),
        ("neox@2024-03-04", "e109bf5e"),
        ("neox@deadbeef", "is not a known change of checkpoints"),
        ("neox@1999", "neox@2024-03"),
        ("pytorch", "neox:FOLDER"),
        ("transformers@new", "not a version"),
        ("transformers@4.10", "4.20"),
    ],
)
def test_what_can_t_be_placed_says_why(text: str, word: str) -> None:
    with pytest.raises(BridgeError) as caught:
        target_named(text)
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("version", "persistent", "rope", "loses"),
    [
        ("4.34.1", True, False, False),
        ("4.35", False, False, False),
        ("4.48.3", False, False, False),
        ("5.0.0", False, True, True),
        ("5.4", False, True, True),
        ("5.5.0.dev0", False, True, False),
    ],
)
def test_versions(version: str, persistent: bool, rope: bool, loses: bool) -> None:
    want = TransformersFacts(version, persistent, rope, loses)
    assert target_named(f"transformers@{version}") == want


def test_without_transformers_a_version_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(BridgeError, match=r"it is not installed here\..*transformers@4\.48"):
        target_named("transformers")


def test_the_installed_version() -> None:
    import transformers

    found = target_named("transformers")
    assert isinstance(found, TransformersFacts)
    assert found.version == transformers.__version__
