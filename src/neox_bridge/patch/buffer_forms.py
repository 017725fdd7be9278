"""Finds where a GPT-NeoX source stores computed buffers, and whether the code has a known form.

Known from every version of megatron/model/positional_embeddings.py between 2021-04 and
2026-05: ``__init__`` of a module computes ``inv_freq`` or ``slopes`` and registers it by
``self.register_buffer("inv_freq", inv_freq)``, in RotaryEmbedding since neox-inv-freq with
``persistent=save_inv_freqs``.
"""

from collections.abc import Iterator

import libcst as cst
import libcst.matchers as m
from libcst.metadata import MetadataWrapper, PositionProvider

from neox_bridge.errors import Refused
from neox_bridge.patch.places import BUFFERS, HOOK, Place

_TORCH_HOOKS = (
    "_load_from_state_dict",
    "_register_load_state_dict_pre_hook",
    "register_load_state_dict_pre_hook",
)


def parse(path: str, source: bytes) -> cst.Module:
    """The syntax tree of a file. Raises Refused if it cannot be parsed."""
    try:
        return cst.parse_module(source)
    except (cst.ParserSyntaxError, UnicodeDecodeError, SyntaxError, LookupError) as error:
        reason = " ".join(str(error).split())
        raise Refused(f"{path} cannot be parsed ({reason}), so nothing was patched.") from None


def find_places(path: str, module: cst.Module) -> list[Place]:
    """Every place of a file, in its order."""
    wrapper = MetadataWrapper(module, unsafe_skip_copy=True)
    positions = wrapper.resolve(PositionProvider)
    places = []
    for owner, node, buffer in _mentions(wrapper.module, None):
        unknown, persistent = _judge(wrapper.module, owner, node, buffer)
        name = owner.name.value if owner is not None else "no class"
        hooked = owner is not None and is_hooked(owner)
        line = positions[node].start.line
        places.append(Place(path, line, name, buffer, persistent, hooked, unknown))
    return places


def registers(node: cst.CSTNode) -> str | None:
    """The name of the buffer if this is a ``….register_buffer(…)`` of ours; "?" if it's no text."""
    if not m.matches(node, m.Call(func=m.Attribute(attr=m.Name("register_buffer")))):
        return None
    assert isinstance(node, cst.Call)
    named = [a for a in node.args if a.keyword is None or a.keyword.value == "name"]
    literal = named[0].value if named else None
    if isinstance(literal, cst.SimpleString):
        value = literal.evaluated_value
        return str(value) if value in BUFFERS else None
    return "?"


def is_hooked(owner: cst.ClassDef) -> bool:
    """Whether a class calls the hook that the patch puts in."""
    return bool(m.findall(owner, m.Call(func=m.Name(HOOK))))


def _mentions(
    node: cst.CSTNode, owner: cst.ClassDef | None
) -> Iterator[tuple[cst.ClassDef | None, cst.Call | cst.Assign, str]]:
    """Calls that register, and assignments to ``self.inv_freq``, with the class around them."""
    owner = node if isinstance(node, cst.ClassDef) else owner
    if (buffer := registers(node)) is not None:
        assert isinstance(node, cst.Call)
        yield owner, node, buffer
    elif isinstance(node, cst.Assign):
        for target in node.targets:
            attribute = target.target
            if isinstance(attribute, cst.Attribute) and attribute.attr.value in BUFFERS:
                yield owner, node, attribute.attr.value
    for child in node.children:
        yield from _mentions(child, owner)


def _judge(
    module: cst.Module, owner: cst.ClassDef | None, node: cst.Call | cst.Assign, buffer: str
) -> tuple[str, str]:
    """Why a place has no known form, or ""; and the code of its persistent argument."""
    if isinstance(node, cst.Assign):
        return "is assigned, not registered", ""
    if buffer == "?":
        return "registers a buffer whose name is not a literal", ""
    keywords = {a.keyword.value: a.value for a in node.args if a.keyword is not None}
    persistent = module.code_for_node(keywords["persistent"]) if "persistent" in keywords else ""
    return _unknown_form(module, owner, node, buffer, set(keywords)), persistent


def _unknown_form(
    module: cst.Module,
    owner: cst.ClassDef | None,
    call: cst.Call,
    buffer: str,
    keywords: set[str],
) -> str:
    """Why a call has no known form, or ""."""
    if owner is None or not _in_init(owner, call):
        return "is not a separate statement in the __init__ of a class"
    names = [node.name.value for node in module.body if isinstance(node, cst.ClassDef)]
    if owner not in module.body or names.count(owner.name.value) != 1:
        return f"{owner.name.value} is not the only class of that name at the top level of the file"
    if not m.matches(call.func, m.Attribute(value=m.Name("self"))):
        return "is not registered on self"
    plain = [a for a in call.args if a.keyword is None and not a.star]
    others = keywords - {"persistent"} or len(plain) + len(keywords) != len(call.args)
    if len(plain) != 2 or others:
        return "has arguments other than a name, a value and persistent="
    if not m.matches(plain[1].value, m.Name(buffer)):
        return f"its value is not computed as {buffer} in __init__"
    bases = [module.code_for_node(base.value).rpartition(".")[2] for base in owner.bases]
    if not any(base.endswith("Module") for base in bases):
        return f"{owner.name.value} is not a subclass of torch.nn.Module"
    if not is_hooked(owner) and any(hook in module.code_for_node(owner) for hook in _TORCH_HOOKS):
        return f"{owner.name.value} has its own load hook"
    if not any(_imports_torch(line) for line in module.body):
        return "its file does not import torch under that name"
    return ""


def _in_init(owner: cst.ClassDef, call: cst.Call) -> bool:
    """Whether the call is a statement of ``__init__`` itself, under no condition or loop."""
    return any(
        isinstance(small, cst.Expr) and small.value is call
        for function in owner.body.body
        if isinstance(function, cst.FunctionDef) and function.name.value == "__init__"
        for line in function.body.body
        if isinstance(line, cst.SimpleStatementLine)
        for small in line.body
    )


def _imports_torch(line: cst.BaseStatement) -> bool:
    return any(
        alias.asname is None and alias.evaluated_name.split(".")[0] == "torch"
        for small in (line.body if isinstance(line, cst.SimpleStatementLine) else ())
        if isinstance(small, cst.Import)
        for alias in small.names
    )
