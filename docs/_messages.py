"""The page of every message, from the source and from the examples that tests recorded."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

from neox_bridge.wording import markdown

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "helpers"))

from message_sites import FINDING, LEFT_OUT, PART, Message, package  # noqa: E402

_HEAD = """\
---
hide: [toc]
---

# Messages

Every message of neox-bridge: {count}. Search this page for a part of the message that you saw.

- *error*: The command ends with this exit code.
- *warning*, *info*: A finding. `--json` prints its code, which stands in backticks here.
- *dropped*: The reason why something of the source is not in the target.
- *part of a message*: Another message quotes it after the name of the file.

`…` in a title, and `{{braces}}` in the text below an example, stand for names, paths and numbers.
`[one | another]` are alternatives. The examples come from the tests.
"""
# what somebody was doing who meets the messages of a room
_ROOMS = {
    "cli": "Options and arguments",
    "formats": "Reading safetensors, PyTorch and yml files",
    "stores": "Paths, object stores and the Hub",
    "layouts": "Opening a checkpoint",
    "architectures": "Models and their settings",
    "frameworks": "Versions of GPT-NeoX and transformers",
    "planning": "Planning a conversion",
    "optimizer": "Optimizer states",
    "execution": "Writing and resuming",
    "verification": "Verifying, comparing, auditing",
    "doctor": "Diagnosing and fixing",
    "patch": "Patching GPT-NeoX",
    "batches": "Converting many checkpoints",
    "hub": "Publishing on the Hub",
    "report": "Reports",
    "": "Calling neox-bridge from Python",
}
_PLACEHOLDER = re.compile(r"\{[^{}]*(\{[^{}]*\}[^{}]*)*\}")
_ALTERNATIVES = re.compile(r"\[[^\[\]]* \| [^\[\]]*\]")
_TITLE_CHARACTERS = 110


def messages_page() -> str:
    """The page in Markdown."""
    record = json.loads((ROOT / "tests/data/messages.json").read_text(encoding="utf-8"))
    messages = list(package().messages.values())
    by_room: dict[str, list[Message]] = {room: [] for room in _ROOMS}
    for message in messages:
        room, slash, _ = message.module.partition("/")
        by_room[room if slash and room in _ROOMS else ""].append(message)
    lines = [_HEAD.format(count=len(messages))]
    for room, title in _ROOMS.items():
        seen: Counter[str] = Counter()
        if by_room[room]:
            lines += [f"## {title}", ""]
        for message in by_room[room]:
            seen[message.place] += 1
            anchor = _anchor(message, seen[message.place])
            lines += _entry(message, anchor, record.get(message.key, {}))
    lines.append("Next: [the glossary](glossary.md).")
    return "\n".join(lines) + "\n"


def _entry(message: Message, anchor: str, known: dict[str, str]) -> list[str]:
    title = _title(message.words)
    if known and not re.search(r"\w{3}", title):
        title = _title(known["example"])
    lines = [f"### {title} {{#{anchor}}}", ""]
    if known:
        lines += ["````text", f"{_prefix(message)}{known['example']}", "````", ""]
    if not known or _PLACEHOLDER.search(message.words):
        lines += [f"`` {message.words} ``", ""]
    return [*lines, f"{_kind(message)} · {message.module}, `{message.function}`", ""]


def _title(words: str) -> str:
    """The first sentence, with dots for what is filled in."""
    text = _ALTERNATIVES.sub("…", _PLACEHOLDER.sub("…", words))
    sentence = re.split(r"(?<=\w{3}[.:)]) (?=[A-Z`])", text)[0].rstrip(".:")
    if len(sentence) > _TITLE_CHARACTERS:
        sentence = f"{sentence[:_TITLE_CHARACTERS].rpartition(' ')[0]} …"
    return markdown(sentence).replace("{", "&#123;")


def _prefix(message: Message) -> str:
    if isinstance(message.result, int):
        return "error: "
    return f"{message.severity}: " if message.severity else ""


def _kind(message: Message) -> str:
    if message.result == FINDING:
        code = f" `{message.code}`" if message.code else ""
        return f"*{message.severity or 'finding'}*{code}"
    if message.result == LEFT_OUT:
        return "*dropped*"
    return (
        f"*{message.result}*" if message.result == PART else f"*error*, exit code {message.result}"
    )


def _anchor(message: Message, number: int) -> str:
    """The same for other words: links to the page stay right when a message is worded better."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{message.module[:-3]}-{message.function}".lower())
    return f"{name.strip('-')}{f'-{number}' if number > 1 else ''}"
