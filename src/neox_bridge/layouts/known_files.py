"""Which files belong to a checkpoint, by their names: what --overwrite may delete, and what is new.

Paths are relative to the checkpoint's folder, with slashes. Folders in it that no checkpoint has
are never looked into.
"""

import os
import re
from collections.abc import Collection, Iterator

from neox_bridge.layouts.carried_names import FOLDER, LEGAL, OTHER, is_carried
from neox_bridge.layouts.checkpoint import RECORD
from neox_bridge.layouts.tokenizer import NAMES
from neox_bridge.stores.local_folder import unlisted
from neox_bridge.stores.paths import is_local, walk

_TOKENIZER = (
    *(*NAMES, "chat_template.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("tekken.json", "tiktoken.model", "preprocessor_config.json", "processor_config.json"),
)
_META = r"params\.json|checklist\.chk|consolidated(\.\d+)?\.(pth|safetensors)"
_HF = (
    rf"config\.json|\.gitattributes|({FOLDER}/)?(?i:{LEGAL}|{OTHER})|"
    r"(model|pytorch_model)([-.][\w.-]+)?\.(safetensors|bin)(\.index\.json)?|"
    # what export-optimizer writes
    r"(master|exp_avg|exp_avg_sq|momentum_buffer)\.safetensors|optimizer\.json"
)
_STEP = (
    r"layer_\d+-model_\d+-model_states\.pt|mp_rank_\d+_model_states\.pt|"
    r"(bf16_)?zero_pp_rank_\d+_mp_rank_\d+(_?optim|_model)_states\.pt|configs/[^/]+\.(ya?ml|json)|"
    r"zero/([^/]+/)?[^/]+\.pt"
)
_ROOT = (
    r"latest|latest_universal|zero_to_fp32\.py|"
    r"(finetune|resume|resume_universal)(\.new(-\d+)?)?\.yml"
)
_OWN = "|".join(map(re.escape, (RECORD, *_TOKENIZER)))
_KNOWN = re.compile(
    rf"{_HF}|{_META}|{_OWN}|{_ROOT}|(global_step\d+(_universal)?/)?({_STEP}|{re.escape(RECORD)})|"
    rf"original/({_META}|tokenizer\.model)|tokenizer/({'|'.join(map(re.escape, _TOKENIZER))})"
)
_FOLDERS = re.compile(
    rf"original|tokenizer|{FOLDER}|\.cache|(global_step\d+(_universal)?/)?(configs|zero(/[^/]+)?)|"
    r"global_step\d+(_universal)?"
)
# what file managers, clients of the Hub and Python leave, wherever they were
_BOOKKEEPING = re.compile(
    r"(.*/)?(\.DS_Store|\._[^/]*|Thumbs\.db|desktop\.ini|\.nfs[0-9a-f]+|__pycache__(/.*)?)|"
    r"\.cache(/huggingface(/.*)?)?"
)
# what a framework, or this tool, could take for a part of the model
_READ = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|msgpack|h5|onnx|json|ya?ml|jinja|model|tiktoken|py)|"
    r"(.*/)?(vocab|merges)\.txt|latest|latest_universal",
    re.IGNORECASE,
)


def is_known(path: str) -> bool:
    """Whether checkpoints have files of this name at this place."""
    return _KNOWN.fullmatch(path) is not None


def is_bookkeeping(path: str) -> bool:
    """Whether it is what other programs leave anywhere, and nobody misses."""
    return _BOOKKEEPING.fullmatch(path) is not None


def is_read(path: str) -> bool:
    """Whether what loads a checkpoint could take a file of this name into account."""
    if _READ.fullmatch(path) is not None:
        return True
    return is_known(path) and not is_carried(path.rpartition("/")[2])


def foreign(folder: str, recorded: Collection[str] = ()) -> Iterator[str]:
    """What is below a folder of a disk and isn't known to be of a checkpoint; folders end in "/".

    recorded: paths that a record of this tool names. Links are judged by their own names: what they
    lead to isn't deleted with them. Whatever is mounted below the folder is foreign.
    Raises BridgeError for a folder that can't be listed.
    """
    mounts = _mounts_below(folder)
    for path, entry in _walk(folder, recorded, mounts):
        if entry.is_symlink():
            fits = is_known(path) or path in recorded or _is_folder(path, recorded)
        elif entry.is_dir(follow_symlinks=False):
            fits = _is_folder(path, recorded) and os.path.join(folder, path) not in mounts
            path += "/"
        else:
            fits = entry.is_file() and (is_known(path) or path in recorded)
        if not fits:
            yield path


def foreign_objects(paths: Collection[str], recorded: Collection[str] = ()) -> list[str]:
    """The same of a store, where these paths are below a folder: the topmost foreign names."""
    topmost: dict[str, None] = {}
    for path in sorted(paths):
        if is_bookkeeping(path) or is_known(path) or path in recorded:
            continue
        parts = path.split("/")
        above = ["/".join(parts[:count]) for count in range(1, len(parts))]
        top = next((name + "/" for name in above if not _is_folder(name, recorded)), path)
        topmost[top] = None
    return list(topmost)


def files_below(folder: str, recorded: Collection[str] = ()) -> Iterator[str]:
    """Every file of a folder or URL, but bookkeeping; a folder that no checkpoint has as one name.

    Links are followed, as whoever reads the checkpoint does. recorded: as of ``foreign``.
    """
    if not is_local(folder):
        paths = (url[len(folder) + 1 :] for url, _ in walk(folder))
        yield from (path for path in paths if not is_bookkeeping(path))
        return
    for path, entry in _walk(folder, recorded, frozenset(), links=True):
        if not entry.is_dir():
            yield path
        elif not _is_folder(path, recorded):
            yield f"{path}/"


def _walk(
    folder: str, recorded: Collection[str], mounts: Collection[str], *, links: bool = False
) -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    """Everything but bookkeeping; of folders that a checkpoint has, what is in them too.

    links: whether linked folders are looked into.
    """
    waiting, seen = [""], {os.path.realpath(folder)}
    while waiting:
        inside = waiting.pop()
        place = os.path.join(folder, inside) if inside else folder
        try:
            with os.scandir(place) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            raise unlisted(place, error) from None
        for entry in entries:
            path = f"{inside}/{entry.name}" if inside else entry.name
            if is_bookkeeping(path) and not os.path.ismount(entry.path):
                if path == ".cache":
                    waiting.append(path)
                continue
            yield path, entry
            real = os.path.realpath(entry.path)
            looks = entry.is_dir(follow_symlinks=links) and entry.path not in mounts
            if looks and real not in seen and _is_folder(path, recorded):
                seen.add(real)
                waiting.append(path)


def _is_folder(path: str, recorded: Collection[str]) -> bool:
    """Whether checkpoints have folders of this name at this place, or the record has."""
    return _FOLDERS.fullmatch(path) is not None or any(
        name.startswith(f"{path}/") for name in recorded
    )


def _mounts_below(folder: str) -> frozenset[str]:
    """What is mounted below a folder, where the kernel tells (Linux); bind mounts too."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        return frozenset()
    points = (line.split()[4] for line in lines if len(line.split()) > 4)
    plain = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), point) for point in points)
    real = os.path.realpath(folder)
    return frozenset(
        os.path.join(folder, os.path.relpath(point, real))
        for point in plain
        if point.startswith(os.path.join(real, ""))
    )
