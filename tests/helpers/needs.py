"""What each test needs beyond Python and this package, read from its source: its markers.

A test needs what its function uses, what its fixtures use, and what the functions that these call
use, in its own file and in tests/helpers. Nothing is imported to find out, so that a file of tests
that all need torch can be left out before it imports torch.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

HELPERS = Path(__file__).parent
TESTS = HELPERS.parent
MARKERS = {
    "torch": "computes with torch or transformers",
    "ray": "starts a Ray cluster",
    "browser": "opens a page in Chromium",
    "server": "starts a server of an object store or of the Hub",
    "kill": "kills processes, or runs one for each point where it could be killed",
    "slow": "takes more than a second",
}
_OF_MODULE = {"torch": "torch", "transformers": "torch", "ray": "ray", "playwright": "browser"}
_OF_HELPER = {"chromium": {"browser"}, "ray_run": {"ray"}, "hub_stub": {"server"}}
_KILLS = {"kill", "send_signal", "SIGKILL"}


class Module:
    """A file's imports, functions and constants, by the names that they have in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.defined: dict[str, ast.AST] = {}
        self.imported: dict[str, tuple[str, str | None]] = {}
        self.classes: list[ast.ClassDef] = []
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.defined[node.name] = node
                if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
                    self.classes.append(node)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                self.imported.update(_imports(node))
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    names = (part for part in ast.walk(target) if isinstance(part, ast.Name))
                    self.defined.update({name.id: node for name in names})

    def tests(self) -> Iterator[str]:
        """The test functions, and the classes of tests, whose methods need what the class does."""
        for name, node in self.defined.items():
            if name.startswith("test") and isinstance(node, ast.FunctionDef):
                yield name
        yield from (node.name for node in self.classes)

    def autouse(self) -> Iterator[str]:
        """The fixtures that every test of the file gets."""
        for name, node in self.defined.items():
            decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
            calls = (decorator for decorator in decorators if isinstance(decorator, ast.Call))
            if any(keyword.arg == "autouse" for call in calls for keyword in call.keywords):
                yield name


@dataclass
class Uses:
    """What one function or constant uses: markers, and names of this file and of others."""

    markers: set[str] = field(default_factory=set)
    names: set[tuple[Path, str]] = field(default_factory=set)


@cache
def module(path: Path) -> Module:
    return Module(path)


@cache
def needs(path: Path, test: str) -> frozenset[str]:
    """The markers of a test by its file and the name of its function, or of its class."""
    markers = {"slow"} if path.parent.name == "fuzz" else set()
    waiting = [(path, name) for name in (test, *module(path).autouse())]
    seen = set(waiting)
    while waiting:
        uses = _uses(*waiting.pop())
        markers |= uses.markers
        waiting += uses.names - seen
        seen |= uses.names
    return frozenset(markers)


def all_tests_need(path: Path) -> bool:
    """Whether a file has tests, and each of them has a marker."""
    tests = list(module(path).tests())
    return bool(tests) and all(needs(path, test) for test in tests)


@cache
def _uses(path: Path, name: str) -> Uses:
    where, uses = module(path), Uses()
    if name in where.imported:
        _import(uses, *where.imported[name])
    code = where.defined.get(name)
    if code is None:
        return uses
    functions = code.body if isinstance(code, ast.ClassDef) else [code]
    for function in functions:
        if isinstance(function, ast.FunctionDef):
            uses.names.update(_fixture(where, argument.arg) for argument in function.args.args)
    for node in _without_annotations(code):
        if isinstance(node, ast.Name):
            uses.names.add((path, node.id))
        elif isinstance(node, ast.Attribute):
            if node.attr in _KILLS:
                uses.markers.add("kill")
            if isinstance(node.value, ast.Name) and node.value.id in where.imported:
                source, attribute = where.imported[node.value.id]
                _import(uses, source, node.attr if attribute is None else attribute)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for source, attribute in _imports(node).values():
                _import(uses, source, attribute)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value == "--logits":  # of a command
                uses.markers.add("torch")
            program = HELPERS / node.value
            if node.value.endswith(".py") and program.is_file():  # run in a process of its own
                uses.markers |= _of_file_name(program)
                uses.names.update((program, part) for part in module(program).defined)
    return uses


def _fixture(where: Module, name: str) -> tuple[Path, str]:
    """A fixture of the file itself, or of the conftest.py files beside and above it."""
    folders = where.path.parents if TESTS in where.path.parents else ()
    for folder in (folder for folder in folders if folder.is_relative_to(TESTS)):
        conftest = folder / "conftest.py"
        if name in where.defined or name in where.imported:
            break
        if conftest.is_file() and name in module(conftest).defined:
            return conftest, name
    return where.path, name


def _import(uses: Uses, source: str, attribute: str | None) -> None:
    root = source.partition(".")[0]
    if root in _OF_MODULE:
        uses.markers.add(_OF_MODULE[root])
    if source == "safetensors.torch":
        uses.markers.add("torch")
    helper = HELPERS / f"{source}.py"
    if helper.is_file():
        uses.markers |= _of_file_name(helper)
        if attribute is not None:
            uses.names.add((helper, attribute))


def _of_file_name(helper: Path) -> set[str]:
    """What helpers need whose names say so."""
    if helper.stem.endswith("_server"):
        return {"server"}
    if helper.stem.startswith("crash_"):
        return {"kill"}
    return _OF_HELPER.get(helper.stem, set())


def _imports(node: ast.Import | ast.ImportFrom) -> dict[str, tuple[str, str | None]]:
    """Each name that an import binds: the module, and what of it."""
    if isinstance(node, ast.Import):
        return {
            alias.asname or alias.name.partition(".")[0]: (alias.name, None) for alias in node.names
        }
    return {alias.asname or alias.name: (node.module or "", alias.name) for alias in node.names}


def _without_annotations(code: ast.AST) -> Iterator[ast.AST]:
    """The nodes below one, but those of type annotations, which name torch.Tensor and the like."""
    waiting = [code]
    while waiting:
        for name, value in ast.iter_fields(waiting.pop()):
            if name not in ("annotation", "returns"):
                nodes = value if isinstance(value, list) else [value]
                nodes = [node for node in nodes if isinstance(node, ast.AST)]
                waiting += nodes
                yield from nodes
