"""What a conversion to and from a store asks of it: requests, seconds, processor time and memory.

``python benchmarks/stores.py [FOLDER]`` makes a checkpoint of Pythia-410M's shape (``--layers`` for
fewer) in FOLDER, writes it to an S3 server on loopback (moto's), reads it from there, and lists the
requests of each. The server and the proxy that counts are Python and slower than the client, so the
processor time of the client says more than the seconds.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from s3_server import BUCKET, Store, server

TOOL = (sys.executable, "-m", "neox_bridge")


def measure(title: str, store: Store, *arguments: str) -> None:
    """Run one command and print what it took."""
    store.requests.clear()
    start = time.perf_counter()
    process = subprocess.Popen([*TOOL, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{title} failed: {' '.join(arguments)}")
    methods = Counter(request.method for request in store.requests)
    counts = ", ".join(f"{number} {name}" for name, number in sorted(methods.items()))
    print(
        f"{title:<28} {seconds:7.1f} s  {usage.ru_utime + usage.ru_stime:6.1f} s CPU  "
        f"{usage.ru_maxrss >> 10:4} MiB  {sum(methods.values()):4} requests ({counts})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--model", default="pythia-410m")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    source = folder / "source"
    if not source.exists():
        layers = ("--layers", str(options.layers)) if options.layers else ()
        toy = (*TOOL, "toy", options.model, str(source), "--as", "hf", *layers)
        subprocess.run(toy, check=True, stdout=subprocess.DEVNULL)
    with server() as store:
        for number in range(options.rounds):
            neox, hf = f"s3://{BUCKET}/{number}/neox", f"s3://{BUCKET}/{number}/hf"
            here = folder / f"here{number}"
            measure("open a folder of the disk", store, "inspect", str(source))
            measure("to S3", store, "convert", str(source), neox, "--no-verify")
            measure("open on S3", store, "inspect", neox)
            measure("verify on S3", store, "verify", str(source), neox)
            measure("from S3", store, "convert", neox, str(here), "--no-verify")
            measure("from S3 to S3", store, "convert", neox, hf, "--no-verify")
            shutil.rmtree(here)


if __name__ == "__main__":
    main()
