"""The forward pass of a checkpoint in stages, with the weights of one layer in memory at a time.

GPT-NeoX checkpoints use the torch reference with the tensors of each rank, Hugging Face checkpoints
use transformers. Everything is computed in float32, to separate differences of the model from
rounding.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neox_bridge.errors import BridgeError
from neox_bridge.execution.context import Context
from neox_bridge.extras import missing
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.joined_tensors import to_stored
from neox_bridge.layouts.unknown_keys import without_ignored
from neox_bridge.tensors.geometry import gather
from neox_bridge.tensors.pieces import Whole
from neox_bridge.tensors.tensor_ref import TensorRef
from neox_bridge.verification import reference
from neox_bridge.verification.compare import values
from neox_bridge.verification.reference import Stage, replaced

Stages = Generator[Stage, Tensor | None, None]
Settings = Mapping[str, Any]
# the names of modules in the classes of transformers
_FINAL_NORMS = ("final_layer_norm", "norm", "ln_f")
_LAYERS = ("layers", "h")
_ATTENTIONS = ("attention", "self_attn", "attn")
_MLPS = ("mlp", "fc2")  # OPT's MLP is no module, and its last layer has one row for each token
# reference settings that replace the checkpoint's; not used for Hugging Face checkpoints
ForwardPass = Callable[[Settings], Stages]


def forward_pass(checkpoint: Checkpoint, tokens: Tensor, device: str) -> ForwardPass:
    """The stages of a checkpoint's forward pass of tokens [b, s].

    Raises BridgeError if transformers is not installed or needs a missing tensor, and for models
    that the reference does not support.
    """
    if checkpoint.kind == "neox":
        return lambda settings: _neox(checkpoint, tokens, device, settings)
    model = _skeleton(checkpoint, device)
    return lambda _settings: _hf(checkpoint, model, tokens.to(device), device)


def read(whole: Whole, device: str) -> Tensor:
    """A tensor in float32, in its shape."""
    context = Context()
    try:
        flat = values(whole, "float32", (0,) * len(whole.shape), whole.shape, context)
    finally:
        context.files.close()
    return torch.from_numpy(np.require(flat, requirements=["W"])).reshape(whole.shape).to(device)


class _Rank(Mapping[str, Tensor]):
    """The tensors of one rank by "<layer>.<name>", read on demand; one layer is kept."""

    def __init__(
        self,
        layers: Mapping[int, Mapping[str, TensorRef]],
        parts: Mapping[TensorRef, Whole],
        device: str,
    ) -> None:
        self._parts = parts
        self._refs = {
            f"{layer}.{name}": ref for layer, refs in layers.items() for name, ref in refs.items()
        }
        self._device = device
        self._layer, self._kept = "", dict[str, Tensor]()

    def __getitem__(self, name: str) -> Tensor:
        ref, layer = self._refs[name], name.partition(".")[0]
        if layer != self._layer:
            self._layer, self._kept = layer, {}
        if name not in self._kept:
            whole = self._parts.get(ref) or gather("replicated", [ref], False)
            self._kept[name] = read(replace(whole, dtype=ref.dtype), self._device)
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)


def neox_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings for the reference: the yml, and what the GPT-NeoX version decides."""
    state = checkpoint.neox_state
    return {
        **checkpoint.raw,
        "num_layers": checkpoint.config.layers,
        "gqa_order": "te" if "attention" in state.te else state.gqa_order,
        "gate": "first" if "mlp" in state.te else "second",
        "rms_eps": state.rms_eps,
    }


def _neox(checkpoint: Checkpoint, tokens: Tensor, device: str, settings: Settings) -> Stages:
    state = checkpoint.neox_state
    ranks = [_Rank(layers, state.parts, device) for layers in state.ranks]
    meant = {**neox_settings(checkpoint), **settings}
    try:
        yield from reference.stages(ranks, meant, tokens.to(device))
    except ValueError as error:
        raise _uncovered(checkpoint, error) from None


def _uncovered(checkpoint: Checkpoint, why: object) -> BridgeError:
    return BridgeError(f"{checkpoint.path}: cannot compute its logits: {why}.")


def _skeleton(checkpoint: Checkpoint, device: str) -> nn.Module:
    """transformers' model of the config, without memory for its weights."""
    if checkpoint.form is not None:
        raise _uncovered(checkpoint, f"the {checkpoint.form.name} format is not supported")
    try:
        import transformers
    except ImportError:
        raise missing("`logits=True` needs transformers, which is missing", "verify") from None
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
        if checkpoint.ignored_keys:
            config = type(config).from_dict(without_ignored(checkpoint))
        kind = "SequenceClassification" if checkpoint.config.reward else "CausalLM"
        auto = getattr(transformers, f"AutoModelFor{kind}")
        with _weights_on_meta():
            model = auto.from_config(config, attn_implementation="eager")
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BridgeError(
            f"{checkpoint.path}: transformers cannot read config.json: {lines[0].rstrip('.')}. "
            "Correct config.json, or install the transformers that wrote it."
        ) from None
    model.eval()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    skeleton: nn.Module = model
    return skeleton


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """New modules get weights without memory; their buffers are computed normally."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, weight: nn.Parameter | None) -> None:
        if weight is not None:
            weight = nn.Parameter(weight.to("meta"), requires_grad=False)
        original(module, name, weight)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = original


@torch.no_grad()  # type: ignore[untyped-decorator]
def _hf(checkpoint: Checkpoint, model: Any, tokens: Tensor, device: str) -> Stages:
    names = {id(module): name for name, module in model.named_modules()}
    tensors = to_stored(checkpoint.architecture, checkpoint.config, checkpoint.tensors)

    @contextmanager
    def loaded(module: nn.Module) -> Iterator[nn.Module]:
        """Load the weights of a module during the block."""
        owners = list(module.named_modules())
        for inner, owner in owners:
            for leaf in list(owner._parameters):
                if owner._parameters[leaf] is None:
                    continue
                name = ".".join(part for part in (names[id(module)], inner, leaf) if part)
                value = read(_stored(checkpoint, tensors, name), device)
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        try:
            yield module
        finally:
            for _, owner in owners:
                for leaf, value in owner._parameters.items():
                    if value is not None:
                        owner._parameters[leaf] = nn.Parameter(value.to("meta"), False)

    body = getattr(model.base_model, "decoder", model.base_model)
    final, layers = _part(body, _FINAL_NORMS), _part(body, _LAYERS)
    if final is None or layers is None:
        raise _uncovered(checkpoint, f"{checkpoint.architecture.hf_class} is not supported")
    with ExitStack() as embedded:
        for module in body.children():
            if module not in (final, layers):
                embedded.enter_context(loaded(module))
        x, calls = _calls(body, layers, tokens)
    x = replaced((yield Stage("embeddings", x)), x)
    for number, (layer, (args, keywords)) in enumerate(zip(layers, calls, strict=True)):
        with loaded(layer), _recording(layer) as parts:
            x = _first(layer(x, *args, **keywords))
        x = replaced((yield Stage(f"layer {number}", x, dict(parts))), x)
    with loaded(final):
        x = final(x)
    x = replaced((yield Stage("final norm", x)), x)
    head = model.score if checkpoint.config.reward else model.get_output_embeddings()
    with loaded(head):
        x = head(x)
    yield Stage("logits", x.float())


def _part(body: Any, names: Iterable[str]) -> Any:
    """The module that has one of these names; None if there is none."""
    return next((part for name in names if (part := getattr(body, name, None)) is not None), None)


def _stored(checkpoint: Checkpoint, tensors: Mapping[str, Whole], name: str) -> Whole:
    """The stored tensor that has this name in transformers."""
    architecture = checkpoint.architecture
    name = architecture.aliases.get(name, name)
    if checkpoint.config.tied_embeddings and name == architecture.head:
        name = architecture.embeddings
    if name not in tensors:
        raise BridgeError(
            f"{checkpoint.path} does not contain {name}, which transformers would initialize "
            "randomly."
        )
    return tensors[name]


class _Reached(Exception):
    pass


def _calls(
    body: Any, layers: Any, tokens: Tensor
) -> tuple[Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The input of the first layer and the arguments of each layer, without running them."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    inputs: list[Tensor] = []

    def stub(*args: Any, **keywords: Any) -> Any:
        hidden = keywords.pop("hidden_states") if "hidden_states" in keywords else args[0]
        inputs.append(hidden)
        calls.append((args[1:], keywords))
        if len(calls) == len(layers):
            raise _Reached
        return (hidden,)  # older versions of transformers use the first element of a layer's output

    try:
        for layer in layers:
            layer.forward = stub
        body(input_ids=tokens, use_cache=False)
    except _Reached:
        pass
    finally:
        for layer in layers:
            del layer.forward
    return inputs[0], calls


@contextmanager
def _recording(layer: Any) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of the attention and MLP of a layer."""
    attention = _part(layer, _ATTENTIONS)
    parts: dict[str, Tensor] = {}

    def record(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        value = _first(output)
        parts[name] = value.reshape(parts["attention"].shape) if "attention" in parts else value

    hooks = [
        module.register_forward_hook(partial(record, name))
        for name, module in (("attention", attention), ("mlp", _part(layer, _MLPS)))
    ]
    try:
        yield parts
    finally:
        for hook in hooks:
            hook.remove()


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first
