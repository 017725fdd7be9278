"""Folders and files of other tools, recognized by name, so that an error can say what they are.

Each entry of the table knows one kind: from the names in the folder and, where these do not
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
    HEAD_BYTES,
    gguf_way_out,
    is_apple_double,
    misplaced,
    refuse_misplaced,
)
from neox_bridge.layouts.config_files import has_config_beside
from neox_bridge.layouts.hub_cache import cached_repos
from neox_bridge.layouts.linked_files import brought_along
from neox_bridge.layouts.text_files import list_folder, read_json
from neox_bridge.stores.paths import absolute, is_local, isdir, isfile, lexists, read_at, size
from neox_bridge.stores.step_names import step_of
from neox_bridge.wording import some

# of a tensor of an adapter that is not merged, as peft names them
ADAPTER_NAME = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer)\b")
_ADAPTER_CONFIG = "adapter_config.json"
_MERGEABLE = ("LORA", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3", "HRA", "VERA", "FOURIERFT")
_SHARD = re.compile(r"((?:pytorch_)?model)-(\d+)-of-(\d+)\.(safetensors|bin)")
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp")
_WEIGHTS = re.compile(r"(model|pytorch_model).*\.(safetensors|bin)(\.index\.json)?")
_MOST_SHARDS = 10_000


class ForeignFolder(BridgeError):
    """A folder that another tool wrote, and that holds no checkpoint of either framework.

    Attributes:
        kind: The short name of what it is; may be empty.
        way_out: What to do instead; may be empty.
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


@dataclass(frozen=True, slots=True)
class _Kind:
    """name: for people and code. test: whether a folder is of it.

    explain: what the folder is, and the way out.
    """

    name: str
    test: Callable[[_Folder], object]
    explain: Callable[[_Folder], tuple[str, str]] | tuple[str, str]


def refuse_foreign(path: str) -> None:
    """Raise ForeignFolder where a folder is that of another tool, with the way out."""
    names = [name for name in list_folder(path) if not is_apple_double(name)]
    folder = _Folder(absolute(path), names)
    for kind in _KINDS:
        if kind.test(folder):
            known = kind.explain
            what, way_out = known if isinstance(known, tuple) else known(folder)
            raise ForeignFolder(f"{path} {what}. {way_out}", kind.name, way_out)


def refuse_deepspeed(path: str, tensors: str) -> None:
    """Raise ForeignFolder for what DeepSpeed saved of a model that is not GPT-NeoX's.

    tensors: some names of its tensors.
    """
    what, way_out = _deepspeed(_Folder(absolute(path), list_folder(path)))
    raise ForeignFolder(f"{path} {what}, with tensors such as {tensors}. {way_out}", "deepspeed")


def refuse_file(path: str) -> None:
    """Raise BridgeError for a file where a folder is needed, with what it is."""
    head = read_at(path, 0, HEAD_BYTES) if isfile(path) else b""
    refuse_misplaced(path, head)
    folder = os.path.dirname(absolute(path))
    if path.endswith((".nemo", ".tar", ".zip")):
        raise ForeignFolder(
            f"{path} is an archive, not a folder. Unpack it, and name the folder.", "archive"
        )
    raise BridgeError(
        f"{path} is a file, and a checkpoint is a folder. Name the folder: {shlex.quote(folder)}"
    )


def adapter_beside(path: str) -> str:
    """The name of an adapter's file that lies beside full weights; empty where there is none."""
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
    """The names of all shards where their index is missing; None where there are no shards.

    Raises BridgeError where the names say that some shards are missing.
    """
    shards = [m for name in list_folder(path) if (m := _SHARD.fullmatch(name))]
    for ending in ("safetensors", "bin"):
        group = [m for m in shards if m[4] == ending]
        if not group:
            continue
        counts = {int(m[3]) for m in group}
        if len(counts) > 1 or len({m[1] for m in group}) > 1:
            raise BridgeError(
                f"{path} holds shards of different sets ({some([m[0] for m in group])}) and no "
                "index file that says which count. Keep one set only."
            )
        count = counts.pop()
        numbers = {int(m[2]) for m in group}
        if 0 < count <= _MOST_SHARDS and numbers == set(range(1, count + 1)):
            return sorted(m[0] for m in group)
        missing = [n for n in range(1, min(count, _MOST_SHARDS) + 1) if n not in numbers]
        raise BridgeError(
            f"{path} holds {len(numbers)} of {count} shards and no index file; missing are the "
            f"numbers {some([str(n) for n in missing])}. "
            f"{unfinished_download(path) or 'Download the missing files.'}"
        )
    return None


def unfinished_download(path: str) -> str:
    """A sentence on files that a download left unfinished; empty where there are none."""
    names = [name for name in list_folder(path) if name.endswith(_UNFINISHED)]
    if not is_local(path):
        return ""
    cache = os.path.join(path, ".cache", "huggingface", "download")
    if os.path.isdir(cache):
        names += [name for name in sorted(os.listdir(cache)) if name.endswith(".incomplete")]
    if not names:
        return ""
    return (
        f"A download into this folder did not finish ({some(names, 2)}). Run the same download "
        "again; it continues where it stopped."
    )


# what each kind says: what the folder is, and the way out


def _has_weights(folder: _Folder) -> bool:
    return any(map(_WEIGHTS.fullmatch, folder.names))


def _is_adapter(folder: _Folder) -> bool:
    adapter = _ADAPTER_CONFIG in folder.names or bool(folder.matching(r"adapter_model\..*"))
    return adapter and not _has_weights(folder)


def _adapter(folder: _Folder) -> tuple[str, str]:
    config = {}
    path = folder.file(_ADAPTER_CONFIG)
    if _ADAPTER_CONFIG in folder.names and brought_along(path, folder.path):
        config = read_json(path)
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    named = kind if isinstance(kind, str) and kind.isprintable() and len(kind) < 40 else "LoRA"
    of = f" of {base}" if isinstance(base, str) and base.isprintable() and len(base) < 200 else ""
    label = "LoRA" if named.upper() == "LORA" else named
    what = f"is a {label} adapter{of} (peft), not a model: it holds changes to a model's weights"
    if kind is not None and named.upper() not in _MERGEABLE:
        return (
            what,
            "Adapters of this kind cannot be merged into weights, so none can be converted.",
        )
    return what, (
        f"Merge it into its base model first: {merge_command(folder.path)}; then convert "
        f"{folder.path.rstrip('/')}-merged"
    )


def _gguf(folder: _Folder) -> tuple[str, str]:
    return f"holds a GGUF file of llama.cpp ({some(folder.ending('.gguf'), 2)})", gguf_way_out()


def _is_dcp(folder: _Folder) -> bool:
    return bool(folder.ending(".distcp")) and "metadata.json" not in folder.names


def _dcp(folder: _Folder) -> tuple[str, str]:
    out = folder.file("pytorch_model.bin")
    command = ["python", "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch"]
    return (
        "is a checkpoint of torch.distributed.checkpoint (DCP: .metadata and *.distcp)",
        "Convert the Hugging Face model if the program that wrote it can save one. Otherwise make "
        f"one file of it with torch: {shlex.join([*command, folder.path, out])}; then put the "
        "config.json of the model beside that file, and convert the folder. The names of its "
        "tensors have to be those of transformers.",
    )


def _fsdp_folder(folder: _Folder) -> list[str]:
    return [
        name
        for name in folder.matching(r"pytorch_model_fsdp_\d+|fsdp_model.*|model")
        if any(inner.endswith(".distcp") for inner in folder.inside(name))
    ]


def _fsdp(folder: _Folder) -> tuple[str, str]:
    inside = folder.file(_fsdp_folder(folder)[0])
    return (
        f"holds the weights as FSDP shards of torch.distributed.checkpoint ({inside})",
        "Merge them with accelerate: "
        f"{shlex.join(['accelerate', 'merge-weights', inside, folder.path])}; then convert this "
        "folder again, with the config.json of the model in it.",
    )


_ITERATION = r"iter_\d+|release"
_TRACKER = "latest_checkpointed_iteration.txt"


def _megatron_steps(folder: _Folder) -> list[str]:
    """Folders of iterations; those of other programs have the names of steps as well."""
    return [
        name
        for name in folder.matching(_ITERATION)
        if any(
            n.startswith(("mp_rank_", "model_optim")) or n == "common.pt" or n == "metadata.json"
            for n in folder.inside(name)
        )
    ]


def _is_megatron_core(folder: _Folder) -> bool:
    if "metadata.json" in folder.names and folder.ending(".distcp"):
        return True
    return any("metadata.json" in folder.inside(name) for name in _megatron_steps(folder))


def _is_megatron(folder: _Folder) -> bool:
    if _TRACKER in folder.names or _megatron_steps(folder):
        return True
    ranks = folder.matching(r"mp_rank_\d+(_\d+)*")
    files = ("model_optim_rng.pt", "model_rng.pt", "distrib_optim.pt")
    return bool(set(files) & {*folder.names, *(n for r in ranks for n in folder.inside(r))})


_MEGATRON = (
    "is a checkpoint of Megatron-LM (iter_N/mp_rank_NN/model_optim_rng.pt), which is not "
    "GPT-NeoX's form",
    "Convert it to Hugging Face's form with Megatron-LM's own tools (tools/checkpoint, or "
    "Megatron-Bridge), and convert that.",
)


_MEGATRON_CORE = (
    "is a distributed checkpoint of Megatron Core (torch_dist: metadata.json, common.pt and "
    "*.distcp), which is not GPT-NeoX's form",
    "Export it to Hugging Face's form with Megatron-Bridge, and convert that.",
)


def _trainer_steps(folder: _Folder) -> list[str]:
    steps = [name for name in folder.names if re.fullmatch(r"checkpoint-\d+", name)]
    steps = [name for name in steps if isdir(folder.file(name))]
    return sorted(steps, key=lambda name: step_of(name) or 0)


def _trainer(folder: _Folder) -> tuple[str, str]:
    steps = _trainer_steps(folder)
    last = shlex.quote(folder.file(steps[-1]))
    return (
        f"is the output folder of a Trainer of transformers; the models are in {some(steps)}",
        f"Name one of them, for example {last}; or convert all of them: neox-bridge batch "
        f"{folder.quoted} {shlex.quote(folder.path.rstrip('/') + '-neox')}",
    )


def _step_models(folder: _Folder) -> list[str]:
    """Folders below that hold a model each."""
    return [
        name
        for name in folder.names
        if not name.startswith(".") and "config.json" in folder.inside(name)
    ]


def _parent(folder: _Folder) -> tuple[str, str]:
    models = _step_models(folder)
    return (
        f"holds no model itself; there are models in {some(models)}",
        f"Name one of them, for example {shlex.quote(folder.file(models[0]))}",
    )


def _is_deepspeed(folder: _Folder) -> bool:
    """What DeepSpeed saved for transformers' Trainer, or for another program than GPT-NeoX."""
    steps = folder.matching(r"global_step\d+")
    inner = [n for step in steps for n in folder.inside(step)]
    saved = [n for n in (*folder.names, *inner) if re.fullmatch(r".*mp_rank_\d+_.*states\.pt", n)]
    layers = any(n.startswith("layer_") for n in (*folder.names, *inner))
    if not saved or layers or "configs" in (*folder.names, *inner):
        return False
    return not has_config_beside(folder.path)


def _deepspeed(folder: _Folder) -> tuple[str, str]:
    config = "" if "config.json" in folder.names else ", put the config.json of the model there,"
    way = "Save the model itself with save_model() of the Trainer, or with save_16bit_model()"
    if "zero_to_fp32.py" in folder.names:
        script = ["python", folder.file("zero_to_fp32.py"), folder.path]
        way = (
            f"Collect the weights with DeepSpeed's own script: {shlex.join([*script, folder.path])}"
        )
    return (
        "holds a checkpoint that DeepSpeed saved for another program than GPT-NeoX (mp_rank and "
        "ZeRO files without configs/*.yml)",
        f"{way}{config} and convert the folder again.",
    )


_NEMO = (
    "is a checkpoint of NVIDIA NeMo",
    "Export it to Hugging Face's form with NeMo (llm.export_ckpt), and convert that.",
)


def _tensorflow(folder: _Folder) -> tuple[str, str]:
    names = folder.ending(".h5", ".msgpack", ".ckpt.index", ".ot")
    return (
        f"holds the weights in a form of TensorFlow, JAX or Rust only ({some(names)})",
        "Load the model with transformers (from_tf=True or from_flax=True), save it with "
        "save_pretrained, and convert that.",
    )


def _onnx(folder: _Folder) -> tuple[str, str]:
    names = folder.ending(".onnx", ".xml", ".engine", ".mlpackage", ".tflite")
    return (
        f"holds a model compiled for inference ({some(names)})",
        "Convert the model that it was made from, in Hugging Face's form.",
    )


_ORBAX = (
    "is a checkpoint of JAX (Orbax or tensorstore)",
    "Export it to Hugging Face's form with the program that wrote it, and convert that.",
)


def _cache(folder: _Folder) -> tuple[str, str]:
    repos = cached_repos(list(folder.names))
    return (
        f"is a whole Hugging Face cache; the models are in {some(repos)}",
        f"Name one of them, for example {shlex.quote(folder.file(repos[0]))}",
    )


def _unfinished(folder: _Folder) -> tuple[str, str]:
    return "holds no complete model", unfinished_download(folder.path)


def _is_optimizer_export(folder: _Folder) -> bool:
    """Whether export-optimizer wrote it; see ``optimizer_export``."""
    return {"optimizer.json", "exp_avg.safetensors"} <= set(folder.names)


def _optimizer_export(folder: _Folder) -> tuple[str, str]:
    return (
        "holds optimizer states that export-optimizer wrote, and no weights",
        f"To check its files: neox-bridge verify {folder.quoted}. To take the states back into "
        f"their run, add them to reshard: --states {folder.quoted}",
    )


def _single_file(folder: _Folder) -> list[str]:
    return [
        name
        for name in folder.ending(".pt", ".pth", ".ckpt", ".bin", ".safetensors")
        if not name.startswith(("optimizer", "scheduler", "rng_state", "training_args", "consolid"))
        and not name.endswith(("model_states.pt", "optim_states.pt"))
    ]


def _weights_only(folder: _Folder) -> tuple[str, str]:
    names = _single_file(folder)
    for name in names:
        path = folder.file(name)
        if isfile(path) and (kind := misplaced(path, read_at(path, 0, HEAD_BYTES))):
            return f"has no config.json, and {name} is {kind.what}", kind.way_out
    return (
        "is neither a Hugging Face model nor a GPT-NeoX checkpoint: it holds weights "
        f"({some(names)}) without a config.json, which says what model they are of",
        f"Put the config.json of the model into {folder.quoted}; weights of transformers are named "
        "model.safetensors or pytorch_model.bin.",
    )


def _other_ggml(folder: _Folder) -> bool:
    return any(
        read_at(folder.file(n), 0, 4) in (b"lmgg", b"fmgg", b"tjgg", b"GGUF")
        for n in folder.ending(".bin")
        if isfile(folder.file(n)) and size(folder.file(n)) > 4
    )


_KINDS = (
    _Kind("adapter", _is_adapter, _adapter),
    _Kind("gguf", lambda f: not _has_weights(f) and f.ending(".gguf"), _gguf),
    _Kind("megatron-core", _is_megatron_core, _MEGATRON_CORE),
    _Kind("megatron", _is_megatron, _MEGATRON),
    _Kind("fsdp", _fsdp_folder, _fsdp),
    _Kind("dcp", _is_dcp, _dcp),
    _Kind("nemo", lambda f: f.ending(".nemo") or {"context", "weights"} <= set(f.names), _NEMO),
    _Kind("orbax", lambda f: f.matching(r"_METADATA|_CHECKPOINT_METADATA|manifest\.ocdbt"), _ORBAX),
    _Kind("trainer", _trainer_steps, _trainer),
    _Kind("deepspeed", _is_deepspeed, _deepspeed),
    _Kind("unfinished", lambda f: unfinished_download(f.path), _unfinished),
    _Kind("ggml", _other_ggml, ("holds a model of llama.cpp (ggml)", gguf_way_out())),
    _Kind("tensorflow", lambda f: f.ending(".h5", ".msgpack", ".ckpt.index", ".ot"), _tensorflow),
    _Kind(
        "compiled",
        lambda f: (
            f.ending(".onnx", ".engine", ".mlpackage", ".tflite")
            or f.matching(r"openvino_model\.xml")
        ),
        _onnx,
    ),
    _Kind("cache", lambda f: cached_repos(list(f.names)), _cache),
    _Kind("parent", _step_models, _parent),
    _Kind("optimizer-export", _is_optimizer_export, _optimizer_export),
    _Kind(
        "weights-only", lambda f: "config.json" not in f.names and _single_file(f), _weights_only
    ),
)
