"""Names of tensors of a model that was saved inside a wrapper: ``_orig_mod.``, ``module.``, …

torch.compile, DistributedDataParallel, FSDP and others put a module around the model, whose name
then begins every tensor's. Wrappers inside (``layers.0._orig_mod.mlp``) belong to one submodule.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from neox_bridge.errors import BridgeError
from neox_bridge.tensors.tensor_ref import TensorRef

_INSIDE = frozenset(
    "_orig_mod _fsdp_wrapped_module _checkpoint_wrapped_module _forward_module _fpw_module".split()
)
_AROUND = _INSIDE | frozenset(
    "module model base_model pretrained_model language_model causal_lm llm lm policy".split()
)
_IN_RANKS = _INSIDE | {"module"}  # of GPT-NeoX's files
_BY = {
    "_orig_mod": "torch.compile",
    "module": "DistributedDataParallel or DeepSpeed",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "base_model": "PEFT",
    "pretrained_model": "TRL",
}


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """names: the model's own name of each tensor, by the name in the files.

    wrappers: what was removed: a prefix with its dot, or a part of a name between two dots.
    """

    names: dict[str, str]
    wrappers: tuple[str, ...]

    @property
    def by(self) -> str:
        """What puts such wrappers around a model; empty if that is not known."""
        parts = {part for wrapper in self.wrappers for part in wrapper.split(".")}
        return " and ".join(sorted(_BY[part] for part in parts & set(_BY)))


def unwrap(keys: Iterable[str], is_known: Callable[[str], bool], where: str) -> Unwrapped:
    """The names without their wrappers; those that no wrapper explains stay as they are.

    is_known: whether the family has a tensor of this name. where: for messages. Raises BridgeError
    where only some names have a wrapper around them, or two names become the same.
    """
    names: dict[str, str] = {}
    origin: dict[str, str] = {}
    around: dict[str, str] = {}  # prefix: the first key that has it
    wrappers: dict[str, None] = {}
    for key in keys:
        prefix, name = _split(key, is_known)
        names[key] = name
        if name != key or is_known(key):
            around.setdefault(prefix, key)
        _record(origin, name, key, where)
        if prefix:
            wrappers.setdefault(prefix)
        inner = key.removeprefix(prefix)
        wrappers.update(
            dict.fromkeys(p for p in inner.split(".") if name != inner and p in _INSIDE)
        )
    if len(around) > 1:
        (first, key), (second, other) = list(around.items())[:2]
        raise BridgeError(
            f"{where} contains {key} {_with(first)} and {other} {_with(second)}, the names of "
            "two different state dicts. Save the model again with one kind of names."
        )
    return Unwrapped(names, tuple(wrappers))


def _with(prefix: str) -> str:
    return f"(with {prefix!r} in front)" if prefix else "(without a prefix)"


def _split(key: str, is_known: Callable[[str], bool]) -> tuple[str, str]:
    """(the prefix that is no part of the model's name, the model's name)."""
    if is_known(key):
        return "", key
    parts = key.split(".")
    for count in range(len(parts)):
        if count and parts[count - 1] not in _AROUND:
            break
        rest = ".".join(part for part in parts[count:] if part not in _INSIDE)
        if parts[count] not in _INSIDE and is_known(rest):
            return "".join(f"{part}." for part in parts[:count]), rest
    return "", key


def without_wrappers(tensors: Mapping[str, TensorRef], where: str) -> dict[str, TensorRef]:
    """GPT-NeoX's tensors without what DeepSpeed and torch.compile put into their names."""
    if not any(set(name.split(".")) & _IN_RANKS for name in tensors):
        return dict(tensors)
    origin: dict[str, str] = {}
    for key in tensors:
        name = ".".join(part for part in key.split(".") if part not in _IN_RANKS)
        _record(origin, name, key, where)
    return {name: tensors[key] for name, key in origin.items()}


def _record(origin: dict[str, str], name: str, key: str, where: str) -> None:
    """Note which key has a name. Raises BridgeError if another one has it already."""
    if origin.setdefault(name, key) != key:
        raise BridgeError(
            f"{where} contains {origin[name]} and {key}, which are the same tensor of the model "
            "once the wrapper's name is removed. Remove one of them."
        )
