"""Pickles: read right, never run, refused where they are damaged; and written as torch's are."""

import datetime
import io
import pickle
import random
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from attack_pickles import DEEP, HEAVY, MERSENNE, RECORDS, REFUSED, WORK, running
from hypothesis import given, settings
from hypothesis import strategies as st

from neox_bridge.formats.pickle_writer import TensorSlot, dump, numpy_array
from neox_bridge.formats.pickles import (
    Global,
    PickledTensor,
    PickleError,
    Record,
    StorageRef,
    load,
    storage_ref,
)


def read(data: bytes, **callbacks: Any) -> Any:
    return load(io.BytesIO(data), **callbacks)


class Thing:
    """Something that pickles by its class and attributes."""


KEYS = st.one_of(st.integers(), st.text(), st.booleans(), st.tuples(st.integers(), st.text()))
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(min_value=-(1 << 300), max_value=1 << 300),
        st.floats(allow_nan=False),
        st.text(),
        st.binary(),
    ),
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(KEYS, inner),
        st.sets(st.integers()),
        st.dictionaries(KEYS, inner).map(OrderedDict),
    ),
    max_leaves=12,
)


@given(VALUES, st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_reads_what_python_pickled(value: object, protocol: int) -> None:
    assert read(pickle.dumps(value, protocol)) == value


@given(VALUES)
@settings(max_examples=150, deadline=None)
def test_python_reads_what_is_written(value: object) -> None:
    data, _ = dump(value, {})
    assert pickle.loads(data) == value
    assert type(pickle.loads(data)) is type(value)
    assert read(data) == value


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "value",
    [
        frozenset([1, (2, 3)]),
        bytearray(b"ab\xff"),
        {1, "a"},
        defaultdict(list, a=[1]),
        [b"", (), {}, [], "\ud800", 1 << 4000, 2.5, -(1 << 31), 1 << 31, True],
        ["x" * 300, *range(300)] * 2,
        [[k] for k in range(2500)],
    ],
    ids=lambda value: type(value).__name__,
)
def test_reads_every_kind_of_value(value: object, protocol: int) -> None:
    assert read(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(6))
def test_objects_become_records(protocol: int) -> None:
    thing = Thing()
    thing.__dict__["size"] = 3
    record = read(pickle.dumps(thing, protocol))
    assert isinstance(record, Record)
    assert record.state == {"size": 3}
    assert Global(Thing.__module__, "Thing") in (record.factory, *record.args)


@pytest.mark.parametrize("value", [np.float32(2), np.arange(3), Counter("ab"), range(3), 1j, Thing])
def test_unknown_classes_are_inert(value: object) -> None:
    assert isinstance(read(pickle.dumps(value)), Record | Global)


def test_two_pickles_follow_each_other() -> None:
    stream = io.BytesIO(pickle.dumps([1], 2) + pickle.dumps("a", 4) + b"rest")
    assert (load(stream), load(stream), stream.read()) == ([1], "a", b"rest")


def test_shared_values_stay_shared() -> None:
    shared = [1]
    first, second = read(pickle.dumps([shared, shared]))
    assert first is second
    assert first == [1]


# --- attacks --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", running(""))
def test_nothing_runs(name: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    data = running(f"touch {trace}")[name]
    with suppress(Exception), redirect_stdout(io.StringIO()):
        pickle.loads(data)
    assert trace.exists()  # the attack works on Python's own reader
    trace.unlink()
    if name in ("extension", "then damaged", "then cut off"):
        with pytest.raises(PickleError):
            read(data)
    else:
        read(data)  # the calls are written down
    assert not trace.exists()


@pytest.mark.parametrize("name", RECORDS)
def test_calls_are_written_down(name: str) -> None:
    record = read(RECORDS[name])
    assert isinstance(record, Record)
    assert record.factory == Global("os", "system")
    assert record.args == ("exit 3",)
    assert record.new == name.startswith("newobj")


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(PickleError):
        read(REFUSED[name])


@pytest.mark.parametrize("name", DEEP)
def test_depth_is_no_trap(name: str) -> None:
    if name in ("frozensets", "equal sets"):
        with pytest.raises(PickleError, match="tuple that is too large as a key"):
            read(DEEP[name])
        return
    value = read(DEEP[name])
    del value  # freeing it doesn't recurse either


def test_steps_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neox_bridge.formats.pickle_folds.MAX_STEPS", 1000)
    read(pickle.dumps([0] * 400))
    with pytest.raises(PickleError, match="1,000 steps"):
        read(pickle.dumps([0] * 2000))


@pytest.mark.parametrize("make", [lambda i: i * MERSENNE, lambda i: (i,), lambda i: frozenset([i])])
def test_keys_that_may_have_one_hash_cost_more(
    make: Callable[[int], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each may have to be compared with all that are there: a square, which is counted."""
    monkeypatch.setattr("neox_bridge.formats.pickle_folds.MAX_STEPS", 20_000)
    read(pickle.dumps({make(i): None for i in range(9, 300)}))
    read(pickle.dumps({str(i): None for i in range(3000)}))
    for value in ({make(i): None for i in range(9, 2000)}, {make(i) for i in range(9, 2000)}):
        with pytest.raises(PickleError, match="20,000 steps"):
            read(pickle.dumps(value))


class Watched(io.BytesIO):
    """A stream that sees what is asked of it: memory is set aside for that much."""

    most = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.most = max(self.most, size or 0)
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        assert size > 0
        return super().readline(size)


@pytest.mark.parametrize("name", ["100 MB string", "4 GB string", "8 EB bytes", "long line"])
def test_memory_is_bounded(name: str) -> None:
    stream = Watched(REFUSED[name])
    with pytest.raises(PickleError):
        load(stream)
    assert stream.most < 100


def test_strings_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neox_bridge.formats.pickles._MAX_VALUE", 100)
    with pytest.raises(PickleError, match="a string of 200 bytes"):
        read(pickle.dumps("x" * 200))


SAMPLE = pickle.dumps({"a": [1, 2.5, "x", (None, True)], "b": {3}, "c": Thing()}, 4)


def test_every_truncation_is_an_error() -> None:
    for length in range(len(SAMPLE)):
        with pytest.raises(PickleError):
            read(SAMPLE[:length])


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_damage_never_raises_anything_else(data: st.DataObject) -> None:
    raw = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with suppress(PickleError):
        read(bytes(raw), persistent=storage_ref)


# --- tensors --------------------------------------------------------------------------------

SLOTS = {"w": ("float32", (2, 3)), "e": ("float8_e5m2", (4,)), "s": ("bfloat16", ())}


def test_tensor_slots_read_back() -> None:
    tree = {"a": TensorSlot("w"), "b": [TensorSlot("s"), TensorSlot("w")], "c": TensorSlot("e")}
    data, order = dump(tree, SLOTS)
    assert order == ("w", "s", "e")
    value = read(data, persistent=storage_ref)
    weight = PickledTensor(StorageRef("0", "float32", 6), 0, (2, 3), (3, 1), "float32")
    assert value["a"] == weight
    assert value["b"][1] is value["a"]
    assert value["b"][0].shape == ()
    assert value["c"].storage == StorageRef("2", "uint8", 4)
    assert value["c"].dtype == "float8_e5m2"


def test_unknown_slot_and_value() -> None:
    with pytest.raises(ValueError, match="no tensor is called x"):
        dump(TensorSlot("x"), SLOTS)
    with pytest.raises(TypeError, match="object can't be written"):
        dump([object()], {})


def test_views_of_old_files() -> None:
    pid = ("storage", Global("torch", "FloatStorage"), "7", "cpu", 10, ("8", 2, 5))
    assert storage_ref(pid) == StorageRef("7", "float32", 5, 2)


@pytest.mark.parametrize(
    "pid",
    [
        None,
        ("storage",),
        ("storage", "FloatStorage", "0", "cpu", 1),
        ("storage", Global("torch", "FloatStorage"), "0", "cpu", -1),
        ("storage", Global("torch", "FloatStorage"), ["0"], "cpu", 1),
        ("storage", Global("torch", "FloatStorage"), "0", "cpu", 1, ("8", -1, 5)),
    ],
)
def test_other_persistent_ids(pid: object) -> None:
    with pytest.raises(PickleError):
        storage_ref(pid)


@pytest.mark.filterwarnings("error")
def test_numpy_state_loads_in_numpy() -> None:
    words = np.arange(624, dtype="<u4")
    data, _ = dump(("MT19937", numpy_array(words.tobytes(), "<u4", (624,)), 624, 0, 0.0), {})
    state = pickle.loads(data)
    assert state[1].dtype == np.uint32
    assert (state[1] == words).all()
    np.random.RandomState().set_state(state)


def test_numpy_array_of_more_dimensions() -> None:
    array = np.arange(6, dtype="<f8").reshape(2, 3)
    assert (pickle.loads(dump(numpy_array(array.tobytes(), "<f8", (2, 3)), {})[0]) == array).all()


def test_python_state_survives() -> None:
    state = random.Random(5).getstate()
    random.Random().setstate(pickle.loads(dump(state, {})[0]))
    assert read(dump(state, {})[0]) == state


def test_records_are_written_back() -> None:
    original = Thing()
    original.__dict__["size"] = [1, 2]
    copy = pickle.loads(dump(read(pickle.dumps(original, 2)), {})[0])
    assert type(copy) is Thing
    assert copy.__dict__ == {"size": [1, 2]}


class Keyed:
    """Made with keyword arguments: by NEWOBJ_EX from protocol 4 on."""

    def __new__(cls, *, size: int = 0) -> "Keyed":
        made = super().__new__(cls)
        made.size = size
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, int]]:
        return (), {"size": self.size}


def shape_of(value: Any, seen: tuple[int, ...] = ()) -> Any:
    """A value with its records as plain tuples, so that two can be compared."""
    if id(value) in seen:
        return "itself"
    inner = (*seen, id(value))
    if isinstance(value, Record):
        parts = (value.factory, value.args, value.kwargs, value.state, value.items, value.entries)
        return "record", value.new, *(shape_of(part, inner) for part in parts)
    if isinstance(value, dict):
        return [(shape_of(k, inner), shape_of(v, inner)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [shape_of(item, inner) for item in value]
    return value


STRANGE: dict[str, Any] = {
    "attributes": Thing(),
    "keywords": Keyed(size=3),
    "a counter": Counter("abca"),
    "an array": np.arange(6, dtype="<i2").reshape(2, 3),
    "a scalar": np.float32(2.5),
    "a time": datetime.datetime(2024, 5, 6, tzinfo=datetime.timezone.utc),
    "a path": PurePosixPath("a/b"),
    "many kinds": [frozenset([1, "a"]), bytearray(b"\xff"), 1 << 3000, -(1 << 3000), {2.5, "b"}],
    "a queue": deque([1, Thing()], 5),
    "a group": types.SimpleNamespace(a=Thing(), b=[Thing]),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", STRANGE)
def test_unknown_classes_survive_a_rewrite(name: str, protocol: int) -> None:
    record = read(pickle.dumps(STRANGE[name], protocol))
    written, _ = dump(record, {})
    assert shape_of(read(written)) == shape_of(record)
    again = pickle.loads(written)
    assert type(again) is type(STRANGE[name])
    assert pickle.dumps(again, 2) == pickle.dumps(pickle.loads(pickle.dumps(again, 2)), 2)


LAUGHING = [name for name in WORK if name.startswith("laughing")]
LIGHT = [name for name in WORK if name not in (*HEAVY, *LAUGHING)]


@pytest.mark.parametrize("name", [*RECORDS, *running(""), *LIGHT])
def test_hostile_values_survive_a_rewrite(name: str) -> None:
    """The names and arguments of what would have been called are still there, and no others."""
    data = {**running("exit 3"), **RECORDS}.get(name) or WORK[name]()
    try:
        value = read(data)
        written, _ = dump(value, {})
    except PickleError:
        return
    assert shape_of(read(written)) == shape_of(value)


@pytest.mark.parametrize("part", ["os\nsystem\n0cos", "a b", "ü", "", "\n"])
def test_names_are_never_opcodes(part: str) -> None:
    for found in (Global(part, "x"), Global("x", part)):
        assert read(dump([found, found], {})[0]) == [found, found]


WRITTEN = ("a list in itself", "a tuple in itself", "laughing lists")  # by references


@pytest.mark.parametrize("name", [*DEEP, *LAUGHING])
def test_what_cannot_be_written_is_said(name: str) -> None:
    data = DEEP.get(name) or WORK[name]()
    if name in WRITTEN:
        dump(read(data), {})
        return
    with pytest.raises(PickleError, match=r"too deeply|too many parts|tuple that is too large"):
        dump(read(data), {})


def test_a_tuple_that_laughs_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neox_bridge.formats.pickle_writer._MOST", 1000)
    dump([0] * 900, {})
    with pytest.raises(PickleError, match="too many parts"):
        dump(read(WORK["laughing tuples"]()), {})


def test_same_value_same_bytes() -> None:
    """Whether equal strings are one object is up to the interpreter."""
    one, other = "".join(["a", "b"]), "".join(["a", "b"])
    assert one is not other
    shared, apart = ({"s": {3, 1, "x"}, "t": [one, text]} for text in (one, other))
    assert dump(shared, {}) == dump(apart, {})


def test_reading_stops_at_a_key_of_the_outermost_dictionary() -> None:
    """What comes before it is the value, whatever follows; a nested key of that name is none."""
    nested = "".join(("st", "op"))  # another object, so that it is no recalled one
    value = {"first": {nested: 1, "more": [2]}, "stop": {"a": 1}, "last": 3}
    assert load(io.BytesIO(pickle.dumps(value, 0)), until="stop") == value, "item by item"
    for protocol in range(1, 6):
        data = pickle.dumps(value, protocol)
        assert load(io.BytesIO(data), until="stop") == {"first": value["first"]}
        assert load(io.BytesIO(data), until="absent") == value
        assert load(io.BytesIO(data)) == value
        damaged = data[: data.rindex(b"last")] + b"\0" * 8
        assert load(io.BytesIO(damaged), until="stop") == {"first": value["first"]}
        with pytest.raises(PickleError):
            load(io.BytesIO(damaged))
        for other in (["stop", 1], ("stop",), "stop", {"x": "stop"}):
            assert load(io.BytesIO(pickle.dumps(other, protocol)), until="stop") == other
