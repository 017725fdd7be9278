"""Moves language-model checkpoints between Hugging Face and GPT-NeoX, without either framework.

The command line's verbs, for Python::

    import neox_bridge

    checkpoint = neox_bridge.open_checkpoint("pythia-410m")
    plan = neox_bridge.plan(checkpoint, neox_bridge.Options(tp=2), "out")
    result = neox_bridge.execute(plan, "out")

Every error that a user can fix is a ``BridgeError``. The others are its kinds: catch ``Refused``
where the target cannot express the source, ``UsageError`` where options do not fit, and so on.
"""

from importlib import import_module

from neox_bridge.version import __version__

TYPE_CHECKING = False  # type checkers take it as true; importing typing would double the time
if TYPE_CHECKING:
    from neox_bridge.api import open_checkpoint, plan
    from neox_bridge.errors import (
        BridgeError,
        ChoiceNeeded,
        Refused,
        SettingsMissing,
        Unreachable,
        Unverified,
        UsageError,
    )
    from neox_bridge.execution.result import Result
    from neox_bridge.execution.run import execute
    from neox_bridge.findings import Finding
    from neox_bridge.layouts.checkpoint import Checkpoint
    from neox_bridge.layouts.folder_kinds import ForeignFolder
    from neox_bridge.layouts.quantized import QuantizedModel
    from neox_bridge.planning.options import Options
    from neox_bridge.planning.plan import Plan

__all__ = [
    "BridgeError",
    "Checkpoint",
    "ChoiceNeeded",
    "Finding",
    "ForeignFolder",
    "Options",
    "Plan",
    "QuantizedModel",
    "Refused",
    "Result",
    "SettingsMissing",
    "Unreachable",
    "Unverified",
    "UsageError",
    "__version__",
    "execute",
    "open_checkpoint",
    "plan",
]

_HOMES = {
    "BridgeError": "errors",
    "Checkpoint": "layouts.checkpoint",
    "ChoiceNeeded": "errors",
    "Finding": "findings",
    "ForeignFolder": "layouts.folder_kinds",
    "Options": "planning.options",
    "Plan": "planning.plan",
    "QuantizedModel": "layouts.quantized",
    "Refused": "errors",
    "Result": "execution.result",
    "SettingsMissing": "errors",
    "Unreachable": "errors",
    "Unverified": "errors",
    "UsageError": "errors",
    "execute": "execution.run",
    "open_checkpoint": "api",
    "plan": "api",
}


def __getattr__(name: str) -> object:
    """Imports the home of a public name when it is first used, so that the package is instant."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
