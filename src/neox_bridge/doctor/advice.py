"""The one command that fixes what a message is about, with the user's own paths."""

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from neox_bridge.doctor.explain import recognise
from neox_bridge.doctor.messages import Diagnosis, Message, read_message, short
from neox_bridge.frameworks.eras import FLAG, LATER_ERAS, TODAY, InvFreq, MlpNames, known_keys
from neox_bridge.frameworks.facts import TreeFacts
from neox_bridge.frameworks.source_tree import looks_like_tree
from neox_bridge.frameworks.targets import Target, name_of
from neox_bridge.layouts.checkpoint import Checkpoint

# how a plain text of a diagnosis names what the user has to fill in
_CHECKPOINT, _NEW, _TREE = "CHECKPOINT", "NEW", "TREE"
_BY_DATE = (
    "name the tree by its date: `era=neox@2024-03` before 2024-03-04, neox@2024-09 until "
    "2024-09-06, neox@2024-10 until 2024-11-12, today since then"
)
_ORDER = ("for", "inv-freq", "layout", "tp", "vocab-multiple", "vocab-rows")
_FRAME = re.compile(r'File "(/[^"\n]+?)/(?:megatron/|train\.py|generate\.py|deepy\.py)')
_DENSE = r"mlp\.(?:dense_h_to_4h|dense_4h_to_h|w[123])\.\w+"
# where several trees print the same: the user has to name it
ANY_TREE = "neox:TREE"


@dataclass(frozen=True, slots=True)
class Advice:
    """What a message means, and what to do.

    causes: what was recognized. missing, unexpected: the keys that it names, each once.
    fix: one command, or what to change in the yml; "" where each cause has its own.
    others: further ways. more: links.
    """

    causes: tuple[Diagnosis, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    fix: str
    others: tuple[str, ...]
    more: tuple[str, ...]


def advise(
    text: str, path: str = "", checkpoint: Checkpoint | None = None, target: Target | None = None
) -> Advice | None:
    """What a pasted message means, and the one command that fixes it; None where nothing is known.

    path: the checkpoint that it is about, as the user wrote it; "" where it is not known.
    target: what shall load it, where the user says so.
    """
    message = read_message(text)
    causes = recognise(text)
    if not causes:
        return None
    tree = tree_in(message.text)
    options = _options(message, causes, checkpoint, target, tree)
    fix = _convert(options) if options else ""
    if fix:
        causes = [replace(c, remedy=fix) if c.needs or c.by_convert else c for c in causes]
    if not fix and len({cause.remedy for cause in causes}) == 1:
        fix = causes[0].remedy
    new = _new_path(path, options.get("for", ""))
    filled = [
        replace(
            cause,
            remedy=_filled(cause.remedy, path, new, tree),
            others=tuple(_filled(other, path, new, tree) for other in cause.others),
        )
        for cause in causes
    ]
    # what helps against one of several causes would end in the next error
    others = filled[0].others if len(filled) == 1 else ()
    if options.get("for") == ANY_TREE:
        others = (_BY_DATE, *others)
    return Advice(
        causes=tuple(filled),
        missing=_blocks(message.missing),
        unexpected=_blocks(message.unexpected),
        fix=_filled(fix, path, new, tree),
        others=others,
        more=tuple(dict.fromkeys(cause.more for cause in filled if cause.more)),
    )


def _options(
    message: Message,
    causes: Sequence[Diagnosis],
    checkpoint: Checkpoint | None,
    target: Target | None,
    tree: str | None,
) -> dict[str, str]:
    """Options of the one conversion that does all that the causes need."""
    options = {key: value for cause in causes for key, value in cause.needs}
    expected = expected_by(message)
    by_keys = convert_options(expected, checkpoint)
    if not (options or by_keys):
        return {}
    if isinstance(target, TreeFacts):
        by_keys = {"for": name_of(target)}
    elif tree is not None and by_keys:
        by_keys = {"for": f"neox:{tree}"}
        if expected.names != "dense" and expected.buffer == "store":
            by_keys["inv-freq"] = "store"  # asked for by the yml of that tree
    return {**by_keys, **options}


def _convert(options: Mapping[str, str]) -> str:
    words = ["neox-bridge", "convert", _CHECKPOINT, _NEW, "--to", "neox"]
    for name in sorted(options, key=_ORDER.index):
        words += [f"--{name}", options[name]]
    return shlex.join(words)


def _new_path(path: str, era: str) -> str:
    """A folder beside the checkpoint that is not there yet."""
    match = re.search(r"@([\w-]+)$", era)
    name = f"{path.rstrip('/')}-{match[1] if match else 'fixed'}"
    taken = (f"{name}-{number}" for number in range(2, 1000))
    return name if not os.path.exists(name) else next(p for p in taken if not os.path.exists(p))


def _filled(text: str, path: str, new: str, tree: str | None) -> str:
    """The text with the user's own paths, as a shell takes them."""
    values = {_CHECKPOINT: path, _NEW: new if path else "", _TREE: tree or ""}
    for word, value in values.items():
        if value:
            text = shlex.quote(value).join(re.split(rf"\b{word}\b", text))
    return text


def _blocks(keys: Iterable[str]) -> tuple[str, ...]:
    """Keys without the number of the block or the layer, each once."""
    return tuple(dict.fromkeys(re.sub(r"^(?:module\.)?sequential\.\d+\.", "", k) for k in keys))


@dataclass(frozen=True, slots=True)
class Expected:
    """What a tree expects of a checkpoint, None where the message does not tell.

    names: of the MLP. buffer: whether its state dict has inv_freq. unknown_key: a yml key that it
    refuses.
    """

    names: MlpNames | None = None
    buffer: InvFreq | None = None
    unknown_key: str | None = None

    def __bool__(self) -> bool:
        return any((self.names, self.buffer, self.unknown_key))


def expected_by(message: Message) -> Expected:
    """What the tree that printed a message expects."""
    if message.by_transformers:
        return Expected()
    missing, unexpected = message.keys
    names: MlpNames | None = None
    if short(missing, _DENSE):
        names = "dense"
    elif short(unexpected, _DENSE):
        names = "linear"
    buffer: InvFreq | None = None
    if short(missing, r"rotary_emb\.inv_freq"):
        buffer = "store"
    elif short(unexpected, r"rotary_emb\.inv_freq"):
        buffer = "omit"
    key = None
    if "NeoXArgs" in message.text or "neox_arguments" in message.text:
        match = re.search(r"got an unexpected keyword argument '(\w+)'", message.text)
        key = match[1] if match else None
    return Expected(names, buffer, key)


def tree_in(text: str) -> str | None:
    """The source tree whose frames stand in a traceback, where it lies on this machine."""
    paths = dict.fromkeys(_FRAME.findall(text))
    return next((path for path in paths if looks_like_tree(path)), None)


def convert_options(expected: Expected, checkpoint: Checkpoint | None) -> dict[str, str]:
    """The options of ``convert`` whose result such a tree loads; empty where none is known to help.

    A tree with the old names that stores the buffer is one before 2024-03-04; one from then to
    2024-09 stores it only where its yml says rotary_save_freqs_buffer, which changes no file.
    """
    state = checkpoint.neox if checkpoint is not None else None
    names, buffer = expected.names, expected.buffer
    if key := expected.unknown_key:
        refusing = [era for era in LATER_ERAS if key not in known_keys(era)]
        if len(refusing) == len(LATER_ERAS) or not refusing:
            return {}  # of a fork, or of no tree at all
        newest = refusing[-1]
        grouped = checkpoint is not None and checkpoint.config.grouped_query
        alike = newest is TODAY and refusing[0].mlp_names == "linear" and not grouped
        spelled = "today" if newest is TODAY else f"neox@{newest.name}"
        return {"for": spelled if len(refusing) == 1 or alike else ANY_TREE}
    if names is None and buffer is None:
        return {}
    if names is None and state is not None and state.mlp_names == "linear":
        return {"inv-freq": buffer or state.inv_freq}  # keeps the rest, also the order of rows
    if names is None and buffer == "omit" and state is None:
        return {"inv-freq": "omit"}  # keeps the names, whichever they are
    names = names or "dense"
    if names == "dense" and checkpoint is not None and FLAG in checkpoint.raw:
        return {"for": "neox@2024-09"}  # the tree took the yml with that key
    buffer = buffer or (state.inv_freq if state is not None else "omit")
    if names == "dense":
        return {"for": "neox@2024-03" if buffer == "store" else "neox@2024-09"}
    return {"for": "today"} if buffer == "omit" else {"for": "today", "inv-freq": "store"}
