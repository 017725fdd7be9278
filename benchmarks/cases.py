"""What is measured: this tool's conversions, cp, and others' programs on the same checkpoint."""

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import Job
from sources import TOOL, exporter_settings

CP, NEVER = "`cp -r`", "`cp -r --reflink=never`"
TO_HF, EXPORTER = "NeoX TP 1 to HF", "GPT-NeoX's convert_neox_to_hf.py"
HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Case:
    """A conversion. source: a name of ``sources.NAMED``, or hf.

    short: measured in every place. large: of the largest shapes, where blocks are shared, too.
    verify: whether the result is read back and compared.
    """

    title: str
    source: str
    options: Sequence[str]
    short: bool = False
    large: bool = False
    verify: bool = False


CASES = (
    Case("HF to NeoX, TP 1", "hf", (), True, True),
    Case("HF to NeoX, TP 1, read back and compared", "hf", (), True, True, verify=True),
    Case("HF to NeoX, TP 1, --crc", "hf", ("--crc",), True),
    Case("HF to NeoX, TP 2", "hf", ("--tp", "2"), True),
    Case("HF to NeoX, TP 4", "hf", ("--tp", "4")),
    Case("HF to NeoX, ranks, TP 1", "hf", ("--layout", "ranks"), True),
    Case("HF to NeoX, ranks, TP 2", "hf", ("--layout", "ranks", "--tp", "2")),
    Case("HF to NeoX, ranks, TP 4", "hf", ("--layout", "ranks", "--tp", "4")),
    Case("HF to NeoX, TP 1, bfloat16", "hf", ("--dtype", "bfloat16"), True),
    Case("HF to NeoX, TP 2, bfloat16", "hf", ("--tp", "2", "--dtype", "bfloat16")),
    Case("HF to NeoX, TP 1, float32", "hf", ("--dtype", "float32")),
    Case(TO_HF, "neox", (), True, True),
    Case("NeoX TP 1 to HF, --shards clone", "neox", ("--shards", "clone"), True),
    Case("NeoX TP 2 to HF", "neox-tp2", (), True),
    Case("NeoX TP 2 to HF, --shards clone", "neox-tp2", ("--shards", "clone"), True),
    Case("NeoX TP 4 to HF", "neox-tp4", ()),
    Case("NeoX ranks TP 2 to HF", "ranks-tp2", ()),
    Case("NeoX TP 1 to HF, bfloat16", "neox", ("--dtype", "bfloat16"), True),
    Case("NeoX TP 1 to HF, float32", "neox", ("--dtype", "float32")),
    Case("NeoX TP 1 to TP 4", "neox", ("--to", "neox", "--tp", "4"), True),
    Case("NeoX TP 4 to TP 1", "neox-tp4", ("--to", "neox", "--tp", "1")),
    Case("NeoX TP 1 to ranks", "neox", ("--to", "neox", "--layout", "ranks"), True),
)


def jobs(folder: Path, wanted: Callable[[Case], bool]) -> list[Job]:
    """This tool's conversions of the checkpoints in ``folder``, to ``folder``/out."""
    target = folder / "out"
    return [
        Job(
            case.title,
            "tool",
            (
                *(TOOL, "convert", str(folder / case.source), str(target), *case.options),
                *(("--json",) if case.verify else ("--json", "--no-verify")),
            ),
            folder / case.source,
            target,
        )
        for case in CASES
        if wanted(case)
    ]


def copies(folder: Path) -> list[Job]:
    """``cp`` of the Hugging Face checkpoint, its files flushed."""
    source, target = folder / "hf", folder / "out"
    return [
        Job(title, "cp", ("cp", "-r", *how, str(source), str(target)), source, target, flush=True)
        for title, how in ((CP, ()), (NEVER, ("--reflink=never",)))
    ]


def others(folder: Path) -> tuple[list[Job], list[str]]:
    """Others' programs on the same checkpoints, and which of them are missing here."""
    target = folder / "out"
    ends = (folder / "hf", target), (folder / "neox", target)
    found: list[Job] = []
    missing = []

    def add(title: str, command: Sequence[str], source: Path, **environment: str) -> None:
        found.append(
            Job(title, "other", tuple(command), source, target, True, environment=environment)
        )

    if lacking := _lacking("torch", "safetensors"):
        missing.append(f"by hand: no {lacking}")
    else:
        for way, title, (source, _) in (
            ("to-neox", "by hand: load_file, torch.save", ends[0]),
            ("to-hf", "by hand: torch.load, save_file", ends[1]),
        ):
            script = str(HERE / "by_hand.py")
            add(title, (sys.executable, script, way, str(source), str(target)), source)
    if lacking := _lacking("torch", "transformers"):
        missing.append(f"transformers: no {lacking}")
    else:
        script = str(HERE / "by_transformers.py")
        command = (sys.executable, script, *map(str, ends[0]))
        add("transformers: from_pretrained, save_pretrained", command, ends[0][0])
    tree, python = neox()
    exporter = tree / "tools" / "ckpts" / "convert_neox_to_hf.py"
    if not exporter.is_file() or not python.is_file():
        missing.append("GPT-NeoX's exporter: NEOX_HOME (or NEOX_TREE and NEOX_PYTHON) has none")
    else:
        (step,) = (folder / "neox").glob("global_step*")
        command = (
            str(python),
            str(exporter),
            *("--input_dir", str(step), "--config_file", str(exporter_settings(folder))),
            *("--output_dir", str(target), "--no_save_tokenizer"),
        )
        add(EXPORTER, command, folder / "neox", DS_ACCELERATOR="cpu")
    return found, missing


def neox() -> tuple[Path, Path]:
    """A tree of GPT-NeoX and a Python that runs it, as ``make test-neox`` is told of them."""
    home = Path(os.environ.get("NEOX_HOME") or ".neox")
    tree = os.environ.get("NEOX_TREE") or home / "gpt-neox"
    return Path(tree), Path(os.environ.get("NEOX_PYTHON") or home / "venv" / "bin" / "python")


def _lacking(*modules: str) -> str:
    find: Callable[[str], object] = importlib.util.find_spec
    return ", ".join(name for name in modules if find(name) is None)
