"""Decides by their names which files belong to a checkpoint, so that --overwrite may delete them.

Paths are relative to the folder of the checkpoint, with slashes. Folders that no checkpoint has are
never read.
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
# what file managers, clients of the Hub and Python leave in any folder
_BOOKKEEPING = re.compile(
    r"(.*/)?(\.DS_Store|\._[^/]*|Thumbs\.db|desktop\.ini|\.nfs[0-9a-f]+|__pycache__(/.*)?)|"
    r"\.cache(/huggingface(/.*)?)?"
)
# what a framework or neox-bridge could read as a part of the model
_READ = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|msgpack|h5|onnx|json|ya?ml|jinja|model|tiktoken|py)|"
    r"(.*/)?(vocab|merges)\.txt|latest|latest_universal",
    re.IGNORECASE,
)


def is_known(path: str) -> bool:
    """Whether checkpoints have a file with this path."""
    return _KNOWN.fullmatch(path) is not None


def is_bookkeeping(path: str) -> bool:
    """Whether other programs leave such a file in any folder, and nobody needs it."""
    return _BOOKKEEPING.fullmatch(path) is not None


def is_read(path: str) -> bool:
    """Whether a program that loads the checkpoint could read a file with this path."""
    if _READ.fullmatch(path) is not None:
        return True
    return is_known(path) and not is_carried(path.rpartition("/")[2])


def foreign(folder: str, recorded: Collection[str] = ()) -> Iterator[str]:
    """The paths below a local folder that do not belong to a checkpoint. Folders end with "/".

    Links are judged by their own names, because their targets are not deleted. Whatever is mounted
    below the folder is foreign.

    Args:
        folder: The folder.
        recorded: Paths in a record of neox-bridge, which belong to the checkpoint.

    Raises:
        BridgeError: A folder cannot be listed.
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
    """``foreign`` for the paths of objects in a store. Of foreign folders, only the top ones."""
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
    """Every file below a folder or URL, except bookkeeping. A foreign folder is one name.

    Links are followed, as by programs that read the checkpoint. recorded: see ``foreign``.
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
    """Every entry except bookkeeping, also below folders that a checkpoint has.

    links: whether linked folders are read.
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
    """Whether checkpoints, or the record, have a folder with this path."""
    return _FOLDERS.fullmatch(path) is not None or any(
        name.startswith(f"{path}/") for name in recorded
    )


def _mounts_below(folder: str) -> frozenset[str]:
    """The mount points below a folder, including bind mounts; none if the system is not Linux."""
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
