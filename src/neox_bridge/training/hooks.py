"""Puts neox-bridge into GPT-NeoX's training: what wraps its functions, in the process of each rank.

Checked with the trees of 2024-03, 2024-09, 2024-10 and today (megatron/training.py,
``setup_model_and_optimizer``; megatron/checkpointing.py).
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.training import loading
from neox_bridge.training.exporting import Exporter, Exports, exports_of
from neox_bridge.training.keys import register

_MARK = "_neox_bridge"  # of a function that is wrapped
_EXPORTERS: list[Exporter] = []  # of rank 0


def install() -> None:
    """Register the keys and wrap GPT-NeoX's functions, once.

    Raises ImportError with advice if GPT-NeoX cannot be imported.
    """
    try:
        arguments = importlib.import_module("megatron.neox_arguments.arguments")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "megatron":
            raise
        raise ImportError(
            "neox_bridge.neox works inside GPT-NeoX: import it in train.py and deepy.py of a "
            "GPT-NeoX tree, whose package `megatron` is not on sys.path here."
        ) from None
    register(arguments)
    if "deepy" in os.path.basename(sys.argv[0]):
        return  # the launcher only checks the keys
    training = importlib.import_module("megatron.training")
    checkpointing = importlib.import_module("megatron.checkpointing")
    _wrap("load_checkpoint", _loading, checkpointing, training)
    _wrap("save_checkpoint", _saving, checkpointing, training)
    _wrap("setup_model_and_optimizer", _setting_up, training)


def _wrap(name: str, around: Callable[..., Any], *modules: ModuleType) -> None:
    """Replace a function in every module that has imported it."""
    original = getattr(modules[0], name)
    if hasattr(original, _MARK):
        return
    wrapped = functools.wraps(original)(functools.partial(around, original))
    setattr(wrapped, _MARK, True)
    for module in modules:
        setattr(module, name, wrapped)


def _loading(
    original: Callable[..., int], neox_args: Any, model: Any, *rest: Any, **named: Any
) -> int:
    """``load_checkpoint``, which also starts from a Hugging Face model. Returns the iteration."""
    start = loading.start_of(neox_args.load, neox_args.save)
    if start.resumed:
        say(f"the run goes on from {start.resumed}, not from {neox_args.load}")
        neox_args.load = start.resumed
    if not start.source:
        return original(neox_args, model, *rest, **named)
    from megatron import mpu  # type: ignore[import-not-found]

    checkpoint = loading.open_for_run(
        start.source, _agree, first=int(os.environ.get("LOCAL_RANK", "0")) == 0
    )
    error = ""
    read = 0
    try:
        read = loading.load_into(
            checkpoint,
            vars(neox_args),
            _tree(),
            _parts(model.module),
            mpu.get_model_parallel_rank(),
        )
    except (BridgeError, OSError) as problem:
        error = str(problem)
    if errors := [text for text in _agree(error) if text]:
        raise BridgeError(errors[0])
    if hasattr(model.module, "_synchronize_tied_weights"):
        model.module._synchronize_tied_weights()
    if hasattr(model.optimizer, "refresh_fp32_params"):
        model.optimizer.refresh_fp32_params()  # the masters begin as the weights
    say(f"started from {start.source} ({read:,} bytes on rank 0)")
    return 0


def _setting_up(original: Callable[..., Any], neox_args: Any, *rest: Any, **named: Any) -> Any:
    """``setup_model_and_optimizer``, which also starts the process that exports saved steps."""
    exports = exports_of(vars(neox_args))
    if exports is not None:
        _check_shared(exports)
        if _rank() == 0:
            _EXPORTERS[:] = [Exporter(exports)]
            _EXPORTERS[0].start()
    return original(neox_args, *rest, **named)


def _saving(
    original: Callable[..., Any], neox_args: Any, iteration: int, *rest: Any, **named: Any
) -> Any:
    """``save_checkpoint``, after which rank 0 tells the exporter that the step is complete."""
    result = original(neox_args, iteration, *rest, **named)
    for exporter in _EXPORTERS:
        exporter.saved(iteration)
    return result


def _check_shared(exports: Exports) -> None:
    """Raise BridgeError unless all nodes write into the same ``save``."""
    os.makedirs(exports.save, exist_ok=True)
    probe = os.path.join(exports.save, f".neox_bridge_{os.environ.get('MASTER_PORT', '')}")
    if _rank() == 0:
        with open(probe, "w", encoding="ascii"):
            pass
    _agree("")
    there = os.path.exists(probe)
    errors = _agree("" if there else f"save: {exports.save} is not the same folder on all nodes")
    if _rank() == 0:
        os.unlink(probe)
    if problems := [error for error in errors if error]:
        raise BridgeError(
            f"{problems[0]}, so its steps cannot be exported (save_hf). Use a file system that all "
            "nodes share."
        )


def _parts(module: Any) -> Iterator[loading.Part]:
    """The modules that GPT-NeoX loads from a file each, as load_state_dir of DeepSpeed does it."""
    if not hasattr(module, "forward_funcs"):
        yield loading.Part(None, module.state_dict())
        return
    for number, layer in enumerate(module.forward_funcs):
        if hasattr(layer, "load_state_dict"):
            values = layer.state_dict()
            if values:
                yield loading.Part(number + module._local_start, values)


def _tree() -> str:
    """The source tree that this process runs."""
    megatron = importlib.import_module("megatron")
    (folder, *_) = megatron.__path__
    return os.path.dirname(folder)


def _agree(error: str) -> list[str]:
    """The errors of all ranks."""
    import torch

    if not torch.distributed.is_initialized():
        return [error]
    errors: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, error)
    return errors


def _rank() -> int:
    import torch

    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def say(text: str) -> None:
    """Print a line on rank 0."""
    if _rank() == 0:
        print(f"neox-bridge: {text}", flush=True)
