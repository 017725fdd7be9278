"""A Chromium for the tests of the report: found, or fetched into .chromium.

``python tests/helpers/chromium.py`` fetches one where there is none and says what it did; it never
fails, for the tests are skipped without. The npm package @sparticuz/chromium (MIT) carries Chromium
(BSD) for Linux on x86-64, compressed with brotli, which node reads.
"""

import ctypes.util
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".chromium"
BINARY = FOLDER / "chromium"
PACKAGE = "@sparticuz/chromium@153.0.0"
SHA512 = (
    "8e2196a92bcf31dbb8f8ff538a562a011ef21063c41c8371fa50af13f36a34ef"
    "c41d8cc5ff1d615222394fa8a8548b7b744cbb9fcf1bcb24f4be4f9d9ec810c0"
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
UNPACK = """
const fs = require('fs'), zlib = require('zlib');
for (const [from, to] of [['chromium', 'chromium'], ['al2023.tar', 'libraries.tar']])
  fs.writeFileSync(to, zlib.brotliDecompressSync(fs.readFileSync(`package/bin/${from}.br`)));
"""


def find() -> str | None:
    """$CHROMIUM, one on PATH, or the one that was fetched."""
    if told := os.environ.get("CHROMIUM"):
        return told
    on_path = next((found for name in NAMES if (found := shutil.which(name))), None)
    return on_path or (str(BINARY) if BINARY.exists() else None)


def environment(folder: Path = FOLDER) -> dict[str, str]:
    """Where the system has no NSS, which Chromium needs, the one that came with it."""
    libraries = folder / "lib"
    if libraries.exists() and not ctypes.util.find_library("nss3"):
        return {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    return dict(os.environ)


def fetch() -> None:
    """Make .chromium, whole or not at all. Raises OSError or a subprocess's error."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise OSError("there is one for Linux on x86-64 only")
    for tool in ("npm", "node"):
        if shutil.which(tool) is None:
            raise OSError(f"{tool} is needed to fetch one")
    with tempfile.TemporaryDirectory(dir=FOLDER.parent, prefix=".chromium-") as name:
        work = Path(name)
        command = ["npm", "pack", "--silent", PACKAGE]
        subprocess.run(command, cwd=work, check=True, timeout=300, stdout=subprocess.DEVNULL)
        (packed,) = work.glob("*.tgz")
        if hashlib.sha512(packed.read_bytes()).hexdigest() != SHA512:
            raise OSError(f"{PACKAGE} isn't what it was")
        with tarfile.open(packed) as archive:
            archive.extractall(work, filter="data")
        subprocess.run(["node", "-e", UNPACK], cwd=work, check=True, timeout=120)
        made = work / "made"
        made.mkdir()
        with tarfile.open(work / "libraries.tar") as archive:
            archive.extractall(made, filter="data")
        binary = (work / "chromium").rename(made / "chromium")
        binary.chmod(0o755)
        tried = [str(binary), "--version"]
        subprocess.run(tried, check=True, timeout=60, env=environment(made), capture_output=True)
        shutil.rmtree(FOLDER, ignore_errors=True)
        made.rename(FOLDER)


def main() -> None:
    found = find()
    if found is None:
        try:
            fetch()
            found = f"fetched to {BINARY}"
        except (OSError, subprocess.SubprocessError, tarfile.TarError) as error:
            found = f"none ({error}): the report isn't tried in a browser"
    print(f"Chromium: {found}", flush=True)


if __name__ == "__main__":
    main()
