"""Patches GPT-NeoX's classes at run time as ``patch/patcher.py`` patches a source tree."""

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from neox_bridge.patch.places import BUFFERS

_MODULE = "megatron.model.positional_embeddings"


def install() -> None:
    """Let GPT-NeoX in this process load checkpoints with and without computed buffers.

    Call it once, before or after the import of megatron, and before the model is built. An existing
    model loads both kinds too, but continues to store its buffers.
    """
    module = sys.modules.get(_MODULE)
    if module is not None:
        _patch(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the module with the other finders, and patches it after it is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if finder is self or find is None else find(name, path, target)
            if isinstance(spec, ModuleSpec) and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    def __init__(self, real: Loader) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.real
        if module.__spec__ is not None:
            module.__spec__.loader = self.real
        self.real.exec_module(module)
        _patch(module)


def _patch(module: ModuleType) -> None:
    """Patch every class of the module, except one that has a load hook, as in a patched tree."""
    import torch

    owners = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, torch.nn.Module)
        and value.__module__ == module.__name__
    ]
    for owner in owners:
        if "_load_from_state_dict" not in vars(owner):
            _patch_class(owner)
    if not owners:
        message = (
            f"{module.__name__} has no module classes: neox_bridge.compat.install() did nothing"
        )
        warnings.warn(message, stacklevel=3)


def _patch_class(owner: Any) -> None:
    import torch

    from neox_bridge.patch import load_hook

    vars(load_hook).setdefault("torch", torch)

    accept: Callable[..., None] = load_hook._neox_bridge_load
    register, load = owner.register_buffer, owner._load_from_state_dict

    @wraps(register)
    def register_buffer(self: Any, name: str, tensor: Any, persistent: bool | None = None) -> None:
        kept = name not in BUFFERS if persistent is None else persistent
        register(self, name, tensor, persistent=kept)

    @wraps(load)
    def load_from_state_dict(self: Any, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in BUFFERS:
            if name in self._buffers:
                accept(self, name, state_dict, prefix, rest[-1])
        load(self, state_dict, prefix, *rest)

    owner.register_buffer = register_buffer
    owner._load_from_state_dict = load_from_state_dict
