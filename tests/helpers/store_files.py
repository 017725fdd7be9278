"""Conversions to and from a store, and what the store then holds, read without the package."""

import json
from pathlib import Path
from typing import Any

import fsspec
from s3_server import BUCKET

from neox_bridge.api import open_checkpoint
from neox_bridge.api import plan as make_plan
from neox_bridge.execution.execute import execute
from neox_bridge.execution.result import Result
from neox_bridge.planning.options import Options
from neox_bridge.stores.paths import is_local
from neox_bridge.verification.verify import checker

# embeddings of 9 MB in float32, two parts of an upload, and little else
WIDE = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 18000}


def run(source: object, target: object, overwrite: bool = False, **options: Any) -> Result:
    """As ``convert --crc`` does it, verification included."""
    checkpoint = open_checkpoint(str(source))
    plan = make_plan(checkpoint, Options(**options), str(target))
    check = checker(checkpoint)
    every_crc = is_local(str(target)) or str(target).startswith("file://")
    return execute(plan, str(target), overwrite=overwrite, every_crc=every_crc, check=check)


def s3(path: str) -> str:
    return f"s3://{BUCKET}/{path}"


def contents(url: str) -> dict[str, bytes]:
    """Every object below a URL, read by fsspec alone."""
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {name[len(root) + 1 :]: fs.cat_file(name) for name in fs.find(root)}


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def upload(folder: Path, url: str) -> str:
    fs, root = fsspec.core.url_to_fs(url)
    for name, data in files(folder).items():
        fs.pipe_file(f"{root}/{name}", data)
    return url


def assert_same(store: dict[str, bytes], disk: dict[str, bytes]) -> None:
    """But for the record's hash of the plan, which names the sources, and a yml's own path."""
    told = ("neox_bridge.json", "finetune.yml")
    assert set(store) == set(disk)
    plain = [name for name in disk if not name.endswith(told)]
    assert [name for name in plain if store[name] != disk[name]] == []
    for name in disk:
        if name.endswith("neox_bridge.json"):
            a, b = (json.loads(side[name])["written"] for side in (store, disk))
            a["files"].pop("../finetune.yml", None)
            b["files"].pop("../finetune.yml", None)
            assert a["files"] == b["files"]


def unfinished_uploads() -> list[Any]:
    fs = fsspec.filesystem("s3")
    return list(fs.call_s3("list_multipart_uploads", Bucket=BUCKET).get("Uploads") or ())
