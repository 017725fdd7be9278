"""Runs of the real GPT-NeoX that start from Hugging Face models: their yml, and their exports."""

import shutil
import time
from pathlib import Path
from typing import Any

import real_neox
import yaml
from common import convert

from neox_bridge import verify


def yml_of(hf: Path, tree: str, tp: int, pp: int, folder: Path, **changed: Any) -> Path:
    """The yml of a run that starts from a model, with the settings that a conversion writes."""
    convert(hf, folder, tp=tp, pp=pp, era=real_neox.era(tree))
    settings = yaml.safe_load((folder / "finetune.yml").read_text())
    shutil.rmtree(folder)
    settings = {k: v for k, v in settings.items() if k not in ("save", "finetune")}
    path = folder.with_suffix(".yml")
    settings["vocab_file"] = str(hf / "tokenizer.json")
    path.write_text(yaml.safe_dump({**settings, "load": str(hf), **changed}))
    return path


def run(python: str, tree: str, ranks: int, jobs: list[dict[str, Any]], folder: Path) -> list[Any]:
    results = real_neox.results(python, real_neox.ALL_TREES[tree], ranks, jobs, folder)
    assert [result["error"] for result in results] == [None] * len(jobs)
    return results


def exporting(hf: Path, tree: str, layout: tuple[int, int], folder: Path) -> dict[str, Any]:
    """A job of 20 steps that saves and exports every 5."""
    yml = yml_of(hf, tree, *layout, folder / "neox", train_iters=100, lr_decay_iters=100)
    keys = {"save": str(folder / "run"), "save_hf": str(folder / "exported")}
    job = {"yml": str(yml), "set": keys, "losses": 20, "save_every": 5}
    return {**job, "save": str(folder / "run")}


def wait_for(path: Path, text: str) -> None:
    for _ in range(1200):
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} does not contain {text}")


def check_exports(folder: Path, steps: tuple[int, ...]) -> None:
    """Each exported step has the bits of a conversion of its own."""
    for step in steps:
        source, alone = folder / "run" / f"global_step{step}", folder / f"alone-{step}"
        convert(source, alone, to="hf")
        exported = folder / "exported" / f"step{step}"
        names = sorted(p.name for p in alone.glob("*.safetensors"))
        assert names == sorted(p.name for p in exported.glob("*.safetensors"))
        for name in (*names, "config.json"):
            assert (exported / name).read_bytes() == (alone / name).read_bytes()
        assert verify(str(source), str(exported)).holds
