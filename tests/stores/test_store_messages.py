"""What stores that cannot be used say, without a server: packages, addresses, access."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec.core
import pytest
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled

from neox_bridge.errors import BridgeError, Unreachable
from neox_bridge.stores import buckets, credentials, hub_api, objects
from neox_bridge.stores.fsspec_store import FsspecStore
from neox_bridge.stores.paths import listdir, open_file
from neox_bridge.stores.retry import steadily


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Credentials of S3 that no server was asked about, and no other settings."""
    for name in list(credentials.os.environ):
        if name.startswith(("AWS_", "FSSPEC_", "AZURE_", "GOOGLE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "eu-west-1")
    return monkeypatch


@pytest.mark.parametrize(
    ("module", "url", "message"),
    [
        ("obstore", "s3://without-obstore/x", "s3://without-obstore: obstore is missing"),
        ("fsspec.core", "memory://x", "memory://x: fsspec is missing"),
        ("paramiko", "sftp://host/x", "sftp://host/x: this kind of store needs one more package"),
    ],
)
def test_packages_that_are_missing(
    module: str, url: str, message: str, keys: pytest.MonkeyPatch
) -> None:
    keys.setitem(sys.modules, module, None)
    keys.delitem(sys.modules, "fsspec.implementations.sftp", raising=False)
    with pytest.raises(BridgeError, match=f"{message}.*nstall") as raised:
        objects.store_of(url)
    assert ("paramiko" if module == "paramiko" else "remote") in str(raised.value)


def test_a_client_that_cannot_be_made(keys: pytest.MonkeyPatch) -> None:
    keys.setenv("AZURE_STORAGE_ACCOUNT_NAME", "name")
    keys.setenv("AZURE_STORAGE_ACCOUNT_KEY", "???")
    message = "az://container cannot be opened: Invalid Access Key.* Check the environment"
    with pytest.raises(BridgeError, match=message):
        objects.look("az://container/x")


@pytest.mark.usefixtures("keys")
def test_two_slashes() -> None:
    with pytest.raises(BridgeError, match="s3://bucket/a//b contains two slashes in a row"):
        objects.look("s3://bucket/a//b")


@pytest.mark.usefixtures("keys")
def test_a_bucket_that_is_gone_when_an_object_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def put(*_: object, **__: object) -> None:
        raise FileNotFoundError("NoSuchBucket")

    bucket = buckets.bucket_of("s3://gone/x")
    monkeypatch.setattr(bucket, "store", type("Client", (), {"put": staticmethod(put)}))
    upload = bucket.upload("s3://gone/x", 3)
    upload.send(bytearray(b"abc"))
    message = "s3://gone/x cannot be written: .*NoSuchBucket. Check the name of the bucket"
    with pytest.raises(BridgeError, match=message):
        upload.finish()


def test_a_host_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(url: str) -> Any:
        raise OSError("No route to host")

    monkeypatch.setattr(fsspec.core, "url_to_fs", connect)
    message = r"sftp://host/x cannot be reached: OSError: No route to host\. Check the address"
    with pytest.raises(BridgeError, match=message):
        FsspecStore("sftp://host/x")


def test_what_is_not_in_a_store() -> None:
    with pytest.raises(BridgeError, match="memory://gone cannot be listed: the store has no such"):
        listdir("memory://gone")
    objects.put_small("memory://kept/file", b"abc")
    with open_file("memory://kept/file") as file:
        fsspec.core.url_to_fs("memory://kept/file")[0].rm("memory://kept/file")
        with pytest.raises(BridgeError, match="memory://kept/file cannot be read: it does not"):
            file.read()


def gated() -> Exception:
    response: Any = SimpleNamespace(status_code=403, headers={}, request=None)
    return GatedRepoError("403", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set, so the Hub is not"),
        (gated, "the repository is gated. Request access on its page, then log in"),
        (lambda: FileExistsError("x"), "FileExistsError: x. Check the address and your access"),
    ],
)
def test_requests_that_no_retry_helps(error: Callable[[], Exception], message: str) -> None:
    tries = 0

    def call() -> None:
        nonlocal tries
        tries += 1
        raise error()

    with pytest.raises(Unreachable, match=f"hf://org/name cannot be read: {message}"):
        steadily("hf://org/name", "read", call)
    assert tries == 1


@pytest.mark.parametrize(("role", "can_write"), [("read", False), ("write", True)])
def test_a_token_that_can_only_read(
    role: str, can_write: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Api:
        def whoami(self) -> Any:
            return {"auth": {"accessToken": {"role": role, "displayName": "laptop"}}}

    monkeypatch.setattr(hub_api, "hub_api", lambda why: Api())
    if can_write:
        hub_api.check_writer("org/name")
        return
    with pytest.raises(BridgeError, match="org/name: the token 'laptop' is read-only"):
        hub_api.check_writer("org/name")
