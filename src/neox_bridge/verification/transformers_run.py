"""Computes models of any family with transformers, in a process of its own.

``stored_logits`` starts it. It gets a ``Request`` on stdin, and writes arrays and ``answer.json``
into a folder. Code of a repository never runs: only classes of the installed transformers do.
"""

import gc
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from neox_bridge.errors import BridgeError, Refused
from neox_bridge.layouts.text_files import read_json
from neox_bridge.verification.tokens import TokenInput, tokens_within
from neox_bridge.wording import plain, some

ANSWER, STAGE = "answer.json", "stage.json"
Task = Literal["CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MASKED_LM"]
# whose outputs are the logits of tokens, if the input is text
_TASKS: tuple[Task, ...] = (
    *("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MASKED_LM"),
)


_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"


@dataclass(frozen=True, slots=True)
class Request:
    """What to compute.

    Attributes:
        paths: The folders of both models.
        tokenizers: The tokenizer files of each.
        safetensors: Whether the weights of each are in safetensors files. The others are pickles,
            which neox-bridge has read already, so that they contain only tensors.
        tokens: As of ``read_tokens``.
        device: "cpu" or "cuda".
        folder: Where to write.
    """

    paths: tuple[str, str]
    tokenizers: tuple[tuple[str, ...], ...]
    safetensors: tuple[bool, bool]
    tokens: str | None
    device: str
    folder: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """How transformers loaded a model, and what was recorded.

    Attributes:
        missing: Weights that are not in the files, so that they were initialized randomly.
        unexpected: Tensors in the files that the class does not have.
        modules: The modules whose outputs were recorded, in the order in which they were computed.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """The result: how both sides were loaded, or why they were not computed.

    Attributes:
        error: The message of an error; "" if there is none.
        exit_code: Its exit code.
        out_of_memory: Whether memory ran out.
        sides: Both sides, if there is no error.
        recorded: Whether the tokens came with recorded logits.
        version: The version of transformers.
    """

    error: str = ""
    exit_code: int = 0
    out_of_memory: bool = False
    sides: tuple[Loaded, ...] = ()
    recorded: bool = False
    version: str = ""


def main() -> None:
    """Answer the request on stdin."""
    words = json.load(sys.stdin)
    request = Request(**words)
    try:
        answer = compute(request)
    except BridgeError as error:
        answer = Answer(str(error), error.exit_code)
    except (MemoryError, torch.OutOfMemoryError):
        answer = Answer(out_of_memory=True)
    with open(os.path.join(request.folder, ANSWER), "w", encoding="utf-8") as file:
        json.dump(asdict(answer), file)


def compute(request: Request) -> Answer:
    """Compute both models on the same tokens, one after the other, in float32.

    Raises Refused for models that transformers has no class with logits for, and BridgeError if it
    cannot load or compute them.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    classes = [model_class(path) for path in request.paths]
    configs = [config for _, config, _ in classes]
    inputs = _tokens(request, configs)
    np.save(os.path.join(request.folder, "tokens.npy"), inputs.tokens.numpy())
    if inputs.recorded is not None:
        np.save(os.path.join(request.folder, "recorded.npy"), inputs.recorded.numpy())
    sides = []
    for side, (kind, config, task) in enumerate(classes):
        _tell_stage(request, side, "loading")
        safetensors = request.safetensors[side]
        model, loaded = load(request.paths[side], kind, config, request.device, safetensors)
        if not loaded.missing and not loaded.unexpected:
            _tell_stage(request, side, "computing")
            modules = _forward(model, task, inputs.tokens, request, side)
            loaded = replace(loaded, modules=tuple(modules))
        sides.append(loaded)
        del model
        gc.collect()
    has_recorded = inputs.recorded is not None
    return Answer(sides=tuple(sides), recorded=has_recorded, version=transformers.__version__)


def model_class(path: str) -> tuple[Any, Any, Task]:
    """The class of transformers for the model in a folder, its config, and what it is for."""
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    version = f"transformers {transformers.__version__}"
    if os.path.lexists(os.path.join(path, "adapter_config.json")):
        raise Refused(
            f"{path} is an adapter, which computes no logits without its base model. Merge it into "
            "the weights (merge_and_unload of peft), and compare the results."
        )
    file = os.path.join(path, "config.json")
    raw = read_json(file) if os.path.lexists(file) else {}
    family = raw.get("model_type")
    if not isinstance(family, str):
        raise Refused(
            f"{path} has no config.json with a model_type, so {version} cannot tell which class "
            "computes the model. Compare the tensors alone, without `logits=True`."
        )
    if raw.get("transformers_weights") is not None:
        raise Refused(
            f"{path}: config.json names the files of its weights (transformers_weights: "
            f"{plain(str(raw['transformers_weights']))}), so {version} may compute other weights "
            "than those that are compared. Remove the key, or compare the tensors alone, without "
            "`logits=True`."
        )
    if family not in CONFIG_MAPPING:
        code = raw.get("auto_map")
        why = (
            f"Its code is in the repository (auto_map: {some(sorted(_code_of(code)), 2)}), which "
            "neox-bridge never runs"
            if isinstance(code, dict) and code
            else "Its code is unknown"
        )
        raise Refused(
            f"{path} is a model of the family {plain(family)!r}, which {version} does not have. "
            f"{why}. Install a transformers that has the family, or compare the tensors alone, "
            "without `logits=True`."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise _not_loaded(path, error) from None
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    for task in _TASKS:
        classes = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).get(family, ())
        classes = (classes,) if isinstance(classes, str) else classes
        chosen = name if name in classes else classes[0] if name is None and classes else None
        if chosen is not None and hasattr(transformers, chosen):
            return getattr(transformers, chosen), config, task
    raise Refused(
        f"{path}: config.json names the class {plain(str(name))}, which has no logits of tokens in "
        f"{version}. Compare the tensors alone, without `logits=True`."
    )


def _code_of(auto_map: Mapping[str, Any]) -> set[str]:
    """The classes that an auto_map names."""
    values = [
        v for value in auto_map.values() for v in (value if isinstance(value, list) else [value])
    ]
    return {plain(str(value)) for value in values if value}


def _not_loaded(path: str, error: Exception) -> BridgeError:
    import transformers

    return BridgeError(
        f"{path}: transformers {transformers.__version__} cannot load it: {_reason(error)}. "
        "Correct the files, or install the transformers that wrote them."
    )


def _reason(error: Exception) -> str:
    """What an error of transformers or torch says, in a line. Raises it if memory ran out."""
    # torch raises a RuntimeError if the CPU's memory ran out
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _NO_MEMORY in str(error):
        raise MemoryError from error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return plain(" ".join(lines[:2]) or type(error).__name__).rstrip(".:")


def _tokens(request: Request, configs: list[Any]) -> TokenInput:
    """The input within the limits of both configs."""
    texts = [config.get_text_config() for config in configs]
    rows = min(text.vocab_size for text in texts)
    positions = [getattr(text, "max_position_embeddings", None) for text in texts]
    special = {number for config in configs for number in _special_ids(config.to_dict())}
    return tokens_within(
        request.tokens,
        rows=rows,
        positions=min([one for one in positions if isinstance(one, int) and one > 0] or [1 << 30]),
        tokenizers=request.tokenizers,
        special=frozenset(special),
    )


def _special_ids(config: Mapping[str, Any]) -> Iterator[int]:
    """Ids with a meaning, such as that of an image: generated input does not contain them."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif str(key).endswith(("token_id", "token_ids", "token_index")):
            values = value if isinstance(value, list) else [value]
            yield from (one for one in values if isinstance(one, int))


def load(path: str, kind: Any, config: Any, device: str, safetensors: bool) -> tuple[Any, Loaded]:
    """The model in float32, and what transformers changed silently when it loaded it.

    safetensors: whether to read safetensors files, or else pickles.
    """
    try:
        model, info = kind.from_pretrained(
            path,
            config=config,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=safetensors,
            output_loading_info=True,
            **{_dtype_key(): torch.float32},
        )
        model = model.eval().to(device)
    except Exception as error:
        raise _not_loaded(path, error) from None
    return model, Loaded(
        tuple(sorted(info["missing_keys"])), tuple(sorted(info["unexpected_keys"]))
    )


def _dtype_key() -> str:
    """The parameter that transformers 4.56 renamed."""
    import transformers

    major, minor = map(int, transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def _forward(model: Any, task: Task, tokens: Tensor, request: Request, side: int) -> list[str]:
    """Compute the logits and write them, and the outputs of modules. Returns their names."""
    tokens = tokens.to(request.device)
    inputs = {"input_ids": tokens}
    if task == "SEQ_TO_SEQ_CAUSAL_LM":
        inputs["decoder_input_ids"] = tokens
    try:
        with torch.no_grad(), _recording(model, request.folder, side) as names:
            logits = model(**inputs).logits
    except Exception as error:
        raise BridgeError(
            f"{request.paths[side]}: transformers cannot compute it from tokens alone: "
            f"{_reason(error)}. Compare the tensors alone, without `logits=True`."
        ) from None
    np.save(os.path.join(request.folder, f"logits-{side}.npy"), logits.float().cpu().numpy())
    return names


@contextmanager
def _recording(model: Any, folder: str, side: int) -> Iterator[list[str]]:
    """Write the outputs of the embeddings, of each layer and of the parts of each layer."""
    names: list[str] = []

    def record(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        value = first_tensor(output)
        if value is not None:
            array = value.float().cpu().numpy()
            np.save(os.path.join(folder, f"{side}-{len(names)}.npy"), array)
            names.append(name)

    modules = dict(model.named_modules())
    stacks = {name for name, module in modules.items() if isinstance(module, nn.ModuleList)}
    outer = {name for name in stacks if not any(name.startswith(f"{one}.") for one in stacks)}
    embeddings = model.get_input_embeddings()
    hooks = [
        module.register_forward_hook(partial(record, name))
        for name, module in modules.items()
        if module is embeddings or {_above(name), _above(_above(name))} & outer
    ]
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()


def _above(name: str) -> str:
    return name.rpartition(".")[0]


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor of floating-point numbers in what a module returns."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    parts = output.values() if isinstance(output, dict) else output
    if not isinstance(output, dict | tuple | list):
        return None
    return next((value for part in parts if (value := first_tensor(part)) is not None), None)


def _tell_stage(request: Request, side: int, stage: Literal["loading", "computing"]) -> None:
    """Write what is done now, in case that this process ends."""
    with open(os.path.join(request.folder, STAGE), "w", encoding="utf-8") as file:
        json.dump({"side": side, "stage": stage}, file)
