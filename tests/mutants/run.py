"""Changes one line at a time and shows which changes no test notices (``make mutants``).

For each area (areas.py) a seeded sample of mutants is drawn. The tests of the area run on each
mutant in a copy of the repository: first the quick ones, then those that execute the changed line,
then those that start processes. Results are appended to ``.mutants/results.jsonl``, so that an
interrupted run continues where it stopped. Mutants that compute the same as the original are
listed by hand, with the reason, in equivalent.jsonl and do not count.
"""

import argparse
import difflib
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import parso
from areas import AREAS, Area
from cosmic_ray.ast.ast_query import ASTQuery
from cosmic_ray.mutating import mutate_code
from cosmic_ray.testing import run_tests
from cosmic_ray.work_item import TestOutcome
from coverage import CoverageData
from operators import operators, positions

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".mutants"
RESULTS = HOME / "results.jsonl"
EQUIVALENT = Path(__file__).with_name("equivalent.jsonl")
OPERATORS = dict(operators())
warnings.simplefilter("ignore", SyntaxWarning)  # mutants are compiled to see whether they parse


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change: the file, the definition that holds it, and its lines before and after."""

    area: str
    file: str
    definition: str
    line: int
    before: str
    after: str
    operator: str
    occurrence: int

    @property
    def key(self) -> str:
        """Identifies the change wherever its line moves to."""
        return json.dumps([self.file, self.definition, self.before, self.after])


def mutants(name: str, area: Area, seed: int, count: int) -> list[Mutant]:
    """A sample of an area's mutants: one at most for each place and kind of change.

    The order is that of a hash with the seed, so that the sample stays the same for the lines
    that an edit does not touch.
    """
    files = sorted({path for pattern in area.patterns() for path in ROOT.glob(pattern)})
    places: dict[tuple[Any, ...], tuple[str, Path, str, int]] = {}
    for path in files:
        for place, operator, occurrence in _places(path):
            order = hashlib.sha256(repr((seed, place, operator)).encode()).hexdigest()
            places[place] = min(
                places.get(place, (order, path, operator, occurrence)),
                (order, path, operator, occurrence),
            )
    sample: list[Mutant] = []
    for _, path, operator, occurrence in sorted(places.values()):
        if len(sample) == count:
            break
        mutant = _mutant(name, path, operator, occurrence)
        if mutant is not None:
            sample.append(mutant)
    return sample


def _places(path: Path) -> Iterator[tuple[tuple[Any, ...], str, int]]:
    """Where a file can be changed: the place and the kind of change, the operator, and which."""
    source = path.read_text(encoding="utf-8")
    lines, tree = source.splitlines(), parso.parse(source)
    file = path.relative_to(ROOT).as_posix()
    for name, operator in OPERATORS.items():
        for occurrence, ((line, column), _) in enumerate(positions(operator, tree)):
            text = lines[line - 1]
            if text.lstrip().startswith(("from ", "import ", "@", '"""')):
                continue
            offset = column - len(text) + len(text.lstrip())
            yield (file, text.strip(), offset, name.split("_")[0]), name, occurrence


def _mutant(area: str, path: Path, name: str, occurrence: int) -> Mutant | None:
    """The change in full; None where it is no valid Python, or no change."""
    source = path.read_text(encoding="utf-8")
    tree = parso.parse(source)
    (line, column), _ = positions(OPERATORS[name], tree)[occurrence]
    try:
        mutated = mutate_code(source, OPERATORS[name], occurrence) or source
        compile(mutated, str(path), "exec")
    except (SyntaxError, AttributeError):  # some operators fail on attributes
        return None
    before, after = _changed_lines(source, mutated)
    if before == after:
        return None
    leaf = tree.get_leaf_for_position((line, column), include_prefixes=True)
    definition = ASTQuery(leaf).get_definition_name() or ""
    file = path.relative_to(ROOT).as_posix()
    return Mutant(area, file, definition, line, before, after, name, occurrence)


def _changed_lines(source: str, mutated: str) -> tuple[str, str]:
    old, new = source.splitlines(), mutated.splitlines()
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    removed, added = [], []
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind != "equal":
            removed += [_without_comment(line) for line in old[a:b]]
            added += [_without_comment(line) for line in new[c:d]]
    return " ".join(removed), " ".join(added)


def _without_comment(line: str) -> str:
    """The code of a line, so that a new comment keeps what is known of the line's mutants."""
    return line.split("  # ")[0].strip()


def run(mutant: Mutant, tree: Path, phases: Iterable[Sequence[str]], seconds: float) -> str:
    """The outcome of a mutant in a copy of the repository: killed, survived or incompetent.

    phases: tests that run one after the other, until some notice the change.
    """
    target = tree / mutant.file
    original = target.read_text(encoding="utf-8")
    mutated = mutate_code(original, OPERATORS[mutant.operator], mutant.occurrence)
    outcome = TestOutcome.SURVIVED
    try:
        target.write_text(mutated or original, encoding="utf-8")
        for tests in phases:
            if tests and outcome == TestOutcome.SURVIVED:
                outcome, _ = run_tests(_pytest(tree, tests), seconds)
    finally:
        target.write_text(original, encoding="utf-8")
    return str(outcome.value)


@dataclass(frozen=True, slots=True)
class Tests:
    """The tests of an area.

    seconds: of each test, in the order of the area's files. with_processes: those that start
    processes, in which coverage sees no lines. by_line: the tests that execute a line, by file and
    line; "" while tests are imported.
    """

    seconds: dict[str, float]
    with_processes: frozenset[str]
    by_line: dict[str, dict[int, list[str]]]

    def phases(self, mutant: Mutant) -> list[list[str]]:
        """The tests that execute the mutant's line, file by file, then all others that may.

        Those are the ones that start processes, or else all: where the line is executed at import,
        or is a part of a statement that coverage counts elsewhere.
        """
        names = set(self.by_line.get(mutant.file, {}).get(mutant.line, []))
        near: dict[str, list[str]] = {test.partition("::")[0]: [] for test in self.seconds}
        for name in sorted(names - {""}, key=lambda name: self.seconds[name]):
            near[name.partition("::")[0]].append(name)
        others = self.with_processes if names and "" not in names else set(self.seconds)
        return [*near.values(), sorted(others - names)]


def measure(name: str, files: Sequence[str], tree: Path) -> Tests:
    """Run tests of an area without a mutant. Exits where they fail."""
    data, known = HOME / f"{name}.coverage", HOME / f"{name}.tests.json"
    data.unlink(missing_ok=True)
    os.environ |= {"MUTANTS_TESTS": str(known), "COVERAGE_FILE": str(data)}
    measuring = ["-m", "coverage", "run", f"--source={tree / 'src'}"]
    plugin = [f"PYTHONPATH={tree / 'src'}:{Path(__file__).parent}", "-p", "plugin"]
    outcome, output = run_tests(_pytest(tree, files, measuring, plugin), 3600)
    if outcome != TestOutcome.SURVIVED:
        sys.exit(f"{name}: the tests fail without any mutant.\n{output[-3000:]}")
    covered = CoverageData(str(data))
    covered.read()
    by_line = {
        Path(file).relative_to(tree).as_posix(): covered.contexts_by_lineno(file)
        for file in covered.measured_files()
    }
    tests = json.loads(known.read_text(encoding="utf-8"))
    seconds = {test: spent for test, (spent, _) in tests.items()}
    return Tests(seconds, frozenset(test for test, (_, starts) in tests.items() if starts), by_line)


def _pytest(
    tree: Path, tests: Sequence[str], measuring: Sequence[str] = (), plugin: Sequence[str] = ()
) -> str:
    """The command that runs these tests with the copy's package, until the first fails."""
    existing = [test for test in tests if (tree / test.partition("::")[0]).exists()]
    path, *options = plugin or (f"PYTHONPATH={tree / 'src'}",)
    options += ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    options += ["--hypothesis-profile=ci"]  # the same examples each time, however slow the machine
    start = ["env", f"--chdir={tree}", path, sys.executable, *measuring, "-m", "pytest"]
    return shlex.join([*start, *options, *existing])


def copy_repository(tree: Path) -> None:
    """A copy of the working tree, compiled so that a changed file is noticed by its contents."""
    shutil.rmtree(tree, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    compiling = ["-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "src", "tests"]
    subprocess.run([sys.executable, *compiling], cwd=tree, check=False)


def recorded() -> dict[str, dict[str, Any]]:
    """The last outcome of each mutant that was run before."""
    if not RESULTS.exists():
        return {}
    results: dict[str, dict[str, Any]] = {}
    for line in RESULTS.read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        key = json.dumps([result[k] for k in ("file", "definition", "before", "after")])
        results[key] = result
    return results


def equivalent() -> dict[str, str]:
    """The mutants that change nothing, by key, with the reason."""
    if not EQUIVALENT.exists():
        return {}
    lines = map(json.loads, EQUIVALENT.read_text(encoding="utf-8").splitlines())
    return {
        json.dumps([line[k] for k in ("file", "definition", "before", "after")]): line["why"]
        for line in lines
    }


def run_area(name: str, arguments: argparse.Namespace, trees: list[Path]) -> None:
    """Run the sample's mutants that have no outcome yet, or that survived before."""
    area = AREAS[name]
    sample = mutants(name, area, arguments.seed, arguments.count)
    results, same = recorded(), equivalent()
    again = {"survived"} if arguments.again else set()
    waiting = [
        mutant
        for mutant in sample
        if mutant.key not in same
        and (mutant.key not in results or results[mutant.key]["outcome"] in again)
    ]
    if not waiting:
        return
    print(f"{name}: {len(waiting)} of {len(sample)} mutants to run", flush=True)
    quick = area.tests[: area.quick]
    tests = measure(name, quick, trees[0])
    survived = _run_all(waiting, trees, tests, record_survivors=quick == area.tests)
    if arguments.quick:
        print(f"{name}: {len(survived)} survived {', '.join(quick)}:")
        print("\n".join(_shown(asdict(mutant)) for mutant in survived), flush=True)
    elif survived and quick != area.tests:
        tests = measure(name, area.tests, trees[0])
        _run_all(survived, trees, tests, record_survivors=True)


def _run_all(
    waiting: Sequence[Mutant],
    trees: Sequence[Path],
    tests: "Tests",
    *,
    record_survivors: bool,
) -> list[Mutant]:
    """Run these tests on each mutant, as many at a time as there are copies. The survivors."""
    limit = sum(tests.seconds.values()) * 3 + 60
    free: SimpleQueue[Path] = SimpleQueue()
    for tree in trees:
        free.put(tree)

    def one(mutant: Mutant) -> bool:
        tree, started = free.get(), time.monotonic()
        try:
            outcome = run(mutant, tree, tests.phases(mutant), limit)
        finally:
            free.put(tree)
        survived = outcome == TestOutcome.SURVIVED.value
        took = round(time.monotonic() - started, 1)
        result = {**asdict(mutant), "outcome": outcome, "seconds": took}
        if record_survivors or not survived:
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
        if record_survivors and survived:
            print(_shown(result), flush=True)
        return survived

    with ThreadPoolExecutor(len(trees)) as pool:
        outcomes = list(pool.map(one, waiting))
    return [mutant for mutant, survived in zip(waiting, outcomes, strict=True) if survived]


def _shown(result: dict[str, Any]) -> str:
    place = f"{result['file']}:{result['line']} {result['definition']}"
    return f"  survived {place}\n    - {result['before']}\n    + {result['after']}"


def report(names: list[str], arguments: argparse.Namespace) -> bool:
    """Print the share of mutants that tests noticed; whether every area reaches the aim."""
    results, same = recorded(), equivalent()
    enough = True
    for name in names:
        sample = mutants(name, AREAS[name], arguments.seed, arguments.count)
        counted = [m for m in sample if m.key not in same and m.key in results]
        missed = [m for m in counted if results[m.key]["outcome"] == "survived"]
        share = 1 - len(missed) / len(counted) if counted else 0.0
        enough &= bool(counted) and share >= arguments.aim
        left_out = sum(m.key in same for m in sample)
        print(
            f"{name}: {len(counted) - len(missed)} of {len(counted)} noticed ({share:.0%}); "
            f"{left_out} equivalent, {len(sample) - left_out - len(counted)} not run"
        )
        for mutant in missed:
            print(_shown(results[mutant.key]))
    return enough


def main() -> None:
    """Run the sample of the named areas, or of all, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("areas", nargs="*", metavar="AREA", help=", ".join(AREAS))
    parser.add_argument("--count", type=int, default=40, help="mutants for each area [40]")
    parser.add_argument("--seed", type=int, default=0, help="which sample [0]")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time [1]")
    parser.add_argument("--aim", type=float, default=0.9, help="share to be noticed [0.9]")
    parser.add_argument("--again", action="store_true", help="also run those that survived")
    parser.add_argument("--quick", action="store_true", help="only the first tests of each area")
    parser.add_argument("--report", action="store_true", help="run nothing, only report")
    arguments = parser.parse_args()
    names = arguments.areas or list(AREAS)
    if unknown := set(names) - set(AREAS):
        sys.exit(f"no such area: {', '.join(sorted(unknown))}. There are: {', '.join(AREAS)}.")
    HOME.mkdir(exist_ok=True)
    if not arguments.report:
        trees = [HOME / f"tree-{os.getpid()}-{job}" for job in range(arguments.jobs)]
        try:
            for tree in trees:
                copy_repository(tree)
            for name in names:
                run_area(name, arguments, trees)
        finally:
            for tree in trees:
                shutil.rmtree(tree, ignore_errors=True)
    sys.exit(0 if report(names, arguments) else 3)


if __name__ == "__main__":
    main()
