"""Azurite, the emulator of Azure's blobs: found, or fetched into .azurite; a container on loopback.

``python tests/helpers/azurite.py`` fetches it where there is none and says what it did; it never
fails, for the tests are skipped without. The npm package azurite (MIT) needs node.
"""

import base64
import email.utils
import hashlib
import hmac
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".azurite"
PACKAGE = "azurite@3.37.0"
CONTAINER = "bucket"
_ACCOUNT = "devstoreaccount1"
# known to everybody: the emulator's own, in its documentation
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
_VERSION = "2021-08-06"


def find() -> str | None:
    """$AZURITE_BLOB, one on PATH, or the one that was fetched."""
    if named := os.environ.get("AZURITE_BLOB"):
        return named
    fetched = FOLDER / "node_modules" / ".bin" / "azurite-blob"
    return shutil.which("azurite-blob") or (str(fetched) if fetched.exists() else None)


def fetch() -> None:
    """Make .azurite, whole or not at all. Raises OSError or a subprocess's error."""
    for tool in ("npm", "node"):
        if shutil.which(tool) is None:
            raise OSError(f"{tool} is needed to fetch it")
    with tempfile.TemporaryDirectory(dir=FOLDER.parent, prefix=".azurite-") as name:
        made = Path(name) / "made"
        made.mkdir()
        quiet = ("--no-audit", "--no-fund", "--no-save", "--ignore-scripts", "--silent")
        command = ["npm", "install", *quiet, "--prefix", str(made), PACKAGE]
        subprocess.run(command, check=True, timeout=600, stdout=subprocess.DEVNULL)
        shutil.rmtree(FOLDER, ignore_errors=True)
        made.rename(FOLDER)


@contextmanager
def server() -> Iterator[str]:
    """The container's address while Azurite runs, with the environment that leads clients to it."""
    program = find()
    assert program is not None
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = int(sock.getsockname()[1])
    command = [program, "--silent", "--blobPort", str(port), "--skipApiVersionCheck"]
    process = subprocess.Popen(
        [*command, "--inMemoryPersistence"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}/{_ACCOUNT}"
    name = "AZURE_STORAGE_CONNECTION_STRING"
    before = os.environ.get(name)
    os.environ[name] = f"AccountName={_ACCOUNT};AccountKey={_KEY};BlobEndpoint={address};"
    try:
        _make_container(address)
        yield f"{address}/{CONTAINER}"
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
        process.terminate()
        process.wait()


def _make_container(address: str) -> None:
    """One that everybody may read."""
    for _ in range(300):
        headers = {
            "x-ms-blob-public-access": "container",
            "x-ms-date": email.utils.formatdate(usegmt=True),
            "x-ms-version": _VERSION,
        }
        lines = ["PUT", *[""] * 11, *(f"{key}:{value}" for key, value in headers.items())]
        text = "\n".join([*lines, f"/{_ACCOUNT}/{_ACCOUNT}/{CONTAINER}", "restype:container"])
        digest = hmac.new(base64.b64decode(_KEY), text.encode(), hashlib.sha256).digest()
        headers["Authorization"] = f"SharedKey {_ACCOUNT}:{base64.b64encode(digest).decode()}"
        headers["Content-Length"] = "0"
        url = f"{address}/{CONTAINER}?restype=container"
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers))
            return
        except ConnectionError:
            time.sleep(0.2)
        except urllib.error.URLError as error:
            if isinstance(error, urllib.error.HTTPError):
                raise
            time.sleep(0.2)
    raise TimeoutError("azurite doesn't start")


def main() -> None:
    program = find()
    if program is None:
        try:
            fetch()
            program = f"fetched to {FOLDER}"
        except (OSError, subprocess.SubprocessError) as error:
            program = f"none ({error}): az:// isn't tried"
    print(f"Azurite: {program}", flush=True)


if __name__ == "__main__":
    main()
