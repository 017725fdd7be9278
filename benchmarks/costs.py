"""What doesn't grow with bytes: starting, a tensor's and a file's cost, memory."""

import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import Run, discard, run
from places import Skipped
from sources import HEADS, TOOL, hollow_hf, hollow_neox, hollow_toy, tiny

from neox_bridge import Options
from neox_bridge.toy import toy_checkpoint

MANY = 154  # files, as a large published checkpoint has
RAW = "--no-verify"


@dataclass(frozen=True, slots=True)
class Start:
    """A command that is all start: its seconds, one a round."""

    title: str
    seconds: tuple[float, ...]


def starts(folder: Path, runs: int) -> list[Start]:
    """Bare Python, Python with click, ``--help`` and ``inspect``, taking turns."""
    # 73 blocks, the embedding and two more layers, and one of metadata: 77 files for each rank
    many = hollow_neox(toy_checkpoint("pythia-70m", layers=73), folder / "many", Options(tp=2))
    count = len(list(many.rglob("*.pt")))
    if count != MANY:
        sys.exit(f"{many} has {count} files and not {MANY}")
    commands = {
        "`python -c pass`": (sys.executable, "-c", "pass"),
        "`python -c 'import click'`": (sys.executable, "-c", "import click"),
        "`neox-bridge --help`": (TOOL, "--help"),
        f"`neox-bridge inspect`, {MANY} files": (TOOL, "inspect", str(many)),
    }
    found: dict[str, list[float]] = {title: [] for title in commands}
    for number in range(runs + 1):
        for title, command in commands.items():
            taken = _seconds(command)
            if number:  # the first reads from the disk, and writes byte code
                found[title].append(taken)
    shutil.rmtree(many)
    return [Start(title, tuple(seconds)) for title, seconds in found.items()]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one more costs, in microseconds, one number a round. more: how many more were made."""

    title: str
    more: int
    microseconds: tuple[float, ...]


def tiny_costs(folder: Path, runs: int, layers: int) -> list[Cost]:
    """The cost of a tensor and of a file, from layouts of 32 ranks that differ in nothing else.

    layers: of the tall checkpoint; the flat one has 2. Tensors are of 128 to 32 k bytes.
    """
    tall, flat, target = folder / "tall", folder / "flat", folder / "out"
    for path, count in ((tall, layers), (flat, 2)):
        hollow_hf(tiny(count), path)
    wide = folder / "wide"
    tensors = 12 * (layers - 2) * HEADS  # each block has 12
    files = (layers + 2) * HEADS  # a file a layer, in place of all in a rank's own
    ranks = ("--tp", str(HEADS), "--layout", "ranks")
    commands: dict[str, tuple[Path | str, ...]] = {
        "plan": (flat, target, *ranks, "--dry-run"),
        "plan tall": (tall, target, *ranks, "--dry-run"),
        "ranks": (flat, target, *ranks, RAW),
        "ranks tall": (tall, target, *ranks, RAW),
        "verified tall": (tall, target, *ranks),
        "verified": (flat, target, *ranks),
        "layers tall": (tall, target, "--tp", str(HEADS), RAW),
        "back tall": (wide / "tall", target, RAW),
        "back": (wide / "flat", target, RAW),
    }
    for path in (tall, flat):
        _convert(path, wide / path.name, *ranks, RAW)
    found: dict[str, list[float]] = {title: [] for title in commands}
    aside = folder / "aside-tiny"
    for _ in range(runs):
        for title, command in commands.items():
            discard(target, aside)
            found[title].append(_convert(*command))
    discard(target, aside)  # which stays until the bench ends
    for path in (tall, flat, wide):
        shutil.rmtree(path)

    def cost(title: str, more: int, high: str, low: str) -> Cost:
        pairs = zip(found[high], found[low], strict=True)
        return Cost(title, more, tuple((a - b) / more * 1e6 for a, b in pairs))

    return [
        cost("a tensor of the target, planned", tensors, "plan tall", "plan"),
        cost("a tensor of the target, planned and written", tensors, "ranks tall", "ranks"),
        cost("the same, read back and compared", tensors, "verified tall", "verified"),
        cost("a tensor of a source with 32 ranks, to HF", tensors, "back tall", "back"),
        cost("a file, written and flushed", files, "layers tall", "ranks tall"),
    ]


@dataclass(frozen=True, slots=True)
class Memory:
    """title: what was converted. size: bytes written."""

    shape: str
    title: str
    size: int
    run: Run


def memories(folder: Path, shapes: Sequence[str]) -> tuple[list[Memory], list[str]]:
    """The peak of anonymous memory over shapes; the sources are holes, the targets are written.

    Also gives what was skipped for lack of room on the disk.
    """
    found, skipped = [], []
    for shape in shapes:
        hf, many, target = folder / "big", folder / "big-neox", folder / "out"
        hollow_toy(shape, hf)
        hollow_neox(toy_checkpoint(shape), many, Options(tp=4, layout="ranks"))
        for title, source, options in (
            ("HF to NeoX, TP 1", hf, (RAW,)),
            ("HF to NeoX, TP 4, bfloat16, read back", hf, ("--tp", "4", "--dtype", "bfloat16")),
            ("NeoX ranks TP 4 to HF", many, (RAW,)),
        ):
            size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
            try:
                _room(folder, size)
            except Skipped as error:
                skipped.append(f"memory, {shape}: {error}")
                break
            done = run((TOOL, "convert", str(source), str(target), *options))
            shutil.rmtree(target)
            found.append(Memory(shape, title, size, done))
            print(f"  {shape}, {title}: {done.memory / 1e6:.0f} MB", file=sys.stderr, flush=True)
        shutil.rmtree(hf)
        shutil.rmtree(many)
    return found, skipped


def _room(folder: Path, size: int) -> None:
    room = shutil.disk_usage(folder).free
    if room < size * 1.1 + (1 << 30):
        raise Skipped(f"writes {size / 1e9:.0f} GB, and there are {room / 1e9:.0f} GB free")


def _convert(*arguments: Path | str) -> float:
    return _seconds((TOOL, "convert", *map(str, arguments)))


def _seconds(command: Sequence[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    taken = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr}")
    return taken


def middle(values: Sequence[float]) -> str:
    """The median, with the least and the most."""
    digits = 0 if max(values) >= 20 else 2
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return f"{statistics.median(values):.{digits}f} | {low} - {high}"
