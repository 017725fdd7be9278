"""Folders and files of other tools, recognized by name, so that an error can say what they are.

Each function of the table knows one kind: from the names in the folder and, where these do not
suffice, from a few bytes of a file. Nothing here is slow, and nothing is executed.
"""

import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from neox_bridge.errors import BridgeError
from neox_bridge.formats.file_kinds import (
    GGUF_WAY_OUT,
    HEAD_BYTES,
    is_apple_double,
    misplaced,
    refuse_misplaced,
)
from neox_bridge.layouts.config_files import has_config_beside
from neox_bridge.layouts.file_names import HF_WEIGHTS, STEP, is_step_file
from neox_bridge.layouts.hub_cache import cached_repos
from neox_bridge.layouts.linked_files import brought_along
from neox_bridge.layouts.text_files import list_folder, read_json
from neox_bridge.stores.paths import absolute, is_local, isdir, isfile, lexists, read_at
from neox_bridge.stores.step_names import step_of
from neox_bridge.wording import some

# of a tensor of an adapter that is not merged, as peft names them
ADAPTER_NAME = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer)\b")
_ADAPTER_CONFIG = "adapter_config.json"
_MERGEABLE = ("LORA", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3", "HRA", "VERA", "FOURIERFT")
_SHARD = re.compile(r"((?:pytorch_)?model)-(\d+)-of-(\d+)\.(safetensors|bin)")
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp")
_MOST_SHARDS = 10_000
_TRACKER = "latest_checkpointed_iteration.txt"  # of Megatron-LM
_Explained = tuple[str, str] | None  # what a folder is, and the way out


class ForeignFolder(BridgeError):
    """A folder that another tool wrote, and that holds no checkpoint of either framework.

    kind: the short name of what it is; may be empty. way_out: what to do instead; may be empty.
    """

    def __init__(self, message: str, kind: str = "", way_out: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.way_out = way_out


@dataclass(frozen=True)
class _Folder:
    """A folder to be recognized, listed once."""

    path: str
    names: Sequence[str]

    @cached_property
    def quoted(self) -> str:
        return shlex.quote(self.path)

    def ending(self, *ends: str) -> list[str]:
        return [name for name in self.names if name.endswith(ends)]

    def matching(self, pattern: str) -> list[str]:
        return [name for name in self.names if re.fullmatch(pattern, name)]

    def inside(self, name: str) -> list[str]:
        """The names in a folder below; none where it is no folder."""
        path = os.path.join(self.path, name)
        return list_folder(path) if isdir(path) else []

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)


def refuse_foreign(path: str) -> None:
    """Raise ForeignFolder if a folder is that of another tool, with the way out."""
    names = [name for name in list_folder(path) if not is_apple_double(name)]
    folder = _Folder(absolute(path), names)
    for name, explain in _KINDS.items():
        if known := explain(folder):
            what, way_out = known
            raise ForeignFolder(f"{path} {what}. {way_out}", name, way_out)


def refuse_deepspeed(path: str, tensors: str) -> None:
    """Raise ForeignFolder for what DeepSpeed saved of a model that is not GPT-NeoX's.

    tensors: some names of its tensors.
    """
    what, way_out = _deepspeed_explained(_Folder(absolute(path), list_folder(path)))
    raise ForeignFolder(f"{path} {what}, with tensors such as {tensors}. {way_out}", "deepspeed")


def refuse_file(path: str) -> None:
    """Raise BridgeError for a file where a folder is needed, with what it is."""
    head = read_at(path, 0, HEAD_BYTES) if isfile(path) else b""
    refuse_misplaced(path, head)
    folder = os.path.dirname(absolute(path))
    if path.endswith((".nemo", ".tar", ".zip")):
        raise ForeignFolder(
            f"{path} is an archive, not a folder. Unpack it and name the folder.", "archive"
        )
    raise BridgeError(
        f"{path} is a file, but a checkpoint is a folder. Name the folder: {shlex.quote(folder)}"
    )


def adapter_beside(path: str) -> str:
    """The name of an adapter's file that lies beside full weights; empty if there is none."""
    return _ADAPTER_CONFIG if lexists(os.path.join(path, _ADAPTER_CONFIG)) else ""


def merge_command(path: str) -> str:
    """The command that merges an adapter into its base, with peft."""
    merged = f"{absolute(path).rstrip('/')}-merged"
    program = (
        "import sys; from peft import AutoPeftModelForCausalLM as Model; "
        'model = Model.from_pretrained(sys.argv[1], torch_dtype="auto"); '
        "model.merge_and_unload().save_pretrained(sys.argv[2])"
    )
    return shlex.join(["python", "-c", program, absolute(path), merged])


def shards_without_index(path: str) -> list[str] | None:
    """The names of all shards where their index is missing; None if there are no shards.

    Raises BridgeError if the names say that some shards are missing.
    """
    shards = [m for name in list_folder(path) if (m := _SHARD.fullmatch(name))]
    for ending in ("safetensors", "bin"):
        group = [m for m in shards if m[4] == ending]
        if not group:
            continue
        counts = {int(m[3]) for m in group}
        if len(counts) > 1 or len({m[1] for m in group}) > 1:
            raise BridgeError(
                f"{path} contains shards of different sets ({some([m[0] for m in group])}) and "
                "no index file that lists the valid ones. Keep only one set."
            )
        count = counts.pop()
        numbers = {int(m[2]) for m in group}
        if 0 < count <= _MOST_SHARDS and numbers == set(range(1, count + 1)):
            return sorted(m[0] for m in group)
        missing = [n for n in range(1, min(count, _MOST_SHARDS) + 1) if n not in numbers]
        raise BridgeError(
            f"{path} contains {len(numbers)} of {count} shards and no index file. Missing "
            f"shards: {some([str(n) for n in missing])}. "
            f"{unfinished_download(path) or 'Download the missing files.'}"
        )
    return None


def unfinished_download(path: str) -> str:
    """A sentence on files that a download left unfinished; empty if there are none."""
    names = unfinished_files(path)
    if not names:
        return ""
    return (
        f"A download into this folder did not finish ({some(names, 2)}). Run the same download "
        "again to continue it."
    )


def unfinished_files(path: str) -> list[str]:
    """The names of the files that a download into a folder left unfinished."""
    if not is_local(path):
        return []
    names = [name for name in list_folder(path) if name.endswith(_UNFINISHED)]
    cache = os.path.join(path, ".cache", "huggingface", "download")
    if os.path.isdir(cache):
        names += [name for name in sorted(os.listdir(cache)) if name.endswith(".incomplete")]
    return names


# of each kind: what the folder is, and the way out; None for other folders


def _has_weights(folder: _Folder) -> bool:
    return any(map(HF_WEIGHTS.fullmatch, folder.names))


def _adapter(folder: _Folder) -> _Explained:
    is_adapter = _ADAPTER_CONFIG in folder.names or folder.matching(r"adapter_model\..*")
    if not is_adapter or _has_weights(folder):
        return None
    config = {}
    path = folder.file(_ADAPTER_CONFIG)
    if _ADAPTER_CONFIG in folder.names and brought_along(path, folder.path):
        config = read_json(path)
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    named = kind if isinstance(kind, str) and kind.isprintable() and len(kind) < 40 else "LoRA"
    of = f" of {base}" if isinstance(base, str) and base.isprintable() and len(base) < 200 else ""
    label = "LoRA" if named.upper() == "LORA" else named
    what = (
        f"is a {label} adapter{of} (peft), not a model: it contains changes to the weights of a "
        "model"
    )
    if kind is not None and named.upper() not in _MERGEABLE:
        return (
            what,
            "Adapters of this kind cannot be merged into the weights, so they cannot be converted.",
        )
    return what, (
        f"Merge it into its base model first: {merge_command(folder.path)}; then convert "
        f"{folder.path.rstrip('/')}-merged"
    )


def _gguf(folder: _Folder) -> _Explained:
    names = folder.ending(".gguf")
    if not names or _has_weights(folder):
        return None
    return f"contains a GGUF file of llama.cpp ({some(names, 2)})", GGUF_WAY_OUT


def _dcp(folder: _Folder) -> _Explained:
    if not folder.ending(".distcp"):
        return None
    out = folder.file("pytorch_model.bin")
    command = ["python", "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch"]
    return (
        "is a checkpoint of torch.distributed.checkpoint (DCP: .metadata and *.distcp)",
        "If the program that wrote it can save a Hugging Face model, convert that. Otherwise "
        f"merge it into one file with PyTorch: {shlex.join([*command, folder.path, out])}. Then "
        "put the config.json of the model beside that file and convert the folder. Its tensors "
        "need the names that transformers uses.",
    )


def _fsdp(folder: _Folder) -> _Explained:
    for name in folder.matching(r"pytorch_model_fsdp_\d+|fsdp_model.*|model"):
        if any(inner.endswith(".distcp") for inner in folder.inside(name)):
            inside = folder.file(name)
            return (
                f"contains the weights as FSDP shards of torch.distributed.checkpoint ({inside})",
                "Merge them with accelerate: "
                f"{shlex.join(['accelerate', 'merge-weights', inside, folder.path])}. Then put "
                "the config.json of the model into this folder and convert it again.",
            )
    return None


def _megatron_steps(folder: _Folder) -> list[list[str]]:
    """What is in folders of iterations; those of other programs have the names of steps as well."""
    inside = map(folder.inside, folder.matching(r"iter_\d+|release"))
    files = ("common.pt", "metadata.json")
    return [
        names
        for names in inside
        if any(n in files or n.startswith(("mp_rank_", "model_optim")) for n in names)
    ]


def _megatron_core(folder: _Folder) -> _Explained:
    is_flat = "metadata.json" in folder.names and folder.ending(".distcp")
    if not is_flat and not any("metadata.json" in names for names in _megatron_steps(folder)):
        return None
    return (
        "is a distributed checkpoint of Megatron Core (torch_dist: metadata.json, common.pt and "
        "*.distcp), which GPT-NeoX does not use",
        "Export it to Hugging Face format with Megatron-Bridge and convert the result.",
    )


def _megatron(folder: _Folder) -> _Explained:
    ranks = folder.matching(r"mp_rank_\d+(_\d+)*")
    names = {*folder.names, *(n for rank in ranks for n in folder.inside(rank))}
    files = {"model_optim_rng.pt", "model_rng.pt", "distrib_optim.pt", _TRACKER}
    if not files & names and not _megatron_steps(folder):
        return None
    return (
        "is a checkpoint of Megatron-LM (iter_N/mp_rank_NN/model_optim_rng.pt), which GPT-NeoX "
        "does not use",
        "Convert it to Hugging Face format with the tools of Megatron-LM (tools/checkpoint) or "
        "with Megatron-Bridge, and convert the result.",
    )


def _trainer(folder: _Folder) -> _Explained:
    steps = [name for name in folder.matching(r"checkpoint-\d+") if isdir(folder.file(name))]
    if not steps:
        return None
    steps.sort(key=lambda name: step_of(name) or 0)
    last = shlex.quote(folder.file(steps[-1]))
    return (
        f"is the output folder of a transformers Trainer. The models are in {some(steps)}",
        f"Name one of them, for example {last}. Or convert all of them: neox-bridge batch "
        f"{folder.quoted} {shlex.quote(folder.path.rstrip('/') + '-neox')}",
    )


def _parent(folder: _Folder) -> _Explained:
    below = [name for name in folder.names if not name.startswith(".")]
    inside = {name: folder.inside(name) for name in below}
    configs = {"config.json", "adapter_config.json"}
    models = [name for name in below if configs & set(inside[name]) or _is_neox(inside[name])]
    if not models or _is_neox(below):
        return None
    models.sort(key=lambda name: step_of(name) or 0)
    one = f"Name one of them, for example {shlex.quote(folder.file(models[-1]))}"
    if len(models) > 1 and all(step_of(name) is not None for name in models):
        target = folder.path.rstrip("/") + ("-hf" if _is_neox(inside[models[-1]]) else "-neox")
        command = shlex.join(["neox-bridge", "batch", folder.path, target])
        one += f". Or convert all of them: {command}"
    return f"does not contain a model itself. There are models in {some(models)}", one


def _is_neox(names: Sequence[str]) -> bool:
    """Whether these are the names in the folder of a GPT-NeoX run, or of its step."""
    return "latest" in names or any(STEP.fullmatch(name) or is_step_file(name) for name in names)


def _deepspeed(folder: _Folder) -> _Explained:
    """What DeepSpeed saved for transformers' Trainer, or for another program than GPT-NeoX."""
    steps = folder.matching(r"global_step\d+")
    names = [*folder.names, *(n for step in steps for n in folder.inside(step))]
    saved = any(re.fullmatch(r".*mp_rank_\d+_.*states\.pt", name) for name in names)
    if not saved or "configs" in names or any(name.startswith("layer_") for name in names):
        return None
    return None if has_config_beside(folder.path) else _deepspeed_explained(folder)


def _deepspeed_explained(folder: _Folder) -> tuple[str, str]:
    config = "" if "config.json" in folder.names else ", put the config.json of the model there,"
    way = "Save the model with Trainer.save_model() or with save_16bit_model()"
    if "zero_to_fp32.py" in folder.names:
        script = ["python", folder.file("zero_to_fp32.py"), folder.path]
        way = (
            f"Collect the weights with DeepSpeed's own script: {shlex.join([*script, folder.path])}"
        )
    return (
        "contains a checkpoint that DeepSpeed saved for a program other than GPT-NeoX (mp_rank "
        "and ZeRO files without configs/*.yml)",
        f"{way}{config} and convert the folder again.",
    )


def _nemo(folder: _Folder) -> _Explained:
    if not folder.ending(".nemo") and not {"context", "weights"} <= set(folder.names):
        return None
    return (
        "is a checkpoint of NVIDIA NeMo",
        "Export it to Hugging Face format with NeMo (llm.export_ckpt) and convert the result.",
    )


def _tensorflow(folder: _Folder) -> _Explained:
    if not (names := folder.ending(".h5", ".msgpack", ".ckpt.index", ".ot")):
        return None
    return (
        f"contains the weights only in a TensorFlow, JAX or Rust format ({some(names)})",
        "Load the model with transformers (from_tf=True or from_flax=True), save it with "
        "save_pretrained, and convert the result.",
    )


def _compiled(folder: _Folder) -> _Explained:
    names = folder.matching(r".*\.(onnx|engine|mlpackage|tflite)|openvino_model\.xml")
    if not names:
        return None
    return (
        f"contains a model that was compiled for inference ({some(names)})",
        "Convert the Hugging Face model that it was made from.",
    )


def _orbax(folder: _Folder) -> _Explained:
    if not folder.matching(r"_METADATA|_CHECKPOINT_METADATA|manifest\.ocdbt"):
        return None
    return (
        "is a checkpoint of JAX (Orbax or tensorstore)",
        "Export it to Hugging Face format with the program that wrote it and convert the result.",
    )


def _cache(folder: _Folder) -> _Explained:
    if not (repos := cached_repos(list(folder.names))):
        return None
    return (
        f"is a Hugging Face cache. The models are in {some(repos)}",
        f"Name one of them, for example {shlex.quote(folder.file(repos[0]))}",
    )


def _unfinished(folder: _Folder) -> _Explained:
    sentence = unfinished_download(folder.path)
    return ("does not contain a complete model", sentence) if sentence else None


def _optimizer_export(folder: _Folder) -> _Explained:
    """What export-optimizer writes; see ``optimizer_export``."""
    if not {"optimizer.json", "exp_avg.safetensors"} <= set(folder.names):
        return None
    return (
        "contains optimizer states that export-optimizer wrote, but no weights",
        f"To check its files: neox-bridge verify {folder.quoted}. To take the states back into "
        f"their run, add them to reshard: `states={folder.quoted}`",
    )


def _weights_only(folder: _Folder) -> _Explained:
    names = [
        name
        for name in folder.ending(".pt", ".pth", ".ckpt", ".bin", ".safetensors")
        if not name.startswith(("optimizer", "scheduler", "rng_state", "training_args", "consolid"))
        and not name.endswith(("model_states.pt", "optim_states.pt"))
    ]
    if not names or "config.json" in folder.names:
        return None
    for name in names:
        path = folder.file(name)
        if isfile(path) and (kind := misplaced(path, read_at(path, 0, HEAD_BYTES))):
            return f"has no config.json, and {name} is {kind.what}", kind.way_out
    return (
        "is neither a Hugging Face model nor a GPT-NeoX checkpoint: it contains weights "
        f"({some(names)}) without a config.json, which would describe their model",
        f"Put the config.json of the model into {folder.quoted}. transformers names its weights "
        "model.safetensors or pytorch_model.bin.",
    )


def _ggml(folder: _Folder) -> _Explained:
    for path in map(folder.file, folder.ending(".bin")):
        if isfile(path) and read_at(path, 0, 4) in (b"lmgg", b"fmgg", b"tjgg", b"GGUF"):
            return "contains a model of llama.cpp (ggml)", GGUF_WAY_OUT
    return None


_KINDS: dict[str, Callable[[_Folder], _Explained]] = {
    "adapter": _adapter,
    "gguf": _gguf,
    "megatron-core": _megatron_core,
    "megatron": _megatron,
    "fsdp": _fsdp,
    "dcp": _dcp,
    "nemo": _nemo,
    "orbax": _orbax,
    "trainer": _trainer,
    "deepspeed": _deepspeed,
    "unfinished": _unfinished,
    "ggml": _ggml,
    "tensorflow": _tensorflow,
    "compiled": _compiled,
    "cache": _cache,
    "parent": _parent,
    "optimizer-export": _optimizer_export,
    "weights-only": _weights_only,
}
