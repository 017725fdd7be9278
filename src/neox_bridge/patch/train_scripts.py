"""Patches the scripts that read a yml of a run to import ``neox_bridge.neox``.

These are train.py, the launcher deepy.py, and eval.py and generate.py, which must accept the same
yml. The import is the first statement: it wraps functions that train.py imports by name, and
registers keys before the launcher checks the yml.
"""

import os

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
from neox_bridge.patch.places import TRAIN_SCRIPTS, Change
from neox_bridge.patch.scripts import first_statement_line

IMPORT = """\
# neox-bridge put this here: runs start from Hugging Face models (load) and export them
# (save_hf). `neox-bridge patch --revert` takes it out again.
try:
    import neox_bridge.neox
except ModuleNotFoundError as error:
    if error.name != "neox_bridge":
        raise
    raise SystemExit(
        "neox-bridge: this script is patched to load and save Hugging Face models, and "
        "neox-bridge is not installed in this Python. Install it from a clone: "
        "pip install ./neox-bridge. "
        "Or restore the script: neox-bridge patch --revert."
    )

"""
# what a known form contains
_CALLS = {
    "train.py": "pretrain",
    "deepy.py": "consume_deepy_args",
    "eval.py": "setup_for_inference_or_eval",
    "generate.py": "setup_for_inference_or_eval",
}


def plan_train(tree: str | os.PathLike[str]) -> Patch:
    """Plan the patch of the scripts; no files if all are patched. Writes nothing.

    Raises Refused if a script is missing or has an unknown form.
    """
    root = tree_root(tree)
    patches = []
    for name in TRAIN_SCRIPTS:
        source = read(root / name)
        if source is None or _CALLS[name].encode() not in source:
            raise Refused(
                f"{root / name} is missing or does not call {_CALLS[name]}, so nothing was "
                "patched. Add `import neox_bridge.neox` as the first line of your own scripts that "
                "launch, train, evaluate and generate."
            )
        refuse_link(root / name)
        if has_patch(source):
            if IMPORT.encode() not in source.replace(b"\r\n", b"\n"):
                raise partly_patched(name)
            continue
        patches.append(_patched(name, source))
    return Patch(str(root), tuple(patches))


def _patched(name: str, source: bytes) -> FilePatch:
    line = first_statement_line(syntax_of(name, source))
    lines = source.splitlines(keepends=True)
    newline = "\r\n" if b"\r\n" in source else "\n"
    text = IMPORT.replace("\n", newline).encode()
    new = b"".join([*lines[:line], text, *lines[line:]])
    compile(new, name, "exec", dont_inherit=True)
    what = "load and save_hf accept Hugging Face models (import neox_bridge.neox)"
    return FilePatch(name, source, new, (Change(line + 1, what),))
