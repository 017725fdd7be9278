"""A Pythia-410M-shaped checkpoint to GPT-NeoX with TP 2 and back, compared bit for bit."""

import filecmp
import shutil
import subprocess
import sys
import time
from pathlib import Path

SHAPE = "pythia-410m"


def main(folder: Path) -> int:
    tool = str(Path(sys.executable).parent / "neox-bridge")
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    source, neox, back = (work / name for name in (f"{SHAPE}-hf", f"{SHAPE}-neox-tp2", "back-hf"))
    steps = [
        (f"make a random {SHAPE}, as Hugging Face", ["toy", SHAPE, source, "--as", "hf"]),
        ("Hugging Face to GPT-NeoX, tensor parallel 2", ["convert", source, neox, "--tp", "2"]),
        ("GPT-NeoX to Hugging Face", ["convert", neox, back]),
    ]
    for title, arguments in steps:
        command = [str(a) for a in arguments]
        print(f"\n{title}\n$ neox-bridge {' '.join(command)}", flush=True)
        start = time.perf_counter()
        subprocess.run([tool, *command], check=True)
        print(f"  {time.perf_counter() - start:.2f} s, start-up included", flush=True)
    first, last = (path / "model.safetensors" for path in (source, back))
    same = filecmp.cmp(first, last, shallow=False)
    size = first.stat().st_size
    print(f"\n{first}\n{last}\n  {size:,} bytes: {'all equal' if same else 'DIFFERENT'}")
    print(f"\nThe checkpoints lie in {work}. Remove them with: make clean")
    return 0 if same else 3


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
