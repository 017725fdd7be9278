"""The classes and functions in pickles of checkpoints that only build values.

Sources: torch 2.13's torch/_weights_only_unpickler.py (what it allows), numpy's ``array_reduce``,
and the files that GPT-NeoX, DeepSpeed and transformers' Trainer write (but not the Trainer's
TrainingArguments, which reads files when it is called). The code behind each name only builds a
value from its arguments: it opens no file, starts no program, runs no text, and calls no arguments
except those in ``_CALLS``.
"""

from typing import Any

from neox_bridge.formats.pickle_folds import Global
from neox_bridge.tensors.dtypes import BY_NAME, BY_STORAGE

_PYTHON = {
    "builtins": "bytearray bytes complex dict float frozenset int list object set slice str tuple",
    "_codecs": "encode",
    "argparse": "Namespace",
    "collections": "Counter OrderedDict defaultdict deque",
    "copyreg": "_reconstructor",
    "datetime": "date datetime timedelta timezone",
    "io": "BytesIO",
    "pathlib": "Path PosixPath PurePosixPath PureWindowsPath WindowsPath",
}
_NUMPY = {
    "numpy": "dtype ndarray bool_ float16 float32 float64 int8 int16 int32 int64 uint8 uint16 "
    "uint32 uint64",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy.core.numeric": "_frombuffer",
    "numpy._core.numeric": "_frombuffer",
}
_TORCH = {
    "torch": "Size Tensor device dtype BFloat16Tensor FloatTensor HalfTensor QInt8Storage "
    "QUInt8Storage QInt32Storage " + " ".join((*BY_NAME, *BY_STORAGE)),
    "torch._tensor": "_rebuild_from_type_v2",
    "torch._utils": "_rebuild_parameter _rebuild_parameter_with_state _rebuild_tensor "
    "_rebuild_tensor_v2 _rebuild_tensor_v3",
    "torch.nn.parameter": "Buffer Parameter",
    "torch.serialization": "_get_layout",
    "torch.storage": "TypedStorage UntypedStorage",
}
_FRAMEWORKS = {
    "deepspeed.checkpoint.universal_checkpoint": "SubparamShape",
    "deepspeed.runtime.fp16.loss_scaler": "DynamicLossScaler LossScaler LossScalerBase",
    "deepspeed.runtime.zero.config": "ZeroStageEnum",
    "deepspeed.utils.tensor_fragment": "fragment_address",
    "transformers.trainer_utils": "HubStrategy IntervalStrategy SaveStrategy SchedulerType",
}
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # old names
_NAMES = {
    (module, name)
    for table in (_PYTHON, _NUMPY, _TORCH, _FRAMEWORKS)
    for module, names in table.items()
    for name in names.split()
}
# places of the arguments that such a function calls itself, or whose methods it calls
_CALLS = {
    ("copyreg", "_reconstructor"): (0, 1),
    ("torch._tensor", "_rebuild_from_type_v2"): (0, 1),
    ("numpy.core.multiarray", "_reconstruct"): (0,),
    ("numpy._core.multiarray", "_reconstruct"): (0,),
}


def is_known(imported: Global) -> bool:
    """Whether a class or function only builds a value when it is imported and called."""
    return _key(imported) in _NAMES


def calls_of(factory: object, args: object) -> tuple[Any, ...]:
    """The arguments that a known function calls."""
    places = _CALLS.get(_key(factory), ()) if isinstance(factory, Global) else ()
    return tuple(args[i] for i in places if i < len(args)) if isinstance(args, tuple) else ()


def _key(imported: Global) -> tuple[str, str]:
    return _PYTHON_2.get(imported.module, imported.module), imported.name
