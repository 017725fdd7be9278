"""Makes text that came from files or stores safe to show.

The names of folders, tensors, keys and files are chosen by whoever made a checkpoint. Shown as they
are, they could move a terminal's cursor, forge a line, turn the direction of writing, or put markup
into a page. Everything that shows such text uses one of these functions.
"""

import re
from collections.abc import Mapping

_MAX_MESSAGE_CHARACTERS = 4000
_NAMES = frozenset({"transformers", "torch"})  # written in lower case everywhere
# C0 and C1 controls except tabs and line ends; zero-width characters, which hide differences;
# line separators; marks that change the direction of writing; tags
_RANGES = (
    *((0x00, 0x08), (0x0B, 0x1F), (0x7F, 0x9F), (0xAD, 0xAD), (0x61C, 0x61C), (0x180E, 0x180E)),
    *((0x200B, 0x200F), (0x2028, 0x202E), (0x2060, 0x206F), (0xFEFF, 0xFEFF), (0xFFF9, 0xFFFB)),
    *((0xD800, 0xDFFF), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE007F)),
)
_CONTROLS = re.compile("[" + "".join(f"{chr(a)}-{chr(b)}" for a, b in _RANGES) + "]")
_MARKUP = re.compile(r"[\\`*\[\]<>|&~$]")


def wording(text: str) -> str:
    """The text with control characters as readable escapes. Tabs and line ends stay."""
    return _CONTROLS.sub(_escape, text)


def plain(text: str) -> str:
    """A name or a line with every unprintable character escaped, including line ends and tabs."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def one_line(message: str) -> str:
    """A message as one line, truncated if it is very long."""
    text = " ".join(message[: 2 * _MAX_MESSAGE_CHARACTERS].splitlines())
    cut = len(text) > _MAX_MESSAGE_CHARACTERS
    return plain(f"{text[:_MAX_MESSAGE_CHARACTERS]} …" if cut else text)


def markdown(text: str) -> str:
    """The text escaped for Markdown, so that no part of it is markup, HTML or a link."""
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", plain(text))


def _escape(match: "re.Match[str]") -> str:
    return _escaped(match[0])


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte of a path that isn't UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


KINDS = {"hf": "Hugging Face", "neox": "GPT-NeoX"}


def side(facts: Mapping[str, object]) -> str:
    """A short description of a source or target."""
    kind, family = KINDS[str(facts["kind"])], str(facts.get("architecture", ""))
    words = [f"{kind} {family}".strip()]
    if "format" in facts:
        words.append(f"{facts['format']} format")
    if "layout" in facts:
        words.append(str(facts["layout"]))
    if "tensor_parallel" in facts:
        words += [f"TP {facts['tensor_parallel']}", f"PP {facts['pipeline_stages']}"]
    words.append(str(facts["dtype"]))
    return ", ".join(words)


def human(count: float) -> str:
    """Bytes in decimal units: 1.23 GB."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        if count < 999.5 or unit == "TB":
            break
    return f"{count:.3g} {unit}"


def plural(count: int, noun: str) -> str:
    """``1 file``, ``2 files``, ``3 biases``."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{'' if count == 1 else ending}"


def verb(count: int, base: str) -> str:
    """``differs`` of one, ``differ`` of others."""
    return f"{base}s" if count == 1 else base


def sentence(text: str) -> str:
    """The text as a sentence. A name at its start, such as config.json, stays in lower case."""
    first = text.partition(" ")[0]
    if first.isalpha() and first not in _NAMES:
        text = text[0].upper() + text[1:]
    return text if text.endswith((".", "?", "!", ":")) else f"{text}."


def some(names: list[str], most: int = 6) -> str:
    """A short list of names for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key that compares the numbers in names as numbers."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if n % 2 else (0, part) for n, part in enumerate(parts)]
