"""How commands end and what they print, with the work behind them replaced."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from audit_steps import step
from click.exceptions import Exit
from click.testing import CliRunner

import neox_bridge
from neox_bridge.cli import app as app_module
from neox_bridge.cli import audit as audit_module
from neox_bridge.cli import execution as execution_module
from neox_bridge.cli import streams, values
from neox_bridge.cli import verify as verify_module
from neox_bridge.cli.app import app
from neox_bridge.cli.command import Argument, command, given, only
from neox_bridge.cli.errors import ARGUMENTS, Interrupted, flag, reported, writing
from neox_bridge.cli.options import Details, Execution, Output
from neox_bridge.errors import BridgeError, ChoiceNeeded, Refused, UsageError
from neox_bridge.findings import Finding
from neox_bridge.option import option
from neox_bridge.verification.audit import Audit
from neox_bridge.verification.compare import Difference
from neox_bridge.verification.logits import Agreement, Cause, NonFinite
from neox_bridge.verification.runs import Fault, TrainingRun
from neox_bridge.verification.sealed import FileChange, Seal
from neox_bridge.verification.verify import Verification
from neox_bridge.wording import one_line, plain, wording

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
NEOX = str(FIXTURES / "pythia_fp32_pp1_tp2" / "checkpoints")
OTHER = str(FIXTURES / "pythia_fp32_pp0_tp1" / "checkpoints")
Patch = pytest.MonkeyPatch


def call(*words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.stdout, done.stderr


def called(*words: object) -> tuple[int, Any]:
    code, out, _ = call(*words, "--json")
    return code, json.loads(out)


# --- exceptions


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (BridgeError("it is\nbroken."), 1, "error: it is broken.\n"),
        (Refused("cannot hold it."), 4, "error: cannot hold it.\n"),
        (UsageError(["hash_name", "era"], "no", "Fix."), 2, "error: --hash, --for: no. Fix.\n"),
        (KeyboardInterrupt(), 130, "interrupted: nothing was written\n"),
        (Interrupted("half of it is there"), 130, "interrupted: half of it is there\n"),
        (BrokenPipeError(), 1, ""),
        (OSError(errno.EIO, "Bad disk", "a/b"), 1, "error: a/b: Bad disk.\n"),
        (OSError("odd"), 1, "error: odd.\n"),
        (
            MemoryError(),
            1,
            "error: out of memory. Use --max-workers 1, which needs the least memory.\n",
        ),
        (
            OSError(errno.ENOSPC, "Full"),
            1,
            "error: Full. Free some space, or choose a target on another file system.\n",
        ),
        (
            OSError(errno.EDQUOT, "Quota"),
            1,
            "error: Quota. Free some space, or choose a target on another file system.\n",
        ),
        (OSError(errno.EROFS, "Ro"), 1, "error: Ro. Choose a writable target.\n"),
        (
            PermissionError(errno.EACCES, "No", "f"),
            1,
            "error: f: No. Check the permissions of the file and its folder.\n",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_exception_has_its_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @reported()
    def command() -> None:
        raise error

    with pytest.raises(Exit) as end:
        command()
    assert end.value.exit_code == code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("y"), AssertionError()])
def test_a_bug_ends_with_1_and_names_its_place(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: Patch
) -> None:
    @reported()
    def command() -> None:
        raise error

    monkeypatch.delenv("NEOX_BRIDGE_DEBUG", raising=False)
    with pytest.raises(Exit) as end:
        command()
    assert end.value.exit_code == 1
    text = capsys.readouterr().err
    assert text.startswith(f"error: this is a bug in neox-bridge: {type(error).__name__}: ")
    assert "(test_exits.py:" in text
    assert "NEOX_BRIDGE_DEBUG=1" in text
    monkeypatch.setenv("NEOX_BRIDGE_DEBUG", "1")
    with pytest.raises(type(error)):
        command()


@pytest.mark.parametrize(
    "error", [click.exceptions.Exit(3), click.exceptions.Exit(0), click.BadParameter("x")]
)
def test_an_end_that_was_chosen_stays(error: Exception) -> None:
    @reported()
    def command() -> None:
        raise error

    with pytest.raises(type(error)) as end:
        command()
    assert end.value is error


def test_a_command_that_works_returns() -> None:
    seen = []
    reported()(lambda word: seen.append(word))("x")
    assert seen == ["x"]


@pytest.mark.parametrize(
    ("parameter", "option"),
    [
        ("era", "--for"),
        ("hash_name", "--hash"),
        ("configs", "--config"),
        ("ignore_keys", "--ignore-key"),
        ("shard_size", "--shard-size"),
        ("tp", "--tp"),
    ],
)
def test_names_of_options(parameter: str, option: str) -> None:
    assert flag(parameter) == option


def test_an_interruption_says_what_is_there(tmp_path: Path) -> None:
    target = tmp_path / "t"

    def interrupted(change: Callable[[], object], text: str = "") -> str:
        with pytest.raises(Interrupted) as error, writing(str(target)):
            change()
            raise KeyboardInterrupt(text) if text else KeyboardInterrupt
        return str(error.value)

    assert interrupted(lambda: None) == f"nothing was written to {target}"
    assert interrupted(target.mkdir) == f"after {target} was completely written"
    assert interrupted(lambda: None) == f"nothing was written to {target}"
    assert interrupted(lambda: None, "half") == "half"

    def replaced() -> None:
        (tmp_path / "new").mkdir()
        target.rename(tmp_path / "old")
        (tmp_path / "new").rename(target)

    assert interrupted(replaced) == f"after {target} was completely written"
    with writing(str(target)):
        pass
    with pytest.raises(ValueError, match="x"), writing(str(target)):
        raise ValueError("x")


def test_a_choice_names_the_typed_command(capsys: pytest.CaptureFixture[str]) -> None:
    error = ChoiceNeeded(
        "Two heads.",
        source="a b/",
        kind="hf",
        parameter="head",
        effects={"keep": "keeps", "tie": "ties"},
    )

    def text() -> str:
        with pytest.raises(Exit) as end, reported():
            raise error
        assert end.value.exit_code == 4
        return capsys.readouterr().err

    def running(name: str, *words: str) -> Any:
        """Within a command that was typed with these words."""
        context = click.Context(app.get_command(click.Context(app), name), info_name=name)
        context.meta[ARGUMENTS] = words
        return context.scope(cleanup=False)

    tail = "--head keep` keeps; `neox-bridge"
    assert f"`neox-bridge convert 'a b/' 'a b-converted' --to hf {tail}" in text()
    with running("batch", "x", "y z"):
        assert f"Two heads. `neox-bridge batch x 'y z' {tail}" in text()
    with running("verify", "x", "y"):
        assert f"`neox-bridge convert 'a b/' 'a b-converted' --to hf {tail}" in text()


# --- main


@pytest.fixture
def main(monkeypatch: Patch) -> Callable[..., dict[str, Any]]:
    """Runs ``main`` with these words; says what it set up, and how it ended."""

    def run(
        *words: str, ends: object = 0, failure: str = "", ignored: bool = False
    ) -> dict[str, Any]:
        seen: dict[str, Any] = {"signals": {}, "protected": 0}

        def command(**more: Any) -> None:
            seen.update(more=more)
            raise SystemExit(ends)

        def protect() -> None:
            seen["protected"] += 1

        monkeypatch.setattr(sys, "argv", ["neox-bridge", *words])
        monkeypatch.setattr(app_module, "app", command)
        monkeypatch.setattr(app_module, "protect_streams", protect)
        monkeypatch.setattr(app_module, "stdout_failure", lambda: failure)
        old = signal.SIG_IGN if ignored else signal.SIG_DFL
        monkeypatch.setattr(signal, "getsignal", lambda _number: old)
        monkeypatch.setattr(
            signal, "signal", lambda n, handler: seen["signals"].update({n: handler})
        )
        with pytest.raises(SystemExit) as end:
            app_module.main()
        return {**seen, "code": end.value.code}

    return run


@pytest.mark.parametrize(
    ("words", "modules"),
    [
        (["convert", "--help"], {"convert"}),
        (["export-optimizer", "-h"], {"export_optimizer"}),
        (["konvert"], set()),
        (["--help"], set()),
        (["-h"], set()),
        ([], set()),
    ],
)
def test_only_the_command_that_runs_is_imported(words: list[str], modules: set[str]) -> None:
    code = (
        f"import sys; sys.argv[1:] = {words!r}\n"
        "from neox_bridge.cli.app import COMMANDS, main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "names = [name.replace('-', '_') for name in COMMANDS]\n"
        "print(*(n for n in names if f'neox_bridge.cli.{n}' in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert set(done.stderr.splitlines()[-1].split()) == modules


def test_main_runs_the_commands_by_the_name_of_the_script(
    main: Callable[..., dict[str, Any]],
) -> None:
    assert main()["more"] == {"prog_name": "neox-bridge"}
    assert main()["protected"] == 1


def test_signals_interrupt_unless_they_are_ignored(main: Callable[..., dict[str, Any]]) -> None:
    handler = signal.default_int_handler
    assert main()["signals"] == {signal.SIGTERM: handler, signal.SIGHUP: handler}
    assert main(ignored=True)["signals"] == {}


@pytest.mark.parametrize(
    ("ends", "failure", "code"),
    [(0, "", 0), (3, "", 3), (0, "disk full", 1), (None, "disk full", 1), (3, "disk full", 3)],
)
def test_output_that_did_not_arrive_is_an_error(
    ends: Any, failure: str, code: int, main: Callable[..., dict[str, Any]], capsys: Any
) -> None:
    assert main(ends=ends, failure=failure)["code"] == code
    text = capsys.readouterr().err
    assert ("cannot write to stdout: disk full." in text) is bool(failure)


def every_command() -> dict[str, click.Command]:
    context = click.Context(app)
    return {name: app.get_command(context, name) for name in app.list_commands(context)}


def test_every_command_is_there() -> None:
    shown = call("--help")[1]
    for name, known in every_command().items():
        assert known.name == name
        assert known.help
        assert re.search(rf"^  {name} +\S", shown, re.MULTILINE)
    assert list(every_command()) == list(app_module.COMMANDS)
    assert app.get_command(click.Context(app), "other") is None


def test_without_a_command_there_is_help_and_usage_is_2() -> None:
    code, out, err = call()
    assert code == 2
    assert "Usage: " in out + err
    assert "export-optimizer" in out + err
    assert call("--version") == (0, f"neox-bridge {neox_bridge.__version__}\n", "")
    assert call("--help")[0] == 0
    assert call("-h")[0] == 0
    assert "--install-completion" not in call("--help")[1]
    assert "COMMAND --help` explains a command" in call("--help")[1]


def test_every_option_says_what_it_takes() -> None:
    for name, known in every_command().items():
        for param in known.params:
            assert param.help, (name, param.name)
            if isinstance(param, click.Option) and not param.is_flag:
                taken = param.make_metavar(click.Context(known))
                assert taken not in ("TEXT", "INTEGER", "INTEGER RANGE"), (name, param.name)
                assert not taken.startswith(("<", "[")), (name, param.name)


# --- streams


def test_what_is_printed_is_escaped_and_a_reader_may_go_away(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    stream = streams._Stream(open(writer, "wb"), "ascii", errors="backslashreplace")  # noqa: SIM115
    stream.write("a\x1b\u202e\u00e9\n")
    stream.flush()
    assert os.read(reader, 100) == b"a\\x1b\\u202e\\xe9\n"
    stream.write_as_is("\x1b[0m")
    stream.flush()
    assert os.read(reader, 100) == b"\x1b[0m"
    assert stream.failure is None
    os.close(reader)
    for _ in range(3):
        stream.write("x" * 100_000)
        stream.flush()
    assert stream.failure is not None
    assert stream.failure.errno == errno.EPIPE
    stream.close()


@pytest.mark.parametrize("closed", ["", "1>&-", "2>&-", "1>&- 2>&-", "0<&- 1>&-"])
@pytest.mark.parametrize("held", [0, 2])
def test_streams_that_were_closed_are_opened_at_their_places(
    closed: str, held: int, tmp_path: Path
) -> None:
    """held: files that are open already, behind the three streams."""
    program = (
        "import os, sys\n"
        "from neox_bridge.cli.streams import protect_streams\n"
        f"for number in range(3, {3 + held}):\n"
        "    opened = os.open(os.devnull, os.O_RDONLY)\n"
        "    os.dup2(opened, number)\n"
        "    if opened < 3: os.close(opened)\n"
        "protect_streams()\n"
        "streams = sys.stdout, sys.stderr\n"
        "protect_streams()\n"
        "assert streams == (sys.stdout, sys.stderr)\n"
        "print('out\\x1b'); print('err\\u202e', file=sys.stderr)\n"
        f"file = open({str(tmp_path / 'places')!r}, 'w')\n"
        "places = sys.stdin.fileno(), sys.stdout.fileno(), sys.stderr.fileno(), file.fileno()\n"
        "file.write(repr(places))\n"
    )
    source = str(Path(neox_bridge.__file__).parent.parent)
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, program],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=True,
    )
    assert (tmp_path / "places").read_text() == f"(0, 1, 2, {3 + held})"
    assert done.stdout == ("" if "1>&-" in closed else "out\\x1b\n")
    assert done.stderr == ("" if "2>&-" in closed else "err\\u202e\n")


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (None, ""),
        (BrokenPipeError(errno.EPIPE, "x"), ""),
        (OSError(errno.ENOSPC, "Full"), "Full"),
        (OSError("odd"), "odd"),
    ],
)
def test_why_stdout_failed(failure: OSError | None, said: str, monkeypatch: Patch) -> None:
    reader, writer = os.pipe()
    stream = streams._Stream(open(writer, "wb"), "utf-8")  # noqa: SIM115
    stream.failure = failure
    monkeypatch.setattr(sys, "stdout", stream)
    assert streams.stdout_failure() == said
    stream.close()
    os.close(reader)


@pytest.mark.parametrize(
    ("first", "last"),
    [
        (0x00, 0x08),
        (0x0B, 0x1F),
        (0x7F, 0x9F),
        (0xAD, 0xAD),
        (0x61C, 0x61C),
        (0x180E, 0x180E),
        (0x200B, 0x200F),
        (0x2028, 0x202E),
        (0x2060, 0x206F),
        (0xFEFF, 0xFEFF),
        (0xFFF9, 0xFFFB),
        (0xD800, 0xDFFF),
        (0x1BCA0, 0x1BCA3),
        (0x1D173, 0x1D17A),
        (0xE0000, 0xE007F),
    ],
)
def test_both_ends_of_what_is_escaped(first: int, last: int) -> None:
    for number in (first, last):
        assert wording(chr(number)) == plain(chr(number))
        assert wording(chr(number)).startswith("\\")
    for number in {first - 1, last + 1} - {-1}:
        assert wording(chr(number)) == chr(number)


def test_tabs_and_line_ends_stay_on_stdout_and_not_in_a_name() -> None:
    assert wording("a\tb\nc") == "a\tb\nc"
    assert plain("a\tb\nc") == "a\\tb\\nc"
    assert plain("\u202e\udc80\udcff") == "\\u202e\\x80\\xff"
    assert plain("\udc7f\ud800") == "\\udc7f\\ud800"
    assert one_line("a\r\nb\x0bc\u2028d") == "a b c d"
    assert one_line("a\r\n" * 2500) == "a " * 2000 + " …"
    assert one_line("k" * 4000) == "k" * 4000
    assert one_line("k" * 4001) == "k" * 4000 + " …"


# --- verify and diff


def verification(*differences: Difference, findings: tuple[Finding, ...] = ()) -> Verification:
    return Verification("s", "t", 1234, 5000, differences, findings)


APART = Difference("w", "values", 10, 2, 0.5, 0.25, 0.125)
SAME = Agreement(8, 0.0, 0.0, 0.0, 0.0, 1.0)
UNLIKE = Agreement(8, 1.0, 0.5, 0.25, 0.125, 0.5, "layer 1: mlp", 0.5)
NAN = Agreement(0, 0.0, 0.0, 0.0, 0.0, 0.0, non_finite=NonFinite(8, 3, 3, True, "w", 1, 1))


@pytest.fixture
def verified(monkeypatch: Patch) -> Callable[..., list[str]]:
    """Sets what ``verify`` finds. Returns the command's words."""

    def setup(found: Verification, **agreements: Agreement) -> list[str]:
        monkeypatch.setattr("neox_bridge.verification.verify.verify", lambda *_a, **_k: found)
        monkeypatch.setattr(verify_module, "_computed", lambda *_a: agreements)
        monkeypatch.setattr("neox_bridge.verification.tokens.read_tokens", lambda *_a: True)
        monkeypatch.setattr(verify_module, "_require_torch", lambda _device: None)
        return ["verify", NEOX, OTHER, *(["--logits"] if agreements else [])]

    return setup


@pytest.mark.parametrize(
    ("differences", "severity", "agreements", "code"),
    [
        ((), None, {}, 0),
        ((), "warning", {}, 0),
        ((), "error", {}, 3),
        ((APART,), None, {}, 3),
        ((), None, {"logits": SAME}, 0),
        ((), None, {"logits": UNLIKE}, 3),
        ((), None, {"logits": NAN}, 3),
        ((APART,), None, {"logits": SAME}, 3),
        ((), None, {"logits": SAME, "recorded": SAME}, 0),
        ((), None, {"logits": SAME, "recorded": UNLIKE}, 3),
        ((), None, {"logits": UNLIKE, "recorded": SAME}, 3),
        ((), None, {"logits": SAME, "recorded": NAN}, 3),
    ],
)
def test_verify_ends_with_3_where_anything_differs(
    differences: Any, severity: Any, agreements: Any, code: int, verified: Callable[..., list[str]]
) -> None:
    findings = (Finding("x", severity, "odd"),) if severity else ()
    words = verified(verification(*differences, findings=findings), **agreements)
    assert call(*words)[0] == code
    assert call(*words, "--quiet") == (code, "", "")
    ended, told = called(*words)
    assert (ended, told["holds"]) == (code, code == 0)
    assert (told["tensors"], told["size"]) == (1234, 5000)
    for key, agreement in agreements.items():
        assert told[key]["agrees"] is agreement.agrees
        assert told[key]["comparable"] is (agreement is not NAN)


def test_what_verify_prints(verified: Callable[..., list[str]]) -> None:
    finding = Finding("x", "warning", "odd", "do it")
    found = verification(APART, findings=(finding,))
    code, out, err = call(*verified(found, logits=SAME, recorded=UNLIKE))
    assert code == 3
    assert err == "warning: odd (do it)\n"
    lines = out.splitlines()
    assert lines[0].startswith("w: 2 of 10 elements differ, by 0.5 at most (relative 0.12, mean")
    assert lines[1] == f"{OTHER}: 1,234 tensors, 5 kB: {found.verdict}"
    assert lines[2].startswith(f"{OTHER}: logits of 8 tokens differ by 0 at most")
    assert lines[2].endswith("top-1 100.0%: the same model")
    assert lines[3].startswith(f"recorded logits, and {NEOX}: logits of 8 tokens differ by 1 at")
    assert lines[3].endswith("(relative 0.25, mean 0.5), KL 0.12, top-1 50.0%: ANOTHER MODEL")
    assert lines[4] == "  first difference: layer 1: mlp, by 0.5 of its largest value"
    assert lines[5].startswith("  no known cause explains it: compare")
    assert len(lines) == 6


def test_causes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    some = Cause("rotary", "other base", inherent=False)
    always = Cause("rounding", "another order", inherent=True)
    verify_module._tell_agreement("t", replace(UNLIKE, causes=(some, always)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [
        "  likely cause: rotary: other base",
        "  likely cause: rounding: another order; no conversion can remove this difference",
        "  this does not explain everything: compare the tensors above, and the configs",
    ]
    verify_module._tell_agreement("t", replace(UNLIKE, causes=(some,), explained=True))
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("odd", "where", "verdict", "tail"),
    [
        (
            NonFinite(8, 3, 0, False, "w", 1234, 0),
            "in A alone",
            "ANOTHER MODEL",
            "w (non-finite values: 1,234 in A, 0 in B)",
        ),
        (
            NonFinite(8, 0, 3, False, "w", 0, 1),
            "in B alone",
            "ANOTHER MODEL",
            "w (non-finite values: 0 in A, 1 in B)",
        ),
        (
            NonFinite(8, 1, 3, False, "w", 1, 1),
            "on both sides, but not at the same places",
            "ANOTHER MODEL",
            "w (",
        ),
        (
            NonFinite(1, 3, 3, True, "w", 1, 1),
            "at the same places on both sides",
            "CANNOT BE COMPARED",
            "w (",
        ),
        (NonFinite(8, 3, 0, False), "in A alone", "ANOTHER MODEL", "values are in layer 1: mlp"),
    ],
)
def test_logits_that_are_not_finite(
    odd: NonFinite, where: str, verdict: str, tail: str, capsys: pytest.CaptureFixture[str]
) -> None:
    agreement = replace(UNLIKE, non_finite=odd)
    verify_module._tell_non_finite("t", "A", "B", agreement)
    first, second = capsys.readouterr().out.splitlines()
    count = "1 token" if odd.tokens == 1 else f"{odd.tokens} tokens"
    assert first == f"t: logits of {count} are NaN or infinite {where}: {verdict}"
    assert tail in second
    verify_module._tell_non_finite("t", "A", "the recorded logits", agreement)
    assert "in the recorded logits)" not in capsys.readouterr().out.splitlines()[1]


def test_where_logits_are_computed(verified: Callable[..., list[str]], monkeypatch: Patch) -> None:
    words = verified(verification(), logits=SAME)
    devices: list[str] = []

    def computed(_first: Any, _second: Any, _inputs: Any, device: str) -> Any:
        devices.append(device)
        return {"logits": SAME}

    monkeypatch.setattr(verify_module, "_computed", computed)
    monkeypatch.setattr(verify_module, "_require_torch", lambda device: devices.append(device))
    assert call(*words)[0] == 0
    assert call(*words, "--device", "cuda")[0] == 0
    assert devices == ["cpu", "cpu", "cuda", "cuda"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["a", "b", "--tokens", "x"], "error: --tokens: only for --logits. Add --logits.\n"),
        (["a", "b", "--device", "cpu"], "error: --device: only for --logits. Add --logits.\n"),
        (
            ["a", "--tokens", "x", "--device", "cpu"],
            "error: --tokens, --device: only for --logits. Add --logits.\n",
        ),
        (
            ["a", "--logits"],
            "error: --logits: needs two checkpoints, and DST is missing. Give DST as well.\n",
        ),
        (
            ["a", "--optimizer"],
            "error: --optimizer: needs two checkpoints, and DST is missing. Give DST as well.\n",
        ),
        (
            ["a", "--gqa-order", "grouped"],
            "error: --gqa-order: needs two checkpoints, and DST is missing. Give DST as well.\n",
        ),
    ],
)
def test_options_of_verify_that_do_not_apply(words: list[str], line: str) -> None:
    assert call("verify", *words) == (2, "", line)
    assert call("verify", *words, "--json") == (2, "", line)


@pytest.mark.parametrize("unhashed", [0, 1, 2])
@pytest.mark.parametrize(
    ("kinds", "holds"),
    [
        ((), True),
        (("edited",), True),
        (("extra",), True),
        (("changed",), False),
        (("edited", "missing"), False),
        (("added",), False),
    ],
)
def test_verify_alone(kinds: Any, holds: bool, unhashed: int, monkeypatch: Patch) -> None:
    seal = Seal("r", 3, 2000, unhashed, tuple(FileChange(f"f{n}", k) for n, k in enumerate(kinds)))
    monkeypatch.setattr("neox_bridge.verification.sealed.find_record", lambda path: f"{path}/r")
    seen: list[object] = []
    monkeypatch.setattr(
        "neox_bridge.verification.sealed.check_seal",
        lambda record, _progress, workers: seen.append((record, workers)) or seal,
    )
    code, out, _ = call("verify", "some", "--max-workers", 3)
    assert code == (0 if holds else 3)
    assert seen == [("some/r", 3)]
    files = {1: "1 file", 2: "2 files"}.get(unhashed)
    tail = f"; for {files} only the size was checked" if files else ""
    verdict = "unchanged since it was written" if holds else "CHANGED since it was written"
    assert out.splitlines()[-1] == f"some: 3 files, 2 kB: {verdict}{tail}"
    assert [line.partition(" (")[0] for line in out.splitlines()[:-1]] == [
        f"{kind}: f{n}" for n, kind in enumerate(kinds)
    ]
    ended, told = called("verify", "some")
    assert (ended, told["holds"], len(told["changes"])) == (code, holds, len(kinds))
    assert call("verify", "some", "-q")[:2] == (code, "")


def test_diff_ends_with_3_where_anything_differs(monkeypatch: Patch) -> None:
    equal = Difference("e", "equal", 4)
    totals: list[Any] = []
    counted: list[Any] = []

    @contextmanager
    def bar(total: Any, _what: str, _quiet: bool) -> Any:
        totals.append(total)
        yield counted.append

    def found(*differences: Difference) -> None:
        def compare(_a: Any, _b: Any, *, pattern: str, workers: Any, progress: Any) -> Any:
            progress((pattern, workers))
            return list(differences)

        monkeypatch.setattr("neox_bridge.verification.diff.diff", compare)

    monkeypatch.setattr("neox_bridge.cli.diff.progress_bar", bar)
    found(equal)
    assert call("diff", NEOX, OTHER, "--tensor", "x*", "--max-workers", 2) == (
        0,
        "1 tensor: 1 equal, 0 different\n",
        "",
    )
    assert counted == [("x*", 2)]
    assert totals[0] > 0
    assert called("diff", NEOX, OTHER)[1]["equal"] is True
    found(APART, equal)
    code, out, _ = call("diff", NEOX, OTHER)
    assert code == 3
    assert out.splitlines()[0].startswith("w: 2 of 10 elements differ")
    assert out.splitlines()[1:] == ["2 tensors: 1 equal, 1 different"]
    assert call("diff", NEOX, OTHER, "--stat") == (3, "2 tensors: 1 equal, 1 different\n", "")
    assert call("diff", NEOX, OTHER, "-q") == (3, "", "")
    ended, told = called("diff", NEOX, OTHER)
    assert (ended, told["equal"]) == (3, False)
    assert [one["kind"] for one in told["tensors"]] == ["values", "equal"]


def test_what_logits_need(monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BridgeError, match=r"missing. Install it: .*pip install .*\[verify\]"):
        verify_module._require_torch("cpu")
    cuda = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    verify_module._require_torch("cpu")
    with pytest.raises(BridgeError, match="finds no CUDA device"):
        verify_module._require_torch("cuda")
    cuda.is_available = lambda: True
    verify_module._require_torch("cuda")


# --- audit

RUN = TrainingRun("run", ())


@pytest.fixture
def audited(monkeypatch: Patch) -> Callable[..., dict[str, Any]]:
    """Sets what an audit finds; returns what it was asked."""

    def setup(*faults: Fault, steps: Any = (), runs: Any = (RUN,)) -> dict[str, Any]:
        asked: dict[str, Any] = {}

        @contextmanager
        def bar(total: Any, _what: str, _quiet: bool) -> Any:
            asked["total"] = total
            yield None

        def look(opened: Any, **more: Any) -> Audit:
            asked.update(more, opened=opened)
            return Audit(tuple(steps), faults)

        sizes = ((100, 7), (20, 0))
        opened = [SimpleNamespace(size=a, states=b, checkpoint=None) for a, b in sizes]
        monkeypatch.setattr("neox_bridge.verification.runs.find_runs", lambda _f: (runs, faults))
        monkeypatch.setattr("neox_bridge.verification.opened.open_places", lambda *_: opened)
        monkeypatch.setattr("neox_bridge.verification.audit.audit", look)
        monkeypatch.setattr(audit_module, "progress_bar", bar)
        return asked

    return setup


def fault(severity: Any, **more: Any) -> Fault:
    return Fault("x", severity, "odd", "do it", **more)


@pytest.mark.parametrize(
    ("severities", "code"),
    [((), 0), (("info",), 0), (("warning",), 3), (("error",), 3), (("info", "error"), 3)],
)
def test_audit_ends_with_3_where_anything_is_wrong(
    severities: Any, code: int, audited: Callable[..., dict[str, Any]]
) -> None:
    audited(*map(fault, severities))
    assert call("audit", "x")[0] == code
    assert call("audit", "x", "-q") == (code, "", "")
    ended, told = called("audit", "x")
    assert (ended, told["holds"]) == (code, code == 0)
    assert [one["severity"] for one in told["findings"]] == list(severities)


def test_nothing_to_audit_is_an_error(audited: Callable[..., dict[str, Any]]) -> None:
    audited(fault("error"), runs=())
    assert call("audit", "x") == (1, "", "error: odd (do it)\n")
    assert call("audit", "x", "--json") == (1, "", "error: odd (do it)\n")


def test_what_an_audit_is_asked(audited: Callable[..., dict[str, Any]]) -> None:
    from neox_bridge.verification.hash_cache import default_folder

    asked = audited()
    call("audit", "x")
    assert (asked["total"], asked["same_init"], asked["optimizer"]) == (120, False, False)
    assert (asked["cache"], asked["workers"]) == (default_folder(), None)
    call("audit", "x", "--optimizer", "--same-init", "--cache", "none", "--max-workers", 4)
    assert (asked["total"], asked["same_init"], asked["optimizer"]) == (127, True, True)
    assert (asked["cache"], asked["workers"]) == (None, 4)
    for folder in ("a", "z"):
        call("audit", "x", "--cache", folder)
        assert asked["cache"] == folder


def test_what_an_audit_prints(audited: Callable[..., dict[str, Any]]) -> None:
    steps = [step(1, tp=2, kind="neox"), step(2), step(3, run="other")]
    audited(fault("error"), fault("warning"), fault("warning"), fault("info"), steps=steps)
    code, out, err = call("audit", "x")
    lines = out.splitlines()
    assert code == 3
    assert [lines[0], lines[4]] == ["run", "other"]
    assert lines[1].split() == ["step", "format", "bytes", "tensors", "read", "norm"]
    assert "GPT-NeoX, TP 2, float32" in lines[2]
    assert "Hugging Face, float32" in lines[3]
    assert lines[-1] == "3 steps of 2 runs: 1 error, 2 warnings"
    assert len(lines) == 8
    assert err.splitlines() == [
        f"{w}: odd (do it)" for w in ("error", "warning", "warning", "info")
    ]
    _, told = called("audit", "x")
    assert [(one["run"], one["step"], one["tensor_parallel"]) for one in told["steps"]] == [
        ("run", 1, 2),
        ("run", 2, 1),
        ("other", 3, 1),
    ]
    assert told["steps"][0]["tensors"]["a"]["shape"] == [4, 4]


def test_what_an_audit_draws(audited: Callable[..., dict[str, Any]], monkeypatch: Patch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(
        "neox_bridge.verification.lines_figure.lines_figure",
        lambda title, lines, **more: (title, sorted(lines), more),
    )
    monkeypatch.setattr(
        "neox_bridge.verification.drawing.save",
        lambda figure, path: drawn.append((*figure[:2], path, figure[2])),
    )
    monkeypatch.setattr("neox_bridge.verification.drawing.check_plot", lambda _path: None)
    wrong = fault("error", run="run", steps=("2",), tensors=("b",))
    audited(wrong, steps=[step(1), step(2), step(None)])
    assert call("audit", "x", "--plot", "p.svg")[0] == 3
    audited(steps=[step(1), step(1, run="other")])
    assert call("audit", "x", "--plot", "p.svg")[0] == 0
    more = {"x_label": "step", "y_label": "L2 norm", "log": True}
    assert drawn == [
        ("Norms of run", ["b"], "p.svg", {**more, "marks": [(2.0, "x")]}),
        ("Norms of the runs", ["other", "run"], "p.svg", {**more, "marks": []}),
    ]


# --- values of options


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("1B", 1),
        ("0001", 1),
        ("1.0", 1),
        ("1.9B", 1),
        ("2kb", 2000),
        ("1.5KB", 1500),
        ("3MB", 3_000_000),
        ("1KiB", 1024),
        ("0.001KB", 1),
        ("2TiB", 2 << 40),
        (" 5 gb ", 5 * 10**9),
        (7, 7),
        ("90071992547409931", 90071992547409931),
    ],
)
def test_sizes(text: Any, size: int) -> None:
    assert values.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["0", "0.9", "0.0009KB", "", "B", "x1", "1 1", "-1", "1e3", "1PB", "1K", "nan"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size"):
        values.parse_size(text)


@dataclass(frozen=True)
class Some:
    """Options of a made-up command."""

    word: str = option("one", "Says one.", choices=("one", "two"), aliases={"uno": "one"})
    number: int = option(2, "Counts.", "-n", minimum=1, maximum=9)
    many: tuple[str, ...] = option((), "Any.", metavar="X")
    switch: bool | None = option(None, "Turns.", "--on/--off")
    flag: bool = option(False, "Waves.")


def parsed(*words: str) -> tuple[Some, list[str]]:
    """What a command with these options gets, and which of them were given."""
    seen: list[Any] = []

    @command("some", Argument("path", "PATH", "A path."), Some, only(Output, "quiet"))
    def some(path: str, options: Some, output: Output) -> None:
        assert path == "p"
        assert output == Output(quiet="-q" in words)
        seen.append((options, given("word", "number", "many", "switch", "flag")))

    done = CliRunner().invoke(some, ["p", *words])
    if done.exit_code:
        raise click.BadParameter(done.stderr)
    [result] = seen
    return result


def test_words_of_an_option() -> None:
    assert parsed("--word", "two")[0].word == "two"
    assert parsed("--word", "uno")[0].word == "one"
    with pytest.raises(click.BadParameter, match="'three' is not one of one, two, uno"):
        parsed("--word", "three")
    for number in ("0", "10", "x"):
        with pytest.raises(click.BadParameter, match="-n: must be a whole number, 1 to 9"):
            parsed("-n", number)


def test_which_options_were_given() -> None:
    assert parsed() == (Some(), [])
    assert parsed("-q") == (Some(), [])
    assert parsed("-n", "2", "--word", "one") == (Some(), ["word", "number"])
    words = ("--flag", "--many", "a", "--off", "--many", "b")
    assert parsed(*words) == (
        Some(many=("a", "b"), switch=False, flag=True),
        ["many", "switch", "flag"],
    )


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--for", "transformers@5.5", "--to", "neox"], "--for: transformers does not read"),
        (
            ["--for", "transformers@5.5", "--format", "mamba_ssm"],
            "--for: transformers does not read --format",
        ),
        (
            ["--weights", "masters", "--to", "neox"],
            "--weights: master weights are only for Hugging Face",
        ),
    ],
)
def test_options_of_convert_that_do_not_go_together(words: list[str], match: str) -> None:
    code, out, err = call("convert", NEOX, "out", *words)
    assert (code, out) == (2, "")
    assert match in err


def test_what_was_asked_is_named_as_in_python(monkeypatch: Patch) -> None:
    from neox_bridge.cli import conversion as conversion_module
    from neox_bridge.cli.conversion import conversion_of
    from neox_bridge.frameworks.eras import TODAY
    from neox_bridge.frameworks.targets import target_named
    from neox_bridge.planning.options import Options

    named = ["tp", "format", "era", "crc"]
    monkeypatch.setattr(conversion_module, "given", lambda: named)

    def asked(details: Details = Details(), **changes: Any) -> Any:  # noqa: B008
        return conversion_of(Options(**changes), details)

    plain = asked(era=TODAY)
    assert plain.given == {"tp", "format", "era", "crc"}
    assert (plain.version, plain.options.era, plain.options.to) == (None, TODAY, None)
    version = target_named("transformers@5.5")
    newer = asked(era=version)
    assert newer.given == {"tp", "format", "crc"}
    assert (newer.version, newer.options.era, newer.options.to) == (version, None, "hf")
    assert asked(era=version, format="transformers").options.format == "transformers"
    assert (plain.masters, asked(Details(weights="masters")).masters) == (False, True)
    for name, hashed in (
        (None, "xxh3_128"),
        ("xxh3", "xxh3_128"),
        ("sha256", "sha256"),
        ("none", None),
    ):
        assert asked(Details(hash_name=name)).hash_name == hashed  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "hashed", "shared", "crc"),
    [
        ([], "xxh3_128", True, False),
        (["--no-verify"], "xxh3_128", False, False),
        (["--hash", "xxh3", "--no-verify"], "xxh3_128", True, False),
        (["--hash", "sha256", "--crc"], "sha256", True, True),
        (["--hash", "none", "--no-verify"], None, True, False),
    ],
)
def test_what_the_executor_is_asked(
    words: list[str], hashed: str | None, shared: bool, crc: bool, monkeypatch: Patch
) -> None:
    seen: dict[str, Any] = {}

    def run_plan(
        _plan: Any, _source: str, _target: str, execution: Any, *_: Any, **more: Any
    ) -> None:
        seen.update(more, verify=not execution.no_verify)

    monkeypatch.setattr("neox_bridge.cli.convert.run_plan", run_plan)
    assert call("convert", NEOX, "out", "--to", "neox", *words)[0] == 0
    assert seen == {
        "hash_name": hashed,
        "hash_shared": shared,
        "every_crc": crc,
        "verify": "--no-verify" not in words,
    }


# --- batch, and failures of every command


@pytest.mark.parametrize("more", [[], ["-q"], ["--json"], ["--dry-run"]])
def test_a_batch_without_one_of_its_sources_ends_with_1(
    more: list[str], monkeypatch: Patch, tmp_path: Path
) -> None:
    from neox_bridge.cli import batch as batch_module

    monkeypatch.chdir(tmp_path)
    pool = SimpleNamespace(slots=1, close=lambda: None)
    monkeypatch.setattr(batch_module, "_pool", lambda *_a: pool)
    monkeypatch.setattr(batch_module, "_all", lambda *_a, **_k: [])
    (tmp_path / "empty").mkdir()
    for lost in ("missing", "empty"):
        code, _, err = call("batch", NEOX, lost, "out", *more)
        assert code == 1
        assert err.startswith(f"error: {lost} ")
    assert call("batch", NEOX, "out", *more)[0] == 0


FAILURES = {
    "convert": ["missing", "out"],
    "batch": ["missing", "out"],
    "inspect": ["missing"],
    "patch": ["missing"],
    "doctor": ["missing"],
    "changes": ["--for", "missing"],
    "verify": ["missing", "out"],
    "diff": ["missing", "out"],
    "audit": ["missing"],
    "reshard": ["missing", "out", "--tp", "1"],
    "export-optimizer": ["missing", "out"],
    "report": ["missing", "-o", "out.html"],
    "toy": ["pythia-70m", "file/out", "--as", "hf"],
}


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_missing_source_is_one_line_and_1(
    more: list[str], monkeypatch: Patch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    assert {*FAILURES, "families"} == set(app_module.COMMANDS)
    for name, words in FAILURES.items():
        code, out, err = call(name, *words, *more)
        assert (name, code, out) == (name, 1, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "this is a bug" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_wrong_option_is_2(more: list[str]) -> None:
    for name, words in FAILURES.items():
        code, out, err = call(name, *words, "--no-such-option", *more)
        assert (name, code, out) == (name, 2, "")
        assert "--no-such-option" in err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["inspect", NEOX], 0),
        (["diff", NEOX, NEOX], 0),
        (["diff", NEOX, NEOX, "--tensor", "nothing"], 2),
        (["doctor", NEOX, "--for", "today"], 0),
        (["doctor", NEOX, "--for", "neox@2024-03"], 4),
        (["doctor", NEOX, "--for", "transformers@5.5"], 4),
        (["convert", NEOX, "out", "--to", "neox", "--tp", "3"], 4),
        (["convert", NEOX, "out", "--tp", "2"], 2),
        (["export-optimizer", NEOX, "out"], 1),
        (["verify", NEOX], 1),
        (["audit", NEOX, "--cache", "none"], 0),
        (["convert", NEOX, "out", "--for", "nonsense"], 2),
        (["doctor", NEOX, "--for", "nonsense"], 2),
        (["changes"], 0),
        (["families"], 0),
    ],
    ids=lambda value: " ".join(value).replace(NEOX, "X") if isinstance(value, list) else value,
)
def test_how_commands_end(words: list[str], code: int, monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*words)[0] == code
    ended, out, _ = call(*words, "--json")
    assert ended == code
    if code in (0, 3) or (words[0], code) == ("doctor", 4):
        json.loads(out)
    else:
        assert out == ""


# --- carrying out


@pytest.mark.parametrize("no_verify", [True, False])
@pytest.mark.parametrize("quiet", [True, False])
def test_a_plan_is_carried_out(
    no_verify: bool, quiet: bool, monkeypatch: Patch, capsys: Any
) -> None:
    asked: dict[str, Any] = {}

    @contextmanager
    def phases(quiet: bool) -> Any:
        asked.update(quiet=quiet)
        yield SimpleNamespace(count="progress", begin="phase")

    def execute(plan: Any, target: str, **more: Any) -> Any:
        asked.update(more, target=target)
        return SimpleNamespace(findings=(Finding("x", "warning", "late"),))

    monkeypatch.setattr(execution_module, "shown_phases", phases)
    monkeypatch.setattr("neox_bridge.execution.execute.execute", execute)
    finding = Finding("y", "info", "early")
    plan: Any = SimpleNamespace(size=50, findings=(finding,), dropped=(), notes=(), left=())
    execution = Execution(overwrite=True, max_workers=3, no_verify=no_verify, quiet=quiet)
    execution_module.perform(plan, "t", execution, lambda p: f"check {p}", hash_name="h")  # type: ignore[arg-type, return-value]
    assert asked == {
        "quiet": quiet,
        "target": "t",
        "overwrite": True,
        "workers": 3,
        "progress": "progress",
        "phase": "phase",
        "check": None if no_verify else "check progress",
        "hash_name": "h",
    }
    assert capsys.readouterr() == ("", "" if quiet else "info: early\nwarning: late\n")
