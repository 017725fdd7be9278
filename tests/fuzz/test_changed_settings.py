"""Settings of both sides, whatever they say: a plan that can be printed, or an error for users."""

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from bounds import CHANGES, JSON, ends, examples, folder, mutated, within
from hypothesis import given
from hypothesis import strategies as st

from neox_bridge.architectures import setting_types
from neox_bridge.errors import BridgeError
from neox_bridge.formats.yml import merge_ymls
from neox_bridge.planning.report import to_json

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from common import convert, fixture, plan_of, step_of

_FOLDER = folder()
_TOP = Path(_FOLDER.name)
_SEEDS = st.integers(0, 2**32).map(random.Random)
_CHANGED = st.lists(st.tuples(_SEEDS, JSON), min_size=1, max_size=3)


def _planned(source: Path, to: str) -> dict[str, Any] | None:
    """The plan as JSON; None for an error, which is short."""
    with ends():
        try:
            plan = plan_of(source, _TOP / "out", to=to)
            text = json.dumps(to_json(plan, 0))
        except BridgeError as error:
            assert 0 < len(str(error)) < 2000  # noqa: PT017
            return None
    assert not (_TOP / "out").exists()
    found: dict[str, Any] = json.loads(text)
    return found


def _source(name: str, make: Callable[[Path], object]) -> Path:
    path = _TOP / name
    if not path.exists():
        make(path)
    return path


def _hf(family: str) -> Path:
    """A model of each family; made of a GPT-NeoX checkpoint, which takes less time than torch."""
    origin = {"gpt_neox": "pythia_fp32_pp1_tp2", "phi3": "phi3_fp32_tp2", "glm": "phi3_fp32_tp2"}
    if family == "mamba":
        root = Path(__file__).parents[1] / "data" / "mamba" / "checkpoints"
    else:
        root = fixture(origin.get(family, "llama_gqa_fp32_tp2"))

    def make(path: Path) -> None:
        source = root
        if family == "glm":  # the record says what it was
            source = shutil.copytree(root, _TOP / "neox-glm")
            was = {**json.loads((_hf("phi3") / "good.json").read_text()), "model_type": "glm"}
            was |= {"architectures": ["GlmForCausalLM"], "attention_bias": False}
            del was["resid_pdrop"], was["original_max_position_embeddings"], was["sliding_window"]
            (step_of(source) / "neox_bridge.json").write_text(json.dumps({"config": was}))
        convert(source, path)
        config = json.loads((path / "config.json").read_text())
        if family in ("mistral", "qwen2"):
            config["model_type"] = family
        (path / "good.json").write_text(json.dumps(config))
        (path / "neox_bridge.json").rename(path / "record.json")

    return _source(f"hf-{family}", make)


_FAMILIES = ("gpt_neox", "llama", "mistral", "mamba", "phi3", "glm")
_SETTINGS = st.dictionaries(st.sampled_from(sorted(setting_types.HF)), JSON, max_size=3)


@given(st.sampled_from(_FAMILIES), _SETTINGS, _CHANGED, st.sampled_from(("neox", "hf")))
@examples(300)
def test_config_json(
    family: str, more: dict[str, Any], changed: list[tuple[random.Random, Any]], to: str
) -> None:
    source = _hf(family)
    config = json.loads((source / "good.json").read_text())
    for chance, value in changed:
        config = within(config, chance, value)
    config = {**config, **more} if isinstance(config, dict) else config
    (source / "config.json").write_text(json.dumps(config))
    _planned(source, to)


@given(st.sampled_from(("gpt_neox", "llama")), _CHANGED, st.sampled_from(("neox", "hf")))
@examples(160)
def test_the_record_of_hugging_faces_side(
    family: str, changed: list[tuple[random.Random, Any]], to: str
) -> None:
    source = _hf(family)
    shutil.copy(source / "good.json", source / "config.json")
    record = json.loads((source / "record.json").read_text())
    for chance, value in changed:
        record = within(record, chance, value)
    (source / "neox_bridge.json").write_text(json.dumps(record))
    try:
        _planned(source, to)
    finally:
        (source / "neox_bridge.json").unlink()


def _root(layout: str) -> Path:
    """A checkpoint that this tool wrote, and with it a record."""
    return _source(f"neox-{layout}", lambda path: convert(_hf_source(), path, tp=2, layout=layout))


def _hf_source() -> Path:
    source = _hf("gpt_neox")
    shutil.copy(source / "good.json", source / "config.json")
    return source


@given(_CHANGED, st.sampled_from(("neox", "hf")))
@examples(160)
def test_the_record_of_gpt_neoxs_side(changed: list[tuple[random.Random, Any]], to: str) -> None:
    root = _root("layers")
    path = step_of(root) / "neox_bridge.json"
    good = path.read_text()
    record = json.loads(good)
    for chance, value in changed:
        record = within(record, chance, value)
    try:
        path.write_text(json.dumps(record))
        _planned(root, to)
    finally:
        path.write_text(good)


_NEOX = st.dictionaries(st.sampled_from(sorted(setting_types.NEOX)), JSON, max_size=4)


@given(st.sampled_from(("pythia_fp32_pp1_tp2", "llama_gqa_fp32_tp2", "pythia_fp32_pp0_tp2")),
       _NEOX, CHANGES, st.sampled_from(("neox", "hf")))  # fmt: skip
@examples(300)
def test_ymls_of_a_run(
    name: str, more: dict[str, Any], changes: list[tuple[int, int]], to: str
) -> None:
    root = _source(name, lambda path: shutil.copytree(fixture(name), path))
    folder = step_of(root) / "configs"
    for path in sorted((step_of(fixture(name)) / "configs").iterdir()):
        raw = path.read_bytes()
        (folder / path.name).write_bytes(mutated(raw, changes) if path.name == "base.yml" else raw)
    (folder / "zz.yml").write_text(json.dumps(more))
    _planned(root, to)


# --- the merge alone, and yaml as the oracle ---------------------------------------------------

_LINES = (
    "a: 1", "a-b: 2", "a_b: [1, 2]", "c: {d: e}", "c:", "  d: e", "- 1", "'a': b", "? a", ": b",
    "a: &x 1", "b: *x", "<<: {a: 1}", "<<: [{a: 1}, {b: 2}]", "a: !!str 1", "a: !!int '3'",
    "a: !!python/name:os.system", "d: 2024-01-02", "d: 2024-01-02T03:04:05Z", "e: 1e-5", "f: .nan",
    "g: 0x1F", "h: 1:30", "i: |", "  text", "---", "...", "%YAML 1.1", "# comment", "j: !!set {a}",
    "k: !!binary aGk=", "~: 1", "1: 2", "yes: no", '"\\e": 1', "{a: 1}", "[1]", "l: >-", "\t",
    "m: @",
)  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return value.isoformat() if hasattr(value, "isoformat") else value


@given(st.lists(st.sampled_from(_LINES), max_size=8), CHANGES)
@examples(800)
def test_the_merge(lines: list[str], changes: list[tuple[int, int]]) -> None:
    raw = mutated("\n".join(lines).encode(), changes[:2])
    path = _TOP / "x.yml"
    path.write_bytes(raw)
    with ends():
        try:
            merged, _ = merge_ymls([str(path), str(path)])
        except BridgeError as error:
            assert len(str(error)) < 1000  # noqa: PT017
            return
    theirs = yaml.load(raw.decode(), Loader=yaml.CSafeLoader) or {}
    expected = {key.replace("-", "_"): value for key, value in _plain(theirs).items()}
    assert json.dumps(merged) == json.dumps(expected)  # NaN is NaN


# --- the plan's JSON, which a report reads -----------------------------------------------------


@given(st.sampled_from(("neox", "hf")), _CHANGED)
@examples(200)
def test_the_plans_json(to: str, changed: list[tuple[random.Random, Any]]) -> None:
    from neox_bridge.report.sections import section_of

    document: Any = _planned(_hf_source(), to)
    assert document is not None
    for chance, value in changed:
        document = within(document, chance, value)
    if not isinstance(document, dict):
        return
    with ends():
        try:
            section_of(document, "plan.json", "s0-")
        except BridgeError as error:
            assert len(str(error)) < 2000  # noqa: PT017
