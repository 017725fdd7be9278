"""Moves language-model checkpoints between Hugging Face and GPT-NeoX, without either framework.

The command line's verbs, for Python::

    import neox_bridge

    checkpoint = neox_bridge.open_checkpoint("pythia-410m")
    plan = neox_bridge.plan(checkpoint, neox_bridge.Options(tp=2), "out")
    result = neox_bridge.execute(plan, "out")  # verified before it appears
    neox_bridge.convert("pythia-410m", "out", tp=2)  # the same in one call

Every error that a user can fix is a ``BridgeError``. The others are its kinds: catch ``Refused``
where the target cannot express the source, ``UsageError`` where options do not fit, and so on.
"""

from importlib import import_module

TYPE_CHECKING = False  # type checkers take it as true; importing typing would double the time
if TYPE_CHECKING:
    from neox_bridge.api import (
        audit,
        batch,
        convert,
        diagnose,
        diff,
        execute,
        open_checkpoint,
        plan,
        publish,
        reshard,
        verify,
    )
    from neox_bridge.batches.row import BatchResult, BatchRow
    from neox_bridge.doctor.examination import Examination
    from neox_bridge.errors import (
        BridgeError,
        ChoiceNeeded,
        DiskFull,
        NotOfFamily,
        Refused,
        SettingsMissing,
        TargetUnusable,
        Unreachable,
        Unverified,
        UsageError,
    )
    from neox_bridge.execution.result import Result
    from neox_bridge.findings import Dropped, Finding
    from neox_bridge.frameworks.eras import Era, era_named
    from neox_bridge.hub.publish import Published
    from neox_bridge.layouts.checkpoint import Checkpoint
    from neox_bridge.layouts.folder_kinds import ForeignFolder
    from neox_bridge.layouts.quantized import QuantizedModel
    from neox_bridge.optimizer.options import Resharding
    from neox_bridge.planning.options import Options
    from neox_bridge.planning.plan import Plan
    from neox_bridge.progress import Progress
    from neox_bridge.verification.audit import Audit
    from neox_bridge.verification.compare import Difference
    from neox_bridge.verification.diff import Diff
    from neox_bridge.verification.verify import Verification
    from neox_bridge.version import __version__

__all__ = [
    "Audit",
    "BatchResult",
    "BatchRow",
    "BridgeError",
    "Checkpoint",
    "ChoiceNeeded",
    "Diff",
    "Difference",
    "DiskFull",
    "Dropped",
    "Era",
    "Examination",
    "Finding",
    "ForeignFolder",
    "NotOfFamily",
    "Options",
    "Plan",
    "Progress",
    "Published",
    "QuantizedModel",
    "Refused",
    "Resharding",
    "Result",
    "SettingsMissing",
    "TargetUnusable",
    "Unreachable",
    "Unverified",
    "UsageError",
    "Verification",
    "__version__",
    "audit",
    "batch",
    "convert",
    "diagnose",
    "diff",
    "era_named",
    "execute",
    "open_checkpoint",
    "plan",
    "publish",
    "reshard",
    "verify",
]

_NAMES_BY_MODULE = {
    "api": "audit batch convert diagnose diff execute open_checkpoint plan publish reshard verify",
    "batches.row": "BatchResult BatchRow",
    "doctor.examination": "Examination",
    "errors": "BridgeError ChoiceNeeded DiskFull NotOfFamily Refused SettingsMissing "
    "TargetUnusable Unreachable Unverified UsageError",
    "execution.result": "Result",
    "findings": "Dropped Finding",
    "frameworks.eras": "Era era_named",
    "hub.publish": "Published",
    "layouts.checkpoint": "Checkpoint",
    "layouts.folder_kinds": "ForeignFolder",
    "layouts.quantized": "QuantizedModel",
    "optimizer.options": "Resharding",
    "planning.options": "Options",
    "planning.plan": "Plan",
    "progress": "Progress",
    "verification.audit": "Audit",
    "verification.compare": "Difference",
    "verification.diff": "Diff",
    "verification.verify": "Verification",
    "version": "__version__",
}
_HOMES = {name: home for home, names in _NAMES_BY_MODULE.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """Imports the home of a public name when it is first used, so that the package is instant."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
