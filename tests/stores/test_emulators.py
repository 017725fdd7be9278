"""Azure and Google Cloud, as far as emulators of them go.

Azure's is Azurite, for az:// and abfs://. Google Cloud's is moto's S3 server, which answers the
requests that obstore makes of gs:// too: they are those of Google's XML interface, made like S3's.
It passes over x-goog-if-generation-match, so the lock of two runs isn't tried there. The package
gcp-storage-emulator has the JSON interface only. Asked for what obstore asks, it answers 501 to
HEAD, to a listing, to DELETE and to the start of a multipart upload, and gives no ETag for a PUT.
"""

import shutil
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import azurite
import pytest
import s3_server
from common import make_hf
from store_files import WIDE, assert_same, files, run

from neox_bridge.api import open_checkpoint
from neox_bridge.errors import BridgeError
from neox_bridge.stores import lock, objects
from neox_bridge.verification.verify import verify


@dataclass(frozen=True)
class Emulator:
    """root: its URL for the package. address: where anybody can read the same objects by HTTP."""

    root: str
    address: str
    headers: Mapping[str, str]

    def contents(self, folder: str) -> dict[str, bytes]:
        """Every object below a folder, its bytes read without the package."""
        found = {}
        for url in objects.below(f"{self.root}/{folder}"):
            key = url.removeprefix(f"{self.root}/")
            address = f"{self.address}/{urllib.parse.quote(key)}"
            request = urllib.request.Request(address, headers=self.headers)
            with urllib.request.urlopen(request) as answer:
                found[key.removeprefix(f"{folder}/")] = answer.read()
        return found


@pytest.fixture(scope="module", params=["az", "gs"])
def emulator(request: pytest.FixtureRequest) -> Iterator[Emulator]:
    if request.param == "az":
        if azurite.find() is None:
            pytest.skip("no Azurite: python tests/helpers/azurite.py fetches it (node is needed)")
        if shutil.which("node") is None:
            pytest.skip("Azurite needs node")
        with azurite.server() as address:
            yield Emulator(f"az://{azurite.CONTAINER}", address, {})
        return
    with s3_server.server() as store, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", store.url)
        address = f"{store.url}/{s3_server.BUCKET}"
        yield Emulator(f"gs://{s3_server.BUCKET}", address, {"Authorization": "AWS a:b"})


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose embeddings need two parts of an upload."""
    return make_hf(tmp_path_factory.mktemp("emulators") / "hf", num_hidden_layers=1, **WIDE)


def test_there_and_back(emulator: Emulator, wide: Path, tmp_path: Path) -> None:
    url = f"{emulator.root}/there/neox"
    run(wide, url, tp=2)
    run(wide, tmp_path / "neox", tp=2)
    assert_same(emulator.contents("there/neox"), files(tmp_path / "neox"))
    run(url, tmp_path / "hf")
    run(tmp_path / "neox", tmp_path / "hf2")
    assert_same(files(tmp_path / "hf"), files(tmp_path / "hf2"))
    assert verify(open_checkpoint(str(wide)), open_checkpoint(url)).holds


def test_what_is_there_is_only_replaced_when_asked(
    emulator: Emulator, wide: Path, tmp_path: Path
) -> None:
    url = f"{emulator.root}/replaced"
    run(wide, url, tp=1)
    with pytest.raises(BridgeError, match=r"exists and contains \d+ objects"):
        run(wide, url, tp=2)
    run(wide, url, tp=2, overwrite=True)
    run(wide, tmp_path / "neox", tp=2)
    assert_same(emulator.contents("replaced"), files(tmp_path / "neox"))


def test_a_run_that_was_stopped_is_resumed(
    emulator: Emulator, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tags are the same in the answer to an upload and in a listing."""
    url = f"{emulator.root}/stopped"
    with monkeypatch.context() as patch:
        patch.setattr("neox_bridge.execution.object_store._put_surely", fail_for_records)
        with pytest.raises(BridgeError, match="stopped here"):
            run(wide, url, tp=2)
    result = run(wide, url, tp=2)
    assert result.kept > 0
    run(wide, tmp_path / "neox", tp=2)
    assert_same(emulator.contents("stopped"), files(tmp_path / "neox"))


def fail_for_records(url: str, data: bytes) -> None:
    if url.endswith("neox_bridge.json"):
        raise BridgeError("stopped here")
    objects.put_small(url, data)


def test_names_that_are_not_plain(emulator: Emulator) -> None:
    folder = f"{emulator.root}/names é #%"
    objects.put_small(f"{folder}/a b~.bin", b"abc")
    assert objects.names(folder) == ["a b~.bin"]
    assert objects.fetch(f"{folder}/a b~.bin", 1, 3) == b"bc"
    objects.remove([f"{folder}/a b~.bin", f"{folder}/missing"])
    assert objects.kind(folder) is None


def test_one_of_two_runs_has_the_lock(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    if emulator.root.startswith("gs://"):
        pytest.skip("moto does not know x-goog-if-generation-match")
    monkeypatch.setattr(lock, "RENEWED_SECONDS", 0.1)
    monkeypatch.setattr(lock, "DEAD_SECONDS", 5.0)
    with (
        lock.locked(f"{emulator.root}/locked") as held,
        pytest.raises(BridgeError, match="is being written by another run"),
    ):
        lock.Lock(held.url).take()
    assert not objects.below(f"{emulator.root}/locked")


def test_a_container_that_is_missing_is_an_error(emulator: Emulator, wide: Path) -> None:
    missing = emulator.root.replace("bucket", "nobody")
    with pytest.raises(BridgeError, match="no such folder"):
        open_checkpoint(f"{missing}/here")
    with pytest.raises(BridgeError, match="bucket"):
        run(wide, f"{missing}/here")
