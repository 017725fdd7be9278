"""Recognizes quantized models: by their settings, and by the tensors that only such models have.

A quantized model keeps packed integers or 8-bit floats with scales in the place of weights. No
tensor of it is a weight, so nothing of it can be converted; the original model can.

The names are those that the tools' own files use: GPTQ and Marlin (AutoGPTQ, GPTQModel), AWQ,
bitsandbytes, compressed-tensors and fp8 (vLLM, transformers' fine-grained fp8), HQQ, AQLM, EETQ,
quanto, torchao, mxfp4, QuIP#, SpQR, VPTQ, HIGGS, FP-Quant, FBGEMM, ModelOpt, ExLlama 2 and 3, MLX.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from neox_bridge.errors import BridgeError, Refused
from neox_bridge.formats.pickle_folds import Global, Record
from neox_bridge.layouts.checkpoint import Kind
from neox_bridge.layouts.linked_files import brought_along
from neox_bridge.layouts.text_files import list_folder, read_json, read_text
from neox_bridge.stores.paths import isdir, isfile
from neox_bridge.tensors.dtypes import FLOAT8, FLOATING
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.wording import plural, some

# keys of config.json that hold settings of a quantization
CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
# files beside the weights that do
_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_README = "README.md"
_README_BYTES = 1 << 20
_NAME_CHARACTERS = 200

# method: the ends of names of which one is proof, the first that fits is taken
_PROOF: tuple[tuple[str, str], ...] = (
    ("bitsandbytes 4-bit", r"\.(nested_)?(absmax|quant_map)|\.quant_state\.bitsandbytes__\w+"),
    ("bitsandbytes 8-bit", r"\.(SCB|CB|CxB|weight_format)"),
    ("ExLlamaV2", r"\.(q_weight|q_scale_max|q_groups|q_invperm)"),
    ("ExLlamaV3", r"\.(trellis|suh|svh)"),
    ("QuIP#", r"\.(Qidxs(_\w+)?|SU|SV|codebook_id)"),
    ("AQLM", r"\.(codes|codebooks)"),
    ("VPTQ", r"\.(res_)?(centroids|indices)(\.weight)?"),
    ("SpQR", r"\.(dense_weights|row_offsets|col_vals|in_perm)"),
    ("HQQ", r"\.W_q(\.\w+)?"),
    ("quanto", r"\.weight\._(data|scale|shift)"),
    ("torchao", r"(\.|_|:)(_?weight_qdata|_weight_scale_and_zero|weight:_?data|tensor_impl\w*)"),
    ("mxfp4", r"_proj_blocks|_proj_scales|\.weight_blocks"),
    ("HIGGS", r"\.(tables|tables2)"),
    ("FP-Quant", r"\.(forward|backward)_hadamard_matrix|\.dqweight"),
    ("SqueezeLLM", r"\.lookup_table"),
    ("Marlin", r"\.(B_24|B_meta|s_channel|s_group)"),
    ("GPTQ", r"\.(g_idx)"),
    ("NVFP4", r"\.weight_scale_2"),
    ("compressed-tensors", r"\.weight_(packed|shape|zero_point|global_scale|g_idx|bitmask)"),
    ("EETQ", r"\.weight_scales"),
    (
        "fp8",
        r"_scale_inv|\.(weight|input|output|activation|k|v|q|kv)_scale(_ub)?|_scaling_factors?"
        r"|\.qscale_\w+",
    ),
    ("torch.ao", r"\._packed_params\.\w+|\.activation_post_process\.\w+|\.zero_point"),
)
_PACKED = r"\.(qweight|qzeros)"  # GPTQ without g_idx is AWQ's form
_MLX = r"\.(scales|biases)"
_SCALES = re.compile(
    r"(^|[._])(q?scales?|scale_inv|s?zeros|zero_points?|qweight|codebooks?|absmax)$"
)
_RULES = tuple((name, re.compile(f".*(?:{ends})")) for name, ends in _PROOF)

_LIBRARIES = ("torchao", "quanto", "optimum", "hqq", "bitsandbytes", "aqlm", "compressed_tensors")
_QUANTIZED_TORCH = ("_rebuild_qtensor",)
_METHODS = {  # of those whose word in the settings is not their name
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "fp8",
    "compressed_tensors": "compressed-tensors",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "quip": "QuIP#",
    "spqr": "SpQR",
    "vptq": "VPTQ",
    "higgs": "HIGGS",
    "fbgemm_fp8": "FBGEMM fp8",
    "bitnet": "BitNet",
    "exl2": "ExLlamaV2",
    "exl3": "ExLlamaV3",
}


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a model is quantized, and what shows it.

    method: a name such as "GPTQ"; "an unknown method" where the evidence does not tell.
    bits: of a weight; None if nothing tells. evidence: what shows it, for people.
    original: the unquantized model that the folder names; empty if it names none.
    """

    method: str
    bits: int | None
    evidence: tuple[str, ...]
    original: str = ""

    @property
    def label(self) -> str:
        """The method and the bits."""
        return self.method + (f", {plural(self.bits, 'bit')}" if self.bits else "")


@dataclass(frozen=True)
class QuantizedFolder:
    """What ``inspect`` can say of a quantized model. config: config.json, or the merged yml."""

    kind: Kind
    path: str
    quantization: Quantization
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorRef]
    files: tuple[str, ...]


class QuantizedModel(Refused):
    """The weights of the source are quantized, so there are no weights to convert.

    model: what is known of it, if its folder could be read.
    """

    def __init__(self, message: str, model: QuantizedFolder | None = None) -> None:
        super().__init__(message)
        self.model = model


def refuse_quantized(
    kind: Kind,
    path: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorRef],
    files: tuple[str, ...],
    weights: Iterable[str] = (),
    classes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Raise QuantizedModel if the tensors are those of a quantized model.

    config: config.json, or the merged yml. tensors: by their names in the files.
    weights: the names among them that the family has as weights.
    classes: see ``quantized_class``, by the names of what is no plain tensor.
    """
    quantization = quantization_of(path, config, tensors, frozenset(weights), classes)
    if quantization is not None:
        raise QuantizedModel(
            f"{path} is quantized ({quantization.label}: {'; '.join(quantization.evidence)}). It "
            "stores packed or scaled numbers instead of weights, so it cannot be converted "
            f"exactly. Instead, {way_out(quantization)}.",
            QuantizedFolder(kind, path, quantization, config, tensors, files),
        )


def way_out(quantization: Quantization) -> str:
    """What to do about a quantized model."""
    named = f", {quantization.original}" if quantization.original else ""
    return f"convert the original, unquantized model{named}"


def quantization_of(
    path: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorRef],
    weights: frozenset[str],
    classes: Mapping[str, str] = MappingProxyType({}),
) -> Quantization | None:
    """How the tensors are quantized; None for plain ones, whatever the settings say."""
    names = [name for name in tensors if name not in weights]
    method, proof = _by_names(names, tensors)
    odd = [n for n in tensors if n in weights and tensors[n].dtype not in FLOATING]
    odd += [n for n in names if tensors[n].dtype == "float8_e8m0fnu"]
    settings, where = settings_of(path, config)
    if not proof and (odd and settings is not None):
        proof = odd
    if not proof and odd:
        proof = [name for name in names if _SCALES.search(name)]
    if classes:
        name, kind = next(iter(classes.items()))
        method, proof = kind.partition(".")[0], [f"{name} of the class {kind}"]
    if not proof:
        return None
    evidence = [f"tensors such as {some(proof, 2)}"]
    if where:
        evidence.insert(0, where)
    named, bits = _described(settings or {})
    return Quantization(
        named or method or "an unknown method", bits, tuple(evidence), original_of(path, config)
    )


def quantized_class(value: object) -> str:
    """The class of a pickled quantized tensor, by its full name; empty for other values."""
    if not isinstance(value, Record):
        return ""
    for part in (*value.args[:2], value.factory):
        if isinstance(part, Global) and (
            part.module.split(".")[0] in _LIBRARIES or part.name in _QUANTIZED_TORCH
        ):
            return f"{part.module}.{part.name}"[:_NAME_CHARACTERS]
    return ""


def settings_quantize(settings: object) -> bool:
    """Whether settings under one of ``CONFIG_KEYS`` ask for a quantization at all."""
    if not isinstance(settings, dict):
        return bool(settings)
    loads = [settings.get(key) for key in ("load_in_8bit", "load_in_4bit")]
    if any(value is not None for value in loads) and not any(loads):
        return False
    return bool(settings)


def original_of(path: str, config: Mapping[str, Any]) -> str:
    """The unquantized model that a folder names: README's base_model, or ``_name_or_path``."""
    inside = [_read(path, name).get("model_name_or_path") for name in _FILES]
    for word in (_base_model(path), config.get("_name_or_path"), *inside):
        if isinstance(word, str) and 0 < len(word) <= _NAME_CHARACTERS and word.isprintable():
            local = os.path.abspath(word) == os.path.abspath(path)
            if not local and (isdir(word) or re.fullmatch(r"[\w.-]+/[\w.-]+", word)):
                return word
    return ""


def _by_names(names: Iterable[str], tensors: Mapping[str, TensorRef]) -> tuple[str, list[str]]:
    """(the method, the names that prove it); nothing for names of plain models."""
    names = list(names)
    for method, ends in _RULES:
        if proof := [name for name in names if ends.fullmatch(name)]:
            if method == "fp8" and not any(t.dtype in FLOAT8 for t in tensors.values()):
                method = "scaled weights"
            return method, proof
    if proof := [name for name in names if re.fullmatch(f".*(?:{_PACKED})", name)]:
        return "AWQ or GPTQ", proof
    packed = {n for n in tensors if tensors[n].dtype in ("uint32", "int32", "uint8", "int8")}
    for name in names:
        if re.fullmatch(f".*(?:{_MLX})", name) and f"{name.rpartition('.')[0]}.weight" in packed:
            return "MLX", [name]
    return "", []


def settings_of(path: str, config: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, str]:
    """The settings of a quantization, and where they stand; (None, "") if there are none."""
    for key in CONFIG_KEYS:
        if settings_quantize(config.get(key)):
            value = config[key]
            return (value if isinstance(value, dict) else {}), f"config.json: {key}"
    for name in _FILES:
        if value := _read(path, name):
            return value, name
    return None, ""


def _described(settings: Mapping[str, Any]) -> tuple[str, int | None]:
    inner = settings.get("quantization")
    flat = {**settings, **(inner if isinstance(inner, dict) else {})}
    word = next((flat[k] for k in ("quant_method", "quant_algo", "quant_type") if k in flat), None)
    method = ""
    if isinstance(word, str) and word.isprintable():
        method = _METHODS.get(word.lower(), word[:40])
    bits = next((flat[k] for k in ("bits", "w_bit", "nbits") if k in flat), None)
    if bits is None and flat.get("load_in_4bit"):
        bits = 4
    elif bits is None and flat.get("load_in_8bit"):
        bits = 8
    return method, bits if isinstance(bits, int) and 0 < bits <= 64 else None


def _read(path: str, name: str) -> dict[str, Any]:
    """A small JSON file of the folder; {} where there is none that can be read."""
    try:
        file = os.path.join(path, name)
        return read_json(file) if isfile(file) and brought_along(file, path) else {}
    except BridgeError:
        return {}


def _base_model(path: str) -> str | None:
    """``base_model`` of a model card's header."""
    try:
        if not isdir(path) or _README not in list_folder(path):
            return None
        file = os.path.join(path, _README)
        text = read_text(file, _README_BYTES) if brought_along(file, path) else ""
    except BridgeError:
        return None
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    match = re.search(r"^base_model:\s*(?:\n\s*-\s*)?(\S+)", header[1], re.M) if header else None
    return match[1].strip("\"'") if match else None
