"""Kills a conversion at every call that changes the disk, and looks at what is left; a program.

crash_run.py FOLDER CASE: prints {"points", "resumed", "finished"} as JSON, or fails. One process
without threads forks for each point, so that no lock is held in the child.
"""

import fcntl
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from neox_bridge.api import open_checkpoint
from neox_bridge.api import plan as make_plan
from neox_bridge.doctor.fixes import checker, fix_plan, in_place
from neox_bridge.errors import BridgeError
from neox_bridge.execution import exchange, movers, output
from neox_bridge.execution.execute import execute
from neox_bridge.execution.staging import sweep
from neox_bridge.frameworks.targets import target_named
from neox_bridge.planning.options import Options
from neox_bridge.planning.plan import Plan

CHANGES = (
    "mkdir open write pwrite copy_file_range ftruncate fsync rename replace unlink rmdir"
).split()
CASES: dict[str, dict[str, Any]] = {
    "layers": {"tp": 2},
    "ranks": {"layout": "ranks", "tp": 2},
    "hf": {"to": "hf", "shard_size": 100_000},
    "cast": {"dtype": "bfloat16"},
    "step": {"tp": 2},  # into a run that has another step
    "replaced": {"tp": 2},  # --overwrite
    "aside": {"tp": 2},  # the same, in a kernel that can't exchange
    "root": {"tp": 2},  # into a run whose finetune.yml, tokenizer and license differ
    "root replaced": {"tp": 2},  # --overwrite of its step
    "root aside": {"tp": 2},  # the same, in a kernel that can't exchange
    "fixed": {},  # doctor --in-place
    "fixed step": {},
    "fixed aside": {},
}


def tree(folder: Path) -> dict[str, str]:
    """Each file below a folder, by its path, as a digest."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in files}


def dies_at(point: int | None, count: list[int]) -> None:
    """Have this process killed by the call of that number; one that writes may be half done."""

    def counted(module: Any, name: str, changes: Callable[..., bool]) -> None:
        real = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if changes(*args):
                if count[0] == point:
                    if name == "pwrite" and point % 2:
                        real(args[0], args[1][: len(args[1]) // 2], args[2])
                    os.kill(os.getpid(), signal.SIGKILL)
                count[0] += 1
            return real(*args, **kwargs)

        setattr(module, name, call)

    for name in CHANGES:
        creates = (lambda _path, flags, *_: flags & os.O_CREAT) if name == "open" else None
        counted(os, name, creates or (lambda *_: True))
    counted(fcntl, "ioctl", lambda *_: True)
    counted(exchange, "_exchange", lambda *_: True)


def run(plan: Plan | None, target: Path, overwrite: bool) -> int:
    """The bytes that were kept from before. Without a plan: what is there is fixed in place."""
    if plan is not None:
        return execute(plan, str(target), overwrite=overwrite, workers=1).kept
    sweep(str(target))
    checkpoint = open_checkpoint(str(target))
    era = target_named("neox@2024-03" if checkpoint.kind == "neox" else "transformers@4.30")
    plan = fix_plan(checkpoint, era, str(target))
    if plan is None:
        return 0
    check = checker(checkpoint, plan)
    fixed = in_place(checkpoint, plan)
    return execute(fixed, str(target), workers=1, check=check, in_place=True).kept


def forked(work: Callable[[], object], point: int | None) -> int:
    """The number of calls that a child process made, or -1 where it was killed at ``point``."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        count = [0]
        write, leave = os.write, os._exit
        dies_at(point, count)
        work()
        write(writer, str(count[0]).encode())
        leave(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        told = file.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return -1
    assert status == 0
    return int(told)


def child(plan: Plan, target: Path, overwrite: bool, point: int | None) -> int:
    """A conversion in a child process: see ``forked``."""
    return forked(lambda: run(plan, target, overwrite), point)


def prepared(folder: Path, case: str) -> Path:
    """A fresh target, with what is there before."""
    home = folder / "home"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    if case == "step":
        shutil.copytree(folder / "run", home / "out")
    if case.startswith("root"):
        shutil.copytree(folder / "root", home / "out")
    if case.startswith("fixed"):
        shutil.copytree(folder / ("neox" if case == "fixed step" else "hf"), home / "out")
    if case in ("replaced", "aside"):
        (home / "out").mkdir()
        (home / "out" / "README.md").write_text("old")
    return home / "out"


def assert_consistent(
    target: Path, left: dict[str, str], old: dict[str, str], expected: dict[str, str], point: int
) -> None:
    """A run with a finetune.yml is all old or all new; without one each file is old or new."""
    names = {
        name for name in left if not name.startswith(("global_step", "tokenizer", "huggingface"))
    }
    for name, digest in left.items():
        assert digest in (old.get(name), expected.get(name)), (point, name)
    assert "latest" in names, point
    tag = (target / "latest").read_text()
    step = {name: digest for name, digest in left.items() if name.startswith(f"{tag}/")}
    if (target / "global_step0").is_dir() and step:
        sides = [{n: d for n, d in s.items() if n.startswith(f"{tag}/")} for s in (old, expected)]
        assert step in sides, point
    if "finetune.yml" in left:
        (yml,) = (target / tag / "configs").glob("*.yml")
        of_step, of_root = (yaml.safe_load(p.read_text()) for p in (yml, target / "finetune.yml"))
        for key in ("model_parallel_size", "pipe_parallel_size"):
            assert of_step[key] == of_root[key], point
        whole = [n for n in expected if n.startswith(("tokenizer/", "huggingface/"))]
        assert all(name in left for name in whole), point


def main(folder: Path, case: str) -> dict[str, int]:
    # files of every kind in small ones: put together in memory, by the kernel, through a buffer
    output.SMALL_BYTES = 20_000
    output._GROUP_BYTES = 30_000  # flushed some at a time, as those of a large model are
    movers.LEAST_SHARED_BYTES = 4_000
    if case.endswith("aside"):
        exchange._exchange = lambda *_: False  # type: ignore[assignment]
    source = folder / ("neox" if case == "hf" else "hf")
    overwrite = case in ("replaced", "aside", "root replaced", "root aside")
    target = prepared(folder, case)
    old = tree(target)
    plan = None
    if not case.startswith("fixed"):
        options = Options(iteration=7 if case == "root" else None, **CASES[case])
        plan = make_plan(open_checkpoint(str(source)), options, str(target))
    before = tree(source)
    points = child(plan, target, overwrite, None)
    expected = tree(target)
    found = {"points": points, "resumed": 0, "finished": 0}
    for point in range(points):
        target = prepared(folder, case)
        assert child(plan, target, overwrite, point) == -1, point
        assert tree(source) == before, point
        left = tree(target)
        if case == "step":
            # the other step is whole, and so is what `latest` names
            assert {k: v for k, v in left.items() if k in old and k != "latest"} == {
                k: v for k, v in old.items() if k != "latest"
            }, point
            if left["latest"] != old["latest"]:
                assert left == expected, point
        elif case.startswith("root"):
            assert_consistent(target, left, old, expected, point)
        elif case.endswith("aside"):
            assert left in (old, expected, {}), point
        else:
            assert left in (old, expected), point
        said = ""
        try:
            found["resumed"] += bool(run(plan, target, overwrite))
        except BridgeError as error:
            said = str(error)
            found["finished"] += 1
        assert not said or ("exists" in said and left == expected), (point, said)
        assert tree(target) == expected, point
        assert os.listdir(folder / "home") == ["out"], (point, os.listdir(folder / "home"))
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
