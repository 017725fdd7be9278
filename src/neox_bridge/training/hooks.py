"""Puts neox-bridge into GPT-NeoX's training: what wraps its functions, in the process of each rank.

Checked with the trees of 2024-03, 2024-09, 2024-10 and today (megatron/training.py,
``setup_model_and_optimizer``; megatron/checkpointing.py).
"""

import dataclasses
import functools
import importlib
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from neox_bridge.errors import BridgeError
from neox_bridge.stores.paths import is_local
from neox_bridge.training import loading
from neox_bridge.training.exports import ExporterProcess, Exports, exports_of
from neox_bridge.training.keys import register
from neox_bridge.wording import plural

_LAUNCHER = "deepy.py"
_WRAPPED = "_neox_bridge"  # the attribute of a function that is wrapped
_exporters: list[ExporterProcess] = []  # one on the ranks that export, none elsewhere
_is_inference = ContextVar("is_inference", default=False)
_loaded_models: list[Any] = []  # the engines of this setup, of which the first is trained


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
            "neox_bridge.neox works inside GPT-NeoX. Import it in train.py and deepy.py of a "
            "GPT-NeoX tree: its package `megatron` is not on sys.path here."
        ) from None
    register(arguments)
    if os.path.basename(sys.argv[0]) == _LAUNCHER:
        return  # it only checks the keys and passes them on
    training = importlib.import_module("megatron.training")
    checkpointing = importlib.import_module("megatron.checkpointing")
    _wrap("load_checkpoint", _load_checkpoint, checkpointing, training)
    _wrap("save_checkpoint", _save_checkpoint, checkpointing, training)
    _wrap("setup_model_and_optimizer", _setup_model_and_optimizer, training)
    _wrap("pretrain", _pretrain, training)
    utils = importlib.import_module("megatron.utils")
    _wrap("setup_for_inference_or_eval", _setup_for_inference, utils)


def _wrap(name: str, wrapper: Callable[..., Any], *modules: ModuleType) -> None:
    """Replace a function in every module that has imported it."""
    original = getattr(modules[0], name)
    if hasattr(original, _WRAPPED):
        return
    wrapped = functools.wraps(original)(functools.partial(wrapper, original))
    setattr(wrapped, _WRAPPED, True)
    for module in modules:
        setattr(module, name, wrapped)


def _load_checkpoint(
    original: Callable[..., int], neox_args: Any, model: Any, *args: Any, **kwargs: Any
) -> int:
    """``load_checkpoint``, which also starts from a Hugging Face model. Returns the iteration.

    A preference training calls it again for the reference model, which is always the one that
    ``load`` names.
    """
    is_reference = bool(_loaded_models)
    _loaded_models.append(model)
    start, error = loading.Start(), ""
    try:
        start = loading.start_of(neox_args.load, neox_args.save, kwargs.get("iteration"))
    except (BridgeError, OSError) as problem:
        error = str(problem)
    _raise_first(_gather(error))
    if len({*_gather(f"{start.source}\n{start.resumed}")}) > 1:
        raise BridgeError(_not_shared(f"load: {neox_args.load}, or save: {neox_args.save}"))
    if start.note:
        say(start.note)
    if not start.source:
        return original(neox_args, model, *args, **kwargs)
    if start.resumed and not is_reference:
        with _resuming(neox_args, start.resumed):
            return original(neox_args, model, *args, **kwargs)
    _start(start.source, neox_args, model)
    return 0


@contextmanager
def _resuming(neox_args: Any, folder: str) -> Iterator[None]:
    """Load the run's own checkpoint, with its optimizer, as the yml would say after a crash."""
    changed = {"load": folder, "finetune": False}
    before = {name: getattr(neox_args, name) for name in changed}
    for name, value in changed.items():
        setattr(neox_args, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(neox_args, name, value)


def _start(source: str, neox_args: Any, model: Any) -> None:
    """Load the weights of a Hugging Face model. Raises BridgeError on every rank if one fails."""
    mpu = importlib.import_module("megatron.mpu")
    checkpoint = loading.open_for_run(
        source, _gather, rank=_rank(), local_rank=int(os.environ.get("LOCAL_RANK", "0"))
    )
    error, loaded = "", loading.Loaded(0)
    try:
        loaded = loading.load_into(
            checkpoint,
            loading.Run(vars(neox_args), _defaults(neox_args), _tree()),
            _parts(model.module),
            mpu.get_model_parallel_rank(),
        )
    except (BridgeError, OSError) as problem:
        error = str(problem)
    _raise_first(_gather(error))
    if hasattr(model.module, "_synchronize_tied_weights"):
        model.module._synchronize_tied_weights()
    if hasattr(model.optimizer, "refresh_fp32_params"):
        model.optimizer.refresh_fp32_params()  # the master weights of ZeRO, fp16 and bf16
    say(f"started from {source}: rank 0 loaded {plural(loaded.size, 'byte')}")
    for warning in loaded.warnings:
        say(f"warning: {warning}")


def _setup_model_and_optimizer(
    original: Callable[..., Any], neox_args: Any, *args: Any, **kwargs: Any
) -> Any:
    """``setup_model_and_optimizer``, which also starts the process that exports saved steps."""
    _loaded_models.clear()
    _exporters.clear()
    exports = None if _is_inference.get() else exports_of(vars(neox_args))
    exporter = None
    if exports is not None:
        exporter = _exporter_of(exports, neox_args)
        _raise_first(_gather(_check_target(exporter) if exporter else ""))
        _raise_first(_gather(_check_push(exports.repository)))
    result = original(neox_args, *args, **kwargs)
    if exports is not None:
        _raise_first(_gather(_start_exporter(exporter)))
    return result


def _setup_for_inference(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``setup_for_inference_or_eval`` of eval.py and generate.py, whose runs export nothing."""
    token = _is_inference.set(True)
    try:
        return original(*args, **kwargs)
    finally:
        _is_inference.reset(token)


def _check_push(repository: str) -> str:
    """Check on rank 0 that steps can be pushed. Returns the error, or ""."""
    if not repository or _rank() != 0:
        return ""
    from neox_bridge.hub.publish import check_writable

    try:
        check_writable(repository)
    except BridgeError as problem:
        return f"push_to_hub: {problem}"
    except ConnectionError as problem:  # an outage of the Hub must not keep a run from starting
        say(f"warning: push_to_hub: write access cannot be checked now: {problem}")
    return ""


def _check_target(exporter: ExporterProcess) -> str:
    """Check that this run can write into the target. Returns the error, or ""."""
    try:
        exporter.check()
    except BridgeError as problem:
        return str(problem)
    except OSError as problem:
        return f"save_hf: {exporter.exports.home} cannot be written: {problem}"
    return _check_store(exporter.exports.target)


def _check_store(target: str) -> str:
    """Check that a target in a store can be written. Returns the error, or ""."""
    if is_local(target):
        return ""
    from neox_bridge.stores.objects import put_small, remove

    probe = f"{target}/.neox_bridge_{uuid.uuid4().hex}"
    try:
        put_small(probe, b"")
        remove([probe])
    except (BridgeError, OSError) as problem:
        return f"save_hf: {problem}"
    return ""


def _start_exporter(exporter: ExporterProcess | None) -> str:
    """Start the process that exports. Returns the error, or ""."""
    if exporter is None:
        return ""
    try:
        exporter.start()
    except OSError as problem:
        return f"save_hf: {exporter.exports.target} cannot be written: {problem}"
    _exporters[:] = [exporter]
    return ""


def _save_checkpoint(
    original: Callable[..., Any], neox_args: Any, iteration: int, *args: Any, **kwargs: Any
) -> Any:
    """``save_checkpoint``, after which the exporter is told that the step is complete."""
    result = original(neox_args, iteration, *args, **kwargs)
    for exporter in _exporters:
        exporter.saved(iteration)
    return result


def _pretrain(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``pretrain``. Rank 0 waits for the last exports, which the end of a job would kill."""
    try:
        result = original(*args, **kwargs)
    except SystemExit:  # exit_interval
        _finish_exports()
        raise
    _finish_exports()
    return result


def _finish_exports() -> None:
    for exporter in _exporters:
        say(f"waiting until {exporter.exports.target} contains the last steps")
        exporter.finish()


def _exporter_of(exports: Exports, neox_args: Any) -> ExporterProcess | None:
    """The exporter that this rank starts, if any.

    It is one on rank 0 if its node has all weights of a step: if all ranks share ``save``, or if
    nodes without a share of it have copies of these weights only (DeepSpeed writes weights on the
    ranks that are the first of their data-parallel group). Otherwise it is one on each node.

    Raises BridgeError if no node has all weights and they cannot be brought together.
    """
    groups = _groups(exports.save)
    mpu = importlib.import_module("megatron.mpu")
    is_writer = _gather("" if mpu.get_data_parallel_rank() else "writes")
    writers = {group for group, writes in zip(groups, is_writer, strict=True) if writes}
    run = _gather(uuid.uuid4().hex)[0]
    first = groups[_rank()]
    if len({*groups}) > 1:
        _check_split(exports, neox_args, has_all=writers == {groups[0]})
    if len({*groups}) == 1 or writers == {groups[0]}:
        return ExporterProcess(exports) if _rank() == 0 else None
    nodes = sorted({*groups})
    exports = dataclasses.replace(exports, node=nodes.index(first), nodes=len(nodes))
    return ExporterProcess(exports, run) if _rank() == first else None


def _check_split(exports: Exports, neox_args: Any, *, has_all: bool) -> None:
    """Raise BridgeError if steps in a ``save`` of each node's own cannot be exported.

    has_all: whether the node of rank 0 has all weights.
    """
    save = f"save: {exports.save}"
    zero = vars(neox_args).get("zero_optimization") or {}
    if isinstance(zero, dict) and int(zero.get("stage") or 0) > 2:
        raise BridgeError(
            f"{_not_shared(save)} With ZeRO stage 3, the weights are in the optimizer states of "
            "all ranks, which are not brought together."
        )
    if exports.is_local and not has_all:
        raise BridgeError(
            f"{_not_shared(save)} Or set save_hf to a folder of an object store "
            "(s3://BUCKET/FOLDER), where the nodes bring the weights of a step together."
        )
    say(
        f"warning: {save} is on a disk of each node's own. To resume, GPT-NeoX needs the files of "
        "all nodes on each of them: copy `latest` and the step together before, or use a folder on "
        "a file system that all nodes share."
    )


def _groups(save: str) -> list[int]:
    """For each rank, the first rank that sees the same ``save``.

    Raises BridgeError on every rank if a node cannot write it, or if a rank sees it with nobody.
    """
    token = _gather(uuid.uuid4().hex)[0]  # never a name that a node remembers

    def probe(rank: int) -> str:
        return os.path.join(save, f".neox_bridge_{token}_{rank}")

    is_first = _rank() == 0 or os.environ.get("LOCAL_RANK", "0") == "0"
    error = ""
    if is_first:
        try:
            os.makedirs(save, exist_ok=True)
            with open(probe(_rank()), "w", encoding="ascii"):
                pass
        except OSError as problem:
            error = f"save: {save} cannot be written: {problem}"
    _raise_first(_gather(error))
    firsts = [rank for rank, first in enumerate(_gather("first" if is_first else "")) if first]
    seen = next((rank for rank in firsts if os.path.exists(probe(rank))), None)
    groups = _gather("" if seen is None else str(seen))
    if is_first:
        os.unlink(probe(_rank()))
    if "" in groups:
        raise BridgeError(_not_shared(f"save: {save}"))
    return [int(group) for group in groups]


def _not_shared(folder: str) -> str:
    return (
        f"{folder} is not the same folder on all nodes, so its steps are not complete on any of "
        "them. Use a folder on a file system that all nodes share."
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


def _defaults(neox_args: Any) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(neox_args)}


def _tree() -> str:
    """The source tree that this process runs."""
    megatron = importlib.import_module("megatron")
    (folder, *_) = megatron.__path__
    return os.path.dirname(folder)


def _gather(text: str) -> list[str]:
    """The texts of all ranks, in their order."""
    import torch

    if not torch.distributed.is_initialized():
        return [text]
    texts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(texts, text)
    return texts


def _raise_first(errors: Iterable[str]) -> None:
    """Raise BridgeError with the first error that is not ""."""
    if error := next((text for text in errors if text), ""):
        raise BridgeError(error)


def _rank() -> int:
    import torch

    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def say(text: str) -> None:
    """Print a line on rank 0."""
    if _rank() == 0:
        print(f"neox-bridge: {text}", flush=True)
