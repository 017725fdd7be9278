"""Which of two lists of findings are shown."""

from neox_bridge.findings import Finding, unrepeated


def finding(code: str, **fields: str) -> Finding:
    return Finding(code, "warning", f"{code} is odd", **fields)  # type: ignore[arg-type]


def test_a_subject_is_shown_once_whatever_the_codes_are() -> None:
    reader = [
        finding("rope-spellings-differ", subject="rotary settings"),
        finding("rope-spelling", subject="stored head"),
        finding("rope-spelling"),
    ]
    judge = [finding("rope-spelling", subject="rotary settings"), finding("rope-spelling")]
    assert unrepeated(reader, judge) == reader[1:]
    assert unrepeated(reader, []) == reader
    assert unrepeated(reader, [], ["stored head"]) == [reader[0], reader[2]]
