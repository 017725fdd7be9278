"""Patches a GPT-NeoX source tree to load checkpoints with and without computed buffers.

Two changes, in every class that registers ``inv_freq`` or ``slopes`` (patch/buffer_forms.py):
``persistent=False`` if the argument is missing, and a load hook (patch/load_hook.py). Why:
transformers (hf-neox-inv-freq) and GPT-NeoX (neox-inv-freq) stopped storing ``inv_freq``, so each
side rejects checkpoints of the other: ``Missing key(s)`` or ``Unexpected key(s) in state_dict``.

The original files are kept in ``.neox-bridge.orig`` in the tree, with hashes of both versions.
"""

import ast
import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from neox_bridge.errors import BridgeError, Refused
from neox_bridge.execution.flushing import flush
from neox_bridge.execution.lock import locked_folder
from neox_bridge.extras import missing
from neox_bridge.patch.places import (
    HOME,
    HOOK,
    KEPT,
    MARK,
    SCRIPTS_FOLDER,
    TRAIN_SCRIPTS,
    Change,
    Place,
    changes_for,
)

_PACKAGE = "megatron"
_FOLDERS = (f"{_PACKAGE}/", f"{SCRIPTS_FOLDER}/")  # whose files are patched
_RECORD = "patch.json"
_TEMPORARY = ".neox-bridge-tmp"  # the end of a temporary file's name


@dataclass(frozen=True, slots=True)
class FilePatch:
    """One file: its bytes before and after, and what the changes are."""

    path: str
    old: bytes
    new: bytes
    changes: tuple[Change, ...] = ()

    @property
    def diff(self) -> str:
        """As a unified diff, which ``git apply`` takes."""
        before, after = (_lines(text) for text in (self.old, self.new))
        names = (f"a/{self.path}", f"b/{self.path}")
        lines = difflib.unified_diff(before, after, *names)
        whole = (line if line.endswith("\n") else f"{line}\n{_NO_NEWLINE}" for line in lines)
        return "".join(whole)


_NO_NEWLINE = "\\ No newline at end of file\n"


@dataclass(frozen=True, slots=True)
class Patch:
    """The changes of a patch or a revert. No files: nothing to do."""

    tree: str
    files: tuple[FilePatch, ...]
    places: tuple[Place, ...] = ()

    @property
    def diff(self) -> str:
        """All files' diffs."""
        return "".join(file.diff for file in self.files)


def plan_patch(tree: str | os.PathLike[str]) -> Patch:
    """Plan the patch of a GPT-NeoX tree; no files if it is already patched. Writes nothing.

    Raises Refused if any place has an unknown form.
    """
    root = tree_root(tree)
    try:
        import libcst  # noqa: F401
    except ImportError:
        what = "libcst is missing, which keeps the formatting of the files that patch edits"
        raise missing(what, "patch") from None
    from neox_bridge.patch.buffer_forms import find_places, parse
    from neox_bridge.patch.edits import edited

    parsed = {
        path: (text, parse(path, text))
        for path, text in _sources(root, _PACKAGE)
        if _concerned(text)
    }
    places = {path: find_places(path, module) for path, (_, module) in parsed.items()}
    every = [place for of_file in places.values() for place in of_file]
    bare = {path: of_file for path, of_file in places.items() if not all(p.hooked for p in of_file)}
    for path in bare:
        if has_patch(parsed[path][0]):
            raise Refused(
                f"{path} contains only a part of the patch, so it was edited since it was "
                f"patched. Restore it from {KEPT}, or remove the lines of the patch by hand, and "
                "run the command again."
            )
    _refuse_unknown(root, every)
    files = []
    for path, of_file in bare.items():
        text, module = parsed[path]
        new = edited(module, of_file)
        compile(new, path, "exec", dont_inherit=True)
        files.append(FilePatch(path, text, new, tuple(changes_for(of_file))))
    return Patch(str(root), tuple(files), tuple(every))


def plan_revert(tree: str | os.PathLike[str]) -> Patch:
    """Plan the revert, byte for byte. Raises Refused if a file was edited since.

    Needs no libcst.
    """
    root = tree_root(tree)
    files, edited_since = [], []
    for path, hashes in _record(root).items():
        original, current = read(root / KEPT / path), read(root / path)
        if current is not None and not has_patch(current):
            continue  # restored or replaced by another version, without this tool
        if current is None or _hash(current) != hashes["patched"]:
            edited_since.append(path)
        elif original is None or _hash(original) != hashes["original"]:
            raise Refused(
                f"{root / KEPT / path} is missing or was edited, so nothing was reverted."
            )
        else:
            files.append(FilePatch(path, current, original))
    if edited_since:
        raise Refused(
            f"{', '.join(edited_since)}: edited since it was patched, so nothing was reverted. "
            f"Undo the edit, or restore the original from {root / KEPT} by hand."
        )
    return Patch(str(root), tuple(files))


def apply(patch: Patch) -> None:
    """Write a patch: all files or none. The originals are saved first.

    Leftovers of a killed run are deleted, even if there is nothing to patch.
    """
    root = Path(patch.tree)
    with locked_folder(patch.tree):
        _remove_left_over(root)
        if patch.files:
            _apply(root, patch)


def _apply(root: Path, patch: Patch) -> None:
    _check_unchanged(root, patch)
    kept = root / KEPT
    record = _record(root)
    record |= {f.path: {"original": _hash(f.old), "patched": _hash(f.new)} for f in patch.files}
    fresh = not kept.exists()
    try:
        text = json.dumps({"version": 1, "files": record}, indent=2) + "\n"
        _replace_all(
            {
                kept / ".gitignore": b"*\n",
                **{kept / file.path: file.old for file in patch.files},
                kept / _RECORD: text.encode(),
            }
        )
        _replace_all({root / file.path: file.new for file in patch.files})
    except BaseException:
        if fresh:
            shutil.rmtree(kept, ignore_errors=True)
        raise


def revert(tree: str | os.PathLike[str]) -> Patch:
    """Restore the originals, all or none, and delete the saved copies. Returns the changes."""
    patch = plan_revert(tree)
    root = Path(patch.tree)
    with locked_folder(patch.tree):
        _remove_left_over(root)
        _check_unchanged(root, patch)
        _replace_all({root / file.path: file.new for file in patch.files})
        kept = root / KEPT
        sources = [text for _, text in _sources(root, _PACKAGE, SCRIPTS_FOLDER)]
        sources += [read(root / name) or b"" for name in TRAIN_SCRIPTS]
        unpatched = not any(map(has_patch, sources))
        if (kept / _RECORD).is_file() or (kept.is_dir() and unpatched):
            for path in kept.iterdir():  # the record last, so that a killed run can be resumed
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != _RECORD:
                    path.unlink()
            shutil.rmtree(kept)
    return patch


def _remove_left_over(root: Path) -> None:
    """Temporary files of a run that was killed."""
    for folder in (root / "megatron", root / SCRIPTS_FOLDER, root / KEPT):
        for path in folder.rglob(f".*{_TEMPORARY}"):
            path.unlink(missing_ok=True)
    for name in TRAIN_SCRIPTS:
        (root / f".{name}{_TEMPORARY}").unlink(missing_ok=True)


def tree_root(tree: str | os.PathLike[str]) -> Path:
    """The folder of a tree. Raises Refused if it is none."""
    root = Path(tree)
    if not root.is_dir():
        raise BridgeError(f"{root}: no such folder. Give the root of a GPT-NeoX source tree.")
    if not (root / HOME).is_file():
        raise Refused(f"{root} is not the root of a GPT-NeoX source tree: it has no {HOME}.")
    return root


def _sources(root: Path, *folders: str) -> Iterator[tuple[str, bytes]]:
    """The Python files of folders, as paths from the tree's root."""
    for path in sorted(path for name in folders for path in (root / name).rglob("*.py")):
        text = read(path)
        if text is not None:
            yield str(PurePosixPath(path.relative_to(root))), text


def _concerned(source: bytes) -> bool:
    """Whether a file may store such a buffer: a cheap check before parsing."""
    return b"inv_freq" in source or (b"slopes" in source and b"register_buffer" in source)


def _refuse_unknown(root: Path, places: list[Place]) -> None:
    named = "; ".join(str(place) for place in places) or "none"
    stored = {((place.path, place.owner), place.buffer) for place in places}
    reason = ""
    if any(place.unknown for place in places):
        reason = "stores these buffers in an unknown way"
    elif len({owner for owner, _ in stored}) < len(stored):
        reason = "has a class that stores both inv_freq and slopes"
    elif not any(p.path == HOME and p.owner == "RotaryEmbedding" for p in places):
        reason = f"has no RotaryEmbedding that stores inv_freq in {HOME}"
    if reason:
        raise Refused(
            f"{root} {reason}, so nothing was patched. Places found: {named}. "
            "docs/how-to/patch.md shows what to change by hand."
        )
    for place in places:
        refuse_link(root / place.path)


def refuse_link(path: Path) -> None:
    """Raise Refused if a file of a tree is in another one."""
    if path.is_symlink():
        raise Refused(f"{path} is a link. Patch the tree that contains the file.")


def syntax_of(path: str, source: bytes) -> ast.Module:
    """The syntax tree of a script. Raises Refused if it cannot be parsed."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise Refused(f"{path} cannot be parsed ({reason}); nothing was patched.") from None


def partly_patched(path: str) -> Refused:
    """The error for a script that contains another patch, or a part of one."""
    return Refused(
        f"{path} contains a part of the patch, or the patch of another version of neox-bridge. "
        f"Revert the patch, or restore the script from {KEPT} if you edited it. Then run the "
        "command again."
    )


def _check_unchanged(root: Path, patch: Patch) -> None:
    for file in patch.files:
        if read(root / file.path) != file.old:
            raise BridgeError(f"{root / file.path} changed during the run, so nothing was written.")


def _record(root: Path) -> dict[str, dict[str, str]]:
    """The hashes of the files that were patched, by path."""
    text = read(root / KEPT / _RECORD)
    if text is None:
        return {}
    try:
        files = json.loads(text)["files"]
        hashes = {str(p): {k: str(h[k]) for k in ("original", "patched")} for p, h in files.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Refused(f"{root / KEPT / _RECORD} cannot be read, so nothing was changed.") from None
    for path in hashes:
        pure = PurePosixPath(path)
        if path in TRAIN_SCRIPTS:
            continue
        if pure.is_absolute() or ".." in pure.parts or not path.startswith(_FOLDERS):
            raise Refused(
                f"{root / KEPT / _RECORD} names {path}, which is not below "
                f"{' or '.join(_FOLDERS)}, so nothing was changed."
            )
    return hashes


def _replace_all(contents: Mapping[Path, bytes]) -> None:
    """Write all files or none: each to a temporary name, flushed, then renamed."""
    waiting: dict[Path, Path] = {}
    before = {path: read(path) for path in contents}
    done: list[Path] = []
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            waiting[path] = _temporary(path, content)
        for path, temporary in waiting.items():
            os.replace(temporary, path)
            done.append(path)
        for folder in {path.parent for path in contents}:
            with suppress(OSError):
                flush(str(folder))
    except BaseException:
        for path in done:
            if (old := before[path]) is None:
                path.unlink(missing_ok=True)
            else:
                os.replace(_temporary(path, old), path)
        for temporary in waiting.values():
            temporary.unlink(missing_ok=True)
        raise


def _temporary(path: Path, content: bytes) -> Path:
    """A flushed file beside ``path``, with its permissions."""
    name = path.parent / f".{path.name}{_TEMPORARY}"
    number = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, name)
        else:
            os.chmod(name, 0o644)
    except BaseException:
        os.unlink(name)
        raise
    return name


def read(path: Path) -> bytes | None:
    """The content of a file; None if there is no such file."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def has_patch(text: bytes) -> bool:
    """Whether a file contains any part of a patch."""
    return HOOK.encode() in text or MARK.encode() in text


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _lines(content: bytes) -> list[str]:
    text = content.decode("utf-8", "surrogateescape")
    return [line for line in text.replace("\n", "\n\0").split("\0") if line]
