"""The public face: each verb works, is documented, and verifies what it writes."""

import ast
import doctest
import inspect
import json
import shutil
import typing
from dataclasses import FrozenInstanceError, is_dataclass, replace
from pathlib import Path

import jsonschema
import pytest
from commands import run
from common import fixture, make_hf
from schemas import plan_schema
from tiny import write_hf

import neox_bridge
from neox_bridge import Options, Resharding, Unverified
from neox_bridge.cli.spelling import as_options
from neox_bridge.documents import plain_data

ROOT = Path(__file__).parents[1]
VERBS = (
    *("audit", "batch", "convert", "diagnose", "diff", "execute", "open_checkpoint", "plan"),
    *("reshard", "verify"),
)
NEOX = str(fixture("pythia_fp32_pp1_tp2"))
RUN = str(Path(__file__).parent / "data" / "reshard" / "bf16_tp2_dp2")


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_hf(tmp_path_factory.mktemp("api") / "hf"))


def test_convert_verify_and_back(hf: str, tmp_path: Path) -> None:
    result = neox_bridge.convert(hf, str(tmp_path / "neox"), Options(tp=2))
    assert result.files > 0
    assert neox_bridge.verify(hf, str(tmp_path / "neox")).holds
    neox_bridge.convert(str(tmp_path / "neox"), str(tmp_path / "back"))
    differences = neox_bridge.diff(hf, str(tmp_path / "back"))
    assert {difference.kind for difference in differences.tensors} == {"equal"}
    assert differences.equal


def swapped(plan: neox_bridge.Plan) -> neox_bridge.Plan:
    """The plan with the sources of two tensors of one shape exchanged: whole, and wrong."""
    for number, file in enumerate(plan.files):
        for i, first in enumerate(file.tensors):
            for j, second in enumerate(file.tensors[:i]):
                if first.shape == second.shape and first.pieces and second.pieces:
                    tensors = list(file.tensors)
                    tensors[i] = replace(first, pieces=second.pieces)
                    tensors[j] = replace(second, pieces=first.pieces)
                    files = list(plan.files)
                    files[number] = replace(file, tensors=tuple(tensors))
                    return replace(plan, files=tuple(files))
    raise AssertionError("no two tensors of one shape")


def test_execute_verifies_by_default(hf: str, tmp_path: Path) -> None:
    checkpoint = neox_bridge.open_checkpoint(hf)
    wrong = swapped(neox_bridge.plan(checkpoint, Options(), str(tmp_path / "out")))
    with pytest.raises(Unverified, match="does not match"):
        neox_bridge.execute(wrong, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    neox_bridge.execute(wrong, str(tmp_path / "unchecked"), verify=False)
    assert not neox_bridge.verify(hf, str(tmp_path / "unchecked")).holds


def test_a_fresh_optimizer_is_verified_too(hf: str, tmp_path: Path) -> None:
    options = Options(optimizer="fresh")
    checkpoint = neox_bridge.open_checkpoint(hf)
    plan = neox_bridge.plan(checkpoint, options, str(tmp_path / "out"))
    states = [file for file in plan.files if "optim_states" in file.path]
    wrong = [file if file not in states else swapped_moments(file) for file in plan.files]
    with pytest.raises(Unverified):
        neox_bridge.execute(replace(plan, files=tuple(wrong)), str(tmp_path / "out"))
    neox_bridge.execute(plan, str(tmp_path / "out"))


def swapped_moments(file: typing.Any) -> typing.Any:
    """The masters of an optimizer's file written in place of its first moments."""
    masters = next(t for t in file.tensors if any(p.source for p in t.pieces))
    wrong = [
        replace(t, pieces=masters.pieces) if t.shape == masters.shape else t for t in file.tensors
    ]
    return replace(file, tensors=tuple(wrong))


def test_reshard_diagnose_and_audit(tmp_path: Path) -> None:
    result = neox_bridge.reshard(RUN, str(tmp_path / "run"), Resharding(dp=1))
    assert result.files > 0
    findings = neox_bridge.diagnose(str(tmp_path / "run"), "today")
    assert all(finding.severity != "error" for finding in findings.findings)
    assert neox_bridge.audit([str(tmp_path / "run")], optimizer=True).holds


@pytest.fixture(scope="module")
def steps(hf: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run in Hugging Face's form, with two steps."""
    folder = tmp_path_factory.mktemp("steps")
    for number in (0, 1000):
        shutil.copytree(hf, folder / f"step{number}")
    return str(folder)


def test_batch_converts_verifies_and_continues(steps: str, tmp_path: Path) -> None:
    written: list[neox_bridge.Progress] = []
    target = str(tmp_path / "out")
    result = neox_bridge.batch(steps, target, Options(tp=2), progress=written.append, workers=1)
    assert result.holds
    assert [(row.name, row.status, row.verified) for row in result.rows] == [
        ("step0", "done", True),
        ("step1000", "done", True),
    ]
    assert written[-1].done == 2 * sum(row.size for row in result.rows), "written, and read back"
    assert neox_bridge.verify(f"{steps}/step0", f"{target}/step0").holds
    again = neox_bridge.batch([steps], target, Options(tp=2), workers=1)
    assert [row.status for row in again.rows] == ["skipped", "skipped"]


def test_a_row_of_a_batch_tells_its_error(steps: str, tmp_path: Path) -> None:
    result = neox_bridge.batch(
        [steps, str(tmp_path / "gone")], str(tmp_path / "out"), Options(tp=5), steps="0", workers=1
    )
    assert not result.holds
    ((row,), (finding,)) = result.rows, result.findings
    assert (row.status, row.tries) == ("failed", 1)
    assert "5" in row.error
    assert finding.severity == "error"
    assert "gone" in finding.message
    assert json.loads(json.dumps(result.to_json()))["holds"] is False


def test_a_batch_refuses_options_before_it_starts(steps: str, tmp_path: Path) -> None:
    with pytest.raises(neox_bridge.UsageError) as caught:
        neox_bridge.batch(steps, str(tmp_path / "out"), Options(to="neox", shard_size=1000))
    assert caught.value.parameters == ("shard_size",)
    with pytest.raises(neox_bridge.UsageError) as caught:
        neox_bridge.batch(steps, "hf://org/model@branch")
    assert caught.value.parameters == ("target",)
    assert not (tmp_path / "out").exists()


def test_verify_says_what_it_compares_with(tmp_path: Path) -> None:
    masters = neox_bridge.open_checkpoint(RUN, masters=True)
    neox_bridge.convert(masters, str(tmp_path / "hf"))
    result = neox_bridge.verify(RUN, str(tmp_path / "hf"))
    assert result.holds
    assert "masters-compared" in {finding.code for finding in result.findings}


def test_verify_compares_the_optimizer_states_too(hf: str, tmp_path: Path) -> None:
    weights = neox_bridge.verify(RUN, RUN)
    states = neox_bridge.verify(RUN, RUN, optimizer=True)
    assert states.holds
    assert states.tensors > weights.tensors
    with pytest.raises(neox_bridge.UsageError):
        neox_bridge.verify(RUN, hf, optimizer=True)


def test_the_exports_are_the_same_everywhere() -> None:
    tree = ast.parse(inspect.getsource(neox_bridge))
    typed = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        for part in ast.walk(node)
        if isinstance(part, ast.ImportFrom)
        for alias in part.names
    }
    assert typed | {"__version__"} == set(neox_bridge.__all__)
    assert set(neox_bridge._HOMES) == typed
    for name in neox_bridge.__all__:
        assert getattr(neox_bridge, name) is not None, name
    assert set(VERBS) < set(neox_bridge.__all__)


@pytest.mark.parametrize("name", sorted(set(neox_bridge.__all__) - {"__version__"}))
def test_every_export_is_documented(name: str) -> None:
    exported = getattr(neox_bridge, name)
    assert exported.__doc__, name
    assert not exported.__doc__.startswith(f"{name}("), "the docstring that dataclasses make"
    page = (ROOT / "docs" / "how-to" / "python.md").read_text(encoding="utf-8")
    assert f"`{name}`" in page, f"docs/how-to/python.md does not name {name}"
    if inspect.isfunction(exported):
        hints = typing.get_type_hints(exported, vars(neox_bridge) | forward(exported))
        assert "return" in hints, name
        for parameter in inspect.signature(exported).parameters:
            assert f"    {parameter}: " in exported.__doc__, (name, parameter)


def forward(function: typing.Any) -> dict[str, typing.Any]:
    from neox_bridge.layouts.record_file import HashName

    return vars(inspect.getmodule(function)) | {"HashName": HashName}


def test_the_blocks_of_the_page_run(
    hf: str, steps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block of the page, one after the other, in a folder with the models it names."""
    monkeypatch.chdir(tmp_path)
    Path("pythia-410m").symlink_to(hf)
    Path("run").symlink_to(RUN)
    Path("steps").symlink_to(steps)
    page = (ROOT / "docs" / "how-to" / "python.md").read_text(encoding="utf-8")
    blocks = page.split("```python\n")[1:]
    assert len(blocks) >= 4
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        exec(block.partition("```")[0], names)


@pytest.fixture
def folder(hf: str, steps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the models that the examples of docstrings name."""
    monkeypatch.chdir(tmp_path)
    write_hf(Path("pythia-410m"))
    Path("run").symlink_to(RUN)
    Path("steps").symlink_to(steps)
    neox_bridge.convert("pythia-410m", "made", tp=2)
    return tmp_path


@pytest.mark.parametrize("name", [*VERBS, "era_named"])
def test_the_examples_of_docstrings_run(name: str, folder: Path) -> None:
    if name != "convert":
        (folder / "made").rename(folder / "pythia-neox")
    verb = getattr(neox_bridge, name)
    (example,) = doctest.DocTestFinder().find(verb, name, globs={})
    assert example.examples, f"{name} has no example"
    printed: list[str] = []
    failed, _ = doctest.DocTestRunner().run(example, out=printed.append)
    assert not failed, "".join(printed)


def test_options_by_name(folder: Path) -> None:
    named = neox_bridge.convert("pythia-410m", "a", tp=2, dtype="bf16", era="neox@2024-10")
    assert named.plan is not None
    options = Options(tp=2, dtype="bfloat16", era=neox_bridge.era_named("2024-10"))
    neox_bridge.convert("pythia-410m", "b", options)
    assert named.target == "a"
    same = [path.relative_to("a") for path in Path("a").rglob("*.pt")]
    assert same
    for path in same:
        assert Path("a", path).read_bytes() == Path("b", path).read_bytes()
    with pytest.raises(TypeError, match="there is no option 'tpp'"):
        neox_bridge.convert("pythia-410m", "c", tpp=2)
    for choices, words in (
        ({"dtype": "int8"}, "dtype: 'int8' is not one of keep, float32"),
        ({"tp": 0}, "tp: must be 1 or more, not 0"),
        ({"tp": "2"}, "tp: must be a number, not '2'"),
    ):
        with pytest.raises(neox_bridge.UsageError, match=words):
            neox_bridge.convert("pythia-410m", "c", **choices)
    assert not Path("c").exists()


def test_progress_of_every_verb(folder: Path) -> None:
    seen: list[neox_bridge.Progress] = []

    def phases() -> dict[str, tuple[int, int | None]]:
        last = {one.phase: (one.done, one.total) for one in seen}
        seen.clear()
        return last

    result = neox_bridge.convert("pythia-410m", "a", progress=seen.append)
    assert [one.percent for one in seen][:1] + [one.percent for one in seen][-1:] == [0, 100]
    ends = phases()
    assert list(ends) == ["writing", "verifying"]
    assert set(ends.values()) == {(result.size, result.size)}
    neox_bridge.convert("pythia-410m", "b", verify=False, progress=seen.append)
    assert list(phases()) == ["writing"]
    for phase, call in (
        ("verifying", lambda: neox_bridge.verify("pythia-410m", "a", progress=seen.append)),
        ("comparing", lambda: neox_bridge.diff("pythia-410m", "a", progress=seen.append)),
        ("reading", lambda: neox_bridge.audit(["run"], progress=seen.append)),
    ):
        call()
        ((done, total),) = (ends := phases()).values()
        assert list(ends) == [phase]
        assert done == total
    neox_bridge.reshard("run", "c", dp=1, progress=seen.append)
    assert list(phases()) == ["writing", "verifying"]


@pytest.mark.parametrize("path", ["pythia-410m", "made", "run"])
def test_a_checkpoint_and_a_plan_have_the_document_of_the_command(path: str, folder: Path) -> None:
    checkpoint = neox_bridge.open_checkpoint(path)
    inspected = json.loads(run("inspect", path, "--json").stdout)
    document = json.loads(json.dumps(checkpoint.to_json(), allow_nan=False))
    assert set(inspected) - set(document) == {"stored_head", "odd_weights", "quantization"}
    for part in (inspected["neox"], document["neox"]):
        (part or {}).pop("optimizer_states", None)
    assert plain_data(document, as_options) == {key: inspected[key] for key in document}
    conversion = neox_bridge.plan(checkpoint, Options(), "out")
    planned = json.loads(run("convert", path, "out", "--dry-run", "--json").stdout)
    document = json.loads(json.dumps(conversion.to_json(), allow_nan=False))
    jsonschema.validate(document, plan_schema())
    assert planned["summary"].pop("peak_memory") > 0
    assert planned["target"].pop("path") == "out"
    assert plain_data(document, as_options) == planned


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: neox_bridge.convert("pythia-410m", "out", tp=2), "convert pythia-410m out --tp 2"),
        (lambda: neox_bridge.reshard("run", "out", dp=1), "reshard run out --dp 1"),
        (lambda: neox_bridge.verify("pythia-410m", "made"), "verify pythia-410m made"),
        (lambda: neox_bridge.diff("pythia-410m", "made"), "diff pythia-410m made"),
        (lambda: neox_bridge.audit(["run"]), "audit run --cache none"),
        (lambda: neox_bridge.diagnose("made"), "doctor made"),
        (lambda: neox_bridge.diagnose("made", "today"), "doctor made --for today"),
        (lambda: neox_bridge.batch("steps", "out", tp=2, workers=1), "batch steps out --tp 2"),
    ],
)
def test_to_json_is_the_document_of_the_command(call: typing.Any, words: str, folder: Path) -> None:
    result = call()
    assert is_dataclass(result)
    document = result.to_json()
    with pytest.raises(FrozenInstanceError):
        setattr(result, next(iter(result.__dataclass_fields__)), None)
    shutil.rmtree("out", ignore_errors=True)
    printed = json.loads(run(*words.split(), "--json").stdout)
    assert json.loads(json.dumps(document, allow_nan=False)).keys() == printed.keys()
    if words.split()[0] not in ("convert", "reshard", "batch"):  # which tell the seconds
        assert json.loads(json.dumps(plain_data(document, as_options))) == printed
    for key in ("source", "target", "plan", "summary"):
        assert document.get(key) == printed.get(key)
