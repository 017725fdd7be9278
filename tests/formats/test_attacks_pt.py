"""Hostile ``.pt`` files end in one line or an inert value: nothing runs, and little is used.

Every case is made by ``attack_torch`` and ``attack_pickles`` and read in a process of its own that
``attack_run`` watches: no call, import or write that reading doesn't take, at most 256 MB, and an
end long before the 30 s of CPU after which it is killed.
"""

import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_checkpoints import LAYER, ONE_RANK, RANK, TWO_RANKS, checkpoint_with
from attack_pickles import DEEP, HEAVY, RECORDS, REFUSED, WORK, running
from attack_torch import PICKLE, STREAMS, TENSORS, ZIPS, legacy, stored, tensor, zipped
from common import HELPERS, convert, fixture, hf_tensors, step_of

import neox_bridge

pytestmark = pytest.mark.slow

MOST_MEMORY = 256_000_000
CANARY = "canary"
Make = Callable[[], bytes]


def _pickles() -> dict[str, Make]:
    fixed = {**running(f"touch {CANARY}"), **RECORDS, **REFUSED, **DEEP}
    return {**{name: lambda data=data: data for name, data in fixed.items()}, **WORK}  # type: ignore[misc]


def _light(cases: Mapping[str, Make]) -> dict[str, Make]:
    """Those that take little time: each of the others is enough once a reader."""
    heavy = (*HEAVY, "a hundred thousand tensors", "one tensor a million times")
    return {name: make for name, make in cases.items() if name not in heavy}


def _wrapped(
    wrap: Callable[..., bytes], cases: Mapping[str, Make], *more: Any, state: bool = False
) -> dict[str, Make]:
    """The pickles in a torch file. state: each as a tensor of a state dict."""

    def made(make: Make) -> Make:
        before, after = (b"\x80\x02}X\x01\0\0\0a", b"s.") if state else (b"", b"")
        return lambda: wrap(before + make() + after, *more)

    return {name: made(make) for name, make in cases.items()}


FILES: dict[str, dict[str, Make]] = {
    "zip": _wrapped(zipped, _pickles()),
    "legacy": _wrapped(legacy, _light(_pickles()), {}),
    "raw": _pickles(),
    "tensors": _wrapped(zipped, TENSORS, state=True),
    "legacy tensors": _wrapped(legacy, _light(TENSORS), state=True),
    "zips": ZIPS,
    "streams": STREAMS,
}


def run_jobs(jobs: list[dict[str, Any]], tmp_path: Path) -> list[dict[str, Any]]:
    todo, done = tmp_path / "jobs.json", tmp_path / "results.json"
    todo.write_text(json.dumps(jobs))
    source = str(Path(neox_bridge.__file__).parent.parent)
    subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            str(HELPERS / "attack_run.py"),
            todo,
            done,
        ],
        env={**os.environ, "PYTHONPATH": source},
        check=True,
    )
    return list(json.loads(done.read_text()))


def place(tmp_path: Path, name: str) -> Path:
    """A folder for a job, with a module that tells if it was imported."""
    folder = tmp_path / "".join(c if c.isalnum() else "_" for c in name)
    folder.mkdir()
    (folder / "canary_module.py").write_text(f"open({CANARY!r}, 'w').close()\nThing = None\n")
    return folder


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def faults(job: dict[str, Any], result: dict[str, Any], before: set[str]) -> list[str]:
    """What an end of a job has that it must not have."""
    if result["outcome"] in ("killed", "crash"):
        return [str(result)[-300:]]
    folder = Path(job["cwd"])
    found = [f"did {event}" for event in result["events"]]
    if result["rss"] > MOST_MEMORY:
        found.append(f"took {result['rss']:,} bytes")
    new = listing(folder) - before - {"stdout", "stderr"}
    if extra := {path for path in new if path.split("/")[0] != "out"}:
        found.append(f"wrote {extra}")
    if result["outcome"] == "refused" and ("\n" in result["said"] or len(result["said"]) > 2000):
        found.append(f"said {result['said'][:100]}")
    if result["outcome"] == "exit":
        told = (folder / "stderr").read_text()
        shown = told + (folder / "stdout").read_text()
        if "this is a bug" in told or "Traceback" in told or "\x1b" in shown:
            found.append(f"told {told[:300]}")
        if result["code"] and (told.count("\nerror: ") + told.startswith("error: ") != 1):
            found.append(f"code {result['code']} with {told[:300]!r}")
    return found


def check(tmp_path: Path, cases: Mapping[str, tuple[str, list[str], Path]]) -> dict[str, Any]:
    """Run (do, args, folder) by name; fails with every fault of every one. Gives the results."""
    jobs = [{"do": do, "args": args, "cwd": str(cwd)} for do, args, cwd in cases.values()]
    before = [listing(Path(job["cwd"])) for job in jobs]
    results = run_jobs(jobs, tmp_path)
    wrong = {
        name: found
        for name, job, result, there in zip(cases, jobs, results, before, strict=True)
        if (found := faults(job, result, there))
    }
    assert wrong == {}
    return dict(zip(cases, results, strict=True))


def written(tmp_path: Path, cases: Mapping[str, Make]) -> dict[str, Path]:
    """Each case as x.pt in a folder of its own."""
    paths = {}
    for name, make in cases.items():
        paths[name] = place(tmp_path, name) / "x.pt"
        paths[name].write_bytes(make())
    return paths


# What ends in an inert value: calls are written down, and what is no tensor is a record. Everything
# else is refused.
_INERT = {
    *(running("").keys() - {"extension", "then damaged", "then cut off"}),
    *("lists", "tuples", "dicts", "marks", "a list in itself", "a tuple in itself"),
    *("laughing tuples", "laughing lists", "bytes by size", "bytearray by size"),
    *("a list of a range", "frame of 4 EB", "memo of 4 G", "memo by many digits", "an import"),
    *("a module's attributes", "a type rebuilt by a call", "a torch file inside"),
    "the terminal's codes",
}
_INERT_TENSORS = {
    *("a negative offset", "a negative size", "a negative stride", "strides that overlap"),
    *("expanded", "no elements, but large", "65 dimensions", "more sizes than strides"),
    *("sizes that aren't numbers", "a list of sizes", "true as a size", "a tensor in a call"),
    "a tensor as key",
}
INERT: dict[str, set[str]] = {
    "zip": _INERT | {"records", "states", "rebuilt types", "memo everywhere"},
    "legacy": _INERT,  # it is read twice, so that fewer steps are left
    "tensors": _INERT_TENSORS | {"one tensor a million times"},
    "legacy tensors": _INERT_TENSORS,
}


# what is no lie, or becomes an inert record; everything else of a group is refused
VALUES: dict[str, str] = {
    "zips": "",
    "streams": "",
    "tensors": "strides that overlap|expanded|no elements, but large|65 dimensions|"
    "sizes that aren't numbers|a list of sizes|true as a size|one tensor a million times|"
    "a tensor in a call|a tensor as key",
    "zip": "reduce|protocol 0|inst|obj|stack global|nested|an argument|a key|getattr|build|popped|"
    "eval|exec|timeit|profiler|debugger|a pickle in a pickle|a pickle in a pickle, in C|"
    "memo overwritten|memo out of order|newobj_ex|partial|map|newobj|lists|tuples|dicts|records|"
    "states|marks|rebuilt types|a list in itself|a tuple in itself|laughing tuples|laughing lists|"
    "memo everywhere|bytes by size|bytearray by size|a list of a range|frame of 4 EB|memo of 4 G|"
    "memo by many digits|an import|a module's attributes|a type rebuilt by a call|"
    "a torch file inside|the terminal's codes",
}
VALUES |= {"legacy": VALUES["zip"], "legacy tensors": VALUES["tensors"]}
# a stream is read twice, and its steps are those of all its pickles
TWICE = {"legacy": {"records", "states", "rebuilt types"}}


@pytest.mark.parametrize("group", [group for group in FILES if group != "raw"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_read(group: str, tmp_path: Path) -> None:
    """Each is refused by a message that names the file, or is a value that is known to be one."""
    paths = written(tmp_path, FILES[group])
    done = check(tmp_path, {n: ("read", [str(path)], path.parent) for n, path in paths.items()})
    values = {name for name, result in done.items() if result["outcome"] == "value"}
    assert values == (set(VALUES[group].split("|")) - TWICE.get(group, set())) & set(paths)
    for name, result in done.items():
        assert result["outcome"] in ("value", "refused")
        assert name in values or str(paths[name]) in result["said"]


@pytest.mark.parametrize("group", ["zip", "raw", "zips", "streams", "tensors"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_security_itself_is_safe(group: str, tmp_path: Path) -> None:
    cases = FILES[group] if group == "raw" else _light(FILES[group])
    paths = written(tmp_path, cases)
    done = check(
        tmp_path,
        {
            name: ("cli", ["inspect", "--security", "--json", str(path)], path.parent)
            for name, path in paths.items()
        },
    )
    for name in running("") if group in ("zip", "raw") else ():
        assert done[name]["code"] == 1, name


# --- in a checkpoint ------------------------------------------------------------------------

LAUGH: Any = ()
for _ in range(100):
    LAUGH = (LAUGH, LAUGH)


def meta(**changes: Any) -> bytes:
    args = {"num_layers": 2, "hidden_size": 32, "model_parallel_size": 2}
    value = {"module": None, "args": args, "iteration": 2, "ds_version": "0.16", **changes}
    return zipped(pickle.dumps(value, 2))


META: dict[str, dict[str, Any]] = {
    "args that laugh": {"args": LAUGH},
    "an arg that laughs": {"args": {"num_layers": LAUGH}},
    "another arg that laughs": {"args": {"hidden_size": LAUGH}},
    "a rank that laughs": {"args": {"model_parallel_size": LAUGH}},
    "args in a list": {"args": [1, 2]},
    "args by numbers": {"args": {1: 2}},
    "a million million ranks": {"args": {"model_parallel_size": 10**12}},
    "a million million layers": {"args": {"num_layers": 10**12}},
    "a negative number of layers": {"args": {"num_layers": -5}},
    "no number": {"args": {"num_layers": float("nan")}},
    "an infinite number": {"args": {"num_layers": float("inf")}},
    "a number of 5,000 digits": {"args": {"num_layers": 10**5000}},
    "a size of 5,000 digits": {"args": {"hidden_size": 10**5000}},
    "a size of a megabyte": {"args": {"hidden_size": "9" * (1 << 20)}},
    "an iteration that laughs": {"iteration": LAUGH},
    "an iteration of 5,000 digits": {"iteration": 10**5000},
    "a version that laughs": {"ds_version": LAUGH},
    "a module that laughs": {"module": LAUGH},
    "a world that laughs": {"mp_world_size": LAUGH},
    "an optimizer that laughs": {"optimizer": {"a": LAUGH}},
    "the terminal's codes": {"args": {"num_layers": 2, "hidden_size": "\x1b[2J"}},
}


def named(key: bytes, value: bytes = b"") -> Make:
    return lambda: zipped(b"\x80\x02}" + key + (value or tensor()) + b"s.")


NAMES: dict[str, Make] = {
    "a name with the terminal's codes": named(b"X\x05\0\0\0\x1b[2Ja"),
    "a name with line ends": named(b"X\x05\0\0\0a\r\nba"),
    "a name that is a number": named(b"K\x01"),
    "a name that is a tuple": named(b"K\x01K\x02\x86"),
    "a name of a megabyte": named(b"X\0\0\x10\0" + b"k" * (1 << 20)),
    "a name that isn't wording": named(b"X\x03\0\0\0\xed\xb0\x80"),
    "a long name without a tensor": named(b"X\0\0\x10\0" + b"k" * (1 << 20), b"N"),
}


def layer_with(name: str, hostile: bytes, file: str = LAYER) -> bytes:
    """A genuine file of a layer in which one tensor lies."""
    genuine = torch.load(step_of(fixture(ONE_RANK)) / file)
    assert name in genuine
    items, storages = b"", {"0": bytes(16)}
    for index, (key, value) in enumerate(genuine.items(), 1):
        storages[str(index)] = value.numpy().tobytes()
        shape, size = tuple(value.shape), value.numel()
        made = tensor(shape, value.stride(), numel=size, key=str(index))
        items += (
            b"X" + struct.pack("<I", len(key)) + key.encode() + (hostile if key == name else made)
        )
    return zipped(b"\x80\x02}(" + items + b"u.", storages)


NORM, ROWS = "input_layernorm.weight", "mlp.linear1.weight"
LYING: dict[str, Make] = {
    **{
        name: lambda make=make: layer_with(NORM, make())  # type: ignore[misc]
        for name, make in _light(TENSORS).items()
    },
    "a norm of one element": lambda: layer_with(NORM, tensor((32,), (0,), numel=1)),
    "a norm of 2**60 elements": lambda: layer_with(NORM, tensor((1 << 60,), (0,))),
    "rows of one element": lambda: layer_with(ROWS, tensor((128, 32), (0, 0))),
    "2**20 rows of one element": lambda: layer_with(ROWS, tensor((1 << 18, 32), (0, 0))),
    "rows of the last element": lambda: layer_with(ROWS, tensor((128, 32), (0, 0), offset=3)),
    "no rows of many": lambda: layer_with(ROWS, tensor((0, 1 << 62), (1, 1))),
}


EMBEDDED: dict[str, tuple[str, dict[str, Make]]] = {
    "running": (
        LAYER,
        _wrapped(zipped, {n: lambda d=d: d for n, d in running("touch canary").items()}),
    ),  # type: ignore[misc]
    "tensors": (LAYER, _wrapped(zipped, _light(TENSORS), state=True)),
    "lying": (LAYER, LYING),
    "words": (
        "layer_00-model_00-model_states.pt",
        {
            str(rows): lambda rows=rows: layer_with(  # type: ignore[misc]
                "word_embeddings.weight",
                tensor((rows, 32), (0, 0)),
                "layer_00-model_00-model_states.pt",
            )
            for rows in (0, 384, 1 << 18, 1 << 60)
        },
    ),
    "zips": (LAYER, ZIPS),
    "names": (LAYER, NAMES),
    "meta": (RANK, {name: lambda c=c: meta(**c) for name, c in META.items()}),  # type: ignore[misc]
}


# What is sound, however odd: all else is refused.
HARMLESS = {
    "lying": {"a norm of one element", "rows of one element", "rows of the last element"},
    "words": {"384"},
    "meta": {
        *("a version that laughs", "a module that laughs", "a world that laughs"),
        "an optimizer that laughs",
    },
}
# no lies: one value in place of many, which torch writes too; and what no conversion reads
CONVERTED: dict[str, set[str]] = {group: set() for group in EMBEDDED} | {
    "lying": {"a norm of one element", "rows of one element", "rows of the last element"},
    "words": {"384"},
    "meta": {f"{name} that laughs" for name in ("a version", "a module", "a world")}
    | {"an optimizer that laughs"},
}
COMMANDS = [(group, command) for group in EMBEDDED for command in ("inspect", "convert")]


@pytest.mark.parametrize(("group", "command"), [*COMMANDS, ("meta", "doctor"), ("names", "doctor")])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_in_a_checkpoint(group: str, command: str, tmp_path: Path) -> None:
    file, cases = EMBEDDED[group]
    jobs = {}
    for name, make in cases.items():
        folder = place(tmp_path, name)
        source = checkpoint_with(
            folder, file, make(), ONE_RANK if group in ("lying", "words") else TWO_RANKS
        )
        more = {
            "inspect": ["--tensors"],
            "convert": [str(folder / "out")],
            "doctor": ["--for", "neox@today"],
        }
        jobs[name] = ("cli", [command, str(source), *more[command]], folder)
    done = check(tmp_path, jobs)
    for name, result in done.items():
        there = (tmp_path / jobs[name][2] / "out").exists()
        assert there == (command == "convert" and result["code"] == 0), name
        if command == "convert":
            assert (result["code"] == 0) == (name in CONVERTED[group]), name
            told = (jobs[name][2] / "stderr").read_text()
            assert result["code"] == 0 or "run" in told, name
    assert {name for name, result in done.items() if not result["code"]} == HARMLESS.get(
        group, set()
    )


HF_CONFIG = {
    "model_type": "gpt_neox",
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 384,
    "max_position_embeddings": 32,
}


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_in_a_hugging_face_folder(command: str, tmp_path: Path) -> None:
    cases = EMBEDDED["running"][1] | EMBEDDED["lying"][1] | NAMES
    jobs = {}
    for name, make in cases.items():
        folder = place(tmp_path, name)
        (folder / "hf").mkdir()
        (folder / "hf" / "config.json").write_text(json.dumps(HF_CONFIG))
        (folder / "hf" / "pytorch_model.bin").write_bytes(make())
        more = [str(folder / "out")] if command == "convert" else []
        jobs[name] = ("cli", [command, str(folder / "hf"), *more], folder)
    done = check(tmp_path, jobs)
    # inspect shows what is no model of a family as it is stored
    allowed = {0, 1} if command == "inspect" else {1}
    assert {result["code"] for result in done.values()} <= allowed


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    """Opening one would wait for whoever writes into it."""
    folder = place(tmp_path, "pipe")
    source = checkpoint_with(folder, LAYER, b"")
    (step_of(source) / LAYER).unlink()
    os.mkfifo(step_of(source) / LAYER)
    done = check(
        tmp_path,
        {
            "inspect": ("cli", ["inspect", str(source)], folder),
            "security": ("cli", ["inspect", "--security", str(source)], folder),
        },
    )
    assert [result["code"] for result in done.values()] == [1, 1]


def test_expanded_tensors_are_written_out(tmp_path: Path) -> None:
    """A stride of 0 is no attack by itself: torch saves such tensors."""
    folder = place(tmp_path, "x")
    source = checkpoint_with(folder, LAYER, b"")
    genuine = torch.load(step_of(fixture(TWO_RANKS)) / LAYER)
    genuine["input_layernorm.weight"] = torch.tensor([1.5]).expand(32)
    torch.save(genuine, step_of(source) / LAYER)
    convert(source, tmp_path / "hf")
    name = "gpt_neox.layers.0.input_layernorm.weight"
    second = torch.load(step_of(source) / LAYER.replace("model_00", "model_01"))
    want = (torch.full((32,), 1.5) + second["input_layernorm.weight"]) / 2
    assert torch.equal(hf_tensors(tmp_path / "hf")[name], want)


def test_the_watch_sees_what_it_must(tmp_path: Path) -> None:
    """The other tests mean something: an unpickler that runs things is caught."""
    folder = place(tmp_path, "x")
    script = (
        "import sys, pickle, json\n"
        f"sys.path.insert(0, {str(HELPERS)!r})\n"
        "import attack_run\n"
        "attack_run._read = lambda path: {'outcome': str(pickle.load(open(path, 'rb')))}\n"
        f"job = {{'do': 'read', 'args': ['x.pkl'], 'cwd': {str(folder)!r}}}\n"
        "print(json.dumps(attack_run.run(job)))\n"
    )
    for data, event in (
        (running(f"touch {CANARY}")["reduce"], "os.system"),
        (b"\x80\x02ccanary_module\nThing\n.", "import canary_module"),
        (b"\x80\x02cos\nmkdir\nX\x01\0\0\0a\x85R.", "os.mkdir"),
        (b"\x80\x02cbuiltins\nopen\nX\x01\0\0\0bX\x01\0\0\0w\x86R.", "open"),
    ):
        (folder / "x.pkl").write_bytes(data)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
        events = json.loads(done.stdout)["events"]
        assert any(seen.startswith(event) for seen in events), (event, events)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_corpus_is_deterministic() -> None:
    for group, cases in FILES.items():
        for name, make in _light(cases).items():
            assert make() == make(), (group, name)
    assert stored([("x/data.pkl", PICKLE)]).startswith(b"PK\x03\x04")
