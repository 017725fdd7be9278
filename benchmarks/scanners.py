"""Hostile and genuine files through ``inspect --security``, picklescan and fickling: a table.

    python benchmarks/scanners.py PYTHON

PYTHON: one of an environment with picklescan, fickling and typing_extensions. Files are made by
``tests/helpers/attack_*.py``; genuine ones are those of ``tests/data/fixtures``.
"""

import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from attack_pickles import DEEP, WORK, running  # noqa: E402
from attack_torch import TENSORS, ZIPS, zipped  # noqa: E402

SECONDS = 20
_FICKLING = """
import sys
from fickling.loader import scan_file, scan_zip_archive
path = sys.argv[1]
zipped = open(path, "rb").read(2) == b"PK"
one = lambda p: {p: scan_file(p, graceful=True, json_output_path="/dev/null")}
found = scan_zip_archive(path, graceful=True, json_output_path="/dev/null") if zipped else one(path)
bad = any(not result.is_safe for result in found.values())
failed = any(result.errors for result in found.values()) or not found
sys.exit(1 if bad else 2 if failed else 0)
"""


def cases() -> dict[str, dict[str, Callable[[], bytes]]]:
    """Files by what they are: each group is a part of the table."""
    raw = {name: lambda d=data: d for name, data in running("touch canary").items()}
    changing = ("an environment", "a path", "a module's attributes", "an import")
    inert = ("a storage by a call", "a type rebuilt by a call", "a torch file inside")
    bombs = {n: f for n, f in WORK.items() if n not in changing + inert and "persistent" not in n}
    return {
        "runs a command, as .pkl": raw,
        "runs a command, as .pt": {n: lambda f=f: zipped(f()) for n, f in raw.items()},
        "imports or changes a module": {n: WORK[n] for n in changing},
        "calls through torch": {n: lambda f=WORK[n]: zipped(f()) for n in inert},
        "takes time or memory": {**bombs, **{n: lambda d=d: d for n, d in DEEP.items()}},
        "zips that lie": ZIPS,
        "tensors that lie": {
            n: lambda f=f: zipped(b"\x80\x02" + f() + b".") for n, f in TENSORS.items()
        },
    }


def judge(command: list[str], path: Path) -> tuple[str, float, int]:
    """(verdict, seconds of CPU, bytes of memory) of one tool on one file."""
    child = subprocess.Popen(
        [*command, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=path.parent,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    signal.signal(signal.SIGALRM, lambda *_: child.kill())
    signal.alarm(SECONDS)
    assert child.stdout is not None
    said = child.stdout.read().decode(errors="replace")
    _, status, usage = os.wait4(child.pid, 0)
    signal.alarm(0)
    code = os.waitstatus_to_exitcode(status)
    verdict = {0: "clean", 1: "flagged"}.get(code, "killed" if code == -9 else "failed")
    if "picklescan" in command[0] and verdict == "clean" and "Suspicious globals: 0" not in said:
        verdict = "suspicious"
    return verdict, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10


def write(make: Callable[[], bytes], path: Path) -> None:
    """In a child, since the peak of those that are measured counts from what their parent has."""
    child = os.fork()
    if child == 0:
        path.write_bytes(make())
        os._exit(0)
    os.waitpid(child, 0)


def main() -> None:
    """Print the table in Markdown, and below it which cases differ."""
    warnings.simplefilter("ignore")
    python = os.path.abspath(sys.argv[1])
    picklescan = os.path.join(os.path.dirname(python), "picklescan")
    tools = {
        "neox-bridge": [sys.executable, "-m", "neox_bridge", "inspect", "--security"],
        "picklescan": [picklescan, "-p"],
        "picklescan --strict": [picklescan, "--strict", "-p"],
        "fickling": [python, "-c", _FICKLING],
    }
    verdicts = ("flagged", "suspicious", "failed", "killed", "clean")
    print("| files | number | " + " | ".join(tools) + " |")
    print("|---|---|" + "---|" * len(tools))
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        groups = {g: [(n, make) for n, make in c.items()] for g, c in cases().items()}
        genuine = sorted(ROOT.glob("tests/data/fixtures/*/checkpoints/*/*.pt"))
        groups["genuine GPT-NeoX files"] = [(str(p), p.read_bytes) for p in genuine[::5]]
        for group, files in groups.items():
            cells, worst = [], {}
            results: dict[str, list[tuple[str, str]]] = {tool: [] for tool in tools}
            for name, make in files:
                path = Path(folder) / "x.pkl"
                write(make, path)
                if path.open("rb").read(2) == b"PK":
                    path = path.rename(path.with_suffix(".pt"))
                for tool, command in tools.items():
                    verdict, seconds, memory = judge(command, path)
                    results[tool].append((name, verdict))
                    most = worst.get(tool, (0.0, 0))
                    worst[tool] = (max(most[0], seconds), max(most[1], memory))
                path.unlink()
            for tool, found in results.items():
                counts = {v: sum(verdict == v for _, verdict in found) for v in verdicts}
                told = ", ".join(f"{count} {v}" for v, count in counts.items() if count)
                seconds, memory = worst[tool]
                cells.append(f"{told} ({seconds:.1f} s, {memory / 1e6:.0f} MB)")
                least = [n for n, v in found if v != "flagged"]
                if "genuine" not in group:
                    notes.append(f"- {group}, {tool}, not flagged: {', '.join(least) or 'none'}")
            print(f"| {group} | {len(files)} | " + " | ".join(cells) + " |", flush=True)
    print("\n" + "\n".join(notes))


if __name__ == "__main__":
    main()
