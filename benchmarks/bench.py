"""Times of conversions beside `cp -r`, of comparisons beside `cmp`: medians of runs, as ratios.

    bench.py [--shape pythia-410m] [--runs 5] [--folder .bench]

Every command is a process of its own, start-up included, with a warm cache. `cp -r` is followed by
a sync of the files that it wrote, since conversions are flushed to disk too. `cmp` compares the
Hugging Face checkpoint's weights with a copy of them.
"""

import argparse
import contextlib
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

TOOL = str(Path(sys.executable).parent / "neox-bridge")
RAW = ["--no-verify"]
CASES = (
    ("Hugging Face to GPT-NeoX, TP 1", "hf", RAW),
    ("the same, read back and compared", "hf", []),
    ("Hugging Face to GPT-NeoX, TP 2", "hf", ["--tp", "2", *RAW]),
    ("Hugging Face to GPT-NeoX, TP 1, ranks", "hf", ["--layout", "ranks", *RAW]),
    ("Hugging Face to GPT-NeoX, TP 2, bfloat16", "hf", ["--tp", "2", "--dtype", "bfloat16", *RAW]),
    ("GPT-NeoX TP 1 to Hugging Face", "neox", RAW),
    ("GPT-NeoX TP 2 to Hugging Face", "neox-tp2", RAW),
    ("GPT-NeoX TP 1 to TP 4", "neox", ["--to", "neox", "--tp", "4", *RAW]),
)
COMPARED = (
    ("`verify` Hugging Face, a copy", ["verify", "hf", "hf-copy"]),
    ("`verify` Hugging Face, GPT-NeoX TP 1", ["verify", "hf", "neox"]),
    ("`verify` Hugging Face, GPT-NeoX TP 2", ["verify", "hf", "neox-tp2"]),
    ("`verify` Hugging Face, GPT-NeoX TP 2 in bfloat16", ["verify", "hf", "neox-bf16"]),
    ("`diff` Hugging Face, GPT-NeoX TP 1", ["diff", "hf", "neox"]),
    ("`diff` GPT-NeoX TP 1, TP 2", ["diff", "neox", "neox-tp2"]),
    ("`diff`, every value another", ["diff", "hf", "hf-other"]),
)


def seconds(command: list[str], target: Path) -> float:
    """One run, its output removed again."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["sync"], check=True)
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    taken = time.perf_counter() - start
    shutil.rmtree(target)
    return taken


def timed(command: list[str], runs: int, target: Path | None = None) -> float:
    """The median of several runs of a command, whose output, if any, is removed before each."""
    found = []
    for _ in range(runs):
        if target is not None:
            shutil.rmtree(target, ignore_errors=True)
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def compared(command: list[str], expected: int) -> float:
    """One run of a comparison, which must end with the exit code expected."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    taken = time.perf_counter() - start
    if done.returncode != expected:
        sys.exit(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return taken


def peak_anonymous(command: list[str], target: Path | None = None) -> int:
    """The most memory, in bytes, that isn't a map of a file, sampled every 2 ms of one more run."""
    if target is not None:
        shutil.rmtree(target, ignore_errors=True)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    peak = max(peak, int(line.split()[1]) << 10)
        time.sleep(0.002)
    if target is not None:
        shutil.rmtree(target)
    return peak


def copy(source: Path, target: Path) -> list[str]:
    script = 'cp -r "$0" "$1" && find "$1" -type f -exec sync {} +'
    return ["sh", "-c", script, str(source), str(target)]


def comparisons(folder: Path, runs: int) -> None:
    """Print the table of ``verify`` and ``diff``; each run takes turns with ``cmp``."""
    weights = [str(folder / name / "model.safetensors") for name in ("hf", "hf-copy")]
    print("\n| | median s | spread s | times `cmp` | anonymous memory |\n|---|---|---|---|---|")
    every = []
    for title, (verb, *names) in COMPARED:
        command = [TOOL, verb, *(str(folder / name) for name in names)]
        expected = 3 if "hf-other" in names else 0
        compared(command, expected)  # everything is in memory from here on
        pairs = [(compared(["cmp", *weights], 0), compared(command, expected)) for _ in range(runs)]
        every += [pair[0] for pair in pairs]
        mine = [pair[1] for pair in pairs]
        ratio = statistics.median(mine / cmp for cmp, mine in pairs)
        print(
            f"| {title} | {statistics.median(mine):.2f} | {min(mine):.2f} - {max(mine):.2f} "
            f"| {ratio:.2f} | {peak_anonymous(command) / 1e6:.0f} MB |",
            flush=True,
        )
    spread = f"{min(every):.2f} - {max(every):.2f}"
    print(f"\n`cmp` of the same: {statistics.median(every):.2f} s, {spread}")
    start = [TOOL, "diff", *(str(folder / name) for name in ("hf", "neox-tp2"))]
    start += ["--tensor", "*.final_layer_norm.bias"]
    print(
        f"`diff` of one small tensor, so starting and reading headers: {timed(start, runs):.2f} s"
    )


def main() -> None:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed program has its byte code
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="pythia-410m")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(".bench"))
    options = parser.parse_args()
    folder: Path = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = {name: folder / name for name in ("hf", "neox", "neox-tp2", "neox-bf16", "hf-other")}
    for command in (
        ["toy", options.shape, str(made["hf"]), "--as", "hf"],
        ["convert", str(made["hf"]), str(made["neox"])],
        ["convert", str(made["hf"]), str(made["neox-tp2"]), "--tp", "2"],
        ["convert", str(made["hf"]), str(made["neox-bf16"]), "--tp", "2", "--dtype", "bfloat16"],
        ["toy", options.shape, str(made["hf-other"]), "--as", "hf", "--seed", "1"],
    ):
        subprocess.run([TOOL, *command], check=True, capture_output=True)
    shutil.copytree(made["hf"], folder / "hf-copy")
    target = folder / "out"
    size = sum(path.stat().st_size for path in made["hf"].rglob("*") if path.is_file())
    print(
        f"{options.shape}, {size / 1e9:.2f} GB; {platform.machine()}, Linux {platform.release()}, "
        f"Python {platform.python_version()}, neox-bridge {version('neox-bridge')}, "
        f"{options.runs} runs, taking turns\n"
    )
    print("| | median s | spread s | times `cp -r` | anonymous memory |\n|---|---|---|---|---|")
    for title, name, arguments in CASES:
        convert = [TOOL, "convert", str(made[name]), str(target), *arguments]
        pairs = [
            (seconds(copy(made[name], target), target), seconds(convert, target))
            for _ in range(options.runs)
        ]
        ratio = statistics.median(mine / cp for cp, mine in pairs)
        mine = [pair[1] for pair in pairs]
        spread = f"{min(mine):.2f} - {max(mine):.2f}"
        memory = f"{peak_anonymous(convert, target) / 1e6:.0f} MB"
        median = f"{statistics.median(mine):.2f}"
        print(f"| {title} | {median} | {spread} | {ratio:.2f} | {memory} |", flush=True)
    dry = [TOOL, "convert", str(made["hf"]), str(target), "--dry-run"]
    print(f"\nStarting, reading headers and planning (--dry-run): {timed(dry, options.runs):.2f} s")
    cp = timed(copy(made["hf"], target), options.runs, target)
    print(f"`cp -r` and sync of the same: {cp:.2f} s")
    comparisons(folder, options.runs)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
