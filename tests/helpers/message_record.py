"""Records an example of every message while tests run: ``pytest --record-messages``.

The record is ``tests/data/messages.json``: for each message of ``message_sites`` an example, as the
command line shows it, and the test that provoked it. ``make messages`` runs this file: it runs
again only the tests whose messages have changed. With arguments, it runs the tests that they name.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import message_sites
import pytest
from message_sites import Message

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "data" / "messages.json"
# how many messages of a function have no example, as no test provokes them in its own process
WITHOUT = ROOT / "tests" / "data" / "messages_without.txt"
_TEXT_CHARACTERS = 600
_LEVELS = 8  # of the stack, from a message to the caller who words it
_CASE = re.compile(r"\[.*\]$", re.S)
_FOLDER = "NEOX_BRIDGE_MESSAGES"  # the environment variable with the folder of notes
# what differs from run to run
_UNSTABLE = (
    (re.compile(r"/tmp/tmp\w+"), "RUN"),
    (re.compile(r"(127\.0\.0\.1|localhost):\d+"), r"\1:9000"),
    (re.compile(re.escape(str(ROOT))), "/neox-bridge"),
    (re.compile(r"\bprocess \d+"), "process 4242"),
    (re.compile(r" at 0x[0-9a-f]+"), ""),
    # the command that installs an extra, by where neox-bridge was installed from
    (
        re.compile(r"\S*pip install (--editable )?\S+\[(\w+)\]\S*"),
        r"pip install '/neox-bridge[\2]'",
    ),
)
Record = dict[str, dict[str, str]]


def read_record(path: Path = RECORD) -> Record:
    if not path.is_file():
        return {}
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record


def write_record(record: Mapping[str, Mapping[str, str]], path: Path = RECORD) -> None:
    text = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_without() -> dict[str, int]:
    lines = (line.rsplit(maxsplit=1) for line in WITHOUT.read_text(encoding="utf-8").splitlines())
    return {place: int(number) for place, number in lines}


def configure(config: pytest.Config) -> None:
    """Record in this process; the first one, which started the others, writes what they noted."""
    path = config.getoption("record_messages")
    if path is None:
        return
    if not hasattr(config, "workerinput"):
        os.environ[_FOLDER] = tempfile.mkdtemp(prefix="messages-")
        config.pluginmanager.register(_Writer(Path(os.environ[_FOLDER]), Path(path)))
    recorder = Recorder(Path(os.environ[_FOLDER]), config)
    recorder.install()
    config.pluginmanager.register(recorder)


class _Writer:
    def __init__(self, folder: Path, path: Path) -> None:
        self.folder = folder
        self.path = path

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        record = merged(read_record(self.path), collect(self.folder))
        write_record(record, self.path)
        shutil.rmtree(self.folder)
        terminalreporter.section(f"{len(record)} messages in {self.path}")
        terminalreporter.write_line("\n".join(problems(record, read_without())))


class Recorder:
    """Notes the messages that the running test constructs, in one file for each process."""

    def __init__(self, folder: Path, config: pytest.Config) -> None:
        self.folder = folder
        self.config = config
        self.test = ""
        self.seen: set[str] = set()
        self.package = message_sites.package()
        self.root = f"{self.package.folder}{os.sep}"
        self.level = threading.local()

    def install(self) -> None:
        """Wrap the constructors of every class of messages."""
        import click

        import neox_bridge.batches.run
        import neox_bridge.cli.errors
        import neox_bridge.formats.zip_directory
        import neox_bridge.layouts.folder_kinds
        import neox_bridge.layouts.quantized
        import neox_bridge.verification.runs
        from neox_bridge.errors import BridgeError
        from neox_bridge.findings import Dropped, Finding

        roots = (BridgeError, Finding, Dropped, neox_bridge.formats.zip_directory.ZipError)
        for root in (*roots, neox_bridge.cli.errors.Interrupted, click.BadParameter):
            for cls in (root, *_subclasses(root)):
                if cls is root or "__init__" in vars(cls):
                    setattr(cls, "__init__", self._wrapped(cls.__init__))  # noqa: B010

    def _wrapped(self, construct: Callable[..., None]) -> Callable[..., None]:
        def __init__(one: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            level = getattr(self.level, "value", 0)
            self.level.value = level + 1
            try:
                construct(one, *args, **kwargs)
            finally:
                self.level.value = level
            if level == 0 and self.test:
                self._note(one, sys._getframe(1))

        return __init__

    def _note(self, one: object, frame: FrameType | None) -> None:
        for _ in range(_LEVELS):
            if frame is None or not frame.f_code.co_filename.startswith(self.root):
                return
            call = frame.f_code.co_filename.removeprefix(self.root), _end(frame)
            message = self.package.by_end.get(call)
            if message is not None:
                if message.key not in self.seen:
                    self.seen.add(message.key)
                    self._write(message, one)
                return
            if call not in self.package.inner:
                return
            frame = frame.f_back

    def _write(self, message: Message, one: object) -> None:
        factory = self.config._tmp_path_factory  # type: ignore[attr-defined]
        example = steady(shown(one), str(factory.getbasetemp()))
        line = json.dumps([message.key, example, self.test])
        with open(self.folder / f"{os.getpid()}.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        is_fuzz = "tests/fuzz/" in item.nodeid or "mutants" in item.nodeid
        self.test = "" if is_fuzz else item.nodeid
        self.seen.clear()
        try:
            return (yield)  # type: ignore[return-value]
        finally:
            self.test = ""


def shown(one: Any) -> str:
    """A message as the command line shows it."""
    from neox_bridge.cli.errors import message_of
    from neox_bridge.cli.spelling import as_options
    from neox_bridge.findings import Command, Dropped, Finding
    from neox_bridge.wording import sentence

    if isinstance(one, Finding):
        is_prose = one.remedy and not isinstance(one.remedy, Command)
        remedy = sentence(one.remedy) if is_prose else one.remedy
        return as_options(f"{sentence(one.message)} {remedy}".rstrip())
    if isinstance(one, Dropped):
        return as_options(f"{one.name}: {one.reason}")
    return as_options(message_of(one))


def steady(text: str, temporary: str) -> str:
    """An example without what differs from run to run: folders, ports, numbers of processes."""
    text = re.sub(rf"{re.escape(temporary)}/[\w.+-]+(/?)", lambda m: "" if m[1] else "RUN", text)
    for pattern, stable in _UNSTABLE:
        text = pattern.sub(stable, text)
    cut = len(text) > _TEXT_CHARACTERS
    return f"{text[:_TEXT_CHARACTERS]} …" if cut else text


def _end(frame: FrameType) -> tuple[int, int]:
    """Where the call that a frame is executing ends in its file."""
    for index, (_, line, _, column) in enumerate(frame.f_code.co_positions()):
        if index == frame.f_lasti // 2:
            return line or 0, column or 0
    return 0, 0


def _subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def collect(folder: Path) -> Iterator[tuple[str, str, str]]:
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            key, example, test = json.loads(line)
            yield key, example, test


def merged(record: Record, notes: Iterable[tuple[str, str, str]]) -> Record:
    """The record with new examples: an entry stays while its test still gives one.

    For a new entry, the test with the shortest name is taken.
    """
    known = message_sites.package().messages
    record = {key: entry for key, entry in record.items() if key in known}
    fresh: dict[str, tuple[str, str]] = {}
    for key, example, test in notes:
        if key not in known:
            continue
        if key in record and record[key]["test"] == test:
            record[key]["example"] = example
        elif key not in record:
            best = fresh.get(key)
            if best is None or (len(test), test) < (len(best[1]), best[1]):
                fresh[key] = example, test
    return record | {k: {"example": e, "test": t} for k, (e, t) in fresh.items()}


def problems(record: Record, without: Mapping[str, int]) -> list[str]:
    """What keeps the record from being complete. without: see ``WITHOUT``."""
    known = message_sites.package().messages
    missing = Counter(known[key].place for key in known if key not in record)
    return [
        *(f"{key}: no such message any more" for key in record if key not in known),
        *(
            f"{key}: no example of: {message.words}"
            for key, message in known.items()
            if key not in record and missing[message.place] > without.get(message.place, 0)
        ),
        *(
            f"{place}: {missing[place]} without an example; write that in {WITHOUT.name}"
            for place, number in without.items()
            if missing[place] < number
        ),
        *(f"{test}: no such test any more" for test in sorted(_tests(record)) if not _exists(test)),
    ]


def _tests(record: Record) -> set[str]:
    """The test functions of a record, without the cases of parametrized ones."""
    return {_CASE.sub("", entry["test"]) for entry in record.values()}


@cache
def _exists(test: str) -> bool:
    file, *_, function = test.split("::")
    path = ROOT / file
    return path.is_file() and f"def {function}(" in path.read_text(encoding="utf-8")


def to_run(record: Record) -> list[str]:
    """The tests of entries whose message has changed."""
    known = message_sites.package().messages
    return sorted(
        filter(_exists, _tests({key: e for key, e in record.items() if key not in known}))
    )


def main(arguments: list[str]) -> int:
    tests = arguments or to_run(read_record())
    if not tests:
        print(
            "No recorded message has changed. ARGS=tests/ROOM records what the tests of a room say."
        )
        return 0
    command = [sys.executable, "-m", "pytest", *tests, "--record-messages"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
