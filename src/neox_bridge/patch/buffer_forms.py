"""Where a GPT-NeoX source stores buffers that it computes, and whether the form is a known one.

Known from every version of megatron/model/positional_embeddings.py between 2021-04 and
2026-05: ``__init__`` of a module computes ``inv_freq`` or ``slopes`` and registers it by
``self.register_buffer("inv_freq", inv_freq)``, in RotaryEmbedding since neox-inv-freq with
``persistent=save_inv_freqs``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neox_bridge.errors import BridgeError, Refused

if TYPE_CHECKING:
    import libcst as cst

BUFFERS = ("inv_freq", "slopes")
HOME = "megatron/model/positional_embeddings.py"
HOOK = "_neox_bridge_load"
_TORCH_HOOKS = (
    "_load_from_state_dict",
    "_register_load_state_dict_pre_hook",
    "register_load_state_dict_pre_hook",
)


@dataclass(frozen=True, slots=True)
class Place:
    """A line that stores a buffer. unknown: why its form isn't a known one, or nothing.

    persistent: the code of that argument, nothing where there is none.
    hooked: the class has the load hook of this patch already.
    """

    path: str
    line: int
    owner: str
    buffer: str
    persistent: str = ""
    hooked: bool = False
    unknown: str = ""

    def __str__(self) -> str:
        what = f"{self.path}:{self.line} ({self.owner}: {self.buffer})"
        return f"{what}: {self.unknown}" if self.unknown else what


def concerned(source: bytes) -> bool:
    """Whether a file can hold such a place; a cheap look before it is parsed."""
    return b"inv_freq" in source or (b"slopes" in source and b"register_buffer" in source)


def parse(path: str, source: bytes) -> "cst.Module":
    """A file's syntax tree. Raises Refused where it has none."""
    try:
        import libcst
    except ImportError:
        raise BridgeError("patch needs libcst: pip install 'neox-bridge[patch]'") from None
    try:
        return libcst.parse_module(source)
    except (libcst.ParserSyntaxError, UnicodeDecodeError, SyntaxError, LookupError) as error:
        reason = " ".join(str(error).split())
        raise Refused(f"{path} can't be parsed ({reason}), so nothing was patched.") from None


def find_places(path: str, module: "cst.Module") -> list[Place]:
    """Every place of a file, in its order."""
    from libcst.metadata import MetadataWrapper, PositionProvider

    wrapper = MetadataWrapper(module, unsafe_skip_copy=True)
    positions = wrapper.resolve(PositionProvider)
    places = []
    for owner, node, buffer in _mentions(wrapper.module):
        line = positions[node].start.line
        unknown, persistent = _judge(wrapper.module, owner, node, buffer)
        name = owner.name.value if owner is not None else "no class"
        hooked = owner is not None and is_hooked(owner)
        places.append(Place(path, line, name, buffer, persistent, hooked, unknown))
    return places


def registers(node: "cst.CSTNode") -> str | None:
    """The name of the buffer if this is a ``….register_buffer(…)`` of ours; "?" if it's no text."""
    import libcst as cst

    if not isinstance(node, cst.Call) or not isinstance(node.func, cst.Attribute):
        return None
    if node.func.attr.value != "register_buffer":
        return None
    named = [a for a in node.args if a.keyword is None or a.keyword.value == "name"]
    literal = named[0].value if named else None
    if isinstance(literal, cst.SimpleString):
        value = literal.evaluated_value
        return str(value) if value in BUFFERS else None
    return "?"


def is_hooked(owner: "cst.ClassDef") -> bool:
    """Whether a class calls the hook that the patch puts in."""
    import libcst.matchers as m

    return bool(m.findall(owner, m.Call(func=m.Name(HOOK))))


def _mentions(
    module: "cst.Module",
) -> Iterator[tuple["cst.ClassDef | None", "cst.Call | cst.Assign", str]]:
    """Calls that register, and assignments to ``self.inv_freq``, with the class around them."""
    import libcst as cst

    def walk(
        node: cst.CSTNode, owner: cst.ClassDef | None
    ) -> Iterator[tuple[cst.ClassDef | None, cst.Call | cst.Assign, str]]:
        if isinstance(node, cst.ClassDef):
            owner = node
        buffer = registers(node)
        if buffer is not None:
            assert isinstance(node, cst.Call)
            yield owner, node, buffer
        elif isinstance(node, cst.Assign):
            for target in node.targets:
                attribute = target.target
                if isinstance(attribute, cst.Attribute) and attribute.attr.value in BUFFERS:
                    yield owner, node, attribute.attr.value
        for child in node.children:
            yield from walk(child, owner)

    yield from walk(module, None)


def _judge(
    module: "cst.Module", owner: "cst.ClassDef | None", node: "cst.Call | cst.Assign", buffer: str
) -> tuple[str, str]:
    """Why a place isn't of a known form, or nothing; and the code of its persistent argument."""
    import libcst as cst

    if isinstance(node, cst.Assign):
        return "is assigned, not registered", ""
    if buffer == "?":
        return "registers a buffer whose name isn't written out", ""
    given = {a.keyword.value: a for a in node.args if a.keyword is not None}
    persistent = module.code_for_node(given["persistent"].value) if "persistent" in given else ""
    return _call_is_unknown(module, owner, node, buffer, set(given)), persistent


def _call_is_unknown(
    module: "cst.Module",
    owner: "cst.ClassDef | None",
    call: "cst.Call",
    buffer: str,
    keywords: set[str],
) -> str:
    import libcst as cst

    plain = [a for a in call.args if a.keyword is None and not a.star]
    if owner is None or not _in_init(owner, call):
        return "isn't a statement of its own in the __init__ of a class"
    names = [node.name.value for node in module.body if isinstance(node, cst.ClassDef)]
    if owner not in module.body or names.count(owner.name.value) != 1:
        return f"{owner.name.value} isn't the only class of that name at the file's top level"
    if not isinstance(call.func, cst.Attribute) or not _is_name(call.func.value, "self"):
        return "isn't registered on self"
    if len(plain) != 2 or len(plain) + len(keywords) != len(call.args):
        return "has other arguments than a name, a value and persistent="
    if keywords - {"persistent"}:
        return "has other arguments than a name, a value and persistent="
    if not _is_name(plain[1].value, buffer):
        return f"its value isn't computed as {buffer} in __init__"
    bases = [module.code_for_node(base.value).rpartition(".")[2] for base in owner.bases]
    if not any(base.endswith("Module") for base in bases):
        return f"{owner.name.value} isn't a subclass of torch.nn.Module"
    if not is_hooked(owner) and any(hook in module.code_for_node(owner) for hook in _TORCH_HOOKS):
        return f"{owner.name.value} has a load hook of its own"
    if not _imports_torch(module):
        return "its file doesn't import torch under that name"
    return ""


def _in_init(owner: "cst.ClassDef", call: "cst.Call") -> bool:
    """Whether the call is a statement of ``__init__`` itself, under no condition or loop."""
    import libcst as cst

    for function in owner.body.body:
        if isinstance(function, cst.FunctionDef) and function.name.value == "__init__":
            for line in function.body.body:
                small = line.body if isinstance(line, cst.SimpleStatementLine) else ()
                if any(isinstance(s, cst.Expr) and s.value is call for s in small):
                    return True
    return False


def _is_name(node: "cst.CSTNode", name: str) -> bool:
    import libcst as cst

    return isinstance(node, cst.Name) and node.value == name


def _imports_torch(module: "cst.Module") -> bool:
    import libcst as cst

    for line in module.body:
        for small in line.body if isinstance(line, cst.SimpleStatementLine) else ():
            if isinstance(small, cst.Import):
                for alias in small.names:
                    if alias.asname is None and alias.evaluated_name.split(".")[0] == "torch":
                        return True
    return False
