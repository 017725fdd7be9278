"""Credentials for S3, Google Cloud and Azure, as options of obstore.

Settings are read from the same places as by the stores' own tools: environment variables, the
profiles of ``~/.aws`` (through botocore, which also supports single sign-on and roles), Google's
application default credentials, Azure's connection strings. Settings for fsspec are honored too. A
setting without a counterpart in obstore is an error, because it may contain credentials.
"""

import os
import re
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

from neox_bridge.errors import BridgeError, Unreachable
from neox_bridge.extras import install_command

_ENDPOINT = re.compile(r"https?://(\[[\da-fA-F:.]+\]|[^\s/:?#\[\]]+)(:\d+)?(/\S*)?")
_CREDENTIAL_MINUTES = 10  # how long credentials of botocore are reused
_REGION_SECONDS = 5.0
_AWS_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_AWS_PROFILES = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE")
_EMULATOR = "STORAGE_EMULATOR_HOST"  # the default endpoint of Google's own tools
_AZURE_CONNECTION = "AZURE_STORAGE_CONNECTION_STRING"
# fsspec settings and their obstore names; "" for settings that only affect the speed of s3fs
_TUNING = (
    *("default_block_size", "default_cache_type", "default_fill_cache", "max_concurrency"),
    *("use_listings_cache", "listings_expiry_time", "cache_regions", "fixed_upload_size"),
    *("block_size", "cache_timeout", "check_connection", "consistency", "project", "access"),
    *("asynchronous", "skip_instance_cache", "use_ssl", "protocol"),
)
_S3_SETTINGS = {
    "key": "access_key_id",
    "secret": "secret_access_key",
    "token": "session_token",
    "anon": "skip_signature",
    "endpoint_url": "endpoint",
    "requester_pays": "request_payer",
    "profile": "profile",
    "client_kwargs.region_name": "region",
    "client_kwargs.endpoint_url": "endpoint",
    "client_kwargs.aws_access_key_id": "access_key_id",
    "client_kwargs.aws_secret_access_key": "secret_access_key",
    "client_kwargs.aws_session_token": "session_token",
    "config_kwargs.s3.addressing_style": "addressing_style",
    "s3_additional_kwargs.ServerSideEncryption": "server_side_encryption",
    "s3_additional_kwargs.SSEKMSKeyId": "sse_kms_key_id",
}
_GOOGLE_SETTINGS = {"token": "token", "endpoint_url": "base_url"}
_AZURE_SETTINGS = {
    "account_name": "account_name",
    "account_key": "account_key",
    "sas_token": "sas_key",
    "tenant_id": "tenant_id",
    "client_id": "client_id",
    "client_secret": "client_secret",
    "anon": "skip_signature",
    "connection_string": "connection_string",
}


def s3_options(root: str) -> dict[str, Any]:
    """Arguments of obstore's ``S3Store``. root: ``s3://bucket``.

    Raises Unreachable if there are no credentials, BridgeError for an unusable profile or setting.
    """
    options = _fsspec_settings(root, ("s3", "s3a"), _S3_SETTINGS)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and "endpoint" not in options:
        options["endpoint"] = endpoint
    profile, style = options.pop("profile", None), options.pop("addressing_style", "auto")
    known = options.get("skip_signature") or "access_key_id" in options
    if profile or not (known or _environment_is_all()):
        options = {**_botocore_options(root, profile, bool(known)), **options}
        style = options.pop("addressing_style", style)
    _check_endpoint(root, options.get("endpoint"))
    if style == "virtual":
        options["virtual_hosted_style_request"] = True
    if "endpoint" not in options:
        region = _region_of(root.partition("://")[2]) or options.get("region")
        options |= {"region": region} if region else {}
    return options


def s3_client() -> Any:
    """A botocore client, for operations that obstore does not support. May raise ImportError."""
    from botocore.session import Session

    options = _fsspec_settings("s3://", ("s3", "s3a"), _S3_SETTINGS)
    return Session(profile=options.get("profile")).create_client(
        "s3",
        region_name=options.get("region") or os.environ.get("AWS_REGION") or None,
        endpoint_url=options.get("endpoint"),
        aws_access_key_id=options.get("access_key_id"),
        aws_secret_access_key=options.get("secret_access_key"),
        aws_session_token=options.get("session_token"),
    )


def google_options(root: str) -> dict[str, Any]:
    """Arguments of obstore's ``GCSStore``."""
    options = _fsspec_settings(root, ("gs", "gcs"), _GOOGLE_SETTINGS)
    token = options.pop("token", None)
    if token == "anon":
        options["skip_signature"] = True
    elif isinstance(token, str) and os.path.isfile(token):
        options["application_credentials"] = token
    elif token not in (None, "google_default", "cloud"):
        raise _no_counterpart(root, "token")
    if host := os.environ.get(_EMULATOR):
        # writing needs a token, even if requests are not signed
        options |= {"base_url": host if "://" in host else f"http://{host}", "bearer_token": "none"}
    return options


def azure_options(root: str, host: str) -> dict[str, Any]:
    """Arguments of obstore's ``AzureStore``.

    root: ``az://container``, or ``abfss://container@account.dfs.core.windows.net``. host: the part
    after ``@``, or "".
    """
    options = _fsspec_settings(root, ("az", "abfs", "abfss"), _AZURE_SETTINGS)
    text = options.pop("connection_string", None) or os.environ.get(_AZURE_CONNECTION, "")
    parts = dict(part.split("=", 1) for part in text.split(";") if "=" in part)
    account = host.partition(".")[0] or parts.get("AccountName")
    settings = {
        "account_name": account,
        "account_key": parts.get("AccountKey"),
        "sas_key": parts.get("SharedAccessSignature"),
        "endpoint": _azure_endpoint(parts, account),
    }
    return {key: value for key, value in settings.items() if value} | options


def _azure_endpoint(parts: Mapping[str, str], account: str | None) -> str | None:
    if parts.get("UseDevelopmentStorage", "").lower() == "true":
        return f"http://127.0.0.1:10000/{account or 'devstoreaccount1'}"
    if parts.get("BlobEndpoint"):
        return parts["BlobEndpoint"].rstrip("/")
    if parts.get("EndpointSuffix") and account:
        return (
            f"{parts.get('DefaultEndpointsProtocol', 'https')}://{account}.blob."
            + (parts["EndpointSuffix"])
        )
    return None


def _check_endpoint(root: str, endpoint: str | None) -> None:
    """Raise BridgeError for an endpoint without http:// or a host, with which obstore panics."""
    if endpoint is not None and not _ENDPOINT.fullmatch(endpoint):
        raise BridgeError(
            f"{root}: the endpoint {endpoint!r} is not the URL of a server. Set AWS_ENDPOINT_URL, "
            "or endpoint_url of the profile, to a URL such as http://localhost:9000."
        )


def _environment_is_all() -> bool:
    """Whether the environment has S3 credentials and no profile could add to them."""
    config = os.environ.get("AWS_CONFIG_FILE") or os.path.expanduser("~/.aws/config")
    return (
        all(os.environ.get(name) for name in _AWS_KEYS)
        and not any(os.environ.get(name) for name in _AWS_PROFILES)
        and not os.path.exists(config)
    )


def _botocore_options(root: str, profile: str | None, known: bool) -> dict[str, Any]:
    """Options from ``~/.aws`` and the environment; botocore finds the credentials.

    known: credentials are known already, so only region and endpoint are needed.
    """
    try:
        from botocore.exceptions import BotoCoreError
        from botocore.session import Session
    except ImportError:
        raise BridgeError(
            f"{root}: botocore is missing, which reads profiles of AWS. Set AWS_ACCESS_KEY_ID and "
            f"AWS_SECRET_ACCESS_KEY, or install it: {install_command('remote')}"
        ) from None
    try:
        session = Session(profile=profile)
        credentials = session.get_credentials()
        client = session.create_client("s3", region_name=session.get_config_variable("region"))
    except BotoCoreError as error:
        raise BridgeError(
            f"{root} cannot be opened: {error}. Check ~/.aws and AWS_PROFILE."
        ) from None
    region, endpoint = client.meta.region_name, client.meta.endpoint_url
    options: dict[str, Any] = {"region": region} if region and region != "aws-global" else {}
    if endpoint not in ("https://s3.amazonaws.com", f"https://s3.{region}.amazonaws.com"):
        options["endpoint"] = endpoint
    style = (client.meta.config.s3 or {}).get("addressing_style")
    if style:
        options["addressing_style"] = style
    if known:
        return options
    if credentials is None:
        raise Unreachable(
            f"{root} cannot be read or written: no credentials for S3 were found. Set "
            "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )

    def provide() -> dict[str, Any]:
        frozen = credentials.get_frozen_credentials()  # refreshed by botocore when they expire
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(timezone.utc) + timedelta(minutes=_CREDENTIAL_MINUTES),
        }

    return {**options, "credential_provider": provide}


def _region_of(bucket: str) -> str | None:
    """The region of a bucket, which AWS returns without credentials; None without an answer.

    Source: the API's HeadBucket, x-amz-bucket-region.
    """
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    try:
        with urlopen(
            Request(f"https://s3.amazonaws.com/{bucket}", method="HEAD"), timeout=_REGION_SECONDS
        ) as answer:
            headers = answer.headers
    except HTTPError as error:
        headers = error.headers
    except OSError:
        return None
    region: str | None = headers.get("x-amz-bucket-region")
    return region


def _fsspec_settings(
    root: str, protocols: tuple[str, ...], names: Mapping[str, str]
) -> dict[str, Any]:
    """The fsspec settings as obstore options. Raises BridgeError for one without a counterpart."""
    folder = os.environ.get("FSSPEC_CONFIG_DIR") or os.path.expanduser("~/.config/fsspec")
    if not os.path.isdir(folder) and not any(name.startswith("FSSPEC_") for name in os.environ):
        return {}
    try:
        from fsspec import config
    except ImportError:
        return {}
    conf: dict[str, Any] = {}
    config.set_conf_files(folder, conf)
    config.set_conf_env(conf)
    options = {}
    for protocol in protocols:
        for name, value in _flat(conf.get(protocol, {})).items():
            if name in _TUNING:
                continue
            if name not in names:
                raise _no_counterpart(root, name)
            options[names[name]] = value
    return options


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{name}.")
        elif value is not None:
            flat[before + name] = value
    return flat


def _no_counterpart(root: str, name: str) -> BridgeError:
    return BridgeError(
        f"{root}: the setting {name} of fsspec (FSSPEC_… or ~/.config/fsspec) is not supported by "
        "obstore, which reads this store. Remove it, and set the environment variables of the "
        "store's own tools."
    )
