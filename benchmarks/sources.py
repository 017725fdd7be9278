"""Checkpoints to measure with: random ones of a Pythia's shape, and ones that are mostly a hole."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from neox_bridge import Options
from neox_bridge import plan as make_plan
from neox_bridge.architectures.rows import model_rows
from neox_bridge.architectures.shapes import TOKENIZER_SIZE
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.planning.plan import Plan
from neox_bridge.tensors.pieces import Whole
from neox_bridge.toy import plan_toy, toy_checkpoint

TOOL = str(Path(sys.executable).parent / "neox-bridge")
NAMED = {
    "neox": [],
    "neox-tp2": ["--tp", "2"],
    "neox-tp4": ["--tp", "4"],
    "ranks-tp2": ["--tp", "2", "--layout", "ranks"],
    "neox-bf16": ["--tp", "2", "--dtype", "bfloat16"],
}
HEADS = 32


def make(folder: Path, shape: str, names: Iterable[str]) -> None:
    """``folder``/hf, random, and those of ``NAMED`` that are asked for, converted from it."""
    folder.mkdir(parents=True, exist_ok=True)
    hf = folder / "hf"
    must(TOOL, "toy", shape, str(hf), "--as", "hf")
    for name in names:
        must(TOOL, "convert", str(hf), str(folder / name), "--no-verify", *NAMED[name])


def must(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr}")


def exporter_settings(folder: Path) -> Path:
    """The yml of ``folder``/neox with a tokenizer, which GPT-NeoX's exporter builds; its path."""
    words = {"<|endoftext|>": 0} | {f"word{number}": number for number in range(1, TOKENIZER_SIZE)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": 0, "content": "<|endoftext|>", "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        ],
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<|endoftext|>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (yml,) = folder.glob("neox/global_step*/configs/*.yml")
    path = folder / "exporter.yml"
    path.write_text(f"{yml.read_text()}\nvocab_file: {folder.resolve() / 'tokenizer.json'}\n")
    return path


def hollow(plan: Plan, folder: Path) -> Path:
    """The files of a plan at their sizes, with headers and pickles, and holes for tensors."""
    shutil.rmtree(folder, ignore_errors=True)
    for file in plan.files:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as output:
            output.truncate(file.size)
            for offset, data in file.literals:
                output.seek(offset)
                output.write(data)
    return folder


def hollow_toy(shape: str, folder: Path) -> Path:
    """A Hugging Face checkpoint of a Pythia's shape, all zeros, that takes no room on the disk."""
    return hollow(plan_toy(shape, str(folder), "hf"), folder)


def hollow_neox(checkpoint: Checkpoint, folder: Path, options: Options) -> Path:
    return hollow(make_plan(checkpoint, replace(options, to="neox"), str(folder)), folder)


def tiny(layers: int) -> Checkpoint:
    """Tiny tensors: 64 wide, 4,096 rows of vocabulary, so that even 32 ranks share them evenly."""
    dims = {"vocab": 128 * HEADS, "hidden": 64, "qkv": 192, "ffn": 256}
    return shaped(layers, HEADS, dims)


def wide(layers: int, heads: int, hidden: int, rows: int) -> Checkpoint:
    """Any shape of Pythia's family, of any size."""
    return shaped(
        layers, heads, {"vocab": rows, "hidden": hidden, "qkv": 3 * hidden, "ffn": 4 * hidden}
    )


def shaped(layers: int, heads: int, dims: dict[str, int]) -> Checkpoint:
    toy = toy_checkpoint("pythia-70m", layers=layers)
    config = replace(toy.config, heads=heads, dims=dims, rotary_pct=1.0)
    tensors = {}
    for row in model_rows(toy.architecture, config):
        size = tuple(dims[dim] for dim in row.weight.shape)
        tensors[row.hf] = Whole(toy.config.dtype, size, random=0)
    raw = toy.architecture.write_hf(config)
    return replace(toy, config=config, raw=raw, tensors=tensors, tokenizer_size=None)


def hollow_hf(checkpoint: Checkpoint, folder: Path) -> Path:
    return hollow(make_plan(checkpoint, Options(to="hf"), str(folder)), folder)
