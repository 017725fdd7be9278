"""The patch, and install(), in the real GPT-NeoX: what fails before loads after, bit for bit.

On copies of its trees, one process a test: layers (PP 1) and one file (PP 0) alternate in it.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_neox
import torch
import yaml
from common import convert
from real_neox import ALL_TREES, HOME, agree, era, run_alone, tree_of

from neox_bridge.patch.patcher import apply, plan_patch

pytestmark = pytest.mark.neox
LAYOUTS = (0, 1)


def settings(written: Path, name: str, **changes: Any) -> str:
    """The written finetune.yml with other values; None takes a key out."""
    values = {**yaml.safe_load((written / "finetune.yml").read_text()), **changes}
    path = written / f"{name}.yml"
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return str(path)


def logits(path: Path) -> np.ndarray[Any, Any]:
    with np.load(path) as file:
        found: np.ndarray[Any, Any] = file["logits"]
    return found


def same(a: Path, b: Path) -> bool:
    return logits(a).tobytes() == logits(b).tobytes()


def first_key(error: str | None, word: str) -> str:
    """The key that an error names first, as missing or as unexpected."""
    assert error is not None
    return error.split(f'{word} key(s) in state_dict: "', 1)[1].split('"')[0]


def first_block(pp: int) -> str:
    return f"{'' if pp else 'sequential.2.'}attention.rotary_emb.inv_freq"


@pytest.fixture(scope="session")
def patched_trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in ALL_TREES:
        if (Path(HOME) / ALL_TREES[name]).is_dir():
            folder = tmp_path_factory.mktemp("patched") / name
            shutil.copytree(Path(HOME) / ALL_TREES[name], folder, symlinks=True)
            apply(plan_patch(folder))
            found[name] = folder
    return found


def written(hf: Path, name: str, folder: Path) -> dict[tuple[str, int], Path]:
    """Checkpoints with and without the buffer, in both layouts."""
    found = {}
    for pp in LAYOUTS:
        for kind in ("omit", "store"):
            target = found[kind, pp] = folder / f"{kind}-{pp}"
            convert(hf, target, pp=pp, inv_freq=kind, era=era(name))
    return found


def jobs_for(kinds: dict[tuple[str, int], Path], out: Path) -> list[dict[str, Any]]:
    """Each checkpoint under the tree's own default of the flag."""
    out.mkdir()
    return [
        {
            "yml": settings(path, "plain", rotary_save_freqs_buffer=None),
            "logits": str(out / f"{kind}-{pp}.npz"),
        }
        for (kind, pp), path in kinds.items()
    ]


@pytest.mark.parametrize("name", ALL_TREES)
def test_both_kinds_load(
    name: str, hf: Path, neox_python: str, patched_trees: dict[str, Path], tmp_path: Path
) -> None:
    tree = tree_of(name)
    kinds = written(hf, name, tmp_path)
    own, other, word = ("omit", "store", "Unexpected")
    if name == "2024-03":
        own, other, word = ("store", "omit", "Missing")

    before = run_alone(neox_python, tree, jobs_for(kinds, tmp_path / "before"), tmp_path / "a")
    for (kind, pp), error in zip(kinds, before.errors, strict=True):
        if kind == own:
            assert error is None
        else:
            assert first_key(error, word) == first_block(pp)

    for how, place in (("patched", patched_trees[name]), ("installed", tree)):
        jobs = jobs_for(kinds, tmp_path / how)
        done = run_alone(
            neox_python, place, jobs, tmp_path / f"b-{how}", installed=how == "installed"
        )
        assert done.errors == [None] * 4
        assert "isn't what this model computes" not in done.text
        note = "neox-bridge: RotaryEmbedding's inv_freq is in the checkpoint: left out"
        assert done.text.count(note) == 1
        for pp in LAYOUTS:
            known = tmp_path / "before" / f"{own}-{pp}.npz"
            for kind in (own, other):
                assert same(known, tmp_path / how / f"{kind}-{pp}.npz")
    assert agree(tmp_path / "patched" / "omit-1.npz", hf) <= 1e-5


@pytest.mark.parametrize("name", [name for name in ALL_TREES if name != "2024-03"])
def test_the_flag(
    name: str, hf: Path, neox_python: str, patched_trees: dict[str, Path], tmp_path: Path
) -> None:
    """With rotary_save_freqs_buffer: true the tree stores the buffer, and loads both kinds."""
    kinds = written(hf, name, tmp_path)
    out = {where: jobs_for(kinds, tmp_path / where) for where in ("before", "after")}
    for jobs in out.values():
        for job, path in zip(jobs, kinds.values(), strict=True):
            job["yml"] = settings(path, "flag", rotary_save_freqs_buffer=True)
    before = run_alone(neox_python, tree_of(name), out["before"], tmp_path / "a")
    for (kind, pp), error in zip(kinds, before.errors, strict=True):
        if kind == "store":
            assert error is None
        else:
            assert first_key(error, "Missing") == first_block(pp)
    for kind_and_pp, job in zip(kinds, out["after"], strict=True):
        job["save"] = str(tmp_path / f"saved-{kind_and_pp[0]}-{kind_and_pp[1]}")
    done = run_alone(neox_python, patched_trees[name], out["after"], tmp_path / "b")
    assert done.errors == [None] * 4
    note = "neox-bridge: RotaryEmbedding's inv_freq isn't in the checkpoint: computed"
    assert done.text.count(note) == 1
    for kind, pp in kinds:
        known = tmp_path / "before" / f"store-{pp}.npz"
        assert same(known, tmp_path / "after" / f"{kind}-{pp}.npz")
        assert stores(tmp_path / f"saved-{kind}-{pp}", "inv_freq")
    if name == "2024-09" and "2024-03" in ALL_TREES:  # the tree before it, which has the same names
        jobs = []
        for pp in LAYOUTS:
            convert(hf, tmp_path / f"yml-{pp}", pp=pp, era=era("2024-03"))
            load = str(tmp_path / f"saved-omit-{pp}")
            yml = settings(tmp_path / f"yml-{pp}", "flag", rotary_save_freqs_buffer=None, load=load)
            jobs.append({"yml": yml})
        older = run_alone(neox_python, tree_of("2024-03"), jobs, tmp_path / "c")
        assert older.errors == [None] * 2


@pytest.mark.parametrize("name", ["2024-03", "today"])
def test_ranks_and_stages(
    name: str, hf: Path, neox_python: str, patched_trees: dict[str, Path], tmp_path: Path
) -> None:
    """TP 2 and PP 2: four processes."""
    if name not in ALL_TREES:
        pytest.skip(f"no tree {name}")
    jobs = []
    for kind in ("omit", "store"):
        target = tmp_path / kind
        convert(hf, target, tp=2, pp=2, inv_freq=kind, era=era(name))
        jobs.append({"yml": settings(target, "plain", rotary_save_freqs_buffer=None)})
    place = str(patched_trees[name])
    assert real_neox.run(neox_python, place, 4, jobs, tmp_path) == [None, None]


def stores(saved: Path, buffer: str) -> bool:
    """Whether a checkpoint of either layout holds a buffer."""
    names: set[str] = set()
    for path in saved.glob("*/*model_states.pt"):
        held = torch.load(path, weights_only=False)
        names |= set(held["module"] or {}) if path.name.startswith("mp_rank") else set(held)
    assert any(name.endswith("weight") for name in names)
    return any(name.endswith(buffer) for name in names)


LOADS_IN = {  # a checkpoint saved by the patched tree, in unpatched ones: those with its MLP names
    "2024-03": {"2024-03": False, "2024-09": True},
    "2024-09": {"2024-03": False, "2024-09": True},
    "2024-10": {"2024-10": True, "today": True},
    "today": {"2024-10": True, "today": True},
}


@pytest.mark.parametrize("name", ALL_TREES)
def test_what_the_patched_tree_saves(
    name: str, hf: Path, neox_python: str, patched_trees: dict[str, Path], tmp_path: Path
) -> None:
    """It stores no buffer: loads in every patched tree, and in those since 2024-03 as they are."""
    kinds = written(hf, name, tmp_path)
    jobs = jobs_for(kinds, tmp_path / "saving")
    for (kind, pp), job in zip(kinds, jobs, strict=True):
        job["save"] = str(tmp_path / f"saved-{kind}-{pp}")
    assert run_alone(neox_python, patched_trees[name], jobs, tmp_path / "a").errors == [None] * 4
    for kind, pp in kinds:
        assert not stores(tmp_path / f"saved-{kind}-{pp}", "inv_freq")
    for other, loads in LOADS_IN[name].items():
        for where, tree in (("plain", tree_of(other)), ("patched", patched_trees[other])):
            again = []
            for pp in LAYOUTS:
                saved = {"load": str(tmp_path / f"saved-store-{pp}")}
                folder = tmp_path / f"yml-{other}-{where}-{pp}"
                convert(hf, folder, pp=pp, era=era(other))
                yml = settings(folder, "again", rotary_save_freqs_buffer=None, **saved)
                again.append({"yml": yml, "logits": str(folder / "logits.npz")})
            done = run_alone(neox_python, tree, again, tmp_path / f"b-{other}-{where}")
            for pp, error in zip(LAYOUTS, done.errors, strict=True):
                if loads or where == "patched":
                    assert error is None
                    if other == name:
                        found = tmp_path / f"yml-{other}-{where}-{pp}" / "logits.npz"
                        assert same(found, tmp_path / "saving" / f"store-{pp}.npz")
                else:
                    assert error is not None
                    assert "Missing key(s) in state_dict" in error


@pytest.mark.parametrize("name", ["2024-03", "today"])
def test_other_positions(
    name: str, hf: Path, neox_python: str, patched_trees: dict[str, Path], tmp_path: Path
) -> None:
    """ALiBi's slopes and the sinusoidal inv_freq: the unpatched tree always stores them."""
    if name not in ALL_TREES:
        pytest.skip(f"no tree {name}")
    cases = [(kind, pp) for kind in ("alibi", "sinusoidal") for pp in LAYOUTS]
    ymls = {}
    for kind, pp in cases:
        folder = tmp_path / f"{kind}-{pp}"
        convert(hf, folder, pp=pp, era=era(name))
        changes = {"pos_emb": kind, "rotary_save_freqs_buffer": None}
        for where, load in (("fresh", None), ("old", folder / "old"), ("new", folder / "new")):
            loading = {"load": str(load) if load else None}
            ymls[where, kind, pp] = settings(folder, where, **changes, **loading)

    def jobs(where: str, logits: str, save: str = "") -> list[dict[str, Any]]:
        found = []
        for kind, pp in cases:
            folder = tmp_path / f"{kind}-{pp}"
            job = {"yml": ymls[where, kind, pp], "logits": str(folder / f"{logits}.npz")}
            found.append({**job, "save": str(folder / save) if save else None})
        return found

    tree, patched = tree_of(name), patched_trees[name]
    making = [*jobs("fresh", "made", "old"), *jobs("old", "own")]
    assert run_alone(neox_python, tree, making, tmp_path / "a").errors == [None] * 8
    loading = [*jobs("old", "loaded", "new"), *jobs("new", "again")]
    assert run_alone(neox_python, patched, loading, tmp_path / "b").errors == [None] * 8
    for kind, pp in cases:
        folder = tmp_path / f"{kind}-{pp}"
        buffer = "slopes" if kind == "alibi" else "inv_freq"
        assert stores(folder / "old", buffer)
        assert not stores(folder / "new", buffer)
        assert same(folder / "own.npz", folder / "loaded.npz")
        assert same(folder / "own.npz", folder / "again.npz")
    for error in run_alone(neox_python, tree, jobs("new", "failed"), tmp_path / "c").errors:
        assert error is not None
        assert "Missing key(s) in state_dict" in error
