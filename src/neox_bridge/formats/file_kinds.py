"""Recognizes files that are not what their names say: Git LFS pointers, web pages, archives.

Readers call ``misplaced`` with the first bytes of a file that is not of their format.
"""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from os.path import basename, dirname

from neox_bridge.errors import BridgeError
from neox_bridge.stores.paths import absolute, is_local

HEAD_BYTES = 512
_SHOWN = 80  # characters of a file's text in a message
_APPLE_DOUBLE = b"\x00\x05\x16\x07"
_LFS = b"version https://git-lfs"
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7-Zip",
    b"Rar!": "RAR",
}
_SERVER = re.compile(
    rb"not found|unauthorized|forbidden|access to|invalid (username|credentials|token)|(\.\./){2}",
    re.IGNORECASE,
)
GGUF_WAY_OUT = (
    "Convert the Hugging Face model that it was made from. GGUF files are mostly quantized, and "
    "their tensors have other names and row orders."
)
_GGML = (b"GGUF", b"lmgg", b"fmgg", b"algg", b"tjgg")


@dataclass(frozen=True, slots=True)
class FileKind:
    """What a file is, and what to do about it.

    Attributes:
        name: A short name, such as "Git LFS pointer".
        what: Words that complete "FILE is …".
        way_out: What to do, as a sentence.
        missing: Whether the file that belongs here is elsewhere and can be fetched.
    """

    name: str
    what: str
    way_out: str
    missing: bool = False


def misplaced(path: str, head: bytes) -> FileKind | None:
    """The kind of a file by its first ``HEAD_BYTES`` bytes; None if it is not known."""
    for kind in _KINDS:
        if (known := kind(path, head)) is not None:
            return known
    return None


def refuse_misplaced(path: str, head: bytes) -> None:
    """Raise BridgeError, with the way out, if the first bytes show what the file is instead."""
    if (kind := misplaced(path, head[:HEAD_BYTES])) is not None:
        raise BridgeError(f"{path} is {kind.what}. {kind.way_out}")


def is_stand_in(path: str, head: bytes) -> bool:
    """Whether a file stands for another one: a pointer of Git LFS or git-annex, or a web page."""
    return any(kind(path, head) is not None for kind in (_lfs, _annex, _page))


def is_apple_double(name: str) -> bool:
    """Whether a file has the name of those that macOS writes beside others on foreign disks."""
    return basename(name).startswith("._")


def _lfs(path: str, head: bytes) -> FileKind | None:
    if not head.startswith(_LFS):
        return None
    way = f"Fetch the file itself: {_in_folder(path)}git lfs pull"
    if not is_local(path):
        way = "Run git lfs pull in the clone that it was uploaded from, and upload the file again."
    return FileKind("Git LFS pointer", "a Git LFS pointer, not the file itself", way, missing=True)


def _annex(path: str, head: bytes) -> FileKind | None:
    if b"/annex/objects/" not in head.partition(b"\n")[0]:
        return None
    way = f"Fetch the file itself: {_in_folder(path)}git annex get {shlex.quote(basename(path))}"
    return FileKind(
        "git-annex pointer", "a git-annex pointer, not the file itself", way, missing=True
    )


def _page(_path: str, head: bytes) -> FileKind | None:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<error")):
        return None
    is_xml = start.startswith((b"<?xml", b"<error"))
    name, article = ("XML document", "an XML document") if is_xml else ("HTML page", "an HTML page")
    title = re.search(rb"<(title|code)[^>]*>([^<]{1,200})", head, re.IGNORECASE)
    quoted = f" ({_quoted(title[2])})" if title else ""
    return FileKind(
        name,
        f"{article}{quoted}, not the file itself: a server sent it instead of the file",
        "Log in if the model asks for it (hf auth login), and download the file again.",
        missing=True,
    )


def _text(path: str, head: bytes) -> FileKind | None:
    """A short text: the answer of a server, or a link that was copied as a text file."""
    if not head or len(head) >= HEAD_BYTES:
        return None
    text = head.strip()
    if not text or any(byte < 32 and byte not in b"\t\r\n" for byte in text):
        return None
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return None
    if text[:1] == b"{" and not re.match(rb'\{\s*"(error|message|detail)"', text):
        return None
    weights = path.endswith((".safetensors", ".bin", ".pt", ".pth"))
    if not weights and not _SERVER.search(text):
        return None
    if re.fullmatch(rb"(\.\./)+[^\n]+", text):
        return FileKind(
            "link saved as text",
            f"a text that names another file ({_quoted(text)}): a symbolic link that was copied "
            "as text",
            f"Copy the folder again and follow symbolic links: cp -RL ORIGINAL {_folder(path)}",
            missing=True,
        )
    return FileKind(
        "short text",
        f"a short text ({_quoted(text)}), not the file itself: a server may have sent it instead",
        "Log in if the model asks for it (hf auth login), and download the file again.",
        missing=path.endswith(".safetensors"),
    )


def _ggml(_path: str, head: bytes) -> FileKind | None:
    if not head.startswith(_GGML):
        return None
    return FileKind("GGUF file", "a GGUF file (llama.cpp)", GGUF_WAY_OUT)


def _archive(path: str, head: bytes) -> FileKind | None:
    kind = next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)
    if kind is None and head[257:262] == b"ustar":
        kind = "tar"
    if kind is None:
        return None
    way = f"Unpack the file first: tar -xf {shlex.quote(path)} -C {_folder(path)}"
    if kind in ("7-Zip", "RAR"):
        way = "Unpack the file first."
    return FileKind("archive", f"compressed or packed ({kind})", way)


def _other(path: str, head: bytes) -> FileKind | None:
    """Formats of other libraries, and weights under the other format's name."""
    if head.startswith(_APPLE_DOUBLE):
        return FileKind(
            "AppleDouble file",
            "an AppleDouble file, which macOS writes beside the real one",
            f"Remove it: rm {shlex.quote(path)}",
        )
    if head.startswith(b"\x89HDF"):
        return FileKind(
            "HDF5 file",
            "an HDF5 file, as TensorFlow and Keras write",
            "Load the model with transformers (from_tf=True) and save it with save_pretrained.",
        )
    name = basename(path)
    if head.startswith((b"PK\x03\x04", b"\x80\x02")) and name.endswith(".safetensors"):
        renamed = path.removesuffix(".safetensors").replace("model", "pytorch_model", 1) + ".bin"
        if name == "model.safetensors":
            renamed = f"{path[: -len(name)]}pytorch_model.bin"
        return FileKind(
            "torch file",
            "a PyTorch file that is named like a safetensors file",
            f"Rename it: mv {shlex.quote(path)} {shlex.quote(renamed)}",
        )
    if len(head) > 8 and head[8:9] == b"{" and not any(head[4:8]) and name.endswith(".bin"):
        renamed = f"{path[: -len(name)]}{name.removeprefix('pytorch_')[:-4]}.safetensors"
        return FileKind(
            "safetensors file",
            "a safetensors file that is named like a PyTorch file",
            f"Rename it: mv {shlex.quote(path)} {shlex.quote(renamed)}",
        )
    return None


_KINDS: tuple[Callable[[str, bytes], FileKind | None], ...] = (
    *(_lfs, _annex, _page, _ggml, _archive, _other, _text),
)


def _in_folder(path: str) -> str:
    return f"cd {_folder(path)} && "


def _folder(path: str) -> str:
    return shlex.quote(dirname(absolute(path)))


def _quoted(text: bytes) -> str:
    """Text of a file for a message: short and printable."""
    words = " ".join(text.decode("utf-8", "replace").split())
    plain = "".join(c if c.isprintable() else "?" for c in words)
    return repr(plain[:_SHOWN] + ("…" if len(plain) > _SHOWN else ""))
