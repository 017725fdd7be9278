"""What a mutant changes: cosmic-ray's operators, and two that delete what a reader can overlook."""

import re
from collections.abc import Iterator
from typing import Any

import cosmic_ray.plugins
import parso
from cosmic_ray.ast import ast_nodes
from cosmic_ray.operators.operator import Operator

# Excluded: removing a decorator breaks a dataclass at import. A comparison becomes another one that
# a programmer could have meant, not `is`; arithmetic becomes other arithmetic, not a shift.
_EXCLUDED = re.compile(
    r"core/(RemoveDecorator|VariableReplacer|VariableInserter"
    r"|ReplaceComparisonOperator_(?!Is)\w+?_Is(Not)?"
    r"|ReplaceBinaryOperator_(\w+_)?(BitOr|BitAnd|BitXor|RShift|LShift|Pow|Mod)(_\w+)?)"
)


class DeleteStatement(Operator):
    """Replaces a call whose result is unused, or a ``raise``, by ``pass``: a lost fsync."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        """Yields the position of each such statement."""
        if _is_statement(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, _index: int) -> Any:
        """Returns ``pass`` with the statement's own indentation."""
        leaf = node.get_first_leaf()
        return parso.parse(f"{leaf.prefix}pass")

    @classmethod
    def examples(cls) -> tuple[()]:
        """Required by the base class."""
        return ()


class DeleteKeyword(Operator):
    """Removes one keyword argument of a call: a lost ``follow_symlinks=False``."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        """Yields the position of each keyword argument."""
        for _, argument in _keywords(node):
            yield argument.start_pos, argument.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        """Removes the argument and the comma that precedes it, or else the one that follows."""
        at, argument = list(_keywords(node))[index]
        if node.type == "arglist":
            first = at - 1 if at else at
            del node.children[first : first + 2]
        else:
            node.children.remove(argument)
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        """Required by the base class."""
        return ()


def _is_statement(node: Any) -> bool:
    parent = node.parent
    if parent is None or parent.type != "simple_stmt":
        return False
    if node.type == "raise_stmt":
        return True
    is_call = node.type == "atom_expr" and getattr(node.children[-1], "type", "") == "trailer"
    return bool(is_call and node.children[-1].children[0] == "(")


def _keywords(node: Any) -> Iterator[tuple[int, Any]]:
    """The keyword arguments directly below an argument list or a call's parentheses."""
    if node.type not in ("arglist", "trailer") or (
        node.type == "trailer" and node.children[0] != "("
    ):
        return
    for at, child in enumerate(node.children):
        if child.type == "argument" and len(child.children) == 3 and child.children[1] == "=":
            yield at, child


def operators() -> list[tuple[str, Operator]]:
    """All operators by name; those with one family of changes share the part before ``_``."""
    names = [name for name in cosmic_ray.plugins.operator_names() if not _EXCLUDED.fullmatch(name)]
    ours = [("ours/DeleteStatement", DeleteStatement()), ("ours/DeleteKeyword", DeleteKeyword())]
    return [(name, cosmic_ray.plugins.get_operator(name)()) for name in names] + ours


def positions(operator: Operator, tree: Any) -> list[tuple[Any, Any]]:
    """Where an operator can change a module, in the order of cosmic-ray's occurrences."""
    return [
        (start, end) for node in ast_nodes(tree) for start, end in operator.mutation_positions(node)
    ]
