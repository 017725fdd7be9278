"""Fingerprints are the same wherever a tensor lies, and another where a bit is."""

import json
import math
import os
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from common import convert, make_hf, step_of
from safetensors.torch import load_file, save_file

from neox_bridge.api import open_checkpoint
from neox_bridge.errors import BridgeError
from neox_bridge.execution.lock import locked
from neox_bridge.verification import hash_cache, hashes
from neox_bridge.verification.hashes import Fingerprint, fingerprints

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("gpt_neox", {}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("llama", {}),
    ("llama", {"num_key_value_heads": 2}),
]


def prints(path: Path, **options: Any) -> dict[str, Fingerprint]:
    return fingerprints(open_checkpoint(str(path)), **options)


def plain(found: dict[str, Fingerprint]) -> dict[str, tuple[Any, ...]]:
    """Everything that no layout may change; the norm's last digit may, with the padding."""
    norm = {n: float(f"{p.norm:.12g}") for n, p in found.items()}
    return {n: (p.hash, p.dtype, p.shape, norm[n], p.bad, p.constant) for n, p in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "config"), FAMILIES)
def test_layouts_agree(
    family: str, config: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    kv = config.get("num_key_value_heads", 4)
    hf = make_hf(tmp_path / "hf", dtype, family=family, **config)
    want = plain(prints(hf))
    several: list[dict[str, Any]] = [
        {"tp": 1},
        {"tp": 2},
        {"tp": min(4, kv)},
        {"tp": 2, "layout": "ranks"},
        {"tp": 2, "pp": 2},
        {"to": "hf", "shard_size": 20_000},
    ]
    if family == "gpt_neox" and not config:
        several.append({"tp": 2, "row_bias": "split"})
    for number, options in enumerate(several):
        convert(hf, tmp_path / str(number), **options)
        assert plain(prints(tmp_path / str(number))) == want, options
    assert len({p[0] for p in want.values()}) == len(want)
    assert {p.dtype for p in prints(hf).values()} == {str(dtype).removeprefix("torch.")}


def test_what_is_hashed(tmp_path: Path) -> None:
    """The definition, once more and simply: elements in order, then dtype and shape."""
    import xxhash

    hf = make_hf(tmp_path / "hf")
    found = prints(hf)
    for name, tensor in load_file(hf / "model.safetensors").items():
        state = xxhash.xxh3_128(tensor.numpy().tobytes())
        state.update(f"float32{list(tensor.shape)}".encode())
        assert found[name].hash == state.hexdigest()
        assert found[name].norm == pytest.approx(float(tensor.double().norm()), rel=1e-12)


def change(path: Path, name: str, edit: Any) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors[name])
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def test_one_bit_is_another_hash(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    before = prints(hf)
    name = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
    change(hf, name, lambda t: t.view(-1).view(torch.uint8)[-1].bitwise_xor_(1))
    after = prints(hf)
    assert [n for n in before if before[n] != after[n]] == [name]


@pytest.mark.parametrize("block", [64, 200, 1 << 20])
def test_zero_rows_within_a_vocabulary_count(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those at the end are padding, wherever blocks end."""
    monkeypatch.setattr(hashes, "BLOCK_BYTES", block)
    hf = make_hf(tmp_path / "hf", hidden_size=24, vocab_size=40)
    name = "gpt_neox.embed_in.weight"
    change(hf, name, lambda t: t[35:].zero_())
    end = prints(hf)[name]
    assert end.shape == (35, 24)
    change(hf, name, lambda t: t[20:30].zero_())
    inside = prints(hf)[name]
    assert (inside.shape, inside.hash != end.hash) == ((35, 24), True)
    change(hf, name, lambda t: t[34, 5:].zero_())
    assert prints(hf)[name].shape == (35, 24)
    change(hf, name, lambda t: t.zero_())
    nothing = prints(hf)[name]
    assert (nothing.shape, nothing.norm, nothing.constant) == ((0, 24), 0.0, True)


def test_blocks_do_not_change_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = make_hf(tmp_path / "hf")
    convert(hf, tmp_path / "neox", tp=4)
    want = {n: p.hash for n, p in prints(hf).items()}
    for block in (256, 1000, 4096):
        monkeypatch.setattr(hashes, "BLOCK_BYTES", block)
        for path in (hf, tmp_path / "neox"):
            assert {n: p.hash for n, p in prints(path).items()} == want


def test_shards(tmp_path: Path) -> None:
    """A rank's shard has a hash of its own; of whole row biases only one rank's isn't -0.0."""
    hf = make_hf(tmp_path / "hf")
    convert(hf, tmp_path / "neox", tp=2)
    before = prints(tmp_path / "neox")
    assert {len(p.shards) for p in before.values()} == {2}
    bias = before["gpt_neox.layers.0.attention.dense.bias"]
    assert [shard.constant for shard in bias.shards] == [False, True]
    file = step_of(tmp_path / "neox") / "layer_03-model_01-model_states.pt"
    tensors = torch.load(file, weights_only=False)
    tensors["mlp.linear2.weight"][3, 7] += 1
    torch.save(tensors, file)
    after = prints(tmp_path / "neox")
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
    assert [n for n in before if before[n] != after[n]] == [name]
    same = [a == b for a, b in zip(before[name].shards, after[name].shards, strict=True)]
    assert same == [True, False]


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    name = "embed_out.weight"
    change(hf, name, lambda t: t[0, :3].copy_(torch.tensor([math.inf, -math.inf, math.nan])))
    found = prints(hf)[name]
    rest = load_file(hf / "model.safetensors")[name].double().nan_to_num(0, 0, 0)
    assert found.bad == 3
    assert found.norm == pytest.approx(float(rest.norm()), rel=1e-12)


def test_a_signaling_nan_is_counted_without_a_warning(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    name = "embed_out.weight"
    change(hf, name, lambda t: t.view(torch.int32)[0, 0].fill_(0x7F80_0001))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prints(hf)[name].bad == 1


def older(root: Path) -> None:
    """All files as if they had been written a minute ago."""
    for path in root.rglob("*"):
        os.utime(path, (time.time() - 60, time.time() - 60))


def audited(path: Path, cache: Path) -> tuple[int, dict[str, Fingerprint]]:
    """How many tensors were read, and all fingerprints."""
    checkpoint = open_checkpoint(str(path))
    files = hash_cache.identify(checkpoint)
    known = hash_cache.look_up(str(cache), checkpoint, files)
    found = fingerprints(checkpoint, known=known)
    hash_cache.remember(str(cache), checkpoint, files, found)
    return len(found) - len(known), found


@pytest.mark.parametrize("options", [{"tp": 2}, {"to": "hf", "shard_size": 20_000}])
def test_what_has_not_changed_is_not_read(options: dict[str, Any], tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    convert(hf, tmp_path / "one", **options)
    older(tmp_path / "one")
    count, found = audited(tmp_path / "one", tmp_path / "cache")
    assert count == len(found) == 28
    assert audited(tmp_path / "one", tmp_path / "cache") == (0, found)
    (tmp_path / "one").rename(tmp_path / "two")
    (stored,) = (tmp_path / "cache").iterdir()
    assert audited(tmp_path / "two", tmp_path / "cache")[0] == 28
    for spoiled in (
        "",
        "{",
        "[]",
        '{"version": 1}',
        '{"version": 1, "tensors": {"a": 3}}',
        "[" * 9999,
    ):
        (tmp_path / "cache" / stored.name).write_text(spoiled)
        (tmp_path / "two").rename(tmp_path / "one")
        assert audited(tmp_path / "one", tmp_path / "cache") == (28, found)
        (tmp_path / "one").rename(tmp_path / "two")


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """Only its tensors, and whether its size, its time or its inode is another."""
    convert(make_hf(tmp_path / "hf"), tmp_path / "neox", tp=2)
    older(tmp_path)
    _, found = audited(tmp_path / "neox", tmp_path / "cache")
    file = step_of(tmp_path / "neox") / "layer_03-model_01-model_states.pt"
    data = bytearray(file.read_bytes())
    os.utime(file, (1, 1))
    assert audited(tmp_path / "neox", tmp_path / "cache") == (12, found)
    inode = file.stat().st_ino
    copy = file.with_name("copy")
    copy.write_bytes(data)
    copy.rename(file)
    os.utime(file, (1, 1))
    assert file.stat().st_ino != inode
    assert audited(tmp_path / "neox", tmp_path / "cache") == (12, found)
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, (2, 2))
    count, after = audited(tmp_path / "neox", tmp_path / "cache")
    assert count == 12
    assert [n for n in found if found[n] != after[n]] != []


def test_a_file_just_written_is_not_remembered(tmp_path: Path) -> None:
    """It could change again without another time of change."""
    hf = make_hf(tmp_path / "hf")
    assert audited(hf, tmp_path / "cache")[0] == 28
    assert audited(hf, tmp_path / "cache")[0] == 28


def test_another_version_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = make_hf(tmp_path / "hf")
    older(hf)
    audited(hf, tmp_path / "cache")
    monkeypatch.setattr(hash_cache, "VERSION", hash_cache.VERSION + 1)
    assert audited(hf, tmp_path / "cache")[0] == 28


def test_audits_at_once(tmp_path: Path) -> None:
    """Writers and readers of the same entry: always one whole document."""
    hf = make_hf(tmp_path / "hf")
    older(hf)
    cache = tmp_path / "cache"
    _, found = audited(hf, cache)

    def again(_: int) -> bool:
        count, got = audited(hf, cache)
        (stored,) = cache.glob("*.json")
        return count == 0 and got == found and bool(json.loads(stored.read_text())["tensors"])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(again, range(80)))
    assert [path.suffix for path in cache.iterdir()] == [".json"]


def test_what_a_killed_audit_leaves_is_removed(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    older(hf)
    cache = tmp_path / "cache"
    checkpoint = open_checkpoint(str(hf))
    files, found = hash_cache.identify(checkpoint), fingerprints(checkpoint)
    child = os.fork()
    if child == 0:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        hash_cache.remember(str(cache), checkpoint, files, found)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [path.suffix for path in cache.iterdir()] == [".tmp"]
    (cache / "audit-of-mine.txt").touch()
    audited(hf, cache)
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".txt"]


def test_what_another_audit_is_writing_stays(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    older(hf)
    cache = tmp_path / "cache"
    cache.mkdir()
    with locked(str(cache / "audit-0.tmp"), "x"):
        audited(hf, cache)
        assert (cache / "audit-0.tmp").exists()
    audited(hf, cache)
    assert [path.suffix for path in cache.iterdir()] == [".json"]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    older(hf)
    (tmp_path / "cache").write_text("a file")
    assert audited(hf, tmp_path / "cache")[0] == 28


def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf")
    checkpoint = open_checkpoint(str(hf))
    files = hash_cache.identify(checkpoint)
    hash_cache.check_same(files, checkpoint)
    os.utime(hf / "model.safetensors", (1, 1))
    with pytest.raises(BridgeError, match="changed while"):
        hash_cache.check_same(files, checkpoint)
