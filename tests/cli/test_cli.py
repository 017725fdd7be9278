"""The command line: what goes where, exit codes, and how it ends when something happens."""

import ast
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import torch
from commands import run
from common import make_hf
from jsonschema import Draft202012Validator
from schemas import plan_schema

import neox_bridge
from neox_bridge import BridgeError, Finding, Refused
from neox_bridge.architectures import shapes
from neox_bridge.cli.values import parse_size
from neox_bridge.execution.result import Result
from neox_bridge.wording import human

TINY = shapes.ModelSize(2, 32, 4, 128)


def spawn(*args: object, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "neox_bridge", *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=120,
    )


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face folder of a few kilobytes."""
    monkeypatch.setitem(shapes.PYTHIA, "pythia-70m", TINY)
    monkeypatch.setattr("neox_bridge.toy.TOKENIZER_SIZE", 120)
    done = run("toy", "pythia-70m", tmp_path / "source", "--as", "hf")
    assert done.exit_code == 0, done.output
    return tmp_path / "source"


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise error

    monkeypatch.setattr("neox_bridge.layouts.open.open_checkpoint", fail)


def contradict(source: Path) -> None:
    """Make converting warn."""
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 7}))


# start-up


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['neox-bridge', 'convert', '--help']\n"
        "from neox_bridge.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = 'numpy ml_dtypes torch yaml rich transformers huggingface_hub'.split()\n"
        "print([m for m in heavy if m in sys.modules], file=sys.stderr)\n"
        "light = 'neox_bridge.planning', 'neox_bridge.planning.options'\n"
        "rooms = 'cli documents errors findings option progress wording'.split()\n"
        "print([m for m in sys.modules if m.startswith('neox_bridge.') and m not in light"
        " and m.split('.')[1] not in rooms], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines() == ["[]", "[]"]
    assert "Examples:" in done.stdout


def test_what_only_moves_bytes_needs_no_numpy(tmp_path: Path) -> None:
    """Neither to write nor to read back: its import takes as long as all others together."""
    make_hf(tmp_path / "hf", torch.float16, vocab_size=256)  # no rows are added
    code = (
        "import sys; sys.argv[1:] = ['convert', 'hf', 'out', *sys.argv[1:]]\n"
        "from neox_bridge.__main__ import main\n"
        "try: main()\n"
        "finally: print('numpy' in sys.modules, file=sys.stderr)\n"
    )
    for options, imported in (([], "False"), (["--overwrite", "--dtype", "bfloat16"], "True")):
        command = [sys.executable, "-c", code, "--quiet", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (0, imported)


def test_importing_the_package_imports_nothing_else() -> None:
    code = (
        "import sys, neox_bridge; print([m for m in sys.modules if m.startswith('neox_bridge.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    for name in set(neox_bridge.__all__) - {"__version__"}:
        assert getattr(neox_bridge, name).__name__ == name
    assert re.fullmatch(r"\d+\.\d+\.\d+", neox_bridge.__version__)
    assert set(neox_bridge.__all__) <= set(dir(neox_bridge))
    assert not hasattr(neox_bridge, "something_else")


# raised between modules alone: the readers of files catch them and name the file
INTERNAL_ERRORS = {"PickleError"}


def test_every_error_is_public_and_says_what_it_means() -> None:
    """Callers must be able to tell errors apart without importing private modules."""
    bases: dict[str, list[str]] = {}
    for path in Path(neox_bridge.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(base) for base in node.bases]
    errors = {"BridgeError"}
    while more := {name for name, of in bases.items() if errors & set(of)} - errors:
        errors |= more
    public = {name for name in errors if not name.startswith("_")} - INTERNAL_ERRORS
    assert len(public) > 8
    assert public <= set(neox_bridge.__all__)
    for name in public:
        error = getattr(neox_bridge, name)
        assert issubclass(error, neox_bridge.BridgeError)
        assert error.__doc__ != neox_bridge.BridgeError.__doc__ or name == "BridgeError"
        assert error.__doc__


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("ForeignFolder", {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}),
        ("BridgeError", {}),
    ],
)
def test_a_verb_raises_the_error_of_its_kind(
    name: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(neox_bridge.BridgeError) as caught:
        neox_bridge.open_checkpoint(str(tmp_path))
    assert type(caught.value).__name__ == name


def test_a_checkpoint_without_its_yml_has_its_own_error(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "data" / "published" / "v1_dp2" / "flat"
    folder = shutil.copytree(source, tmp_path / "step3", ignore=shutil.ignore_patterns("*.yml"))
    with pytest.raises(neox_bridge.SettingsMissing) as caught:
        neox_bridge.open_checkpoint(str(folder))
    assert caught.value.folder == str(folder)


def test_version_and_module() -> None:
    assert run("--version").stdout == f"neox-bridge {neox_bridge.__version__}\n"
    assert spawn("--version").stdout == f"neox-bridge {neox_bridge.__version__}\n"


def test_help_groups_the_options() -> None:
    text = run("convert", "--help").stdout
    groups = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert groups[:4] == [
        "Arguments",
        "What is written",
        "Hugging Face targets",
        "GPT-NeoX targets",
    ]


# usage


@pytest.mark.parametrize(
    "args",
    [
        ["convert", "a"],
        ["convert", "a", "b", "--to", "torch"],
        ["convert", "a", "b", "--dtype", "int8"],
        ["convert", "a", "b", "--tp", "0"],
        ["convert", "a", "b", "--for", "neox@1999"],
        ["convert", "a", "b", "--shard-size", "5Q"],
        ["convert", "a", "b", "--shard-size", "0"],
        ["convert", "a", "b", "--max-workers", "0"],
        ["convert", "a", "b", "--nonsense"],
        ["toy", "pythia-3b", "b", "--as", "hf"],
        ["toy", "pythia-70m", "b"],
        ["konvert"],
    ],
)
def test_usage_errors(args: list[str]) -> None:
    done = run(*args)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")


def test_an_unknown_era_names_the_known_ones() -> None:
    error = run("convert", "a", "b", "--for", "neox@1999").stderr
    assert all(name in error for name in ("2024-03", "2024-09", "2024-10", "today"))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("1.5 gb", 1_500_000_000),
        ("2GiB", 2 << 30),
        ("10KB", 10_000),
        ("10kib", 10_240),
        ("1TB", 10**12),
        ("123456", 123456),
        ("9007199254740993B", 9007199254740993),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 GB more", "-1GB", "5XB", "0.1", "1e9", "5G"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(click.BadParameter):
        parse_size(text)


def test_bytes_for_people() -> None:
    assert [human(n) for n in (0, 999, 1000, 999_499, 999_500, 810_702_336)] == [
        "0 B",
        "999 B",
        "1 kB",
        "999 kB",
        "1 MB",
        "811 MB",
    ]


# how it ends


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (BridgeError("it is\nbroken."), 1, "error: it is broken.\n"),
        (Refused("no such thing there."), 4, "error: no such thing there.\n"),
        (KeyboardInterrupt(), 130, "interrupted: nothing was written to out\n"),
        (
            PermissionError(13, "Permission denied", "a/file"),
            1,
            "error: a/file: Permission denied. Check the permissions of the file and its folder.\n",
        ),
        (
            OSError(28, "No space left on device"),
            1,
            "error: No space left on device. Free some space, or choose a target on another file "
            "system.\n",
        ),
        (
            MemoryError(),
            1,
            "error: out of memory. Use --max-workers 1, which needs the least memory.\n",
        ),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
    ],
)
@pytest.mark.parametrize("more", [[], ["--json"], ["-q"]])
def test_errors_are_one_line_on_stderr(
    error: BaseException,
    code: int,
    text: str,
    more: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_with(monkeypatch, error)
    done = run("convert", "in", "out", *more)
    assert (done.exit_code, done.stdout, done.stderr) == (code, "", text)


def test_a_bug_asks_for_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEOX_BRIDGE_DEBUG", raising=False)
    fail_with(monkeypatch, KeyError("x"))
    done = run("convert", "in", "out")
    assert done.exit_code == 1
    assert re.fullmatch(
        r"error: this is a bug .* KeyError: 'x' \(test_cli.py:\d+\).*\n", done.stderr
    )
    monkeypatch.setenv("NEOX_BRIDGE_DEBUG", "1")
    assert isinstance(run("convert", "in", "out").exception, KeyError)


def test_interrupted_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    def execute(_plan: object, target: str, **_kwargs: object) -> None:
        os.mkdir(target)
        raise KeyboardInterrupt

    monkeypatch.setattr("neox_bridge.execution.execute.execute", execute)
    done = run("convert", source, tmp_path / "out")
    assert done.exit_code == 130
    assert "was completely written" in done.stderr


def test_a_closed_pipe_is_quiet(source: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m neox_bridge inspect {source} --tensors --json | true"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, number: int) -> None:
    args = [sys.executable, "-m", "neox_bridge", "toy", "pythia-12b", "out", "--as", "neox"]
    process = subprocess.Popen(
        args,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background of a script would hand down an ignored SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        end = time.monotonic() + 60
        while not _some_bytes(tmp_path) and time.monotonic() < end:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted: nothing was written to out"
    assert list(tmp_path.iterdir()) == []


def _some_bytes(folder: Path) -> bool:
    """Whether a file is being written, under whatever temporary name."""
    try:
        return any(file.is_file() and file.stat().st_size for file in folder.rglob("*"))
    except FileNotFoundError:
        return False


# what it says


def test_convert_there_and_back(source: Path, tmp_path: Path) -> None:
    there = run("convert", source, tmp_path / "neox", "--tp", 2)
    assert there.exit_code == 0, there.output
    first, blank = there.stdout.splitlines()
    assert first.startswith(
        f"wrote {tmp_path}/neox: GPT-NeoX gpt_neox, layers, TP 2, PP 1, float16"
    )
    assert first.endswith("; nothing dropped; verified bit by bit")
    assert blank.startswith("fill in: data_path")
    assert blank.endswith(f" in {tmp_path}/neox/finetune.yml")
    back = run("convert", tmp_path / "neox", tmp_path / "back")
    assert back.exit_code == 0, back.output
    assert re.match(r"wrote .*/back: Hugging Face gpt_neox, 1 safetensors file, ", back.stdout)
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_findings_drops_and_notes_go_to_stderr(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(plan: "neox_bridge.Plan", target: str, **_kwargs: object) -> Result:
        found = Finding("replicas-differ", "warning", "ranks differ", "")
        return Result(target, len(plan.files), plan.size, 0, plan.size, 0, 0, 2.0, (found,))

    monkeypatch.setattr("neox_bridge.execution.execute.execute", execute)
    contradict(source)
    args = ("convert", source, tmp_path / "out", "--to", "hf")
    done = run(*args)
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) == 1
    assert "warning: config.json says vocab_size: 7" in done.stderr
    assert "note: no tokenizer is written; --tokenizer PATH adds one" in done.stderr
    assert done.stderr.splitlines()[-1] == "warning: ranks differ"
    assert "in 2.0 s" in done.stdout
    quiet = run(*args, "-q")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


def test_many_drops_of_one_reason_are_one_line(source: Path, tmp_path: Path) -> None:
    stored = run("convert", source, tmp_path / "neox", "--inv-freq", "store")
    assert stored.exit_code == 0, stored.output
    back = run("convert", tmp_path / "neox", tmp_path / "back")
    [line] = [line for line in back.stderr.splitlines() if line.startswith("dropped")]
    assert re.fullmatch(
        r"dropped: layer 2: .*inv_freq and 1 more: not learned: computed from .*", line
    )
    assert "; dropped 2 (not learned: computed from rotary_emb_base)" in back.stdout


def test_lines_are_never_wrapped_or_coloured_off_a_terminal(source: Path, tmp_path: Path) -> None:
    contradict(source)
    done = spawn("convert", source, tmp_path / "out", COLUMNS="40", FORCE_COLOR="1")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert max(map(len, done.stdout.splitlines())) > 100
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr
    [changed, warning] = done.stderr.splitlines()
    assert changed.startswith(
        f"warning: {source} was changed after neox-bridge wrote it: config.json"
    )
    assert warning.startswith("warning: config.json says vocab_size: 7, but the tensors say 128")
    shown = spawn("inspect", source, "--tensors", COLUMNS="40").stdout
    wide = [line for line in shown.splitlines() if "query_key_value.weight" in line]
    assert len(wide) == TINY.layers
    assert all(len(line) > 80 for line in wide)


def test_a_bar_on_a_terminal(source: Path, tmp_path: Path) -> None:
    lead, follow = pty.openpty()
    args = [sys.executable, "-m", "neox_bridge", "convert", str(source), str(tmp_path / "out")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=follow, env=environment) as process:
        os.close(follow)
        shown = b""
        while True:
            try:
                part = os.read(lead, 4096)
            except OSError:
                break
            if not part:
                break
            shown += part
        assert process.stdout is not None
        assert process.stdout.read().startswith(b"wrote ")
    os.close(lead)
    assert process.returncode == 0
    assert b"writing" in shown
    assert b"verifying" in shown
    assert b"ETA" in shown


# --dry-run and --json


def validate(document: object) -> None:
    schema = plan_schema()
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(document)


@pytest.mark.parametrize(
    "options",
    [
        ["--to", "hf", "--dtype", "fp32", "--shard-size", "20KB"],
        ["--tp", "2", "--row-bias", "split", "--for", "neox@2024-03"],
        ["--layout", "ranks", "--tp", "4", "--vocab-multiple", "256"],
    ],
)
def test_dry_run_as_json_fits_the_schema(source: Path, tmp_path: Path, options: list[str]) -> None:
    done = run("convert", source, tmp_path / "out", "--dry-run", "--json", *options)
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    document = json.loads(done.stdout)
    validate(document)
    assert not (tmp_path / "out").exists()
    numbers = document["summary"]
    parts = ("bytes_copied", "bytes_transformed", "bytes_from_plan")
    assert sum(numbers[part] for part in parts) == numbers["bytes"]
    again = run("convert", source, tmp_path / "out", "--dry-run", "--json", *options)
    assert json.loads(again.stdout)["hash"] == document["hash"]


def test_dry_run_from_neox_as_json_fits_the_schema(source: Path, tmp_path: Path) -> None:
    assert run("convert", source, tmp_path / "neox", "--tp", 2).exit_code == 0
    for options in ([], ["--to", "neox", "--tp", "1"]):
        args = ("convert", tmp_path / "neox", tmp_path / "out", "--dry-run", "--json", *options)
        document = json.loads(run(*args).stdout)
        validate(document)
        assert document["source"]["tensor_parallel"] == 2


def test_dry_run_for_people(source: Path, tmp_path: Path) -> None:
    done = run("convert", source, tmp_path / "out", "--tp", 2, "--dry-run")
    assert done.exit_code == 0
    assert done.stderr == ""
    words = [line.split()[0] for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert words[:3] == ["source", "target", "files"]
    assert {"bytes", "memory", "fill"} <= set(words)
    assert re.search(r"layer_00-model_01-model_states.pt +\S+ kB  1 tensor$", done.stdout, re.M)
    assert not (tmp_path / "out").exists()


def test_json_result(source: Path, tmp_path: Path) -> None:
    done = run("convert", source, tmp_path / "out", "--json", "-q")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["result"]["size"] == document["summary"]["bytes"]
    assert document["result"]["files"] == document["summary"]["files"]
    assert document["target"]["kind"] == "neox"
    assert {"file": "finetune.yml", "key": "data_path"} in document["blanks"]


def test_an_existing_target_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    done = run("convert", source, tmp_path / "out")
    assert done.exit_code == 1
    assert "--overwrite" in done.stderr
    assert (tmp_path / "out" / "config.json").read_text() == "mine"
    (tmp_path / "out" / "photo.jpg").write_text("mine")
    done = run("convert", source, tmp_path / "out", "--overwrite")
    assert done.exit_code == 4
    assert "photo.jpg" in done.stderr
    assert (tmp_path / "out" / "config.json").read_text() == "mine"
    (tmp_path / "out" / "photo.jpg").unlink()
    assert run("convert", source, tmp_path / "out", "--overwrite").exit_code == 0
    assert not (tmp_path / "out" / "config.json").exists()
