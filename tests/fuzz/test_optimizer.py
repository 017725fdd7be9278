"""Genuine optimizer files and settings with one value replaced: a result, or an error for users.

Each value of a run's mp_rank files, ZeRO partitions and universal files, and each setting of its
yml, is replaced by others that no run has there: of another kind, negative, huge, not a number,
missing, a tensor of another dtype or shape. Whatever reads an optimizer then ends as usual, or with
a BridgeError that names the file or the setting; it never ends in a traceback.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from bounds import ends, examples, folder
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from click.testing import CliRunner
from published import run_folder
from resharding import DATA, FP16, reshard

from neox_bridge.api import open_checkpoint
from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.execution.execute import execute
from neox_bridge.formats.pickles import Global, Record
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.formats.torch_zip import layout_pt
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.optimizer.masters import with_masters, with_states
from neox_bridge.optimizer.mp_rank import with_slots
from neox_bridge.optimizer.options import Resharding
from neox_bridge.optimizer.read_export import scalars
from neox_bridge.optimizer.read_files import read_optimizer
from neox_bridge.optimizer.reshard import plan_reshard
from neox_bridge.optimizer.states import Optimizer
from neox_bridge.optimizer.write_export import plan_export
from neox_bridge.planning.plan import Plan
from neox_bridge.planning.report import to_json
from neox_bridge.tensors.pieces import OutputTensor
from neox_bridge.tensors.tensor_ref import TensorRef

_FOLDER = folder()
_TOP = Path(_FOLDER.name)
Path_ = tuple[Any, ...]  # keys from a value to one inside it

SOURCES = {
    "bf16_tp2": (DATA / "bf16_tp2", ["mp_rank_00_model", "bf16_zero_pp_rank_0_mp_rank_00_optim"]),
    "bf16_tp2_dp2": (
        DATA / "bf16_tp2_dp2",
        ["mp_rank_01_model", "bf16_zero_pp_rank_1_mp_rank_01_optim"],
    ),
    "bf16_accumulated": (
        DATA / "bf16_accumulated_dp3",
        ["mp_rank_00_model", "bf16_zero_pp_rank_1_mp_rank_00_optim"],
    ),
    "fp32_pp2": (DATA / "fp32_pp2", ["mp_rank_01_model"]),
    "fp32_pp0": (DATA / "fp32_pp0_dp2", ["mp_rank_00_model"]),
    "fp32_stage0": (DATA / "fp32_stage0", ["mp_rank_00_model"]),
    "fp16_stage0": (DATA / "fp16_stage0", ["mp_rank_00_model"]),
    "fp16": (FP16, ["zero_pp_rank_0_mp_rank_00_optim"]),
}
# of GPT-NeoX v1.0, in tests/data/published
V1 = {
    "v1_dp4_intervals": ["mp_rank_00_model", "zero_pp_rank_0_mp_rank_00_optim"],
    "v1_dp2_rigid": ["zero_pp_rank_1_mp_rank_00_optim"],
}
UNIVERSAL = ["mp_rank_00_model_states.pt", "zero/optimizer_state.pt"]
UNIVERSAL += [f"zero/2.attention.dense.weight/{name}.pt" for name in ("fp32", "exp_avg", "step")]
_MISSING = object()
VALUES: list[Any] = [
    _MISSING, None, True, False, 0, -1, 3, 2**40, 2**70, 1.5, -1e300, float("nan"), float("inf"),
    "", "x", "\x1b[2J", "9" * 30, [], ["x"], [[1]], {}, {"x": 1}, {1: 2}, (1, "x"),
    Global("os", "system"),
]  # fmt: skip


# --- values inside a value -----------------------------------------------------------------------


def inside(value: Any, at: Path_ = ()) -> Iterator[Path_]:
    """The places of values inside a value; of a long list its first and last."""
    if at:
        yield at
    if isinstance(value, dict):
        for key in value:
            yield from inside(value[key], (*at, key))
    elif isinstance(value, list | tuple):
        for number in sorted({0, len(value) - 1}) if value else ():
            yield from inside(value[number], (*at, number))
    elif isinstance(value, Record):
        for name in ("state", "args"):
            if getattr(value, name):
                yield from inside(getattr(value, name), (*at, _Field(name)))


class _Field(str):
    """A record's attribute."""


def changed(value: Any, at: Path_, new: Any) -> Any:
    """A value with another one at a place, or without it."""
    if not at:
        return new
    first, *rest = at
    if isinstance(first, _Field):
        copy = replace(value)
        setattr(copy, first, changed(getattr(value, first), tuple(rest), new))
        return copy
    if isinstance(value, tuple):
        return tuple(changed(list(value), at, new))
    copy = value.copy()
    if not rest and new is _MISSING:
        del copy[first]
    else:
        copy[first] = changed(value[first], tuple(rest), new)
    return copy


def new_for(old: Any, number: int) -> Any:
    """A value to put in another one's place: tensors also become others."""
    if isinstance(old, TensorRef):
        others = [
            replace(old, dtype="float16", shape=(*old.shape, 1)),
            replace(old, dtype="int8"),
            replace(old, dtype="uint8", shape=(1,)),
            replace(old, shape=(0,)),
            replace(old, shape=()),
            replace(old, dtype="bool", shape=(2,)),
        ]
        # a larger one would reach beyond the end of the file that holds it
        every = [*VALUES, *(other for other in others if other.nbytes <= old.nbytes)]
        return every[number % len(every)]
    value = VALUES[number % len(VALUES)]
    return value if value is _MISSING else deepcopy(value)


def write_pt(path: Path, value: Any) -> bool:
    """Whether a file can hold the value."""
    tensors: list[OutputTensor] = []
    try:
        file = layout_pt(path.name, with_slots(value, "", tensors), tensors)
    except Exception:
        return False
    made = path.parent / "made"
    shutil.rmtree(made, ignore_errors=True)
    execute(Plan({}, {}, (file,)), str(made))
    shutil.move(made / path.name, path)
    made.rmdir()
    return True


# --- what reads an optimizer ---------------------------------------------------------------------


def _plans(root: str) -> None:
    checkpoint = open_checkpoint(root)
    optimizer = read_optimizer(checkpoint)
    for asked in (
        Resharding(dp=1, micro_batch=1),
        Resharding(tp=1, pp=0, zero=1, row_bias="split"),
        Resharding(universal=True),
        Resharding(zero=0, pp=2, engine="averages"),
    ):
        _plan(checkpoint, optimizer, asked, root)


def _plan(checkpoint: Checkpoint, optimizer: Optimizer, asked: Resharding, root: str) -> None:
    try:
        json.dumps(to_json(plan_reshard(checkpoint, optimizer, asked, f"{_TOP}/new"), 0))
    except BridgeError as error:
        _for_users(error, root)


def _for_users(error: BridgeError, root: str) -> None:
    """The error is short, and names the file, or the option or the setting that is refused."""
    text = str(error)
    assert 0 < len(text) < 3000, text
    refused = isinstance(error, Refused) and re.search(r"`[a-z_]+=", text) is not None
    assert refused or root in text or any(key in text for key in SETTINGS), text


def _export(root: str) -> None:
    checkpoint = open_checkpoint(root)
    optimizer = read_optimizer(checkpoint)
    json.dumps(to_json(plan_export(checkpoint, optimizer), 0), allow_nan=False)
    json.dumps(scalars(checkpoint, optimizer))


def _masters(root: str) -> None:
    with_masters(open_checkpoint(root))
    with_states(open_checkpoint(root))


READERS: list[Callable[[str], None]] = [_plans, _export, _masters]
COMMANDS = [
    ("reshard", "{root}", "{new}", "--dp", "1"),
    ("reshard", "{root}", "{new}", "--micro-batch", "1", "--zero", "1", "--dry-run"),
    ("reshard", "{root}", "{new}", "--universal"),
    ("export-optimizer", "{root}", "{new}"),
    ("convert", "{root}", "{new}", "--weights", "masters"),
    ("inspect", "{root}", "--optimizer", "--stats"),
    ("diff", "{root}", "{other}", "--optimizer"),
    ("verify", "{root}", "{other}", "--optimizer"),
    ("audit", "{root}", "--optimizer"),
]


def read_all(root: Path) -> None:
    """Everything that plans: a result, or an error for users."""
    for reader in READERS:
        with ends():
            try:
                reader(str(root))
            except BridgeError as error:
                _for_users(error, str(root))


def run_one(root: Path, other: Path, number: int) -> None:
    """One of the commands, as a user types it."""
    new = _TOP / "new"
    shutil.rmtree(new, ignore_errors=True)
    words = COMMANDS[number % len(COMMANDS)]
    command = [word.format(root=root, new=new, other=other) for word in words]
    with ends():
        done = CliRunner().invoke(app, command)
    assert "this is a bug" not in done.output, (command, done.output)
    assert done.exit_code in (0, 1, 3, 4), (command, done.output)
    if done.exit_code == 1:
        assert str(root) in done.output, (command, done.output)


# --- the targets ---------------------------------------------------------------------------------


def _copy(name: str) -> tuple[Path, Path, list[str]]:
    """A run to damage, as it was, and the files of it in which values are replaced."""
    if name in V1:
        good, parts = _TOP / f"{name}-good", V1[name]
        if not good.exists():
            run_folder(name, good)
    else:
        good, parts = SOURCES[name]
    root = _TOP / name
    if not root.exists():
        shutil.copytree(good, root)
    return root, good, [f"{part}_states.pt" for part in parts]


def _universal() -> tuple[Path, Path, list[str]]:
    good, root = _TOP / "universal-good", _TOP / "universal"
    if not root.exists():
        reshard(DATA / "bf16_tp2", good, universal=True)
        shutil.copytree(good, root)
    return root, good, UNIVERSAL


def _step(root: Path) -> Path:
    latest = root / "latest"
    return root / (latest if latest.exists() else root / "latest_universal").read_text()


def places(name: str, number: int) -> tuple[Path, Path, Any, list[Path_]]:
    """The file to change, as it was, its value, and the places in it."""
    root, good, names = _universal() if name == "universal" else _copy(name)
    file = names[number % len(names)]
    value = read_torch(str(_step(good) / file))
    return _step(root) / file, _step(good) / file, value, list(inside(value)) or [()]


def try_value(name: str, file: int, place: int, new: int, *, command: int | None = None) -> None:
    """One value of one file replaced, and all read, or one command run."""
    path, good, value, every = places(name, file)
    at = every[place % len(every)]
    old = value
    for key in at:
        old = getattr(old, key) if isinstance(key, _Field) else old[key]
    try:
        if not write_pt(path, changed(value, at, new_for(old, new))):
            return
        root = path.parent
        while not (root / "latest").exists() and not (root / "latest_universal").exists():
            root = root.parent
        if command is None:
            read_all(root)
        else:
            run_one(root, SOURCES["bf16_tp2"][0], command)
    finally:
        shutil.copy(good, path)


_NAMES = st.sampled_from([*SOURCES, *V1, "universal"])
_NUMBER = st.integers(0, 2**16)


@given(_NAMES, _NUMBER, _NUMBER, _NUMBER)
@examples(25)
def test_values_of_files(name: str, file: int, place: int, new: int) -> None:
    try_value(name, file, place, new)


@given(_NAMES, _NUMBER, _NUMBER, _NUMBER, _NUMBER)
@examples(20)
def test_commands(name: str, file: int, place: int, new: int, command: int) -> None:
    try_value(name, file, place, new, command=command)


# settings that reshard, export-optimizer and convert --weights masters take from the yml
SETTINGS = [
    "zero_optimization", "zero_optimization.stage", "optimizer", "optimizer.type",
    "optimizer.params", "optimizer.params.eps", "optimizer.params.betas", "gradient_clipping",
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gas", "weight_decay", "fp16",
    "fp16.loss_scale", "precision", "bf16", "data_types", "checkpoint", "pipe_partition_method",
    "make_vocab_size_divisible_by", "model_parallel_size", "pipe_parallel_size", "use_mup",
    "use_bnb_optimizer", "num_layers", "num_attention_heads", "hidden_size", "num_kv_heads",
    "vocab_file", "layernorm_epsilon", "rotary_pct", "gpt_j_residual", "no_weight_tying",
]  # fmt: skip


def try_setting(name: str, setting: int, new: int, *, command: int | None = None) -> None:
    root, _, _ = _copy(name)
    file = _step(root) / "configs" / "zz.yml"
    key, *rest = SETTINGS[setting % len(SETTINGS)].split(".")
    value = VALUES[new % len(VALUES)]
    if value is _MISSING or isinstance(value, tuple | Global):
        value = None
    for part in reversed(rest):
        value = {part: value}
    others = {}
    for path in (_step(root) / "configs").glob("*.yml"):
        others[path] = path.read_text()
        kept = yaml.safe_load(others[path])
        path.write_text(
            yaml.safe_dump({k: v for k, v in kept.items() if k.replace("-", "_") != key})
        )
    try:
        file.write_text(yaml.safe_dump({key: value}))
        if command is None:
            read_all(root)
        else:
            run_one(root, SOURCES["bf16_tp2"][0], command)
    finally:
        file.unlink()
        for path, text in others.items():
            path.write_text(text)


@given(st.sampled_from(sorted([*SOURCES, *V1])), _NUMBER, _NUMBER)
@examples(25)
def test_settings(name: str, setting: int, new: int) -> None:
    try_setting(name, setting, new)


@given(st.sampled_from(sorted([*SOURCES, *V1])), _NUMBER, _NUMBER, _NUMBER)
@examples(20)
def test_commands_with_settings(name: str, setting: int, new: int, command: int) -> None:
    try_setting(name, setting, new, command=command)
