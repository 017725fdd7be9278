"""The record of what was written: its seal, its files, and what a batch makes of it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import xxhash
from tiny import Inline

from neox_bridge.batches import run as batch_run
from neox_bridge.batches.target_state import decision, is_of, state_of
from neox_bridge.errors import BridgeError, Unverified
from neox_bridge.layouts.record_file import written_files
from neox_bridge.layouts.seal import is_whole, sealed, unsealed
from neox_bridge.verification.sealed import check_seal, find_record

OPTIONS = {"tp": 2, "dtype": "keep"}
SOURCES = {"/somewhere/model.safetensors": (100, 123456789)}
TOLD = [["model.safetensors", 100, 123456789]]


def folder_of(home: Path, files: dict[str, bytes], hash_name: str = "xxh3_128") -> Path:
    """A folder as a conversion writes it: these files, then the record that names them."""
    entries = {}
    for name, data in files.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        digest = xxhash.xxh3_128(data).hexdigest() if hash_name == "xxh3_128" else None
        entries[name] = [len(data), digest]
    data = sealed(b'{"format": 1}\n', hash_name, entries, options=OPTIONS, sources=TOLD, plan="x")
    home.mkdir(exist_ok=True)
    (home / "neox_bridge.json").write_bytes(data)
    return home


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "out", {"config.json": b"{}", "model.safetensors": b"weights"})


def state(folder: Path, **options: Any) -> str:
    return state_of(str(folder), OPTIONS, SOURCES, **options)[0]


# --- the seal


def test_every_byte_of_a_sealed_record_counts(written: Path) -> None:
    record = (written / "neox_bridge.json").read_bytes()
    assert is_whole(record)
    for at in range(len(record)):
        assert not is_whole(record[:at] + bytes([record[at] ^ 1]) + record[at + 1 :]), at
    assert not is_whole(record[:-1])
    assert not is_whole(record + b"\n")
    assert not is_whole(b"")


def test_a_seal_can_be_taken_off_and_put_on_again(written: Path) -> None:
    record = (written / "neox_bridge.json").read_bytes()
    plain = json.loads(unsealed(record))
    assert plain == {"format": 1}
    again = sealed(record, "sha256", {"a": [1, None]})
    assert is_whole(again)
    assert json.loads(again)["written"] == {"hash": "sha256", "files": {"a": [1, None]}}


@pytest.mark.parametrize("text", ["[]", "1", '"text"', "{", ""])
def test_what_is_no_object_cannot_be_sealed(text: str) -> None:
    with pytest.raises(ValueError):
        sealed(text.encode(), "none", {})


# --- the files that it names


def record(files: Any, hash_name: Any = "xxh3_128") -> dict[str, Any]:
    return {"written": {"hash": hash_name, "files": files}}


@pytest.mark.parametrize(
    "path", ["../../x", "a/../x", "..", "../..", "/etc/passwd", "a//b", "", "../", "a/", "a/.."]
)
def test_a_record_cannot_name_files_elsewhere(path: str) -> None:
    with pytest.raises(ValueError):
        written_files(record({path: [1, None]}))


def test_a_record_may_name_files_below_it_and_right_above(tmp_path: Path) -> None:
    files = {"a": [1, None], "b/c..d": [2, "00"], "../finetune.yml": [3, None]}
    name, entries = written_files(record(files))
    assert name == "xxh3_128"
    assert entries == [("a", 1, None), ("b/c..d", 2, "00"), ("../finetune.yml", 3, None)]
    assert written_files(record({}, "none")) == (None, [])
    assert written_files(record({}, "sha256"))[0] == "sha256"


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        record({"a": 1}),
        record({"a": [1]}),
        record({"a": ["1", None]}),
        record({"a": [1, 2]}),
        record({"a": [1, None]}, "md5"),
        record({"a": [1, None]}, None),
        record([]),
    ],
)
def test_a_record_of_another_form_is_none(value: Any) -> None:
    with pytest.raises(ValueError):
        written_files(value)


# --- verify DST


def changes(folder: Path) -> list[tuple[str, str]]:
    seal = check_seal(find_record(str(folder)))
    assert seal.holds == all(kind in ("edited", "extra") for _, kind in _pairs(seal))
    return _pairs(seal)


def _pairs(seal: Any) -> list[tuple[str, str]]:
    return sorted((change.path, change.kind) for change in seal.changes)


def test_what_was_written_is_still_there(written: Path) -> None:
    seal = check_seal(find_record(str(written)))
    assert (seal.holds, seal.changes, seal.unhashed) == (True, (), 0)
    assert seal.files == 3
    assert seal.size == sum(path.stat().st_size for path in written.iterdir())


def test_a_changed_byte_a_missing_file_and_another_size_are_found(written: Path) -> None:
    (written / "model.safetensors").write_bytes(b"weighty")
    assert changes(written) == [("model.safetensors", "changed")]
    (written / "model.safetensors").write_bytes(b"weights and more")
    assert changes(written) == [("model.safetensors", "changed")]
    (written / "model.safetensors").unlink()
    assert changes(written) == [("model.safetensors", "missing")]
    (written / "model.safetensors").mkdir()
    assert ("model.safetensors", "missing") in changes(written)


def test_a_record_that_was_changed_after_sealing_is_found(written: Path) -> None:
    path = written / "neox_bridge.json"
    (written / "config.json").write_bytes(b"[]")
    honest = xxhash.xxh3_128(b"{}").hexdigest()
    forged = path.read_text().replace(honest, xxhash.xxh3_128(b"[]").hexdigest())
    assert forged != path.read_text()
    path.write_text(forged)
    assert changes(written) == [("neox_bridge.json", "changed")]
    assert not check_seal(str(path)).holds


def test_sizes_alone_are_known_without_hashes(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "out", {"config.json": b"{}"}, hash_name="none")
    seal = check_seal(find_record(str(folder)))
    assert (seal.holds, seal.unhashed) == (True, 1)
    (folder / "config.json").write_bytes(b"[]")
    assert changes(folder) == []
    (folder / "config.json").write_bytes(b"[ ]")
    assert changes(folder) == [("config.json", "changed")]


def test_a_file_above_a_step_is_the_users_to_edit(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    (root / "finetune.yml").write_bytes(b"a: 1\n")
    entries = {"../finetune.yml": [5, xxhash.xxh3_128(b"a: 1\n").hexdigest()]}
    step = root / "global_step4"
    step.mkdir()
    (step / "neox_bridge.json").write_bytes(sealed(b"{}", "xxh3_128", entries))
    (root / "latest").write_text("global_step4")
    assert find_record(str(root)) == str(step / "neox_bridge.json")
    assert changes(root) == []
    (root / "finetune.yml").write_bytes(b"a: 2\n")
    assert changes(root) == [("../finetune.yml", "edited")]
    assert check_seal(find_record(str(root))).holds


def test_a_shorter_file_is_changed_though_nobody_hashed_it(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "out", {"config.json": b"{}"}, hash_name="none")
    (folder / "config.json").write_bytes(b"1")
    assert changes(folder) == [("config.json", "changed")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adapter_config.json", "added"),
        ("pytorch_model.bin", "added"),
        ("model-00002-of-00002.safetensors", "added"),
        ("notes.md", "extra"),
        ("zz.txt", "extra"),
    ],
)
def test_a_file_that_the_record_does_not_name_is_found(name: str, kind: str, written: Path) -> None:
    """Names before and after that of the record."""
    (written / name).write_bytes(b"{}")
    assert changes(written) == [(name, kind)]


def test_a_record_that_is_no_record_is_named_with_what_is_wrong(written: Path) -> None:
    path = written / "neox_bridge.json"
    path.write_text("{")
    with pytest.raises(BridgeError, match="JSON"):
        check_seal(str(path))
    path.write_text("{}")
    with pytest.raises(BridgeError, match=r"contains no hashes\. Compare with the source"):
        check_seal(str(path))
    path.write_text('{"seal": 1')
    seal = check_seal(str(path))
    assert (seal.files, seal.size, seal.unhashed, seal.holds) == (0, 10, 0, False)
    assert [(change.path, change.kind) for change in seal.changes] == [
        ("neox_bridge.json", "changed")
    ]


def test_bytes_that_are_read_are_told(written: Path) -> None:
    told: list[int] = []
    check_seal(find_record(str(written)), told.append)
    assert sorted(told) == [len(b"{}"), len(b"weights")]


def test_the_record_of_a_step(tmp_path: Path) -> None:
    root = tmp_path / "run"
    for number in (4, 5):
        step = root / f"global_step{number}"
        step.mkdir(parents=True)
        (step / "neox_bridge.json").write_bytes(sealed(b"{}", "none", {}))
    record = str(root / "global_step4/neox_bridge.json")
    assert find_record(str(root)) == record, "the first without a latest"
    (root / "latest").write_text("global_step5\n")
    assert find_record(str(root)) == str(root / "global_step5/neox_bridge.json")
    (root / "neox_bridge.json").write_text("{}")
    assert find_record(str(root)) == str(root / "neox_bridge.json")


# --- batch: whether it is done


def test_what_is_whole_is_skipped_and_what_changed_is_not(written: Path) -> None:
    assert state(written) == "whole"
    path = written / "model.safetensors"
    path.write_bytes(b"weights and more")
    assert state(written) == "changed"
    path.unlink()
    assert state(written) == "changed"
    assert state(written.parent / "nothing") == "absent"


def test_another_size_is_found_though_the_time_is_the_old_one(written: Path) -> None:
    path = written / "model.safetensors"
    before = path.stat()
    path.write_bytes(b"weights!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert state(written) == "changed"


def test_the_same_size_is_hashed_where_the_time_is_later_or_all_are(written: Path) -> None:
    path, made = written / "model.safetensors", (written / "neox_bridge.json").stat().st_mtime_ns
    path.write_bytes(b"WEIGHTS")
    os.utime(path, ns=(made, made))
    assert state(written) == "whole", "as old as the record: not hashed"
    assert state(written, every_hash=True) == "changed"
    os.utime(path, ns=(made + 1, made + 1))
    assert state(written) == "changed"
    path.write_bytes(b"weights")
    os.utime(path, ns=(made + 1, made + 1))
    assert state(written) == "whole", "touched, and the same"


def test_a_record_changed_after_sealing_is_no_whole_conversion(written: Path) -> None:
    path = written / "neox_bridge.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    assert state(written) == "changed"


@pytest.mark.parametrize(
    ("options", "sources"),
    [
        ({**OPTIONS, "tp": 1}, SOURCES),
        ({"tp": 2}, SOURCES),
        (OPTIONS, {"/somewhere/model.safetensors": (101, 123456789)}),
        (OPTIONS, {"/somewhere/model.safetensors": (100, 123456788)}),
        (OPTIONS, {"/somewhere/other.safetensors": (100, 123456789)}),
        (OPTIONS, {}),
    ],
)
def test_other_options_or_sources_are_another_conversion(
    options: Any, sources: Any, written: Path
) -> None:
    assert state_of(str(written), options, sources)[0] == "other"
    assert not is_of((written / "neox_bridge.json").read_bytes(), options, sources)


def test_the_sources_may_lie_elsewhere(written: Path) -> None:
    moved = {"/elsewhere/model.safetensors": (100, 123456789)}
    assert state_of(str(written), OPTIONS, moved)[0] == "whole"


@pytest.mark.parametrize("text", ["", "{}", "[", '{"written": {}}'])
def test_a_folder_without_a_record_of_ours_is_somebody_elses(text: str, tmp_path: Path) -> None:
    (tmp_path / "neox_bridge.json").write_text(text)
    assert state(tmp_path) == "other"


def test_what_a_batch_does_with_each() -> None:
    states: list[Any] = ["absent", "whole", "changed", "other"]
    assert [decision(one, False) for one in states] == ["write", "skip", "write", "refuse"]
    assert [decision(one, True) for one in states] == ["write"] * 4


# --- batch: every part is verified


@pytest.mark.parametrize("wrong", [0, 1, 2, 3])
def test_a_fault_in_any_part_is_raised(wrong: int) -> None:
    def part(number: int) -> int:
        if number == wrong:
            raise Unverified(f"part {number}")
        return number

    with pytest.raises(Unverified, match=f"part {wrong}"):
        batch_run._share(Inline(4), [(part, number) for number in range(4)])


def test_all_parts_are_called_and_answer_in_order() -> None:
    assert batch_run._share(Inline(2), [(abs, -n) for n in range(5)]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("size", "slots", "parts"),
    [
        (0, 8, 1),
        (1, 8, 1),
        (batch_run._PART_BYTES, 8, 1),
        (batch_run._PART_BYTES + 1, 8, 2),
        (100 * batch_run._PART_BYTES, 8, 8),
    ],
)
def test_parts_cover_a_checkpoint(size: int, slots: int, parts: int) -> None:
    assert batch_run._parts(size, Inline(slots)) == [(n, parts) for n in range(parts)]
