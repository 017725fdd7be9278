"""The record is edited as JSON: whatever it holds and however it is formatted."""

import json

import pytest

from neox_bridge.layouts.seal import entries, is_whole, sealed, unsealed

RECORDS = {
    "a text last": b'{"a": 1, "written_by": "x"}',
    "an object last": b'{"a": 1, "zz": {"y": {"x": 1}}}',
    "an empty object last": b'{"zz": {}}',
    "a list last": b'{"zz": [{}]}',
    "a text that ends like one": b'{"zz": "}\\n}"}',
    "one line, other order, spaces": b'  {"z" :1,"a":[ 1,2 ]}\n\n',
    "not ASCII": '{"zz": {"näme": "模型 \U0001f600"}}'.encode(),
    "a lone surrogate": b'{"zz": "\\ud800"}',
    "a byte order mark": b'\xef\xbb\xbf{"zz": {"y": 1}}',
    "UTF-16": '{"zz": {"y": 1}}'.encode("utf-16"),
    "sealed already": b'{"seal": "old", "written": {"files": {}}, "zz": {}}',
    "nothing": b"{}",
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("more", [{}, {"sources": []}, {"zz": {"plan": {}}}])
def test_a_sealed_record_is_json_with_all_that_it_held(name: str, more: dict[str, object]) -> None:
    record = RECORDS[name]
    data = sealed(record, "sha256", {"f": [3, "00"]}, **more)
    value = json.loads(data)
    held = json.loads(record)
    assert {key: value[key] for key in value if key not in ("written", "seal")} == {
        key: held[key] for key in held if key not in ("written", "seal")
    }
    assert value["written"] == {"hash": "sha256", "files": {"f": [3, "00"]}, **more}
    assert is_whole(data)
    assert not is_whole(data.replace(b'"00"', b'"01"'))
    assert json.loads(unsealed(data)) == {k: held[k] for k in held if k not in ("written", "seal")}


@pytest.mark.parametrize("record", [b"[]", b"3", b'"x"', b"{", b"", b"null"])
def test_what_is_no_object_is_not_sealed(record: bytes) -> None:
    with pytest.raises(ValueError):
        unsealed(record)


def test_entries_of_no_files() -> None:
    assert entries("", {}) == {}
