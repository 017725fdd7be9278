"""Patches GPT-NeoX's conversion scripts to call neox-bridge, with their own command lines.

A script keeps its code, but none of it runs. Before the imports (neither DeepSpeed nor apex is
needed), the patch puts in the functions of patch/script_hook.py, a copy of the script's own parser,
and a call. A script whose parser has an option that no function translates is refused.

The forms are those of every version of tools/ckpts on the main branch until 2026-05, but for the
first convert_neox_to_mamba_ssm.py.
"""

import ast
import codecs
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files

from neox_bridge.errors import Refused
from neox_bridge.patch.patcher import (
    FilePatch,
    Patch,
    has_patch,
    partly_patched,
    read,
    refuse_link,
    syntax_of,
    tree_root,
)
from neox_bridge.patch.places import MARK, SCRIPTS_FOLDER, Change

_PREFIX = "_neox_bridge_"


@dataclass(frozen=True, slots=True)
class Script:
    """A conversion script of GPT-NeoX.

    Attributes:
        name: Of its file, without ``.py``, and of its function in patch/script_hook.py.
        options: Of its command line in any version. The function translates or refuses them.
        newer: Those of them that older versions do not have.
        parameters: Of its function ``main``; None if it parses its command line outside of one.
    """

    name: str
    options: frozenset[str]
    newer: frozenset[str] = frozenset()
    parameters: tuple[str, ...] | None = None

    @property
    def path(self) -> str:
        return f"{SCRIPTS_FOLDER}/{self.name}.py"

    def call(self, words: str, more: Sequence[str]) -> tuple[str, str]:
        """A statement that parses the command line, and the expression that runs neox-bridge."""
        arguments = ", ".join(("args", *more))
        return f"args = {_PREFIX}arguments({words})", f"{_PREFIX}{self.name}({arguments})"


SCRIPTS = (
    Script(
        "convert_neox_to_hf",
        frozenset(
            "--input_dir --config_file --output_dir --precision --no_save_tokenizer "
            "--vocab-is-hf-tokenizer --pad-token-id --architecture".split()
        ),
        newer=frozenset({"--vocab-is-hf-tokenizer", "--pad-token-id"}),
        parameters=("input_args", "overwrite_values"),
    ),
    Script(
        "convert_hf_to_sequential",
        frozenset(
            "--revision --output-dir --config --test --download-only --ckpt-tmp-dir "
            "--hf-model-name --cache-dir".split()
        ),
    ),
    Script("convert_hf_llama_to_neox", frozenset("--tp --pp --model --model_path".split())),
    Script(
        "convert_raw_llama_weights_to_neox",
        frozenset(
            "--input_dir --model_size --output_dir --num_output_shards --pipeline_parallel".split()
        ),
        parameters=(),
    ),
    Script(
        "convert_neox_to_mamba_ssm",
        frozenset("--input_dir --config_file --output_dir --precision --no_save_tokenizer".split()),
        parameters=("input_args", "overwrite_values"),
    ),
    Script("merge20b", frozenset({"--input_dir", "--output_dir"}), parameters=()),
)


def plan_scripts(tree: str | os.PathLike[str]) -> Patch:
    """Plan the patch of the conversion scripts; no files if all are patched. Writes nothing.

    Raises Refused if a script has an unknown form, or if the tree has none of them.
    """
    root = tree_root(tree)
    sources = {script: read(root / script.path) for script in SCRIPTS}
    present = {script: source for script, source in sources.items() if source is not None}
    if not present:
        names = ", ".join(f"{script.name}.py" for script in SCRIPTS)
        raise Refused(
            f"{root / SCRIPTS_FOLDER} has none of the scripts that can be patched: {names}."
        )
    patches = []
    for script, source in present.items():
        refuse_link(root / script.path)
        if not _is_patched(script, source):
            patches.append(_patched(script, source))
    return Patch(str(root), tuple(patches))


def hook_source(script: Script) -> str:
    """The functions that go into a script: its own, and those that it needs."""
    text = files("neox_bridge.patch").joinpath("script_hook.py").read_text(encoding="utf-8")
    start = text.index(f"{MARK} put this here")
    head = text[start : text.index("def ", start)]
    functions = {
        node.name: ast.get_source_segment(text, node) or ""
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
    }
    needed, waiting = {_PREFIX + script.name}, [_PREFIX + script.name]
    while waiting:
        body = functions[waiting.pop()]
        more = {name for name in functions if f"{name}(" in body} - needed
        needed |= more
        waiting += more
    return head + "\n\n\n".join(code for name, code in functions.items() if name in needed) + "\n"


def _is_patched(script: Script, source: bytes) -> bool:
    """Whether a script has the patch. Raises Refused if it has another one, or a part of one."""
    if not has_patch(source):
        return False
    text = source.replace(b"\r\n", b"\n").decode("utf-8", "surrogateescape")
    main = [line.strip() for line in _in_main(script).splitlines()]
    if all(part in text for part in (hook_source(script), _ending(script), *main)):
        return True
    raise partly_patched(script.path)


def _patched(script: Script, source: bytes) -> FilePatch:
    module = syntax_of(script.path, source)
    try:
        block = _block(script, module)
        parser = _parser(block)
    except _UnknownFormError as error:
        raise Refused(
            f"{script.path} {error}, so nothing was patched. Use neox-bridge convert in place of "
            "the script."
        ) from None
    mark = codecs.BOM_UTF8 if source.startswith(codecs.BOM_UTF8) else b""
    lines = source.removeprefix(mark).splitlines(keepends=True)
    body = block.body[0]
    indent = lines[body.lineno - 1][: body.col_offset].decode("ascii")
    newline = "\r\n" if b"\r\n" in source else "\n"

    def inserted(text: str) -> bytes:
        return text.replace("\n", newline).encode()

    declarations = [line for node in parser for line in lines[node.lineno - 1 : node.end_lineno]]
    top = [
        inserted(hook_source(script) + "\n\n"),
        inserted(f"def {_PREFIX}arguments(words):\n{indent}import argparse\n\n"),
        *declarations,
        inserted(f"{indent}return parser.parse_args(words)\n\n\n{_ending(script)}\n\n"),
    ]
    before, inside = first_statement_line(module), body.lineno - 1
    main = inserted(_in_main(script, indent))
    new = b"".join([mark, *lines[:before], *top, *lines[before:inside], main, *lines[inside:]])
    compile(new, script.path, "exec", dont_inherit=True)
    what = "neox-bridge converts in place of the script, with its command line"
    return FilePatch(script.path, source, new, (Change(block.lineno, what),))


def _ending(script: Script) -> str:
    """What ends the script before it imports anything."""
    parse, call = script.call("None", ["None"] * len((script.parameters or ())[1:]))
    return (
        f'{MARK} put this here\nif __name__ == "__main__":\n    {parse}\n'
        f"    raise SystemExit({call})\n"
    )


def _in_main(script: Script, indent: str = "") -> str:
    """The lines that end the function ``main``, for those who import the script."""
    if script.parameters is None:
        return ""
    parse, call = script.call((*script.parameters, "None")[0], script.parameters[1:])
    return f"{indent}{parse}  {MARK}\n{indent}return {call}\n"


def first_statement_line(module: ast.Module) -> int:
    """How many lines are before the first statement that is no docstring or ``__future__``."""
    for node in module.body:
        is_future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        is_docstring = node is module.body[0] and ast.get_docstring(module) is not None
        if not is_future and not is_docstring:
            return node.lineno - 1
    return 0


class _UnknownFormError(Exception):
    """Why a script has no known form, as the rest of a sentence that its path starts."""


def _block(script: Script, module: ast.Module) -> ast.FunctionDef | ast.If:
    """The block that parses the command line. Raises _UnknownFormError."""
    options = {option for node in ast.walk(module) for option in _option(node)}
    if more := sorted(options - script.options):
        raise _UnknownFormError(f"has options that are not known ({', '.join(more)})")
    if missing := sorted(script.options - script.newer - options):
        raise _UnknownFormError(f"does not have the options {', '.join(missing)}")
    blocks = [node for node in module.body if _is_block(script, node)]
    if len(blocks) != 1:
        where = 'if __name__ == "__main__"'
        if script.parameters is not None:
            where = f"def main({', '.join(script.parameters)})"
        raise _UnknownFormError(f"does not have exactly one {where} at its top level")
    (block,) = blocks
    assert isinstance(block, ast.FunctionDef | ast.If)
    return block


def _parser(block: ast.FunctionDef | ast.If) -> list[ast.stmt]:
    """The statements that make the parser, of literals alone. Raises _UnknownFormError."""
    statements = [node for node in block.body if _is_of_parser(node)]
    everywhere = sum(any(_option(node)) for node in ast.walk(block))
    names = {n.id for node in statements for n in ast.walk(node) if isinstance(n, ast.Name)}
    if everywhere != len(statements) - 1 or not names <= {"parser", "argparse", "int", "str"}:
        raise _UnknownFormError("declares its options in an unknown way")
    return statements


def _is_of_parser(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]) == "parser"
    return isinstance(node, ast.Expr) and any(_option(node.value))


def _option(node: ast.AST) -> Iterator[str]:
    """The names that an ``add_argument`` declares; "?" for a name that is not a literal."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_argument"):
        for argument in node.args:
            yield str(argument.value) if isinstance(argument, ast.Constant) else "?"


def _is_block(script: Script, node: ast.stmt) -> bool:
    if script.parameters is None:
        return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
    if not isinstance(node, ast.FunctionDef) or node.name != "main":
        return False
    return [argument.arg for argument in node.args.args] == [*script.parameters]
