"""What doctor says of a version on each side of the change that made the difference."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from neox_bridge.api import open_checkpoint
from neox_bridge.api import plan as make_plan
from neox_bridge.architectures.transformers_limits import refuse_version
from neox_bridge.doctor.judge_hf import judge_hf
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.execution.execute import execute
from neox_bridge.frameworks.facts import TransformersFacts, TreeFacts
from neox_bridge.frameworks.targets import target_named, version_number
from neox_bridge.planning.options import Options

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"


def transformers(version: str) -> TransformersFacts:
    facts = target_named(f"transformers@{version}")
    assert isinstance(facts, TransformersFacts)
    return facts


def tree(name: str) -> TreeFacts:
    facts = target_named(f"neox@{name}")
    assert isinstance(facts, TreeFacts)
    return facts


# --- transformers


@pytest.mark.parametrize(
    ("field", "version", "expected"),
    [
        ("persistent_inv_freq", "4.34.1", True),
        ("persistent_inv_freq", "4.35.0", False),
        ("rope_parameters", "4.57.3", False),
        ("rope_parameters", "5.0", True),
        ("loses_rotary_pct", "4.99", False),
        ("loses_rotary_pct", "5.0.0", True),
        ("loses_rotary_pct", "5.4.9", True),
        ("loses_rotary_pct", "5.5", False),
    ],
)
def test_facts_of_transformers(field: str, version: str, expected: bool) -> None:
    assert getattr(transformers(version), field) is expected


def test_the_first_version_with_gpt_neox() -> None:
    assert transformers("4.20").version == "4.20"
    with pytest.raises(BridgeError, match=r"4\.20"):
        transformers("4.19.4")


@pytest.mark.parametrize("text", ["four", "4", "v4.48", ".4.48"])
def test_what_is_no_version(text: str) -> None:
    with pytest.raises(BridgeError, match="not a version"):
        transformers(text)


def test_versions_compare_by_number() -> None:
    assert version_number("4.9.1") < version_number("4.10") < version_number("5.0.0rc1")


# --- GPT-NeoX by date

CHANGES = [
    ("2023-09-25", "rope_tables_fp32", False, True),
    ("2024-03-04", "buffer", "always", "flag"),
    ("2024-09-06", "mlp_names", "dense", "linear"),
    ("2024-09-06", "plain_mlp_4h", True, False),
    ("2024-11-13", "gqa_order", "interleaved", "grouped"),
    ("2024-12-19", "transformer_engine", False, True),
    ("2025-05-09", "rms_eps", "outside", "inside"),
]


@pytest.mark.parametrize(("day", "field", "before", "after"), CHANGES)
def test_a_tree_of_the_day_before_and_of_the_day_after(
    day: str, field: str, before: Any, after: Any
) -> None:
    changed = date.fromisoformat(day)
    assert getattr(tree(str(changed - timedelta(1))), field) == before
    assert getattr(tree(str(changed + timedelta(1))), field) == after
    with pytest.raises(BridgeError, match=day):
        tree(day)
    with pytest.raises(BridgeError, match=day):
        tree(f"{day[:7]}" if f"{day[:7]}" not in ("2024-03", "2024-09") else day)


def test_names_of_eras_are_the_last_tree_of_each() -> None:
    assert tree("2024-03").buffer == "always"
    assert (tree("2024-09").buffer, tree("2024-09").mlp_names) == ("flag", "dense")
    assert (tree("2024-10").mlp_names, tree("2024-10").gqa_order) == ("linear", "interleaved")
    assert (tree("today").gqa_order, tree("today").rms_eps) == ("grouped", "inside")


@pytest.mark.parametrize(
    ("commit", "field", "value"),
    [
        ("e109bf5", "buffer", "flag"),
        ("e109bf5e068bd64bfd08e5ade4191a7ba3e796e3", "mlp_names", "dense"),
        ("0d4bdb96", "mlp_names", "linear"),
        ("0d4bdb96", "gqa_order", "interleaved"),
        ("96c242eb", "gqa_order", "grouped"),
        ("96c242eb", "rms_eps", "outside"),
        ("4c9f1081", "rms_eps", "inside"),
    ],
)
def test_a_commit_has_its_own_change(commit: str, field: str, value: str) -> None:
    assert getattr(tree(commit), field) == value


@pytest.mark.parametrize("name", ["abcdef0", "2024-13-45x", "yesterday", "e109bf"])
def test_what_names_no_tree(name: str) -> None:
    with pytest.raises(BridgeError):
        tree(name)


# --- folders of Hugging Face

Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family, as the conversion writes it."""
    home = tmp_path_factory.mktemp("hf")
    found = {}
    for family, name in (("gpt_neox", "pythia_fp32_pp1_tp2"), ("llama", "llama_gqa_fp32_tp2")):
        source = open_checkpoint(str(FIXTURES / name / "checkpoints"))
        execute(make_plan(source, Options(), str(home / family)), str(home / family), workers=1)
        found[family] = home / family
    return found


def config(**changes: Any) -> Edit:
    """Keys of config.json that are set; None removes one."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        value = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))

    return edit


def weights(change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = dict(load_file(path))
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return edit


def said(folder: Path, copy: Path, version: str, *edits: Edit) -> dict[str, str]:
    """What is said of a copy with these edits: each code with its severity."""
    shutil.copytree(folder, copy)
    (copy / "neox_bridge.json").unlink()
    for edit in edits:
        edit(copy)
    cases = judge_hf(open_checkpoint(str(copy)), transformers(version))
    return {each.finding.code: each.finding.severity for each in cases}


def rename_head(tensors: dict[str, Any]) -> None:
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")


def store_buffer(tensors: dict[str, Any]) -> None:
    exact = 1.0 / 10000.0 ** (np.arange(0, 2, 2, dtype=np.float32) / 2)
    tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = exact.astype(np.float32)


def store_wrong_buffer(tensors: dict[str, Any]) -> None:
    store_buffer(tensors)
    tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] *= 1.5


def store_mask(tensors: dict[str, Any]) -> None:
    tensors["gpt_neox.layers.0.attention.bias"] = np.ones((1, 1, 4, 4), np.uint8)


def untie_biases(tensors: dict[str, Any]) -> None:
    for name in [n for n in tensors if ".attention." in n and n.endswith("bias")]:
        del tensors[name]


HALF = config(rotary_pct=0.5, rope_parameters=None)
NEW_SPELLING = {"rope_theta": None, "rope_parameters": {"rope_theta": 2e4}}
GPT_NEOX: list[tuple[str, Edit, str, str | None, str, str | None]] = [
    # what is done to the folder, the last version on one side with what is said of it, the first
    # on the other side with what is said of that
    ("head-name", weights(rename_head), "5.13", "error", "5.14", None),
    (
        "rope-spelling",
        config(
            rotary_pct=None,
            rotary_emb_base=None,
            rope_parameters={"rope_theta": 20000, "partial_rotary_factor": 0.25},
        ),
        "4.57",
        "error",
        "5.0",
        None,
    ),
    (
        "rotary-pct-lost",
        config(rotary_pct=0.5, rope_parameters=None),
        "4.57",
        None,
        "5.0",
        "warning",
    ),
    (
        "rotary-pct-lost",
        config(rotary_pct=0.5, rope_parameters=None),
        "5.4",
        "warning",
        "5.5",
        None,
    ),
    ("inv-freq-stored", weights(store_wrong_buffer), "4.34", "warning", "4.35", "info"),
    ("dtype-one-spelling", config(torch_dtype=None), "4.55", "info", "4.56", None),
]


@pytest.mark.parametrize(("code", "edit", "old", "then", "new", "since"), GPT_NEOX)
def test_each_side_of_a_change(
    code: str,
    edit: Edit,
    old: str,
    then: str | None,
    new: str,
    since: str | None,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    assert said(folders["gpt_neox"], tmp_path / "old", old, edit).get(code) == then
    assert said(folders["gpt_neox"], tmp_path / "new", new, edit).get(code) == since


def test_a_folder_that_was_just_written_is_fine_everywhere(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for version in ("4.30", "4.37", "4.48", "5.5", "5.24"):
        assert said(folders["gpt_neox"], tmp_path / version, version) == {}
        assert said(folders["llama"], tmp_path / f"llama{version}", version).keys() <= {
            "class-unknown"
        }


def test_buffers_that_are_right_or_constant_are_worth_knowing_only(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folders["gpt_neox"]
    for number, version in enumerate(("4.34", "4.35")):
        found = said(folder, tmp_path / f"a{number}", version, weights(store_buffer))
        assert found == {"inv-freq-stored": "info"}
        found = said(folder, tmp_path / f"b{number}", version, weights(store_mask))
        assert found == {"mask-buffers": "info"}


def test_biases_that_are_missing_are_made_up_before_4_37(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder, without = folders["gpt_neox"], weights(untie_biases)
    says = config(attention_bias=False)
    assert said(folder, tmp_path / "a", "4.36", without, says) == {"biases": "error"}
    assert said(folder, tmp_path / "b", "4.37", without, says) == {}
    silent = config(attention_bias=None)
    assert said(folder, tmp_path / "c", "4.37", without, silent) == {"biases": "error"}


def test_another_dtype_in_the_config_is_a_warning(folders: dict[str, Path], tmp_path: Path) -> None:
    edit = config(dtype="float16", torch_dtype="float16")
    assert said(folders["gpt_neox"], tmp_path / "a", "5.5", edit) == {"config-dtype": "warning"}


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "vocab_size"])
def test_a_size_that_the_tensors_deny_is_an_error(
    key: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    size = json.loads((folders["gpt_neox"] / "config.json").read_text())[key]
    edit = config(**{key: size + 4})
    found = said(folders["gpt_neox"], tmp_path / "a", "5.5", edit)
    assert found.get("config-size") == "error"


@pytest.mark.parametrize(
    ("changes", "old", "then", "new"),
    [
        ({}, "4.30", {"class-unknown"}, "4.31"),  # grouped queries
        ({"rope_theta": 20000.0, "rope_parameters": None}, "4.32", {"llama-ignored"}, "4.33"),
        (
            {"rope_theta": None, "rope_parameters": {"rope_theta": 2e4}},
            "4.57",
            {"rope-spelling"},
            "5.0",
        ),
    ],
)
def test_each_side_of_a_change_of_llama(
    changes: dict[str, Any],
    old: str,
    then: set[str],
    new: str,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    edit = config(**changes)
    assert said(folders["llama"], tmp_path / "old", old, edit).keys() & then == then
    assert said(folders["llama"], tmp_path / "new", new, edit).keys() & then == set()


def test_what_a_version_would_leave_out_is_refused(folders: dict[str, Path]) -> None:
    model = open_checkpoint(str(folders["llama"])).config
    other_base, biases = replace(model, rotary_base=2e4), replace(model, attention_bias=True)
    for wrong, old, new in ((other_base, "4.32", "4.33"), (biases, "4.33", "4.34")):
        with pytest.raises(Refused, match=old):
            refuse_version("llama", wrong, transformers(old))
        refuse_version("llama", wrong, transformers(new))
        refuse_version("mistral", wrong, transformers(old))
    pythia = replace(open_checkpoint(str(folders["gpt_neox"])).config, attention_bias=False)
    with pytest.raises(Refused, match="attention_bias"):
        refuse_version("gpt_neox", pythia, transformers("4.36"))
    refuse_version("gpt_neox", pythia, transformers("4.37"))
