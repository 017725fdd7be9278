"""Finds the one command that fixes the problem in a message, with the user's paths."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from neox_bridge.doctor.explain import recognise
from neox_bridge.doctor.judge_neox import stored_block_keys
from neox_bridge.doctor.messages import Diagnosis, Message, read_message, short
from neox_bridge.doctor.verdict import free_folder
from neox_bridge.findings import Command, Finding
from neox_bridge.frameworks.eras import FLAG, LATER_ERAS, TODAY, InvFreq, MlpNames, known_keys
from neox_bridge.frameworks.facts import TreeFacts
from neox_bridge.frameworks.source_tree import looks_like_tree
from neox_bridge.frameworks.targets import Target, name_of, words_for
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.wording import some

# Placeholders in the text of a diagnosis that the user must fill in.
_CHECKPOINT, _NEW, _TREE = "CHECKPOINT", "NEW", "TREE"
_BY_DATE = (
    "name the tree by its date: `era=neox@2024-03` before 2024-03-04, neox@2024-09 until "
    "2024-09-06, neox@2024-10 until 2024-11-12, today since then"
)
_ORDER = ("for", "inv-freq", "layout", "tp", "dp", "vocab-multiple", "vocab-rows")
_RESHARD = frozenset({"for", "layout", "tp", "dp"})
_FRAME = re.compile(r'File "(/[^"\n]+?)/(?:megatron/|train\.py|generate\.py|deepy\.py)')
_DENSE = r"mlp\.(?:dense_h_to_4h|dense_4h_to_h|w[123])\.\w+"
_LAYER = re.compile(r"^(?:module\.)?sequential\.(\d+)\.|(?<=layers\.)(\d+|\{[^}]*\})(?=\.)")
# Several trees print the same message, so the user must name the tree.
ANY_TREE = "neox:TREE"


@dataclass(frozen=True, slots=True)
class Advice:
    """What a message means, and what to do.

    Attributes:
        causes: The recognized causes.
        missing: The missing keys without layer numbers and duplicates.
        unexpected: The unexpected keys in the same form.
        fix: The command or setting that fixes all causes; "" if there is no single one.
        others: Other ways.
        more: Links.
        wrong: Tensors of another shape, with both shapes.
        layers: The number of layers that contain the keys; 0 if unknown.
        steps: All steps of the fix, in order.
        framework: The framework that did not load the checkpoint, for display; "" if unknown.
        unnamed: Placeholders in these steps for paths that the user did not give.
        contradiction: Why the message cannot be about the checkpoint; "" if it can.
    """

    causes: tuple[Diagnosis, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    fix: str
    others: tuple[str, ...]
    more: tuple[str, ...]
    wrong: tuple[str, ...] = ()
    layers: int = 0
    steps: tuple[str, ...] = ()
    framework: str = ""
    unnamed: tuple[str, ...] = ()
    contradiction: str = ""


def advise(
    text: str, path: str = "", checkpoint: Checkpoint | None = None, target: Target | None = None
) -> Advice | None:
    """Explain a pasted message, and find the one command that fixes it.

    Args:
        text: The output of the framework.
        path: The checkpoint that it is about, as the user wrote it; "" if unknown.
        checkpoint: The same, opened.
        target: What should load it, if the user named that.

    Returns:
        The advice; None if no message is recognized.
    """
    message = read_message(text)
    causes = [_for_checkpoint(cause, checkpoint) for cause in recognise(text)]
    if not causes:
        return None
    contradiction = _contradiction(message, causes, checkpoint)
    if checkpoint is not None and contradiction:
        return _about_another(message, causes, checkpoint, contradiction)
    tree = tree_in(message.text)
    if tree is None and isinstance(target, TreeFacts) and looks_like_tree(target.name):
        tree = target.name
    options = _options(message, causes, checkpoint, target, tree)
    fix = _command(options, any(cause.resumes for cause in causes)) if options else ""
    if fix:
        causes = [replace(c, remedy=fix) if _is_settled(c, options) else c for c in causes]
    new = _new_path(path, options.get("for", ""))
    filled = [
        replace(
            cause,
            remedy=_filled(cause.remedy, path, new, tree),
            others=tuple(_filled(other, path, new, tree) for other in cause.others),
        )
        for cause in causes
    ]
    steps = list(dict.fromkeys(cause.remedy for cause in filled))
    if fix:  # first, because it writes the checkpoint that the other steps use
        fix = _filled(fix, path, new, tree)
        steps = [fix, *(step for step in steps if step != fix)]
    # The fix of only one of several causes would end in the next error.
    others = filled[0].others if len(filled) == 1 else ()
    if options.get("for") == ANY_TREE:
        others = (_BY_DATE, *others)
    return Advice(
        causes=tuple(filled),
        missing=_blocks(message.missing),
        unexpected=_blocks(message.unexpected),
        fix=steps[0] if fix or len(steps) == 1 else "",
        others=others,
        more=tuple(dict.fromkeys(link for cause in filled for link in cause.more)),
        wrong=tuple(
            f"{size.key}: {list(size.stored)}, {list(size.wanted)} expected"
            for size in message.sizes
        ),
        layers=_layers(message, checkpoint),
        steps=tuple(steps),
        framework=_framework(options, target, tree),
        unnamed=tuple(
            word
            for word, value in ((_CHECKPOINT, path), (_TREE, tree))
            if not value and any(re.search(rf"\b{word}\b", way) for way in (*steps, *others))
        ),
    )


def is_among(advice: Advice, findings: Iterable[Finding]) -> bool:
    """Whether the findings of a checkpoint explain everything in its message.

    Their fix is then better, because it also covers problems that the message does not name. A
    cause without tensor keys is explained by a finding about the same framework change.
    """
    errors = [finding.details for finding in findings if finding.severity == "error"]
    keys = {key for one in errors for key in (*one.missing, *one.unexpected)}
    links = {link for one in errors for link in one.more}
    return not advice.contradiction and all(
        (cause.keys and keys.issuperset(_blocks(cause.keys)))
        or (cause.more and links.issuperset(cause.more))
        for cause in advice.causes
    )


def _contradiction(
    message: Message, causes: Sequence[Diagnosis], checkpoint: Checkpoint | None
) -> str:
    """Why a message of GPT-NeoX cannot be about the checkpoint; "" if it can."""
    if checkpoint is None or checkpoint.neox is None or message.by_transformers:
        return ""
    if any(cause.resumes for cause in causes) and not checkpoint.has_optimizer:
        return "The message is about optimizer states, and this checkpoint has none."
    stored = () if checkpoint.neox.te else stored_block_keys(checkpoint)
    keys = [key for key in _blocks(message.missing) if key in stored]
    if not keys:
        return ""
    return f"The message says that the checkpoint does not contain {some(keys)}, but it does."


def _about_another(
    message: Message, causes: Sequence[Diagnosis], checkpoint: Checkpoint, contradiction: str
) -> Advice:
    """What to check if the message is not about the checkpoint."""
    check = (
        "check which checkpoint the run loads: the yml names the folder (load), and the file "
        f"latest in it names the step (here: {checkpoint.neox_state.step})"
    )
    plain = [replace(cause, remedy=check, others=(), others_with_states=()) for cause in causes]
    return Advice(
        causes=tuple(plain),
        missing=_blocks(message.missing),
        unexpected=_blocks(message.unexpected),
        fix="",
        others=(),
        more=(),
        steps=(check,),
        contradiction=contradiction,
    )


def _for_checkpoint(cause: Diagnosis, checkpoint: Checkpoint | None) -> Diagnosis:
    """Complete a diagnosis with settings of the checkpoint and the options that they require."""
    state = checkpoint.neox if checkpoint is not None else None
    if checkpoint is None or checkpoint.has_optimizer:
        cause = replace(cause, others=(*cause.others, *cause.others_with_states))
    needs = cause.needs
    if cause.tp_change is not None and state is not None:
        stored, wanted = cause.tp_change
        if state.tp * stored % wanted == 0:
            needs = (*needs, ("tp", str(state.tp * stored // wanted)))
    if not cause.settings:
        return replace(cause, needs=needs)
    as_saved = f"in the yml: {', '.join(cause.settings)} as when the checkpoint was saved"
    if checkpoint is not None and state is not None:
        known = {**state.args, **checkpoint.raw, "model_parallel_size": state.tp}
        values = [f"{key}: {known[key]}" for key in cause.settings if known.get(key) is not None]
        unset = [key for key in cause.settings if known.get(key) is None]
        as_saved = f"in the yml: {', '.join(values)}" if values else "in the yml:"
        as_saved += f"{',' if values else ''} no {' and no '.join(unset)}" if unset else ""
    if cause.remedy or needs:
        return replace(cause, needs=needs, others=(as_saved, *cause.others))
    return replace(cause, needs=needs, remedy=as_saved)


def _is_settled(cause: Diagnosis, options: Mapping[str, str]) -> bool:
    """Whether the command with these options fixes a cause."""
    if cause.needs:
        # a target that the user named replaces the one that a cause needs
        return all(
            options.get(name) == value or (name == "for" and name in options)
            for name, value in cause.needs
        )
    return cause.by_convert


def _options(
    message: Message,
    causes: Sequence[Diagnosis],
    checkpoint: Checkpoint | None,
    target: Target | None,
    tree: str | None,
) -> dict[str, str]:
    """The options of the one command that fixes all causes."""
    options = {key: value for cause in causes for key, value in cause.needs}
    expected = expected_by(message)
    by_keys = convert_options(expected, checkpoint)
    if not (options or by_keys):
        return {}
    if isinstance(target, TreeFacts) and ("for" in options or "dp" not in options):
        by_keys = {"for": name_of(target)}
        options.pop("for", None)
    elif tree is not None and by_keys:
        by_keys = {"for": f"neox:{tree}"}
        if expected.names != "dense" and expected.buffer == "store":
            by_keys["inv-freq"] = "store"  # the yml of that tree sets it
    options = {**by_keys, **options}
    if "dp" in options and not options.keys() <= _RESHARD:
        del options["dp"]  # reshard does not take the other options
    return options


def _command(options: Mapping[str, str], resumes: bool) -> Command:
    """The command with these options. resumes: whether it must keep the optimizer states."""
    words = ["neox-bridge", "convert", _CHECKPOINT, _NEW, "--to", "neox"]
    if resumes and options.keys() <= _RESHARD:
        words = ["neox-bridge", "reshard", _CHECKPOINT, _NEW]
    for name in sorted(options, key=_ORDER.index):
        words += [f"--{name}", options[name]]
    return Command(shlex.join(words))


def _new_path(path: str, era: str) -> str:
    """A new folder next to the checkpoint."""
    match = re.search(r"@([\w.-]+)$", era)
    return free_folder(path, match[1] if match else "fixed") if path else ""


def _filled(text: str, path: str, new: str, tree: str | None) -> str:
    """The text with the user's paths, quoted for a shell."""
    filled = text
    for word, value in ((_CHECKPOINT, path), (_NEW, new), (_TREE, tree)):
        if value:
            filled = shlex.quote(value).join(re.split(rf"\b{word}\b", filled))
    return Command(filled) if isinstance(text, Command) else filled


def _blocks(keys: Iterable[str]) -> tuple[str, ...]:
    """Keys without block or layer numbers and duplicates."""
    return tuple(dict.fromkeys(_LAYER.sub(lambda m: "" if m[1] else "*", key) for key in keys))


def _layers(message: Message, checkpoint: Checkpoint | None) -> int:
    """In how many layers the keys are missing or unexpected.

    A pipeline stage stops at its first layer, so the checkpoint gives a better number.
    """
    keys = [*message.missing, *message.unexpected]
    inside = [key for key in keys if re.search(r"attention\.|mlp\.", key)]
    if not inside:
        return 0
    if checkpoint is not None:
        return checkpoint.config.layers
    numbers = {match[0] for key in inside if (match := _LAYER.search(key))}
    return len(numbers) if not any("{" in number for number in numbers) else 0


def _framework(options: Mapping[str, str], target: Target | None, tree: str | None) -> str:
    """The framework that did not load the checkpoint, according to the message or the user."""
    if target is not None:
        return words_for(target)
    if tree is not None:
        return f"GPT-NeoX at {tree}"
    era = options.get("for", "")
    if era == "today":
        return "today's GPT-NeoX"
    return f"GPT-NeoX {era.removeprefix('neox@')}" if era.startswith("neox@") else ""


@dataclass(frozen=True, slots=True)
class Expected:
    """The properties that a tree expects of a checkpoint; None if the message does not show it.

    Attributes:
        names: The naming scheme of the MLP.
        buffer: Whether its state dict has inv_freq.
        unknown_key: A yml key that it rejects.
    """

    names: MlpNames | None = None
    buffer: InvFreq | None = None
    unknown_key: str | None = None

    def __bool__(self) -> bool:
        return any((self.names, self.buffer, self.unknown_key))


def expected_by(message: Message) -> Expected:
    """The properties that the tree that printed a message expects."""
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
    """The source tree whose frames are in a traceback, if it is on this machine."""
    paths = dict.fromkeys(_FRAME.findall(text))
    return next((path for path in paths if looks_like_tree(path)), None)


def convert_options(expected: Expected, checkpoint: Checkpoint | None) -> dict[str, str]:
    """The options of ``convert`` whose result such a tree loads; empty if none is known to help.

    A tree with the old names that stores the buffer is from before 2024-03-04. A tree from then to
    2024-09 stores it only if its yml sets rotary_save_freqs_buffer, which changes no file.
    """
    state = checkpoint.neox if checkpoint is not None else None
    names, buffer = expected.names, expected.buffer
    if key := expected.unknown_key:
        refusing = [era for era in LATER_ERAS if key not in known_keys(era)]
        if len(refusing) == len(LATER_ERAS) or not refusing:
            return {}  # from a fork, or not from a tree
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
        return {"inv-freq": "omit"}  # keeps the names
    names = names or "dense"
    if names == "dense" and checkpoint is not None and FLAG in checkpoint.raw:
        return {"for": "neox@2024-09"}  # the tree accepted the yml with that key
    buffer = buffer or (state.inv_freq if state is not None else "omit")
    if names == "dense":
        return {"for": "neox@2024-03" if buffer == "store" else "neox@2024-09"}
    return {"for": "today"} if buffer == "omit" else {"for": "today", "inv-freq": "store"}
