"""Which yml files hold the settings of a GPT-NeoX checkpoint, among those that lie around it.

GPT-NeoX itself writes them to ``configs`` in the folder of the step. Published checkpoints have
them beside the weights, under any name, and with them files of other programs: those are told apart
by their keys, never by their names.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.findings import Finding
from neox_bridge.formats.file_kinds import is_apple_double
from neox_bridge.formats.yml import read_yml
from neox_bridge.frameworks.keys import block_keys, neox_keys, removed_from_neox
from neox_bridge.layouts.known_files import is_known
from neox_bridge.layouts.linked_files import check_own
from neox_bridge.layouts.text_files import list_folder
from neox_bridge.stores.paths import is_local, isdir, isfile, size

FOLDER = "configs"  # in the folder of a step, or of a run
_ENDINGS = (".yml", ".yaml", ".json")
_MOST_BYTES = 1 << 20  # of a config
_MOST_FILES = 50  # beside the weights; a folder with more is no checkpoint's own
# settings that other trainers name in the same way; DeepSpeed's own are added to them
_COMMON = frozenset(
    """batch_size comment eval_interval eval_iters eval_tasks load local_rank log_dir log_interval
    lr min_lr num_samples optimizer precision profile prompt_end rank recompute save scheduler seed
    split temperature top_k top_p user_script vocab_file wandb_group wandb_project warmup
    weight_decay world_size zero_optimization""".split()
)
_SIZES = ("num_layers", "hidden_size", "num_attention_heads")  # which tell a model from another


@dataclass(frozen=True, slots=True)
class Skipped:
    """A yml or JSON file beside a checkpoint whose settings were not read.

    path: of the file. reason: why, as the end of a sentence. broken: whether it could not be read,
        so that it may have been one of the run's.
    """

    path: str
    reason: str
    broken: bool = False


@dataclass(frozen=True, slots=True)
class ConfigFiles:
    """The files with a run's settings, and those beside them that are not such files."""

    paths: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()


def config_files(folder: str, root: str) -> ConfigFiles:
    """The yml files of a step: in its ``configs``, else beside its weights, else those of its run.

    root: the same as ``folder`` where nothing above it belongs to the checkpoint.
    Raises BridgeError for a link that leads out of the checkpoint, and for a yml that cannot be
    read where no other one can.
    """
    inside = os.path.join(folder, FOLDER)
    if paths := _in_configs(inside, folder, root):
        return ConfigFiles(
            paths, tuple(_unread(folder, "the folder configs has the settings of the run"))
        )
    skipped: list[Skipped] = []
    for place in dict.fromkeys((folder, root)):
        beside = _beside(place, folder, root)
        skipped += beside.skipped
        if beside.paths:
            return ConfigFiles(beside.paths, tuple(skipped))
    if root != folder and (paths := _in_configs(os.path.join(root, FOLDER), root)):
        return ConfigFiles(paths, tuple(skipped))
    for file in skipped:
        if file.broken:
            read_yml(file.path)  # raises the error, with the line
    return ConfigFiles((), tuple(skipped))


def has_config_beside(folder: str) -> bool:
    """Whether settings of a GPT-NeoX run lie in a folder itself."""
    return bool(_beside(folder, folder).paths)


def config_nearby(folder: str) -> str:
    """A yml of some GPT-NeoX run above a folder of this machine, to be suggested; "" for none."""
    if not is_local(folder):
        return ""
    above = os.path.dirname(folder)
    with suppress(BridgeError, OSError):
        return next(iter(_beside(above, above).paths), "")
    return ""


def skipped_finding(file: Skipped) -> Finding:
    """What is said of a yml that was not read."""
    name = os.path.basename(file.path)
    remedy = (
        f"if it belongs to this run, name every yml of the run with `configs=`, including {name}"
    )
    message = f"{file.path} was not read: {file.reason}"
    return Finding("yml-skipped", "warning" if file.broken else "info", message, remedy)


def is_neox_config(values: Mapping[str, Any]) -> bool:
    """Whether settings are those of a GPT-NeoX run, by their keys (with underscores).

    At least half of them must be keys of some GPT-NeoX, one of them a key that neither DeepSpeed
    nor other trainers have. One file of several may hold only paths, or only the sizes of the
    model.
    """
    known = {key for key in values if key in neox_keys() or removed_from_neox(key)}
    shared = (_COMMON | block_keys()).difference(_SIZES)
    return 2 * len(known) >= len(values) and not known <= shared


def _in_configs(inside: str, *folders: str) -> tuple[str, ...]:
    """Every yml of a ``configs`` folder, which GPT-NeoX alone writes."""
    names = list_folder(inside) if isdir(inside) else []
    paths = tuple(os.path.join(inside, n) for n in names if _named_config(n))
    for path in paths:
        check_own(path, *folders)
    return paths


def _beside(place: str, *folders: str) -> ConfigFiles:
    """The ymls that lie in a folder itself, judged by their keys."""
    paths: list[str] = []
    sizes: dict[str, tuple[object, str]] = {}
    skipped: list[Skipped] = []
    for path in _candidates(place):
        check_own(path, *folders)
        if size(path) > _MOST_BYTES:
            continue  # a tokenizer, or an index
        try:
            values = read_yml(path)
        except BridgeError as error:
            if not path.endswith(".json"):
                skipped.append(Skipped(path, f"the file cannot be read ({error})", broken=True))
            continue
        if is_neox_config(values):
            paths.append(path)
            _check_one_model(values, path, sizes)
        elif not path.endswith(".json"):
            skipped.append(Skipped(path, "its keys are not GPT-NeoX settings"))
    return ConfigFiles(tuple(paths), tuple(skipped))


def _check_one_model(
    values: Mapping[str, Any], path: str, sizes: dict[str, tuple[object, str]]
) -> None:
    """Raise BridgeError if two ymls beside each other are of models of different sizes."""
    for key in _SIZES:
        if key not in values:
            continue
        first, other = sizes.setdefault(key, (values[key], path))
        if first != values[key]:
            raise BridgeError(
                f"{other} says {key}: {first}, and {path} says {key}: {values[key]}. These are "
                f"the settings of two models. Name the yml of this checkpoint: `configs={other}`"
            )


def _unread(folder: str, reason: str) -> Iterator[Skipped]:
    """The ymls beside the weights where others are used."""
    for path in _candidates(folder):
        if not path.endswith(".json"):
            yield Skipped(path, reason)


def _candidates(place: str) -> Sequence[str]:
    """Files beside the weights that may hold settings; what is known to be others is not read."""
    names = [name for name in list_folder(place) if _named_config(name) and not _is_other(name)]
    names = names[:_MOST_FILES]
    return [path for name in names if isfile(path := os.path.join(place, name))]


def _is_other(name: str) -> bool:
    """Whether a JSON file of this name is one of a model, a tokenizer or of this tool."""
    return name.endswith(".json") and (is_known(name) or name.endswith(".index.json"))


def _named_config(name: str) -> bool:
    return name.endswith(_ENDINGS) and not is_apple_double(name) and not name.startswith(".")
