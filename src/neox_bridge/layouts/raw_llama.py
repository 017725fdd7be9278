"""Opens models in the format of Meta's Llama and of Mistral: ``consolidated.*``, ``params.json``.

Meta's ``consolidated.NN.pth`` contain slices of the tensors. Mistral's ``consolidated.safetensors``
contains all tensors, or each ``consolidated-NNNNN-of-NNNNN.safetensors`` some of them.
Names, splits and the order of rotary rows are those of meta-llama/llama (llama/model.py), which
rotates neighboring pairs of a head's dimensions. Hugging Face and GPT-NeoX rotate its two halves.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neox_bridge.architectures.neox_config import number
from neox_bridge.architectures.setting_types import check_hf
from neox_bridge.errors import BridgeError, NotOfFamily, Refused
from neox_bridge.findings import Dropped, Finding
from neox_bridge.formats.safetensors import read_safetensors
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.frameworks.check_keys import unknown_in_params
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.hf_reader import checkpoint_of
from neox_bridge.layouts.linked_files import check_own
from neox_bridge.layouts.quantized import refuse_quantized
from neox_bridge.layouts.tensor_names import check_names, state_dict_of, tensors_of
from neox_bridge.layouts.text_files import list_folder, read_json
from neox_bridge.stores.paths import ahead
from neox_bridge.tensors.dtypes import itemsize
from neox_bridge.tensors.geometry import Split, gather
from neox_bridge.tensors.pieces import Piece, Whole
from neox_bridge.tensors.tensor_ref import TensorRef, row_major
from neox_bridge.wording import some

PARAMS = "params.json"
_FILE = re.compile(r"consolidated\.(\d+)\.pth")
_WHOLE = re.compile(r"consolidated(?:-(\d+)-of-(\d+))?\.safetensors")
# the name of Meta, the name of Hugging Face, and how the files share the tensor
_NAMES: tuple[tuple[str, str, Split], ...] = (
    ("tok_embeddings.weight", "model.embed_tokens.weight", "row"),
    ("layers.{i}.attention_norm.weight", "model.layers.{i}.input_layernorm.weight", "replicated"),
    ("layers.{i}.attention.wq.weight", "model.layers.{i}.self_attn.q_proj.weight", "column"),
    ("layers.{i}.attention.wk.weight", "model.layers.{i}.self_attn.k_proj.weight", "column"),
    ("layers.{i}.attention.wv.weight", "model.layers.{i}.self_attn.v_proj.weight", "column"),
    ("layers.{i}.attention.wo.weight", "model.layers.{i}.self_attn.o_proj.weight", "row"),
    (
        "layers.{i}.ffn_norm.weight",
        "model.layers.{i}.post_attention_layernorm.weight",
        "replicated",
    ),
    ("layers.{i}.feed_forward.w1.weight", "model.layers.{i}.mlp.gate_proj.weight", "column"),
    ("layers.{i}.feed_forward.w2.weight", "model.layers.{i}.mlp.down_proj.weight", "row"),
    ("layers.{i}.feed_forward.w3.weight", "model.layers.{i}.mlp.up_proj.weight", "column"),
    ("norm.weight", "model.norm.weight", "replicated"),
    ("output.weight", "lm_head.weight", "column"),
)
_ROTATED = ("attention.wq.weight", "attention.wk.weight")


@dataclass(frozen=True, slots=True)
class _Params:
    """The numbers of params.json that the tensors do not show."""

    hidden: int
    heads: int
    kv_heads: int
    eps: float
    base: float


def is_raw_llama(names: Sequence[str]) -> bool:
    """Whether a folder with these files has this format."""
    return PARAMS in names and any(_FILE.fullmatch(n) or _WHOLE.fullmatch(n) for n in names)


def open_raw_llama(path: str) -> Checkpoint:
    """Open such a folder as the Hugging Face model with the same weights.

    Raises BridgeError or Refused, with the file or the key.
    """
    check_own(os.path.join(path, PARAMS), path)
    settings = read_json(os.path.join(path, PARAMS))
    params = _read_params(settings, os.path.join(path, PARAMS))
    files, shards = _shards(path)
    for shard in shards:
        refuse_quantized("hf", path, settings, shard, files)
    tensors, dropped = _gathered(shards, params, path)
    positions, guessed = _positions(settings, params, of_mistral=files[0].endswith(".safetensors"))
    window = settings.get("sliding_window")
    config = {
        "architectures": ["LlamaForCausalLM" if window is None else "MistralForCausalLM"],
        "model_type": "llama" if window is None else "mistral",
        **({} if window is None else {"sliding_window": window}),
        **({} if settings.get("head_dim") is None else {"head_dim": settings["head_dim"]}),
        "hidden_size": params.hidden,
        "num_hidden_layers": settings.get("n_layers"),
        "num_attention_heads": params.heads,
        "num_key_value_heads": params.kv_heads,
        "rms_norm_eps": params.eps,
        "rope_theta": params.base,
        "max_position_embeddings": positions,
        "hidden_act": "silu",
        "tie_word_embeddings": bool(settings.get("tied_embeddings")),
    }
    check_hf(config, os.path.join(path, PARAMS))
    unknown = unknown_in_params(settings)
    checkpoint = checkpoint_of(path, config, tensors, files, dropped, unknown=unknown)
    return replace(checkpoint, findings=(*checkpoint.findings, *guessed))


def _read_params(settings: Mapping[str, Any], path: str) -> _Params:
    if lacking := [
        key for key in ("dim", "n_layers", "n_heads", "norm_eps") if key not in settings
    ]:
        raise NotOfFamily(
            f"{path} does not describe a Llama model. Missing: {some(lacking)}. Download the file "
            "again."
        )
    if settings.get("use_scaled_rope"):
        raise Refused(
            f"{path}: use_scaled_rope is set. GPT-NeoX cannot scale rotary frequencies, and "
            "without the scaling this is another model. Convert a Llama before 3.1."
        )
    if settings.get("moe") is not None:
        raise Refused(f"{path}: moe is set. neox-bridge does not convert models with experts.")
    for key in ("quantization", "quantization_args"):
        if settings.get(key):
            raise Refused(
                f"{path}: {key}: the weights are quantized. Convert the original, unquantized "
                "model instead."
            )
    names = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "norm_eps": "rms_norm_eps"}
    names |= {"n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads"}
    names |= {"rope_theta": "rope_theta", "max_seq_len": "max_position_embeddings"}
    for word, name in names.items():
        check_hf({name: settings.get(word)}, f"{path}: {word}")
    heads = number("n_heads", settings["n_heads"], int)
    return _Params(
        number("dim", settings["dim"], int),
        heads,
        number("n_kv_heads", settings.get("n_kv_heads") or heads, int),
        number("norm_eps", settings["norm_eps"], float),
        number("rope_theta", settings.get("rope_theta") or 10000.0, float),
    )


def _shards(path: str) -> tuple[tuple[str, ...], list[Mapping[str, TensorRef]]]:
    """The files, and the tensors of each tensor-parallel rank."""
    names = list_folder(path)
    ranks = {int(m[1]): m[0] for name in names if (m := _FILE.fullmatch(name))}
    if ranks:
        _check_count(path, ranks, range(max(ranks) + 1), "consolidated.{:02d}.pth")
        files = tuple(os.path.join(path, ranks[n]) for n in sorted(ranks))
        return files, [tensors_of(state_dict_of(read_torch(f), f), f) for f in ahead(files)]
    parts = [m for name in names if (m := _WHOLE.fullmatch(name))]
    single = [m[0] for m in parts if m[1] is None]
    numbered = {int(m[1]): m[0] for m in parts if m[1] is not None}
    if not single:
        count = max(int(m[2]) for m in parts)
        _check_count(path, numbered, range(1, min(count, 10_000) + 1), "consolidated-{:05d}-of-…")
    chosen = single or [numbered[n] for n in sorted(numbered)]
    files = tuple(os.path.join(path, name) for name in chosen)
    tensors: dict[str, TensorRef] = {}
    for file in ahead(files):
        held = read_safetensors(file)
        check_names(held, file)
        if twice := sorted(set(held) & set(tensors)):
            raise BridgeError(
                f"{path}: {twice[0]} is in two files: {tensors[twice[0]].file} and {file}. Remove "
                "the files that are left over from another download."
            )
        tensors |= held
    return files, [tensors]


def _check_count(path: str, present: Mapping[int, str], wanted: range, name: str) -> None:
    missing = next((n for n in wanted if n not in present), None)
    if missing is not None:
        raise BridgeError(
            f"{path} is incomplete: {name.format(missing)} is missing. Download it again."
        )


def _gathered(
    shards: Sequence[Mapping[str, TensorRef]], params: _Params, path: str
) -> tuple[dict[str, Whole], list[Dropped]]:
    """Every tensor as a whole, by its Hugging Face name."""
    rows = {name: (hf, split) for name, hf, split in _NAMES}
    tensors: dict[str, Whole] = {}
    dropped: list[Dropped] = []
    unknown: list[str] = []
    for key in sorted({key for shard in shards for key in shard}):
        block = re.search(r"\.(\d+)\.", key)
        pattern = re.sub(r"\.\d+\.", ".{i}.", key, count=1)
        if key.endswith("rope.freqs"):
            dropped.append(Dropped(key, "not learned: rotary frequencies"))
            continue
        if pattern not in rows:
            unknown.append(key)
            continue
        refs = [shard[key] for shard in shards if key in shard]
        if len(refs) < len(shards):
            raise BridgeError(
                f"{path}: {key} is missing from some of the {len(shards)} files. Remove files "
                "that are left over from another model."
            )
        hf, split = rows[pattern]
        if len({(ref.dtype, ref.shape) for ref in refs}) > 1:
            raise BridgeError(
                f"{path}: {key} does not have the same shape and dtype in all files. Download "
                "the files again."
            )
        dimensions = 1 if split == "replicated" else 2
        if len(refs[0].shape) != dimensions:
            raise BridgeError(
                f"{path}: {key} has the shape {list(refs[0].shape)}. Its tensors of this name have "
                f"{dimensions} dimensions. Download the files again."
            )
        if key == "tok_embeddings.weight" and refs[0].shape[-1] == params.hidden:
            split = "column"  # split by rows since Llama 3
        whole = gather(split, refs, row_bias_sums=False)
        if pattern.endswith(_ROTATED):
            heads = params.heads if "wq" in pattern else params.kv_heads
            whole = _halves(whole, heads, key, path)
        tensors[hf.format(i=block[1] if block else "")] = whole
    if unknown:
        raise NotOfFamily(f"{path} contains tensors that no Llama model has: {some(unknown)}.")
    return tensors, dropped


def _halves(whole: Whole, heads: int, key: str, path: str) -> Whole:
    """The tensor with the even rows of each head before its odd rows."""
    rows, columns = whole.shape
    if not heads or not rows or rows % (2 * heads):
        raise BridgeError(
            f"{path}: {key} has {rows} rows, which do not form {heads} heads with an even number "
            "of rows."
        )
    width = rows // heads
    pieces = []
    for piece in whole.pieces:
        ref = piece.source
        assert ref is not None
        if ref.shape[0] % width:
            raise BridgeError(
                f"{path}: {key} splits a head over two files, which Meta's models never do. "
                "Download the files again."
            )
        down, right = ref.strides or row_major(ref.shape)
        for head in range(ref.shape[0] // width):
            for odd in (0, 1):
                first = (head * width + odd) * down
                view = TensorRef(
                    ref.file,
                    ref.offset + first * itemsize(ref.dtype),
                    ref.dtype,
                    (width // 2, columns),
                    (2 * down, right),
                )
                to = piece.to[0] + head * width + odd * width // 2
                pieces.append(Piece(view, (0, 0), (to, 0), view.shape))
    return Whole(whole.dtype, whole.shape, tuple(pieces))


def _positions(
    settings: Mapping[str, Any], params: _Params, *, of_mistral: bool
) -> tuple[int, list[Finding]]:
    """max_position_embeddings. Most files do not contain it, so a released model decides."""
    for key in ("max_seq_len", "max_position_embeddings"):
        if settings.get(key) is not None:
            return number(key, settings[key], int), []
    by_base = {500000.0: 8192, 1000000.0: 16384}  # Llama 3, CodeLlama
    by_eps = 2048 if params.eps < 5e-6 else 4096  # Llama 1, Llama 2
    positions = 32768 if of_mistral else by_base.get(params.base, by_eps)
    models = "Mistral" if of_mistral else "Llama with this base and epsilon"
    return positions, [
        Finding(
            "positions-assumed",
            "warning",
            f"{PARAMS} does not set the number of positions. {positions} is assumed, as in the "
            f"released {models}",
            f'if that is wrong, add "max_seq_len" to {PARAMS}',
        )
    ]
