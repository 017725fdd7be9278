"""Every message of the package, read from its source: errors, findings, and what is left out.

A message is written where an exception, a ``Finding`` or a ``Dropped`` is constructed. Where a
function such as ``unexpected`` builds the exception around a text of its caller, each call of it is
a message. A message is known by its module, its function and its words, and never by a line.
"""

import ast
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "neox_bridge"
PART = "part of a message"
FINDING = "finding"
LEFT_OUT = "left out"
# the classes that reach a user; subclasses follow from the source
_ROOTS = {
    "BridgeError": 1,
    "PickleError": PART,  # another error quotes it, with the file's name
    "ZipError": PART,
    "BadParameter": 2,
    "Interrupted": 130,
    "Finding": FINDING,
    "Dropped": LEFT_OUT,
}
_PLACEHOLDER = re.compile(r"\{[^{}]*\}")
_SENTENCE = re.compile(r"\S \S")
_SHOW = ("some", "join", "repr", "str", "list", "sorted", "human", "plural", "map", "quote", "dict")
_Scope = ast.FunctionDef | ast.ClassDef
_MOST_LEVELS = 3  # of helpers that call helpers, and of names inside names


@dataclass(frozen=True)
class Message:
    """A place in the source that constructs a message.

    Attributes:
        module: The file, relative to the package.
        function: The function's qualified name.
        name: The class, such as ``Refused``.
        result: The exit code of an error; ``FINDING``, ``LEFT_OUT`` or ``PART`` for others.
        words: The text, with ``{placeholders}`` for what is filled in.
        end: Where its call ends in the file, as line and column; only to recognize it as it runs.
        code: A finding's code; empty where it is computed.
        severity: A finding's severity; empty where it is computed.
    """

    module: str
    function: str
    name: str
    result: int | str
    words: str
    end: tuple[int, int] = field(compare=False)
    code: str = ""
    severity: str = ""

    @property
    def key(self) -> str:
        words = hashlib.sha256(f"{self.name} {self.words}".encode()).hexdigest()[:8]
        return f"{self.place}#{words}"

    @property
    def place(self) -> str:
        return f"{self.module}:{self.function}"


@dataclass
class _Call:
    node: ast.Call
    module: str
    functions: tuple[_Scope, ...]  # that it is inside of, outermost first


@dataclass
class _Helper:
    """A function that returns a message: what it constructs, and the names of its parameters."""

    node: ast.FunctionDef
    module: str
    parameters: Sequence[str]
    is_method: bool
    calls: list[_Call] = field(default_factory=list)
    takes_text: bool = False


class Package:
    """The messages of a package, and its calls that construct one, for ``message_record``."""

    def __init__(self, folder: Path = PACKAGE) -> None:
        self.folder = folder
        self.trees = {
            path.relative_to(folder).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
            for path in sorted(folder.rglob("*.py"))
        }
        self._results = self._classes()
        self._helpers: dict[str, list[_Helper]] = {}
        for module, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef) and self._returned(node):
                    parameters = [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
                    is_method = any(arg.arg == "self" for arg in node.args.args)
                    parameters = [name for name in parameters if name != "self"]
                    helper = _Helper(node, module, parameters, is_method)
                    self._helpers.setdefault(node.name, []).append(helper)
        calls = [call for module in self.trees for call in self._calls(module)]
        for call in calls:
            helper = self._helper(call)
            if helper and any(_is_sentence(node) for node in call.node.args):
                helper.takes_text = True
        self.inner: set[tuple[str, tuple[int, int]]] = set()  # of helpers: the caller decides
        outer = []
        for call in calls:
            around = self._inside(call)
            helper = self._helper(call)
            if around is not None and (self._name(call) or (helper and helper.takes_text)):
                around.calls.append(call)
                self.inner.add((call.module, _end(call.node)))
            elif self._name(call) or (helper and helper.takes_text):
                outer.append(call)
        messages = [self._message(call) for call in outer]
        self.by_end = {(one.module, one.end): one for one in messages}
        self.messages: Mapping[str, Message] = {one.key: one for one in messages}

    def _classes(self) -> dict[str, int | str]:
        results: dict[str, int | str] = dict(_ROOTS)
        nodes = [n for tree in self.trees.values() for n in ast.walk(tree)]
        classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
        for _ in range(4):  # subclasses of subclasses
            for node in classes:
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                if node.name not in _ROOTS and (
                    base := next((b for b in bases if b in results), "")
                ):
                    results[node.name] = _exit_code(node) or results[base]
        return results

    def _returned(self, node: ast.FunctionDef) -> str:
        """The message class that a function returns; not one among others."""
        returns = node.returns
        if isinstance(returns, ast.BinOp) and ast.unparse(returns.right) == "None":
            returns = returns.left
        name = returns.id if isinstance(returns, ast.Name) else ""
        return name if name in self._results else ""

    def _calls(self, module: str) -> Iterator[_Call]:
        def walk(node: ast.AST, inside: tuple[_Scope, ...]) -> Iterator[_Call]:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.FunctionDef | ast.ClassDef):
                    yield from walk(child, (*inside, child))
                else:
                    if isinstance(child, ast.Call):
                        yield _Call(child, module, inside)
                    yield from walk(child, inside)

        yield from walk(self.trees[module], ())

    def _name(self, call: _Call) -> str:
        """The class that a call constructs; empty for other calls.

        ``Finding(**fields)`` is another call: it restores a finding that was constructed elsewhere.
        """
        function = call.node.func
        if not call.node.args and all(keyword.arg is None for keyword in call.node.keywords):
            return ""
        if isinstance(function, ast.IfExp):  # (Unreachable if unanswered else BridgeError)(words)
            function = function.body
        if isinstance(function, ast.Call):
            return "BridgeError" if ast.unparse(function) == "type(error)" else ""
        if isinstance(function, ast.Attribute):  # click.BadParameter
            return function.attr if function.attr in ("BadParameter",) else ""
        name = function.id if isinstance(function, ast.Name) else ""
        return name if name in self._results else ""

    def _helper(self, call: _Call) -> _Helper | None:
        function = call.node.func
        name = getattr(function, "id", "") or getattr(function, "attr", "")
        is_name = isinstance(function, ast.Name)
        helpers = [h for h in self._helpers.get(name, []) if h.is_method != is_name]
        same = [helper for helper in helpers if helper.module == call.module]
        if same or name.startswith("_"):
            return same[0] if same else None
        return helpers[0] if len(helpers) == 1 else None

    def _inside(self, call: _Call) -> _Helper | None:
        """The helper around a call, if its callers give it text."""
        helpers = [h for group in self._helpers.values() for h in group if h.takes_text]
        nodes = {id(helper.node): helper for helper in helpers}
        return next((nodes[id(node)] for node in call.functions if id(node) in nodes), None)

    def _message(self, call: _Call) -> Message:
        name = self._name(call)
        helper = None if name else self._helper(call)
        if helper:
            name = self._returned(helper.node)
        code = severity = ""
        is_finding = self._results[name] == FINDING
        if is_finding:
            given = _arguments(call.node, ("code", "severity"))
            code, severity = (
                "" if node is None or "{" in (text := _words(node, call, self)) else text
                for node in given
            )
        function = ".".join(node.name for node in call.functions) or "<module>"
        words = " ".join(self._text(call).split())
        result = self._results[name]
        return Message(call.module, function, name, result, words, _end(call.node), code, severity)

    def _text(self, call: _Call, level: int = 0) -> str:
        """The words of a call that constructs a message, or of a helper with its caller's words."""
        name = self._name(call)
        arguments = call.node.args
        if name == "UsageError":
            names = _words(arguments[0], call, self)
            rest = [_words(node, call, self) for node in arguments[1:]]
            return f"{names}: {rest[0]}.{f' {rest[1]}' if len(rest) > 1 else ''}"
        if name and self._results[name] == FINDING:
            *_, message, remedy = _arguments(call.node, ("code", "severity", "message", "remedy"))
            parts = [_words(node, call, self) for node in (message, remedy) if node is not None]
            return ". ".join(parts)
        if name == "Dropped":
            return ": ".join(_words(node, call, self) for node in arguments[:2])
        if name == "ChoiceNeeded":
            return _words(arguments[0], call, self)
        if name:
            return _words(arguments[0], call, self) if arguments else "{}"
        helper = self._helper(call)
        if helper is None or level > _MOST_LEVELS or not helper.calls:
            return "{" + ast.unparse(call.node) + "}"
        text = " / ".join(dict.fromkeys(self._text(inner, level + 1) for inner in helper.calls))
        given = dict(zip(helper.parameters, arguments, strict=False))
        given |= {keyword.arg: keyword.value for keyword in call.node.keywords if keyword.arg}
        for parameter, node in given.items():
            text = text.replace("{" + parameter + "}", _words(node, call, self))
        return text


@cache
def package() -> Package:
    return Package()


def _exit_code(node: ast.ClassDef) -> int | None:
    for statement in node.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "exit_code":
            return int(ast.unparse(statement.value))
    return None


def _end(node: ast.Call) -> tuple[int, int]:
    return node.end_lineno or 0, node.end_col_offset or 0


def _arguments(node: ast.Call, names: Sequence[str]) -> list[ast.expr | None]:
    """The arguments of a call by the names of its parameters; None where one is not given."""
    given: dict[str | None, ast.expr] = dict(zip(names, node.args, strict=False))
    given |= {keyword.arg: keyword.value for keyword in node.keywords}
    return [given.get(name) for name in names]


def _is_sentence(node: ast.expr) -> bool:
    """Whether an argument is a text of several words, and no key or path."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and bool(_SENTENCE.search(node.value))
    if isinstance(node, ast.JoinedStr):
        return any(map(_is_sentence, node.values))
    return isinstance(node, ast.IfExp) and (_is_sentence(node.body) or _is_sentence(node.orelse))


def _words(node: ast.expr, call: _Call, package: Package, level: int = 0) -> str:
    """An expression as a text with placeholders; names that stand for one text are filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_words(part, call, package, level) for part in node.values)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "Command":
        return _words(node.args[0], call, package, level)
    if isinstance(node, ast.FormattedValue):
        return _words(node.value, call, package, level)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return "".join(_words(part, call, package, level) for part in (node.left, node.right))
    if isinstance(node, ast.IfExp):
        parts = [_words(part, call, package, level) for part in (node.body, node.orelse)]
        if any(_SENTENCE.search(part) and not part.startswith("{") for part in parts):
            return "[" + " | ".join(parts) + "]"
    if isinstance(node, ast.List | ast.Tuple):
        return ", ".join(_words(part, call, package, level) for part in node.elts)
    if isinstance(node, ast.Name) and level < _MOST_LEVELS:
        values = _assigned(node.id, call, package)
        texts = [_words(value, call, package, level + 1) for value in values]
        texts = list(dict.fromkeys(texts))
        are_sentences = all(_SENTENCE.search(text) or not text for text in texts)
        if texts and are_sentences and not any(map(_PLACEHOLDER.fullmatch, texts)):
            return texts[0] if len(texts) == 1 else "[" + " | ".join(texts) + "]"
    return "{" + _placeholder(node) + "}"


def _placeholder(node: ast.expr) -> str:
    """A short name for what is filled in."""
    if isinstance(node, ast.Name | ast.Attribute):
        return node.id if isinstance(node, ast.Name) else node.attr
    if isinstance(node, ast.Subscript):
        key = node.slice.value if isinstance(node.slice, ast.Constant) else ""
        return key if isinstance(key, str) and key else _placeholder(node.value)
    if isinstance(node, ast.Call):
        name = _placeholder(node.func).strip("_")
        if name == "len":
            return f"number of {_placeholder(node.args[0])}"
        return _placeholder(node.args[0]) if name in _SHOW and node.args else name
    if isinstance(node, ast.GeneratorExp | ast.ListComp | ast.SetComp):
        return _placeholder(node.generators[0].iter)
    operand = getattr(node, "operand", None) or getattr(node, "left", None)
    return _placeholder(operand) if operand else "…"


def _assigned(name: str, call: _Call, package: Package) -> list[ast.expr]:
    """What a name can be where a call uses it: in the function around it, or in its module."""
    functions = [node for node in call.functions if isinstance(node, ast.FunctionDef)]
    for function in reversed(functions):
        if name in [argument.arg for argument in function.args.args + function.args.kwonlyargs]:
            return []
        if values := _reaching(name, function.body, call.node.lineno):
            return values
    return [v for statement in package.trees[call.module].body for v in _values(name, statement)]


def _reaching(name: str, block: Sequence[ast.stmt], line: int) -> list[ast.expr]:
    """The values that reach a line: of the last statement before it that assigns the name.

    Where that is conditional, those before it too.
    """
    values: list[ast.expr] = []
    before = [statement for statement in block if statement.lineno <= line]
    for statement in reversed(before):
        if (statement.end_lineno or 0) >= line:  # the call is inside
            inner = [b for n in ("body", "orelse", "finalbody") if (b := getattr(statement, n, []))]
            inner += [handler.body for handler in getattr(statement, "handlers", [])]
            for part in inner:
                if part[0].lineno <= line <= (part[-1].end_lineno or 0):
                    values = _reaching(name, part, line)
        else:
            values = [*_values(name, statement), *values]
        is_conditional = isinstance(statement, ast.If) and not statement.orelse
        if values and not is_conditional:
            break
    return values


def _values(name: str, statement: ast.stmt) -> list[ast.expr]:
    return [
        node.value
        for node in ast.walk(statement)
        if isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
    ]
