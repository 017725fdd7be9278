"""Resharding a run with its optimizer, and comparing its files and tensors bit by bit.

torch is imported by the functions that need it: other tests start without.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import FIXTURES

from neox_bridge.api import open_checkpoint
from neox_bridge.execution.context import Context
from neox_bridge.execution.execute import execute
from neox_bridge.execution.result import Result
from neox_bridge.execution.transform import blocks
from neox_bridge.formats.pickles import Record
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.formats.torch_zip import layout_pt
from neox_bridge.optimizer.mp_rank import with_slots
from neox_bridge.optimizer.options import Resharding
from neox_bridge.optimizer.read_files import read_optimizer
from neox_bridge.optimizer.reshard import plan_reshard
from neox_bridge.optimizer.states import Scalar, states
from neox_bridge.planning.plan import Plan
from neox_bridge.tensors.flat import Flat, segments
from neox_bridge.tensors.pieces import OutputTensor, Whole
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.verification.optimizer import compare_named, named

if TYPE_CHECKING:
    import torch

    from neox_bridge.layouts.checkpoint import Checkpoint
    from neox_bridge.optimizer.states import Optimizer
    from neox_bridge.verification.compare import Difference

DATA = Path(__file__).parents[1] / "data" / "reshard"
FP16 = FIXTURES / "pythia_fp16_pp1_tp1" / "checkpoints"
SOURCES = [*sorted(path for path in DATA.iterdir()), FP16]
# what follows the batch of a run, not its layout
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
RANDOM = ("random_rng_state", "torch_rng_state", "cuda_rng_state", "rng_tracker_states")


def reshard(source: Path, target: Path, **asked: Any) -> tuple[Plan, Result]:
    checkpoint = open_checkpoint(str(source))
    optimizer = read_optimizer(checkpoint)
    plan = plan_reshard(checkpoint, optimizer, Resharding(**asked), str(target))
    return plan, execute(plan, str(target))


def without_moments(root: Path) -> None:
    """Overwrites every moment with zeros, as a run would begin that had lost them."""
    for mine in read_optimizer(open_checkpoint(str(root))).shards.values():
        for key, whole in mine.items():
            for piece in whole.pieces if key != "master" else ():
                assert piece.source is not None
                write(piece.source, bytes(piece.source.nbytes))


def write(ref: TensorRef, data: bytes) -> None:
    with open(ref.file, "r+b") as file:
        file.seek(ref.offset)
        file.write(data)


def data(ref: TensorRef) -> bytes:
    with open(ref.file, "rb") as file:
        file.seek(ref.offset)
        return file.read(ref.nbytes)


def files(root: Path) -> dict[str, Path]:
    step = root / (root / "latest").read_text()
    return {path.name: path for path in sorted(step.glob("*.pt"))}


def differences(a: Any, b: Any, where: str, values: bool = True) -> Iterator[str]:
    """Where two values that were read differ: types, keys and their order, shapes, bits."""
    if type(a) is not type(b):
        yield f"{where}: {a!r} and {b!r}"
    elif isinstance(a, TensorRef):
        if (a.dtype, a.shape, a.strides) != (b.dtype, b.shape, b.strides):
            yield f"{where}: {a.dtype} {a.shape} and {b.dtype} {b.shape}"
        elif values and data(a) != data(b):
            yield f"{where}: other bits"
    elif isinstance(a, dict):
        mine, theirs = ([key for key in d if key not in BATCH] for d in (a, b))
        if mine != theirs:
            yield f"{where}: keys {mine} and {theirs}"
        for key in (key for key in mine if key in b):
            yield from differences(a[key], b[key], f"{where}.{key}", values)
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            yield f"{where}: {len(a)} and {len(b)} entries"
        for n, pair in enumerate(zip(a, b, strict=False)):
            yield from differences(*pair, f"{where}[{n}]", values)
    elif isinstance(a, Record):
        for part in ("factory", "new", "args", "state", "items", "entries"):
            yield from differences(getattr(a, part), getattr(b, part), f"{where}({part})", values)
    elif values and a != b:
        yield f"{where}: {a!r} and {b!r}"


def compared(a: Path, b: Path, leave: tuple[str, ...] = (), values: bool = True) -> list[str]:
    """All differences between the ``.pt`` files of two checkpoints, but those of these keys."""
    mine, theirs = files(a), files(b)
    found = [] if list(mine) == list(theirs) else [f"files {list(mine)} and {list(theirs)}"]
    for name in mine.keys() & theirs.keys():
        found += differences(
            read_torch(str(mine[name])), read_torch(str(theirs[name])), name, values
        )
    return [line for line in found if not any(f".{key}" in line for key in leave)]


def tensor(whole: Whole) -> torch.Tensor:
    """A logical tensor in memory, reductions done."""
    import torch

    context = Context()
    parts = [
        torch.from_numpy(block.copy().reshape(-1))
        for part in segments(whole)
        for block in blocks(
            OutputTensor("", part.dtype, part.shape, part.pieces, part.reduce), context
        )
    ]
    context.files.close()
    return torch.cat(parts).reshape(whole.shape)


def logical(root: Path) -> dict[str, dict[str, torch.Tensor]]:
    checkpoint = open_checkpoint(str(root))
    found = states(checkpoint, read_optimizer(checkpoint))
    return {key: {n: tensor(w) for n, w in wholes.items()} for key, wholes in found.items()}


def step_of(group: Any) -> float:
    import torch

    step = group.scalars["step"]
    assert isinstance(step, Scalar)
    return float(torch.frombuffer(bytearray(step.data), dtype=torch.float32))


def adam(
    group: Any, parameters: list[torch.Tensor], moments: list[Mapping[str, torch.Tensor]]
) -> Any:
    import torch

    kept = ("lr", "betas", "eps", "weight_decay")
    made = torch.optim.AdamW(parameters, **{key: group.settings[key] for key in kept})
    for parameter, mine in zip(parameters, moments, strict=True):
        entry = {"step": torch.tensor(step_of(group)), **{k: v.clone() for k, v in mine.items()}}
        made.state[parameter] = entry
    return made


def gradient(name: str, shape: torch.Size, step: int) -> torch.Tensor:
    import torch

    seed = torch.Generator().manual_seed(sum(map(ord, name)) * 7 + step)
    return torch.randn(shape, generator=seed)


def go_on(root: Path, scale: float = 1) -> dict[str, torch.Tensor]:
    """The masters after three steps of AdamW on the flat partitions of a checkpoint without TP.

    As DeepSpeed does it: each data-parallel rank and stage has an optimizer of its own over flat
    tensors, padding included, with whatever state the files say. scale: of the gradients.
    """
    import torch

    checkpoint = open_checkpoint(str(root))
    optimizer, state = read_optimizer(checkpoint), checkpoint.neox
    assert state is not None
    found: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in optimizer.files:
        value = read_torch(path)
        assert isinstance(value, dict)
        inner = value["optimizer_state_dict"]
        rank, number = map(int, re.findall(r"_rank_(\d+)", path)[-2:])
        shapes = optimizer.metas[number]["param_shapes"]
        for index, group in enumerate(optimizer.groups):
            flat = Flat(shapes[index], optimizer.dp)
            master = numbers(inner["single_partition_of_fp32_groups"][index])
            moments = inner["base_optimizer_state"]["state"][index]
            mine = {k: numbers(v)[: len(master)] for k, v in moments.items() if k != "step"}
            parameter = torch.nn.Parameter(master)
            made = adam(group, [parameter], [mine])
            for n in range(3):
                parameter.grad = torch.zeros_like(parameter)
                for part in flat.fragments(rank):
                    short = part.name.removeprefix("sequential.")
                    whole = gradient(short, torch.Size(shapes[index][part.name]), n).reshape(-1)
                    end = part.start + part.numel
                    values = whole[part.low : part.low + part.numel]
                    parameter.grad[part.start : end] = scale * values
                made.step()
            for part in flat.fragments(rank):
                short = part.name.removeprefix("sequential.")
                end = part.start + part.numel
                entry = (part.low, parameter.detach()[part.start : end])
                found.setdefault(short, []).append(entry)
    return {
        name: torch.cat([values for _, values in sorted(parts, key=lambda part: part[0])])
        for name, parts in found.items()
    }


def numbers(ref: TensorRef) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(data(ref)), dtype=torch.float32).reshape(ref.shape)


def rewritten(path: Path, change: Callable[[Any], None]) -> None:
    """A file with its value changed."""
    value, tensors = read_torch(str(path)), list[OutputTensor]()
    change(value)
    file = layout_pt(path.name, with_slots(value, "", tensors), tensors)
    made = path.parent / "made"
    execute(Plan({}, {}, (file,)), str(made))
    shutil.move(made / path.name, path)
    made.rmdir()


ZERO = [path for path in SOURCES if "stage0" not in path.name]


def inside(root: Path) -> Path:
    return root / (root / "latest_universal").read_text()


def compare_states(
    source: tuple[Checkpoint, Optimizer], target: tuple[Checkpoint, Optimizer]
) -> list[Difference]:
    """What differs, of every state and tensor of either."""
    return compare_named(source[0], named(*source), named(*target))
