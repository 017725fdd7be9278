"""Made-up steps of a run, as ``audit`` sees them."""

from typing import Any

from neox_bridge.verification.hashes import Fingerprint
from neox_bridge.verification.steps import Step


def tensor(bits: str, norm: float = 1.0, shape: tuple[int, ...] = (4, 4), **more: Any) -> Any:
    return Fingerprint(bits, "float32", shape, norm, more.pop("bad", 0), False, **more)


def step(number: int | None, tensors: dict[str, Fingerprint] | None = None, **more: Any) -> Step:
    given = {"a": tensor(f"a{number}"), "b": tensor(f"b{number}")} if tensors is None else tensors
    files = dict.fromkeys(given, ("model.safetensors",))
    fields: dict[str, Any] = {
        "run": "run",
        "label": str(number),
        "number": number,
        "path": f"run/step{number}",
        "kind": "hf",
        "tp": 1,
        "dtype": "float32",
        "meaning": {},
        "seed": None,
        "making": (),
        "tensors": given,
        "files": files,
        "size": 64,
        "read": 0,
    }
    return Step(**{**fields, **more})
