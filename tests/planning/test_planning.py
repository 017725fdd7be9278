"""Plans: complete or refused, and the numbers that GPT-NeoX would compute."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from checkpoint_edits import edit_yml
from common import convert, fixture, make_hf, plan_of, step_of
from hypothesis import given
from hypothesis import strategies as st
from published import PUBLISHED

from neox_bridge.errors import Refused
from neox_bridge.frameworks.eras import ERAS, Era, era_named, known_keys
from neox_bridge.planning import random_states
from neox_bridge.planning.plan import Plan
from neox_bridge.planning.vocabulary import fit, keep, padded_size
from neox_bridge.tensors.coverage import CoverageError, check_files, tiles
from neox_bridge.tensors.pieces import OutputFile, OutputTensor, Piece, box
from neox_bridge.tensors.tensor_ref import TensorRef

REF = TensorRef("/f", 0, "float32", (4, 6))
FULL = OutputTensor("t", "float32", (4, 6), (box(REF),))


def plan(tensor: OutputTensor, size: int = 96) -> Plan:
    return Plan({}, {}, (OutputFile("f", size, (), (tensor,)),))


def part(start: tuple[int, int], to: tuple[int, int], shape: tuple[int, int]) -> Piece:
    return Piece(REF, start, to, shape)


def test_a_whole_plan_passes() -> None:
    check_files(plan(FULL).files)


@pytest.mark.parametrize(
    "broken",
    [
        plan(replace(FULL, pieces=(part((0, 0), (0, 0), (3, 6)),))),
        plan(replace(FULL, pieces=(box(REF), part((0, 0), (0, 0), (1, 1))))),
        plan(replace(FULL, pieces=(part((0, 0), (0, 0), (2, 6)), part((0, 0), (1, 0), (2, 6))))),
        plan(replace(FULL, pieces=(part((1, 0), (0, 0), (4, 6)),))),
        plan(replace(FULL, pieces=())),
        plan(replace(FULL, pieces=(), reduce="sum")),
        plan(replace(FULL, pieces=(box(REF), part((0, 0), (0, 0), (3, 6))), reduce="replica")),
        plan(replace(FULL, pieces=(), inline=b"short")),
        plan(replace(FULL, offset=8)),
        plan(FULL, size=100),
        Plan({}, {}, (OutputFile("f", 96, (), (FULL,)), OutputFile("f", 96, (), (FULL,)))),
        Plan({}, {}, (OutputFile("f", 96, ((90, b"overlap"),), (FULL,)),)),
    ],
)
def test_gaps_and_overlaps_are_seen(broken: Plan) -> None:
    with pytest.raises(CoverageError):
        check_files(broken.files)


@given(st.data())
def test_tiles_is_what_counting_says(data: st.DataObject) -> None:
    import numpy as np

    shape = (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4)))
    pieces = []
    for _ in range(data.draw(st.integers(0, 4))):
        to = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        size = tuple(data.draw(st.integers(0, n - t)) for n, t in zip(shape, to, strict=True))
        pieces.append(Piece(None, (0, 0), to, size))
    count = np.zeros(shape, int)
    for piece in pieces:
        (r, c), (h, w) = piece.to, piece.shape
        count[r : r + h, c : c + w] += 1
    assert tiles(shape, pieces) == bool((count == 1).all())


@given(
    rows=st.integers(1, 100_000),
    size=st.integers(1, 60_000),
    tp=st.sampled_from([1, 2, 3, 4, 8, 12, 16]),
)
def test_every_row_has_room_and_gpt_neox_agrees(rows: int, size: int, tp: int) -> None:
    found = fit(rows, size, tp, None)
    assert found.padded >= rows
    assert found.padded == padded_size(size, found.multiple, tp)
    if rows % tp == 0 and size <= rows:  # one step of all rows keeps them
        assert found.padded == rows
    else:
        assert found.multiple == 128 or padded_size(size, found.multiple // 2, tp) < rows


@pytest.mark.parametrize(
    ("rows", "tp", "padded", "multiple"),
    [
        (50304, 1, 50304, 128),
        (50432, 1, 50432, 256),
        (50688, 1, 50688, 512),
        (50304, 2, 50304, 64),
        (50688, 4, 50688, 128),
    ],
)
def test_pythias_rows(rows: int, tp: int, padded: int, multiple: int) -> None:
    found = fit(rows, 50277, tp, None)
    assert (found.padded, found.multiple) == (padded, multiple)


@given(
    size=st.integers(1, 3000),
    multiple=st.sampled_from([1, 8, 100, 128]),
    tp=st.sampled_from([1, 2, 4, 6]),
    new=st.sampled_from([1, 2, 3, 4, 8]),
)
def test_an_unknown_tokenizer_still_agrees(size: int, multiple: int, tp: int, new: int) -> None:
    """Whatever size the run's tokenizer has, GPT-NeoX computes the rows that were written."""
    rows = padded_size(size, multiple, tp)
    found = keep(rows, multiple, tp, new)
    assert found.padded >= rows
    assert padded_size(size, found.multiple, new) == found.padded


def test_random_states_are_those_of_the_libraries() -> None:
    import random

    import numpy as np

    torch.manual_seed(77)
    assert torch.get_rng_state().numpy().tobytes() == random_states.torch_state(77)
    random.seed(77)
    assert random.getstate() == random_states.python_state(77)
    np.random.seed(77)
    name, _, position, gauss, cached = random_states.numpy_state(77)
    state = np.random.get_state()
    assert (name, position, gauss, cached) == (state[0], *state[2:])  # type: ignore[index]


@pytest.mark.parametrize("era", ERAS, ids=lambda era: era.name)
def test_the_yml_has_only_keys_that_the_era_knows(era, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    hf = make_hf(tmp_path / "hf", hidden_act="gelu_fast")
    for inv_freq in ("omit", "store"):
        target = tmp_path / inv_freq
        convert(hf, target, era=era, inv_freq=inv_freq)
        loaded = yaml.safe_load((target / "finetune.yml").read_text())
        assert set(loaded) <= known_keys(era)
        stores = inv_freq == "store" and era.inv_freq_key
        assert ("rotary_save_freqs_buffer" in loaded) == stores


@pytest.mark.parametrize("era", ERAS, ids=lambda era: era.name)
@pytest.mark.parametrize("kind", ["hf", "neox"])
def test_no_default_of_an_older_tree_turns_dropout_on(kind: str, era: Era, tmp_path: Path) -> None:
    """It was 0.1 until 2023-12-26 (GPT-NeoX#1107), and Pythia was trained without."""
    source = make_hf(tmp_path / "hf", attention_dropout=0.2)
    if kind == "neox":
        convert(source, tmp_path / "run", to="neox")
        source = tmp_path / "run"
    convert(source, tmp_path / "neox", to="neox", era=era)
    for yml in ("finetune.yml", "global_step0/configs/neox_bridge.yml"):
        loaded = yaml.safe_load((tmp_path / "neox" / yml).read_text())
        assert loaded["attention_dropout"] == 0.2
        older = era.name in ("v1.0", "2024-03")
        assert loaded.get("hidden_dropout") == (0.0 if older else None)


@pytest.mark.parametrize("era", [None, *ERAS], ids=lambda era: era.name if era else "none")
def test_dropout_of_v1_is_written_where_the_default_is_another(
    era: Era | None, tmp_path: Path
) -> None:
    """The yml of this run of GPT-NeoX v1.0 leaves it out, which meant 0.1."""
    source = tmp_path / "v1"
    shutil.copytree(PUBLISHED / "v1_dp2" / "flat", source)
    yml = source / "160M.yml"
    kept = {k: v for k, v in yaml.safe_load(yml.read_text()).items() if "dropout" not in k}
    yml.write_text(yaml.safe_dump(kept))
    plan = convert(source, tmp_path / "neox", to="neox", era=era)
    loaded = yaml.safe_load((tmp_path / "neox" / "finetune.yml").read_text())
    changed = era is None or era.name != "v1.0"
    assert loaded.get("hidden_dropout") == (0.1 if changed else None)
    assert loaded.get("attention_dropout") == (0.1 if changed else None)
    assert ("defaults-kept" in {f.code for f in plan.findings}) == changed
    convert(source, tmp_path / "hf", to="hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["hidden_dropout"], config["attention_dropout"]) == (0.1, 0.1)


@pytest.mark.parametrize(
    ("tp", "pp", "era", "stage"),
    [(1, 0, "today", 2), (1, 1, "today", 1), (2, 0, "today", 1), (2, 0, "2024-03", 2)],
)
def test_the_yml_has_a_zero_stage_that_gpt_neox_starts_with(
    tp: int, pp: int, era: str, stage: int, tmp_path: Path
) -> None:
    source = shutil.copytree(fixture("pythia_fp32_pp0_tp1"), tmp_path / "run")
    edit_yml(zero_optimization={"stage": 2})(step_of(source))
    plan = convert(source, tmp_path / "new", to="neox", tp=tp, pp=pp, era=era_named(era))
    loaded = yaml.safe_load((tmp_path / "new" / "finetune.yml").read_text())
    assert loaded["zero_optimization"]["stage"] == stage
    assert ("zero-stage" in {f.code for f in plan.findings}) == (stage == 1)


def test_one_yml_in_the_root_and_one_blank(tmp_path: Path) -> None:
    plan = convert(fixture("pythia_fp16_pp1_tp1"), tmp_path / "neox", to="neox", tp=2)
    assert [p.name for p in (tmp_path / "neox").glob("*.yml")] == ["finetune.yml"]
    loaded = yaml.safe_load((tmp_path / "neox/finetune.yml").read_text())
    assert [key for key, value in loaded.items() if value is None] == [k for _, k in plan.blanks]
    # the run's own settings, but for the layout and the paths
    assert loaded["optimizer"]["params"]["lr"] == 0.001
    assert loaded["fp16"]["initial_scale_power"] == 8
    assert loaded["model_parallel_size"] == 2
    assert loaded["finetune"] is True
    assert loaded["load"] == str(tmp_path / "neox")


def test_plain_mlps_of_older_trees_are_four_times_as_wide(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", intermediate_size=96)
    with pytest.raises(Refused, match="intermediate_size"):
        plan_of(hf, tmp_path / "neox", era=ERAS[0])
    assert plan_of(hf, tmp_path / "neox").target["era"] == "today"


def test_a_plan_is_the_same_twice(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    assert plan_of(hf, tmp_path / "neox", tp=2) == plan_of(hf, tmp_path / "neox", tp=2)
