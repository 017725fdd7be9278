"""Who the user is, from where stores' own tools and fsspec have it."""

import json
import sys
from pathlib import Path

import pytest
from s3_server import Store
from store_files import s3

from neox_bridge.errors import BridgeError
from neox_bridge.stores import credentials, objects
from neox_bridge.stores.credentials import azure_options, google_options, s3_options


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is configured, and AWS is not asked for a region."""
    for name in list(credentials.os.environ):
        if name.startswith(("AWS_", "FSSPEC_", "AZURE_", "GOOGLE_", "STORAGE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(credentials, "_region_of", lambda bucket: None)


def test_keys_of_the_environment_need_no_botocore(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """obstore reads them itself."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    assert s3_options("s3://bucket") == {}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://somewhere")
    assert s3_options("s3://bucket") == {"endpoint": "http://somewhere"}
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://nearer")
    assert s3_options("s3://bucket") == {"endpoint": "http://nearer"}
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(BridgeError, match=r"botocore is missing, .* install .*\[remote\]"):
        s3_options("s3://bucket")


def test_a_profile_names_user_region_endpoint_and_style(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / ".aws"
    folder.mkdir()
    (folder / "config").write_text(
        "[profile lab]\nregion = eu-north-1\nendpoint_url = http://lab\n"
        "s3 =\n  addressing_style = virtual\n"
    )
    (folder / "credentials").write_text(
        "[lab]\naws_access_key_id = me\naws_secret_access_key = secret\naws_session_token = token\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "lab")
    options = s3_options("s3://bucket")
    provided = options.pop("credential_provider")()
    assert options == {
        "region": "eu-north-1",
        "endpoint": "http://lab",
        "virtual_hosted_style_request": True,
    }
    assert [provided[key] for key in ("access_key_id", "secret_access_key", "token")] == [
        *("me", "secret", "token")
    ]
    (folder / "config").write_text(f"[profile lab]\nendpoint_url = {store.url}\n")
    objects.put_small(s3("profile/x"), b"x")
    assert objects.names(s3("profile")) == ["x"]
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(BridgeError, match="nobody"):
        s3_options("s3://bucket")


@pytest.mark.parametrize("endpoint", ["localhost:9000", "minio.local", "http://", "http://a b"])
def test_an_endpoint_that_is_no_url(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """obstore panics with it, in Rust, at its first request."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "x")
    for usable in ("http://localhost:9000", "https://s3.example.com/", "http://[::1]:9000"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", usable)
        assert s3_options("s3://bucket")["endpoint"] == usable
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(BridgeError, match=r"s3://bucket: the endpoint .* Set AWS_ENDPOINT_URL"):
        s3_options("s3://bucket")


def test_nobody_is_an_error() -> None:
    with pytest.raises(BridgeError, match=r"no credentials for S3 were found.*AWS_PROFILE"):
        s3_options("s3://bucket")


def test_the_region_of_a_bucket_of_aws_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr(credentials, "_region_of", {"bucket": "ap-south-1"}.get)
    assert s3_options("s3://bucket") == {"region": "ap-south-1"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio")
    assert s3_options("s3://bucket") == {"endpoint": "http://minio"}


def test_settings_of_fsspec_are_translated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FSSPEC_S3_KEY", "me")
    monkeypatch.setenv("FSSPEC_S3_SECRET", "secret")
    folder = tmp_path / ".config/fsspec"
    folder.mkdir(parents=True)
    settings = {
        "client_kwargs": {"region_name": "eu-west-1", "endpoint_url": "http://minio"},
        "requester_pays": True,
        "default_block_size": 1,
        "config_kwargs": {"s3": {"addressing_style": "path"}},
        "s3_additional_kwargs": {"ServerSideEncryption": "AES256"},
    }
    (folder / "conf.json").write_text(json.dumps({"s3": settings, "gs": {"token": "anon"}}))
    assert s3_options("s3://bucket") == {
        "access_key_id": "me",
        "secret_access_key": "secret",
        "region": "eu-west-1",
        "endpoint": "http://minio",
        "request_payer": True,
        "server_side_encryption": "AES256",
    }
    assert google_options("gs://bucket") == {"skip_signature": True}
    monkeypatch.setenv("FSSPEC_ABFS", '{"account_name": "me", "account_key": "a2V5"}')
    assert azure_options("az://box", "") == {"account_name": "me", "account_key": "a2V5"}


@pytest.mark.parametrize("name", ["FSSPEC_S3_SESSION", "FSSPEC_GS_TOKEN", "FSSPEC_AZ_CREDENTIAL"])
def test_a_setting_without_a_counterpart_is_an_error(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "whatever")
    options = {"S3": s3_options, "GS": google_options}.get(
        name.split("_")[1], lambda root: azure_options(root, "")
    )
    with pytest.raises(BridgeError, match=rf"the setting {name.split('_')[2].lower()} of fsspec"):
        options("x://bucket")


def test_azure_by_its_connection_string(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "AZURE_STORAGE_CONNECTION_STRING"
    monkeypatch.setenv(name, "AccountName=me;AccountKey=a2V5==;EndpointSuffix=core.windows.net")
    assert azure_options("az://box", "") == {
        "account_name": "me",
        "account_key": "a2V5==",
        "endpoint": "https://me.blob.core.windows.net",
    }
    monkeypatch.setenv(name, "UseDevelopmentStorage=true")
    assert azure_options("az://box", "")["endpoint"] == "http://127.0.0.1:10000/devstoreaccount1"
    monkeypatch.delenv(name)
    host = "you.dfs.core.windows.net"
    assert azure_options(f"abfss://box@{host}", host) == {"account_name": "you"}
