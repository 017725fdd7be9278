"""What the patch changes in one source; everything else keeps its bytes (libcst)."""

from importlib.resources import files

import libcst as cst

from neox_bridge.patch.buffer_forms import registers
from neox_bridge.patch.places import HOOK, MARK, Place

_METHOD = f"""\
def _load_from_state_dict(self, state_dict, prefix, *rest):
    {HOOK}(self, "BUFFER", state_dict, prefix, rest[-1])
    super()._load_from_state_dict(state_dict, prefix, *rest)
"""


def hook_source() -> str:
    """The functions that go into the file: patch/load_hook.py below its marker."""
    text = files("neox_bridge.patch").joinpath("load_hook.py").read_text(encoding="utf-8")
    return text[text.index(f"{MARK} put this here") :]


def edited(module: cst.Module, places: list[Place]) -> bytes:
    """The file with the changes at these places, which are of known forms."""
    buffers = {place.owner: place.buffer for place in places}
    body = list(module.body)
    first = next(i for i, node in enumerate(body) if _owner(node) in buffers)
    for i, node in enumerate(body):
        if isinstance(node, cst.ClassDef) and _owner(node) in buffers:
            body[i] = _with_hook(module, node, buffers[node.name.value])
    body[first:first] = _helpers(module)
    return module.with_changes(body=body).bytes


def _owner(node: cst.CSTNode) -> str:
    return node.name.value if isinstance(node, cst.ClassDef) else ""


def _helpers(module: cst.Module) -> list[cst.SimpleStatementLine | cst.BaseCompoundStatement]:
    source = hook_source().replace("\n", module.default_newline)
    parsed = cst.parse_module(source, module.config_for_parsing)
    first = parsed.body[0]
    blank = [cst.EmptyLine(indent=False)] * 2
    leading = [*blank, *parsed.header]
    return [first.with_changes(leading_lines=leading), *parsed.body[1:]]


def _with_hook(module: cst.Module, owner: cst.ClassDef, buffer: str) -> cst.ClassDef:
    """The class with ``persistent=False`` where it was missing, and the hook after __init__."""
    text = _METHOD.replace("BUFFER", buffer)
    method = cst.parse_statement(text, module.config_for_parsing)
    comment = cst.EmptyLine(comment=cst.Comment(f"{MARK} put this method here"))
    method = method.with_changes(leading_lines=[cst.EmptyLine(indent=False), comment])
    body: list[cst.BaseStatement | cst.BaseSmallStatement] = []
    for node in owner.body.body:
        if isinstance(node, cst.FunctionDef) and node.name.value == "__init__":
            lines = [_not_stored(line) for line in node.body.body]
            body.append(node.with_changes(body=node.body.with_changes(body=lines)))
            body.append(method)
        else:
            body.append(node)
    return owner.with_changes(body=owner.body.with_changes(body=body))


def _not_stored(line: cst.CSTNode) -> cst.CSTNode:
    """A statement of __init__, with ``persistent=False`` if it registers a buffer without it."""
    if not isinstance(line, cst.SimpleStatementLine):
        return line
    small = list(line.body)
    for i, node in enumerate(small):
        if isinstance(node, cst.Expr) and registers(node.value):
            call = node.value
            assert isinstance(call, cst.Call)
            if all(a.keyword is None or a.keyword.value != "persistent" for a in call.args):
                small[i] = node.with_changes(value=_with_argument(call))
    if small == list(line.body):
        return line
    line = line.with_changes(body=small)
    if line.trailing_whitespace.comment is not None:
        return line
    end = line.trailing_whitespace.with_changes(
        whitespace=cst.SimpleWhitespace("  "), comment=cst.Comment(MARK)
    )
    return line.with_changes(trailing_whitespace=end)


def _with_argument(call: cst.Call) -> cst.Call:
    """``persistent=False`` last, spaced as the arguments before it."""
    *_, before, last = call.args
    none = cst.SimpleWhitespace("")
    here, end = before.comma, last.comma
    if isinstance(here, cst.Comma) and isinstance(end, cst.Comma):  # one argument a line
        between, closing = here.whitespace_after, end.whitespace_after
        if isinstance(between, cst.ParenthesizedWhitespace) and isinstance(
            closing, cst.ParenthesizedWhitespace
        ):
            # a comment stays beside the argument before
            between = between.with_changes(first_line=closing.first_line)
            here = here.with_changes(whitespace_after=between)
            plain = closing.first_line.with_changes(comment=None, whitespace=none)
            end = end.with_changes(whitespace_after=closing.with_changes(first_line=plain))
    more = cst.Arg(
        cst.Name("False"),
        keyword=cst.Name("persistent"),
        equal=cst.AssignEqual(none, none),
        comma=end,
        whitespace_after_arg=last.whitespace_after_arg,
    )
    last = last.with_changes(comma=here, whitespace_after_arg=none)
    return call.with_changes(args=[*call.args[:-1], last, more])
